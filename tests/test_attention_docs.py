"""docs/attention.md says what the backends declare."""

import re
from pathlib import Path

import pytest

from diffmax._dispatch import registry
from diffmax.plugin import FEATURES

PAGE = (Path(__file__).parents[1] / "docs" / "attention.md").read_text(encoding="utf-8")
HEADER = re.search(r"^\| feature \|(.*)\|$", PAGE, re.MULTILINE)
COLUMNS = re.findall(r"`(\w+)`", HEADER[1])
ROWS = {name: cells.split("|")[:-1] for name, cells in re.findall(r"^\| `(\w+)` \|(.*)$", PAGE, re.MULTILINE)}


def test_every_backend_of_core_with_attention_has_a_column():
    assert set(COLUMNS) == {b.name for b in registry.backends() if "attention" in b.kernels}


@pytest.mark.parametrize("feature", FEATURES)
def test_the_table_is_what_the_backends_declare(feature):
    declared = {backend.name: feature in backend.features for backend in registry.backends()}
    assert [("✓" in cell) for cell in ROWS[feature]] == [declared[name] for name in COLUMNS]
