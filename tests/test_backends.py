"""diffmax.backends(), and what an import does and does not do."""

import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch

import diffmax
from diffmax import plugin
from diffmax.machine import env
from diffmax.machine.inspection import KernelRecord, KernelTable
from tests import fresh


def test_lists_every_kernel_with_its_device_dtypes_and_status():
    records = {(record.backend, record.operator): record for record in diffmax.backends()}
    assert set(records) == {(b, o) for b in ("numba", "cpu", "reference") for o in plugin.OPERATORS}
    compiled, cpu, reference = (records[name, "bisect"] for name in ("numba", "cpu", "reference"))
    assert (compiled.device, compiled.status, compiled.distribution) == ("cpu", "active", "diffmax-core")
    assert (cpu.device, cpu.status, cpu.distribution) == ("cpu", "available", "diffmax-core")
    assert cpu.version == diffmax.__version__
    assert cpu.dtypes == "float16, bfloat16, float32, float64"
    assert (reference.device, reference.reason) == ("any", "on devices that no other backend serves")
    module, _, function = cpu.kernel.partition(":")
    assert callable(getattr(sys.modules[module] if module in sys.modules else __import__(module, fromlist=["x"]), function))


def test_prints_as_a_table():
    lines = repr(diffmax.backends()).splitlines()
    assert lines[0].split() == [
        "backend",
        "distribution",
        "version",
        "device",
        "operator",
        "kernel",
        "status",
        "reason",
        "dtypes",
    ]
    assert len(lines) == 1 + len(diffmax.backends())
    assert lines[1].startswith("numba ")
    column = lines[0].index("operator")
    assert all(line[column:].startswith(plugin.OPERATORS) for line in lines[1:])


def record(backend="acme", device="cpu", operator="bisect", status="active", reason=""):
    return KernelRecord(backend, "diffmax-acme", "2.0", device, operator, f"acme:{operator}", status, reason, "float32")


def test_prints_a_row_per_backend_with_what_differs_between_its_operators():
    long = " ".join(["word"] * 40)
    table = KernelTable(
        [
            record(),
            record(operator="bisect_backward"),
            record(operator="attention", status="available", reason="numba is preferred"),
            record("other", device="xpu", operator="attention_kvcache", status="unavailable", reason=long),
            record("other", device="cuda", operator="attention_kvcache", status="unavailable", reason=long),
            record("broken", device="", operator="", status="failed", reason="ImportError: no libacme.so"),
        ]
    )
    lines = str(table).splitlines()
    assert [line.split() for line in lines[:2]] == [
        ["backend", "device", "status", "operators"],
        ["acme", "cpu", "active", "bisect,", "attention", "(no", "backward)", "attention:", "numba", "is", "preferred"],
    ]
    assert lines[2].split() == ["other", "xpu,", "cuda", "unavailable", "attention_kvcache"]
    assert " ".join(" ".join(lines[3:-1]).split()) == long
    assert lines[-1].split() == ["broken", "failed", "ImportError:", "no", "libacme.so"]
    assert max(map(len, lines)) < 98
    assert repr(table).count("\n") == len(table)


def run(code, *folders):
    return fresh.python(code, *folders).stdout


def older_project(folder, content="NAME = 'the older project'"):
    """What `pip install diffmax` leaves in a folder of packages."""
    (folder / "diffmax-0.2.dist-info").mkdir(parents=True)
    (folder / "diffmax-0.2.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: diffmax\nVersion: 0.2\n")
    if content:
        (folder / "diffmax").mkdir()
        (folder / "diffmax" / "__init__.py").write_text(content)


@pytest.mark.slow
def test_the_older_project_installed_first_is_warned_about(tmp_path):
    older_project(tmp_path, content=None)  # its files were overwritten by diffmax-core's, its metadata was not
    code = "import warnings; warnings.simplefilter('error')\ntry: import diffmax\nexcept RuntimeWarning as w: print(w)"
    output = run(code, tmp_path)
    assert "the older project diffmax 0.2 is installed beside diffmax-core" in output
    assert "run: pip uninstall diffmax && pip install --force-reinstall --no-deps diffmax-core" in output


def test_the_older_project_installed_last_replaces_diffmax_core(tmp_path):
    """Nothing of diffmax-core runs then, so nothing can warn: the README says how to see it and what to do."""
    older_project(tmp_path)
    code = "import diffmax; print(diffmax.NAME, hasattr(diffmax, 'backends'))"
    assert run(code, tmp_path).strip() == "the older project False"


def test_import_loads_no_kernel_and_no_optional_package():
    loaded = run(
        "import sys, torch; before = set(sys.modules); import diffmax; print(*sorted(set(sys.modules) - before))"
    ).split()
    assert "diffmax" in loaded
    unwanted = (
        "diffmax.kernels.cpu",
        "diffmax.kernels.numba",
        "diffmax.kernels.triton",
        "diffmax.testing",
        "diffmax.integrations",
        "numba",
        "triton",
        "transformers",
        "torch_npu",
    )
    assert not [name for name in loaded if name.startswith(unwanted)]


def test_the_operator_survives_a_fork():
    code = """
import os, torch, diffmax
x = torch.randn(300, 400)
expected = diffmax.diffmax_bisect(x, 0.5)
child = os.fork()
if child == 0:
    torch.set_num_threads(1)
    os._exit(0 if torch.allclose(diffmax.diffmax_bisect(x, 0.5), expected) else 1)
print(os.waitpid(child, 0)[1])
"""
    assert run(code).strip() == "0"


def test_everything_public_is_documented():
    for name in diffmax.__all__:
        assert name == "__version__" or getattr(diffmax, name).__doc__


def test_dtypes_are_those_that_the_operator_takes():
    from diffmax.operators.common.numerics import FLOAT_DTYPES

    assert set(FLOAT_DTYPES) == {torch.float16, torch.bfloat16, torch.float32, torch.float64}


def test_the_list_can_be_read_when_the_environment_names_no_backend(monkeypatch):
    """It raised NoBackendError, whose message says to read the list."""
    monkeypatch.setenv("DIFFMAX_BACKEND", "nope")
    shown = run("import diffmax; print(diffmax.backends())")
    assert "DIFFMAX_BACKEND names a backend that is not loaded" in shown
    assert " active " not in shown  # nor is the reference, for devices that no other backend serves


def test_the_page_for_vendors_names_every_field_feature_hook_and_variable():
    page = (Path(__file__).parents[1] / "docs/backends.md").read_text()
    hooks = [name for name in vars(plugin.HookSpecs) if name.startswith("diffmax_")]
    for name in (
        *(field.name for kind in (plugin.Backend, plugin.Kernel) for field in fields(kind)),
        *plugin.FEATURES,
        *env.MEANINGS,
        *hooks,
    ):
        assert f"| `{name}" in page, name
