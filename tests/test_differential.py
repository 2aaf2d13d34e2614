"""diffmax.nn.DiffAttention and DiffAttentionV2: equal to their formulas on both paths, to timm's, and at home in torch."""

import copy
import io
import math
import pickle

import pytest
import torch
from torch import nn

import diffmax
from diffmax import HillMap
from diffmax.nn import DiffAttention, DiffAttentionV2, param_groups
from tests.timm_layers import theirs

B, N, E, H = 2, 9, 24, 3
close = torch.testing.assert_close
per_map = torch.tensor([0.5, 0.9])
per_head = torch.linspace(0.3, 0.9, 2 * H)


def tokens(length=N, **options):
    return torch.randn(B, length, E, **{"dtype": torch.float64, **options})


def made(kind=DiffAttention, **options):
    module = kind(E, H, **options).double()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "norm" in name or "lambda" in name:  # ones and small numbers would hide a mistake
                parameter.add_(0.5 * torch.randn_like(parameter))
            elif name in ("qkv.weight", "q_proj.weight"):
                parameter.mul_(3)  # scores that differ, so that diffmax has zeros
    return module


def maps_by_hand(module, q, k, mask, is_causal):
    """(B, 2 H, N, N), with fully masked rows of 0; q and k have as many heads as there are maps."""
    scores = q @ k.mT / math.sqrt(q.shape[3])
    if mask is not None:
        mask = mask.expand(*(1,) * (4 - mask.ndim), *mask.shape)
        if mask.shape[1] == H:
            mask = torch.stack([mask, mask], 2).flatten(1, 2)
        scores = torch.where(mask, scores, -torch.inf) if mask.dtype == torch.bool else scores + mask
    if is_causal:
        scores = torch.where(torch.ones(N, N, dtype=torch.bool).tril(), scores, -torch.inf)
    empty = scores.amax(3, keepdim=True) == -torch.inf
    if module.weights == "softmax":
        weights = scores.masked_fill(empty, 0.0).softmax(3)
    else:
        alpha = module.current_alpha
        alpha = torch.as_tensor(alpha, dtype=torch.float64).expand(2 * H).view(2 * H, 1, 1)
        weights = diffmax.diffmax_bisect(scores.masked_fill(empty, 0.0), alpha, n_iter=200)
    return weights.masked_fill(empty, 0.0)


def split(t, heads):
    return t.unflatten(2, (heads, -1)).transpose(1, 2)


def by_hand(module, x, mask=None, is_causal=False):
    """The formulas of the first version, head by head."""
    q, k, v = module.qkv(x).chunk(3, 2)
    q, k, v = module.q_norm(split(q, 2 * H)), module.k_norm(split(k, 2 * H)), split(v, H)
    if module.dual_lambda:
        factor = module.lambda_a.exp() - module.lambda_b.exp() + module.lambda_init
    else:
        factor = (module.lambda_q1 @ module.lambda_k1).exp() - (module.lambda_q2 @ module.lambda_k2).exp() + module.lambda_init
    maps, heads = maps_by_hand(module, q, k, mask, is_causal), []
    for h in range(H):
        head = (maps[:, 2 * h] - factor * maps[:, 2 * h + 1]) @ v[:, h]
        head = head / (head.square().mean(2, keepdim=True) + 1e-5).sqrt() * module.sub_norm.weight
        heads.append(head * (1 - module.lambda_init))
    return module.proj(module.norm(torch.cat(heads, 2)))


def second_by_hand(module, x, mask=None, is_causal=True):
    """The formulas of the second version."""
    q, k, v = split(module.q_proj(x), 2 * H), split(module.k_proj(x), 3), split(module.v_proj(x), 3)
    maps = maps_by_hand(module, q, k.repeat_interleave(2, 1), mask, is_causal)
    gates = (x @ module.lambda_proj.weight.T).sigmoid()
    heads = [(maps[:, 2 * h] - gates[:, :, h, None] * maps[:, 2 * h + 1]) @ v[:, h] for h in range(H)]
    return module.out_proj(torch.cat(heads, 2))


