"""What every backend has to get right, as functions: the conformance kit and `python -m diffmax selftest` call them.

Each takes the name of the backend and a device, runs public functions with that backend forced, and raises AssertionError with
the figures. The truth is `diffmax.reference` in float64 on the CPU, which diffmax's own tests hold to forty digits.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from diffmax import diffmax_bisect, reference
from diffmax.machine.dispatch import registry
from diffmax.operators.common.numerics import accumulation_dtype
from diffmax.plugin import Backend
from diffmax.testing.gate import Gate, gates
from diffmax.testing.rows.cases import SPECIAL_ALPHAS, inf, nan
from diffmax.testing.rows.nasty import NASTY_ROWS


def random_scores(shape: tuple[int, ...], dtype: torch.dtype, sigma: float = 1.0) -> Tensor:
    """Scores N(0, sigma) on the CPU, from torch's global generator."""
    return (torch.randn(shape) * sigma).to(dtype)


def forward_passes_the_gate(backend: str, device: str, x: Tensor, alpha: float | Tensor, dim: int = -1) -> None:
    """The weights of x (on the CPU) are as near to the truth as the gate asks, and sum to 1 as nearly as their dtype allows."""
    axis = dim % x.ndim
    (wanted,) = gates(lambda x: reference.bisect(x, _e(alpha, x.dtype), axis + 1, 200, True)[0], x, stacked=True)
    n_iter = 200 if x.dtype == torch.float64 else 50  # steps of bisection that are always enough, should the kernel bisect
    given = (x.to(device), _to(alpha, device))
    with _unchanged(given):
        p = diffmax_bisect(*given, dim, n_iter, backend=backend)
    _expect(p.dtype == x.dtype and p.shape == x.shape, f"got {tuple(p.shape)} {p.dtype} for {tuple(x.shape)} {x.dtype}")
    _within(p, *wanted, f"weights at alpha={alpha}")
    sums = p.double().sum(dim)
    visible = (x > -inf).any(dim).to(sums.device)
    slack = (2 + math.sqrt(x.shape[axis])) * torch.finfo(x.dtype).eps
    _expect(bool(((sums - visible.double()).abs() <= slack).all()), f"rows sum to {sums.min():.9g} .. {sums.max():.9g}")


def has_its_closed_form(backend: str, device: str, dtype: torch.dtype) -> None:
    """At alpha = 1/2 the sorted scores tell the threshold by a square root (Peters et al., 2019): no solver, no reference.

    The allowed error is the design's own figure: 1e-13 in float64, 1e-6 in float32, one unit in the last place below.
    """
    allowed = {torch.float64: 1e-13, torch.float32: 1e-6}.get(dtype, torch.finfo(dtype).eps)
    for length, sigma in ((1, 1.0), (7, 3.0), (64, 1.0), (129, 10.0), (1000, 0.3)):
        x = random_scores((5, length), dtype, sigma)
        z = (x.double() - x.double().amax(1, keepdim=True)).sort(1, descending=True)[0] / 2
        count = torch.arange(1, length + 1, dtype=torch.float64)
        mean = z.cumsum(1) / count
        spread = z.square().cumsum(1) - count * mean.square()  # of the first `count` scores
        t = mean - ((1 - spread).clamp_min(0) / count).sqrt()
        threshold = t.gather(1, (t <= z).sum(1, keepdim=True) - 1)
        exact = ((x.double() - x.double().amax(1, keepdim=True)) / 2 - threshold).clamp_min(0).square()
        _within(diffmax_bisect(x.to(device), 0.5, backend=backend), exact, allowed, f"{length} scores, sigma {sigma}: weights")


