"""diffmax.power: symmetric powers, the quadratic form, states, sums over time, decoding with a tail, layouts of others."""

import itertools
import math

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.functional import logsigmoid

import diffmax
from diffmax import power
from diffmax.operators.power import parts
from diffmax.testing import gates

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def random(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=torch.float64).to(dtype)


def inputs(length=7, many=9, size=5, values=3, heads=4, kv_heads=2, batch=2, dtype=torch.float64):
    """Queries, keys, values and log gates."""
    q, k = random(batch, heads, length, size, dtype=dtype), random(batch, kv_heads, many, size, dtype=dtype)
    return q, k, random(batch, kv_heads, many, values, dtype=dtype), logsigmoid(random(batch, kv_heads, many) + 1).to(dtype)


def by_loops(q, k, v, log_gates, degree, scale, is_causal=True):
    """Sums of w v and of w, as defined, one pair after the other."""
    sums, totals = q.new_zeros(*q.shape[:3], v.shape[3]), q.new_zeros(q.shape[:3])
    for b, h, i in itertools.product(*(range(n) for n in q.shape[:3])):
        own, place = h // (q.shape[1] // k.shape[1]), i + k.shape[2] - q.shape[2]
        for j in range(place + 1 if is_causal else k.shape[2]):
            w = (scale * q[b, h, i] @ k[b, own, j]) ** degree
            if log_gates is not None:
                between = log_gates[b, own, min(place, j) + 1 : max(place, j) + 1].sum()
                w = w * (between if j <= place else -between).exp()
            sums[b, h, i] += w * v[b, own, j]
            totals[b, h, i] += w
    return sums, totals


def close(ours, theirs):
    """Equal but for the order in which float64 is rounded."""
    return torch.allclose(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("size", "degree"), [(1, 1), (5, 1), (7, 2), (4, 3), (4, 4), (1, 6), (3, 6)])
def test_symmetric_powers_are_monomials_in_lexicographic_order(size, degree):
    x = random(2, size)
    which = list(itertools.combinations_with_replacement(range(size), degree))
    assert power.indices(size, degree).mT.tolist() == [list(index) for index in which]
    assert power.expanded_dim(size, degree) == len(which) == math.comb(size + degree - 1, degree)
    assert close(power.symmetric_power(x, degree), torch.stack([x[:, list(index)].prod(1) for index in which], 1))
    counts = [math.factorial(degree) / math.prod(math.factorial(index.count(i)) for i in range(size)) for index in which]
    assert power.multiplicities(size, degree).tolist() == counts


@pytest.mark.parametrize("degree", [1, 2, 3, 4, 6])
def test_their_products_are_powers_of_products(degree):
    x, y = random(2, 10, 5)
    both = power.symmetric_power(x, degree, multiplicities=True) * power.symmetric_power(y, degree)
    assert close(both.sum(-1), (x * y).sum(-1) ** degree)


def test_what_is_returned_may_be_changed():
    """The tables are kept: a caller who writes into one must not change what others get."""
    power.indices(4, 2).zero_()
    power.multiplicities(4, 2).zero_()
    assert power.indices(4, 2).sum() > 0
    assert power.multiplicities(4, 2).tolist() == [1, 2, 2, 2, 1, 2, 2, 1, 2, 1]


@pytest.mark.parametrize("degree", [2, 4, 6])
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("gated", [True, False])
def test_attention_is_what_it_says(degree, is_causal, gated):
    q, k, v, log_gates = inputs()
    log_gates = log_gates if gated else None
    sums, totals = power.attention(q, k, v, log_gates, degree=degree, scale=0.7, is_causal=is_causal, normalize=False)
    exact = by_loops(q, k, v, log_gates, degree, 0.7, is_causal)
    assert close(sums, exact[0])
    assert close(totals, exact[1])
    out = power.attention(q, k, v, log_gates, degree=degree, is_causal=is_causal)
    assert close(out, exact[0] / exact[1].unsqueeze(-1))
    if is_causal:
        assert close(out, diffmax.power_attention(q, k, v, log_gates, degree=degree))


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_is_as_accurate_as_the_reference(dtype):
    q, k, v, log_gates = inputs(40, 50, 16, 8, dtype=dtype)

    def reference(*given):
        return diffmax.power_attention(*given, backend="reference")

    ((exact, allowed),) = gates(reference, q, k, v, log_gates)
    out = power.attention(q, k, v, log_gates)
    assert out.dtype == dtype
    assert (out.double() - exact).abs().max() <= allowed