OPTIONS = {
    "plain": {},
    "biases, norms": {"qkv_bias": True, "qk_norm": True, "scale_norm": True, "proj_bias": False, "depth": 4},
    "two numbers": {"dual_lambda": True, "depth": 1},
    "layer norm": {"qk_norm": True, "norm_layer": nn.LayerNorm},
    "diffmax": {"weights": "diffmax"},
    "alpha": {"weights": "diffmax", "alpha": 0.5, "qk_norm": True, "backend": "reference"},
    "alpha of each map": {"weights": "diffmax", "alpha": per_map},
    "alpha of each head": {"weights": "diffmax", "alpha": per_head, "depth": 2},
    "learned alpha": {"weights": "diffmax", "alpha": per_map, "alpha_map": HillMap(0.9)},
}
KINDS = {"softmax": {}, "diffmax": {"weights": "diffmax", "alpha": per_map}}


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_it_equals_its_formulas(options, fused):
    module, x = made(fused=fused, **options), tokens()
    close(module(x), by_hand(module, x))
    close(module(x, is_causal=True), by_hand(module, x, is_causal=True))


SECOND = {
    "plain": {},
    "grouped": {"num_kv_heads": 1, "bias": True},
    "own head size": {"head_dim": 5, "weights": "diffmax", "alpha": per_head},
    "grouped diffmax": {"num_kv_heads": 1, "weights": "diffmax", "alpha": per_map},
    "learned alpha": {"weights": "diffmax", "alpha_map": HillMap(0.9), "alpha": 0.6},
}


def ungrouped(module):
    """The same function with a key head for each pair."""
    if module.num_kv_heads == H:
        return module
    options = {"weights": module.weights, "alpha": module.current_alpha, "head_dim": module.head_dim}
    whole = made(DiffAttentionV2, **options, bias=module.q_proj.bias is not None)
    state = module.state_dict()
    for name in [name for name in state if name.startswith(("k_proj", "v_proj"))]:
        state[name] = torch.cat([state[name]] * H)
    whole.load_state_dict(state)
    return whole


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("options", SECOND.values(), ids=SECOND)
def test_the_second_version_equals_its_formulas(options, fused):
    module, x = made(DiffAttentionV2, fused=fused, **options), tokens()
    close(module(x), second_by_hand(ungrouped(module), x))
    mask = torch.rand(B, H, N, N) > 0.3
    close(module(x, mask, is_causal=False), second_by_hand(ungrouped(module), x, mask, is_causal=False))
    close(module(x, mask), second_by_hand(ungrouped(module), x, mask))


