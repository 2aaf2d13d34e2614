"""torch.func, forward mode, second derivatives, export, FLOP counts and selective checkpointing."""

import shutil

import pytest
import torch
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.autograd.functional import hessian as eager_hessian
from torch.autograd.functional import jacobian as eager_jacobian
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils.checkpoint import checkpoint

from diffmax import DiffmaxBisectModule, HillMap, diffmax_bisect
from tests import fresh

ALPHA = 0.6
newer_torch = pytest.mark.skipif(not hasattr(torch.library, "register_vmap"), reason="needs torch 2.5: vmap rules of operators")


def weights(x):
    return diffmax_bisect(x, ALPHA)


def operator(x):
    return torch.ops.diffmax.bisect(x, 1 - ALPHA, None, x.ndim - 1, 50, True, "")[0]


@pytest.fixture
def x():
    return torch.randn(7, dtype=torch.float64)


@pytest.fixture
def g():
    return torch.randn(7, dtype=torch.float64)


def agrees(result, expected):
    torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-12)


# --- first derivatives ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [weights, operator])
def test_grad_jacobians_and_products(function, x, g):
    jacobian = eager_jacobian(weights, x)
    agrees(grad(lambda x: (function(x) * g).sum())(x), jacobian.T @ g)
    agrees(vjp(function, x)[1](g)[0], jacobian.T @ g)
    agrees(jvp(function, (x,), (g,))[1], jacobian @ g)


@newer_torch
@pytest.mark.parametrize("function", [weights, operator])
def test_jacobians_by_either_mode(function, x):
    agrees(jacrev(function)(x), eager_jacobian(weights, x))
    agrees(jacfwd(function)(x), eager_jacobian(weights, x))


def test_forward_mode_without_torch_func(x, g):
    with forward_ad.dual_level():
        for function in (weights, operator):
            tangent = forward_ad.unpack_dual(function(forward_ad.make_dual(x, g))).tangent
            agrees(tangent, eager_jacobian(weights, x) @ g)


def test_forward_mode_in_alpha(x, g):
    alpha = torch.tensor(ALPHA, dtype=torch.float64)
    expected = eager_jacobian(lambda alpha: diffmax_bisect(x, alpha), alpha)
    agrees(jvp(lambda alpha: diffmax_bisect(x, alpha), (alpha,), (torch.ones_like(alpha),))[1], expected)
    _, both = jvp(diffmax_bisect, (x, alpha), (g, torch.ones_like(alpha)))
    agrees(both, expected + eager_jacobian(weights, x) @ g)


@newer_torch
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_narrow_dtypes_agree_with_float64(dtype):
    x, t = torch.randn(3, 40).to(dtype), torch.randn(3, 40).to(dtype)
    p, tangent = jvp(weights, (x,), (t,))
    assert p.dtype == tangent.dtype == dtype
    exact = jvp(weights, (x.double(),), (t.double(),))[1]
    assert (tangent.double() - exact).abs().max() <= 4 * torch.finfo(dtype).eps * exact.abs().max().clamp_min(1)
    per_sample = vmap(grad(lambda row: (weights(row) * t[0]).sum()))(x)
    exact = vmap(grad(lambda row: (weights(row) * t[0].double()).sum()))(x.double())
    assert (per_sample.double() - exact).abs().max() <= 4 * torch.finfo(dtype).eps * exact.abs().max().clamp_min(1)


def test_masked_rows_have_tangent_zero_and_not_nan():
    x = torch.tensor([[-torch.inf, 1.0, 0.0], [-torch.inf] * 3])
    p, tangent = jvp(weights, (x,), (torch.ones(2, 3),))
    assert (tangent == 0).all()  # a shift of the whole row changes nothing
    assert (p[1] == 0).all()


# --- vmap -----------------------------------------------------------------------------------------------------------------


