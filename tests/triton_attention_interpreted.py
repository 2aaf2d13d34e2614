"""Attention's Triton backward under Triton's interpreter: `test_triton_attention_backward.py` runs this file."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

from diffmax.kernels.tools import unpacked_bits
from diffmax.kernels.triton.attention import tiles as attention_tiles
from diffmax.kernels.triton.common import scores
from diffmax.plugin import TILE, AttentionCall, Wanted
from diffmax.reference import attention as reference
from diffmax.reference.dropout import threshold
from diffmax.testing.attention import checks
from diffmax.testing.interpreter import harden, quicken

harden()
quicken()

sys.path.insert(0, str(Path(__file__).parent))
import triton_attention_backend as backend

backend.register()

pytestmark = [
    pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning"),  # NumPy, standing in for tl.max
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning"),  # Triton 3.6's loops
]

# an interpreter takes tens of milliseconds for a tile: one batch entry, and of near duplicates one
CASES = {
    name: replace(checks.CASES[name], batch=1, **more)
    for name, more in {
        "plain": {},
        "one query": {},
        "one of each": {},
        "63 by 127": {},
        "dense": {},
        "sparse": {"length": 130},
        "alpha 0.5": {},
        "alpha 0.01": {},
        "alpha 0.999": {},
        "alpha per head": {},
        "sparsemax and softmax heads": {},
        "head size 40": {},
        "head size 256": {"heads": 1, "kv_heads": 1},
        "value size 24": {},
        "negative scale": {},
        "causal, more queries": {},
        "causal, lower right, more queries": {},
        "window": {},
        "window to the left": {},
        "causal window, lower right": {},
        "window beyond the keys": {},
        "mask of keys": {},
        "mask, causal": {},
        "grouped heads, causal, alpha per head": {},
        "grouped heads, mask, window": {},
    }.items()
}


@pytest.mark.parametrize("name", CASES)
def test_gradients(name):
    checks.gradients_are_right_on_average("triton-backward", "cpu", CASES[name], torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["sparse", "alpha 0.5", "alpha 0.999", "grouped heads, causal, alpha per head"])
def test_gradients_of_narrow_numbers(name, dtype):
    checks.gradients_are_right_on_average("triton-backward", "cpu", CASES[name], dtype)


@pytest.mark.parametrize("kind", ["triton-backward-pieces", "triton-backward-small"])
@pytest.mark.parametrize("name", ["window", "causal, more queries", "grouped heads, mask, window", "head size 40"])
def test_gradients_from_other_tiles(name, kind):
    checks.gradients_are_right_on_average(kind, "cpu", CASES[name], torch.float32)


def test_packed_sequences():
    checks.packed_sequences_are_each_on_their_own("triton-backward", "cpu", torch.float32)


def test_masked_and_bad_queries():
    checks.masked_and_bad_queries("triton-backward", "cpu", torch.float32)


def test_residuals_are_exchangeable():
    checks.residuals_are_exchangeable("triton-backward", "cpu", torch.bfloat16)


def test_one_tensor_for_all_and_any_strides():
    checks.one_tensor_for_all("triton-backward", "cpu", torch.float32)


def results(call, tensors, grad, spoilt=None, kind="triton-backward", live=True):
    """What the kernels return, what the reference does, and the truth; the forward's residuals are the reference's."""
    wanted = Wanted(True, call.bias is not None, call.sink is not None)
    found = []
    for kernel, dtype in ((backend.OPERATORS[kind].attention_backward, None), (reference.attention_backward, None), (None, 1)):
        given = [t if dtype is None else t.double() for t in (*tensors, grad)]
        own = replace(call, **{name: widened(getattr(call, name), dtype) for name in ("e", "bias", "alibi", "sink")})
        saved = reference.attention(*given[:3], own, True, False).saved
        if spoilt is not None and kernel == backend.OPERATORS[kind].attention_backward:
            given[1], given[2] = (torch.where(spoilt, torch.nan, t) for t in given[1:3])
        saved = saved if live else saved._replace(live=saved.live.new_empty(0))
        run = kernel or reference.attention_backward
        found.append(run(given[3], *given[:3], saved, own, wanted))
    return found


def widened(t, dtype):
    return t.double() if dtype is not None and isinstance(t, torch.Tensor) else t


def compare(ours, yardstick, exact):
    for what, got, measured, truth in zip(("query", "key", "value", "e", "bias", "sink"), ours, yardstick, exact, strict=True):
        assert got.shape == truth.shape
        assert got.is_contiguous()
        assert torch.equal(got.isnan(), truth.isnan()), what
        if not got.numel():
            continue
        error, own = (float((t.double() - truth).nan_to_num().abs().mean()) for t in (got, measured))
        ulp = torch.finfo(got.dtype).eps * max(1.0, float(truth.nan_to_num().abs().mean()))
        assert error <= 2 * (2 * own + 2 * ulp) + 2 * ulp, what


def sample(length=65, keys=129, heads=2, kv_heads=2, batch=2, dtype=torch.float32, head_dim=16, value_dim=16):
    shapes = ((heads, length, head_dim), (kv_heads, keys, head_dim), (kv_heads, keys, value_dim), (heads, length, value_dim))
    query, key, value, grad = (torch.randn(batch, *shape) for shape in shapes)
    return [t.to(dtype) for t in (query * 1.5, key * 1.5, value)], grad.to(dtype)


@pytest.mark.parametrize("e", [1 / 2, 1 / 3, 1 / 4, 1 / 5, 1 / 10, 0.15, 0.002])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_a_number_for_alpha(e, dtype):
    """Chains of multiplications, the hardware's logarithm where it is allowed, and the one that is exact near 1."""
    compare(*results(AttentionCall(scale=0.25, e=e), *sample(63, 70, heads=1, kv_heads=1, batch=1, dtype=dtype)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_alphas_of_heads_in_16_bits(dtype):
    """From sparsemax to softmax: each program decides by its head's e how to take powers."""
    e = torch.tensor([1.0, 0.5, 0.15, 1 / 64, 0.015, 0.001, 1e-5, 0.0])
    compare(*results(AttentionCall(scale=0.25, e=e, right=3), *sample(63, 70, heads=8, kv_heads=2, batch=1, dtype=dtype)))


@pytest.mark.parametrize("e", [0.5, 0.15, 0.1])
@pytest.mark.parametrize(
    ("dtype", "offset"), [(torch.float16, 512), (torch.bfloat16, 4096), (torch.float32, 32768)], ids=["half", "brain", "single"]
)
def test_scores_far_from_zero(dtype, offset, e):
    """In 16 bits the base is folded into one multiply-add per score; float32 takes the difference from the maximum first."""
    tensors, grad = sample(63, 70, heads=1, kv_heads=1, batch=1, dtype=dtype)
    tensors[0][..., 0], tensors[1][..., 0] = 16.0, offset / 4
    for alpha in (e, torch.tensor([e])):
        compare(*results(AttentionCall(scale=0.25, e=alpha), tensors, grad))


@pytest.mark.parametrize("shape", [(2, 2, 65, 129), (1, 2, 65, 129), (2, 1, 1, 129), (1, 1, 65, 1), (1, 2, 1, 1)], ids=str)
def test_gradient_of_a_bias(shape):
    """Summed over what it broadcasts along; -inf hides, and a query that sees nothing is silent."""
    bias = torch.randn(shape)
    if shape[2:] == (65, 129):
        bias[torch.rand(shape) > 0.5], bias[:, :, 7] = -torch.inf, -torch.inf
    compare(*results(AttentionCall(scale=0.25, e=0.3, bias=bias, right=20), *sample()))


def test_gradient_of_a_bias_from_other_tiles():
    call = AttentionCall(scale=0.25, e=0.5, bias=torch.randn(129, 65).T.view(1, 1, 65, 129), left=30)
    compare(*results(call, *sample(batch=1), kind="triton-backward-pieces"))


@pytest.mark.parametrize("right", [-1, 0])
def test_alibi_softcap_and_sink(right):
    call = AttentionCall(
        scale=0.25, e=0.3, right=right, alibi=torch.rand(2, 2), softcap=2.0, sink=torch.tensor([0.0, 3.0]), lower_right=True
    )
    compare(*results(call, *sample()))


def test_softcap_of_large_and_tiny_scores():
    tensors, grad = sample(batch=1)
    tensors[0][:, 0] *= 1e-3
    tensors[0][:, 1] *= 30
    compare(*results(AttentionCall(scale=0.25, e=0.3, softcap=5.0), tensors, grad))


def test_silent_queries_pass_nothing_on():
    """Hidden from all keys, or with all weight on the sink: whatever they hold, NaN too, reaches no gradient."""
    tensors, grad = sample(batch=1)
    mask = torch.rand(1, 1, 65, 129) > 0.3
    mask[:, :, 7] = False
    tensors[0][:, :, 7], grad[:, :, 7] = torch.nan, torch.nan
    for more in ({}, {"sink": torch.tensor([0.0, 3.0]), "softcap": 3.0}, {"bias": torch.randn(1, 1, 65, 129)}):
        found = results(AttentionCall(scale=0.25, e=0.3, mask=mask, **more), tensors, grad)
        assert not any(t.isnan().any() for t in found[0])
        compare(*found)
    tensors[0][:, :, 64] = torch.nan  # beyond the last query that sees a key: hidden by its place
    compare(*results(AttentionCall(scale=0.25, e=0.3, left=3), [tensors[0], *(t[:, :, :40] for t in tensors[1:])], grad))


def test_dropout_is_that_of_the_forward():
    call = AttentionCall(
        scale=0.25, e=0.3, dropout_p=0.3, seed=torch.tensor([2**33 + 7, -5]), bias=torch.randn(1, 2, 40, 70), sink=torch.rand(2)
    )
    compare(*results(call, *sample(40, 70)))


@pytest.mark.parametrize("kind", ["triton-backward", "triton-backward-pieces"])
def test_packed_sequences_with_everything(kind):
    lengths = ((0, 3), (70, 70), (1, 129), (64, 0), (130, 65), (10, 0))
    ends = [torch.tensor([0, *counts]).cumsum(0).to(torch.int32) for counts in zip(*lengths, strict=True)]
    call = AttentionCall(
        scale=0.25, e=torch.tensor([0.1, 0.0]), right=0, lower_right=True, alibi=torch.rand(2), sink=torch.rand(2),
        softcap=4.0, dropout_p=0.1, seed=torch.tensor([1, 2]), cu_seqlens_q=ends[0], cu_seqlens_k=ends[1],
        max_seqlen_q=130, max_seqlen_k=200,
    )  # fmt: skip
    rows, keys = (int(end[-1]) for end in ends)
    compare(*results(call, *sample(rows + 5, keys + 2, kv_heads=1, batch=1), kind=kind))  # a few places belong to no sequence


@pytest.mark.parametrize("kind", ["triton-backward", "triton-backward-pieces"])
def test_only_live_tiles_are_visited(kind):
    """Keys and values of a dead tile may hold anything: NaN in them would reach every gradient of a row that visits them."""
    tensors, grad = sample(130, 3 * TILE, batch=1, heads=1, kv_heads=1)
    tensors[1][:, :, TILE : 2 * TILE] = 0
    tensors[0] += 1
    tensors[1][:, :, :TILE] += 2
    call = AttentionCall(scale=0.5, e=0.5)
    live = unpacked_bits(reference.attention(*tensors, call, True, False)[4])[0, 0, :, :3]
    assert not live[:, 1].any()
    spoilt = torch.zeros(1, 1, 3 * TILE, 1, dtype=torch.bool)
    spoilt[:, :, TILE : 2 * TILE] = True
    ours, *_ = found = results(call, tensors, grad, spoilt, kind)
    assert not any(t.isnan().any() for t in ours)
    compare(*found)
    unknowing = results(call, tensors, grad, spoilt, kind, live=False)[0]
    assert unknowing[0].isnan().all()
    compare(*results(call, tensors, grad, None, kind, live=False))


def test_bits_are_counted_and_found():
    @triton.jit
    def read(words_ptr, counts_ptr, lowest_ptr, found_ptr, N: tl.constexpr):
        for place in range(N):
            word = tl.load(words_ptr + place)
            tl.store(counts_ptr + place, attention_tiles.bit_count(word))
            tl.store(lowest_ptr + place, attention_tiles.lowest_bit(word))
        tl.store(found_ptr, attention_tiles.bits_of_column(words_ptr, 0, 0, 31, N, 1))
        tl.store(found_ptr + 1, attention_tiles.bits_between(0, 0, 64 * 32))
        tl.store(found_ptr + 2, attention_tiles.bits_between(1, 100, 64 * 33 + 1))
        tl.store(found_ptr + 3, attention_tiles.bits_between(0, 65, 65))
        tl.store(found_ptr + 4, attention_tiles.bits_between(0, 65, 130))

    words = torch.tensor([1, -1, -(2**31), -(2**30), 96, 2**30, 5, -2], dtype=torch.int32).repeat(4)
    counts, lowest, found = (torch.zeros(n, dtype=torch.int32) for n in (32, 32, 5))
    read[(1,)](words, counts, lowest, found, N=32)
    unsigned = [int(word) & 0xFFFFFFFF for word in words]
    assert counts.tolist() == [word.bit_count() for word in unsigned]
    assert lowest.tolist() == [(word & -word).bit_length() - 1 for word in unsigned]
    column = sum((word >> 31) << place for place, word in enumerate(unsigned))
    assert [int(word) & 0xFFFFFFFF for word in found] == [column, 0xFFFFFFFF, 3, 0, 6]


def test_hyperbolic_tangent():
    @triton.jit
    def evaluate(x_ptr, y_ptr, BLOCK: tl.constexpr):
        cols = tl.arange(0, BLOCK)
        tl.store(y_ptr + cols, scores.tanh(tl.load(x_ptr + cols)))

    x = torch.cat([torch.linspace(-1, 1, 1021), torch.linspace(-30, 30, 1024), torch.tensor([torch.nan, 100.0, -torch.inf])])
    y, exact = torch.empty_like(x), x.double().tanh()
    evaluate[(1,)](x, y, BLOCK=2048)
    assert torch.equal(y.isnan(), exact.isnan())
    assert ((y - exact).abs() <= 2 * torch.finfo(torch.float32).eps * exact.abs()).logical_or(exact.isnan()).all()


def test_the_largest_dropout_keeps_as_the_reference_does():
    """A threshold beyond 2^31 is passed as a negative int32."""
    tensors, grad = sample(batch=1)
    for p in (0.6, 0.999):
        assert threshold(p) >= 2**31
        compare(*results(AttentionCall(scale=0.25, e=0.3, dropout_p=p, seed=torch.tensor([1, 2])), tensors, grad))
