"""DiffmaxBisectModule."""

import pytest
import torch
from torch import nn

from diffmax import DiffmaxBisectModule, DiffmaxLoss, ExpMap, HillMap, TanhMap, diffmax_bisect
from diffmax.nn import DiffmaxAttention, param_groups


def test_a_fixed_alpha_is_the_function():
    x = torch.randn(3, 5)
    assert torch.equal(DiffmaxBisectModule()(x), diffmax_bisect(x, 0.9))
    module = DiffmaxBisectModule(0.4, dim=0, n_iter=30, ensure_sum_one=False)
    assert torch.equal(module(x), diffmax_bisect(x, 0.4, 0, 30, False))
    assert not list(module.parameters())
    assert module.current_alpha == 0.4


def test_tensors_functions_and_parameters_as_alpha():
    x = torch.randn(2, 3, 4, 5)
    alpha = torch.tensor([0.2, 0.5, 0.9]).view(3, 1, 1)
    buffer = DiffmaxBisectModule(alpha)
    assert list(buffer.state_dict()) == ["alpha"]
    assert not list(buffer.parameters())
    parameter = DiffmaxBisectModule(nn.Parameter(alpha.clone()))
    assert [name for name, _ in parameter.named_parameters()] == ["alpha"]
    given = DiffmaxBisectModule(lambda: alpha)
    assert given.current_alpha is alpha
    for module in (buffer, parameter, given):
        torch.testing.assert_close(module(x), diffmax_bisect(x, alpha))
    parameter(x).square().sum().backward()
    assert parameter.alpha.grad.shape == (3, 1, 1)


@pytest.mark.parametrize("alpha_map", [HillMap(0.3), TanhMap(0.5, 2.0), ExpMap(1.0)], ids=repr)
@pytest.mark.parametrize("alpha", [0.85, torch.tensor([0.8, 0.95]).view(2, 1, 1)], ids=["one", "per head"])
def test_with_a_map_it_starts_at_alpha_and_learns(alpha_map, alpha):
    x = torch.randn(4, 2, 6, 6, dtype=torch.float64)
    module = DiffmaxBisectModule(alpha, alpha_map=alpha_map).double()
    assert [name for name, _ in module.named_parameters()] == ["log_beta"]
    assert module.log_beta.shape == (alpha.shape if isinstance(alpha, torch.Tensor) else ())
    expected = alpha.double() if isinstance(alpha, torch.Tensor) else torch.tensor(alpha, dtype=torch.float64)
    torch.testing.assert_close(module.current_alpha, expected, rtol=0, atol=1e-7)
    torch.testing.assert_close(module(x), diffmax_bisect(x, expected), rtol=0, atol=1e-6)
    before = module.log_beta.detach().clone()
    (-(module(x) ** 2).sum()).backward()  # more concentrated: a larger beta
    torch.optim.SGD(module.parameters(), lr=0.1).step()
    assert (module.log_beta > before).all()


def test_with_a_map_one_minus_alpha_keeps_its_digits():
    """alpha itself would round to 1 in float32 here; the gradient for log_beta would then be lost."""
    module = DiffmaxBisectModule(0.5, alpha_map=HillMap(1.0))
    with torch.no_grad():
        module.log_beta.fill_(-25.0)
    x = torch.randn(3, 5)
    assert module.current_alpha == 1
    (module(x) * torch.randn(3, 5)).sum().backward()
    assert module.log_beta.grad != 0
    torch.testing.assert_close(module(x), x.softmax(-1))


@pytest.mark.parametrize("end", [-1e4, -150.0, 150.0, 1e4])
def test_with_a_map_nothing_breaks_at_either_end(end):
    module = DiffmaxBisectModule(0.5, alpha_map=HillMap(1.0))
    with torch.no_grad():
        module.log_beta.fill_(end)
    x = torch.randn(3, 5, requires_grad=True)
    p = module(x)
    (p * torch.randn(3, 5)).sum().backward()
    torch.testing.assert_close(p.sum(-1), torch.ones(3))
    assert torch.isfinite(module.log_beta.grad)
    assert torch.isfinite(x.grad).all()
    torch.testing.assert_close(p, x.softmax(-1) if end < 0 else diffmax_bisect(x, 1e-12), rtol=0, atol=1e-6)


