"""diffmax.HybridCache: equal to its meaning written out, however tokens are divided, and constant in memory."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

import diffmax
from diffmax import HybridCache, diffmax_bisect
from diffmax.testing.gate import gates

B, L, H, H_KV, D, D_V = 2, 23, 4, 2, 6, 5
TAIL, BLOCK = 5, 3
close = torch.testing.assert_close


def by_hand(q, k, v, log_gates=None, padding=None, *, alpha=0.8, offset=0.0, slope=1.0, degree=2, tail=TAIL, block=BLOCK):
    """The meaning (docs/decisions/0096), with all weights in memory."""
    length, groups = q.shape[1], q.shape[2] // k.shape[2]
    q, k, v = (t.transpose(1, 2) for t in (q, k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)))
    log_gates = q.new_zeros(q.shape[:3]) if log_gates is None else log_gates.transpose(1, 2).repeat_interleave(groups, 1)
    real = torch.ones(q.shape[0], length, dtype=torch.bool) if padding is None else ~padding
    real, g = real[:, None, None], log_gates.cumsum(2)
    place = torch.arange(length)
    start = block * ((place + 1 - tail) // block).clamp_min(0).unsqueeze(1)
    folded, recent = (place < start) & real, (place >= start) & (place <= place.unsqueeze(1)) & real
    scores = q @ k.mT / math.sqrt(q.shape[3])
    decay = (g.unsqueeze(3) - g.unsqueeze(2)).exp() * folded
    number, weights = decay.sum(3), scores**degree * decay
    total, e = weights.sum(3), 1 - alpha
    there = total > 0
    mean = torch.where(there, total / torch.where(number > 0, number, 1.0), 1.0) ** (1 / degree)
    offset, slope = (t.view(-1, 1) if isinstance(t, torch.Tensor) else t for t in (offset, slope))
    past_score = slope * mean + (1 - torch.where(number > 0, number, 1.0) ** -e) / e + offset
    past_score = torch.where(there, past_score, -torch.inf).unsqueeze(3)
    past = weights @ v / torch.where(there, total, 1.0).unsqueeze(3)
    p = diffmax_bisect(torch.cat([scores.masked_fill(~recent, -torch.inf), past_score.to(scores.dtype)], 3), alpha)
    return (p[..., :-1] @ v + p[..., -1:] * past).transpose(1, 2)


def drawn(dtype=torch.float64, length=L):
    q, k = torch.randn(B, length, H, D, dtype=dtype) * 2, torch.randn(B, length, H_KV, D, dtype=dtype)
    return q, k, torch.randn(B, length, H_KV, D_V, dtype=dtype)


def some_gates(length=L):
    return nn.functional.logsigmoid(torch.randn(B, length, H_KV, dtype=torch.float64) + 2)


def some_padding():
    padding = torch.zeros(B, L, dtype=torch.bool)
    padding[1, :7] = True
    padding[0, 14:16] = True
    return padding


def fed(cache, cuts, q, k, v, log_gates=None, padding=None, **options):
    """The output for all tokens, given in parts."""
    outs, at = [], 0
    for n in cuts:
        part = slice(at, at + n)
        rest = [None if t is None else t[:, part] for t in (log_gates, padding)]
        outs.append(cache.attend(q[:, part], k[:, part], v[:, part], rest[0], padding=rest[1], **options))
        at += n
    return torch.cat(outs, 1)


CUTS = {"at once": [L], "one by one": [1] * L, "prompt, then steps": [10] + [1] * 13, "parts": [2, 9, 1, 1, 10]}
CASES = {
    "plain": lambda: (None, None, {}),
    "gates": lambda: (some_gates(), None, {}),
    "padding": lambda: (None, some_padding(), {}),
    "all": lambda: (some_gates(), some_padding(), {"offset": torch.randn(H).double(), "slope": torch.rand(H).double() + 0.5}),
    "degree 4": lambda: (some_gates(), None, {"degree": 4, "alpha": 0.4}),
}


@pytest.mark.parametrize("grad", [False, True], ids=["without gradients", "with gradients"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_however_tokens_are_divided_it_equals_its_meaning(case, grad):
    q, k, v = drawn()
    log_gates, padding, options = case()
    wanted = by_hand(q, k, v, log_gates, padding, **options)
    options = {"alpha": 0.8, **options}
    degree = options.pop("degree", 2)
    for cuts in CUTS.values():
        cache = HybridCache(TAIL, block=BLOCK, degree=degree)
        with torch.set_grad_enabled(grad):
            close(fed(cache, cuts, q, k, v, log_gates, padding, **options), wanted)
        assert len(cache) == L


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_in_fewer_bits_it_errs_no_more_than_its_meaning_does(dtype):
    q, k, v = drawn(dtype)
    (gate,) = gates(lambda *given: by_hand(*given), q, k, v)
    for cuts in ([L], [9, *[1] * 14]):
        got = fed(HybridCache(TAIL, block=BLOCK), cuts, q, k, v, alpha=0.8)
        assert got.dtype == dtype
        assert (got - gate.exact).abs().max() <= gate.allowed


def test_the_last_tokens_alone_may_have_queries():
    q, k, v = drawn()
    log_gates, padding = some_gates(), some_padding()
    cache = HybridCache(TAIL, block=BLOCK)
    close(cache.attend(q[:, -2:], k, v, log_gates, alpha=0.8, padding=padding), by_hand(q, k, v, log_gates, padding)[:, -2:])


def test_gradients_are_right_through_everything_learned():
    q, k, v = (torch.randn(1, 6, heads, 3, dtype=torch.float64, requires_grad=True) for heads in (2, 1, 1))
    log_gates = some_gates()[:1, :6, :1].clone().requires_grad_()
    offset, slope = torch.randn(2).double().requires_grad_(), (torch.rand(2).double() + 0.5).requires_grad_()

    def call(q, k, v, log_gates, offset, slope):
        return fed(HybridCache(2, block=2), [4, 1, 1], q, k, v, log_gates, alpha=0.7, offset=offset, slope=slope)

    assert torch.autograd.gradcheck(call, (q, k, v, log_gates, offset, slope))


def test_gradients_cross_calls_until_they_are_cut():
    q, k, v = drawn()
    v.requires_grad_()
    cache = HybridCache(TAIL, block=BLOCK)
    cache.attend(q[:, :20], k[:, :20], v[:, :20])
    (crossing,) = torch.autograd.grad(cache.attend(q[:, 20:21], k[:, 20:21], v[:, 20:21]).sum(), v, retain_graph=True)
    assert (crossing[:, 0] != 0).any()
    cache.detach()
    (cut,) = torch.autograd.grad(cache.attend(q[:, 21:22], k[:, 21:22], v[:, 21:22]).sum(), v)
    assert (cut[:, :21] == 0).all()
    assert (cut[:, 21] != 0).any()


def test_with_equal_scores_a_softmax_of_all_keys_is_exact():
    """What the past's score is for: N equal keys have the weight of N keys, and the mean of their values."""
    q, k, v = drawn()
    k = k[:, :1].expand_as(k)
    heads = (t.transpose(1, 2) for t in (q, k, v))
    query, *shared = heads
    each = [t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in shared]
    wanted = nn.functional.scaled_dot_product_attention(query, *each, is_causal=True).transpose(1, 2)
    scores = (q * k.repeat_interleave(H // H_KV, 2)).sum(3)
    got = HybridCache(TAIL, block=BLOCK).attend(q, k, v, alpha=torch.tensor(1.0))
    positive = scores > 0  # of a negative score the power has lost the sign
    assert positive.any()
    close(got[positive], wanted[positive])


@pytest.mark.parametrize("alpha", [0.9, 0.5])
def test_without_a_past_it_is_a_window(alpha):
    q, k, v = drawn()
    got = HybridCache(TAIL, block=BLOCK).attend(q, k, v, alpha=alpha, offset=-math.inf)
    place = torch.arange(L)
    start = BLOCK * ((place + 1 - TAIL) // BLOCK).clamp_min(0).unsqueeze(1)
    mask = (place >= start) & (place <= place.unsqueeze(1))
    heads = (t.transpose(1, 2) for t in (q, k, v))
    close(got, diffmax.attention(*heads, mask, alpha=alpha, enable_gqa=True).transpose(1, 2))


def test_a_past_below_the_threshold_has_a_weight_of_exactly_zero():
    """So nothing of it has a gradient."""
    q, k, v = drawn()
    v.requires_grad_()
    none, some = (HybridCache(TAIL, block=BLOCK).attend(q, k, v, alpha=0.5, offset=o) for o in (-math.inf, 0.0))
    offset = torch.full((H,), -200.0, requires_grad=True)
    low = HybridCache(TAIL, block=BLOCK).attend(q, k, v, alpha=0.5, offset=offset)
    close(low, none)
    assert not torch.allclose(some, none)
    of_offset, of_value = torch.autograd.grad(low[:, -1].sum(), (offset, v))
    assert (of_offset == 0).all()
    assert (of_value[:, : L - TAIL - BLOCK] == 0).all()


def test_a_gate_of_zero_forgets_what_came_before():
    q, k, v = drawn()
    log_gates = torch.zeros(B, L, H_KV, dtype=torch.float64)
    log_gates[:, 12] = -math.inf  # the start of a block
    forgot = HybridCache(TAIL, block=BLOCK).attend(q, k, v, log_gates, alpha=0.8)
    anew = HybridCache(TAIL, block=BLOCK).attend(q[:, 12:], k[:, 12:], v[:, 12:], alpha=0.8)
    close(forgot[:, 12 + TAIL + BLOCK :], anew[:, TAIL + BLOCK :])
    assert forgot.isfinite().all()


def test_a_spoilt_key_spoils_those_who_see_it_and_those_whose_past_it_is():
    q, k, v = drawn()
    k[0, 4, 1] = torch.nan
    out = HybridCache(TAIL, block=BLOCK).attend(q, k, v)
    assert out[0, 4:, 2:].isnan().all()
    assert out[0, :4].isfinite().all()
    assert out[0, :, :2].isfinite().all()
    assert out[1].isfinite().all()


def test_memory_is_constant_and_reported():
    q, k, v = drawn(torch.float32, 200)
    cache, held = HybridCache(TAIL, block=BLOCK), set()
    with torch.no_grad():
        for step in range(200):
            cache.attend(*(t[:, step : step + 1] for t in (q, k, v)))
            held |= {cache.memory} if step >= TAIL + BLOCK else set()
    rows = D * (D + 1) // 2
    tail = (1 + TAIL + BLOCK) * (D + 2 + D_V + 2)
    assert held == {4 * B * H_KV * (tail + rows * (D_V + 1) + 1)}


def test_sequences_are_reordered_and_repeated():
    q, k, v = drawn()
    cache = HybridCache(TAIL, block=BLOCK)
    with torch.no_grad():
        cache.attend(q[:, :20], k[:, :20], v[:, :20], some_gates()[:, :20], padding=some_padding()[:, :20])
        order, new = torch.tensor([1, 1, 0]), [t[:, 20:21] for t in (q, k, v)]
        wanted = copy.deepcopy(cache).attend(*new)[order]
        cache.reorder(order)
        close(cache.attend(*(t[order] for t in new)), wanted)
    assert cache.batch_size == 3


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
def test_a_copy_goes_its_own_way(mode):
    """The copy and the cache wrote their next tokens to the same memory."""
    q, k, v = drawn()
    parts = [[t[:, a : a + 1] for t in (q, k, v)] for a in range(L)]
    with mode():
        cache = HybridCache(TAIL, block=BLOCK)
        cache.attend(q[:, :11], k[:, :11], v[:, :11])
        made, wanted = copy.copy(cache), copy.deepcopy(cache)
        for step in range(15, 19):
            cache.attend(*parts[step])
            assert torch.equal(made.attend(*parts[step - 4]), wanted.attend(*parts[step - 4]))
    assert len(made) == len(cache) == 15


def test_a_call_that_fails_changes_nothing():
    def run(fails):
        cache, outs = HybridCache(tail=6, block=2), []
        for step in range(0, 40, 4):
            given = [t[:, step : step + 4] for t in (q, k, v)]
            if fails and step in (16, 20, 36):
                with pytest.raises(diffmax.NoBackendError):
                    cache.attend(*given, alpha=0.8, backend="nonsense")
            outs.append(cache.attend(*given, alpha=0.8))
        return torch.cat(outs, 1), len(cache), cache.memory

    q, k, v = torch.randn(3, 1, 40, 2, 4, dtype=torch.float64)
    for mode in (torch.no_grad(), torch.enable_grad()):
        with mode:
            found, wanted = run(True), run(False)
        assert torch.equal(found[0], wanted[0])
        assert found[1:] == wanted[1:]


def test_what_lies_at_padding_is_not_read():
    q, k, v = torch.randn(3, 1, 30, 2, 4, dtype=torch.float64)
    padding = torch.zeros(1, 30, dtype=torch.bool)
    padding[:, :3] = True
    found = []
    for bad in (0.0, torch.nan):
        k[:, :3], v[:, :3] = bad, bad
        cache = HybridCache(tail=6, block=2)
        found.append(
            torch.cat(
                [
                    cache.attend(*(t[:, a : a + 10] for t in (q, k, v)), alpha=0.8, padding=padding[:, a : a + 10])
                    for a in (0, 10, 20)
                ],
                1,
            )
        )
    assert torch.equal(*(out[:, 3:] for out in found))


def test_after_reset_it_is_new():
    q, k, v = drawn()
    cache = HybridCache(TAIL, block=BLOCK)
    first = cache.attend(q, k, v)
    cache.reset()
    assert (len(cache), cache.memory, cache.batch_size, cache.state) == (0, 0, -1, None)
    close(cache.attend(q[:1], k[:1], v[:1]), first[:1])
    assert cache.state.sums.shape == (1, H_KV, D * (D + 1) // 2, D_V)


def test_tokens_cannot_be_taken_out_of_a_state():
    cache = HybridCache(TAIL, block=BLOCK)
    cache.attend(*drawn())
    cache.crop(L)
    with pytest.raises(NotImplementedError, match="crop must keep all 23 tokens, got 20\ntokens that are folded"):
        cache.crop(20)


def test_what_was_stored_in_inference_mode_serves_outside():
    q, k, v = drawn()
    cache = HybridCache(TAIL, block=BLOCK)
    with torch.inference_mode():
        cache.attend(q[:, :15], k[:, :15], v[:, :15], alpha=0.8)
    with torch.no_grad():
        close(fed(cache, [1] * 8, q[:, 15:], k[:, 15:], v[:, 15:], alpha=0.8), by_hand(q, k, v)[:, 15:])


def test_autocast_converts_as_torch_would():
    q, k, v = drawn(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = HybridCache(TAIL, block=BLOCK).attend(q, k, v)
    assert out.dtype == torch.bfloat16
    close(out, HybridCache(TAIL, block=BLOCK).attend(*(t.bfloat16() for t in (q, k, v))))


WRONG = {
    "tail": (lambda: HybridCache(0), ValueError, "tail must be at least 1, got 0"),
    "block": (lambda: HybridCache(4, block=1.5), TypeError, "block must be an int, got 1.5"),
    "degree": (lambda: HybridCache(4, degree=3), ValueError, "degree must be even and at least 2"),
    "heads": (lambda: call(q=torch.randn(B, 3, 5, D)), ValueError, "query heads must be a multiple of the key heads"),
    "shapes": (lambda: call(q=torch.randn(B, 4, H, D)), ValueError, "1 <= L <= L_new"),
    "dimensions": (lambda: call(k=torch.randn(3, H_KV, D)), ValueError, r"k must have shape \(B, L, H, D\)"),
    "dtypes": (lambda: call(v=torch.randn(B, 3, H_KV, D_V).double()), TypeError, "must have one dtype and device"),
    "gates": (lambda: call(log_gates=torch.randn(B, H_KV, 3)), ValueError, r"floating \(B, L_new, H_kv\) = \(2, 3, 2\)"),
    "padding": (lambda: call(padding=torch.zeros(B, 3)), ValueError, r"padding must be boolean \(B, L_new\) = \(2, 3\)"),
    "offset": (lambda: call(offset=torch.zeros(3)), ValueError, r"offset must be a float or floating \(H,\) = \(4,\)"),
    "slope": (lambda: call(slope="one"), TypeError, "slope must be a float or a tensor, got 'one'"),
    "nan": (lambda: call(offset=math.nan), ValueError, "offset must be a number, got nan"),
    "alpha": (lambda: call(alpha=2.0), ValueError, "alpha must lie strictly between 0 and 1, got 2"),
    "scale": (lambda: call(softmax_scale=-1.0), ValueError, "softmax_scale must be positive, got -1"),
    "order": (lambda: HybridCache(4).reorder([0]), TypeError, r"reorder must be given a tensor \(B,\)"),
}


def call(**changed):
    given = {"q": torch.randn(B, 3, H, D), "k": torch.randn(B, 3, H_KV, D), "v": torch.randn(B, 3, H_KV, D_V), **changed}
    return HybridCache(TAIL, block=BLOCK).attend(**given)


@pytest.mark.parametrize(("wrong", "kind", "message"), WRONG.values(), ids=WRONG)
def test_it_says_what_is_wrong(wrong, kind, message):
    with pytest.raises(kind, match=f"diffmax.HybridCache: .*{message}"):
        wrong()


def test_numbers_may_be_those_of_numpy():
    q, k, v = drawn()
    outs = []
    for kind in (float, np.float32, np.float64, np.int64):
        cache = HybridCache(TAIL, block=BLOCK)
        outs.append(cache.attend(q, k, v, offset=kind(-1), slope=kind(2), softmax_scale=kind(1)))
    assert all(torch.equal(out, outs[0]) for out in outs)


def test_other_sequences_than_those_stored_are_refused():
    q, k, v = drawn()
    cache = HybridCache(TAIL, block=BLOCK)
    cache.attend(q, k, v)
    with pytest.raises(ValueError, match=r"new tokens must be as those stored, .*\(2, 2, 6, 5\).*got \(1, 2, 6, 5\)"):
        cache.attend(q[:1], k[:1], v[:1])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
def test_a_batch_may_be_empty(mode):
    q, k, v = (t[:0] for t in drawn())
    with mode():
        cache = HybridCache(TAIL, block=BLOCK)
        out = fed(cache, [20, 1, 2], q, k, v, some_gates()[:0], some_padding()[:0])
    assert out.shape == (0, L, H, D_V)
    assert cache.state.sums.shape == (0, H_KV, D * (D + 1) // 2, D_V)


def test_shapes_come_from_the_meta_device():
    q, k, v = torch.empty(3, 1, 3, 2, 8, device="meta").unbind()
    assert diffmax.HybridCache(4, block=2).attend(q, k, v).shape == (1, 3, 2, 8)


@pytest.mark.parametrize("cuts", [[12], [1] * 12])
def test_a_gate_of_zero_forgets_whatever_grows_after_it(cuts):
    """Such a gate was a finite number, which later gates above 1 outweighed, also those of other calls."""
    q, k, v = drawn(torch.float32, 12)
    log_gates = torch.zeros(B, 12, H_KV)
    log_gates[:, 2], log_gates[:, 4] = -torch.inf, 60.0
    k[:, 2:4], outs, states = 0.0, [], []
    for size in (0.0, 1e10):
        k[:, :2] = size
        cache = HybridCache(1, block=6)
        with torch.no_grad():
            outs.append(fed(cache, cuts, q, k, v, log_gates)[:, -1])
        states.append(cache.state)
    close(*outs)
    close(tuple(states[0]), tuple(states[1]))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
def test_the_caller_may_write_to_what_it_gave(mode):
    """The first call kept padding itself, where gradients were on."""
    q, k, v = drawn()
    log_gates, padding, outs = some_gates(), some_padding(), []
    for reused in (False, True):
        cache, given = HybridCache(TAIL, block=BLOCK), [t[:, :5].clone() for t in (k, v, log_gates, padding)]
        with mode():
            cache.attend(q[:, :5], *given[:3], padding=given[3])
            if reused:
                for t in given:
                    t.fill_(1)
            outs.append(cache.attend(q[:, 5:], k[:, 5:], v[:, 5:], log_gates[:, 5:], padding=padding[:, 5:]))
    assert torch.equal(*outs)
