"""Decoding's Triton kernels: under the interpreter, in a process of their own, and how they are launched."""

import pytest
import torch

from diffmax.kernels.triton.decoding import finish as kvcache_finish
from diffmax.kernels.triton.decoding import launch
from diffmax.kernels.triton.decoding import list as kvcache_list
from diffmax.kernels.triton.decoding import read as kvcache_read
from diffmax.kernels.triton.decoding import solve as kvcache_solve
from diffmax.kernels.triton.decoding import start as kvcache_start
from diffmax.kernels.triton.decoding import values as kvcache_values
from diffmax.kernels.triton.decoding.launch import Decoder, Grid
from diffmax.testing.ahead_of_time import recording
from tests import interpreted

KERNELS = (
    kvcache_start.kvcache_start_kernel,
    kvcache_read.kvcache_read_kernel,
    kvcache_list.kvcache_list_kernel,
    kvcache_solve.kvcache_solve_kernel,
    kvcache_values.kvcache_values_kernel,
    kvcache_finish.kvcache_finish_kernel,
)


@pytest.mark.slow
@pytest.mark.interpreter
@interpreted.in_tiers
def test_the_kernels_pass_under_the_interpreter(tier):
    interpreted.passes("triton_kvcache.py", tier, sample=48)


def launched_for(e=0.15, **options):
    """The launches for a cache of 64k tokens and GQA 8, with a new token."""
    decoder, features = Decoder(lambda device: 132, ptx=True), frozenset({"gqa", "causal"})
    with recording("sm90", *KERNELS) as launched:
        decoder.warmup(torch.device("cpu"), torch.bfloat16, 128, 128, e, False, features, room=65536, **options)
    assert [compiled.name for compiled in launched] == [kernel.__name__ for kernel in KERNELS]
    return dict(zip(("start", "read", "list", "solve", "values", "finish"), launched, strict=True))


@pytest.mark.slow
def test_launches_over_the_cache_fill_a_device():
    """With bounds and a new token. Registers and spills of all cases: `make check-triton`."""
    launched = launched_for(bounds=True)
    for name in ("start", "read", "list", "values"):
        assert launched[name].grid[0] * launched[name].grid[1] >= 100
    # a program per row; parts of rows and columns
    assert launched["solve"].grid[:2] == (1, 8)
    assert launched["finish"].grid[0] * launched["finish"].grid[1] >= 32
    assert launched["finish"].resources["registers"] <= 128


@pytest.mark.parametrize("e", [0.5, 0.15])
def test_plain_kernels_spill_nothing(e):
    for compiled in launched_for(e).values():
        assert compiled.resources["spilled"] == 0, compiled.name


def test_splits_do_not_change_which_program_adds_what():
    """Rows and columns of the output that one program adds up: together they are the whole block, for any number of splits."""
    for splits in (1, 3, 8, 100, 128):
        for block_m, block_v in ((16, 128), (32, 64), (16, 256), (16, 16)):
            grid = Grid(block_m, 64, 8, 1, 1, 64, 1, splits)
            rows, columns = launch._piece(grid, launch.power_of_two(splits), block_v)
            assert block_m % rows == 0
            assert block_v % columns == 0
            assert rows * columns * splits <= max(launch.MOST_SUMMED, 16 * splits)
