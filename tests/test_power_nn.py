"""diffmax.nn.PowerAttention: equal to its parts, step by step equal to one call, and at home in torch."""

import copy
import math

import pytest
import torch
from torch import nn

from diffmax.nn import PowerAttention, PowerAttentionState
from diffmax.nn.power import GATE_BIAS

B, L, E, H = 2, 11, 24, 4
close = torch.testing.assert_close


def tokens(length=L):
    return torch.randn(B, length, E, dtype=torch.float64)


def made(**options):
    module = PowerAttention(E, H, **options).double()
    if module.gate_proj is not None:  # gates that differ
        nn.init.normal_(module.gate_proj.weight, std=0.3)
        nn.init.constant_(module.gate_proj.bias, 1.0)
    return module


def rotated_by_hand(t, base):
    """Each pair (x_i, x_i+half) as a complex number, turned."""
    half = t.shape[3] // 2
    pair = torch.complex(t[..., :half], t[..., half:])
    angle = torch.arange(t.shape[2]).double().unsqueeze(1) / base ** (torch.arange(half).double() / half)
    turned = pair * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([turned.real, turned.imag], 3)


def by_hand(module, x, padding=None):
    """Both attentions of the module, with all weights in memory, before they are blended."""
    q, k, v = (p(x).unflatten(2, (-1, module.head_dim)).transpose(1, 2) for p in (module.q_proj, module.k_proj, module.v_proj))
    if module.rope_base is not None:
        q, k = rotated_by_hand(q, module.rope_base), rotated_by_hand(k, module.rope_base)
    k, v = (t.repeat_interleave(H // module.num_kv_heads, 1) for t in (k, v))
    log_gates = torch.zeros(B, module.num_kv_heads, x.shape[1], dtype=x.dtype)
    if module.gate_proj is not None:
        log_gates = torch.sigmoid(module.gate_proj(x)).log().transpose(1, 2)
    seen = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril().expand(B, 1, -1, -1)
    if padding is not None:
        log_gates = log_gates.masked_fill(padding.unsqueeze(1), 0.0)
        seen = seen & ~padding[:, None, None]
    g = log_gates.cumsum(2).repeat_interleave(H // module.num_kv_heads, 1)
    scores = q @ k.mT / math.sqrt(module.head_dim)
    weights = scores**module.degree * (g.unsqueeze(3) - g.unsqueeze(2)).exp() * seen
    power = weights / weights.sum(3, keepdim=True) @ v
    softmax = scores.masked_fill(~seen, -torch.inf).softmax(3) @ v
    return power, softmax


def projected(module, out):
    return module.out_proj(out.transpose(1, 2).flatten(2))


OPTIONS = {
    "plain": {},
    "grouped, no bias": {"num_kv_heads": 2, "bias": False},
    "degree 4, own head size": {"degree": 4, "head_dim": 4, "num_kv_heads": 1},
    "no gates, no positions": {"gate": False, "rope_base": None, "head_dim": 5},
    "chunks": {"chunk_size": 4, "rope_base": 500.0},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_it_equals_its_parts(options):
    module, x = made(**options), tokens()
    close(module(x), projected(module, by_hand(module, x)[0]))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_prompt_and_its_steps_equal_one_call(options):
    module, x = made(**options), tokens()
    outs, state = [], None
    for part in x.split([5, 1, 1, 3, 1], 1):
        out, state = module(part, state, return_state=True)
        outs.append(out)
    close(torch.cat(outs, 1), module(x))
    assert isinstance(state, PowerAttentionState)
    assert state.length == L
    close(state.state, module(x, return_state=True)[1].state)


def test_padding_adds_nothing_and_lets_nothing_fade():
    module, x = made(num_kv_heads=2), tokens()
    padding = torch.zeros(B, L, dtype=torch.bool)
    padding[1, :4] = True
    padding[0, 6:8] = True
    out, state = module(x, key_padding_mask=padding, return_state=True)
    close(out[~padding], projected(module, by_hand(module, x, padding)[0])[~padding])
    alone, after = module(x[1:, 4:], PowerAttentionState(_empty(module), 4), return_state=True)  # at the same positions
    close(alone, out[1:, 4:])
    close(after.state, type(state.state)(*(t[1:] for t in state.state)))


def _empty(module):
    state = module(tokens(1), return_state=True)[1].state
    return type(state)(*(torch.zeros_like(t[1:]) for t in state))


@pytest.mark.parametrize("share", [1.0, 0.5, 0.0])
def test_what_lies_at_padding_is_not_read(share):
    attend, x = PowerAttention(12, 2, interpolate=share).double(), torch.randn(1, 10, 12, dtype=torch.float64)
    padding = torch.zeros(1, 10, dtype=torch.bool)
    padding[:, :3] = True
    wanted = attend(x, key_padding_mask=padding)[:, 3:]
    x[:, :3] = torch.nan
    assert torch.equal(attend(x, key_padding_mask=padding)[:, 3:], wanted)


@pytest.mark.parametrize("shape", [(0, 5, 12), (2, 0, 12)])
def test_without_sequences_or_tokens(shape):
    attend = PowerAttention(12, 2)
    out, state = attend(torch.zeros(shape), return_state=True)
    assert out.shape == shape
    assert state.length == shape[1]


@pytest.mark.parametrize("share", [0.0, 0.25])
def test_it_blends_with_softmax(share):
    module, x = made(num_kv_heads=2, interpolate=share), tokens()
    power, softmax = by_hand(module, x)
    close(module(x), projected(module, (1 - share) * softmax + share * power))
    padding = torch.zeros(B, L, dtype=torch.bool)
    padding[1, :3] = True
    power, softmax = by_hand(module, x, padding)
    wanted = projected(module, (1 - share) * softmax.nan_to_num() + share * power.nan_to_num())
    got = module(x, key_padding_mask=padding)
    close(got[~padding], wanted[~padding])
    assert got.isfinite().all()


def test_a_tensor_alpha_is_of_heads_and_in_the_state_dict():
    """It was a plain attribute, and of shape () alone."""
    alpha, x = torch.tensor([0.2, 0.5, 0.8, 0.9]), tokens()
    module, other = made(interpolate=0.0, alpha=alpha), made(interpolate=0.0, alpha=torch.tensor(0.5))
    assert (module.alpha.dtype, PowerAttention(E, H, alpha=alpha).bfloat16().alpha.dtype) == (torch.float64, torch.float32)
    for index, one in enumerate(alpha.tolist()):  # a head of a module whose heads all have its alpha
        other.load_state_dict({**module.state_dict(), "alpha": torch.tensor(one)})
        heads = slice(index * module.head_dim, (index + 1) * module.head_dim)
        outs = []
        for of in (module, other):
            of.out_proj = nn.Identity()
            outs.append(of(x)[..., heads])
            of.out_proj = nn.Linear(E, E).double()
        close(*outs, rtol=1e-6, atol=1e-7)
    with torch.no_grad():
        module.alpha.fill_(0.5)
    module.reset_parameters()
    close(module.alpha.float(), alpha)
    assert "alpha" not in made().state_dict()
    learned = nn.Parameter(torch.tensor(0.5))
    assert dict(PowerAttention(E, H, alpha=learned).named_parameters())["alpha"] is learned


def test_it_blends_with_diffmax_where_alpha_is_given():
    x = tokens()
    module = made(interpolate=0.5, alpha=1 - 1e-12)
    other = copy.deepcopy(module)
    other.alpha = None
    close(module(x), other(x), rtol=1e-6, atol=1e-8)
    module.alpha = 0.5
    assert not torch.allclose(module(x), other(x), rtol=1e-3)


def test_the_share_can_be_changed_while_training():
    module, x = made(), tokens()
    before = module(x)
    module.interpolate = 0.0
    assert not torch.allclose(module(x), before)
    module.interpolate = 1
    close(module(x), before)
    with pytest.raises(ValueError, match=r"interpolate must lie in \[0, 1\], got 1.5"):
        module.interpolate = 1.5


def test_gates_start_at_the_published_number_for_every_token():
    module = PowerAttention(E, H)
    assert torch.allclose(module._log_gates(torch.randn(B, L, E)).exp(), torch.tensor(0.999), atol=1e-6)
    assert module.gate_proj.bias[0] == torch.tensor(GATE_BIAS)


def test_gates_are_computed_in_float32_whatever_autocast_says():
    module, x = made().float(), tokens().float()
    with torch.autocast("cpu", torch.bfloat16):
        gates, out = module._log_gates(x), module(x)
    assert gates.dtype == torch.float32
    close(gates, module._log_gates(x))
    assert out.dtype == torch.bfloat16
    half = copy.deepcopy(module).bfloat16()
    assert half._log_gates(x.bfloat16()).dtype == torch.float32
    assert half(x.bfloat16(), return_state=True)[1].state.sums.dtype == torch.float32


def test_gradients_reach_every_parameter_and_the_tokens_before():
    module, x = made(num_kv_heads=2, interpolate=0.5), tokens().requires_grad_()
    module(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for n, p in module.named_parameters() if n != "k_proj.bias")
    module.interpolate = 1.0
    first = tokens().requires_grad_()
    _, state = module(first, return_state=True)
    module(tokens(), state).sum().backward()
    assert first.grad.abs().sum() > 0


def test_it_is_made_on_meta_and_materialized():
    with torch.device("meta"):
        module = PowerAttention(E, H, num_kv_heads=2)
    assert module(torch.empty(B, L, E, device="meta")).shape == (B, L, E)
    module = module.to_empty(device="cpu")
    module.reset_parameters()
    assert all(p.isfinite().all() for p in module.parameters())
    assert (module.gate_proj.weight == 0).all()
    assert torch.allclose(module.gate_proj.bias, torch.tensor(GATE_BIAS))


def test_its_state_dict_loads_into_another():
    first, second, x = made(), PowerAttention(E, H).double(), tokens()
    second.load_state_dict(first.state_dict())
    close(second(x), first(x))
    assert set(first.state_dict()) == {
        f"{name}_proj.{kind}" for name in ("q", "k", "v", "out", "gate") for kind in ("weight", "bias")
    }


@pytest.mark.slow
def test_compiled_without_a_break_it_is_the_same():
    module, x = made(num_kv_heads=2), tokens()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    close(compiled(x), module(x))
    with torch.no_grad():
        first, state = compiled(x[:, :7], return_state=True)
        close(torch.cat([first, compiled(x[:, 7:], state)], 1), module(x))


WRONG = {
    "sizes": ({"embed_dim": 25}, ValueError, "embed_dim must be a multiple of num_heads, got 25 and 4"),
    "key heads": ({"num_kv_heads": 3}, ValueError, "num_heads must be a multiple of num_kv_heads, got 4 and 3"),
    "no heads": ({"num_heads": 0}, ValueError, "num_heads must be at least 1, got 0"),
    "float": ({"num_kv_heads": 0.5}, TypeError, "num_kv_heads must be an int, got 0.5"),
    "degree": ({"degree": 3}, ValueError, "degree must be even and at least 2"),
    "odd head": ({"head_dim": 5}, ValueError, "head_dim must be even for rotary positions, got 5"),
    "base": ({"rope_base": -1.0}, ValueError, "rope_base must be positive and finite, got -1.0"),
    "share": ({"interpolate": 2}, ValueError, r"interpolate must lie in \[0, 1\], got 2"),
    "share's type": ({"interpolate": "half"}, TypeError, "interpolate must be a float, got 'half'"),
    "alpha": ({"alpha": 1.5}, ValueError, "alpha must lie strictly between 0 and 1, got 1.5"),
    "alphas": ({"alpha": torch.full((3,), 0.5)}, ValueError, r"a tensor alpha must have shape \(\) or \(4,\), got \(3,\)"),
    "chunk": ({"chunk_size": 0}, ValueError, "chunk_size must be at least 1"),
}


@pytest.mark.parametrize(("options", "kind", "message"), WRONG.values(), ids=WRONG)
def test_construction_says_what_is_wrong(options, kind, message):
    with pytest.raises(kind, match=f"PowerAttention: {message}"):
        PowerAttention(**{"embed_dim": E, "num_heads": H, **options})


def test_calls_say_what_is_wrong():
    module, x = made(), tokens()
    with pytest.raises(ValueError, match=r"x must have shape \(B, L, 24\), got \(2, 24\)"):
        module(x[:, 0])
    with pytest.raises(TypeError, match="state must be a PowerAttentionState, got tuple"):
        module(x, (1, 2))
    with pytest.raises(ValueError, match=r"key_padding_mask must be boolean \(B, L\) = \(2, 11\), got torch.int64"):
        module(x, key_padding_mask=torch.zeros(B, L, dtype=torch.int64))
    module.interpolate = 0.5
    with pytest.raises(ValueError, match=r"interpolate must be 1 for a call with a state, got 0\.5"):
        module(x, return_state=True)


def test_repr_shows_the_settings():
    assert "24, 4, num_kv_heads=2, degree=4, gate=True, rope_base=10000.0, interpolate=1.0" in repr(
        PowerAttention(E, H, num_kv_heads=2, degree=4)
    )