def test_unnormalised_attention_to_parts_of_the_keys_adds_up():
    q, k, v, _ = inputs()
    whole = power.attention(q, k, v, is_causal=False, normalize=False)
    halves = [power.attention(q, k[:, :, s], v[:, :, s], is_causal=False, normalize=False) for s in (slice(4), slice(4, 9))]
    assert all(close(a + b, c) for a, b, c in zip(*halves, whole, strict=True))


def test_queries_without_weights_give_zeros_and_no_gradient():
    q, k, v, _ = inputs()
    k = torch.zeros_like(k).requires_grad_()
    out = power.attention(q, k, v)
    assert not out.any()
    assert not torch.autograd.grad(out.sum(), k)[0].any()
    state = power.update_state(k, v)
    assert not power.query_state(q, state).any()


@pytest.mark.parametrize("degree", [2, 4])
@pytest.mark.parametrize("gated", [True, False])
def test_states_are_those_of_power_attention_and_continue(degree, gated):
    q, k, v, log_gates = inputs()
    log_gates = log_gates if gated else None
    _, exact = diffmax.power_attention(q, k, v, log_gates, degree=degree, return_final_state=True, backend="reference")
    at_once = power.update_state(k, v, log_gates, degree=degree)
    state = None
    for span in (slice(0, 4), slice(4, 4), slice(4, 9)):
        some = None if log_gates is None else log_gates[:, :, span]
        state = power.update_state(k[:, :, span], v[:, :, span], some, state, degree=degree)
    for found in (at_once, state):
        assert isinstance(found, diffmax.PowerState)
        assert close(found.sums, exact.sums)
        assert close(found.norm, exact.norm)


def test_many_keys_make_the_state_of_few_keys_after_one_another():
    """More than `parts.FEW` go through the operator, which holds no monomials of all of them."""
    _, k, v, log_gates = inputs(many=2 * parts.FEW + 3)
    at_once, state = power.update_state(k, v, log_gates), None
    for at in range(0, k.shape[2], parts.FEW):
        span = slice(at, at + parts.FEW)
        state = power.update_state(k[:, :, span], v[:, :, span], log_gates[:, :, span], state)
    assert all(close(a, b) for a, b in zip(at_once, state, strict=True))


@pytest.mark.parametrize("degree", [2, 4])
def test_a_query_reads_from_a_state_what_attention_to_its_keys_gives(degree):
    q, k, v, _ = inputs()
    state = power.update_state(k, v, degree=degree)
    assert close(power.query_state(q, state, degree=degree), power.attention(q, k, v, degree=degree, is_causal=False))
    for a, b in zip(
        power.query_state(q, state, degree=degree, scale=0.3, normalize=False),
        power.attention(q, k, v, degree=degree, scale=0.3, is_causal=False, normalize=False),
        strict=True,
    ):
        assert close(a, b)


def test_parts_of_half_precision_are_summed_in_float32():
    q, k, v, log_gates = inputs(dtype=torch.bfloat16)
    state = power.update_state(k, v, log_gates)
    assert state.sums.dtype == state.norm.dtype == torch.float32
    assert power.query_state(q, state).dtype == torch.bfloat16
    assert {t.dtype for t in power.query_state(q, state, normalize=False)} == {torch.float32}
    assert {t.dtype for t in power.attention(q, k, v, normalize=False)} == {torch.float32}


def test_autocast_does_not_round_what_is_summed():
    q, k, v, log_gates = inputs(dtype=torch.float32)
    exact = power.attention(q, k, v, log_gates, normalize=False), power.update_state(k, v, log_gates)
    with torch.autocast("cpu", torch.bfloat16):
        again = power.attention(q, k, v, log_gates, normalize=False), power.update_state(k, v, log_gates)
    assert all(torch.equal(a, b) for one, two in zip(exact, again, strict=True) for a, b in zip(one, two, strict=True))