def test_a_half_precision_module_computes_its_alpha_in_float32():
    module = DiffmaxBisectModule(0.75, alpha_map=HillMap(0.5)).bfloat16()
    p = module(torch.randn(3, 5).bfloat16())
    assert p.dtype == torch.bfloat16
    p.float().square().sum().backward()
    assert module.log_beta.grad.dtype == torch.bfloat16


def test_repr_names_what_matters():
    assert repr(DiffmaxBisectModule(0.5)) == "DiffmaxBisectModule(alpha=0.5, dim=-1, n_iter=50, ensure_sum_one=True)"
    assert "alpha_map=HillMap(c=0.3, beta0=1.0)" in repr(DiffmaxBisectModule(0.85, alpha_map=HillMap(0.3)))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: DiffmaxBisectModule(0.5, alpha_map=HillMap(0.3)), ValueError, r"\(0\.7, 1\), the range of c = 0\.3, got 0\.5"),
        (
            lambda: DiffmaxBisectModule(lambda: 0.9, alpha_map=HillMap(0.3)),
            TypeError,
            "must be a float or a tensor to start",
        ),
        (lambda: DiffmaxBisectModule(0.9, alpha_map=HillMap), TypeError, "alpha_map must be a HillMap, TanhMap or ExpMap, got"),
        (
            lambda: DiffmaxBisectModule(torch.full((3,), 0.85), alpha_map=HillMap(0.3))(torch.randn(2, 3, 4, 4)),
            ValueError,
            r"DiffmaxBisectModule: alpha must broadcast .* got shape \(3,\)(.|\n)*alpha\.view\(3, 1, 1\)",
        ),
        (
            lambda: DiffmaxBisectModule(0.9, alpha_map=HillMap(0.3))(torch.arange(3)),
            TypeError,
            "DiffmaxBisectModule: X must be",
        ),
        (lambda: DiffmaxBisectModule(1.5), ValueError, "strictly between 0 and 1, got 1.5"),
        (
            lambda: DiffmaxBisectModule("0.5"),
            TypeError,
            "DiffmaxBisectModule: alpha must be a float or a tensor, or a function",
        ),
        (lambda: DiffmaxBisectModule(0.5, n_iter=0), ValueError, "n_iter must be at least 1, got 0"),
        (lambda: DiffmaxBisectModule(0.5, dim=1.0), TypeError, "dim must be an int, got 1.0"),
        (lambda: DiffmaxLoss(0.0), ValueError, "DiffmaxLoss: alpha must lie strictly between 0 and 1, got 0.0"),
        (lambda: DiffmaxLoss(n_iter=2.5), TypeError, "DiffmaxLoss: n_iter must be an int, got 2.5"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("module", [DiffmaxBisectModule, DiffmaxLoss, lambda alpha: DiffmaxAttention(8, 2, alpha=alpha)])
def test_a_tensor_that_no_optimizer_would_learn_is_told(module):
    """It stayed as it was, and its gradient grew."""
    alpha = torch.tensor(0.85, requires_grad=True)
    with pytest.warns(UserWarning, match=r"alpha is a tensor that requires a gradient .* does not learn it\npass nn.Parameter"):
        model = nn.Sequential(nn.Linear(2, 2), module(alpha))
    (group,) = [group for group in param_groups(model, 1e-3) if group["name"] == "alpha"]
    assert group["params"][0] is alpha
    with pytest.raises(ValueError, match=r"alpha of \w+ must be a leaf, got a tensor that was computed, or converted"):
        param_groups(model.double(), 1e-3)
    fixed = nn.Sequential(nn.Linear(2, 2), module(alpha.detach()))
    assert "alpha" not in {group["name"] for group in param_groups(fixed, 1e-3)}


@pytest.mark.parametrize("tensor", [False, True])
def test_with_a_map_it_is_made_on_the_device_meta(tensor):
    """As from_pretrained makes modules. The check of the range looked at values."""
    with torch.device("meta"):
        module = DiffmaxBisectModule(torch.full((3, 1), 0.85) if tensor else 0.85, alpha_map=HillMap(0.3))
        assert HillMap(0.3)(1.0) == 0.85
    assert module.log_beta.is_meta
    assert module.log_beta.shape == ((3, 1) if tensor else ())
