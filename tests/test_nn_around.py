"""What diffmax.nn puts around the operator: each module against the identity that defines it."""

import copy
import itertools
import math

import pytest
import torch
from entmax import entmax_bisect
from torch import nn
from torch.nn.attention.bias import causal_lower_right, causal_upper_left
from torch.utils.checkpoint import checkpoint

from diffmax import DiffmaxBisectModule, HillMap, attention, diffmax_bisect
from diffmax.nn import AdaptiveLengthScale, AffineScale, ASEntmax, DiffmaxAttention, Elastic, HeadGate, LengthScale, Sink

B, H, L, S, D, E = 2, 4, 5, 7, 8, 12
NORMALIZERS = {
    "fixed": lambda: DiffmaxBisectModule(0.5),
    "learned": lambda: DiffmaxBisectModule(torch.full((H, 1, 1), 0.7), alpha_map=HillMap(0.6)),
    "softmax": lambda: lambda x: x.softmax(-1),
}
close = torch.testing.assert_close


def scores(scale=2.0):
    return torch.randn(B, H, L, S, dtype=torch.float64) * scale


def filled(module):
    """The module in float64, with parameters that are not where they start."""
    module = module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) / 2)
    return module


def check_gradients(module, x):
    """Every parameter of the module has a true gradient."""
    names = [name for name, _ in module.named_parameters()]

    def run(*values):
        return torch.func.functional_call(module, dict(zip(names, values, strict=True)), (x,))

    values = tuple(p.detach().clone().requires_grad_() for p in module.parameters())
    assert torch.autograd.gradcheck(run, values)


@pytest.mark.parametrize("sink", [-1.0, 0.0, 0.7])
def test_a_sink_takes_its_own_power_of_the_distance_to_the_threshold(sink):
    """Keys and slot share one tau: p = [(1 - alpha) (x - tau)]^(1 / (1 - alpha)) for both, and they sum to 1 (Eq. 1)."""
    module = Sink(DiffmaxBisectModule(0.5), H).double()
    nn.init.constant_(module.sink, sink)
    x = scores()
    weights = module(x)
    tau = (x - weights.sqrt() / 0.5).masked_fill(weights == 0, torch.nan).nanmean(-1)
    slot = (0.5 * (sink - tau)).clamp_min(0).square()
    close(weights.sum(-1) + torch.nan_to_num(slot), torch.ones(B, H, L, dtype=torch.float64))
    assert (slot > 0).any()


def test_a_sink_that_is_far_below_changes_nothing_and_far_above_takes_all():
    x = scores()
    module = Sink(DiffmaxBisectModule(0.5), H).double()
    nn.init.constant_(module.sink, float(x.min()) - 3)
    close(module(x), diffmax_bisect(x, 0.5))
    nn.init.constant_(module.sink, float(x.max()) + 2)  # 1 / (1 - alpha)
    assert (module(x) == 0).all()


def test_the_null_slot_of_softmax_is_softmax_one():
    x = scores()
    close(Sink(lambda x: x.softmax(-1))(x), x.exp() / (1 + x.exp().sum(-1, keepdim=True)))
    assert not list(Sink(DiffmaxBisectModule(0.5)).parameters())


@pytest.mark.parametrize("made", NORMALIZERS.values(), ids=NORMALIZERS)
def test_sinks_compose_with_any_normalizer_and_learn(made):
    module = filled(Sink(made(), H))
    x = scores().requires_grad_()
    close(module(x), (module.normalize(torch.cat([x, module.sink.view(-1, 1, 1).expand(B, H, L, 1)], -1)))[..., :-1])
    check_gradients(module, scores())


