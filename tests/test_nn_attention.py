"""diffmax.nn.DiffmaxAttention: equal to its parts, to torch's module at alpha = 1, and at home in torch."""

import math

import pytest
import torch
from torch import nn
from torch.nn.attention.bias import causal_upper_left
from torch.utils.checkpoint import checkpoint

from diffmax import HillMap, diffmax_bisect
from diffmax.nn import DiffmaxAttention, DiffmaxBisectModule

B, L, S, E, H = 2, 6, 9, 32, 4
close = torch.testing.assert_close


def by_hand(module, query, key, value, seen, alpha, bias=0.0):
    """The same from its parts, with all weights in memory."""
    q, k, v = (
        projection(tokens).unflatten(2, (-1, module.head_dim)).transpose(1, 2)
        for projection, tokens in ((module.q_proj, query), (module.k_proj, key), (module.v_proj, value))
    )
    k, v = (t.repeat_interleave(module.num_heads // module.num_kv_heads, 1) for t in (k, v))
    if module.length_scale is not None:
        q = module.length_scale(q, k.shape[2], attn_mask=seen)
    scores = (q @ k.mT / math.sqrt(module.head_dim) + bias).masked_fill(~seen, -torch.inf)
    if module.sink is not None or module.null_sink:
        sink = torch.zeros(module.num_heads) if module.null_sink else module.sink
        scores = torch.cat([scores, sink.to(scores.dtype).view(-1, 1, 1).expand(*scores.shape[:3], 1)], -1)
    weights = diffmax_bisect(scores, alpha.view(-1, 1, 1) if isinstance(alpha, torch.Tensor) else alpha)[..., : k.shape[2]]
    out = weights @ v
    if module.gate is not None:
        out = module.gate(out, query)
    return module.out_proj(out.transpose(1, 2).flatten(2))


def tokens(length=L, size=E):
    return torch.randn(B, length, size, dtype=torch.float64) * 2


def padding(length=S):
    hidden = torch.zeros(B, length, dtype=torch.bool)
    hidden[0, -3:] = True
    return hidden


CASES = {
    "plain": ({}, {}),
    "grouped": ({"num_kv_heads": 2}, {"key_padding_mask": padding()}),
    "one key head, head size": ({"num_kv_heads": 1, "head_dim": 5, "bias": False}, {"is_causal": True}),
    "window": ({"window_size": (2, 1)}, {"key_padding_mask": padding()}),
    "causal at the lower right": ({}, {"is_causal": True, "causal_alignment": "lower_right", "key_padding_mask": padding()}),
    "mask and padding": ({}, {"attn_mask": torch.rand(B, 1, L, S) < 0.7, "key_padding_mask": padding()}),
    "bias and padding": ({}, {"attn_mask": torch.randn(B, 1, L, S).double(), "key_padding_mask": padding()}),
    "null slot": ({"sink": "null"}, {"is_causal": True}),
    "learned sink": ({"sink": "learned", "num_kv_heads": 2}, {"key_padding_mask": padding()}),
    "gate and length": ({"head_gate": True, "length_scale": True}, {}),
    "length, window and padding": ({"length_scale": True, "window_size": (2, 1)}, {"key_padding_mask": padding()}),
    "length, bias and padding": (
        {"length_scale": True},
        {"attn_mask": torch.randn(L, S).double(), "key_padding_mask": padding()},
    ),
}


def seen_by(case, options):
    """The boolean mask of a case, written out."""
    place = torch.arange(L).unsqueeze(1) + (S - L if case.get("causal_alignment") == "lower_right" else 0)
    keys = torch.arange(S)
    seen = torch.ones(B, 1, L, S, dtype=torch.bool)
    if case.get("is_causal"):
        seen = seen & (keys <= place)
    if "window_size" in options:
        left, right = options["window_size"]
        seen = seen & (keys >= place - left) & (keys <= place + right)
    if "key_padding_mask" in case:
        seen = seen & ~case["key_padding_mask"][:, None, None]
    mask = case.get("attn_mask")
    return seen & mask if mask is not None and mask.dtype == torch.bool else seen


def in_torchs_way(case):
    """The masks of a call with query, key and value, as nn.MultiheadAttention reads them."""
    if "attn_mask" not in case:
        return case
    mask = case["attn_mask"].expand(B, H, L, S).flatten(0, 1)
    return case | {"attn_mask": mask if mask.is_floating_point() else ~mask}


def randomized(module):
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "proj" not in name:
                parameter.add_(torch.randn_like(parameter) / 3)
    return module.double()


@pytest.mark.parametrize("alpha", [0.5, "per head", "learned"])
@pytest.mark.parametrize(("options", "case"), CASES.values(), ids=CASES)
def test_equals_its_parts_unfused(options, case, alpha):
    given = torch.tensor([0.3, 0.5, 0.8, 0.9])
    how = {"alpha": 0.7, "alpha_map": HillMap(0.9)} if alpha == "learned" else {"alpha": given if alpha != 0.5 else alpha}
    module = randomized(DiffmaxAttention(E, H, kdim=20, vdim=24, **options, **how))
    query, key, value = tokens().requires_grad_(), tokens(S, 20), tokens(S, 24)
    inputs = (query, *module.parameters())
    out, weights = module(query, key, value, **in_torchs_way(case), need_weights=False)
    assert weights is None
    mask = case.get("attn_mask")
    bias = mask if mask is not None and mask.is_floating_point() else 0.0
    expected = by_hand(module, query, key, value, seen_by(case, options), module.current_alpha, bias)
    close(out, expected)
    upstream = torch.randn_like(out)
    kept = {"retain_graph": True}
    for got, wanted in zip(*(torch.autograd.grad(t, inputs, upstream, **kept) for t in (out, expected)), strict=True):
        close(got, wanted, rtol=1e-6, atol=1e-9)
    weighed, weights = module(query, key, value, **in_torchs_way(case), average_attn_weights=False)
    close(weighed, expected)
    assert weights.shape == (B, H, L, S + (module.null_sink or module.sink is not None))
    close(weights.sum(-1), (weights.sum(-1) > 0).double())
    for got, wanted in zip(*(torch.autograd.grad(t, inputs, upstream) for t in (weighed, out)), strict=True):
        close(got, wanted, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("sizes", [{}, {"kdim": 20, "vdim": 24}], ids=["in_proj", "own projections"])
def test_at_alpha_one_it_is_torchs_module_with_its_weights(sizes):
    theirs = nn.MultiheadAttention(E, H, batch_first=True, **sizes).double()
    with torch.no_grad():
        theirs.in_proj_bias.normal_()
        theirs.out_proj.bias.normal_()
    ours = DiffmaxAttention(E, H, alpha=torch.ones(H), **sizes).double()
    assert ours.load_state_dict(theirs.state_dict()) == ([], [])
    query, key, value = tokens(), tokens(S, sizes.get("kdim", E)), tokens(S, sizes.get("vdim", E))
    mask = torch.rand(L, S) < 0.3
    mask[:, 0] = False  # a row that sees nothing is NaN in torch
    expected, _ = theirs(query, key, value, key_padding_mask=padding(), attn_mask=mask, need_weights=False)
    close(ours(query, key, value, key_padding_mask=padding(), attn_mask=mask)[0], expected)
    if not sizes:  # in our own way, without value, True is seen
        memory = theirs(query, key, key, key_padding_mask=padding(), attn_mask=mask)[0]
        close(ours(query, key, key_padding_mask=padding(), attn_mask=~mask), memory)


@pytest.mark.parametrize(("options", "case"), CASES.values(), ids=CASES)
def test_the_masks_of_our_own_way(options, case):
    module = randomized(DiffmaxAttention(E, H, alpha=0.6, **options))
    query, memory = tokens(), tokens(S)
    mask = case.get("attn_mask")
    bias = mask if mask is not None and mask.is_floating_point() else 0.0
    close(module(query, memory, **case), by_hand(module, query, memory, memory, seen_by(case, options), 0.6, bias))


def test_a_null_slot_is_torchs_zero_attn():
    theirs = nn.MultiheadAttention(E, H, batch_first=True, add_zero_attn=True).double()
    x = tokens()
    for sink, same in ((None, False), ("null", True)):
        ours = DiffmaxAttention(E, H, alpha=torch.ones(H), sink=sink).double()
        ours.load_state_dict(theirs.state_dict())
        assert torch.allclose(ours(x), theirs(x, x, x, need_weights=False)[0], atol=1e-9) == same
    for got, wanted in zip(ours(x, x, x), theirs(x, x, x), strict=True):
        close(got, wanted)  # the weights too, whose last column is the slot's


def test_torchs_weights_load_inside_a_larger_model_and_leave_what_torch_does_not_have():
    theirs = nn.Sequential(nn.Linear(E, E), nn.MultiheadAttention(E, H, bias=False))
    learned = DiffmaxAttention(E, H, alpha=0.6, alpha_map=HillMap(0.9), bias=False, head_gate=True, sink="learned")
    ours = nn.Sequential(nn.Linear(E, E), learned)
    before = {name: p.clone() for name, p in learned.state_dict().items()}
    ours.load_state_dict(theirs.state_dict())
    close(torch.cat([p.weight for p in (learned.q_proj, learned.k_proj, learned.v_proj)]), theirs[1].in_proj_weight)
    for name, tensor in learned.state_dict().items():
        assert ("proj.weight" in name and "gate" not in name) or torch.equal(tensor, before[name])


def test_bias_k_of_torchs_module_is_refused_by_name():
    theirs = nn.MultiheadAttention(E, H, add_bias_kv=True)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*bias_k"):
        DiffmaxAttention(E, H).load_state_dict(theirs.state_dict())


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({}, set()),
        ({"alpha": torch.full((H,), 0.5)}, {"alpha"}),
        ({"alpha": nn.Parameter(torch.full((H,), 0.5))}, {"alpha"}),
        ({"alpha_map": HillMap(0.5), "sink": "null"}, {"log_beta"}),
        ({"sink": "learned"}, {"sink"}),
    ],
)
def test_the_state_dict_has_the_usual_names_and_makes_the_same_module_again(options, names):
    module = DiffmaxAttention(E, H, 2, **options)
    usual = {f"{p}_proj.{kind}" for p in ("q", "k", "v", "out") for kind in ("weight", "bias")}
    assert set(module.state_dict()) == usual | names
    again = DiffmaxAttention(E, H, 2, **options)
    x = tokens().float()
    assert not torch.equal(again(x), module(x))
    again.load_state_dict(module.state_dict())
    assert torch.equal(again(x), module(x))


def test_log_beta_starts_at_alpha_and_a_step_moves_it():
    module = DiffmaxAttention(E, H, alpha=0.85, alpha_map=HillMap(0.3))
    close(module.current_alpha, torch.full((H,), 0.85))
    x = tokens().float()
    module(x).square().sum().backward()
    assert (module.log_beta.grad != 0).all()
    before = module.log_beta.detach().clone()
    torch.optim.SGD(module.parameters(), lr=0.1).step()
    assert (module.log_beta != before).all()


def test_a_learned_alpha_in_half_precision_is_computed_in_float32():
    module = DiffmaxAttention(E, H, alpha=0.7, alpha_map=HillMap(0.9)).bfloat16()
    out = module(tokens().bfloat16())
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert module.log_beta.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("change", [lambda m: m.half(), lambda m: m.bfloat16(), lambda m: m.to(torch.bfloat16)])
def test_a_fixed_alpha_per_head_is_not_rounded_to_half_precision(change):
    """At 0.997 bfloat16 has 1 - alpha a third too large."""
    alpha = torch.tensor([0.997, 0.99, 0.9, 0.7])
    module = change(nn.Sequential(DiffmaxAttention(E, H, alpha=alpha.clone()), DiffmaxBisectModule(alpha.view(-1, 1, 1))))
    assert torch.equal(module[0].alpha, alpha)
    assert torch.equal(module[1].alpha, alpha.view(-1, 1, 1))
    x = tokens().to(module[0].q_proj.weight.dtype)
    assert module[0](x).dtype == module[1](torch.randn(B, H, L, L).to(x.dtype)).dtype == x.dtype != torch.float32
    assert module.double()[0].alpha.dtype == torch.float64
    assert module.to("meta")[0].alpha.is_meta


def test_dropout_acts_in_training_only():
    module, x = DiffmaxAttention(E, H, dropout=0.5).double().eval(), tokens()
    plain = DiffmaxAttention(E, H).double()
    plain.load_state_dict(module.state_dict())
    assert torch.equal(module(x), plain(x))
    module.train()
    torch.manual_seed(5)
    dropped = module(x)
    assert not torch.equal(dropped, plain(x))
    torch.manual_seed(5)
    assert torch.equal(module(x), dropped)


def test_defaults_are_self_attention():
    module, x = DiffmaxAttention(E, H).double(), tokens()
    assert torch.equal(module(x), module(x, x, x, need_weights=False)[0])
    memory = tokens(S)
    assert torch.equal(module(x, memory), module(x, memory, memory, need_weights=False)[0])


def test_compiles_without_a_graph_break_and_checkpoints():
    module = DiffmaxAttention(E, H, 2, alpha=0.7, alpha_map=HillMap(0.9), head_gate=True, sink="learned").double()
    x = tokens().requires_grad_()

    def gradients(run):
        return torch.autograd.grad(run(x, is_causal=True).square().sum(), (x, *module.parameters()))

    expected = gradients(module)
    compiled = gradients(torch.compile(module, backend="aot_eager", fullgraph=True))
    kept = gradients(lambda x, **how: checkpoint(module, x, use_reentrant=False, **how))
    for given in (compiled, kept):
        for got, wanted in zip(given, expected, strict=True):
            close(got, wanted)


def test_padding_changes_nothing_of_the_other_tokens():
    """A length scale counted the padding too."""
    module, x = randomized(DiffmaxAttention(E, H, length_scale=True)), tokens(S)
    with torch.no_grad():
        module.length_scale.log_decay.fill_(-1.0)
    close(module(x, key_padding_mask=padding())[0, :-3], module(x[:1, :-3])[0])


def test_a_null_slot_is_zero_also_after_to_empty():
    """It was a buffer that no state dict holds: on the way from the device "meta" it became what was in memory."""
    expected = DiffmaxAttention(E, H, sink="null")
    with torch.device("meta"):
        module = DiffmaxAttention(E, H, sink="null")
    module.to_empty(device="cpu").load_state_dict(expected.state_dict())
    assert not list(module.buffers())
    x = tokens().float()
    assert torch.equal(module(x), expected(x))


@pytest.mark.parametrize("alpha", [0.7, "tensor"])
def test_with_a_map_it_is_made_on_the_device_meta_as_from_pretrained_does(alpha):
    def make():
        given = torch.full((H,), 0.7) if alpha == "tensor" else alpha
        return nn.Sequential(DiffmaxAttention(E, H, alpha=given, alpha_map=HillMap(0.5)))

    with torch.device("meta"):
        module = make()
        with pytest.raises(ValueError, match=r"the range of c = 0\.3, got 0\.6"):
            DiffmaxAttention(E, H, alpha=0.6, alpha_map=HillMap(0.3))
    assert module[0].log_beta.is_meta
    expected = make()
    module.to_empty(device="cpu").load_state_dict(expected.state_dict())
    x = tokens().float()
    assert torch.equal(module(x), expected(x))


def test_repr_names_what_matters():
    assert repr(DiffmaxAttention(E, H, 2, alpha=0.5)).startswith("DiffmaxAttention(\n  32, 4, num_kv_heads=2, alpha=0.5\n")
    assert "alpha_map=HillMap(c=0.5, beta0=1.0)" in repr(DiffmaxAttention(E, H, alpha_map=HillMap(0.5)))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: DiffmaxAttention(E, 5),
            ValueError,
            "embed_dim must be a multiple of num_heads, got 32 and 5\n.*pass head_dim",
        ),
        (lambda: DiffmaxAttention(E, 4, 3), ValueError, "num_heads must be a multiple of num_kv_heads, got 4 and 3"),
        (lambda: DiffmaxAttention(E, H, head_dim=0), ValueError, "head_dim must be at least 1, got 32 and 0"),
        (lambda: DiffmaxAttention(E, H, head_dim=-2), ValueError, "head_dim must be at least 1, got 32 and -2"),
        (
            lambda: DiffmaxAttention(E, H)(tokens().float(), key_padding_mask=padding(L), attn_mask=torch.ones(L, L).long()),
            TypeError,
            "attn_mask must be boolean or floating, got torch.int64\na boolean mask is True",
        ),
        (
            lambda: DiffmaxAttention(E, H)(tokens().float(), key_padding_mask=padding(L), attn_mask=causal_upper_left(L, L)),
            ValueError,
            "CausalBias and key_padding_mask exclude each other\npass is_causal=True instead",
        ),
        (
            lambda: DiffmaxAttention(E, H, length_scale=True)(tokens().float(), attn_mask=torch.ones(L, 3).bool()),
            ValueError,
            r"DiffmaxAttention: attn_mask must broadcast to \(B, H, L, S\), got shape \(6, 3\)",
        ),
        (lambda: DiffmaxAttention(E, H, dropout=1.1), ValueError, "dropout must satisfy 0 <= dropout <= 1, got 1.1"),
        (lambda: DiffmaxAttention(E, H, 0.1), TypeError, "num_kv_heads must be an int, got 0.1\n.*dropout=0.1"),
        (lambda: DiffmaxAttention(E, H, sink="zero"), ValueError, 'sink must be None, "null" or "learned", got .zero'),
        (lambda: DiffmaxAttention(E, H, alpha=1.5), ValueError, "alpha must lie strictly between 0 and 1, got 1.5"),
        (lambda: DiffmaxAttention(E, H, alpha="0.5"), TypeError, "alpha must be a float"),
        (lambda: DiffmaxAttention(E, H, alpha=lambda: 0.5), TypeError, "alpha must be a float or a tensor, got <function"),
        (
            lambda: DiffmaxAttention(E, H, alpha=torch.ones(3)),
            ValueError,
            r"shape \(\) or \(4,\), got \(3,\)\n.* 4 query heads",
        ),
        (lambda: DiffmaxAttention(E, H, alpha_map=HillMap), TypeError, "alpha_map must be a HillMap, TanhMap or ExpMap, got"),
        (
            lambda: DiffmaxAttention(E, H, alpha=0.5, alpha_map=HillMap(0.3)),
            ValueError,
            r"range of c = 0\.3, got 0.5",
        ),
        (
            lambda: DiffmaxAttention(E, H)(tokens().float(), need_weights=True),
            ValueError,
            "need_weights and average_attn_weights belong to a call with query, key and value, got no value\nwrite out, w",
        ),
        (
            lambda: DiffmaxAttention(E, H, kdim=20)(tokens().float()),
            ValueError,
            r"key must have shape \(B, tokens, 20\), .* got \(2, 6, 32\)",
        ),
        (lambda: DiffmaxAttention(E, H)(torch.randn(E)), ValueError, r"query must have shape .* got \(32,\)"),
        (
            lambda: DiffmaxAttention(E, H)(tokens().float(), key_padding_mask=torch.ones(B, L)),
            TypeError,
            "must be boolean, True at padding, got torch.float32\n.*attention_mask == 0",
        ),
        (
            lambda: DiffmaxAttention(E, H)(tokens().float(), key_padding_mask=torch.ones(L).bool()),
            ValueError,
            r"must have shape \(B, S\) = \(2, 6\), got \(6,\)",
        ),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("length_scale", [True, "adaptive"])
def test_every_part_is_made_where_the_module_is(length_scale):
    """Gates and length scales were made on the default device and moved, which fails from "meta"."""
    with torch.device("meta"):
        options = {"alpha_map": HillMap(0.9), "head_gate": True, "length_scale": length_scale, "sink": "learned"}
        module = DiffmaxAttention(E, H, alpha=0.6, device="cpu", dtype=torch.float64, **options)
    assert {(t.device.type, t.dtype) for t in module.parameters()} == {("cpu", torch.float64)}
