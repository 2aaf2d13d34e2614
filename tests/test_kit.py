"""The conformance kit itself: it turns red for wrong kernels, holds expected failures to their word, and reports."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from diffmax.testing.gate import Gate
from diffmax.testing.rows.checks import _near_on_average

_spec = importlib.util.spec_from_file_location("overlay", Path(__file__).with_name("overlay.py"))
overlay = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(overlay)

# each breaks one thing that the reference gets right
WRONG = {
    "unnormalised": "p = p * 1.001",
    "dense": "p = p + 1e-3",
    "nanmask": "p = torch.where(m == -torch.inf, torch.nan, p)",
    "deltas": "delta = delta + 0.01",
    "halfrows": "m = m.to(x.dtype)",
    "strided": "p = p.transpose(0, -1).contiguous().transpose(0, -1)",
    "lucky": "p = p + torch.rand_like(p) * 1e-9",
}
INIT = """
import torch
from diffmax import reference

def forward(x, e, dim, n_iter, ensure_sum_one):
    p, m, delta = reference.bisect(x, e, dim, n_iter, ensure_sum_one)
    {change}
    return p, m, delta

def lazy(x, e, dim, n_iter, ensure_sum_one):
    p, m, delta = reference.bisect(x, e, dim, n_iter, ensure_sum_one)
    fresh = torch.empty_like(p)  # and the second half never written
    fresh.view(-1)[: p.numel() // 2] = p.view(-1)[: p.numel() // 2]
    return (fresh if x.shape == (30, 130) else p), m, delta

def backward(grad, p, m, delta, x, e, dim, needs_e):
    grad_x, grad_e = reference.bisect_backward(grad, p, m, delta, x, e, dim, needs_e)
    return grad_x, grad_e * 1.01
"""
FIELDS = (
    "kernels={{'bisect': 'plug_{0}:{1}', 'bisect_backward': 'plug_{0}:{2}'}}, "
    "features=frozenset({{'tensor_alpha', 'alpha_gradient', 'deterministic'}})"
)


# the test of the kit that finds each of them, and what it says
CAUGHT = [
    ("unnormalised", "test_random_rows[0.5-float32]", "weights at alpha=0.5: error"),
    ("dense", "test_random_rows[0.5-float32]", "weights at alpha=0.5: error"),
    ("nanmask", "test_masks_and_bad_rows[float32]", "a fully masked row has weights"),
    ("deltas", "test_few_iterations_are_as_accurate_as_bisection[float32]", ""),
    ("strided", "test_strides_and_dims[float32]", "the result is not contiguous"),
    ("lucky", "test_repeatable[float32]", "results differ in their bits"),
    ("lazy", "test_writes_all_that_it_allocates[float32]", "weights in poisoned memory"),
    ("backward", "test_gradients[0.5-float32]", "gradient for e at alpha=0.5"),
    ("backward", "test_residuals_are_exchangeable[float32]", "gradient from exchanged residuals"),
]
# of the right one, what the wrong ones fail and more
CHOSEN = [
    *[(backend, test) for backend, test, _ in CAUGHT],
    *[("right", test) for test in dict.fromkeys(test for _, test, _ in CAUGHT)],
    ("right", "test_symmetries[float32]"),
    ("right", "test_masks_and_bad_rows[float64]"),
    ("right", "test_gradcheck"),
    ("right", "test_expected_failures_name_tests_of_this_kit"),
    ("unnormalised", "test_symmetries[float32]"),
    ("noisy", "test_expected_failures_name_tests_of_this_kit"),
]


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """All the wrong backends through the kit, in one run."""
    folder = tmp_path_factory.mktemp("wrong")
    names = [*WRONG, "lazy", "backward", "right", "noisy"]
    for name in names:
        forward = {"lazy": "lazy", "backward": "forward"}.get(name, "forward")
        back = "plug_backward:backward" if name == "backward" else "diffmax.reference:bisect_backward"
        fields = FIELDS.format(name, forward, "x").replace(f"plug_{name}:x", back)
        overlay.add_plugin(folder, name, init=INIT.format(change=WRONG.get(name, "pass")), fields=fields)
    tests = "from diffmax.testing.rows.conformance import BackendConformance\n"
    for name in names:
        expected = {
            "right": "{'test_symmetries[float32]': 'it passes, so this is a lie'}",
            "unnormalised": "{'test_symmetries': 'sums are known to be off', 'test_gradcheck': 'no float64'}",
            "noisy": "{'test_of_another_kit': 'misspelt'}",
        }.get(name, "{}")
        tests += f"class Test_{name}(BackendConformance):\n    backend = {name!r}\n    expected_failures = {expected}\n"
    (folder / "test_wrong.py").write_text(tests)
    options = [
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "diffmax.testing.report",
        "--diffmax-report",
        "report.json",
    ]
    chosen = [f"test_wrong.py::Test_{backend}::{test}" for backend, test in CHOSEN]
    subprocess.run(
        [sys.executable, "-m", "pytest", *options, *chosen],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        check=False,
    )
    report = json.loads((folder / "report.json").read_text())
    return report, {run["backend"]: {t["test"]: t for t in run["tests"]} for run in report["runs"]}


@pytest.mark.parametrize(("backend", "test", "why"), CAUGHT)
def test_a_wrong_kernel_turns_the_kit_red(reports, backend, test, why):
    entry = reports[1][backend][test]
    assert entry["outcome"] == "failed"
    assert why in entry["reason"]


def test_a_right_kernel_passes_and_a_dtype_that_is_not_claimed_is_asked_to_be_refused(reports):
    outcomes = {test: entry["outcome"] for test, entry in reports[1]["right"].items()}
    assert outcomes.pop("test_symmetries[float32]") == "failed"  # expected to fail, and did not
    assert outcomes["test_masks_and_bad_rows[float64]"] == "refused"
    assert outcomes["test_masks_and_bad_rows[float32]"] == "passed"
    assert set(outcomes.values()) == {"passed", "refused"}
    (run,) = [run for run in reports[0]["runs"] if run["backend"] == "right"]
    assert run["claims"]["bisect"]["dtypes"] == ["float32"]


def test_a_wrong_gradient_says_where_and_by_how_much():
    exact = torch.arange(6.0).double().view(2, 3)
    with pytest.raises(AssertionError, match=r"largest at \(1, 2\): got 5.05, exact 5; on the whole 1.01 times the exact one"):
        _near_on_average(1.01 * exact, Gate(exact, 1e-6), "gradient for value")
    _near_on_average(exact, Gate(exact, 1e-6), "gradient for value")


def test_an_expected_failure_must_fail(reports):
    entry = reports[1]["right"]["test_symmetries[float32]"]
    assert "XPASS(strict)" in entry["reason"]
    assert "it passes, so this is a lie" in entry["reason"]


def test_an_expected_failure_is_reported_with_its_reason(reports):
    entry = reports[1]["unnormalised"]["test_symmetries[float32]"]
    assert entry["outcome"] in ("expected failure", "failed")
    assert "sums are known to be off" in entry["reason"]


def test_a_misspelt_expectation_is_an_error(reports):
    assert reports[1]["noisy"]["test_expected_failures_name_tests_of_this_kit"]["outcome"] == "failed"


def test_the_report_names_backend_version_device_and_counts(reports):
    run = next(run for run in reports[0]["runs"] if run["backend"] == "right")
    assert (run["distribution"], run["version"], run["device"]) == ("plug-right", "1.0", "cpu")
    assert run["counts"] == {"failed": 1, "passed": len(run["tests"]) - 3, "refused": 2}
    assert run["left out"] == 0
    assert {entry["operator"] for entry in run["tests"]} == {"bisect"}
    assert set(reports[0]["environment"]) == {"diffmax-core", "torch", "python"}


def test_the_kit_does_not_load_itself_into_other_pytest_runs():
    code = "import importlib_metadata as m; print([e.value for e in m.entry_points(group='pytest11') if 'diffmax' in e.value])"
    assert overlay.run(code) == []
