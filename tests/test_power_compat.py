"""diffmax.compat.power_attention and .retention: their names and layouts, what their documentation promises, no limits."""

import importlib
import inspect
import itertools
import math

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.functional import logsigmoid

import diffmax
from diffmax import power
from diffmax.compat import power_attention, retention
from diffmax.compat.power_attention import _attention, _discumsum, _query_state, _update_state

QKV = "Q, K, V, log_G=None, initial_state=None"
FIRST = {  # of power_attention 1.0.0
    "attention": "Q, K, V, log_G, deg, r=1, w=1, causal=True, head_first=False, scale=1.0, norm=False, use_log2=False",
    "update_state": "K, V, deg",
    "update_state_vidrial": "K, V, deg, d_tile=None",
    "default_D": "d, deg, d_tile=None",
    "discumsum": "X, log_G",
    "power_full": f"{QKV}, return_final_state=False, deg=2, scale=None, chunk_size=None",
    "power_full_reference": f"{QKV}, return_final_state=False, deg=2, scale=None, chunk_size=None",
    "power_full_vidrial": f"{QKV}, return_final_state=False, deg=2, scale=None, chunk_size=None",
    "power_full_vidrial_reference": f"{QKV}, return_final_state=False, deg=2, scale=None, chunk_size=None",
    "query_state": "Q, S, s, Y_attn, l_attn, rowmax, deg, scale, zero_initial_state=True",
    "query_state_vidrial": "Q, S, s, Y_attn, l_attn, rowmax, deg, scale, zero_initial_state=True, d_tile=None",
    "compute_expanded_dim": "d, deg=2",
}
NEWEST = {  # of retention 1.0.7
    "power_retention": f"{QKV}, sum_of_keys=None, return_final_state=False, deg=2, scale=None, chunk_size=None, "
    "switch_over_seq_len=None, original_t=None",
    "power_retention_inference": f"{QKV}, sum_of_keys=None, deg=2, scale=None, switch_over_seq_len=512",
}
SAMPLES = {"create_inputs", "input_properties", "output_properties"}
OTHER_SAMPLES = {"create_inference_inputs", "inference_input_properties", "inference_output_properties"}
MODULES = {
    power_attention: {
        "_attention": [
            "attention",
            "attention_reference",
            "attention_reference_fwd",
            "attention_triton",
            "attention_cuda",
            *SAMPLES,
        ],
        "_update_state": [
            "update_state",
            "update_state_reference",
            "update_state_triton",
            "update_state_cuda",
            "default_D",
            *SAMPLES,
        ],
        "_query_state": [
            "query_state",
            "query_state_reference",
            "query_state_triton",
            "query_state_vidrial_reference",
            *SAMPLES,
        ],
        "_discumsum": ["discumsum", "discumsum_reference", *SAMPLES],
        "_utils": ["compute_expanded_dim"],
        "power_full": ["power_full", "power_full_triton", "power_full_cuda", "power_full_reference", "create_inputs"],
        "create_inputs": [*SAMPLES],
    },
    retention: {
        "_attention": ["attention_reference", "attention_reference_fwd", "attention_triton", *SAMPLES],
        "_update_state": ["update_state_reference", "update_state_triton", "update_state_vidrial", "default_D", *SAMPLES],
        "_query_state": ["query_state_reference", "query_state_triton", "query_state_vidrial", *SAMPLES],
        "_discumsum": ["discumsum_reference", "discumsum_triton", *SAMPLES],
        "_utils": ["compute_expanded_dim"],
        "reference": ["power_retention", "power_retention_inference"],
        "triton": ["power_retention", "power_retention_inference"],
        "create_inputs": [*SAMPLES, *OTHER_SAMPLES],
    },
}


def inputs(t=31, d=16, hq=4, h=2, b=2, e=None, tq=None, dtype=torch.float64, gated=True):
    """Q, K, V and log_G in their layout."""
    Q, K, V = (torch.randn(b, *size, dtype=dtype) for size in ((tq or t, hq, d), (t, h, d), (t, h, e or d)))
    return Q, K, V, logsigmoid(torch.randn(b, t, h, dtype=dtype) + 1) if gated else None


