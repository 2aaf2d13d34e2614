"""Every shared Triton kernel, compiled ahead of time from its real launch code, for each architecture, with the shipped tables.

Nothing runs: `diffmax.testing.ahead_of_time` stands in for the driver. The budget is zero bytes spilled, and shared memory
within the device's limit.
"""

import functools

import pytest
import torch

from diffmax.kernels.triton import launch, long_bwd, rows_bwd, rows_fwd, split_fwd, stream_fwd
from diffmax.testing.ahead_of_time import TARGETS, recording
from diffmax_cuda import configs as cuda_configs
from diffmax_rocm import configs as rocm_configs

KERNELS = (
    rows_fwd.bisect_rows_kernel,
    rows_bwd.bisect_bwd_rows_kernel,
    stream_fwd.bisect_stream_kernel,
    split_fwd.split_top_kernel,
    split_fwd.split_start_kernel,
    split_fwd.split_step_kernel,
    split_fwd.split_finish_kernel,
    split_fwd.split_write_kernel,
    long_bwd.bisect_bwd_long_kernel,
)
NAMES = {kernel.__name__ for kernel in KERNELS}
CORE_TARGETS = ("sm80", "sm90", "sm100", "gfx90a", "gfx942", "gfx1100")
OTHER_TARGETS = tuple(sorted(set(TARGETS) - set(CORE_TARGETS)))

# e = 1 - alpha: run-time exponent, multiplications, and None for a tensor
CASES = {
    "f32": (torch.float32, 1024, 0.15),
    "f32-square": (torch.float32, 1024, 0.5),
    "bf16-largest": (torch.bfloat16, 16384, 0.15),
    "f16-short": (torch.float16, 48, None),
    "f64": (torch.float64, 1024, 0.15),
    "f32-long": (torch.float32, 65536, 0.15),
}


def table(target):
    kind = TARGETS[target]
    if kind.backend == "cuda":
        return cuda_configs.table(kind.arch // 10, kind.arch % 10)
    return rocm_configs.table(kind.arch)


def launches(target, case, rows=300):
    """What a forward and a backward with alpha's gradient launch."""
    dtype, n, e = CASES[case]
    operator = launch.RowOperator(lambda device: table(target), lambda device: 132, ptx=TARGETS[target].backend == "cuda")
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    x, m = torch.zeros(1, n, dtype=dtype).expand(rows, n), torch.zeros(rows, 1, dtype=acc)
    e = torch.full((rows, 1), 0.3, dtype=acc) if e is None else e
    with recording(target, *KERNELS) as launched:
        operator.bisect(x, e, 1, 50, True)
        operator.bisect_backward(x, x, m, m, x if dtype == torch.float16 else None, e, 1, True)
    return launched


def check_budget(launched):
    assert launched
    for compiled in launched:
        found = compiled.resources
        assert found["spilled"] == 0, f"{compiled.name} spills {found['spilled']} bytes: {found}"
        assert found["shared"] <= compiled.target.shared, f"{compiled.name}: {found}"


@functools.lru_cache
def cached(target, case, rows):
    return launches(target, case, rows)


@pytest.mark.parametrize("case", ["f32", "f32-square", "bf16-largest", "f16-short"])
@pytest.mark.parametrize("target", CORE_TARGETS)
def test_the_shipped_tiles_spill_nothing(target, case, record_property):
    launched = cached(target, case, 300)
    check_budget(launched)
    for compiled in launched:
        record_property(f"{compiled.name} {case}", str(compiled.resources))


@pytest.mark.parametrize("target", ["sm90", "gfx942"])
def test_float64_and_streamed_rows_spill_nothing(target):
    for case, rows in (("f64", 300), ("f32-long", 300), ("f32-long", 1)):
        check_budget(cached(target, case, rows))


@pytest.mark.parametrize("target", OTHER_TARGETS)
def test_other_architectures_compile_too(target):
    check_budget(cached(target, "f32", 300))


def test_every_kernel_was_compiled():
    every = [
        compiled for case, rows in (("f32", 300), ("f32-long", 300), ("f32-long", 1)) for compiled in cached("sm90", case, rows)
    ]
    assert {compiled.name for compiled in every} == NAMES


@pytest.mark.parametrize("target", ["sm90", "gfx942"])
def test_whole_vectors_are_loaded_16_bytes_at_a_time(target):
    forward, backward = cached(target, "f32", 300)
    assert forward.resources["wide_loads"] >= 1
    assert backward.resources["wide_loads"] >= 2


def test_lengths_strides_and_alphas_share_their_binaries():
    """No recompilation within a padded length: one for all alphas above 1/2 with a run-time exponent, one for those below."""
    operator = launch.RowOperator(lambda device: table("sm90"), lambda device: 132, ptx=True)
    with recording("sm90", *KERNELS) as launched:
        for n, e in ((520, 0.15), (1000, 0.31), (1024, 0.7), (612, 0.97)):
            operator.bisect(torch.zeros(3, 5, n), e, 2, 50, True)
            operator.bisect(torch.zeros(7, n), e, 1, 50, True)
    assert len({id(compiled.kernel) for compiled in launched}) == 2


def test_a_long_row_fills_the_device():
    launched = cached("sm90", "f32-long", 1)
    assert max(compiled.grid[0] for compiled in launched) >= 8
    steps = [compiled for compiled in launched if compiled.name == "split_step_kernel"]
    assert len(steps) == 3
