"""Power attention's Triton kernels: against the reference under the interpreter, and compiled ahead of time.

Triton decides at its import whether it interprets, so those tests run in a process of their own, which
`triton_power_interpreted.py` holds. Registers, spills and shared memory: `make check-triton`, docs/kernels.md.
"""

import pytest
import torch

from benchmarks.compile_kernels import call_power, kernels
from diffmax.kernels.triton.power.launch import PowerOperator
from diffmax.plugin import PowerCall
from diffmax.testing.ahead_of_time import recording
from tests import interpreted
from tests.repeated_products import of_operator


@pytest.mark.slow
@pytest.mark.interpreter
@interpreted.in_tiers
def test_the_kernels_pass_under_the_interpreter(tier):
    interpreted.passes("triton_power_interpreted.py", tier, sample=200)


@pytest.mark.compiler
@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("target", "instruction"),
    [("sm90", "wgmma.mma_async"), ("gfx942", "v_mfma_f32"), ("sm80", "mma.sync")],
)
def test_matrix_cores_are_used(target, instruction):
    own = [kernel for kernel in kernels() if kernel.__name__.startswith("power")]
    with recording(target, *own) as launched:
        call_power({"target": target, "dtype": "bfloat16", "size": "64", "degree": "2", "features": "plain"})
    names = {compiled.name for compiled in launched}
    assert names == {kernel.__name__ for kernel in own}
    for compiled in launched:
        assert compiled.resources["shared"] <= compiled.target.shared, f"{compiled.name}: {compiled.resources}"
        if "scan" not in compiled.name and "means" not in compiled.name:
            assert instruction in compiled.text, compiled.name


@pytest.mark.compiler
@pytest.mark.sampled(3)
@pytest.mark.parametrize("degree", ["2", "4"])
@pytest.mark.parametrize(
    ("target", "dtype", "size"),
    [
        *(
            (target, dtype, size)
            for target in ("gfx942", "gfx90a")
            for dtype in ("bfloat16", "float32")
            for size in ("32", "128")
        ),
        *(("sm80", dtype, "32") for dtype in ("bfloat16", "float32")),
        ("sm120", "float16", "64"),
        *(("gfx1100", "bfloat16", size) for size in ("64", "128")),
    ],
)
def test_no_warp_repeats_what_another_computes(target, dtype, size, degree):
    """Decision 0137. On NVIDIA larger heads have too few registers for it, on RDNA the output and the update."""
    besides = ("scan", "means", *(("out", "update") if target == "gfx1100" else ()))
    found = of_operator("power", target, besides, dtype=dtype, size=size, degree=degree, features="plain")
    assert found == []


@pytest.mark.compiler
def test_lengths_and_heads_share_their_binaries():
    operator = PowerOperator(lambda device: "sm90", ptx=True)
    own = [kernel for kernel in kernels() if kernel.__name__.startswith("power")]
    with recording("sm90", *own) as launched:
        for batch, heads, length, chunk in ((1, 1, 300, 100), (2, 3, 4096, 128), (1, 2, 1000, 333)):
            query = torch.zeros(batch, heads, length, 16, dtype=torch.bfloat16)
            operator.power_attention(query, query, query, PowerCall(degree=2, scale=0.25, chunk=chunk), False)
    assert len({id(compiled.kernel) for compiled in launched}) == 3
