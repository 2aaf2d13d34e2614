"""Attention's Triton forward: against the reference under the interpreter, and compiled ahead of time for each architecture.

Triton decides at its import whether it interprets, so those tests run in a process of their own, which
`triton_forward_interpreted.py` holds. Registers, spills and shared memory: `make check-triton`, docs/kernels.md.
"""

import itertools
from dataclasses import replace

import pytest
import torch

from diffmax.kernels.triton.attention.dq import attention_bwd_dq_kernel
from diffmax.kernels.triton.attention.launch import AttentionOperator
from diffmax.kernels.triton.attention.launch_forward import ForwardPlan
from diffmax.kernels.triton.attention.output import attention_out_kernel
from diffmax.kernels.triton.attention.settings import Block, Settings
from diffmax.kernels.triton.attention.solve import attention_solve_kernel
from diffmax.kernels.triton.common.tuning import with_settings
from diffmax.plugin import AttentionCall, Wanted
from diffmax.testing.ahead_of_time import TARGETS, recording
from tests import interpreted
from tests.repeated_products import repeated


@pytest.mark.interpreter
@interpreted.in_tiers
def test_the_kernels_pass_under_the_interpreter(tier):
    interpreted.passes("triton_forward_interpreted.py", tier, sample=80)


def launches(target, dtype, size, e, keep):
    operator = AttentionOperator(lambda device: target, lambda device: 132, ptx=TARGETS[target].backend == "cuda")
    query, key, value = (torch.zeros(2, 2, n, size, dtype=dtype) for n in (256, 512, 512))
    call = AttentionCall(scale=0.1, e=e, right=0)
    with recording(target, attention_solve_kernel, attention_out_kernel) as launched:
        operator.attention(query, key, value, call, keep, False)
    assert [compiled.name for compiled in launched] == ["attention_solve_kernel", "attention_out_kernel"]
    return launched


@pytest.mark.slow
def test_an_architecture_that_is_not_in_the_table_compiles_too():
    """gfx950, whose settings are those of gfx942."""
    for compiled in launches("gfx950", torch.bfloat16, 128, 0.15, True):
        assert compiled.resources["spilled"] == 0, f"{compiled.name}: {compiled.resources}"
        assert compiled.resources["shared"] <= compiled.target.shared, f"{compiled.name}: {compiled.resources}"


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("target", "instruction"),
    # sm100: Triton 3.7 fails on a reduction over a named axis of a condition per row
    [("sm90", "wgmma.mma_async"), ("sm100", "tcgen05.mma"), ("sm80", "mma.sync"), ("gfx942", "v_mfma_f32")],
)
def test_matrix_cores_are_used(target, instruction):
    for compiled in launches(target, torch.bfloat16, 128, 0.15, True):
        assert instruction in compiled.text


@pytest.mark.sampled(8)
@pytest.mark.parametrize("size", [64, 128, 256])
@pytest.mark.parametrize(
    ("target", "dtype"),
    [*itertools.product(["gfx942", "gfx90a"], [torch.bfloat16, torch.float32]), ("gfx1100", torch.bfloat16)],
)
def test_no_warp_of_amd_repeats_what_another_computes(target, size, dtype):
    """A matrix instruction of CDNA computes 32 by 32, if nobody asks for 16: tiles are small beside that."""
    for compiled in launches(target, dtype, size, 0.15, True):
        assert repeated(compiled) == 1, compiled.name


@pytest.mark.slow
def test_the_output_kernel_has_settings_of_its_own_for_training():
    """U takes as many registers as the output: on sm80, of heads of 64 entries, it takes 32 keys at a time, without 64."""
    keys = [launches("sm80", torch.bfloat16, 64, 0.15, keep)[1].kernel.src.constants for keep in (False, True)]
    names = attention_out_kernel.arg_names
    assert [found[(names.index("KEYS"),)] for found in keys] == [64, 32]


