"""diffmax.attention against independent truths, what it refuses, and how it behaves inside torch."""

import math

import entmax
import pytest
import torch
from torch.nn.attention.bias import causal_lower_right, causal_upper_left
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

import diffmax
from benchmarks.memory import peak_bytes
from diffmax import attention, attention_varlen, diffmax_bisect
from diffmax.kernels.cpu import blocks
from diffmax.kernels.tools import packed_bits, unpacked_bits
from diffmax.operators.attention.operator import FORWARD
from diffmax.plugin import TILE, AttentionCall
from diffmax.testing import gates, solve_exactly

pytestmark = pytest.mark.sampled(3)

BACKENDS = ("reference", "cpu", "numba")
every_backend = pytest.mark.parametrize("backend", BACKENDS)


def unfused(query, key, value, mask=None, alpha=0.7):
    """Scores, weights and output one after the other, heads repeated."""
    group = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(group, 1).mT / math.sqrt(query.shape[3])
    scores = scores if mask is None else scores.masked_fill(~mask, -torch.inf)
    alpha = alpha.view(-1, 1, 1) if isinstance(alpha, torch.Tensor) else alpha
    return diffmax_bisect(scores, alpha, n_iter=200) @ value.repeat_interleave(group, 1)


def tensors(length, keys, *, batch=2, heads=2, kv_heads=None, size=8, spread=2.0, dtype=torch.float64, grad=False):
    shapes = [(batch, heads, length, size), *[(batch, kv_heads or heads, keys, size)] * 2]
    return [(torch.randn(shape, dtype=dtype) * spread).requires_grad_(grad) for shape in shapes]


def near(ours, oracle, *given):
    """As near to the oracle as float64 can be, by what it errs in float32."""
    ((exact, allowed),) = gates(oracle, *given)
    assert (ours - exact).abs().max() <= allowed


# the oracle


@every_backend
@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.85, 0.99])
def test_weights_are_exact_to_forty_digits_solved_by_other_means(backend, alpha):
    query, key, _ = tensors(3, 9, batch=1, heads=1)
    weights = attention(query, key, torch.eye(9, dtype=torch.float64).view(1, 1, 9, 9), alpha=alpha, backend=backend)[0, 0]
    scores = (query @ key.mT / math.sqrt(8))[0, 0]
    for ours, row in zip(weights, scores, strict=True):
        assert max(abs(float(p) - q) for p, q in zip(solve_exactly(row.tolist(), alpha), ours.tolist(), strict=True)) < 1e-13


@every_backend
@pytest.mark.parametrize("alpha", [0.3, 0.5, 0.9])
def test_agrees_with_entmax_and_a_product(backend, alpha):
    query, key, value = tensors(70, 200)

    def oracle(query, key, value):
        return entmax.entmax_bisect(query @ key.mT / math.sqrt(8), 2 - alpha, dim=-1, n_iter=100) @ value

    near(attention(query, key, value, alpha=alpha, backend=backend), oracle, query, key, value)


@every_backend
def test_agrees_with_the_unfused_operator_in_every_gradient(backend):
    query, key, value = tensors(130, 200, heads=4, kv_heads=2, grad=True)
    alpha = torch.tensor([0.2, 0.5, 0.8, 0.97], dtype=torch.float64, requires_grad=True)
    mask = torch.rand(2, 1, 130, 200) > 0.3
    mask[0, 0, 3] = False
    options = {"is_causal": True, "enable_gqa": True, "alpha": alpha, "backend": backend}
    ours = attention(query, key, value, mask, **options)
    seen = mask & torch.ones(130, 200, dtype=torch.bool).tril()
    grad, leaves = torch.randn_like(ours), (query, key, value, alpha)

    def oracle(query, key, value, alpha):
        return unfused(query, key, value, seen, alpha)

    with torch.no_grad():
        near(ours, oracle, *leaves)
    for place, got in enumerate(torch.autograd.grad(ours, leaves, grad)):

        def gradient(*given, place=place):
            given = [t.detach().requires_grad_() for t in given]
            return torch.autograd.grad(oracle(*given), given[place], grad.to(given[0].dtype))[0]

        near(got, gradient, *leaves)


