"""Threshold attention: its gradients, its members, and calls of every shape."""

import math

import pytest
import torch
from torch.nn.functional import normalize, scaled_dot_product_attention

import diffmax
from diffmax.errors import NoBackendError

BACKENDS = ("reference", "cpu", "numba")


def heads(*shape, dtype=torch.float64, grad=False):
    return torch.randn(*shape, dtype=dtype, requires_grad=grad)


def naive(q, k, v, theta, bias=None, weights="scores", power=1.0, causal=True, alpha=0.5):
    """The definition, query by query."""
    heads_q, length, many = q.shape[1], q.shape[2], k.shape[2]
    k, v = (t.repeat_interleave(heads_q // k.shape[1], 1) for t in (k, v))
    out = torch.zeros(*q.shape[:3], v.shape[3], dtype=q.dtype)
    for b, h, i in torch.cartesian_prod(*(torch.arange(n) for n in (q.shape[0], heads_q, length))).tolist():
        at = i + many - length
        seen = list(range(max(at + 1, 0))) if causal else list(range(many))
        if not seen:
            continue
        s = k[b, h, seen] @ q[b, h, i] / math.sqrt(q.shape[3])
        if bias is not None:
            s = s + torch.stack([bias[h, at - j] if 0 <= at - j < bias.shape[1] else s.new_zeros(()) for j in seen])
        u = s.softmax(0) if weights == "softmax" else diffmax.diffmax_bisect(s, alpha) if weights == "diffmax" else s
        out[b, h, i] = (u - theta[b, h, i]).clamp_min(0).pow(power) @ v[b, h, seen]
    return out


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("weights", "power"), [("scores", 1.0), ("scores", 1.5), ("softmax", 2.0), ("diffmax", 1.0)])
def test_follows_its_definition(backend, causal, weights, power):
    for length, many in ((6, 6), (2, 7), (5, 3)):
        q, k, v = heads(2, 4, length, 4), heads(2, 2, many, 4), heads(2, 2, many, 3)
        theta, bias = torch.rand(2, 4, length).double() * 0.3 - 0.1, heads(4, 4)
        options = {
            "weights": weights,
            "power": power,
            "is_causal": causal,
            "bias": bias,
            "alpha": 0.5 if weights == "diffmax" else None,
        }
        out = diffmax.threshold_attention(q, k, v, theta, backend=backend, **options)
        torch.testing.assert_close(out, naive(q, k, v, theta, bias, weights, power, causal))


@pytest.mark.parametrize("weights", ["scores", "softmax", "diffmax"])
def test_gradients_are_right_to_second_order(weights):
    given = [heads(1, 2, 3, 2, grad=True), heads(1, 1, 4, 2, grad=True), heads(1, 1, 4, 2, grad=True)]
    given += [(torch.rand(1, 2, 3) * 0.1).double().requires_grad_(), heads(2, 3, grad=True)]

    def run(q, k, v, theta, bias):
        options = {
            "weights": weights,
            "power": 3.0,
            "bias": bias,
            "alpha": 0.5 if weights == "diffmax" else None,
            "return_mass": True,
            "backend": "cpu",
        }
        return diffmax.threshold_attention(q, k, v, theta, **options)

    assert torch.autograd.gradcheck(run, given)
    assert torch.autograd.gradgradcheck(run, given)


@pytest.mark.slow
def test_a_learned_number_of_heads_gets_its_gradient():
    q, k, v = (heads(2, 3, 5, 4) for _ in range(3))
    for shape in ((), (3,), (3, 1), (1, 5), (2, 1, 5)):
        theta = torch.full(shape, 0.1).double().requires_grad_()
        assert torch.autograd.gradcheck(lambda t: diffmax.threshold_attention(q, k, v, t, power=2.0), theta)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_alpha_per_head_is_each_heads_own(backend):
    q, k, v = heads(2, 4, 12, 8), heads(2, 2, 12, 8), heads(2, 2, 12, 8)
    alphas = (0.25, 0.5, 0.8, 0.95)
    options = {"weights": "diffmax", "return_mass": True, "backend": backend}
    out, mass = diffmax.threshold_attention(q, k, v, 0.02, alpha=torch.tensor(alphas).double(), **options)
    for head, alpha in enumerate(alphas):
        pair = (t[:, head // 2, None] for t in (k, v))
        alone = diffmax.threshold_attention(q[:, head, None], *pair, 0.02, alpha=alpha, **options)
        torch.testing.assert_close((out[:, head], mass[:, head]), tuple(t[:, 0] for t in alone))


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_alpha_gets_its_gradient_to_second_order(backend):
    q, k, v = (heads(1, 2, 4, 2, grad=True) for _ in range(3))
    for alpha in (torch.tensor(0.6), torch.tensor([0.5, 0.8])):
        alpha = alpha.double().requires_grad_()

        def run(q, k, v, alpha):
            options = {"weights": "diffmax", "alpha": alpha, "power": 3.0, "return_mass": True, "backend": backend}
            return diffmax.threshold_attention(q, k, v, 0.05, **options)

        assert torch.autograd.gradcheck(run, (q, k, v, alpha))
        assert torch.autograd.gradgradcheck(run, (q, k, v, alpha))


@pytest.mark.slow
def test_a_learned_alpha_goes_where_its_gradient_is_computed():
    """A kernel without it is left out by what it claims."""
    from diffmax.kernels.capability import THRESHOLD

    assert "tensor_alpha" not in THRESHOLD
    x, alpha = torch.randn(1, 2, 6, 4), torch.tensor([0.5, 0.8], requires_grad=True)
    text = str(diffmax.explain("threshold_attention", x, x, x, 0.1, weights="diffmax", alpha=alpha))
    for call in ("needs tensor_alpha, threshold_diffmax", "needs alpha_gradient, tensor_alpha, threshold_diffmax"):
        assert f"{call}: numba, by priority" in text
    out = diffmax.lazy_attention(x, x, x, None, -0.5, weights="diffmax", alpha=alpha)
    assert torch.autograd.grad(out.sum(), alpha)[0].abs().min() > 0


@pytest.mark.sampled(9)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("weights", ["scores", "softmax", "diffmax"])
@pytest.mark.parametrize(
    ("window", "causal"), [((5, 0), False), ((5, -1), True), ((3, 2), False), ((-1, 4), False), ((0, 0), True)]
)
def test_a_window_is_a_mask(backend, weights, window, causal):
    """Over several blocks of queries, with fewer and more keys; gradients too."""
    for length, many in ((300, 300), (40, 60), (60, 40)):
        given = [
            heads(1, 4, length, 4),
            heads(1, 2, many, 4),
            heads(1, 2, many, 4),
            torch.rand(4, length).double() * 0.1,
            heads(4, 7),
        ]
        distance = torch.arange(length)[:, None] + many - length - torch.arange(many)
        left, right = window[0], 0 if causal else window[1]
        seen = torch.ones_like(distance, dtype=torch.bool)
        seen &= (distance <= left) | (left < 0)
        seen &= (distance >= -right) | (right < 0)
        found = []
        for options in ({"window_size": window, "is_causal": causal}, {"attn_mask": seen, "is_causal": False}):
            leaves = [t.clone().requires_grad_() for t in given]
            options |= {
                "weights": weights,
                "alpha": 0.5 if weights == "diffmax" else None,
                "backend": backend,
                "return_mass": True,
            }
            results = diffmax.threshold_attention(*leaves[:4], bias=leaves[4], **options)
            found.append((*results, *torch.autograd.grad([t.square().sum() for t in results], leaves)))
        for ours, theirs in zip(*found, strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.slow
def test_transforms():
    q, k, v = (heads(3, 1, 2, 5, 4) for _ in range(3))
    theta = torch.rand(3, 2, 5).double() * 0.1

    def run(q, k, v, theta):
        return diffmax.threshold_attention(q, k, v, theta, power=2.0)

    each = torch.stack([run(*rows) for rows in zip(q, k, v, theta, strict=True)])
    torch.testing.assert_close(torch.vmap(run)(q, k, v, theta), each)
    slopes = torch.func.vmap(torch.func.grad(lambda *given: run(*given).square().sum()))(q, k, v, theta)
    leaf = q.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(sum(run(*rows).square().sum() for rows in zip(leaf, k, v, theta, strict=True)), leaf)
    torch.testing.assert_close(slopes, wanted)
    _, tangent = torch.func.jvp(lambda t: run(t, k[0], v[0], theta[0]), (q[0],), (torch.ones_like(q[0]),))
    step = 1e-6 * torch.ones_like(q[0])
    near = (run(q[0] + step, k[0], v[0], theta[0]) - run(q[0] - step, k[0], v[0], theta[0])) / 2e-6
    torch.testing.assert_close(tangent, near, rtol=1e-5, atol=1e-6)


def test_packed_sequences_are_sequences():
    q, k, v = heads(8, 4, 4, grad=True), heads(10, 2, 4, grad=True), heads(10, 2, 3, grad=True)
    ends_q, ends_k = torch.tensor([0, 4, 4, 8]).int(), torch.tensor([0, 6, 7, 10]).int()
    theta = (torch.rand(4, 8).double() * 0.1).requires_grad_()
    grads = []
    for backend in BACKENDS:
        out = diffmax.threshold_attention_varlen(
            q, k, v, theta, ends_q, ends_k, 5, 6, weights="softmax", bias=torch.ones(4, 3).double(), backend=backend
        )
        one = diffmax.threshold_attention(
            *(t[None].transpose(1, 2) for t in (q[4:8], k[7:10], v[7:10])), theta[:, 4:8], weights="softmax",
            bias=torch.ones(4, 3).double(),
        )  # fmt: skip
        torch.testing.assert_close(out[4:8], one[0].transpose(0, 1))
        grads.append(torch.autograd.grad(out.square().sum(), (q, k, v, theta)))
    for exact, *others in zip(*grads, strict=True):
        for found in others:
            torch.testing.assert_close(found, exact)


# the members of the family


def test_the_root_is_diffmax_attention():
    q, k, v = (heads(2, 3, 20, 8) for _ in range(3))
    wanted, stats = diffmax.attention(q, k, v, is_causal=True, alpha=0.5, return_stats=True, backend="cpu")
    scale = 1 / math.sqrt(8)
    found, mass = diffmax.threshold_attention(q, k, v, 0.5 * stats.tau, power=2, scale=0.5 * scale, return_mass=True)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(mass, torch.ones_like(mass))


def test_zero_under_diffmax_is_diffmax_and_under_softmax_is_softmax():
    q, k, v = (heads(2, 3, 20, 8) for _ in range(3))
    found = diffmax.threshold_attention(q, k, v, 0.0, weights="diffmax", alpha=0.7)
    torch.testing.assert_close(found, diffmax.attention(q, k, v, is_causal=True, alpha=0.7, backend="cpu"))
    found = diffmax.threshold_attention(q, k, v, 0.0, weights="softmax")
    torch.testing.assert_close(found, scaled_dot_product_attention(q, k, v, is_causal=True))


@pytest.mark.parametrize("degree", [2, 4])
def test_an_even_power_of_both_signs_is_power_attention(degree):
    q, k, v = (heads(2, 3, 20, 8) for _ in range(3))
    parts = [diffmax.threshold_attention(s * q, k, v, 0.0, power=degree, return_mass=True) for s in (1, -1)]
    found = (parts[0][0] + parts[1][0]) / (parts[0][1] + parts[1][1]).unsqueeze(3)
    torch.testing.assert_close(found, diffmax.power_attention(q, k, v, degree=degree, backend="cpu"))
    q, k = q.abs(), k.abs()  # no product is negative: one part is all
    found = diffmax.threshold_attention(q, k, v, 0.0, power=degree, normalize=True)
    torch.testing.assert_close(found, diffmax.power_attention(q, k, v, degree=degree, backend="cpu"))


def test_rectified_scores():
    q, k, v = (heads(2, 3, 20, 8) for _ in range(3))
    wanted = (q @ k.mT / math.sqrt(8)).relu().tril() @ v
    torch.testing.assert_close(diffmax.threshold_attention(q, k, v, 0.0), wanted)


def published_lazy(q, k, v, bias, tau):
    length = q.shape[2]
    distance = torch.arange(length)[:, None] - torch.arange(length)
    added = bias[:, distance.clamp(0, bias.shape[1] - 1)].masked_fill((distance < 0) | (distance >= bias.shape[1]), 0.0)
    s = (q @ k.mT / math.sqrt(q.shape[3]) + added).masked_fill(distance < 0, -torch.inf)
    rows = torch.arange(1, length + 1).double()[:, None]
    return (s.softmax(3) + tau.view(-1, 1, 1) / rows).relu().tril() @ v


def test_softmax_and_a_threshold_by_row_is_lazy_attention():
    q, k, v, bias = heads(2, 3, 20, 8), heads(2, 3, 20, 8), heads(2, 3, 20, 8), heads(3, 6)
    tau = torch.tensor([-1.0, -0.5, 0.3]).double()
    wanted = published_lazy(q, k, v, bias, tau)
    torch.testing.assert_close(diffmax.lazy_attention(q, k, v, bias, tau, 6, first_row="published"), wanted)
    theta = -tau.view(3, 1) / torch.arange(1, 21)
    torch.testing.assert_close(diffmax.threshold_attention(q, k, v, theta, weights="softmax", bias=bias), wanted)


def test_an_analytic_threshold_is_threshold_differential_attention():
    q1, q2, k1, k2, v = (heads(2, 3, 20, 8) for _ in range(5))
    beta, share = torch.tensor([0.1, 0.3, 0.5]).double().requires_grad_(), torch.tensor(0.4).double().requires_grad_()
    rows = torch.arange(1, 21).double()
    theta = beta.view(3, 1, 1) * (2 * (rows + 1).log() / 8).sqrt().view(20, 1)
    maps = [(normalize(q, dim=-1) @ normalize(k, dim=-1).mT - theta).relu().square().tril() for q, k in ((q1, k1), (q2, k2))]
    wanted = (maps[0] - share * maps[1]) @ v
    found = diffmax.threshold_differential_attention(q1, q2, k1, k2, v, beta, share)
    torch.testing.assert_close(found, wanted)
    ours, theirs = (torch.autograd.grad(out.square().sum(), (beta, share)) for out in (found, wanted))
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(diffmax.threshold_rectified_attention(q1, k1, v, beta), maps[0] @ v)


# what is hidden, empty, or not a number


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("weights", ["scores", "softmax", "diffmax"])
def test_a_hidden_key_has_no_weight_below_any_threshold(backend, weights):
    q, k, v = (heads(2, 2, 9, 4, grad=True) for _ in range(3))
    mask = torch.ones(2, 1, 9, 9, dtype=torch.bool)
    mask[0, :, 4] = False
    out, mass = diffmax.threshold_attention(q, k, v, -1.0, weights=weights, attn_mask=mask, return_mass=True, backend=backend)
    assert not out[0, :, 4].any()
    assert not mass[0, :, 4].any()
    grads = torch.autograd.grad(out[:, :, :5].sum(), (q, k, v))
    assert all(g.isfinite().all() for g in grads)
    assert not grads[2][:, :, 5:].any()
    assert not grads[1][:, :, 5:].any()


def test_empty_calls_and_one_token():
    for shape in ((0, 2, 5, 8), (1, 2, 0, 8), (1, 0, 5, 8), (1, 2, 1, 8)):
        x = heads(*shape, grad=True)
        for backend in BACKENDS:
            out = diffmax.threshold_attention(x, x, x, 0.1, weights="softmax", backend=backend)
            assert torch.autograd.grad(out.sum(), x)[0].shape == shape
    assert not diffmax.threshold_attention(heads(1, 2, 3, 4), heads(1, 2, 0, 4), heads(1, 2, 0, 4), 0.1).any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_spoils_its_query(backend):
    q, k, v = (heads(1, 1, 6, 4) for _ in range(3))
    q[0, 0, 3, 0] = torch.nan
    out = diffmax.threshold_attention(q, k, v, 0.1, backend=backend)
    assert out.isnan().any(3).flatten().tolist() == [False, False, False, True, False, False]


def test_many_keys_take_several_blocks():
    q, k, v = heads(1, 4, 300, 8, grad=True), heads(1, 2, 300, 8, grad=True), heads(1, 2, 300, 8, grad=True)
    bias = heads(4, 150, grad=True)
    results = []
    for backend in BACKENDS:
        out = diffmax.threshold_attention(q, k, v, 0.02, weights="softmax", bias=bias, backend=backend)
        results.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v, bias))))
    for exact, *others in zip(*results, strict=True):
        for found in others:
            torch.testing.assert_close(found, exact)


