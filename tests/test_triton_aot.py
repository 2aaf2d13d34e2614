"""What the shared Triton row kernels' binaries are like: which calls share one, wide loads, grids. Nothing runs.

Registers, spills and shared memory of every kernel on every architecture: `make check-triton`, docs/kernels.md.
"""

import functools

import pytest
import torch

from benchmarks.compile_kernels import TARGETS as CHECKED
from diffmax.kernels.triton.rows import backward as rows_bwd
from diffmax.kernels.triton.rows import forward as rows_fwd
from diffmax.kernels.triton.rows import launch
from diffmax.kernels.triton.rows import long_backward as long_bwd
from diffmax.kernels.triton.rows import split as split_fwd
from diffmax.kernels.triton.rows import stream as stream_fwd
from diffmax.testing.ahead_of_time import TARGETS, recording
from diffmax_cuda import configs as cuda_configs
from diffmax_rocm import configs as rocm_configs

pytestmark = pytest.mark.compiler

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
OTHER_TARGETS = tuple(sorted(set(TARGETS) - set(CHECKED)))

CASES = {"f32": (torch.float32, 1024, 0.15), "f32-long": (torch.float32, 65536, 0.15)}


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
    with recording(target, *KERNELS) as launched:
        operator.bisect(x, e, 1, 50, True)
        operator.bisect_backward(x, x, m, m, x if dtype == torch.float16 else None, e, 1, True)
    return launched


@functools.lru_cache
def cached(target, case, rows):
    return launches(target, case, rows)


@pytest.mark.parametrize("target", OTHER_TARGETS)
def test_other_architectures_compile_too(target):
    for compiled in cached(target, "f32", 300):
        assert compiled.resources["spilled"] == 0, f"{compiled.name}: {compiled.resources}"
        assert compiled.resources["shared"] <= compiled.target.shared, f"{compiled.name}: {compiled.resources}"


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