@every_backend
def test_gradcheck_for_query_key_value_and_alpha(backend):
    leaves = [*tensors(5, 6, batch=1, heads=2, kv_heads=1, size=3, spread=1.0, grad=True)]
    alpha = torch.tensor([0.6, 0.9], dtype=torch.float64, requires_grad=True)
    mask = torch.ones(5, 6, dtype=torch.bool).tril(1)

    def call(query, key, value, alpha):
        return attention(query, key, value, mask, enable_gqa=True, alpha=alpha, backend=backend)

    assert torch.autograd.gradcheck(call, (*leaves, alpha))


@every_backend
def test_second_derivatives_by_finite_differences(backend):
    leaves = tensors(3, 4, batch=1, heads=1, size=2, spread=1.0, grad=True)
    alpha = torch.tensor([0.8], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda q, k, v, a: attention(q, k, v, alpha=a, backend=backend), (*leaves, alpha))


@every_backend
def test_packed_gradcheck(backend):
    query, key, value = (torch.randn(7, 1, 3, dtype=torch.float64, requires_grad=True) for _ in range(3))
    ends = torch.tensor([0, 3, 7], dtype=torch.int32)
    assert torch.autograd.gradcheck(
        lambda *qkv: attention_varlen(*qkv, ends, ends, 4, 4, is_causal=True, alpha=0.7, backend=backend), (query, key, value)
    )


# what SDPA's names mean


@every_backend
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"scale": 0.3}, {"enable_gqa": True}])
def test_alpha_of_one_is_torchs_own_attention(backend, options):
    options = dict(options)
    query, key, value = tensors(70, 100, heads=4, kv_heads=2 if "enable_gqa" in options else 4)
    ours = attention(query, key, value, alpha=torch.tensor(1.0, dtype=torch.float64), backend=backend, **options)
    options.pop("enable_gqa", None)  # torch 2.4's own has no such argument
    key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (key, value))
    near(ours, lambda *qkv: scaled_dot_product_attention(*qkv, **options), query, key, value)


@pytest.mark.parametrize("shape", [(70, 100), (2, 70, 100), (2, 3, 70, 100), (3, 1, 100), (2, 1, 1, 100), (1, 1)])
def test_masks_broadcast_as_in_torch(shape):
    query, key, value = tensors(70, 100, heads=3) if shape[0] != 2 or len(shape) == 4 else tensors(70, 100, heads=2)
    mask = torch.rand(shape) > 0.3
    mask[..., 0] = True
    ours = attention(query, key, value, mask, alpha=torch.tensor(1.0, dtype=torch.float64))
    # torch 2.4's own takes a mask of one element for another one
    near(ours, scaled_dot_product_attention, query, key, value, mask.expand(*query.shape[:3], key.shape[2]))


@pytest.mark.filterwarnings("ignore:Lower right causal bias will produce NaNs")  # in torch's own attention
@pytest.mark.parametrize(("length", "keys"), [(70, 100), (100, 70)])
def test_causal_bias_objects_and_alignments(length, keys):
    query, key, value = tensors(length, keys)
    for bias, options in (
        (causal_upper_left(length, keys), {"is_causal": True}),
        (causal_lower_right(length, keys), {"is_causal": True, "causal_alignment": "lower_right"}),
    ):
        by_object = attention(query, key, value, bias, alpha=0.6)
        seen = torch.ones(length, keys, dtype=torch.bool).tril(keys - length if len(options) == 2 else 0)
        assert torch.equal(by_object, attention(query, key, value, alpha=0.6, **options))
        near(by_object, lambda *qkv, seen=seen: unfused(*qkv, seen, 0.6), query, key, value)


def test_a_window_is_what_a_mask_says():
    query, key, value = tensors(150, 130)
    distance = torch.arange(130) - torch.arange(150).unsqueeze(1)
    for left, right in ((20, 5), (-1, 3), (7, -1), (0, 0)):
        mask = ((distance >= -left) | (left < 0)) & ((distance <= right) | (right < 0))
        ours = attention(query, key, value, alpha=0.6, window_size=(left, right))
        near(ours, lambda *qkv, mask=mask: unfused(*qkv, mask, 0.6), query, key, value)


