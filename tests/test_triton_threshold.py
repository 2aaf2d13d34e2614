"""Threshold attention's Triton kernels: against formulas under the interpreter, and compiled ahead of time.

Triton decides at its import whether it interprets, so those tests run in a process of their own, which
`triton_threshold_interpreted.py` holds. Registers, spills and shared memory: `make check-triton`, docs/kernels.md.
"""

import pytest
import torch

from benchmarks.compile_kernels import call_threshold, kernels
from diffmax.kernels.triton.threshold import settings
from diffmax.kernels.triton.threshold.launch import ThresholdOperator
from diffmax.plugin import ThresholdCall
from diffmax.testing.ahead_of_time import recording
from tests import interpreted
from tests.repeated_products import of_operator


@pytest.mark.slow
@pytest.mark.interpreter
@interpreted.in_tiers
def test_the_kernels_pass_under_the_interpreter(tier):
    interpreted.passes("triton_threshold_interpreted.py", tier, sample=200)


@pytest.mark.parametrize("architecture", ["sm75", "sm80", "sm90", "sm100", "sm120", "gfx90a", "gfx942", "gfx1100"])
def test_tiles_of_the_other_kernels_divide_those_of_queries(architecture):
    """They load what the kernel for queries wrote, without masks."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for size in (16, 64, 128, 256):
            found = settings.blocks(architecture, dtype, size)
            assert found.dq.rows % found.dkv.rows == 0
            assert found.dq.rows % found.dbias.rows == 0
            assert found.dbias.keys == 2 * found.dbias.rows


@pytest.mark.compiler
@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("target", "instruction"),
    [("sm90", "wgmma.mma_async"), ("gfx942", "v_mfma_f32"), ("sm80", "mma.sync")],
)
def test_matrix_cores_are_used(target, instruction):
    own = [kernel for kernel in kernels() if kernel.__name__.startswith("threshold")]
    with recording(target, *own) as launched:
        call_threshold({"target": target, "dtype": "bfloat16", "size": "64", "weights": "softmax", "options": "bias, grouped"})
    assert {compiled.name for compiled in launched} == {kernel.__name__ for kernel in own}
    for compiled in launched:
        assert compiled.resources["shared"] <= compiled.target.shared, f"{compiled.name}: {compiled.resources}"
        if "dbias" not in compiled.name:  # whose tiles have 32 queries
            assert instruction in compiled.text, compiled.name


@pytest.mark.compiler
@pytest.mark.sampled(3)
@pytest.mark.parametrize("weights", ["softmax", "scores"])
@pytest.mark.parametrize(
    ("target", "dtype", "size"),
    [
        *(
            (target, dtype, size)
            for target in ("gfx942", "gfx90a")
            for dtype in ("bfloat16", "float32")
            for size in ("64", "256")
        ),
        *((target, "bfloat16", size) for target in ("sm80", "gfx1100") for size in ("64", "128")),
        ("sm120", "float32", "64"),
    ],
)
def test_no_warp_repeats_what_another_computes(target, dtype, size, weights):
    """Decision 0137. On NVIDIA larger heads have too few registers for it."""
    found = of_operator("threshold", target, dtype=dtype, size=size, weights=weights, options="plain")
    assert found == []


@pytest.mark.compiler
def test_lengths_heads_and_thresholds_share_their_binaries():
    operator = ThresholdOperator(lambda device: "sm90", ptx=True)
    own = [kernel for kernel in kernels() if kernel.__name__.startswith("threshold")]
    with recording("sm90", *own) as launched:
        for batch, heads, length in ((1, 1, 300), (2, 3, 4096), (1, 2, 1000)):
            query = torch.zeros(batch, heads, length, 16, dtype=torch.bfloat16)
            call = ThresholdCall(scale=0.25 / heads, weights="scores", theta=torch.zeros(1, heads, length))
            operator.threshold_attention(query, query, query, call, False)
    assert len({id(compiled.kernel) for compiled in launched}) == 1