def test_every_part_has_gradients_of_two_orders():
    q, k, v, log_gates = (t.requires_grad_() for t in inputs(3, 4, 3, 2, 2, 1, 1))
    state = tuple(t.detach().requires_grad_() for t in power.update_state(k, v, log_gates))
    functions = [
        (lambda x: power.symmetric_power(x, 3, True), (q,)),
        (lambda *a: power.attention(*a, scale=0.7, normalize=False), (q, k, v, log_gates)),
        (lambda *a: power.attention(*a, is_causal=False), (q, k, v, log_gates)),
        (lambda k, v, g, *s: power.update_state(k, v, g, s), (k, v, log_gates, *state)),
        (lambda q, *s: power.query_state(q, s), (q, *state)),
        (lambda q, *s: power.query_state(q, s, scale=0.7, normalize=False), (q, *state)),
    ]
    for function, given in functions:
        assert gradcheck(function, given)
        assert gradgradcheck(function, given)


@pytest.mark.parametrize("shape", [(2, 3, 5), (2, 3, 5, 4), (1, 2, 4, 3, 2), (1, 1, 1), (2, 1, 0, 3)])
def test_discumsum_is_a_sum_that_decays(shape):
    x, log_gates = random(*shape), logsigmoid(random(*shape[:3]))
    found = power.discumsum(x, log_gates)
    state = torch.zeros_like(found[:, :, 0])
    assert found.shape == (*shape[:2], shape[2] + 1, *shape[3:])
    assert not found[:, :, 0].any()
    for t in range(shape[2]):
        gate = log_gates[:, :, t].exp()
        state = state * gate.view(*gate.shape, *(1,) * (len(shape) - 3)) + x[:, :, t]
        assert close(found[:, :, t + 1], state)
    assert close(power.discumsum(x)[:, :, 1:], x.cumsum(2))


@pytest.mark.parametrize("shape", [(2, 1, 4), (1, 2, 3, 2), (1, 1, 1, 2)])
def test_discumsum_has_gradients_of_two_orders_also_for_gates_of_nought(shape):
    x, log_gates = random(*shape).requires_grad_(), logsigmoid(random(*shape[:3])).requires_grad_()
    assert gradcheck(power.discumsum, (x, log_gates))
    assert gradgradcheck(power.discumsum, (x, log_gates))
    shut = torch.full(shape[:3], -torch.inf, dtype=torch.float64, requires_grad=True)
    found = power.discumsum(x, shut)
    assert torch.equal(found[:, :, 1:], x)
    of_x, of_gates = torch.autograd.grad(found.sum(), (x, shut))
    assert torch.equal(of_x, torch.ones_like(x))
    assert not of_gates.any()


def test_discumsum_keeps_its_result_and_no_list_of_steps():
    x, log_gates = random(1, 2, 50, 30).requires_grad_(), logsigmoid(random(1, 2, 50)).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        found = power.discumsum(x, log_gates)
    assert sum(kept) <= found.numel() + log_gates.numel()


def test_discumsum_of_half_precision_does_not_stop_growing():
    """In float16, 2048 + 1 is 2048."""
    assert power.discumsum(torch.ones(1, 1, 4096, dtype=torch.float16))[0, 0, -1] == 4096


def test_states_of_chunks_summed_over_time_are_the_states_between_them():
    _, k, v, log_gates = inputs(many=12)
    chunks = [slice(at, at + 4) for at in range(0, 12, 4)]
    own = [power.update_state(k[:, :, c], v[:, :, c], log_gates[:, :, c]) for c in chunks]
    passed = torch.stack([log_gates[:, :, c].sum(-1) for c in chunks], 2)
    found = power.discumsum(torch.stack([s.sums for s in own], 2), passed)
    for index in range(3):
        before = power.update_state(k[:, :, : 4 * index], v[:, :, : 4 * index], log_gates[:, :, : 4 * index])
        assert close(found[:, :, index], before.sums)
    assert close(found[:, :, 3], power.update_state(k, v, log_gates).sums)


