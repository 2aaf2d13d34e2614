"""The Dockerfile as .ci/container.py reads it; `make container` runs its steps."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def container(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / ".ci"))
    monkeypatch.delitem(sys.modules, "container", raising=False)
    yield importlib.import_module("container")
    sys.modules.pop("container", None)


def test_lines_that_go_on_are_put_together_and_comments_left_out(container):
    text = "# a comment\nFROM base\nRUN one && \\\n    two\n\n# another\nuser 1:1\n"
    assert container.instructions(text) == [("FROM", "base"), ("RUN", "one && two"), ("USER", "1:1")]


def test_every_instruction_of_the_dockerfile_is_known_and_what_it_copies_is_there(container, tmp_path, monkeypatch):
    monkeypatch.setattr(container.Image, "run", lambda *_: None)
    image = container.Image(tmp_path, ROOT, {})
    for name, rest in container.instructions((ROOT / "Dockerfile").read_text(encoding="utf-8")):
        image.step(name, rest)
    assert image.user.partition(":")[0] not in ("", "0", "root")
    assert (tmp_path / image.entry[0].lstrip("/")).read_bytes() == (ROOT / ".ci" / "container_entry.sh").read_bytes()
    assert (tmp_path / "opt" / "diffmax" / "source" / "pyproject.toml").is_file()
    assert image.environment["NUMBA_CACHE_DIR"].startswith("/tmp/")
    assert image.environment["PATH"].startswith("/opt/diffmax/venv/bin:/usr/local/bin:")


def test_what_is_unknown_or_hidden_is_refused(container, tmp_path):
    image = container.Image(tmp_path, ROOT, {})
    with pytest.raises(container.ContainerError, match=r"has VOLUME, which .* does not know"):
        image.step("VOLUME", "/data")
    with pytest.raises(container.ContainerError, match=r"COPY README\.md: \.dockerignore hides it"):
        image.step("COPY", "README.md /opt")


def test_the_entry_goes_on_where_there_is_no_place_for_kernels(tmp_path):
    (tmp_path / "file").touch()
    command = ["sh", str(ROOT / ".ci" / "container_entry.sh"), "echo", "went on"]
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path / "file" / "kernels")}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0
    assert done.stdout == "went on\n"
    assert "kernels cannot be written to, so kernels are compiled anew; run with --tmpfs /tmp" in done.stderr