def masks():
    some = torch.rand(B, 2 * H, N, N) > 0.4
    some[0, :, 2] = False  # a query that sees nothing
    yield "all tokens", some[0, 0]
    yield "a batch", some[:, :1]
    yield "per head", some[:, :H]
    yield "per head of all", some[0, :H]
    yield "per map", some
    yield "padding", some[:, 0, 5][:, None, None]
    yield "one row", some[1, 0, :1]
    yield "one row without an axis of queries", some[1, 0, 0]
    yield "one number", torch.tensor(0.3).double()
    yield "floating", torch.randn(B, 1, N, N).double()
    added = torch.randn(B, H, N, N).double()
    yield "floating per head", added
    yield "floating that masks", added.masked_fill(~some[:, :H], -torch.inf)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_every_mask(options, fused, is_causal):
    module, x = made(fused=fused, **options), tokens()
    for name, mask in masks():
        close(module(x, mask, is_causal), by_hand(module, x, mask, is_causal), msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("kind", [DiffAttention, DiffAttentionV2])
def test_a_query_that_sees_nothing_gives_0_and_finite_gradients(kind, options, fused):
    module, x = made(kind, fused=fused, **options), tokens().requires_grad_()
    seen = torch.ones(N, N, dtype=torch.bool)
    seen[3] = False
    seen[0, 0] = False  # and with is_causal the first
    for mask in (seen, torch.zeros(N, N).masked_fill(~seen, -torch.inf)):
        out = module(x, mask, is_causal=True)
        nothing = torch.zeros(E, dtype=torch.float64) if kind is DiffAttentionV2 else module.proj.bias
        close(out[:, [0, 3]], nothing.expand(B, 2, E))
        for gradient in torch.autograd.grad(out.square().sum(), [x, *module.parameters()]):
            assert gradient.isfinite().all()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_gradients_are_those_of_the_formulas(options):
    module, x = made(**options), tokens().requires_grad_()
    mask = torch.randn(B, H, N, N, dtype=torch.float64, requires_grad=True)
    inputs = [x, mask, *module.parameters()]
    weight = torch.randn(B, N, E, dtype=torch.float64)
    wanted = torch.autograd.grad((by_hand(module, x, mask) * weight).sum(), inputs)
    for fused in (True, False):
        module.fused = fused
        got = torch.autograd.grad((module(x, mask) * weight).sum(), inputs)
        for g, w in zip(got, wanted, strict=True):
            close(g, w, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("options", [{}, {"weights": "diffmax", "alpha": nn.Parameter(per_head.double())}], ids=list(KINDS))
def test_gradcheck_with_lambda_mask_and_alpha(options, fused):
    module = DiffAttention(E, H, fused=fused, **options)
    q, k = torch.randn(2, 1, 2 * H, 4, 2, dtype=torch.float64)
    v, mask = torch.randn(1, H, 4, 3, dtype=torch.float64), torch.randn(4, 4, dtype=torch.float64)
    factor = torch.tensor(0.3, dtype=torch.float64)
    given = [t.requires_grad_() for t in (q, k, v, factor, mask)]
    alpha = [module.alpha] if options else []

    def function(q, k, v, factor, mask, *alpha):
        return module._difference(q, k, v, factor, mask, True, 0.0)

    assert torch.autograd.gradcheck(function, (*given, *alpha))


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("kind", [DiffAttention, DiffAttentionV2])
def test_rows_of_length_1_of_none_and_of_no_batch(kind, options):
    module = made(kind, **options)
    for shape in ((B, 1, E), (B, 0, E), (0, N, E)):
        x = torch.randn(shape, dtype=torch.float64)
        out = module(x)
        assert out.shape == x.shape
        module.fused = False
        close(module(x), out)
        module.fused = True
    wide = torch.randn(N, B, 2 * E, dtype=torch.float64).transpose(0, 1)[:, :, ::2]
    close(module(wide), module(wide.contiguous()))


@pytest.mark.parametrize("kind", [DiffAttention, DiffAttentionV2])
def test_a_nan_does_not_reach_tokens_before_it(kind):
    module, x = made(kind, weights="diffmax"), tokens()
    x[0, 5] = torch.nan
    out = module(x, is_causal=True)
    assert out[0, 5:].isnan().all()
    assert out[0, :5].isfinite().all()
    assert out[1].isfinite().all()


@pytest.mark.parametrize("kind", [DiffAttention, DiffAttentionV2])
def test_dropout_acts_on_each_map_alike_on_both_paths(kind):
    p = {"attn_drop": 0.4} if kind is DiffAttention else {"dropout": 0.4}
    module, x = made(kind, **p, **KINDS["diffmax"]), tokens()
    torch.manual_seed(1)
    fused = module(x)
    torch.manual_seed(1)
    module.fused = False
    close(module(x), fused)
    assert not torch.allclose(module(x), fused)
    module.eval()
    without = module(x)
    close(module(x), without)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_dropout_keeps_the_mean_and_drops_the_maps_independently(options, fused):
    """Equal maps cancel with lambda = 1, unless they are dropped apart."""
    module = DiffAttention(E, H, fused=fused, **{**options, "alpha": 0.5} if options else {})
    q, k = torch.randn(2, 1, H, N, 4).repeat_interleave(2, 2).unbind()
    v, one = torch.randn(1, H, N, 8), torch.ones(())
    drawn = torch.stack([module._difference(q, k, v, one, None, False, 0.3) for _ in range(400)])
    close(module._difference(q, k, v, one, None, False, 0.0), torch.zeros(1, H, N, 8), atol=1e-5, rtol=0)
    assert (drawn.std(0) > 0.1).float().mean() > 0.8
    assert (drawn.mean(0).abs() < 5 * drawn.std(0) / 20 + 1e-4).all()


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_dropout_of_all_weights_leaves_nothing(options, fused):
    """Unfused, all weights were kept."""
    module, x = made(attn_drop=1.0, fused=fused, **options), tokens().requires_grad_()
    out = module(x)
    assert torch.equal(out, module.proj.bias.expand_as(out))
    assert (torch.autograd.grad(out.sum(), x)[0] == 0).all()


THEIRS = {
    "plain": {},
    "biases, norms": {"qkv_bias": True, "qk_norm": True, "scale_norm": True, "depth": 3},
    "no bias": {"proj_bias": False, "depth": 11},
    "two numbers": {"dual_lambda": True, "qkv_bias": True},
    "layer norm": {"qk_norm": True, "scale_norm": True, "norm_layer": nn.LayerNorm},
}


@pytest.mark.parametrize("options", THEIRS.values(), ids=THEIRS)
def test_it_is_timms_with_softmax_weights(options):
    torch.manual_seed(3)
    their = theirs()(E, H, **options)
    torch.manual_seed(3)
    own = DiffAttention(E, H, **options)
    for name, tensor in their.state_dict().items():  # also drawn from the same numbers
        assert torch.equal(own.state_dict()[name], tensor)
    with torch.no_grad():
        for parameter in their.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    own.load_state_dict(their.state_dict())
    again = theirs()(E, H, **options)
    again.load_state_dict(own.state_dict())
    for module in (their, own, again):  # their lambda is float32 all the same
        module.double()
    x, added = tokens(), torch.randn(B, 1, N, N, dtype=torch.float64)
    for mask, is_causal in ((None, False), (None, True), (torch.ones(N, N).tril() > 0, False), (added, False)):
        for fused in (True, False):
            their.fused_attn = again.fused_attn = own.fused = fused
            wanted = their(x, mask, is_causal)
            close(own(x, mask, is_causal), wanted, atol=1e-6, rtol=1e-5)
            assert torch.equal(again(x, mask, is_causal), wanted)
            gradients = (torch.autograd.grad(m(x, mask, is_causal).square().sum(), [*m.parameters()]) for m in (own, their))
            for g, w in zip(*gradients, strict=True):
                assert (g - w).abs().max() <= 1e-5 * w.abs().max() + 1e-8


def test_timms_arguments_in_timms_order():
    given = (E, H, True, True, True, False, 0.1, 0.2, nn.LayerNorm, 5, True, "cpu", torch.bfloat16)
    their, own = theirs()(*given), DiffAttention(*given)
    assert own.lambda_init == their.lambda_init
    for (name, a), (other, b) in zip(sorted(own.named_parameters()), sorted(their.named_parameters()), strict=True):
        assert (name, a.shape, a.dtype) == (other, b.shape, b.dtype)
    their.set_lambda_init(7)
    own.set_lambda_init(7)
    assert own.lambda_init == their.lambda_init


def test_lambda_stays_float32_in_a_half_module_and_is_not_rounded():
    module = DiffAttention(E, H, dtype=torch.bfloat16, weights="diffmax", alpha=per_map, depth=2)
    assert module.lambda_q1.dtype == torch.float32
    assert module.alpha.dtype == torch.float32
    assert module.qkv.weight.dtype == module.sub_norm.weight.dtype == torch.bfloat16
    assert module.current_lambda.dtype == torch.float32
    exact, x = made(weights="diffmax", alpha=per_map, depth=2), tokens(dtype=torch.bfloat16)
    exact.load_state_dict(module.state_dict())
    for fused in (True, False):
        module.fused = fused
        assert (module(x) - exact(x.double())).abs().max() < 0.05


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_second_version_in_half_precision(dtype, options):
    module, x = DiffAttentionV2(E, H, num_kv_heads=1, dtype=dtype, **options), tokens(dtype=dtype)
    exact = copy.deepcopy(module).double()
    for fused in (True, False):
        module.fused = fused
        assert (module(x) - exact(x.double())).abs().max() < 0.02


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("options", [*KINDS.values(), {"qk_norm": True}, {"qk_norm": True, **KINDS["diffmax"]}])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("kind", [DiffAttention, DiffAttentionV2])
def test_autocast(kind, options, fused):
    if kind is DiffAttentionV2 and "qk_norm" in options:
        options = {"num_kv_heads": 1, **{name: given for name, given in options.items() if name != "qk_norm"}}
    module, x = kind(E, H, fused=fused, **options), tokens(dtype=torch.float32)
    wanted, mask = module(x, is_causal=True), torch.zeros(B, H, N, N)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = module(x, mask, is_causal=True)
    assert out.dtype == torch.bfloat16
    assert (out - wanted).abs().max() < 0.05
    out.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == p.dtype for p in module.parameters())


@pytest.mark.parametrize("kind", [DiffAttention, DiffAttentionV2])
@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_copies_and_pickles(kind, options):
    module, x = made(kind, **options), tokens()
    saved = io.BytesIO()
    torch.save(module, saved)
    saved.seek(0)
    copies = copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(saved, weights_only=False)
    for copied in copies:
        assert torch.equal(copied(x), module(x))
        assert repr(copied) == repr(module)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [DiffAttention, DiffAttentionV2])