@pytest.mark.parametrize("causal", [False, "upper_left", "lower_right"])
def test_a_length_scale_is_a_temperature_for_each_row_of_any_attention(causal):
    module = filled(LengthScale(H))
    query, key, value = (torch.randn(B, H, n, D, dtype=torch.float64) for n in (L, S, S))
    how = {"is_causal": bool(causal), "causal_alignment": causal or "upper_left"}
    out = attention(module(query, S, **how), key, value, alpha=0.5, **how)
    seen = [S if not causal else i + 1 + (S - L if causal == "lower_right" else 0) for i in range(L)]
    factor = 1 + torch.exp(-module.log_decay.exp()).view(-1, 1, 1) * torch.tensor(seen, dtype=torch.float64).log().view(-1, 1)
    hidden = torch.arange(S) >= torch.tensor(seen).unsqueeze(1)
    expected = diffmax_bisect((query @ key.mT / math.sqrt(D) * factor).masked_fill(hidden, -torch.inf), 0.5) @ value
    close(out, expected)


def seen_by(how, mask):
    """Which keys each query sees, written out."""
    shift = S - L if how.get("causal_alignment") == "lower_right" else 0
    distance = torch.arange(S) - torch.arange(L).unsqueeze(1) - shift
    left, right = how.get("window_size", (-1, -1))
    seen = torch.ones(L, S, dtype=torch.bool) if mask is None else mask if mask.dtype == torch.bool else mask > -torch.inf
    seen = seen & (distance >= -left) if left >= 0 else seen
    seen = seen & (distance <= right) if right >= 0 else seen
    return seen & (distance <= 0) if how.get("is_causal") else seen


@pytest.mark.parametrize("mask", ["none", "padding", "boolean", "floating", "one row"])
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"window_size": (1, 2)},
        {"window_size": (0, -1), "causal_alignment": "lower_right"},
        {"is_causal": True, "window_size": (2, 1)},
        {"is_causal": True, "causal_alignment": "lower_right"},
    ],
    ids=str,
)
def test_a_length_scale_counts_the_keys_that_a_query_sees(how, mask):
    """Windows and masks were not counted: padding changed the result of tokens that do not see it."""
    given = {
        "none": None,
        "padding": torch.rand(B, 1, 1, S) < 0.7,
        "boolean": torch.rand(B, H, L, S) < 0.7,
        "floating": torch.randn(L, S).masked_fill(torch.rand(L, S) < 0.3, -torch.inf),
        "one row": torch.rand(S) < 0.7,
    }[mask]
    module, query = filled(LengthScale(H)), torch.randn(B, H, L, D, dtype=torch.float64)
    n = seen_by(how, given).sum(-1, keepdim=True).clamp_min(1).double()
    factor = 1 + torch.exp(-module.log_decay.exp()).view(-1, 1, 1) * n.log()
    close(module(query, S, **how, attn_mask=given), query * factor)


@pytest.mark.parametrize("make", [causal_upper_left, causal_lower_right])
def test_a_length_scale_reads_torchs_causal_biases(make):
    module, query = filled(LengthScale(H)), torch.randn(B, H, L, D, dtype=torch.float64)
    alignment = make.__name__.removeprefix("causal_")
    expected = module(query, S, is_causal=True, causal_alignment=alignment)
    assert torch.equal(module(query, S, attn_mask=make(L, S)), expected)


def test_a_length_scale_of_softmax_raises_n_to_the_scores():
    module = LengthScale(1, start=-50.0).double()  # the factor is 1 + ln n
    x, one = torch.randn(1, 1, 1, S, dtype=torch.float64), torch.ones(1, 1, 1, 1, dtype=torch.float64)
    powers = S**x * x.exp()
    close((module(one, S) * x).softmax(-1), powers / powers.sum())
    close(LengthScale(1).double()(one, 1), one)


def adaptive_factor(module, x, seen):
    """delta + beta (ln(n + 1))^gamma, head by head and query by query."""
    beta, gamma = (x @ module.project.weight.detach().T).unflatten(-1, (2, -1)).unbind(-2)  # (B, L, H) each
    factor = torch.empty(*x.shape[:2], beta.shape[-1], dtype=x.dtype)
    for index in itertools.product(*map(range, factor.shape)):
        n = float(seen[index[1]])
        softplus = math.log1p(math.exp(beta[index]))
        factor[index] = module.delta + softplus * math.log(n + 1) ** (module.reach * math.tanh(gamma[index]))
    return factor.transpose(1, 2).unsqueeze(-1)