def written_out(Q, K, V, log_G, deg=2, scale=1.0):
    """Their attention form, all weights in memory."""
    r, many, length = Q.shape[2] // K.shape[2], K.shape[1], Q.shape[1]
    w = torch.einsum("bihd,bjhd->bhij", Q, K.repeat_interleave(r, 2)).mul(scale) ** deg
    if log_G is not None:
        G = log_G.cumsum(1).repeat_interleave(r, 2).transpose(1, 2)
        w = w * (G[..., many - length :, None] - G[..., None, :]).exp()
    w = w.tril(many - length)
    return torch.einsum("bhij,bjhe->bihe", w / w.sum(-1, keepdim=True), V.repeat_interleave(r, 2))


def close(ours, theirs):
    """Equal but for the order in which float64 is rounded."""
    return torch.allclose(ours, theirs, rtol=1e-9, atol=1e-10)


# names


def signature(function):
    parameters = [p for p in inspect.signature(function).parameters.values() if p.kind is not p.KEYWORD_ONLY]
    return ", ".join(str(p.replace(annotation=inspect.Parameter.empty)) for p in parameters)


@pytest.mark.parametrize(("module", "name"), [*((power_attention, n) for n in FIRST), *((retention, n) for n in NEWEST)])
def test_signatures_are_theirs(module, name):
    assert signature(getattr(module, name)) == (FIRST | NEWEST)[name]


def test_nothing_else_is_public_but_samples_and_the_pair():
    assert {*power_attention.__all__} == {*FIRST, *SAMPLES, "ChunkState"}
    assert {*retention.__all__} == {*NEWEST, *SAMPLES, *OTHER_SAMPLES}
    assert retention._attention.attention is not _attention.attention
    without = signature(retention._attention.attention).split(", ")
    assert without == [p for p in FIRST["attention"].split(", ") if p not in ("r=1", "w=1")]


@pytest.mark.parametrize(("module", "name"), [(m, n) for m, names in MODULES.items() for n in names])
def test_the_submodules_have_their_names(module, name):
    found = importlib.import_module(f"{module.__name__}.{name}")
    assert not [attribute for attribute in MODULES[module][name] if not callable(getattr(found, attribute, None))]


# the main functions


@pytest.mark.parametrize("deg", [2, 4, 6])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("chunk_size", [None, 1, 7, 16, 31, 100])
def test_any_length_chunk_head_and_degree_is_the_attention_form(deg, gated, chunk_size):
    given = inputs(t=31, d=5, gated=gated, e=3)
    exact = written_out(*given, deg)
    assert close(power_attention.power_full(*given, deg=deg, chunk_size=chunk_size), exact)
    assert close(retention.power_retention(*given, deg=deg, chunk_size=chunk_size), exact)
    assert close(retention.power_retention(*given, deg=deg, chunk_size=chunk_size, switch_over_seq_len=1000), exact)


def test_queries_may_be_fewer_than_keys_and_the_last_ones_meet():
    Q, K, V, log_G = inputs(tq=6)
    exact = written_out(Q, K, V, log_G)
    assert close(power_attention.power_full(Q, K, V, log_G), exact)
    assert close(retention.power_retention(Q, K, V, log_G, chunk_size=5), exact)


def test_the_scale_cancels_and_none_of_0_is_taken_for_the_default():
    """Theirs took scale=0 for 1 / sqrt(d)."""
    Q, K, V, log_G = inputs()
    for function in (power_attention.power_full, retention.power_retention, retention.power_retention_inference):
        with pytest.raises(ValueError, match="scale must not be 0, where every weight is, got 0"):
            function(Q, K, V, log_G, scale=0)
    assert close(power_attention.power_full(Q, K, V, log_G, scale=3.0), written_out(Q, K, V, log_G))


@pytest.mark.parametrize(("d", "deg"), [(16, 2), (32, 2), (5, 2), (5, 4), (3, 6)])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("chunk_size", [None, 6])
def test_a_sequence_in_two_parts_is_the_sequence(d, deg, gated, chunk_size):
    """Gates apply to the initial state, its sums of keys count, and a final state needs no gates: all were wrong in theirs."""
    given = inputs(t=20, d=d, e=3, gated=gated)
    exact = written_out(*given, deg)
    first, second = ([None if t is None else t[:, part] for t in given] for part in (slice(9), slice(9, 20)))
    options = {"deg": deg, "chunk_size": chunk_size, "return_final_state": True}
    out, state = power_attention.power_full(*first, **options)
    again, end = power_attention.power_full(*second, state, **options)
    assert close(torch.cat([out, again], 1), exact)
    out, S, s = retention.power_retention(*first, **options)
    again, *last = retention.power_retention(*second, S, s, **options)
    assert close(torch.cat([out, again], 1), exact)
    assert all(close(a, b) for a, b in zip(end, last, strict=True))
    out, state = power_attention.power_full_vidrial(*first, **options)
    again, end = power_attention.power_full_vidrial(*second, state, **options)
    assert close(torch.cat([out, again], 1), exact)
    assert end.S.shape[2] == power_attention.default_D(d, deg)