def test_compiles():
    x = torch.randn(1, 2, 20, 8)
    compiled = torch.compile(
        lambda x: diffmax.lazy_attention(x, x, x, torch.zeros(2, 4), -0.5), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(x), diffmax.lazy_attention(x, x, x, torch.zeros(2, 4), -0.5))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"weights": "sigmoid"}, "weights must be one of scores, softmax, diffmax, got 'sigmoid'"),
        (
            {"alpha": torch.full((2,), 0.5)},
            r"""weights must be "diffmax" with an alpha, got 'scores' and a tensor of shape \(2,\)""",
        ),
        (
            {"alpha": torch.full((3,), 0.5), "weights": "diffmax"},
            r"alpha must be a float or of shape \(\) or \(2,\), got shape",
        ),
        ({"alpha": 0.9, "weights": "softmax"}, "weights must be \"diffmax\" with an alpha, got 'softmax' and 0.9"),
        ({"power": 0}, "power must be positive and finite, got 0"),
        ({"threshold": torch.zeros(6)}, r"threshold must be a float, or have shape .*got \(6,\)\nfor one per query"),
        ({"bias": torch.zeros(3, 4)}, r"bias must have a number per head and distance, .* H = 2, got \(3, 4\)"),
        ({"attn_mask": torch.zeros(6, 6)}, "attn_mask must be a boolean tensor"),
        ({"window_size": 4}, r"window_size must be a pair of ints \(left, right\), got 4"),
        ({"is_causal": 1}, "is_causal must be True or False, got 1"),
        ({"backend": "nope"}, "no backend is named 'nope'"),
    ],
)
def test_says_what_is_wrong(options, says):
    x = torch.randn(1, 2, 6, 4)
    with pytest.raises((TypeError, ValueError, NoBackendError), match=says):
        diffmax.threshold_attention(x, x, x, **{"threshold": 0.1, **options})


