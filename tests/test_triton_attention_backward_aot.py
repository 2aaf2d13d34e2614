"""What the binaries of attention's Triton backward are like: which calls share one, wide loads, tiles. Nothing runs.

Registers, spills and shared memory on every architecture: `make check-triton`, docs/kernels.md.
"""

import itertools

import pytest
import torch

from diffmax.kernels.tools import WORD
from diffmax.kernels.triton.attention import dbias as attention_bwd_dbias
from diffmax.kernels.triton.attention import dkv as attention_bwd_dkv
from diffmax.kernels.triton.attention import dq as attention_bwd_dq
from diffmax.kernels.triton.attention import tiles as attention_tiles
from diffmax.kernels.triton.attention.launch import AttentionOperator
from diffmax.kernels.triton.attention.settings import backward_blocks
from diffmax.plugin import TILE, AttentionCall, Saved, Wanted
from diffmax.testing.ahead_of_time import TARGETS, recording
from tests.repeated_products import repeated

pytestmark = pytest.mark.compiler

KERNELS = (
    attention_bwd_dq.attention_bwd_dq_kernel,
    attention_bwd_dkv.attention_bwd_dkv_kernel,
    attention_bwd_dbias.attention_bwd_dbias_kernel,
)
MATRIX_INSTRUCTIONS = {"cuda": ("mma.sync", "wgmma.mma_async", "tcgen05.mma"), "hip": ("v_mfma_", "v_wmma_")}


def operator(target):
    return AttentionOperator(lambda device: target, lambda device: 132, ptx=TARGETS[target].backend == "cuda")


def launches(target, dtype, size, e=None, more=None, needs_bias=False):
    """What a backward under causality launches, for alpha as a tensor, with its gradient, or e."""
    x, m = torch.zeros(1, 2, 128, size, dtype=dtype), torch.zeros(1, 2, 128)
    live = torch.zeros(1, 2, 2, 1, dtype=torch.int32)
    needs_e, e = e is None, torch.full((2,), 0.3) if e is None else e
    call = AttentionCall(scale=0.1, e=e, right=0, **(more or {}))
    with recording(target, *KERNELS) as launched:
        operator(target).attention_backward(x, x, x, x, Saved(m, m, x, live), call, Wanted(needs_e, needs_bias))
    return launched


def test_lengths_heads_windows_and_alphas_share_their_binaries():
    """One binary per kernel, whatever the lengths, the number of heads, and alpha with a run-time exponent."""
    seen = {}
    launched = []
    for length, heads, e in ((128, 2, 0.15), (1000, 3, 0.31), (64, 1, 0.7), (77, 5, 0.24)):
        call = AttentionCall(scale=0.1 * heads, e=e, left=length // 3, lower_right=True)
        query, m = torch.zeros(2, heads, length, 64, dtype=torch.bfloat16), torch.zeros(2, heads, length)
        live = torch.zeros(2, heads, -(-length // 64), 1, dtype=torch.int32)
        with recording("sm90", *(KERNELS if not launched else ())) as some:
            operator("sm90").attention_backward(*(query,) * 4, Saved(m, m, query, live), call, Wanted())
        launched += some
    for compiled in launched:
        seen.setdefault(compiled.name, set()).add(id(compiled.kernel))
    assert {name: len(binaries) for name, binaries in seen.items()} == {kernel.__name__: 1 for kernel in KERNELS[:2]}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("target", ["gfx942", "sm90"])
def test_aligned_rows_are_loaded_16_bytes_at_a_time_and_matrix_cores_are_used(target):
    for compiled in launches(target, torch.bfloat16, 128, e=0.5):
        assert any(name in compiled.text for name in MATRIX_INSTRUCTIONS[compiled.target.backend])
        assert compiled.resources["wide_loads"] >= 2 or "cp.async.cg" in compiled.text


@pytest.mark.sampled(12)
@pytest.mark.parametrize("e", [0.5, None], ids=["half", "learned"])
@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("target", ["sm90", "gfx942", "sm80"])
def test_calls_without_options_spill_two_registers_at_most(target, size, e):
    allowed = 8 if (target, size) == ("sm90", 128) else 0
    assert max(compiled.resources["spilled"] for compiled in launches(target, torch.bfloat16, size, e)) <= allowed


@pytest.mark.sampled(8)
@pytest.mark.parametrize("size", [64, 128, 256])
@pytest.mark.parametrize(
    ("target", "dtype"),
    [*itertools.product(["gfx942", "gfx90a"], [torch.bfloat16, torch.float32]), ("gfx1100", torch.bfloat16)],
)
def test_no_warp_of_amd_repeats_what_another_computes(target, size, dtype):
    """A matrix instruction of CDNA computes 32 by 32, if nobody asks for 16: tiles are small beside that."""
    assert {compiled.name: repeated(compiled) for compiled in launches(target, dtype, size, 0.15)} == {
        kernel.__name__: 1 for kernel in KERNELS[:2]
    }


def test_the_tiles_are_those_of_the_contract():
    assert attention_tiles.TILE.value == TILE
    assert attention_tiles.WORD.value == WORD


def test_every_architecture_has_tiles_that_fit_together():
    """Pieces divide a tile, or are a multiple of it; new architectures are like their nearest."""
    for architecture in (*TARGETS, "sm89", "sm103", "sm121", "gfx1201", "gfx1030"):
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            for size in (16, 40, 64, 80, 128, 192, 256):
                blocks = backward_blocks(architecture, dtype, size)
                assert TILE % blocks.dq.keys == 0
                assert TILE % blocks.dq.rows == 0 or blocks.dq.rows % TILE == 0
                for block in (blocks.dkv, blocks.dbias):
                    assert TILE % block.rows == TILE % block.keys == 0