@pytest.mark.parametrize("layout", ["exact", "tiled", None])
def test_which_layout_a_state_has_is_told_by_its_rows_and_kept(layout):
    Q, K, V, log_G = inputs(t=20, d=16)
    _, (S, s) = power_attention.power_full(Q, K, V, log_G, return_final_state=True, state_layout=layout)
    assert S.shape[2] == s.shape[2] == {"exact": 136}.get(layout, 256)
    options = {"initial_state": S, "sum_of_keys": s, "return_final_state": True}
    _, again, _ = retention.power_retention(Q, K, V, log_G, **options)
    assert again.shape == S.shape
    for wanted, rows in (("exact", 136), ("tiled", 256)):
        out, found, _ = retention.power_retention(Q, K, V, log_G, **options, state_layout=wanted)
        assert found.shape[2] == rows
        assert close(out, retention.power_retention(Q, K, V, log_G, S, s))


def test_a_state_of_diffmax_goes_in_and_one_of_theirs_comes_out():
    Q, K, V, log_G = inputs(t=20, d=16)
    heads = [t.transpose(1, 2) for t in (Q, K, V, log_G)]
    _, state = diffmax.power_attention(*heads, return_final_state=True)
    _, S, s = retention.power_retention(Q, K, V, log_G, return_final_state=True)
    assert all(close(a, b) for a, b in zip(power.from_tiled(S, s, 16), state, strict=True))
    exact = diffmax.power_attention(*heads, state).transpose(1, 2)
    assert close(power_attention.power_full(Q, K, V, log_G, state), exact)
    tiles = power.to_tiled(state, 16, tile=4)  # vidrial's
    assert close(power_attention.power_full(Q, K, V, log_G, tiles), exact)


@pytest.mark.parametrize(("d", "deg"), [(16, 2), (3, 4)])
def test_gradients_of_two_orders_reach_states_and_gates(d, deg):
    Q, K, V, log_G = (t.detach().requires_grad_() for t in inputs(t=3, d=d, hq=2, h=1, b=1, e=2))
    rows = power_attention.compute_expanded_dim(d, deg)
    _, state = power_attention.power_full(*(t.detach() for t in (K, K, V)), return_final_state=True, deg=deg)
    S, s = (t.requires_grad_() for t in state)
    assert S.shape[2] == rows

    def function(*given):
        return retention.power_retention(*given, return_final_state=True, deg=deg, chunk_size=2)

    fast = d > 4  # hundreds of rows of a state
    assert gradcheck(function, (Q, K, V, log_G, S, s), fast_mode=fast)
    assert gradgradcheck(function, (Q, K, V, log_G, S, s), fast_mode=fast)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes_are_theirs(dtype):
    given = inputs(dtype=dtype)
    out, S, s = retention.power_retention(*given, return_final_state=True)
    assert out.dtype == S.dtype == dtype
    assert s.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert out.is_contiguous()
    _, S, _ = retention.power_retention(*given, S.double(), s, return_final_state=True)
    assert S.dtype == torch.float64  # a state keeps its own


def test_no_final_state_while_keys_are_to_be_kept():
    given = inputs(t=20)
    found = retention.power_retention(*given, return_final_state=True, chunk_size=8, switch_over_seq_len=25)
    assert close(found[0], written_out(*given))
    assert found[1:] == (None, None)
    found = retention.power_retention(*given, return_final_state=True, chunk_size=8, switch_over_seq_len=24)
    assert found[1] is not None


@pytest.mark.parametrize(("original_t", "kept"), [(20, 16), (16, 16), (15, 8), (24, 20), (None, 20)])
def test_the_final_state_is_of_whole_chunks_of_what_is_no_padding(original_t, kept):
    Q, K, V, log_G = inputs(t=20)
    _, S, s = retention.power_retention(Q, K, V, log_G, return_final_state=True, chunk_size=8, original_t=original_t)
    _, *exact = retention.power_retention(Q[:, :kept], K[:, :kept], V[:, :kept], log_G[:, :kept], return_final_state=True)
    assert close(S, exact[0])
    assert close(s, exact[1])