@newer_torch
@pytest.mark.parametrize("function", [weights, operator])
def test_vmap(function):
    x = torch.randn(5, 3, 4, dtype=torch.float64)
    for in_dim in range(3):
        expected = torch.stack([function(part) for part in x.unbind(in_dim)])
        agrees(vmap(function, in_dims=in_dim)(x), expected)
        agrees(vmap(vmap(function), in_dims=in_dim)(x), expected)


@newer_torch
def test_vmap_over_scores_over_alpha_and_over_both():
    x, alphas = torch.randn(4, 3, 6, dtype=torch.float64), torch.tensor([0.2, 0.5, 0.8, 0.9], dtype=torch.float64)
    for dim in range(2):

        def attend(x, alpha, dim=dim):
            return diffmax_bisect(x, alpha, dim)

        agrees(vmap(attend)(x, alphas), torch.stack([attend(part, a) for part, a in zip(x, alphas, strict=True)]))
        agrees(vmap(attend, (None, 0))(x[0], alphas), torch.stack([attend(x[0], a) for a in alphas]))
        per_alpha = vmap(grad(lambda alpha, part: attend(part, alpha).square().sum()), (0, 0))(alphas, x)
        one_by_one = [
            grad(lambda alpha, part=part: attend(part, alpha).square().sum())(a) for a, part in zip(alphas, x, strict=True)
        ]
        agrees(per_alpha, torch.stack(one_by_one))


@newer_torch
def test_per_sample_gradients_of_a_model():
    """vmap(grad): what differential privacy and influence functions do."""
    model = torch.nn.Sequential(torch.nn.Linear(5, 5), DiffmaxBisectModule(0.85, alpha_map=HillMap(0.3))).double()
    parameters = dict(model.named_parameters())
    samples = torch.randn(6, 5, dtype=torch.float64)

    def loss(parameters, sample):
        return torch.func.functional_call(model, parameters, (sample,)).square().sum()

    per_sample = vmap(grad(loss), (None, 0))(parameters, samples)
    for i, sample in enumerate(samples):
        expected = torch.autograd.grad(loss(parameters, sample), list(parameters.values()))
        for name, one in zip(parameters, expected, strict=True):
            agrees(per_sample[name][i], one)


# --- higher derivatives ---------------------------------------------------------------------------------------------------

ORDERS = {
    "forward over reverse": hessian,
    "reverse over reverse": lambda f: jacrev(jacrev(f)),
    "reverse over forward": lambda f: jacrev(jacfwd(f)),
    "forward over forward": lambda f: jacfwd(jacfwd(f)),
}


@newer_torch
@pytest.mark.parametrize("function", [weights, operator])
@pytest.mark.parametrize("order", ORDERS)
def test_hessians_in_every_order(order, function, x, g):
    """Forward over forward was silently zero: an autograd.Function knows of one level of tangents."""
    expected = eager_hessian(lambda x: (weights(x) * g).sum(), x)
    assert expected.abs().max() > 1e-3
    agrees(ORDERS[order](lambda x: (function(x) * g).sum())(x), expected)
    batch = torch.stack([x, 2 * x])
    agrees(vmap(ORDERS[order](lambda x: (function(x) * g).sum()))(batch)[0], expected)


@newer_torch
@pytest.mark.parametrize("order", ORDERS)
def test_hessians_in_alpha(order, x, g):
    alpha = torch.tensor(ALPHA, dtype=torch.float64)

    def loss(alpha):
        return (diffmax_bisect(x, alpha) * g).sum()

    expected = eager_hessian(loss, alpha)
    assert expected.abs() > 1e-3
    agrees(ORDERS[order](loss)(alpha), expected)


@newer_torch
def test_third_derivatives(x, g):
    alpha = torch.tensor(ALPHA, dtype=torch.float64)

    def loss(alpha):
        return (diffmax_bisect(x, alpha) * g).sum()

    step = 1e-4
    expected = (eager_hessian(loss, alpha + step) - eager_hessian(loss, alpha - step)) / (2 * step)
    for third in (jacrev(jacrev(jacrev(loss))), jacfwd(jacfwd(jacfwd(loss)))):
        torch.testing.assert_close(third(alpha), expected, rtol=1e-5, atol=1e-6)


