"""Dispatch, gradients and messages on an accelerator that is not there: a stand-in `npu` in a process of its own."""

import importlib.util
import os
from pathlib import Path

import pytest
import torch

_spec = importlib.util.spec_from_file_location("overlay", Path(__file__).with_name("overlay.py"))
overlay = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(overlay)

needs_python_backends = pytest.mark.skipif(
    not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"),
    reason=f"torch {torch.__version__} cannot host a device written in Python (2.11 can)",
)

ON_DEVICE = """
import json, sys, warnings
sys.path.insert(0, {tests!r})
import torch, standin_device
from standin_device import to_cpu, to_device
import diffmax
from diffmax import diffmax_bisect

torch.manual_seed(0)
x, alpha, grad = torch.randn(4, 3, 9), torch.full((3, 1), 0.6), torch.randn(4, 3, 9)
expected_x, expected_alpha = x.clone().requires_grad_(), alpha.clone().requires_grad_()
expected = diffmax_bisect(expected_x, expected_alpha, backend="reference")
expected.backward(grad)

on_x, on_alpha = to_device(x).requires_grad_(), to_device(alpha).requires_grad_()
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    p = diffmax_bisect(on_x, on_alpha)
    p.backward(to_device(grad))
    diffmax_bisect(on_x, 0.5)
close = lambda ours, theirs: bool(torch.allclose(to_cpu(ours.detach()), theirs.detach(), atol=1e-6))
try:
    diffmax_bisect(on_x, 0.5, backend="cpu")
except diffmax.NoBackendError as error:
    refused = str(error)
reads = standin_device.OPERATORS["aten::_local_scalar_dense"]
on_x.detach().reshape(-1)[0].item()
print(json.dumps(dict(
    device=p.device.type,
    p=close(p, expected), x=close(on_x.grad, expected_x.grad), alpha=close(on_alpha.grad, expected_alpha.grad),
    warnings=[str(w.message) for w in caught],
    refused=refused,
    reads=[reads, standin_device.OPERATORS["aten::_local_scalar_dense"]],
    chosen=diffmax.explain("diffmax_bisect", on_x, 0.5).chosen,
    calls=getattr(sys.modules.get("plug_acme"), "CALLS", None),
)))
"""


def on_device(*folders, **environment):
    return overlay.run(ON_DEVICE.format(tests=os.fspath(Path(__file__).parent)), *folders, **environment)


@needs_python_backends
def test_without_its_plugin_the_reference_serves_and_says_so_once():
    outcome = on_device(DIFFMAX_PLUGINS="0")  # diffmax-npu is installed for its own tests
    assert outcome["device"] == "npu"
    assert (outcome["p"], outcome["x"], outcome["alpha"]) == (True, True, True)
    assert outcome["chosen"] == "reference"
    assert len(outcome["warnings"]) == 1
    said = "no fused kernel for bisect of float32 on npu (cann), needs tensor_alpha: the reference runs"
    assert said in outcome["warnings"][0]
    assert outcome["warnings"][0].endswith("run: pip install diffmax-npu")
    assert "cpu: serves cpu, not npu" in outcome["refused"]
    assert outcome["reads"] == [0, 1]  # the reference never waits for the device; a read would have been counted


@needs_python_backends
def test_with_a_plugin_its_kernels_run_on_the_device(tmp_path):
    overlay.add_plugin(
        tmp_path,
        "acme",
        fields="device_types=('npu',), runtime='cann', automatic=True, dtypes=(torch.float32,), features=frozenset("
        "{'tensor_alpha', 'alpha_gradient'}), kernels={'bisect': 'plug_acme:forward', 'bisect_backward': 'plug_acme:backward'}",
        init=(
            "CALLS = []\n"
            "def forward(x, *rest):\n"
            "    from diffmax import reference\n"
            "    CALLS.append(['forward', x.device.type])\n"
            "    return reference.bisect(x, *rest)\n"
            "def backward(grad, *rest):\n"
            "    from diffmax import reference\n"
            "    CALLS.append(['backward', grad.device.type])\n"
            "    return reference.bisect_backward(grad, *rest)\n"
        ),
    )
    outcome = on_device(tmp_path)
    assert (outcome["p"], outcome["x"], outcome["alpha"]) == (True, True, True)
    assert outcome["chosen"] == "acme"
    assert outcome["warnings"] == []
    assert outcome["calls"] == [["forward", "npu"], ["backward", "npu"], ["forward", "npu"]]


@needs_python_backends
def test_strict_refuses_plain_pytorch_on_the_device():
    result = overlay.run(ON_DEVICE.format(tests=os.fspath(Path(__file__).parent)), check=False, DIFFMAX_STRICT="1")
    assert "NoBackendError: DIFFMAX_STRICT=1: no fused kernel for bisect of float32 on npu (cann)" in result.stderr