def backward_passes_the_gate(backend: str, device: str, x: Tensor, alpha: float) -> None:
    """The gradients for x and, if it gives one, for alpha pass the gate, for given residuals."""
    needs_e = gives_alpha_gradient(backend)
    e, dim, grad = 1 - alpha, x.ndim - 1, torch.randn(x.shape).to(x.dtype)
    saved = reference.bisect(x, e, dim, 50, True)
    kept = x if x.dtype == torch.float16 else None

    def compute(grad: Tensor, p: Tensor, m: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        return reference.bisect_backward(
            grad, p, m, delta, kept, e, dim + 1, True
        )  # m and delta are not those of x's neighbours

    wanted = gates(compute, grad, *saved, stacked=True)
    given = (t if t is None else t.to(device) for t in (grad, *saved, kept))
    ours = torch.ops.diffmax.bisect_backward(*given, e, None, dim, needs_e, backend)
    for what, result, gate in zip(("x", "e")[: 1 + needs_e], ours, wanted, strict=False):
        _within(result, *gate, f"gradient for {what} at alpha={alpha}")


def gradients_are_right_on_average(backend: str, device: str, x: Tensor, alpha: float) -> None:
    """Forward and backward together, through autograd: gradients for x and, where it can be, for alpha per row.

    The gate holds for the mean error: at the edge of the support the gradient has no bound on its sensitivity (for alpha < 1/2
    its derivative is unbounded), so that the largest error is a matter of luck there, for the reference too.
    """
    e, grad = 1 - alpha, torch.randn(x.shape).to(x.dtype)
    wanted = _gates_of_gradients(x, grad, e)
    leaf = x.to(device).clone().requires_grad_()
    per_row = torch.full((*x.shape[:-1], 1), alpha, dtype=_alpha_dtype(x, device)).to(device).requires_grad_()
    learns = "tensor_alpha" in claimed(backend, "bisect") and gives_alpha_gradient(backend)
    diffmax_bisect(leaf, per_row if learns else alpha, backend=backend).backward(grad.to(device))
    _near_on_average(_grad(leaf), wanted[0], f"gradient for x at alpha={alpha}")
    if learns:
        _near_on_average(-_grad(per_row), wanted[1], f"gradient for alpha at alpha={alpha}")


def special_alphas_pass_the_gate(
    backend: str, device: str, dtype: torch.dtype, alphas: Sequence[float] = SPECIAL_ALPHAS
) -> None:
    """Forward and backward of a few rows at and beside the alphas that have kernels of their own, and near 0 and 1."""
    for alpha in alphas:
        x = random_scores((8, 33), dtype, 3.0)
        forward_passes_the_gate(backend, device, x, alpha)
        backward_passes_the_gate(backend, device, x, alpha)


def nasty_rows_pass_the_gate(backend: str, device: str, dtype: torch.dtype, alpha: float) -> None:
    """Ties, huge offsets, masks, single entries: each row of NASTY_ROWS that the dtype can hold."""
    for name, row in NASTY_ROWS.items():
        x = torch.tensor([row], dtype=torch.float64).to(dtype)
        if bool((x == inf).any()):  # 1e30 in float16
            continue
        try:
            forward_passes_the_gate(backend, device, x, alpha)
        except AssertionError as error:
            raise AssertionError(f"row {name!r}: {error}") from None


def masks_and_bad_rows(backend: str, device: str, dtype: torch.dtype) -> None:
    """-inf weighs nothing, a fully masked row is 0 with gradient 0, NaN and +inf spoil their own row only."""
    x = random_scores((7, 50), dtype)
    x[0, 10:], x[1], x[2, 3], x[3, 4], x[4, 1:] = -inf, -inf, nan, inf, -inf
    leaf = x.to(device).clone().requires_grad_()
    p = diffmax_bisect(leaf, 0.6, backend=backend)
    p.backward(torch.randn(x.shape).to(dtype).to(device))
    p, grad = p.detach().cpu(), _grad(leaf).cpu()
    _expect(bool((p[0, 10:] == 0).all() and (grad[0, 10:] == 0).all()), "a masked entry has weight or gradient")
    _expect(bool((p[1] == 0).all() and (grad[1] == 0).all()), f"a fully masked row has weights {p[1]}, gradient {grad[1]}")
    _expect(bool(p[2].isnan().all() and p[3].isnan().all()), "a row with NaN or +inf is not all NaN")
    _expect(bool(p[4, 0] == 1), f"the only visible entry of a row has weight {p[4, 0]}")
    keep = [0, 1, 4, 5, 6]
    _expect(bool(p[keep].isfinite().all() and grad[keep].isfinite().all()), "NaN reached another row")


def empty_and_single(backend: str, device: str, dtype: torch.dtype) -> None:
    """Rows of no entries and no rows give empty results; a row of one entry is 1, a scalar too."""
    for shape in ((0,), (3, 0), (0, 3)):
        leaf = torch.empty(shape, dtype=dtype, device=device, requires_grad=True)
        p = diffmax_bisect(leaf, 0.5, backend=backend)
        p.sum().backward()
        _expect(p.shape == shape and _grad(leaf).shape == shape, f"shape {shape} became {tuple(p.shape)}")
    single = diffmax_bisect(torch.tensor([[3.0], [-6e4], [0.0]], dtype=dtype, device=device), 0.3, backend=backend)
    _expect(bool((single == 1).all()), f"rows of one entry have weights {single}")
    _expect(
        diffmax_bisect(torch.tensor(2.0, dtype=dtype, device=device), 0.3, backend=backend).item() == 1, "a scalar is not 1"
    )


def strides_and_dims(backend: str, device: str, dtype: torch.dtype) -> None:
    """Any strides and any dim give what a contiguous copy gives, forward and backward."""
    base = random_scores((12, 20, 6), dtype).to(device)
    views = {
        "transposed": base.transpose(0, 1),
        "stepped": base[:, ::3],
        "expanded": base[:1].expand(4, -1, -1),
        "offset": base[3:, 5:, 1:],
    }
    for name, view in views.items():
        for dim in range(-3, 3):
            leaf, copy = view.detach().requires_grad_(), view.detach().clone().contiguous().requires_grad_()
            p, q = diffmax_bisect(leaf, 0.6, dim, backend=backend), diffmax_bisect(copy, 0.6, dim, backend=backend)
            grad = torch.randn(p.shape).to(dtype).to(device)
            p.backward(grad.transpose(0, 1).contiguous().transpose(0, 1))
            q.backward(grad)
            slack = 4 * torch.finfo(dtype).eps
            _expect(p.is_contiguous(), f"{name}, dim {dim}: the result is not contiguous")
            _within(p, q.detach().cpu().double(), slack, f"{name}, dim {dim}: weights")
            _within(_grad(leaf), _grad(copy).cpu().double(), 4 * slack, f"{name}, dim {dim}: gradient")


def alpha_tensors(backend: str, device: str, dtype: torch.dtype) -> None:
    """Alpha per head and per row agrees with each one alone; its ends are sparsemax and softmax."""
    x = random_scores((2, 3, 5, 33), dtype)
    forward_passes_the_gate(backend, device, x, torch.tensor([0.2, 0.5, 0.9]).view(3, 1, 1))
    forward_passes_the_gate(backend, device, x, torch.rand(2, 3, 5, 1) * 0.9 + 0.05)
    forward_passes_the_gate(backend, device, x[0, 0], torch.rand(1, 33) * 0.9 + 0.05, dim=0)
    forward_passes_the_gate(backend, device, x[0, 0, :2], torch.tensor([[1.0], [0.0]]))


def gradients_of_alpha_tensors(backend: str, device: str, dtype: torch.dtype) -> None:
    """With an alpha per head, per row, and along another dim: gradients for x and, where it can be, for alpha."""
    learns = gives_alpha_gradient(backend)
    for shape, of_alpha, dim in (((2, 3, 5, 33), (3, 1, 1), -1), ((2, 3, 5, 33), (2, 3, 5, 1), -1), ((9, 20), (1, 20), 0)):
        x, alpha = random_scores(shape, dtype), torch.rand(of_alpha) * 0.8 + 0.1
        grad = torch.randn(shape).to(dtype)

        def gradients(
            of: str, where: str, grad: Tensor, x: Tensor, alpha: Tensor = alpha, dim: int = dim
        ) -> tuple[Tensor, ...]:
            leaf, learned = (t.to(where).clone().requires_grad_() for t in (x, alpha.to(_alpha_dtype(x, where))))
            p = diffmax_bisect(leaf, learned if learns else learned.detach(), dim, backend=of)
            return torch.autograd.grad(p, (leaf, learned) if learns else (leaf,), grad.to(where))

        wanted = gates(lambda grad, x, run=gradients: run("reference", "cpu", grad, x), grad, x, average=True)
        for what, ours, gate in zip(("x", "alpha"), gradients(backend, device, grad, x), wanted, strict=False):
            _near_on_average(ours, gate, f"gradient for {what} of shape {of_alpha if what == 'alpha' else shape}")


def residuals_are_exchangeable(backend: str, device: str, dtype: torch.dtype) -> None:
    """Its backward follows the reference's forward, and the reference's backward its forward."""
    x = random_scores((6, 70), dtype)
    x[0, 5:], x[1] = -inf, -inf
    grad = torch.randn(6, 70).to(dtype)
    wanted = _gates_of_gradients(x, grad, 0.3)
    x, grad = x.to(device), grad.to(device)
    kept = x if dtype == torch.float16 else None
    needs_e = gives_alpha_gradient(backend)
    for forward, backward in ((backend, backend), (backend, "reference"), ("reference", backend)):
        p, m, delta = torch.ops.diffmax.bisect(x, 0.3, None, 1, 50, True, forward)
        _expect(m.shape == (6, 1) and delta.shape == (6, 1), f"m and delta have shapes {tuple(m.shape)}, {tuple(delta.shape)}")
        _expect(m.dtype == delta.dtype == (torch.float64 if dtype == torch.float64 else torch.float32), f"m is {m.dtype}")
        _expect(bool(m[1] == -inf and delta[1] == 0), f"a fully masked row has m = {m[1].item()}, delta = {delta[1].item()}")
        result = torch.ops.diffmax.bisect_backward(grad, p, m, delta, kept, 0.3, None, 1, needs_e, backward)
        for ours, gate in zip(result[: 1 + needs_e], wanted, strict=False):
            _near_on_average(ours, gate, "gradient from exchanged residuals")


def is_a_simplex_point_with_the_symmetries(backend: str, device: str, dtype: torch.dtype) -> None:
    """Weights keep the order of the scores, follow permutations, ignore shifts and padding; the support grows with alpha."""
    x = random_scores((8, 60), dtype, 2.0).to(device)
    p = diffmax_bisect(x, 0.6, backend=backend)
    _expect(bool((p >= 0).all()), "negative weights")
    order = x.argsort(-1)
    slack = 4 * torch.finfo(dtype).eps
    _expect(bool((p.gather(1, order).double().diff() >= -slack).all()), "a larger score has a smaller weight")
    permutation = torch.randperm(60, device="cpu").to(device)
    _within(
        diffmax_bisect(x[:, permutation], 0.6, backend=backend), p[:, permutation].cpu().double(), slack, "permuted weights"
    )
    whole = x.round()  # a shift by 8 is exact in every dtype
    shifted = diffmax_bisect(whole + 8, 0.6, backend=backend)
    _within(shifted, diffmax_bisect(whole, 0.6, backend=backend).cpu().double(), slack, "shifted weights")
    padded = diffmax_bisect(torch.cat([x, torch.full_like(x, -inf)], 1), 0.6, backend=backend)
    _within(padded[:, :60], p.cpu().double(), slack, "padded weights")
    _expect(bool((padded[:, 60:] == 0).all()), "padding has weight")
    counts = [int((diffmax_bisect(x, alpha, backend=backend) > 0).sum()) for alpha in (0.1, 0.5, 0.9)]
    _expect(counts == sorted(counts), f"the support shrinks as alpha grows: {counts}")


def is_repeatable(backend: str, device: str, dtype: torch.dtype) -> None:
    """The same input gives the same bits, forward and backward."""
    x, grad = random_scores((300, 130), dtype).to(device), torch.randn(300, 130).to(dtype).to(device)
    results = []
    for _ in range(3):
        leaf = x.clone().requires_grad_()
        p = diffmax_bisect(leaf, 0.7, backend=backend)
        p.backward(grad)
        results.append((p.detach(), _grad(leaf)))
    _expect(
        all(torch.equal(a, b) for r in results[1:] for a, b in zip(r, results[0], strict=True)), "results differ in their bits"
    )


def writes_all_that_it_allocates(backend: str, device: str, dtype: torch.dtype) -> None:
    """With fresh memory full of NaN the result is the same."""
    x = random_scores((30, 130), dtype)
    x[3, 10:] = -inf
    x = x.to(device)
    grad = torch.randn(30, 130).to(dtype).to(device)

    def run() -> tuple[Tensor, Tensor]:
        leaf = x.clone().requires_grad_()
        p = diffmax_bisect(leaf, 0.7, backend=backend)
        p.backward(grad)
        return p.detach(), _grad(leaf)

    clean = run()
    with _poisoned_memory():
        poisoned = run()
    for name, ours, theirs in zip(("weights", "gradient"), poisoned, clean, strict=True):
        _within(ours, theirs.cpu().double(), 8 * torch.finfo(dtype).eps, f"{name} in poisoned memory")


def bad_alphas_on_the_device_give_nan_rows(backend: str, device: str, dtype: torch.dtype) -> None:
    """Where alpha's values were not looked at: rows with e = 1 - alpha outside [0, 1] are NaN, the others right."""
    e = torch.tensor([[0.5], [-0.1], [1.2], [nan], [0.0]], dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    x = random_scores((5, 60), dtype).to(device)
    p = torch.ops.diffmax.bisect(x, 0.0, e.to(device), 1, 50, True, backend)[0]
    _expect(bool(p[[1, 2, 3]].isnan().all()), f"bad rows hold {p[[1, 2, 3], :3]}")
    _within(p[0], diffmax_bisect(x[0], 0.5, backend="reference").cpu().double(), 4 * torch.finfo(dtype).eps, "a good row")
    _within(p[4], x[4].cpu().double().softmax(-1), 4 * torch.finfo(dtype).eps, "alpha = 1, softmax")


def second_derivative_is_right(backend: str, device: str, dtype: torch.dtype) -> None:
    """With create_graph=True the second derivative is the reference's, not zero."""
    x, weights = random_scores((4, 9), dtype), torch.randn(4, 9).to(dtype)
    results = []
    for name in (backend, "reference"):
        leaf = x.to(device).clone().requires_grad_()
        (first,) = torch.autograd.grad(
            (diffmax_bisect(leaf, 0.7, backend=name) * weights.to(device)).sum(), leaf, create_graph=True
        )
        results.append(torch.autograd.grad(first.square().sum(), leaf)[0])
    _expect(bool(results[1].abs().max() > 1e-3), "the example has no second derivative")
    scale = max(1.0, float(results[1].abs().max()))
    _within(results[0], results[1].cpu().double(), 64 * torch.finfo(dtype).eps * scale, "second derivative")


def passes_opcheck(backend: str, device: str, dtype: torch.dtype) -> None:
    """torch.library.opcheck: schema, gradients, shapes for tracing."""
    x = random_scores((2, 3, 5), dtype).to(device).requires_grad_()
    _opcheck("bisect", device, (x, 0.3, None, 2, 50, True, backend))


def compiles_in_one_graph(backend: str, device: str, dtype: torch.dtype) -> None:
    """torch.compile(fullgraph=True, dynamic=True), forward and backward, equals eager."""
    torch._dynamo.reset()

    def attend(x: Tensor) -> Tensor:
        return diffmax_bisect(x * 2, 0.6, backend=backend) * x

    compiled: Callable[[Tensor], Tensor] = torch.compile(attend, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (9, 14):
        x = random_scores((3, length), dtype).to(device)
        results = []
        for function in (compiled, attend):
            leaf = x.clone().requires_grad_()
            function(leaf).sum().backward()
            results.append(_grad(leaf))
        _within(results[0], results[1].cpu().double(), 16 * torch.finfo(dtype).eps, "compiled gradient")


def gives_alpha_gradient(backend: str) -> bool:
    """Whether alpha's gradient arrives when the backend is named: it claims it, or leaves the backward to others."""
    return "alpha_gradient" in claimed(backend, "bisect_backward") or not provides(backend, "bisect_backward")


def claimed(backend: str, operator: str) -> frozenset[str]:
    """The features that the backend claims for an operator; none if it does not provide it."""
    kernel = _described(backend).provided.get(operator)
    return kernel.features if kernel is not None else frozenset()


def provides(backend: str, operator: str) -> bool:
    """Whether the backend has a kernel for an operator."""
    return operator in _described(backend).provided


def _described(backend: str) -> Backend:
    return next(description for description in registry.backends() if description.name == backend)


def _gates_of_gradients(x: Tensor, grad: Tensor, e: float) -> list[Gate]:
    """For the gradients for x and, per row, for e, of forward and backward together; the gate holds for the mean error."""

    def both(x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        kept, dim = x if x.dtype == torch.float16 else None, x.ndim - 1
        return reference.bisect_backward(grad, *reference.bisect(x, e, dim, 200, True), kept, e, dim, True)

    return gates(both, x, grad, average=True, stacked=True)


def _e(alpha: float | Tensor, dtype: torch.dtype) -> float | Tensor:
    return 1 - alpha.to(accumulation_dtype(dtype)) if isinstance(alpha, Tensor) else 1 - alpha


def _to(alpha: float | Tensor, device: str) -> float | Tensor:
    return alpha.to(device) if isinstance(alpha, Tensor) else alpha


def _alpha_dtype(x: Tensor, device: str) -> torch.dtype:
    # alpha in float64 where the device has it, so that 0.999 is 0.999
    return torch.float64 if x.dtype == torch.float64 or torch.device(device).type in ("cpu", "cuda") else torch.float32


def _grad(leaf: Tensor) -> Tensor:
    if leaf.grad is None:
        raise AssertionError("no gradient arrived")
    return leaf.grad


def _within(ours: Tensor, exact: Tensor, allowed: float, what: str) -> None:
    if exact.numel() == 0:
        return
    difference = (ours.detach().cpu().double() - exact.cpu()).abs()
    bad = ~(difference <= allowed) & ~(ours.detach().cpu().isnan() & exact.isnan())
    if bool(bad.any()):
        where = tuple(int(i) for i in bad.nonzero()[0])
        raise AssertionError(
            f"{what}: error {difference[bad].max():.3g}, allowed {allowed:.3g}\n"
            f"  first at {where}: got {ours[where].item():.9g}, exact {exact[where].item():.9g}"
        )


@contextmanager
def _unchanged(given: Iterable[Any]) -> Iterator[None]:
    """What is given to a kernel holds the same numbers after it."""
    tensors = [t for t in given if isinstance(t, Tensor)]
    before = [t.detach().clone() for t in tensors]
    yield
    for t, was in zip(tensors, before, strict=True):
        same = (t.detach() == was) | (t.detach().isnan() & was.isnan())
        _expect(bool(same.all()), f"the call wrote into what it was given, of shape {tuple(t.shape)}")


def _near_on_average(ours: Tensor, gate: Gate, what: str) -> None:
    found, exact = ours.detach().cpu().double(), gate.exact
    difference = (found - exact).abs()
    error = float(difference.mean())
    if error <= gate.allowed:
        return
    worst = difference.nan_to_num(math.inf).flatten().argmax()
    where = tuple(int(i) for i in torch.unravel_index(worst, exact.shape))
    factor = float((found * exact).sum() / exact.square().sum())
    raise AssertionError(
        f"{what}: mean error {error:.3g}, allowed {gate.allowed:.3g}\n"
        f"  largest at {where}: got {found[where].item():.9g}, exact {exact[where].item():.9g}; "
        f"on the whole {factor:.4g} times the exact one"
    )


def _expect(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(message)


def _opcheck(operator: str, device: str, flat: tuple[Any, ...]) -> None:
    """torch.library.opcheck of torch.ops.diffmax.<operator> with these arguments."""
    tests = ["test_schema", "test_faketensor", "test_aot_dispatch_dynamic"]
    if torch.device(device).type in ("cpu", "cuda", "xpu"):  # the fourth test knows no other device
        tests.append("test_autograd_registration")
    with warnings.catch_warnings():  # torch hides its own warning from users, but not where warnings are errors
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")
        torch.library.opcheck(getattr(torch.ops.diffmax, operator).default, flat, test_utils=tuple(tests))


@contextmanager
def _poisoned_memory() -> Iterator[None]:
    """Fresh tensors from torch.empty and its kin hold NaN (integers: their largest value)."""

    def poisoning(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def poisoned(*args: Any, **kwargs: Any) -> Tensor:
            fresh = allocate(*args, **kwargs)
            return fresh.fill_(nan) if fresh.is_floating_point() and fresh.device.type != "meta" else fresh

        return poisoned

    with (
        mock.patch.object(torch, "empty", poisoning(torch.empty)),
        mock.patch.object(torch, "empty_like", poisoning(torch.empty_like)),
        mock.patch.object(Tensor, "new_empty", poisoning(Tensor.new_empty)),
    ):
        yield