@pytest.mark.parametrize("causal", [False, "upper_left", "lower_right"])
def test_the_scale_of_asentmax_is_a_temperature_for_each_query_of_any_attention(causal):
    module = filled(AdaptiveLengthScale(E, H, delta=0.5, reach=1.5))
    query, key, value = (torch.randn(B, H, n, D, dtype=torch.float64) for n in (L, S, S))
    x, how = torch.randn(B, L, E, dtype=torch.float64), {"is_causal": bool(causal), "causal_alignment": causal or "upper_left"}
    out = attention(module(query, x, S, **how), key, value, alpha=0.5, **how)
    seen = seen_by(how, None).sum(-1)
    scores = query @ key.mT / math.sqrt(D) * adaptive_factor(module, x, seen)
    close(out, diffmax_bisect(scores.masked_fill(~seen_by(how, None), -torch.inf), 0.5) @ value)


def test_asentmax_of_rows_is_its_fused_attention():
    """Also its gradients: a masked score times the factor made that of the factor NaN."""
    rows, x = filled(ASEntmax(E, H)), torch.randn(B, S, E, dtype=torch.float64)
    query, key, value = (torch.randn(B, H, S, D, dtype=torch.float64, requires_grad=True) for _ in range(3))
    fused = attention(rows.scale(query, x, S, is_causal=True), key, value, is_causal=True, alpha=0.5)
    hidden = torch.ones(S, S).triu(1).bool()
    composed = rows((query @ key.mT / math.sqrt(D)).masked_fill(hidden, -torch.inf), x) @ value
    close(composed, fused)
    wanted = (query, key, rows.scale.project.weight)
    upstream = torch.randn_like(fused)
    for got, expected in zip(*(torch.autograd.grad(out, wanted, upstream) for out in (composed, fused)), strict=True):
        assert got.abs().max() > 0
        close(got, expected)


def test_asentmax_is_entmax_of_scaled_scores():
    module, x, scores_ = filled(ASEntmax(E, H)), torch.randn(B, L, E, dtype=torch.float64), scores()
    expected = entmax_bisect(scores_ * adaptive_factor(module.scale, x, torch.full((L,), S)), 1.5, n_iter=100)
    close(module(scores_, x), expected)
    masked = torch.full((1, H, 1, S), -torch.inf, dtype=torch.float64)
    assert (module(masked, x[:1, :1]) == 0).all()


def test_asentmax_of_large_scores_in_float16_is_finite():
    """Scores times the factor were infinite, and the weights NaN."""
    module = ASEntmax(E, H).half()
    large = torch.linspace(30000, 60000, S).half().expand(B, H, L, S)
    weights = module(large, torch.randn(B, L, E).half())
    assert weights.dtype == torch.float16
    assert (weights.sum(-1) == 1).all()
    with pytest.raises(TypeError, match=r"ASEntmax: scores must have a floating-point dtype, got torch\.int64"):
        module(torch.ones(B, H, L, S, dtype=torch.long), torch.randn(B, L, E).half())


def test_asentmax_keeps_its_constraints():
    """beta > 0 and gamma in (-reach, reach), whatever the token: the factor lies between those of the two ends."""
    module, x = filled(AdaptiveLengthScale(E, H, delta=0.25, reach=0.5)), 100 * torch.randn(B, L, E, dtype=torch.float64)
    n = torch.tensor(1000.0)
    beta = nn.functional.softplus((x @ module.project.weight[:H].T).mT)
    factor, ends = module.factor(x, n), [0.25 + beta * math.log(1001) ** power for power in (-0.5, 0.5)]
    assert (factor >= 0.25).all()
    assert (factor >= ends[0] * (1 - 1e-12)).all()
    assert (factor <= ends[1] * (1 + 1e-12)).all()
    with torch.no_grad():
        module.project.weight.zero_()
    close(module.factor(x, n), torch.full((B, H, L), 0.25 + math.log(2), dtype=torch.float64))


