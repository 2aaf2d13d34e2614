"""Attention's Triton forward under Triton's interpreter: `test_triton_attention_forward.py` runs this file."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from diffmax.kernels.tools import unpacked_bits
from diffmax.kernels.triton.attention import output as attention_fwd_out
from diffmax.kernels.triton.attention import solve as attention_solve
from diffmax.kernels.triton.attention.launch import AttentionOperator
from diffmax.plugin import AttentionCall, Wanted
from diffmax.reference import attention as reference
from diffmax.testing import gates
from diffmax.testing.attention import checks
from diffmax.testing.interpreter import harden, quicken

harden()
quicken()

sys.path.insert(0, str(Path(__file__).parent))
import triton_forward_backend as backend

backend.register()
WHOLE, PIECES = backend.OPERATORS

pytestmark = [
    pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning"),  # NumPy, standing in for tl.max
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning"),  # Triton 3.6's loops
]

# an interpreter takes tens of milliseconds for a tile: one batch entry, and no near duplicates
LEFT_OUT = {
    "one query", "long", "many queries", "scale", "causal", "causal, lower right", "window to the right",
    "mask of queries and keys", "grouped heads", "bias", "bias of queries", "softcap", "dropout",
}  # fmt: skip
CASES = {
    name: replace(case, batch=1 if case.alibi != "BH" else case.batch)
    for name, case in checks.CASES.items()
    if name not in LEFT_OUT
}
# every chain of multiplications
CASES |= {f"alpha {alpha}": replace(checks.CASES["63 by 127"], alpha=alpha, batch=1) for alpha in (2 / 3, 0.75, 0.8, 0.9)}


@pytest.mark.parametrize("name", CASES)
def test_forward(name):
    checks.forward_passes_the_gate(WHOLE, "cpu", CASES[name], torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["dense", "sparse", "alpha 0.5", "alpha 0.999", "alpha 0.01", "one of each", "head size 80"])
def test_forward_of_narrow_numbers(name, dtype):
    checks.forward_passes_the_gate(WHOLE, "cpu", CASES[name], dtype)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("dropout, sink, window, value size 24", torch.float32),
        ("head size 40", torch.bfloat16),
        ("alpha per head", torch.float16),
        ("grouped heads, mask, window", torch.float32),
    ],
)
def test_forward_in_pieces(name, dtype):
    checks.forward_passes_the_gate(PIECES, "cpu", CASES[name], dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["sparse", "alpha 0.5", "causal, more queries", "sink", "dense"])
def test_forward_and_backward_together(name, dtype):
    """U and delta, which the backward reads, are as good as the reference's."""
    checks.gradients_are_right_on_average(WHOLE, "cpu", replace(CASES[name], length=65, keys=100), dtype)


@pytest.mark.slow
def test_packed_sequences():
    checks.packed_sequences_are_each_on_their_own(WHOLE, "cpu", torch.float32)


@pytest.mark.parametrize("check", [checks.strides_of_every_kind, checks.empty_calls])
def test_strides_and_empty_calls(check):
    check(WHOLE, "cpu", torch.float32)