@pytest.mark.parametrize("degree", [2, 4])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("switch_over", [1, 3, 100, None])
def test_decoding_step_by_step_is_attention_at_once(degree, gated, switch_over):
    q, k, v, log_gates = inputs(10, 10, kv_heads=2)
    log_gates = log_gates if gated else None
    exact = diffmax.power_attention(q, k, v, log_gates, degree=degree)
    tail, state, folds = (k[:, :, :0], v[:, :, :0], None if log_gates is None else log_gates[:, :, :0]), None, 0
    for span in (slice(0, 4), *(slice(t, t + 1) for t in range(4, 10))):
        new = (k[:, :, span], v[:, :, span], None if log_gates is None else log_gates[:, :, span])
        tail = [None if old is None else torch.cat([old, t], 2) for old, t in zip(tail, new, strict=True)]
        step = power.inference(q[:, :, span], *tail, state, degree=degree, switch_over=switch_over)
        assert close(step.out, exact[:, :, span])
        folds += step.key.shape[2] == 0
        tail, state = (step.key, step.value, step.log_gates), step.state
    assert folds == {1: 7, 3: 3, 100: 0, None: 0}[switch_over]
    assert (state is None) == (folds == 0)


def test_decoding_without_a_tail_reads_the_state():
    q, k, v, _ = inputs(1)
    state = power.update_state(k, v)
    step = power.inference(q, None, None, state=tuple(state))
    assert close(step.out, power.query_state(q, state))
    assert isinstance(step.state, diffmax.PowerState)
    assert step.key is step.value is step.log_gates is None


# layouts