@pytest.mark.parametrize("options", [*KINDS.values(), {"weights": "diffmax", "alpha_map": HillMap(0.5)}])
def test_compile_in_one_graph(kind, options):
    module, x = kind(E, H, **options), tokens(dtype=torch.float32)
    mask = torch.rand(B, H, N, N) > 0.3
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    close(compiled(x, mask, is_causal=True), module(x, mask, is_causal=True))
    for wanted, got in zip(
        torch.autograd.grad(module(x, mask).square().sum(), [*module.parameters()]),
        torch.autograd.grad(compiled(x, mask).square().sum(), [*module.parameters()]),
        strict=True,
    ):
        close(got, wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:`torch.jit.trace")
@pytest.mark.slow
@pytest.mark.parametrize("kind", [DiffAttention, DiffAttentionV2])
@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("fused", [True, False])
def test_traced_and_exported_at_other_sizes(kind, options, fused):
    """The second version's export fixed the number of tokens with fused=False."""
    module, x, other = kind(E, H, fused=fused, **options), tokens(dtype=torch.float32), torch.randn(3, 13, E)
    masks = torch.rand(B, H, N, N) > 0.3, torch.rand(3, H, 13, 13) > 0.3
    close(torch.jit.trace(module, (x, masks[0]))(other, masks[1]), module(other, masks[1]))
    sizes = {0: torch.export.Dim("batch", min=2), 1: torch.export.Dim("tokens", min=2)}
    exported = torch.export.export(module, (x,), dynamic_shapes=(sizes,))
    close(exported.module()(other), module(other))


def test_a_softmax_checkpoint_keeps_alpha():
    softmax, learned = made(), made(weights="diffmax", alpha=per_map, alpha_map=HillMap(0.9))
    before = learned.log_beta.clone()
    learned.load_state_dict(softmax.state_dict())
    assert torch.equal(learned.log_beta, before)
    assert torch.equal(learned.qkv.weight, softmax.qkv.weight)
    close(learned.current_alpha, per_map.repeat(H).double())


def test_alpha_0_and_1_are_sparsemax_and_softmax():
    softmax = made()
    module = made(weights="diffmax", alpha=torch.ones(()))
    state = {**softmax.state_dict(), "alpha": module.alpha}
    module.load_state_dict(state)
    x = tokens()
    close(module(x), softmax(x))


def test_learned_alpha_has_its_group_and_is_trained():
    module = DiffAttention(E, H, weights="diffmax", alpha=0.6, alpha_map=HillMap(0.9))
    groups = {group["name"]: group["params"] for group in param_groups(module, 1e-3)}
    assert any(p is module.log_beta for p in groups["alpha"])
    for decayed in (False, True):
        groups = {g["name"]: g["params"] for g in param_groups(module, 1e-3, decay_biases_and_norms=decayed)}
        assert all(p is not module.lambda_q1 for p in groups["weights"])
    module(3 * tokens(dtype=torch.float32)).square().sum().backward()
    assert (module.log_beta.grad != 0).any()


@pytest.mark.parametrize("dual", [False, True])
def test_begins_anew(dual):
    module = DiffAttention(E, H, dual_lambda=dual, qk_norm=True, scale_norm=True, weights="diffmax", alpha=per_map)
    module = module.to("meta").to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.fill_(torch.nan)
    module.reset_parameters()
    assert all(tensor.isfinite().all() for tensor in module.state_dict().values())
    close(module.alpha, per_map.repeat(H))
    assert module(torch.randn(1, 4, E)).isfinite().all()
    second = DiffAttentionV2(E, H, device="meta").to_empty(device="cpu")
    second.reset_parameters()
    assert second(torch.randn(1, 4, E)).isfinite().all()


WRONG = {
    "odd head": ({"dim": 60, "num_heads": 4}, ValueError, r"dim must be a multiple of 2 \* num_heads, got 60 and 4\n"),
    "no heads": ({"num_heads": 0}, ValueError, "num_heads must be at least 1, got 0"),
    "half a head": ({"num_heads": 1.5}, TypeError, "num_heads must be an int, got 1.5"),
    "depth": ({"depth": -1}, ValueError, "depth must be 0 or more, got -1"),
    "depth as text": ({"depth": "1"}, TypeError, "depth must be a number, got '1'"),
    "weights": ({"weights": "sparsemax"}, ValueError, 'weights must be "softmax" or "diffmax", got \'sparsemax\''),
    "alpha": ({"alpha": 0.5}, ValueError, "alpha must be None for softmax weights, got 0.5\nor"),
    "backend": ({"backend": "cpu"}, ValueError, "backend must be None for softmax weights, got 'cpu'\nor pass weights="),
    "alpha map": ({"alpha_map": HillMap(0.5)}, ValueError, "alpha_map must be None for softmax weights"),
    "alphas": (
        {"weights": "diffmax", "alpha": torch.ones(3)},
        ValueError,
        r"a tensor alpha must have shape \(\) or \(6,\), got \(3,\)",
    ),
    "fused as text": ({"fused": "no"}, TypeError, "fused must be True or False, got 'no'"),
    "dropout of NaN": ({"attn_drop": math.nan}, ValueError, "attn_drop must satisfy 0 <= attn_drop <= 1, got nan"),
    "dropout as text": ({"proj_drop": "0.1"}, TypeError, "proj_drop must be a number, got '0.1'"),
    "alphas outside": (
        {"weights": "diffmax", "alpha": torch.tensor([0.5, 1.5])},
        ValueError,
        "alpha must lie between 0 and 1, got values from 0.5 to 1.5",
    ),
    "alpha of an integer": ({"weights": "diffmax", "alpha": torch.tensor(1)}, TypeError, "alpha must be of a floating dtype"),
    "alpha 2": ({"weights": "diffmax", "alpha": 2.0}, ValueError, "alpha must"),
}


@pytest.mark.parametrize(("options", "kind", "message"), WRONG.values(), ids=WRONG)
def test_says_what_is_wrong(options, kind, message):
    with pytest.raises(kind, match=f"DiffAttention: {message}"):
        DiffAttention(**{"dim": E, "num_heads": H, **options})


WRONG_SECOND = {
    "groups": ({"num_kv_heads": 2}, ValueError, "num_heads must be a multiple of num_kv_heads, got 3 and 2\nboth"),
    "size": ({"embed_dim": 25}, ValueError, "embed_dim must be a multiple of num_heads, got 25 and 3"),
    "head size": ({"head_dim": 0}, ValueError, "head_dim must be at least 1, got 0"),
    "dropout": ({"dropout": 2}, ValueError, "dropout must satisfy"),
    "no dropout": ({"dropout": None}, TypeError, "dropout must be a number, got None"),
    "fused as number": ({"fused": 1}, TypeError, "fused must be True or False, got 1"),
}


@pytest.mark.parametrize(("options", "kind", "message"), WRONG_SECOND.values(), ids=WRONG_SECOND)
def test_the_second_version_says_what_is_wrong(options, kind, message):
    with pytest.raises(kind, match=f"DiffAttentionV2: {message}"):
        DiffAttentionV2(**{"embed_dim": E, "num_heads": H, **options})


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("kind", [DiffAttention, DiffAttentionV2])
def test_is_causal_is_true_or_false_with_either_weights(kind, options, fused):
    """With softmax weights the text "no" was causal, and None an error of torch's."""
    module = made(kind, fused=fused, **options)
    for wrong in ("no", None, 1, torch.tensor(True)):
        with pytest.raises(TypeError, match=f"{kind.__name__}: is_causal must be True or False, got"):
            module(tokens(), is_causal=wrong)


@pytest.mark.parametrize("module", [made(), made(DiffAttentionV2, weights="diffmax")], ids=["first", "second"])
def test_a_call_says_what_is_wrong(module):
    name, x = type(module).__name__, tokens()
    for wrong in (x[..., :5], x[0]):
        with pytest.raises(ValueError, match=rf"{name}: x must have shape \(B, N, 24\), got"):
            module(wrong)
    with pytest.raises(TypeError, match=f"{name}: attn_mask must be boolean or floating, got torch.int64"):
        module(x, torch.ones(N, N, dtype=torch.int64))
    for shape in ((B, 2, N, N), (N, N + 1), (1, B, H, N, N), (B, N)):
        with pytest.raises(ValueError, match=rf"{name}: attn_mask must broadcast to \(B, H, N, N\) = \(2, 3, 9, 9\)"):
            module(x, torch.ones(shape, dtype=torch.bool))