def test_gradients_of_the_scale_of_asentmax():
    module, x = filled(AdaptiveLengthScale(E, H)), torch.randn(B, L, E, dtype=torch.float64, requires_grad=True)
    query = torch.randn(B, H, L, D, dtype=torch.float64, requires_grad=True)

    def run(query, x, weight):
        return torch.func.functional_call(module, {"project.weight": weight}, (query, x, S))

    assert torch.autograd.gradcheck(run, (query, x, module.project.weight.detach().clone().requires_grad_()))


def test_attention_with_the_scale_of_asentmax_is_that_scale_before_attention():
    module = filled(DiffmaxAttention(E, H, alpha=0.5, length_scale="adaptive"))
    x = torch.randn(B, L, E, dtype=torch.float64)
    q, k, v = (p(x).unflatten(-1, (H, -1)).transpose(1, 2) for p in (module.q_proj, module.k_proj, module.v_proj))
    out = attention(module.length_scale(q, x, L, is_causal=True), k, v, alpha=0.5, is_causal=True)
    close(module(x, is_causal=True), module.out_proj(out.transpose(1, 2).flatten(2)))
    padding = torch.zeros(B, L, dtype=torch.bool)
    padding[:, -2:] = True
    close(module(x, x, x, key_padding_mask=padding)[0][:, : L - 2], module(x[:, : L - 2]))


@pytest.mark.parametrize("made", NORMALIZERS.values(), ids=NORMALIZERS)
def test_a_head_gate_scales_the_rows_of_the_weights(made):
    normalize, module = made(), filled(HeadGate(E, H))
    x, value, p = torch.randn(B, L, E).double(), torch.randn(B, H, S, D).double(), None
    p = normalize(scores())
    gate = 2 * torch.sigmoid(module.project(x)).mT.unsqueeze(3)
    close(module(p @ value, x), (gate * p) @ value)
    out = torch.randn(B, H, L, D)
    assert torch.equal(HeadGate(E, H)(out, torch.randn(B, L, E)), out)