def test_padding_with_keys_of_zeros_changes_no_state():
    Q, K, V, log_G = inputs(t=20)
    padded = [torch.cat([t, torch.zeros_like(t[:, :4])], 1) for t in (Q, K, V, log_G)]
    found, exact = (retention.power_retention(*given, return_final_state=True) for given in (padded, (Q, K, V, log_G)))
    assert close(found[0][:, :20], exact[0])
    assert close(found[1], exact[1])


# decoding


@pytest.mark.parametrize("d", [16, 5])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("switch_over", [1, 4, None])
def test_decoding_step_by_step_is_the_sequence(d, gated, switch_over):
    Q, K, V, log_G = inputs(t=14, d=d, gated=gated)
    exact, S, s, start = written_out(Q, K, V, log_G), None, None, 0
    for end in (3, 5, *range(6, 15)):  # several queries at first, each of which decays the state by its own gates
        gates = None if log_G is None else log_G[:, start:end]
        last = slice(max(start, {3: 0, 5: 3}.get(end, end - 1)), end)
        out, S, s = retention.power_retention_inference(
            Q[:, last], K[:, start:end], V[:, start:end], gates, S, s, switch_over_seq_len=switch_over
        )
        assert close(out, exact[:, last])
        start = end if switch_over is not None and end - start >= switch_over else start
    assert (S is None) == (switch_over is None)


def test_without_a_tail_the_state_is_read_and_returned_as_it_is():
    Q, K, V, _ = inputs(t=14)
    _, S, s = retention.power_retention_inference(Q[:, -1:], K, V, switch_over_seq_len=14)
    out, again, sums = retention.power_retention_inference(Q[:, -1:], None, None, None, S, s)
    assert again is S
    assert sums is s
    assert close(out, written_out(Q[:, -1:], K, V, None))


def test_a_state_that_no_keys_give_answers_alike_after_a_tail_of_nothing():
    Q, K, V, _ = inputs(d=16, t=14)
    size = power_attention.compute_expanded_dim(16)
    S, s = torch.randn(*K[:, 0, :, 0].shape, size, 16, dtype=Q.dtype), torch.rand(*K[:, 0, :, 0].shape, size, dtype=Q.dtype)
    before, _, _ = retention.power_retention_inference(Q, None, None, None, S, s)
    _, folded, sums = retention.power_retention_inference(Q[:, -1:], 0 * K, V, None, S, s, switch_over_seq_len=14)
    after, _, _ = retention.power_retention_inference(Q, None, None, None, folded, sums)
    assert not torch.equal(folded, S)
    assert close(after, before)


