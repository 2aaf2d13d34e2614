"""Every type of model of transformers: served as eager attention serves it, or refused with a reason. See docs/models.md."""

import re

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'diffmax-core[transformers]'")

from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES  # noqa: E402

from tests.model_types import HEAD, PAGE, UnbuiltError, answer, tasks_of  # noqa: E402

pytestmark = pytest.mark.sampled(38)

TEXT = PAGE.read_text()
SAME_VERSION = f"in transformers {transformers.__version__}," in TEXT
ROWS = {
    (model_type, task): text
    for model_type, tasks, text in re.findall(r"^\| (\S+) \| ([\w, ]+) \| (.+) \|$", TEXT, re.MULTILINE)
    for task in tasks.split(", ")
    if model_type != "type"
}
UNTRIED = {model_type for line in re.findall(r"^- .*: (.+)$", TEXT, re.MULTILINE) for model_type in line.split(", ")}


@pytest.fixture(autouse=True)
def _quiet_and_on_one_thread():
    """Random models complain about settings that do not matter here; on models this small a second thread costs more."""
    verbosity, threads = transformers.logging.get_verbosity(), torch.get_num_threads()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    yield
    transformers.logging.set_verbosity(verbosity)
    torch.set_num_threads(threads)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("model_type", "task"), list(ROWS))
def test_served_as_eager_or_refused_as_the_page_says(model_type, task):
    if model_type not in MODEL_MAPPING_NAMES and not SAME_VERSION:
        pytest.skip(f"transformers {transformers.__version__} has no {model_type}")
    try:
        found = answer(model_type, task)
    except UnbuiltError:
        assert not SAME_VERSION, f"{model_type} can no longer be built"
        pytest.skip(f"transformers {transformers.__version__} builds no small {model_type}")
    if SAME_VERSION:
        assert found == ROWS[model_type, task], "make docs/models.md again: python tests/model_types.py"


def test_the_page_has_every_type_and_enough_of_them_are_tried():
    assert not SAME_VERSION or {model_type for model_type, _ in ROWS} | UNTRIED == set(MODEL_MAPPING_NAMES)
    tried = {model_type for model_type, _ in ROWS}
    assert len(tried) >= 380
    assert {task for _, task in ROWS} == {"causal", "seq2seq", "masked", "base"}
    assert not SAME_VERSION or all(task in tasks_of(model_type) for model_type, task in ROWS)
    counted = [int(n) for n in re.search(r"^(\d+) types are served, (\d+) refused, (\d+) have no", TEXT, re.MULTILINE).groups()]
    assert sum(counted) == len(tried)
    assert counted[0] >= 300
    assert "WRONG" not in TEXT


def test_the_page_begins_as_it_is_written():
    """So that a page made again loses nothing that was written into it by hand."""
    version = re.search(r"in transformers ([\w.]+),", TEXT)[1]
    counted = re.search(
        r"^(\d+) types are served, (\d+) refused, (\d+) have no attention; (\d+) were", TEXT, re.MULTILINE
    ).groups()
    names = "served", "refused", "none", "untried"
    assert TEXT.startswith(HEAD.format(version=version, **dict(zip(names, counted, strict=True))))