def test_masked_and_bad_queries():
    checks.masked_and_bad_queries(WHOLE, "cpu", torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nasty_rows(dtype):
    checks.nasty_rows_pass_the_gate(WHOLE, "cpu", dtype, 0.5)
    checks.nasty_rows_pass_the_gate(WHOLE, "cpu", dtype, 0.85)


def test_statistics():
    checks.statistics_are_right(WHOLE, "cpu", torch.float32)


@pytest.mark.slow
def test_dropout_keeps_what_the_contract_says():
    checks.dropout_keeps_what_the_contract_says(WHOLE, "cpu", torch.float32)


def test_any_strides():
    checks.forward_passes_the_gate(WHOLE, "cpu", CASES["63 by 127"], torch.float32)
    query, key, value = (t.transpose(2, 3).contiguous().transpose(2, 3) for t in CASES["63 by 127"].tensors(torch.float32))
    call = AttentionCall(scale=0.25, e=0.4)
    ours = backend.OPERATORS[WHOLE].attention(query, key[:, :1].expand_as(key), value, call, False, False)
    theirs = reference.attention(query, key[:, :1].expand_as(key), value, call, False, False)
    assert (ours[0] - theirs[0]).abs().max() <= 1e-5


def test_alpha_outside_its_range_spoils_its_head_alone():
    query, key, value = replace(CASES["63 by 127"], heads=3, kv_heads=3).tensors(torch.float32)
    e = torch.tensor([-0.1, 0.5, 1.1])
    out, _, delta, *_ = backend.OPERATORS[WHOLE].attention(query, key, value, AttentionCall(scale=0.25, e=e), True, False)
    assert out[:, [0, 2]].isnan().all()
    assert delta[:, [0, 2]].isnan().all()
    assert out[:, 1].isfinite().all()


class Counted:
    """Stands in for a function of the kernels, and counts its calls."""

    def __init__(self, function):
        self.function, self.calls = function, 0

    def __call__(self, *arguments, **keywords):
        self.calls += 1
        return self.function(*arguments, **keywords)


def shaped(length, living, size=16):
    """Queries and keys for which each block of 64 queries has its weights in `living` blocks of keys."""
    blocks = length // 64
    centres = torch.nn.functional.normalize(torch.randn(blocks, size), dim=1) * 30
    query = torch.stack([centres[torch.arange(i, i + living) % blocks].mean(0) for i in range(blocks)])
    key = centres.repeat_interleave(64, 0) + torch.randn(length, size) * 0.05
    return query.repeat_interleave(64, 0).view(1, 1, length, size) * 3, key.view(1, 1, length, size)


@pytest.mark.parametrize("keep", [False, True])
def test_skipped_tiles_change_nothing(keep, monkeypatch):
    """The output kernel visits the live tiles and no other, and visiting all gives the same bits."""
    query, key = shaped(384, 1)
    value, call = torch.randn(1, 1, 384, 16), AttentionCall(scale=1.0, e=0.5)
    operator = backend.OPERATORS[WHOLE]
    exact = reference.attention(query.double(), key.double(), value.double(), call, True, True)
    live = unpacked_bits(exact[4]).view(3, 2, -1).any(1).sum().item()  # for one of the 128 queries of a program
    assert live == 6  # of 18, two for each of three programs

    counted, rounds = Counted(attention_fwd_out.tile_scores), Counted(attention_fwd_out.good_enough)
    monkeypatch.setattr(attention_fwd_out, "tile_scores", counted)
    monkeypatch.setattr(attention_solve, "tile_scores", counted)
    monkeypatch.setattr(attention_fwd_out, "good_enough", rounds)
    sparse = operator.attention(query, key, value, call, keep, False)
    visited, of_sparse = counted.calls, rounds.calls
    everything = Counted(attention_fwd_out.list_set_bits)

    def all_of_them(live_ptr, list_ptr, words, rows, most_rows):
        everything.calls += 1
        count = 0
        for tile in range(6):
            attention_fwd_out.tl.store(list_ptr + tile, tile)
            count = count + 1
        return words * 0 + count

    monkeypatch.setattr(attention_fwd_out, "list_set_bits", all_of_them)
    counted.calls = 0
    dense = operator.attention(query, key, value, call, keep, False)
    assert everything.calls == 3
    assert (
        3 <= of_sparse <= 6
    )  # a program may take a second round, which torch's random numbers decide: they depend on the processor
    assert rounds.calls == 2 * of_sparse
    assert counted.calls - visited == of_sparse * (18 - live) // 3
    assert visited < 36 + 36 + of_sparse * live // 3
    for ours, whole in zip(sparse[:4], dense[:4], strict=True):
        assert torch.equal(ours, whole)
    (wanted,) = gates(lambda *given: reference.attention(*given, call, True, True)[0], query, key, value)
    assert (sparse[0].double() - wanted.exact).abs().max() <= wanted.allowed


@pytest.mark.parametrize("keep", [False, True])
def test_a_larger_sample_saves_an_evaluation(keep, monkeypatch):
    """Dense scores near alpha = 1: one evaluation and the output, where the small sample takes one evaluation more."""
    torch.manual_seed(2)
    query, key, value = (torch.randn(1, 1, n, 32).to(torch.bfloat16) for n in (64, 2048, 2048))
    call, operator = AttentionCall(scale=32**-0.5, e=0.1), backend.OPERATORS[WHOLE]
    counted = Counted(attention_fwd_out.tile_scores)
    monkeypatch.setattr(attention_fwd_out, "tile_scores", counted)
    monkeypatch.setattr(attention_solve, "tile_scores", counted)
    (wanted,) = gates(lambda *given: reference.attention(*given, call, True, True)[0], query, key, value)
    ours = operator.attention(query, key, value, call, keep, False)
    assert counted.calls == 32 + 32
    assert (ours[0].double() - wanted.exact).abs().max() <= wanted.allowed
    monkeypatch.setattr(attention_solve, "tiles_of_sample", lambda tiles, e: 0 * tiles)
    operator.attention(query, key, value, call, keep, False)
    assert counted.calls == 64 + 32 + 32 + 32


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_special_alphas(dtype):
    """Every ninth of the kit's."""
    checks.special_alphas_pass_the_gate(WHOLE, "cpu", dtype, checks.SPECIAL_ALPHAS[2::9])


@pytest.mark.parametrize(
    ("architecture", "dtype", "size"),
    [
        ("sm90", torch.float32, 96), ("sm80", torch.float32, 160), ("sm90", torch.bfloat16, 192),
        ("gfx1100", torch.float16, 80), ("gfx1100", torch.float32, 48), ("gfx942", torch.float32, 192),
    ],
    ids=str,
)  # fmt: skip
def test_heads_that_chunks_divide_but_do_not_fill(architecture, dtype, size):
    """Forward and backward read no entry behind a row: there stands NaN, as another projection's entries might."""
    operator = AttentionOperator(lambda device: architecture, lambda device: 2, ptx=False)
    wide = torch.full((4, 1, 1, 40, 2 * size), torch.nan, dtype=dtype)
    wide[..., :size] = torch.randn(4, 1, 1, 40, size)
    query, key, value, grad = (t[..., :size] for t in wide)
    call = AttentionCall(scale=size**-0.5, e=0.5)
    exact = reference.attention(*(t.double() for t in (query, key, value)), call, True, False)
    ours = operator.attention(query, key, value, call, True, False)
    largest = 40 * torch.finfo(dtype).eps
    assert (ours.out.double() - exact.out).abs().max() <= largest
    wanted = reference.attention_backward(*(t.double() for t in (grad, query, key, value)), exact.saved, call, Wanted())
    found = operator.attention_backward(grad, query, key, value, ours.saved, call, Wanted())
    for got, truth in zip(found[:3], wanted[:3], strict=True):
        assert (got.double() - truth).abs().max() <= largest * max(1.0, float(truth.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_spoilt_query_spoils_its_gradients_under_every_option(bad, dtype):
    """From the kernels' own residuals: a finite gradient beside an output of NaN would go unseen."""
    operator = backend.OPERATORS[WHOLE]
    query, key, value, grad = (torch.randn(1, 1, 16, 16).to(dtype) for _ in range(4))
    query[0, 0, 0] = bad
    mask, bias = torch.ones(1, 1, 1, 16, dtype=torch.bool), torch.zeros(1, 1, 16, 16, dtype=dtype)
    for more in ({}, {"mask": mask}, {"bias": bias}, {"sink": torch.zeros(1)}, {"softcap": 5.0}, {"e": torch.tensor([0.3])}):
        call = AttentionCall(**{"scale": 0.25, "e": 0.3, **more})
        found = []
        for kernels in (operator, reference):
            saved = kernels.attention(query, key, value, call, True, False).saved
            results = kernels.attention_backward(grad, query, key, value, saved, call, Wanted())
            found.append([t.isnan() for t in results[:3]])
        for ours, theirs in zip(*found, strict=True):
            assert torch.equal(ours, theirs), more


@pytest.mark.parametrize("name", [WHOLE, PIECES])
@pytest.mark.parametrize("where", ["query", "keys"])
def test_a_spoilt_row_beside_large_scores_spoils_its_gradients(where, name):
    """For scores above 1024 the pass over all tiles leaves the sums to further ones: only the largest scores show NaN there."""
    query, key, value, grad = (torch.randn(1, 1, n, 16).bfloat16() for n in (2, 128, 128, 2))
    query[..., 0], key[..., 0] = 100, 100
    if where == "query":
        query[:, :, 0] = torch.nan
    else:
        key[:, :, 64:] = torch.nan
    call, found = AttentionCall(scale=0.25, e=0.5), []
    for kernels in (backend.OPERATORS[name], reference):
        results = kernels.attention(query, key, value, call, True, False)
        found.append(
            [
                results.out,
                results.delta,
                *kernels.attention_backward(grad, query, key, value, results.saved, call, Wanted())[:3],
            ]
        )
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours.isnan(), theirs.isnan())


def test_a_key_that_the_sample_misses_overflows_no_step():
    """The estimate's sums may be too large for a product of two of them."""
    for name in (WHOLE, PIECES):
        for gap in (77.0, 90.0, 110.0):
            query, key, value = (torch.zeros(1, 1, n, 16) for n in (1, 330, 330))
            query[..., 0], key[..., 7, 0], value[..., 7, 0] = 1, gap, 1
            call = AttentionCall(scale=1.0, e=1 / 64)
            assert torch.allclose(
                backend.OPERATORS[name].attention(query, key, value, call, True, False).out[..., 0], torch.ones(1)
            )


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_a_sink_far_above_all_scores_near_softmax(dtype):
    """The sample leaves the sink out, and its sums underflow."""
    operator, query, value = backend.OPERATORS[WHOLE], *(torch.ones(1, 1, n, 16, dtype=dtype) for n in (1, 2))
    for e in (0.01, 0.02, torch.tensor([0.01])):
        for gap in (20.0, 35.0, 40.0, 50.0, 60.0, 90.0):
            key = torch.zeros(1, 1, 2, 16, dtype=dtype)
            key[..., 0] = -gap
            call = AttentionCall(scale=1.0, e=e, sink=torch.zeros(1))
            for keep in (False, True):
                ours = operator.attention(query, key, value, call, keep, False).out
                assert torch.allclose(ours, reference.attention(query, key, value, call, keep, False).out, atol=1e-6)