@newer_torch
def test_second_derivative_in_float16_agrees_with_float64():
    """float16 recomputes the weights from the scores, on another path than the other dtypes."""
    x, g = torch.randn(9).half(), torch.randn(9).half()
    ours = hessian(lambda x: (weights(x) * g).sum())(x)
    exact = eager_hessian(lambda x: (weights(x) * g.double()).sum(), x.double())
    assert (ours.double() - exact).abs().max() <= 8 * torch.finfo(torch.float16).eps * exact.abs().max().clamp_min(1)


@pytest.mark.parametrize("alpha", [0.2, 0.5, 0.85])
def test_gradgradcheck_in_every_mode(alpha):
    x = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    alphas = torch.full((2, 1), alpha, dtype=torch.float64, requires_grad=True)
    batched = hasattr(torch.library, "register_vmap")
    assert gradcheck(diffmax_bisect, (x, alphas), check_forward_ad=True, check_batched_grad=batched)
    assert gradgradcheck(
        diffmax_bisect, (x, alphas), check_fwd_over_rev=True, check_rev_over_rev=True, check_batched_grad=batched
    )


@newer_torch
@pytest.mark.parametrize("alpha", [0.1, 0.3])
def test_second_derivative_near_the_edge_of_the_support(alpha):
    """An entry just inside: the second derivative grows like p^(2 alpha - 1) for alpha < 1/2, and stays finite."""
    x = torch.tensor([1.0, 0.3, 0.0], dtype=torch.float64)
    e = 1 - alpha
    _, m, delta = torch.ops.diffmax.bisect(x[:2], e, None, 0, 200, True, "")
    x[2] = (m - (1 - delta) / e) + 1e-6  # tau of the others, and a little more: a weight of about (e * 1e-6)^(1 / e)
    p = diffmax_bisect(x, alpha, n_iter=200)
    assert 0 < p[2] < 1e-5
    ours = hessian(lambda x: diffmax_bisect(x, alpha, n_iter=200)[2])(x)
    assert ours.isfinite().all()
    step = 1e-9
    slopes = [
        torch.autograd.functional.jacobian(
            lambda x: diffmax_bisect(x, alpha, n_iter=200)[2], x + s * torch.eye(3, dtype=x.dtype)[2]
        )
        for s in (step, -step)
    ]
    torch.testing.assert_close(ours[2], (slopes[0] - slopes[1]) / (2 * step), rtol=1e-3, atol=1e-3 * float(ours.abs().max()))
    assert ours[2, 2] > 1


def test_second_derivative_off_the_support_is_zero_and_not_nan(x):
    x[0], x[1] = -torch.inf, x.max() - 50
    result = eager_hessian(lambda x: weights(x).square().sum(), x)
    assert result.isfinite().all()
    assert (result[:2] == 0).all()
    assert result[2:, 2:].abs().max() > 0


# --- compiled and exported ------------------------------------------------------------------------------------------------

COMPOSED = {
    "grad": lambda g: grad(lambda x: (weights(x) * g).sum()),
    "vmap(grad)": lambda g: lambda x: vmap(grad(lambda x: (weights(x) * g).sum()))(torch.stack([x, 2 * x])),
    "jvp": lambda g: lambda x: jvp(weights, (x,), (g,))[1],
    "hessian": lambda g: hessian(lambda x: (weights(x) * g).sum()),
}


@newer_torch
@pytest.mark.parametrize("name", COMPOSED)
def test_compiled_transforms(name, x, g):
    torch._dynamo.reset()
    function = COMPOSED[name](g)
    agrees(torch.compile(function, backend="aot_eager", fullgraph=True)(x), function(x))


def test_a_compiled_function_can_be_transformed(x, g):
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: (weights(x) * g).sum(), backend="aot_eager")
    agrees(grad(compiled)(x), eager_jacobian(weights, x).T @ g)