@pytest.mark.slow
def test_forced_settings_are_launched_as_they_are():
    """Also where 128 queries leave processors idle; of packed sequences the output's programs have 64 in any case."""
    operator = AttentionOperator(lambda device: "sm90", lambda device: 132, ptx=True)
    query = torch.zeros(1, 2, 256, 64, dtype=torch.bfloat16)
    call = AttentionCall(scale=0.1, e=0.5)
    with (
        with_settings(operator, attention_out=Settings(8, 2, 1, rows=128), attention_dq=Block(128, 64, 8, 2)),
        recording("sm90", attention_out_kernel, attention_bwd_dq_kernel) as launched,
    ):
        found = operator.attention(query, query, query, call, True, False)
        operator.attention_backward(found.out, query, query, query, found.saved, call, Wanted())
    by_name = {compiled.name: compiled for compiled in launched}
    for kernel, name in ((attention_out_kernel, "ROWS"), (attention_bwd_dq_kernel, "BLOCK_M")):
        assert by_name[kernel.__name__].kernel.src.constants[(kernel.arg_names.index(name),)] == 128
    assert Block(128, 64, 4, 2).with_few_rows().warps == Settings(4, 2, 1, rows=128).with_few_rows().warps == 4


@pytest.mark.slow
def test_128_queries_share_the_tiles_where_they_fill_the_device():
    """On sm90, both of the output and of dQ; else 64, so that no multiprocessor is idle: short calls, packed sequences."""
    operator = AttentionOperator(lambda device: "sm90", lambda device: 132, ptx=True)
    call = AttentionCall(scale=0.1, e=0.5, right=0)
    lengths = torch.tensor([0, 8448], dtype=torch.int32)
    packed = AttentionCall(
        scale=0.1,
        e=0.5,
        right=0,
        lower_right=True,
        cu_seqlens_q=lengths,
        cu_seqlens_k=lengths,
        max_seqlen_q=8448,
        max_seqlen_k=8448,
    )
    for length, given, rows in ((8448, call, 128), (8447, call, 64), (8448, packed, 64)):
        query = torch.zeros(1, 2, length, 64, dtype=torch.bfloat16)
        with recording("sm90", attention_out_kernel, attention_bwd_dq_kernel) as launched:
            found = operator.attention(query, query, query, given, True, False)
            operator.attention_backward(found.out, query, query, query, found.saved, given, Wanted())
        by_name = {compiled.name: compiled for compiled in launched}
        for kernel, name in ((attention_out_kernel, "ROWS"), (attention_bwd_dq_kernel, "BLOCK_M")):
            compiled = by_name[kernel.__name__]
            assert compiled.kernel.src.constants[(kernel.arg_names.index(name),)] == rows
            assert compiled.resources["warps"] == rows // 16


def test_scratch_holds_whole_turns_and_other_turns_are_refused():
    """Three tiles of keys, two a turn: the second turn stores a fourth."""
    operator = AttentionOperator(lambda device: "sm90", lambda device: 1, ptx=True)
    query, key = torch.zeros(1, 1, 64, 64, dtype=torch.bfloat16), torch.zeros(1, 1, 192, 64, dtype=torch.bfloat16)
    arguments = {"processors": 1, "ptx": True, "precision": "ieee", "partial": 8}
    settings = operator.forward_settings(query.device, query.dtype, 64, AttentionCall(scale=0.1, e=0.15))
    plan = ForwardPlan.of(query, key, key, AttentionCall(scale=0.1, e=0.15), True, False, settings, **arguments)
    assert plan.tops == 4 * 64
    wrong = settings._replace(solve=replace(settings.solve, keys=32))
    with pytest.raises(ValueError, match="takes 64 or 128 keys a turn, and its settings have 32"):
        ForwardPlan.of(query, key, key, AttentionCall(scale=0.1, e=0.15), True, False, wrong, **arguments)


@pytest.mark.slow
def test_lengths_heads_and_alphas_share_their_binaries():
    """However many blocks of queries there are, the grid is the device's: scratch belongs to the programs that run."""
    operator = AttentionOperator(lambda device: "sm90", lambda device: 132, ptx=True)
    with recording("sm90", attention_solve_kernel, attention_out_kernel) as launched:
        for length, heads, e in ((64, 1, 0.15), (1000, 4, 0.31), (16384, 4, 0.7), (16, 2, 0.99)):
            tensor = torch.zeros(1, heads, length, 64, dtype=torch.bfloat16)
            operator.attention(tensor, tensor, tensor, AttentionCall(scale=0.1, e=e, right=0), True, False)
    assert len({id(compiled.kernel) for compiled in launched}) == 3  # the output's for 64 queries a program and for 128
    assert max(compiled.grid[0] for compiled in launched) <= 2 * 132