def rows_of_blocks(k):
    """phi(k) of the reference code for blocks of 16 x 8, one entry after the other."""
    found = []
    for y in range(len(k) // 16):
        for x in range(len(k) // 8):
            if x * 8 < (y + 1) * 16:
                factor = 1 if (x + 1) * 8 > y * 16 else 2
                found += [factor * k[x * 8 + o] * k[y * 16 + i] for o in range(8) for i in range(16)]
    return torch.stack(found)


def rows_of_tiles(k, degree, tile):
    """phi(k) of vidrial's reference code: tiles in the order of its counter, each a dense product times a square root."""
    found, many = [], len(k) // tile
    for tiles in itertools.combinations_with_replacement(range(many), degree):
        orders = math.factorial(degree) // math.prod(math.factorial(tiles.count(t)) for t in range(many))
        for inside in itertools.product(range(tile), repeat=degree):
            found.append(math.sqrt(orders) * math.prod(k[t * tile + i] for t, i in zip(tiles, inside, strict=True)))
    return torch.stack(found)


@pytest.mark.parametrize("size", [16, 48])
def test_blocks_are_those_of_the_reference_code(size):
    k, v = random(1, 1, 1, size), random(1, 1, 1, 3)
    sums, norm = power.to_tiled(power.update_state(k, v), size)
    assert torch.equal(norm[0, 0], rows_of_blocks(k[0, 0, 0]))
    assert close(sums[0, 0], norm[0, 0].unsqueeze(1) * v[0, 0])
    assert norm.shape[2] == power.tiled_dim(size) == 256 * math.comb(size // 16 + 1, 2)


@pytest.mark.parametrize(("size", "degree", "tile"), [(8, 2, 4), (8, 4, 2), (6, 2, 1), (4, 4, 1), (8, 2, 8)])
def test_tiles_are_those_of_vidrial(size, degree, tile):
    k, v = random(1, 1, 1, size), random(1, 1, 1, 3)
    sums, norm = power.to_tiled(power.update_state(k, v, degree=degree), size, degree, tile)
    assert close(norm[0, 0], rows_of_tiles(k[0, 0, 0], degree, tile))
    assert close(sums[0, 0], norm[0, 0].unsqueeze(1) * v[0, 0])
    assert norm.shape[2] == power.tiled_dim(size, degree, tile)


@pytest.mark.parametrize("size", [16, 32, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_state_in_blocks_and_back_is_the_same_to_the_bit(size, dtype):
    state = power.update_state(random(1, 2, 9, size, dtype=dtype), random(1, 2, 9, 3, dtype=dtype))
    again = power.from_tiled(*power.to_tiled(state, size), size)
    assert torch.equal(again.sums, state.sums)
    assert torch.equal(again.norm, state.norm)


@pytest.mark.parametrize(("size", "degree", "tile"), [(16, 2, 4), (8, 4, 2), (6, 2, 1), (9, 2, 3)])
def test_a_state_in_tiles_and_back_is_the_same_but_for_a_rounded_factor(size, degree, tile):
    state = power.update_state(random(1, 2, 9, size), random(1, 2, 9, 3), degree=degree)
    again = power.from_tiled(*power.to_tiled(state, size, degree, tile), size, degree, tile)
    for ours, exact in zip(again, state, strict=True):
        assert ((ours - exact).abs() <= 2 * torch.finfo(torch.float64).eps * exact.abs()).all()


@pytest.mark.parametrize(("degree", "tile"), [(2, None), (2, 4), (2, 1), (4, 4)])
def test_queries_read_from_any_tiled_state_what_they_read_there(degree, tile):
    """Also from one whose copies of a monomial differ, which no keys have made."""
    size = 16 if degree == 2 else 8
    rows = power.tiled_dim(size, degree, tile)
    sums, norm, q = random(1, 1, rows, 3), random(1, 1, rows), random(1, 1, 5, size)
    phi = torch.stack([rows_of_blocks(x) if tile is None else rows_of_tiles(x, degree, tile) for x in q[0, 0]])
    if tile is None:  # there the factor stands on the keys' side alone
        ones = power.to_tiled((torch.ones(size * (size + 1) // 2, 1), torch.ones(size * (size + 1) // 2)), size)[1]
        phi = phi / ones
    read, total = power.query_state(
        q, power.from_tiled(sums, norm, size, degree, tile), degree=degree, scale=1.0, normalize=False
    )
    assert close(read[0, 0], phi @ sums[0, 0])
    assert close(total[0, 0], phi @ norm[0, 0])


def test_layouts_have_gradients_of_two_orders_and_any_leading_dimensions():
    state = tuple(t.requires_grad_() for t in (random(2, 10, 3), random(2, 10)))
    tiled = tuple(t.detach().requires_grad_() for t in power.to_tiled(state, 4, 2, 2))
    assert gradcheck(lambda *s: power.to_tiled(s, 4, 2, 2), state)
    assert gradcheck(lambda *s: power.from_tiled(*s, 4, 2, 2), tiled)
    assert gradgradcheck(lambda *s: power.from_tiled(*s, 4, 2, 2), tiled)
    sums, norm = power.to_tiled((random(2, 3, 1, 136, 4), random(2, 3, 1, 136)), 16)
    assert (sums.shape, norm.shape) == ((2, 3, 1, 256, 4), (2, 3, 1, 256))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_tiled_states_of_half_precision_become_float32(dtype):
    found = power.from_tiled(torch.ones(1, 256, 2, dtype=dtype), torch.ones(1, 256), 16)
    assert found.sums.dtype == found.norm.dtype == torch.float32


X = torch.zeros(1, 2, 4, 3)
STATE = (torch.zeros(1, 2, 6, 3), torch.zeros(1, 2, 6))
WRONG = [
    (TypeError, "symmetric_power: x must be float16", lambda: power.symmetric_power(torch.ones(3, dtype=torch.int64))),
    (ValueError, r"x must have a last dimension of at least 1, got \(2, 0\)", lambda: power.symmetric_power(torch.ones(2, 0))),
    (TypeError, "symmetric_power: degree must be an int, got 2.0", lambda: power.symmetric_power(X, 2.0)),
    (ValueError, "symmetric_power: degree must be at least 1, got 0", lambda: power.symmetric_power(X, 0)),
    (TypeError, "multiplicities must be True or False, got 1", lambda: power.symmetric_power(X, 2, 1)),
    (TypeError, "expanded_dim: size must be an int, got 'x'", lambda: power.expanded_dim("x")),
    (ValueError, "indices: size must be at least 1, got 0", lambda: power.indices(0)),
    (ValueError, "multiplicities: degree must be at least 1, got -1", lambda: power.multiplicities(2, -1)),
    (ValueError, "power.attention: degree must be even", lambda: power.attention(X, X, X, degree=3)),
    (TypeError, "power.attention: is_causal must be True or False, got None", lambda: power.attention(X, X, X, is_causal=None)),
    (TypeError, "normalize must be True or False, got 'no'", lambda: power.attention(X, X, X, normalize="no")),
    (ValueError, "at least as many keys as queries, got 3 keys and 4", lambda: power.attention(X, X[:, :, :3], X[:, :, :3])),
    (ValueError, "query heads must be a multiple", lambda: power.attention(X, X.repeat(1, 2, 1, 1), X.repeat(1, 2, 1, 1))),
    (ValueError, "log_gates must have a number for each key", lambda: power.attention(X, X, X, X[..., 0, 0])),
    (ValueError, "update_state: key and value must have the same length", lambda: power.update_state(X, X[:, :, :2])),
    (TypeError, "update_state: initial_state must be a PowerState", lambda: power.update_state(X, X, None, X)),
    (ValueError, "update_state: initial_state.sums must have shape", lambda: power.update_state(X, X, None, (X, X[..., 0]))),
    (ValueError, r"query_state: query must have 4 dimensions .* got \(4, 3\)", lambda: power.query_state(X[0, 0], STATE)),
    (TypeError, "query_state: state must be a PowerState or a pair", lambda: power.query_state(X, X)),
    (ValueError, "state.sums must have 4 dimensions", lambda: power.query_state(X, (X[0], X[0]))),
    (ValueError, "query heads must be a multiple", lambda: power.query_state(X[:, :1], STATE)),
    (ValueError, "must have shape .* for heads of 3 entries and degree 4", lambda: power.query_state(X, STATE, degree=4)),
    (TypeError, "discumsum: x must be float16", lambda: power.discumsum(torch.ones(1, 1, 1, dtype=torch.int32))),
    (ValueError, r"discumsum: x must have 3 dimensions \(B, H, T, ...\) or more", lambda: power.discumsum(X[0, 0])),
    (TypeError, "log_gates must be a floating tensor or None, got list", lambda: power.discumsum(X, [0.0])),
    (
        ValueError,
        r"log_gates must have shape \(B, H, T\) = \(1, 2, 4\), got \(1, 4, 2\)",
        lambda: power.discumsum(X, X[..., 0].mT),
    ),
    (ValueError, "inference: key and value must be given both or neither", lambda: power.inference(X, X, None)),
    (ValueError, "inference: there must be a tail or a state, got neither", lambda: power.inference(X, None, None)),
    (ValueError, "log_gates are of a tail", lambda: power.inference(X, None, None, X[..., 0], STATE)),
    (TypeError, "switch_over must be an int or None, got 1.5", lambda: power.inference(X, X, X, switch_over=1.5)),
    (ValueError, "switch_over must be at least 1", lambda: power.inference(X, X, X, switch_over=0)),
    (ValueError, "tiled_dim: size must be a multiple of the tile, 16, got 24", lambda: power.tiled_dim(24)),
    (ValueError, "tiled_dim: the layout of blocks has degree 2 alone, got 4", lambda: power.tiled_dim(32, 4)),
    (ValueError, "tiled_dim: size must be a multiple of the tile, 8, got 20", lambda: power.tiled_dim(20, 2, 8)),
    (TypeError, "tiled_dim: tile must be an int, got 'x'", lambda: power.tiled_dim(16, 2, "x")),
    (ValueError, "tiled_dim: tile must be at least 1, got 0", lambda: power.tiled_dim(16, 2, 0)),
    (TypeError, "to_tiled: state must be a PowerState or a pair", lambda: power.to_tiled(X, 16)),
    (TypeError, "to_tiled: state.norm must be a floating tensor, got list", lambda: power.to_tiled((X, [1.0]), 16)),
    (ValueError, r"to_tiled: .* must have shapes \(..., 136, D_v\) and", lambda: power.to_tiled(STATE, 16)),
    (ValueError, r"from_tiled: sums and norm must have shapes \(..., 256, D_v\)", lambda: power.from_tiled(*STATE, 16)),
]


@pytest.mark.parametrize(("error", "words", "call"), WRONG, ids=[words[:40] for _, words, _ in WRONG])
def test_says_what_is_wrong(error, words, call):
    with pytest.raises(error, match=words):
        call()