# the parts


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize(("d", "deg"), [(16, 2), (5, 2), (4, 4)])
@pytest.mark.parametrize("vidrial", [True, False])
def test_their_chunked_algorithm_put_together_from_its_parts_is_the_attention_form(gated, d, deg, vidrial):
    b, n, c, h, hq, scale = 2, 3, 8, 2, 4, 0.4
    Q, K, V, log_G = inputs(t=n * c, d=d, gated=gated)
    exact = written_out(Q, K, V, log_G, deg)
    Qc, Kc, Vc = (t.view(b, n, c, *t.shape[2:]) for t in (Q, K, V))
    L = torch.zeros(b, n, c, h, dtype=Q.dtype) if log_G is None else log_G.view(b, n, c, h).cumsum(2)
    states = power_attention.update_state_vidrial if vidrial else power_attention.update_state
    S, s = states(Kc * ((L[:, :, -1:] - L) / deg).exp().unsqueeze(-1), Vc, deg)
    S, s = (power_attention.discumsum(t, L[:, :, -1])[:, :n] for t in (S, s))
    flat = [t.reshape(b * n, *t.shape[2:]) for t in (Qc, Kc, Vc, L)]
    inside = power_attention.attention(*flat[:3], flat[3] if gated else None, deg, scale=scale)
    inside = [t.view(b, n, *t.shape[1:]) for t in inside]
    decayed = Qc * (L.repeat_interleave(hq // h, 3) / deg).exp().unsqueeze(-1)
    read = power_attention.query_state_vidrial if vidrial else power_attention.query_state
    for zero_initial_state in (True, False):
        out = read(decayed, S, s, *inside, deg, scale, zero_initial_state)
        assert close(out.view(exact.shape), exact)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("deg", [2, 4])
def test_attention_returns_sums_in_units_of_the_largest_weight(causal, deg):
    Q, K, V, log_G = inputs(t=9)
    G = log_G.cumsum(1)
    Y, total, rowmax = retention._attention.attention(Q, K, V, G, deg, causal=causal, scale=0.3)
    heads = [t.transpose(1, 2) for t in (Q, K, V, log_G)]
    sums, totals = power.attention(*heads, degree=deg, scale=0.3, is_causal=causal, normalize=False)
    assert close(Y.transpose(1, 2), sums / rowmax.exp().transpose(1, 2).unsqueeze(-1))
    assert close(total, totals.transpose(1, 2) / rowmax.exp())
    assert (total >= 1 - 1e-12).all()  # the largest weight is 1
    out = power_attention.attention(Q, K, V, G, deg, 2, 1, causal, norm=True)
    assert close(out, Y / total.unsqueeze(-1))
    first = power_attention.attention(
        *(t.transpose(1, 2) for t in (Q, K, V, G)), deg, causal=causal, head_first=True, norm=True
    )
    assert close(first.transpose(1, 2), out)
    two = power_attention.attention(Q, K, V, G / math.log(2), deg, causal=causal, scale=0.3, use_log2=True)
    assert close(two[2], rowmax / math.log(2))
    assert close(two[0], Y)


@pytest.mark.parametrize("norm", [True, False])
def test_with_use_log2_gates_are_powers_of_two(norm):
    Q, K, V, log_G = inputs(t=12)
    G = log_G.cumsum(1)
    found = power_attention.attention(Q, K, V, G / math.log(2), 2, norm=norm, use_log2=True)
    wanted = power_attention.attention(Q, K, V, G, 2, norm=norm)
    if norm:
        assert close(found, wanted)
        return
    assert close(found[0], wanted[0])
    assert close(found[1], wanted[1])
    assert close(found[2], wanted[2] / math.log(2))


def test_attention_neither_overflows_nor_loses_what_is_small():
    Q, K, V, _ = inputs(t=9, dtype=torch.float32)
    exact = written_out(Q, K, V, None, 4)
    for factor in (1e-9, 1e9):  # to the eighth power
        out = power_attention.attention(Q * factor, K * factor, V, None, 4, norm=True)
        assert torch.allclose(out, exact, rtol=1e-4, atol=1e-4)
    K[:, 3] = 0  # met by itself alone, where gates have shut out the others
    G = torch.zeros(2, 9, 2)
    G[:, 3:] = -300.0
    leaves = [t.requires_grad_() for t in (Q, K, V, G)]
    out, total, rowmax = power_attention.attention(*leaves, 2)
    assert all(t.isfinite().all() for t in (out, total, rowmax))
    assert all(t.isfinite().all() for t in torch.autograd.grad(out.sum() + total.sum(), leaves))


def test_keys_of_zeros_give_zeros_and_not_the_mean_of_values():
    Q, K, V, _ = inputs(t=9)
    K = torch.zeros_like(K)
    assert not power_attention.power_full(Q, K, V).any()
    assert not power_attention.attention(Q, K, V, None, 2, norm=True).any()
    Y, total, rowmax = power_attention.attention(Q, K, V, None, 2)
    assert not Y.any()
    assert not total.any()
    assert not rowmax.any()
    S, s = power_attention.update_state(K, V, 2)
    assert not power_attention.query_state(Q, S, s, Y, total, rowmax, 2, 1.0).any()


def test_parts_have_gradients_of_two_orders():
    Q, K, V, log_G = (t.detach().requires_grad_() for t in inputs(t=3, d=3, hq=2, h=1, b=1, e=2))
    S, s = (t.detach().requires_grad_() for t in power_attention.update_state(K, V, 2))
    Y, total, rowmax = power_attention.attention(Q, K, V, log_G.cumsum(1), 2)
    inside = (Y.detach().requires_grad_(), total.detach().requires_grad_())
    functions = [
        # rowmax is a constant to gradients: what does not depend on it is compared
        (lambda Q, K, V, g: power_attention.attention(Q, K, V, g.cumsum(1), 2, norm=True), (Q, K, V, log_G)),
        (lambda K, V: power_attention.update_state(K, V, 2), (K, V)),
        (lambda Q, S, s, Y, total: power_attention.query_state(Q, S, s, Y, total, rowmax, 2, 0.7), (Q, S, s, *inside)),
        (power_attention.discumsum, (V, log_G)),
    ]
    for function, given in functions:
        assert gradcheck(function, given)
        assert gradgradcheck(function, given)


def test_discumsum_adds_a_step_without_gates_too():
    """Theirs gave t of them, and t + 1 with gates."""
    X = torch.randn(2, 5, 3, 4)
    assert torch.equal(power_attention.discumsum(X, None), power_attention.discumsum(X, torch.zeros(2, 5, 3)))
    assert power_attention.discumsum(X, None).shape == (2, 6, 3, 4)


def test_sizes_of_states_are_theirs_where_they_have_one():
    sizes = {(16, 2): 256, (32, 2): 768, (64, 2): 2560, (128, 2): 9216, (16, 4): 3876, (20, 2): 210}
    assert {given: power_attention.compute_expanded_dim(*given) for given in sizes} == sizes
    sizes = {(16, 2): 160, (32, 2): 640, (64, 2): 2304, (128, 2): 8256, (64, 3): 52224, (64, 4): 837760}
    assert {given: power_attention.default_D(*given) for given in sizes} == sizes


# samples


def properties_of(given):
    return {k: (tuple(t.shape), t.dtype, t.device.type) for k, t in given.items() if isinstance(t, torch.Tensor)}


SMALL = {
    _attention: [{"t": 8, "norm": n, "head_first": f, "gating": g} for n, f, g in itertools.product((True, False), repeat=3)],
    _update_state: [
        {"n": 2, "c": 4, "d": 16},
        {"n": 1, "c": 4, "d": 5, "deg": 4},
        {"c": 4, "d": 16, "use_vidrial_layout": True},
    ],
    _query_state: [{"n": 2, "c": 4, "d": 16, "h": 2, "qhead_ratio": 2}, {"c": 4, "d": 16, "inference": True}],
    _discumsum: [{"n": 3, "D": 8}],
    power_attention: [{"t": 8, "gating": g, "qhead_ratio": r, "chunk_size": c} for g, r, c in ((True, 2, 4), (False, 1, None))],
    retention: [
        {"t": 8, "gating": g, "initial_state": i, "return_final_state": f, "fused_normalizer": n}
        for g, i, f, n in itertools.product((True, False), repeat=4)
    ],
    retention._attention: [{"t": 8, "norm": n, "inference": i, "qhead_ratio": 2} for n, i in ((True, False), (False, True))],
}
FUNCTIONS = {
    _attention: power_attention.attention,
    _update_state: power_attention.update_state,
    _query_state: power_attention.query_state,
    _discumsum: power_attention.discumsum,
    power_attention: power_attention.power_full,
    retention: retention.power_retention,
    retention._attention: retention._attention.attention,
}


@pytest.mark.parametrize(("module", "options"), [(m, o) for m, many in SMALL.items() for o in many])
def test_samples_and_results_have_the_stated_properties(module, options):
    options = {"b": 1, "dtype": torch.float32, "device": "cpu"} | options
    state = torch.get_rng_state()
    given = module.create_inputs(**options)
    assert torch.equal(torch.get_rng_state(), state)  # theirs seeded torch's own generator
    assert properties_of(given) == module.input_properties(**options)
    again = module.create_inputs(**options)
    assert all(torch.equal(t, again[name]) for name, t in given.items() if isinstance(t, torch.Tensor))
    function = power_attention.update_state_vidrial if options.get("use_vidrial_layout") else FUNCTIONS[module]
    by_place, found = function(*given.values()), function(**given)
    found = found if isinstance(found, tuple) else (found,)
    assert all(torch.equal(a, b) for a, b in zip(by_place if isinstance(by_place, tuple) else (by_place,), found, strict=True))
    wanted = module.output_properties(**options)
    assert properties_of(dict(zip(wanted, found, strict=True))) == wanted
    assert all(t.isfinite().all() for t in found)
    leaves = module.create_inputs(**options, requires_grad=True)
    assert all(t.requires_grad for name, t in leaves.items() if isinstance(t, torch.Tensor) and name != "rowmax")


@pytest.mark.parametrize(("tk", "initial_state", "switch"), [(8, False, 512), (8, True, 8), (8, False, 8), (0, True, 512)])
def test_samples_of_decoding_have_the_stated_properties(tk, initial_state, switch):
    options = {"b": 1, "tk": tk, "dtype": torch.float32, "device": "cpu", "gating": True, "initial_state": initial_state}
    options["switch_over_seq_len"] = switch
    given = retention.create_inference_inputs(**options)
    assert properties_of(given) == retention.inference_input_properties(**options)
    wanted, found = retention.inference_output_properties(**options), retention.power_retention_inference(**given)
    assert [None if t is None else (tuple(t.shape), t.dtype, t.device.type) for t in found] == [*wanted.values()]


def test_samples_are_by_default_where_there_is_a_device():
    assert power_attention.create_inputs(b=1, t=4)["Q"].device.type == ("cuda" if torch.cuda.is_available() else "cpu")


# errors

Q, K, V, LOG_G = inputs(t=4, d=16, b=1)
S, s = torch.zeros(1, 2, 256, 16), torch.zeros(1, 2, 256)
full, kept, step = power_attention.power_full, retention.power_retention, retention.power_retention_inference
WRONG = [
    (TypeError, "power_full: Q must be a torch.Tensor, got list", lambda: full([1.0], K, V)),
    (ValueError, r"power_full: K must have 4 dimensions \(b, t, h, d\), got", lambda: full(Q, K[0], V)),
    (ValueError, r"log_G must have shape \(b, tk, h\) = \(1, 4, 2\), got \(1, 2, 4\)", lambda: full(Q, K, V, LOG_G.mT)),
    (ValueError, "power_full: degree must be even", lambda: full(Q, K, V, deg=3)),
    (TypeError, "initial_state must be a pair .*\nS alone does not say", lambda: full(Q, K, V, initial_state=S)),
    (TypeError, "power_full: chunk_size must be an int or None", lambda: full(Q, K, V, chunk_size=1.5)),
    (TypeError, "return_final_state must be True or False", lambda: full(Q, K, V, return_final_state=1)),
    (ValueError, "must have 136 or 256 or 160 rows .* got 100", lambda: full(Q, K, V, None, (S[:, :, :100], s[:, :, :100]))),
    (ValueError, 'state_layout must be "exact", "tiled" or None, got 3.5', lambda: full(Q, K, V, state_layout=3.5)),
    (
        ValueError,
        "the tiled layout needs degree 2",
        lambda: full(Q, K, V, deg=4, return_final_state=True, state_layout="tiled"),
    ),
    (ValueError, "must have 160 rows, got 256", lambda: power_attention.power_full_vidrial(Q, K, V, None, (S, s))),
    (ValueError, r"initial_state must have shape \(b, h, D, e\)", lambda: kept(Q, K, V, None, S[:, :1], s[:, :1])),
    (ValueError, "sum_of_keys must have the shape of initial_state without", lambda: kept(Q, K, V, None, S, s[..., :5])),
    (TypeError, "sum_of_keys must be a floating tensor, got int", lambda: kept(Q, K, V, None, S, 3)),
    (ValueError, "both or neither, sum_of_keys is missing", lambda: kept(Q, K, V, None, S)),
    (ValueError, "both or neither, initial_state is missing", lambda: kept(Q, K, V, sum_of_keys=s)),
    (TypeError, "switch_over_seq_len must be an int or None", lambda: kept(Q, K, V, switch_over_seq_len=0.5)),
    (ValueError, "original_t must not be negative", lambda: kept(Q, K, V, original_t=-1)),
    (ValueError, "there must be a tail or an initial state, got neither", lambda: step(Q, None, None)),
    (ValueError, "K and V must be given both or neither", lambda: step(Q, K, None)),
    (ValueError, "log_G is of a tail", lambda: step(Q, None, None, LOG_G, S, s)),
    (ValueError, "initial_state must have shape", lambda: step(Q, None, None, None, S[0], s[0])),
    (ValueError, "r must be 1 or query heads over key heads, 2", lambda: power_attention.attention(Q, K, V, None, 2, 4)),
    (ValueError, "at least as many keys as queries", lambda: power_attention.attention(Q, K[:, :2], V[:, :2], None, 2)),
    (ValueError, r"update_state: K and V must have shapes", lambda: power_attention.update_state(K[0], V[0], 2)),
    (
        ValueError,
        "query_state: Q and S must have shapes",
        lambda: power_attention.query_state(Q[0], S, s, None, None, None, 2, 1.0),
    ),
    (
        ValueError,
        "same batch and chunks",
        lambda: power_attention.query_state(Q.repeat(2, 1, 1, 1), S, s, None, None, None, 2, 1.0),
    ),
    (TypeError, "must be tensors, or all None", lambda: power_attention.query_state(Q, S, s, Q, None, None, 2, 1.0)),
    (ValueError, "l_attn must have shape", lambda: power_attention.query_state(Q, S, s, Q, Q[..., :1], Q[..., 0], 2, 1.0)),
    (ValueError, "160 rows for tiles of 4", lambda: power_attention.query_state_vidrial(Q, S, s, None, None, None, 2, 1.0)),
    (ValueError, r"X must have 3 dimensions \(b, t, h, ...\)", lambda: power_attention.discumsum(Q[0, 0], None)),
    (ValueError, r"log_G must have shape \(b, t, h\)", lambda: power_attention.discumsum(Q, LOG_G)),
    (ValueError, "size must be a multiple of the tile, 5", lambda: power_attention.default_D(16, 2, 5)),
    (TypeError, "degree must be an int", lambda: power_attention.compute_expanded_dim(16, "two")),
    (ValueError, "tk must be positive, or initial_state True", lambda: retention.create_inference_inputs(tk=0)),
]


@pytest.mark.parametrize(("error", "words", "call"), WRONG, ids=[words[:40] for _, words, _ in WRONG])
def test_says_what_is_wrong(error, words, call):
    with pytest.raises(error, match=words):
        call()


# beside the package


EPSILONS = 2e-5
"""Of theirs: 1e-7 is added to each product's size and 1e-6 to sums, whose largest term is 1."""


def near(ours, theirs):
    return ours.shape == theirs.shape and (ours - theirs).abs().max() <= EPSILONS * (1 + theirs.abs().max())


@pytest.fixture(scope="module")
def theirs():
    return pytest.importorskip("retention.reference", reason="needs retention: pip install retention==1.0.7")


@pytest.mark.parametrize("gating", [True, False])
@pytest.mark.parametrize("qhead_ratio", [1, 3])
def test_numbers_samples_and_states_are_retentions(theirs, gating, qhead_ratio):
    package = importlib.import_module("retention.create_inputs")
    options = {"b": 2, "t": 48, "h": 2, "d": 32, "qhead_ratio": qhead_ratio, "gating": gating, "chunk_size": 16}
    options |= {"dtype": torch.float32, "device": "cpu", "return_final_state": True, "fused_normalizer": False}
    given, same = package.create_inputs(**options), retention.create_inputs(**options)
    assert [*given] == [*same]
    for name, t in given.items():
        assert torch.equal(t, same[name]) if isinstance(t, torch.Tensor) else t == same[name]
    places, rest = [given.pop(name) for name in ("Q", "K", "V", "log_G")], given
    found, exact = retention.power_retention(*places, **rest), theirs.power_retention(*places, **rest)
    assert all(near(a, b) for a, b in zip(found, exact, strict=True))
    rest |= {"initial_state": exact[1], "sum_of_keys": exact[2]}
    again, exact = retention.power_retention(*places, **rest), theirs.power_retention(*places, **rest)
    assert all(near(a, b) for a, b in zip(again, exact, strict=True))
    Q, K, V, log_G = places
    for tail in (slice(0, 20), slice(40, 48)):
        tokens = (Q[:, tail][:, -1:], K[:, tail], V[:, tail], log_G[:, tail] if gating else None, *exact[1:])
        step = (f.power_retention_inference(*tokens, switch_over_seq_len=16) for f in (retention, theirs))
        assert all(near(a, b) for a, b in zip(*step, strict=True))
    parts = (
        importlib.import_module("retention._attention.reference"),
        importlib.import_module("retention._query_state.reference"),
    )
    inside = retention._attention.attention(Q, K, V, None, 4), parts[0].attention(Q, K, V, None, 4)
    assert all(near(a, b) for a, b in zip(*inside, strict=True))
    inside = parts[0].attention(Q, K, V, None, 2)
    read = (Q, *exact[1:], *inside, 2, 1.0, False)
    assert near(retention._query_state.query_state(*read), parts[1].query_state_reference(*read))