@pytest.mark.parametrize("backend", ["reference", "cpu", "numba"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_small_weights_are_divided_by_mass_before_they_are_rounded(dtype, backend):
    """In float16 the weights, of 1e-9, were 0 before they were divided, and gradients overflowed."""
    if backend == "numba":
        pytest.importorskip("numba", reason="needs Numba: pip install numba")
    query, key, value = (torch.randn(1, 2, 200, 32).to(dtype).requires_grad_() for _ in range(3))
    options = {"weights": "softmax", "power": 4, "normalize": True}
    out = diffmax.threshold_attention(query, key, value, 0.0, **options, backend=backend)
    exact = diffmax.threshold_attention(query.double(), key.double(), value.double(), 0.0, **options, backend="reference")
    assert (out - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max()
    grads = torch.autograd.grad(out.sum(), (query, key, value))
    for grad, wanted in zip(grads, torch.autograd.grad(exact.sum(), (query, key, value)), strict=True):
        assert (grad - wanted).abs().max() <= 2 * torch.finfo(dtype).eps * wanted.abs().max()


@pytest.mark.parametrize("backend", ["reference", "cpu", "numba"])
@pytest.mark.parametrize("weights", ["softmax", "diffmax", "scores"])
def test_a_query_whose_visible_scores_are_all_minus_infinity_has_no_weights(weights, backend):
    """Not even where the threshold is negative: the backends differed."""
    if backend == "numba":
        pytest.importorskip("numba", reason="needs Numba: pip install numba")
    query, key, value = (torch.randn(1, 2, 6, 4, requires_grad=True) for _ in range(3))
    bias = torch.zeros(2, 6)
    bias[0] = -torch.inf
    options = {"weights": weights, "bias": bias, "return_mass": True, "backend": backend}
    out, mass = diffmax.threshold_attention(query, key, value, -0.3, **options)
    assert (out[:, 0] == 0).all()
    assert (mass[:, 0] == 0).all()
    assert weights == "scores" or (mass[:, 1] > 0).all()
    for grad in torch.autograd.grad(out.sum() + mass.sum(), (query, key, value)):
        assert (grad[:, 0] == 0).all()
        assert grad[:, 1].isfinite().all()


@pytest.mark.parametrize(
    ("size", "dtype"),
    [
        (1e4, torch.float16),
        (1e-7, torch.float16),
        (1e-9, torch.float32),
        (1e19, torch.float32),
        (2e-38, torch.float32),
        (1e200, torch.float64),
    ],
    ids=str,
)
def test_cosines_are_of_directions_whatever_the_norm(size, dtype):
    t = torch.full((1, 1, 1, 64), size, dtype=dtype)
    _, mass = diffmax.threshold_rectified_attention(t, t, t, 0.0, return_mass=True)
    assert mass.item() == pytest.approx(1, abs=1e-6)
    assert diffmax.threshold_rectified_attention(0 * t, 0 * t, t, 0.0).abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_cosines_of_16_bits_are_rounded_once(dtype):
    q, k, v = (t.to(dtype) for t in torch.randn(3, 1, 2, 100, 64).unbind())
    exact = diffmax.threshold_rectified_attention(q.double(), k.double(), v.double(), 0.5)
    out = diffmax.threshold_rectified_attention(q, k, v, 0.5)
    assert out.dtype == dtype
    assert (out.double() - exact).norm() < 1.1 * (exact.to(dtype).double() - exact).norm()
    exact = diffmax.threshold_differential_attention(q.double(), k.double(), k.double(), q.double(), v.double(), 0.5, 0.9)
    out = diffmax.threshold_differential_attention(q, k, k, q, v, 0.5, 0.9)
    assert out.dtype == dtype
    assert (out.double() - exact).norm() < 1.1 * (exact.to(dtype).double() - exact).norm()


def test_the_members_are_converted_under_autocast_as_threshold_attention_is():
    q, k, v = torch.randn(3, 1, 2, 6, 4).unbind()
    ends = torch.tensor([0, 6], dtype=torch.int32)
    packed = [t[0].transpose(0, 1) for t in (q, k, v)]
    with torch.autocast("cpu", torch.bfloat16):
        outs = (
            diffmax.lazy_attention(q.bfloat16(), k, v, None, -0.5),
            diffmax.lazy_attention_varlen(packed[0].bfloat16(), *packed[1:], None, -0.5, ends, ends, 6, 6),
            diffmax.threshold_rectified_attention(q.bfloat16(), k, v, 0.5),
            diffmax.threshold_differential_attention(q.bfloat16(), q, k, k, v, 0.5, 0.2),
        )
    assert [out.dtype for out in outs] == [torch.bfloat16] * 4


def _maps(change):
    q, k, v = torch.randn(3, 1, 2, 6, 4).unbind()
    given = {"q1": q, "q2": q, "k1": k, "k2": k, "v": v, "beta": 0.1, "lambda_": 0.5} | change
    return lambda: diffmax.threshold_differential_attention(**given)


@pytest.mark.parametrize(
    ("change", "kind", "says"),
    [
        (
            {"q2": torch.randn(1, 2, 1, 4)},
            ValueError,
            r"attention: q1 and q2 must have the same shape but for the last size, got \(1",
        ),
        ({"q2": torch.randn(1, 1, 6, 4)}, ValueError, "q1 and q2 must have the same shape"),
        ({"k2": torch.randn(1, 2, 5, 4)}, ValueError, "k1 and k2 must have the same shape"),
        ({"q1": None}, TypeError, "q1 must be a torch.Tensor, got NoneType"),
        ({"normalize": "no"}, TypeError, "normalize must be True or False, got 'no'"),
        ({"relu_power": 0}, ValueError, "relu_power must be positive"),
    ],
    ids=("queries", "heads", "keys", "none", "a flag", "a power"),
)
def test_two_maps_say_what_is_wrong(change, kind, says):
    with pytest.raises(kind, match=says):
        _maps(change)()


def test_vectors_without_digits_count_as_zero_and_spoil_no_gradient():
    q = (torch.randn(1, 1, 4, 8) * 1e-39).requires_grad_()
    out = diffmax.threshold_rectified_attention(q, q.detach(), torch.randn(1, 1, 4, 3), 0.0)
    out.sum().backward()
    assert q.grad.abs().max() == 0


def test_two_maps_may_have_heads_of_different_sizes():
    q1, k1, v = torch.randn(3, 1, 2, 6, 16, dtype=torch.float64).unbind()
    q2, k2 = torch.randn(2, 1, 2, 6, 8, dtype=torch.float64).unbind()
    first, second = (diffmax.threshold_rectified_attention(q, k, v, 0.1) for q, k in ((q1, k1), (q2, k2)))
    torch.testing.assert_close(diffmax.threshold_differential_attention(q1, q2, k1, k2, v, 0.1, 0.5), first - 0.5 * second)
