"""convert_diff_attention: the same function of the tokens in the layouts of timm, unilm and DiffLlama."""

import itertools
import math

import pytest
import torch
from torch import nn

from diffmax.nn import DiffAttention, convert_diff_attention

B, N, E, DEPTH = 2, 7, 48, 2


def close(got, wanted):
    """To the digits of DiffLlama's own softmax and lambda, which are float32 whatever the weights are."""
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=5e-6)


LAMBDA_INIT = 0.8 - 0.6 * math.exp(-0.3 * DEPTH)
BASE = 10000.0
SHAPES = {"H 4": (4, 4), "H 4 in groups": (4, 2), "one key": (3, 1), "one head": (1, 1)}


def rotated_neighbours(t):
    """Positions as unilm has them: each pair (x_2i, x_2i+1) as a complex number, turned."""
    half = t.shape[3] // 2
    pair = torch.view_as_complex(t.unflatten(3, (half, 2)).contiguous())
    angle = torch.arange(t.shape[2]).double().unsqueeze(1) / BASE ** (torch.arange(half).double() / half)
    return torch.view_as_real(pair * torch.polar(torch.ones_like(angle), angle)).flatten(3)


def unilm(state, x, heads, groups, positions):
    """The first published module, from its formulas."""
    q, k, v = (
        (x @ state[f"{name}_proj.weight"].T).unflatten(2, (number, -1)).transpose(1, 2)
        for name, number in (("q", 2 * heads), ("k", 2 * groups), ("v", groups))
    )
    if positions:
        q, k = rotated_neighbours(q), rotated_neighbours(k)
    k = k.unflatten(1, (groups, 2)).repeat_interleave(heads // groups, 1).flatten(1, 2)
    v = v.repeat_interleave(heads // groups, 1)
    hidden = torch.ones(N, N, dtype=torch.bool).triu(1)
    maps = (q @ k.mT / math.sqrt(q.shape[3])).masked_fill(hidden, -torch.inf).softmax(3)
    first, second = ((state[f"lambda_q{i}"] @ state[f"lambda_k{i}"]).exp() for i in (1, 2))
    out = (maps[:, 0::2] - (first - second + LAMBDA_INIT) * maps[:, 1::2]) @ v
    out = out * (out.square().mean(3, keepdim=True) + 1e-5).rsqrt() * state["subln.weight"] * (1 - LAMBDA_INIT)
    return out.transpose(1, 2).flatten(2) @ state["out_proj.weight"].T


def timm(state, x, heads, groups, positions):
    biases = {"qkv_bias": "qkv.bias" in state, "proj_bias": "proj.bias" in state}
    module = DiffAttention(E, heads, depth=DEPTH, dual_lambda="lambda_a" in state, **biases).double()
    module.load_state_dict(state)
    return module(x, is_causal=True)


def diffllama(state, x, heads, groups, positions):
    transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'diffmax-core[transformers]'")
    from transformers.models.diffllama.modeling_diffllama import DiffLlamaAttention

    config = transformers.DiffLlamaConfig(
        hidden_size=E,
        num_attention_heads=2 * heads,
        num_key_value_heads=2 * groups,
        attention_bias="q_proj.bias" in state,
        rms_norm_eps=1e-5,
        attn_implementation="eager",
    )
    module = DiffLlamaAttention(config, DEPTH).double()
    module.load_state_dict(state)
    size = module.head_dim
    angle = torch.arange(N).double().unsqueeze(1) / BASE ** (torch.arange(size // 2).double() / (size // 2))
    angle = (angle if positions else 0 * angle).repeat(1, 2)[None]
    mask = torch.zeros(N, N, dtype=torch.float64).masked_fill(torch.ones(N, N).triu(1) > 0, -torch.inf)
    return module(x, (angle.cos(), angle.sin()), mask.expand(B, 1, N, N))[0]


RUN = {"timm": timm, "unilm": unilm, "diffllama": diffllama}


def weights(heads, groups):
    """unilm's, random."""
    size = E // heads // 2
    shapes = {"q_proj": (E, E), "k_proj": (2 * groups * size, E), "v_proj": (2 * groups * size, E), "out_proj": (E, E)}
    state = {f"{name}.weight": torch.randn(shape).double() / 4 for name, shape in shapes.items()}
    state["subln.weight"] = torch.rand(2 * size).double() + 0.5
    return state | {f"lambda_{name}": 0.3 * torch.randn(size).double() for name in ("q1", "k1", "q2", "k2")}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("positions", [False, True])
def test_the_same_function_in_every_layout(shape, positions):
    heads, groups = shape
    numbers = {"num_heads": heads, "num_kv_heads": groups}
    state, x = weights(heads, groups), torch.randn(B, N, E).double()
    wanted = unilm(state, x, heads, groups, positions)
    forms = {"unilm": state}
    for target in ("timm", "diffllama"):
        forms[target] = convert_diff_attention(state, "unilm", target, **numbers)
    for source, target in itertools.product(forms, repeat=2):
        given = numbers if source != "timm" else {"num_heads": heads}
        converted = convert_diff_attention(forms[source], source, target, **given)
        own_groups = heads if source == "timm" else groups
        if target != "timm" or not positions:  # timm has no positions
            close(RUN[target](converted, x, heads, own_groups, positions), wanted)
        if source == target:
            for name, tensor in forms[source].items():
                close(converted[name], tensor)


@pytest.mark.parametrize("biases", [{"qkv_bias": True}, {"proj_bias": False, "qkv_bias": True}, {"proj_bias": True}])
@pytest.mark.parametrize("dual", [False, True])
def test_biases_and_a_lambda_of_two_numbers(biases, dual):
    heads, x = 3, torch.randn(B, N, E).double()
    module = DiffAttention(E, heads, depth=DEPTH, dual_lambda=dual, **biases).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    there = convert_diff_attention(module.state_dict(), "timm", "diffllama", num_heads=heads)
    close(diffllama(there, x, heads, heads, False), module(x, is_causal=True))
    back = convert_diff_attention(there, "diffllama", "timm", num_heads=heads)
    close(timm(back, x, heads, heads, False), module(x, is_causal=True))
    with pytest.raises(ValueError, match=r"unilm has no place for (q|k|v|out)_proj.bias, got numbers other than 0"):
        convert_diff_attention(there, "diffllama", "unilm", num_heads=heads)


def test_nothing_given_is_changed():
    state = weights(4, 2)
    before = {name: tensor.clone() for name, tensor in state.items()}
    converted = convert_diff_attention(state, "unilm", "diffllama", num_heads=4, num_kv_heads=2)
    for tensor in converted.values():
        tensor.zero_() if tensor.data_ptr() not in {t.data_ptr() for t in state.values()} else None
    assert state.keys() == before.keys()
    assert all(torch.equal(state[name], before[name]) for name in before)


WRONG = {
    "layout": (("flax", "timm", 4), ValueError, 'source must be "timm", "unilm" or "diffllama", got \'flax\''),
    "target": (("unilm", "llama", 4), ValueError, 'target must be "timm"'),
    "heads": (("unilm", "timm", 5), ValueError, "the rows of q_proj.weight must be a multiple of 10, got 48\nnum_heads is"),
    "too many heads": (("unilm", "timm", 8), ValueError, r"must have shape .* for 8 and 8 pairs, got"),
    "half a head": (("unilm", "timm", 4.0), TypeError, "num_heads must be an int, got 4.0"),
    "none": (("unilm", "timm", 0), ValueError, "num_heads must be a multiple of num_kv_heads, got 0 and 0"),
    "keys": (
        ("unilm", "timm", 4, 2),
        ValueError,
        r"k_proj.weight must have shape \(24, 48\) for 4 and 2 pairs, got \(48, 48\)",
    ),
    "no such entries": (("diffllama", "timm", 4), ValueError, "no place for out_proj.weight, subln.weight of diffllama"),
}


@pytest.mark.parametrize(("given", "kind", "message"), WRONG.values(), ids=WRONG)
def test_says_what_is_wrong(given, kind, message):
    source, target, *numbers = given
    with pytest.raises(kind, match=f"convert_diff_attention: .*{message}"):
        convert_diff_attention(weights(4, 4), source, target, **dict(zip(("num_heads", "num_kv_heads"), numbers, strict=False)))


def test_what_has_no_place_and_what_is_missing():
    normed = DiffAttention(E, 4, qk_norm=True, scale_norm=True).state_dict()
    with pytest.raises(ValueError, match=r"no place for q_norm.weight, k_norm.weight, norm.weight of timm\nstrip"):
        convert_diff_attention(normed, "timm", "unilm", num_heads=4)
    state = DiffAttention(E, 4, proj_bias=False).state_dict()
    del state["proj.weight"], state["lambda_k1"]
    with pytest.raises(ValueError, match=r"must hold lambda_k1, proj.weight, got"):
        convert_diff_attention(state, "timm", "unilm", num_heads=4)
    with pytest.raises(ValueError, match="num_kv_heads must be num_heads for timm"):
        convert_diff_attention(DiffAttention(E, 4).state_dict(), "timm", "unilm", num_heads=4, num_kv_heads=2)


@pytest.mark.parametrize("source", ["timm", "unilm", "diffllama"])
def test_every_entry_must_have_its_shape(source):
    """Only some were looked at: others gave states that fit no module, or torch's error."""
    state = convert_diff_attention(DiffAttention(E, 4).double().state_dict(), "timm", "diffllama", num_heads=4)
    if source != "diffllama":
        state = {name: torch.zeros_like(t) if "bias" in name else t for name, t in state.items()}
        state = convert_diff_attention(state, "diffllama", source, num_heads=4)
    for name, tensor in state.items():
        for axis, wrong in ((-1, tensor[..., 1:]), (0, tensor[1:])):
            multiple = "rows of q" if axis == 0 and name in ("qkv.weight", "q_proj.weight") else "shape"
            with pytest.raises(ValueError, match=f"^convert_diff_attention: .*{multiple}"):
                convert_diff_attention(state | {name: wrong}, source, "diffllama", num_heads=4)


def test_a_wrong_number_of_heads_is_seen_without_vectors():
    """With lambda of two numbers and half the heads, the result was another function."""
    state = DiffAttention(E, 4, dual_lambda=True).state_dict()
    with pytest.raises(ValueError, match=r"sub_norm.weight must have shape \(24,\) for 2 and 2 pairs, got \(12,\)"):
        convert_diff_attention(state, "timm", "timm", num_heads=2)


@pytest.mark.parametrize("missing", ["q", "k", "v"])
def test_a_bias_that_is_missing_beside_others_is_0(missing):
    """To timm, all were dropped without that of the queries, and the others' absence was a KeyError."""
    full = convert_diff_attention(DiffAttention(E, 3, qkv_bias=True).state_dict(), "timm", "diffllama", num_heads=3)
    full = {name: torch.randn_like(tensor).double() / 4 for name, tensor in full.items()}
    zero = full | {f"{missing}_proj.bias": torch.zeros(E).double()}
    lacking = {name: tensor for name, tensor in full.items() if name != f"{missing}_proj.bias"}
    got, wanted = (convert_diff_attention(state, "diffllama", "timm", num_heads=3) for state in (lacking, zero))
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    x = torch.randn(B, N, E).double()
    close(timm(got, x, 3, 3, False), diffllama(zero, x, 3, 3, False))


def test_what_is_no_state_dict_of_a_layer():
    timms = DiffAttention(E, 4).state_dict()
    with pytest.raises(TypeError, match=r"state must be a state dict, got DiffAttention\nof a module, pass its state_dict"):
        convert_diff_attention(DiffAttention(E, 4), "timm", "unilm", num_heads=4)
    with pytest.raises(TypeError, match=r"proj.bias must be a floating tensor, got ndarray"):
        convert_diff_attention(timms | {"proj.bias": timms["proj.bias"].numpy()}, "timm", "unilm", num_heads=4)
    with pytest.raises(TypeError, match=r"proj.bias must be a floating tensor, got torch.int64"):
        convert_diff_attention(timms | {"proj.bias": timms["proj.bias"].long()}, "timm", "unilm", num_heads=4)
    with pytest.raises(ValueError, match=r"source must be .* got \['timm'\]"):
        convert_diff_attention(timms, ["timm"], "unilm", num_heads=4)
    both = timms | {"lambda_a": torch.zeros(()), "lambda_b": torch.zeros(())}
    with pytest.raises(ValueError, match=r"two numbers or of vectors, got lambda_a, lambda_b and lambda_q1"):
        convert_diff_attention(both, "timm", "unilm", num_heads=4)
    with pytest.raises(ValueError, match=r"unilm has no place for out_proj.bias, got a tensor without numbers"):
        convert_diff_attention(DiffAttention(E, 4, device="meta").state_dict(), "timm", "unilm", num_heads=4)
    wide = {
        name: torch.cat([t] * 2, -1) if name in ("q_proj.weight", "k_proj.weight", "v_proj.weight") else t
        for name, t in weights(4, 4).items()
    }
    wide["out_proj.weight"] = torch.cat([wide["out_proj.weight"]] * 2)
    assert convert_diff_attention(wide, "unilm", "diffllama", num_heads=4)["o_proj.weight"].shape == (2 * E, E)
    with pytest.raises(ValueError, match="all heads together must have the size of the tokens, 96, got 48"):
        convert_diff_attention(wide, "unilm", "timm", num_heads=4)


def test_parameters_as_well_as_tensors():
    state = {name: nn.Parameter(tensor) for name, tensor in weights(4, 4).items()}
    x = torch.randn(B, N, E).double()
    converted = convert_diff_attention(state, "unilm", "timm", num_heads=4)
    close(timm(converted, x, 4, 4, False), unilm(state, x, 4, 4, False))