@pytest.mark.parametrize("how", ["full", "causal", "masked"])
@pytest.mark.parametrize("made", NORMALIZERS.values(), ids=NORMALIZERS)
def test_affine_scaled_attention_is_an_affine_map_of_the_weights(made, how):
    normalize, module = made(), filled(AffineScale(E, H)).eval()
    module.average.uniform_()
    x, value = torch.randn(B, L, E).double(), torch.randn(B, H // 2, S, D).double()
    seen = {
        "full": torch.ones(1, 1, L, S, dtype=torch.bool),
        "causal": torch.ones(1, 1, L, S, dtype=torch.bool).tril(),
        "masked": torch.rand(B, 1, L, S) < 0.6,
    }[how]
    seen[..., 0] = True
    p = normalize(scores().masked_fill(~seen, -torch.inf))
    wide = value.repeat_interleave(2, 1)
    a = (0.1 * module.project(x) + 0.5).clamp(0, 1).mT.unsqueeze(3)
    average = module.average.view(-1, 1, 1)
    uniform = seen / seen.sum(-1, keepdim=True)
    weights = a * p + (average - a) * uniform
    close(weights.sum(-1), average.squeeze(-1).expand(B, H, L))
    given = {"is_causal": True} if how == "causal" else {"attn_mask": seen} if how == "masked" else {}
    close(module(p @ wide, value, x, **given), weights @ wide)
    module.offset = False
    close(module(p @ wide, value, x), a * (p @ wide))


@pytest.mark.parametrize("how", ["full", "causal", "masked"])
def test_affine_scaled_attention_averages_large_values_of_float16(how):
    """Their sum is beyond float16: the mean was inf."""
    module = AffineScale(E, H).eval()
    x, value = torch.randn(1, 9, E), torch.full((1, H, 9, D), 3e4)
    given = {"is_causal": True} if how == "causal" else {"attn_mask": torch.ones(9, 9).bool()} if how == "masked" else {}
    expected = module(torch.zeros(1, H, 9, D), value, x, **given)
    got = module.half()(torch.zeros(1, H, 9, D).half(), value.half(), x.half(), **given)
    assert (got - expected).abs().max() <= 2e-3 * expected.abs().max()


def test_affine_scaled_attention_refuses_masks_of_numbers():
    """They were used as weights of the values."""
    out = torch.randn(B, H, L, D)
    with pytest.raises(TypeError, match=r"attn_mask must be boolean, .* got torch.float32\nof a mask .* != -torch.inf"):
        AffineScale(E, H)(out, out, torch.randn(B, L, E), torch.zeros(L, L))


def test_affine_scaled_attention_averages_while_it_trains():
    module = filled(AffineScale(E, H, momentum=0.9))
    x, out = torch.randn(B, L, E).double(), torch.randn(B, H, L, D).double()
    expected = torch.zeros(H, dtype=torch.float64)
    for _ in range(3):
        module(out, out, x)
        expected = 0.9 * expected + 0.1 * (0.1 * module.project(x) + 0.5).clamp(0, 1).mean((0, 1))
    close(module.average, expected)
    module.eval()(out, out, x)
    close(module.average, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_average_of_affine_scaled_attention_moves_in_half_precision_as_in_float32(dtype):
    half = filled(AffineScale(E, H, momentum=0.999)).float().to(dtype)
    module = copy.deepcopy(half).float()
    x, out = torch.randn(B, L, E).to(dtype), torch.randn(B, H, L, D).to(dtype)
    for _ in range(1000):
        half(out, out, x)
        module(out.float(), out.float(), x.float())
    assert half.average.dtype == torch.float32
    torch.testing.assert_close(half.average, module.average, rtol=0.01, atol=0)


def test_the_average_of_affine_scaled_attention_is_not_spoilt_by_a_batch():
    module = filled(AffineScale(E, H)).float()
    x, out = torch.randn(B, L, E), torch.randn(B, H, L, D)
    module(out, out, x)
    before = module.average.clone()
    module(out[:0], out[:0], x[:0])
    module(out, out, torch.full_like(x, torch.nan))
    assert torch.equal(module.average, before)
    module(out, out, x)
    assert module.average.isfinite().all()
    assert not torch.equal(module.average, before)


@pytest.mark.parametrize("reentrant", [False, True])
def test_affine_scaled_attention_under_checkpointing(reentrant):
    plain = filled(AffineScale(E, H)).float()
    again = copy.deepcopy(plain)
    x, out = torch.randn(B, L, E), torch.randn(B, H, L, D)
    values = [torch.randn(B, H, L, D, requires_grad=True) for _ in range(2)]
    for value in values:
        expected = torch.autograd.grad(plain(out, value, x).sin().sum(), value)[0]
        recomputed = checkpoint(again, out, value, x, use_reentrant=reentrant)
        recomputed.sin().sum().backward()
        torch.testing.assert_close(value.grad, expected)
    torch.testing.assert_close(again.average, plain.average)


@pytest.mark.parametrize("made", NORMALIZERS.values(), ids=NORMALIZERS)
def test_elastic_keeps_zeros_and_never_a_row_without_weight(made):
    """n relu(p - c / n) = relu(n p - c); the largest of n weights is at least 1 / n, so it stays."""
    x, lower = scores(), torch.ones(L, S, dtype=torch.bool).tril()
    x = x.masked_fill(~lower, -torch.inf)
    normalize = made()
    module, n = filled(Elastic(normalize, H)), torch.arange(1, L + 1).view(-1, 1)
    p, weights = normalize(x), module(x)
    c = module.logit.sigmoid().view(-1, 1, 1)
    close(n * weights, (n * p - c).relu())
    assert (weights[p == 0] == 0).all()
    assert (weights.sum(-1) > 0).all()
    assert (weights == 0).sum() > (p == 0).sum()
    module.renormalize = True
    close(module(x), weights / weights.sum(-1, keepdim=True))
    with torch.no_grad():
        module.logit.fill_(-50)
    close(module(x), p, rtol=1e-12, atol=1e-12)
    check_gradients(Elastic(normalize, H).double(), scores())


@pytest.mark.parametrize("renormalize", [False, True])
def test_an_elastic_row_that_sees_nothing_is_zero_with_zero_gradient(renormalize):
    x = scores()
    x[0, 0, 1] = -torch.inf
    x.requires_grad_()
    weights = Elastic(lambda x: x.softmax(-1), H, renormalize=renormalize).double()(x)
    assert (weights[0, 0, 1] == 0).all()
    weights.square().sum().backward()
    assert x.grad.isfinite().all()
    assert (x.grad[0, 0, 1] == 0).all()


@pytest.mark.parametrize("renormalize", [False, True])
def test_an_elastic_row_that_a_sink_took_is_zero_with_zero_gradient(renormalize):
    """The slot takes all of the weight, there is nothing to divide by: this was NaN."""
    x = torch.tensor([[[[-3.0, -4.0, -5.0], [3.0, 2.0, 1.0]]]], requires_grad=True)
    weights = Elastic(Sink(DiffmaxBisectModule(0.5)), 1, renormalize=renormalize)(x)
    assert (weights[0, 0, 0] == 0).all()
    assert (weights[0, 0, 1] > 0).any()
    weights.square().sum().backward()
    assert x.grad.isfinite().all()
    assert (x.grad[0, 0, 0] == 0).all()


def test_sink_and_elastic_go_together():
    module = filled(Elastic(Sink(DiffmaxBisectModule(0.5), H), H))
    x = scores()
    close(module(x), (module.normalize(x) - module.logit.sigmoid().view(-1, 1, 1) / S).relu())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_half(dtype):
    x, value, tokens = scores().to(dtype), torch.randn(B, H, L, D).to(dtype), torch.randn(B, L, E).to(dtype)
    results = [
        Sink(DiffmaxBisectModule(0.5), H)(x),
        Elastic(DiffmaxBisectModule(0.5), H)(x),
        LengthScale(H)(value, L),
        AdaptiveLengthScale(E, H).to(dtype)(value, tokens, L),
        HeadGate(E, H).to(dtype)(value, tokens),
        AffineScale(E, H).to(dtype)(value, value, tokens, is_causal=True),
    ]
    assert {t.dtype for t in results} == {dtype}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Sink(DiffmaxBisectModule(), 3)(torch.randn(B, H, L, S)), "Sink: scores must .* 3 heads, got"),
        (lambda: Elastic(DiffmaxBisectModule(), 3)(torch.randn(B, H, L, S)), "Elastic: scores must .* 3 heads, got"),
        (lambda: LengthScale(3)(torch.randn(B, H, L, D), S), "LengthScale: query must .* 3 heads, got"),
        (
            lambda: AdaptiveLengthScale(E, 3)(torch.randn(B, H, L, D), torch.randn(B, L, E), S),
            "AdaptiveLengthScale: query must .* 3 heads, got",
        ),
        (
            lambda: AdaptiveLengthScale(E, H)(torch.randn(B, H, L, D), torch.randn(B, L, D), S),
            r"AdaptiveLengthScale: x must have shape \(B, L, 12\), got \(2, 5, 8\)",
        ),
        (
            lambda: AdaptiveLengthScale(E, H)(torch.randn(B, H, L, D), torch.randn(B, L + 1, E), S),
            r"AdaptiveLengthScale: x must hold the token of each query, \(2, 5, embed_dim\), got \(2, 6, 12\)",
        ),
        (lambda: ASEntmax(E, H)(scores(), torch.randn(B + 1, L, E)), "ASEntmax: x must hold the token of each query"),
        (lambda: AdaptiveLengthScale(E, 0), "AdaptiveLengthScale: heads must be at least 1, got 0"),
        (lambda: AdaptiveLengthScale(E, H, delta=-1.0), "AdaptiveLengthScale: delta must be finite and at least 0, got -1.0"),
        (lambda: AdaptiveLengthScale(E, H, reach=0.0), "AdaptiveLengthScale: reach must be finite and more than 0, got 0.0"),
        (lambda: ASEntmax(E, 3)(scores(), torch.randn(B, L, E)), "ASEntmax: scores must .* 3 heads, got"),
        (
            lambda: DiffmaxAttention(E, H, length_scale="longer"),
            "length_scale must be False, True or \"adaptive\", got 'longer'",
        ),
        (lambda: HeadGate(E, 3)(torch.randn(B, H, L, D), torch.randn(B, L, E)), "HeadGate: out must .* 3 heads, got"),
        (lambda: AffineScale(E, 3)(torch.randn(B, H, L, D), 0, 0), "AffineScale: out must .* 3 heads, got"),
        (
            lambda: LengthScale(H)(torch.randn(B, H, L, D), S, window_size=(-2, 0)),
            "LengthScale: window_size must be from 0",
        ),
        (lambda: AffineScale(E, H, momentum=1.0), "momentum must satisfy 0 <= momentum < 1, got 1.0"),
        (lambda: Elastic(DiffmaxBisectModule(), H, start=1.0), "start must lie strictly between 0 and 1, got 1.0"),
        (
            lambda: AffineScale(E, H)(
                torch.randn(B, H, L, D), torch.randn(B, H, S, D), torch.randn(B, L, E), torch.ones(L, S).bool(), True
            ),
            "exclude each other\npass one mask",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_a_key_that_a_mask_hides_by_the_least_number_does_not_count(dtype):
    from diffmax.nn import LengthScale

    scale, query, seen = LengthScale(4, start=0.3), torch.randn(2, 4, 6, 8), torch.rand(2, 1, 6, 8) < 0.6
    wanted = scale(query, 8, attn_mask=seen)
    for hidden in (-torch.inf, torch.finfo(dtype).min):
        added = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, hidden)
        torch.testing.assert_close(scale(query, 8, attn_mask=added), wanted)
        torch.testing.assert_close(scale(query, 8, attn_mask=added.float() if dtype == torch.bfloat16 else added), wanted)


@pytest.mark.parametrize("kind", ["Elastic", "ASEntmax"])
def test_scores_that_the_least_number_hides_are_hidden(kind):
    from diffmax import nn as layers

    torch.manual_seed(0)
    module = layers.Elastic(torch.nn.Softmax(-1), 4) if kind == "Elastic" else layers.ASEntmax(16, 4)
    more = () if kind == "Elastic" else (torch.randn(2, 6, 16),)
    seen, scores = torch.rand(2, 1, 6, 8) < 0.6, torch.randn(2, 4, 6, 8)
    wanted = module(scores.masked_fill(~seen, -torch.inf), *more)
    added = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    torch.testing.assert_close(module(scores + added, *more), wanted)


def test_a_monitor_counts_no_key_that_the_least_number_hides():
    from diffmax.monitor import Monitor
    from diffmax.nn import DiffmaxAttention

    module, x, seen, found = DiffmaxAttention(16, 2, alpha=0.5), torch.randn(1, 6, 16), torch.ones(6, 6).tril().bool(), []
    with Monitor(module, lambda metrics, step: found.append(metrics["zeros_share"])) as monitor:
        for hidden in (-torch.inf, torch.finfo(torch.float32).min):
            module(x, attn_mask=torch.zeros(6, 6).masked_fill(~seen, hidden))
            monitor.step()
    assert found[0] == found[1]


def test_a_mask_of_ints_is_refused_by_name():
    from diffmax.nn import LengthScale

    with pytest.raises(TypeError, match=r"LengthScale: attn_mask must be boolean or floating, got torch.int64"):
        LengthScale(4)(torch.randn(2, 4, 6, 8), 6, attn_mask=torch.ones(2, 1, 6, 6, dtype=torch.int64))