def test_autocast_computes_in_its_dtype_and_sums_in_float32():
    query, key, value = tensors(40, 50, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        ours = attention(query, key, value, alpha=0.6)
    low = [t.bfloat16() for t in (query, key, value)]
    assert ours.dtype == torch.bfloat16
    assert torch.equal(ours, attention(*low, alpha=0.6))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("autocast", [torch.float16, torch.bfloat16])
def test_autocast_converts_what_it_converts_for_torchs_attention(dtype, autocast):
    """The 16-bit dtype that is not autocast's was left as it is, and a value in it was refused."""
    query, key, value = (t.to(dtype) for t in tensors(4, 4, dtype=torch.float32))
    with torch.autocast("cpu", autocast):
        expected = torch.nn.functional.scaled_dot_product_attention(query, key, value).dtype
        assert attention(query, key, value).dtype == expected
        assert diffmax.power_attention(query, key, value).dtype == expected
        assert diffmax.threshold_attention(query, key, value, 0.0).dtype == expected
        if dtype != torch.float64:
            assert attention(query.float(), key, value.half()).dtype == autocast


# inside torch


SELECTIVE = pytest.mark.skipif(not hasattr(torch.utils.checkpoint, "CheckpointPolicy"), reason="needs torch 2.5: a policy")


@pytest.mark.parametrize("selective", [False, pytest.param(True, marks=SELECTIVE)])
def test_checkpointing_gives_the_same_gradients_and_a_policy_can_keep_the_result(selective):
    leaves = tensors(70, 70, grad=True)
    calls = []

    def block(*qkv):
        calls.append(None)
        return attention(*qkv, is_causal=True, alpha=0.5)

    def keep(context, operator, *args, **kwargs):
        kept = operator is torch.ops.diffmax.attention.default
        policy = torch.utils.checkpoint.CheckpointPolicy
        return policy.MUST_SAVE if kept else policy.PREFER_RECOMPUTE

    expected = torch.autograd.grad(block(*leaves).square().sum(), leaves)
    options = {"context_fn": lambda: torch.utils.checkpoint.create_selective_checkpoint_contexts(keep)} if selective else {}
    out = checkpoint(block, *leaves, use_reentrant=False, **options)
    for a, b in zip(torch.autograd.grad(out.square().sum(), leaves), expected, strict=True):
        assert torch.equal(a, b)
    assert len(calls) == 3


def test_varlen_compiles_in_one_graph():
    ends = torch.tensor([0, 30, 100], dtype=torch.int32)

    def call(x, ends):
        return attention_varlen(x, x, x, ends, ends, 70, 70, is_causal=True, alpha=0.5).sum()

    x = torch.randn(100, 2, 8, requires_grad=True)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    a, b = (torch.autograd.grad(f(x, ends), x)[0] for f in (compiled, call))
    assert torch.equal(a, b)


def test_second_derivatives_of_packed_sequences():
    x = tuple(torch.randn(5, 1, 2, dtype=torch.float64, requires_grad=True) for _ in range(3))
    ends = torch.tensor([0, 2, 5], dtype=torch.int32)
    assert torch.autograd.gradgradcheck(lambda *qkv: attention_varlen(*qkv, ends, ends, 3, 3, is_causal=True, alpha=0.8), x)


@pytest.mark.parametrize("backend", ["numba", pytest.param("cpu", marks=pytest.mark.slow)])
def test_no_score_matrix_is_held(backend):
    leaves = tensors(16384, 16384, batch=1, heads=1, size=16, dtype=torch.float32, grad=True)

    def step():
        return torch.autograd.grad(attention(*leaves, alpha=0.5, backend=backend).sum(), leaves)

    assert peak_bytes(step) < 1e8  # the scores alone would be 1e9


@pytest.mark.parametrize("left", [0, 16, 1000])
def test_a_window_costs_about_what_it_sees(left):
    query = torch.empty(1, 2, 8192, 4)
    call = AttentionCall(scale=1.0, e=0.5, left=left, right=0)
    visited = [block for part in blocks.parts(query, query, call) for block in part.blocks(call)]
    scores = sum((block.stop - block.start) * (block.last - block.first) for block in visited)
    assert scores <= 2 * 8192 * (2 * left + blocks.LEAST_ROWS + TILE)


def test_inference_keeps_nothing_for_a_backward():
    query, key, value = tensors(70, 70)
    *_, u, live, support = FORWARD(query, key, value, False, False, AttentionCall(scale=0.3, e=0.5))
    assert u.numel() == live.numel() == support.numel() == 0


def shaped(length):
    """Queries that look at keys near their own place: most tiles are empty."""
    place = torch.arange(length) / 8
    waves = place.unsqueeze(1) * torch.linspace(0.05, 1, 16)
    x = torch.cat([waves.cos(), waves.sin()], 1).view(1, 1, length, 32) * 4
    return x, x.clone(), torch.randn(1, 1, length, 32)


@pytest.mark.parametrize("backend", ["cpu", "numba"])
def test_skipped_tiles_change_nothing(backend):
    leaves = [t.double().requires_grad_() for t in shaped(1024)]
    out, stats = attention(*leaves, alpha=0.5, return_stats=True, backend=backend)
    assert stats.tile_sparsity > 0.5
    grad = torch.randn_like(out)

    def results(query, key, value):
        """The output and all gradients, as if no tile were skipped."""
        given = [t.detach().requires_grad_() for t in (query, key, value)]
        dense = unfused(*given, None, 0.5)
        return torch.stack([dense.detach(), *torch.autograd.grad(dense, given, grad.to(dense.dtype))])

    near(torch.stack([out.detach(), *torch.autograd.grad(out, leaves, grad)]), results, *leaves)


@every_backend
def test_packed_statistics_are_those_of_each_sequence(backend):
    query, key, value = (t[0].transpose(0, 1) for t in shaped(400))
    ends = torch.tensor([0, 130, 400], dtype=torch.int32)
    _, packed = attention_varlen(query, key, value, ends, ends, 270, 270, alpha=0.5, return_stats=True, backend=backend)
    live = left = 0.0
    for start, stop in ((0, 130), (130, 400)):
        alone = [t[start:stop].transpose(0, 1).unsqueeze(0) for t in (query, key, value)]
        _, stats = attention(*alone, alpha=0.5, return_stats=True, backend=backend)
        assert torch.equal(stats.support_size[0].T, packed.support_size[start:stop])
        assert (stats.tau[0].T - packed.tau[start:stop]).abs().max() < 1e-4
        tiles = math.ceil((stop - start) / 64) ** 2
        live, left = live + (1 - stats.tile_sparsity.item()) * tiles, left + tiles
    assert packed.tile_sparsity.item() == pytest.approx(1 - live / left, abs=1e-5)


@every_backend
def test_tau_and_support_size_are_those_of_the_weights(backend):
    query, key, _ = tensors(70, 90, batch=1)
    eye = torch.eye(90, dtype=torch.float64).expand(1, 2, 90, 90)
    weights, stats = attention(query, key, eye, alpha=0.5, return_stats=True, backend=backend)
    assert torch.equal(stats.support_size.long(), (weights > 0).sum(-1))

    def from_tau(query, key, tau):
        return (0.5 * (query @ key.mT / math.sqrt(8) - tau.unsqueeze(3))).clamp_min(0).square()

    near(weights, from_tau, query, key, stats.tau)


def test_live_bits_survive_packing_and_unpacking():
    tiles = torch.rand(3, 2, 70) > 0.5
    tiles[0, 0, 31] = True  # the sign bit
    words = packed_bits(tiles)
    assert words.dtype == torch.int32
    assert torch.equal(unpacked_bits(words)[..., :70], tiles)


@pytest.mark.parametrize("backend", ["cpu", "numba", "reference"])
@pytest.mark.parametrize("kind", ["padding", "sink", "packed"])
def test_blocks_without_a_weight_pass_no_gradient_on(backend, kind):
    """One key head, so that columns are left out: here all of them."""
    x = torch.randn(1, 1, 700, 8, requires_grad=True)
    alpha, sink = torch.full((1,), 0.5, requires_grad=True), torch.full((1,), 500.0, requires_grad=True)
    if kind == "padding":
        seen = torch.arange(700) < 0
        out = attention(x, x, x, seen, alpha=alpha, sink=sink, backend=backend)
    elif kind == "sink":
        out = attention(x, x, x, alpha=alpha, sink=sink, is_causal=True, backend=backend)
    else:
        packed, ends = x[0].transpose(0, 1), torch.tensor([0, 300, 700], dtype=torch.int32)
        out = attention_varlen(packed, packed, packed, ends, ends, 400, 400, alpha=alpha, sink=sink, backend=backend)
    assert not out.any()
    for grad in torch.autograd.grad(out.sum(), (x, alpha, sink)):
        assert torch.equal(grad, torch.zeros_like(grad))


@every_backend
@pytest.mark.parametrize("shape", [(0, 2, 5, 5), (2, 0, 5, 5), (2, 2, 0, 5), (2, 2, 5, 0)])
def test_empty_tensors(backend, shape):
    batch, heads, length, keys = shape
    query, key, value = tensors(length, keys, batch=batch, heads=heads, grad=True)
    out, stats = attention(query, key, value, return_stats=True, backend=backend)
    assert out.shape == query.shape
    assert (out == 0).all()
    assert stats.tile_sparsity.shape == (batch, heads)
    out.sum().backward()
    assert (query.grad == 0).all()


def test_a_bad_alpha_of_one_head_spoils_that_head_alone():
    query, key, value = tensors(70, 70)
    call = AttentionCall(scale=0.3, e=torch.tensor([0.5, 1.5], dtype=torch.float64))
    for backend in BACKENDS:
        out = FORWARD(query, key, value, False, False, call, backend)[0]
        assert out[:, 1].isnan().all()
        assert out[:, 0].isfinite().all()


# explain


def test_explain_names_what_the_call_needs_and_who_can_run_it():
    x = torch.randn(1, 2, 100, 64, requires_grad=True)
    state = torch.get_rng_state()
    explanation = diffmax.explain(attention, x, x, x[..., :32], dropout_p=0.1, is_causal=True, sink=torch.zeros(2), softcap=3.0)
    forward, backward = (call[0] for call in explanation.calls)
    assert (forward.operator, backward.operator) == ("attention", "attention_backward")
    assert forward.features == backward.features == {"causal", "dropout", "sink", "softcap", "value_dim"}
    assert (forward.head_dim, forward.value_dim) == (64, 32)
    assert explanation.chosen == "numba"
    assert torch.equal(torch.get_rng_state(), state)


def test_explain_gives_the_reasons_against_a_backend():
    x = torch.zeros(1, 2, 4, 64, device="meta")
    mask, slopes = torch.zeros(4, 4, device="meta"), torch.ones(2, device="meta")
    explanation = diffmax.explain("attention", x, x, x, mask, alibi_slopes=slopes, return_stats=True, alpha=0.5)
    assert explanation.chosen == "reference"
    assert "attention of float32 on meta, head size 64, needs alibi, attention_stats, bias: reference" in repr(explanation)
    assert "cpu: serves cpu, not meta" in repr(explanation)


def test_explain_of_packed_sequences_checks_them():
    x = torch.zeros(6, 4, 8)
    explanation = diffmax.explain(attention_varlen, x, x, x, ENDS, ENDS, 4, 4, window_size=(3, 0), backend="reference")
    (spec, chosen, _, decided_by), *_ = explanation.calls
    assert (spec.features, chosen, decided_by) == ({"varlen", "window", "causal"}, "reference", "the backend argument")
    with pytest.raises(ValueError, match="max_seqlen_q must be at least"):
        diffmax.explain(attention_varlen, x, x, x, ENDS, ENDS, 3, 4)
    with pytest.raises(ValueError, match=r"explain: no operator 'softmax', known: .*attention, attention_varlen"):
        diffmax.explain("softmax", x)


# what is refused

X = torch.zeros(2, 4, 6, 8)
ENDS = torch.tensor([0, 2, 6], dtype=torch.int32)


@pytest.mark.parametrize(
    ("error", "words", "arguments"),
    [
        (TypeError, "query must be a torch.Tensor, got list", {"query": [1.0]}),
        (TypeError, "query must be float16, bfloat16, float32 or float64, got int64", {"query": X.long()}),
        (TypeError, "must have one dtype", {"key": X.double()}),
        (ValueError, "must be on one device", {"key": X.to("meta")}),
        (ValueError, r"at least 2 dimensions \(L, D\)", {"query": X[0, 0, 0]}),
        (ValueError, "key and value must have the same length, got 6 and 5", {"value": X[:, :, :5]}),
        (ValueError, "key and value must have the same number of heads, got 4 and 2", {"value": X[:, :2]}),
        (ValueError, "must have one batch size", {"query": X[:1].expand(3, -1, -1, -1)}),
        (ValueError, "query and key must have the same head size, got 8 and 7", {"key": X[..., :7]}),
        (ValueError, "pass enable_gqa=True", {"key": X[:, :2], "value": X[:, :2]}),
        (ValueError, "must be a multiple", {"key": X[:, :3], "value": X[:, :3], "enable_gqa": True}),
        (ValueError, "alpha must lie strictly between 0 and 1, got 1.5", {"alpha": 1.5}),
        (ValueError, "alpha must lie between 0 and 1, got 2", {"alpha": torch.tensor(2.0)}),
        (ValueError, r"of shape \(\) or \(4,\), got shape \(3,\)", {"alpha": torch.full((3,), 0.5)}),
        (ValueError, r"pass alpha.view\(4\)", {"alpha": torch.full((4, 1, 1), 0.5)}),
        (TypeError, "alpha must be of a floating dtype", {"alpha": torch.ones(4, dtype=torch.int64)}),
        (ValueError, "alpha and query must be on one device", {"alpha": torch.full((4,), 0.5, device="meta")}),
        (TypeError, "attn_mask must be a boolean or floating tensor or a CausalBias, got list", {"attn_mask": [True]}),
        (
            TypeError,
            "attn_mask must be boolean, or floating and of query's.*got float16",
            {"attn_mask": torch.zeros(6, 6).half()},
        ),
        (TypeError, "attn_mask must be boolean, or floating.*got int64", {"attn_mask": torch.zeros(6, 6).long()}),
        (ValueError, r"attn_mask must broadcast to \(B, H, L, S\), got shape \(5,\)", {"attn_mask": torch.ones(5, dtype=bool)}),
        (ValueError, "attn_mask and query must be on one device", {"attn_mask": torch.ones(6, 6, dtype=bool, device="meta")}),
        (ValueError, "exclude each other", {"attn_mask": causal_upper_left(6, 6), "is_causal": True}),
        (ValueError, r"attn_mask must broadcast to \(B, H, L, S\), got shape \(7, 6\)", {"attn_mask": torch.zeros(7, 6)}),
        (ValueError, "dropout_p must lie between 0 and 1, got 1.1", {"dropout_p": 1.1}),
        (TypeError, "dropout_p must be a float, got True", {"dropout_p": True}),
        (TypeError, "softcap must be a float, got '5'", {"softcap": "5"}),
        (ValueError, "softcap must be positive and finite, or 0 for none, got -1.0", {"softcap": -1.0}),
        (TypeError, "alibi_slopes must be a floating tensor, got float", {"alibi_slopes": 0.5}),
        (ValueError, r"one number per head, shape \(4,\) or \(2, 4\), got \(2,\)", {"alibi_slopes": torch.ones(2)}),
        (ValueError, "alibi_slopes and query must be on one device", {"alibi_slopes": torch.ones(4, device="meta")}),
        (
            ValueError,
            "alibi_slopes must not require grad.*\npass alibi_slopes.detach",
            {"alibi_slopes": torch.ones(4).requires_grad_()},
        ),
        (TypeError, "sink must be a floating tensor, got int64", {"sink": torch.ones(4, dtype=torch.int64)}),
        (ValueError, r"sink must have one number per head, shape \(4,\), got \(\)", {"sink": torch.tensor(0.0)}),
        (ValueError, r"pass sink.view\(4\)", {"sink": torch.ones(1, 4)}),
        (ValueError, "sink and query must be on one device", {"sink": torch.ones(4, device="meta")}),
        (TypeError, "scale must be a float, got '2'", {"scale": "2"}),
        (
            TypeError,
            r"got 'match' of type str\nfor the matched scale, pass scale=diffmax.matched_scale\(alpha\)",
            {"scale": "match"},
        ),
        (ValueError, "scale must be finite, got nan", {"scale": float("nan")}),
        (ValueError, "from 0 to 2.*, got .9223372036854775808, 0.", {"window_size": (2**63, 0)}),
        (TypeError, r"alpha must be a float or a tensor, got <function(.|\n)*\npass what it returns", {"alpha": lambda: 0.5}),
        (TypeError, r"alpha must be a float or a tensor, got \[0.5, 0.5\] .*\npass torch.tensor", {"alpha": [0.5, 0.5]}),
        (ValueError, r"got shape \(3,\)\na tensor holds one alpha, or one per query head", {"alpha": torch.full((3,), 0.5)}),
        (ValueError, "got 0.0\nthe limit alpha -> 0 is sparsemax", {"alpha": 0}),
        (TypeError, "backend must be a name from .*got 3 of type int", {"backend": 3}),
        (
            ValueError,
            "contradicts attn_mask, a causal_upper_left",
            {"attn_mask": causal_upper_left(6, 6), "causal_alignment": "lower_right"},
        ),
        (ValueError, "causal_alignment must be one of upper_left, lower_right, got 'left'", {"causal_alignment": "left"}),
        (TypeError, r"pair of ints \(left, right\), got 5\nto see the last 5 keys", {"window_size": 5}),
        (ValueError, "window_size must be from 0 to 2.*or -1 for no bound", {"window_size": (-2, 0)}),
        (diffmax.NoBackendError, "no backend is named 'acme'", {"backend": "acme"}),
    ],
)
def test_says_what_is_wrong(error, words, arguments):
    with pytest.raises(error, match=words):
        attention(**{"query": X, "key": X, "value": X, **arguments})


@pytest.mark.parametrize(
    ("error", "words", "arguments"),
    [
        (ValueError, r"must have 3 dimensions \(T, H, D\)", {"query": X}),
        (TypeError, "cu_seqlens_q must be an int32 tensor of one dimension, got list", {"cu_seqlens_q": [0, 6]}),
        (ValueError, "must have an entry more than there are sequences", {"cu_seqlens_k": ENDS[:1]}),
        (ValueError, "cu_seqlens_k and query must be on one device", {"cu_seqlens_k": ENDS.to("meta")}),
        (ValueError, r"must ascend from 0 to the number of tokens, 6, got \[0, 4, 2, 6\]", {"cu_seqlens_q": [0, 4, 2, 6]}),
        (ValueError, r"must ascend .*got \[0, 1, 2, 3, 4, 5, ..., 5\]", {"cu_seqlens_q": [0, 1, 2, 3, 4, 5, 5, 5, 5]}),
        (ValueError, "max_seqlen_q must be at least the longest length, 4, got 3", {"max_seqlen_q": 3}),
        (TypeError, "max_seqlen_k must be an int, got 4.0", {"max_seqlen_k": 4.0}),
        (ValueError, "max_seqlen_k must not be negative", {"max_seqlen_k": -1}),
        (ValueError, "dropout_p must lie between 0 and 1, got -0.1", {"dropout_p": -0.1}),
        (ValueError, r"one number per head, shape \(4,\) or \(2, 4\), got \(3, 4\)", {"alibi_slopes": torch.ones(3, 4)}),
        (ValueError, "must count the same sequences, got 2 and 1", {"cu_seqlens_k": torch.tensor([0, 6]), "max_seqlen_k": 6}),
    ],
)
def test_varlen_says_what_is_wrong(error, words, arguments):
    ends = arguments.get("cu_seqlens_q")
    if isinstance(ends, list) and len(ends) > 2:
        arguments = arguments | {"cu_seqlens_q": torch.tensor(ends)}
    x = X[0].transpose(0, 1)
    packing = {"cu_seqlens_q": ENDS, "cu_seqlens_k": ENDS, "max_seqlen_q": 4, "max_seqlen_k": 4}
    with pytest.raises(error, match=words):
        attention_varlen(**{"query": x, "key": x, "value": x, **packing, **arguments})


@pytest.mark.parametrize("wrong", ["yes", None, 1, torch.tensor(True)])
def test_causality_and_grouped_heads_are_true_or_false(wrong):
    x = torch.randn(1, 1, 3, 4)
    with pytest.raises(TypeError, match=": is_causal must be True or False, got"):
        diffmax.attention(x, x, x, is_causal=wrong)
    with pytest.raises(TypeError, match=r"diffmax\.attention: enable_gqa must be True or False, got"):
        diffmax.attention(x, x, x, enable_gqa=wrong)
    tokens, ends = x[0].transpose(0, 1), torch.tensor([0, 3], dtype=torch.int32)
    with pytest.raises(TypeError, match=r"diffmax\.attention_varlen: enable_gqa must be True or False, got"):
        diffmax.attention_varlen(tokens, tokens, tokens, ends, ends, 3, 3, enable_gqa=wrong)
    with pytest.raises(TypeError, match=": causal must be True or False, got"):
        diffmax.attention_with_kvcache(x, x, x, causal=wrong)