class Attend(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.normalize = DiffmaxBisectModule(torch.full((2, 1, 1), 0.85), alpha_map=HillMap(0.3))

    def forward(self, x):
        return self.normalize(x) @ x.transpose(-1, -2)


@pytest.fixture
def exported():
    dims = {0: torch.export.Dim("batch", min=2, max=64), 3: torch.export.Dim("keys", min=2, max=256)}
    return torch.export.export(Attend(), (torch.randn(3, 2, 5, 7),), dynamic_shapes={"x": dims})


@pytest.mark.filterwarnings("ignore:At pre-dispatch tracing:UserWarning", "ignore:.*torch.load:FutureWarning")  # torch 2.4
def test_export_keeps_the_operator_and_dynamic_shapes(exported, tmp_path):
    assert "diffmax.bisect" in exported.graph_module.code
    torch.export.save(exported, tmp_path / "attend.pt2")
    loaded = torch.export.load(tmp_path / "attend.pt2").module()
    for batch, keys in ((2, 9), (5, 40)):
        x = torch.randn(batch, 2, 5, keys)
        torch.testing.assert_close(loaded(x), Attend()(x))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # torch's own, of its loader
@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs a C++ compiler: g++")
@pytest.mark.skipif(not hasattr(torch._inductor, "aoti_compile_and_package"), reason="needs torch 2.6")
def test_aot_inductor(exported, tmp_path):
    package = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "attend.pt2"))
    runner = torch._inductor.aoti_load_package(package)
    for batch, keys in ((3, 7), (4, 30)):
        x = torch.randn(batch, 2, 5, keys)
        torch.testing.assert_close(runner(x), Attend()(x))


# --- what watches operators -----------------------------------------------------------------------------------------------


@newer_torch
@pytest.mark.parametrize(
    "imports",
    ["import torch.utils.flop_counter, diffmax", "import diffmax, torch.utils.flop_counter, diffmax.integrations.flop_counter"],
)
def test_the_flop_counter_is_told_in_a_fresh_process(imports):
    code = f"{imports}; import torch; print(torch.ops.diffmax.bisect in torch.utils.flop_counter.flop_registry)"
    assert fresh.python(code).stdout == "True\n"


@newer_torch
def test_the_flop_counter_counts_it():
    from torch.utils.flop_counter import FlopCounterMode

    import diffmax.integrations.flop_counter  # noqa: F401

    x = torch.randn(4, 100, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        diffmax_bisect(x, 0.85).sum().backward()
    counts = counter.get_flop_counts()["Global"]
    names = {str(operator).removeprefix("diffmax."): flops for operator, flops in counts.items()}
    assert names["bisect"] > names["bisect_backward"] > 0
    assert names["bisect"] % x.numel() == 0


@pytest.mark.skipif(not hasattr(torch.utils.checkpoint, "CheckpointPolicy"), reason="needs torch 2.5: selective checkpointing")
def test_selective_checkpointing_can_keep_or_recompute_it():
    create_selective_checkpoint_contexts = torch.utils.checkpoint.create_selective_checkpoint_contexts
    CheckpointPolicy = torch.utils.checkpoint.CheckpointPolicy

    ran = []

    def policy(keep):
        def decide(context, operator, *_, **__):
            if operator == torch.ops.diffmax.bisect.default:
                ran.append(context.is_recompute)
                return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE
            return CheckpointPolicy.PREFER_RECOMPUTE

        return lambda: create_selective_checkpoint_contexts(decide)

    x = torch.randn(3, 8, requires_grad=True)
    expected = torch.autograd.grad(diffmax_bisect(x.sin(), 0.7).square().sum(), x)[0]
    for keep in (True, False):
        ran.clear()
        p = checkpoint(lambda x: diffmax_bisect(x.sin(), 0.7), x, use_reentrant=False, context_fn=policy(keep))
        torch.testing.assert_close(torch.autograd.grad(p.square().sum(), x)[0], expected)
        assert ran[0] is False  # the policy saw the forward, whether or not the backward asked again
