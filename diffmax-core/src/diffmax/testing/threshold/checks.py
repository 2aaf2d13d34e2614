"""What every backend's threshold attention has to get right, as functions: the kit and the tests call them.

The truth is `diffmax.reference.threshold` in float64 on the CPU, which diffmax's own tests hold to finite differences and to
its special cases. The gate is the row operator's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import diffmax
from diffmax.operators.common.numerics import accumulation_dtype
from diffmax.operators.threshold.operator import BACKWARD, FORWARD
from diffmax.plugin import ThresholdCall, ThresholdResults, ThresholdWanted
from diffmax.testing.common.checks import compiles_like_eager, random_strided, repeats
from diffmax.testing.gate import gates, reordered
from diffmax.testing.rows.cases import inf, nan
from diffmax.testing.rows.checks import _expect, _near_on_average, _opcheck, _unchanged, _within

NAMES = ("query", "key", "value", "threshold", "bias", "alpha")


@dataclass(frozen=True)
class Case:
    """Sizes and options of one call.

    `level`: what thresholds lie around; `seen`: the share of keys that a mask shows; `alpha`: one, or one per head.
    """

    batch: int = 2
    heads: int = 2
    kv_heads: int = 2
    length: int = 40
    many: int = 40
    head_dim: int = 16
    value_dim: int = 16
    weights: str = "scores"
    alpha: float | tuple[float, ...] = 0.5
    power: float = 1.0
    level: float = 0.3
    width: int = 0
    causal: bool = True
    window: tuple[int, int] | None = None
    seen: float = 1.0
    packed: bool = False
    scale: float | None = None

    def features(self) -> set[str]:
        """Those of `diffmax.plugin.FEATURES` that the call needs."""
        needs = {
            "gqa": self.heads != self.kv_heads,
            "value_dim": self.head_dim != self.value_dim,
            "mask": self.seen < 1,
            "window": self.window is not None,
            "varlen": self.packed,
            "distance_bias": self.width > 0,
            "threshold_softmax": self.weights == "softmax",
            "threshold_diffmax": self.weights == "diffmax",
            "tensor_alpha": isinstance(self.alpha, tuple),
            "real_power": self.power not in (1, 2),
        }
        return {name for name, needed in needs.items() if needed}

    def inputs(self, dtype: torch.dtype) -> tuple[Tensor | None, ...]:
        """Query, key, value, threshold, bias, alpha and mask on the CPU, from torch's global generator; None: not given."""
        acc = accumulation_dtype(dtype)
        batch = 1 if self.packed else self.batch
        query = torch.randn(batch, self.heads, self.length, self.head_dim).to(dtype)
        key = torch.randn(batch, self.kv_heads, self.many, self.head_dim).to(dtype)
        value = torch.randn(batch, self.kv_heads, self.many, self.value_dim).to(dtype)
        theta = (self.level * (1 + 0.2 * torch.randn(batch, self.heads, self.length))).to(acc)
        bias = torch.randn(self.heads, self.width).to(acc) if self.width else None
        mask = torch.rand(batch, 1, 1, self.many) < self.seen if self.seen < 1 else None
        alpha = torch.tensor(self.alpha, dtype=acc) if isinstance(self.alpha, tuple) else None
        return query, key, value, theta, bias, alpha, mask


CASES = {
    "rectified scores": Case(level=0.0, length=70, many=70),
    "square above a threshold": Case(power=2.0),
    "cube root": Case(power=1.5, heads=4),
    "softmax": Case(weights="softmax", level=0.02, length=70, many=70),
    "softmax below zero": Case(weights="softmax", level=-0.02),
    "diffmax": Case(weights="diffmax", level=0.02),
    "alpha per head": Case(weights="diffmax", level=0.01, alpha=(0.5, 0.75), length=70, many=70),
    "alpha per head, packed": Case(weights="diffmax", level=0.01, heads=4, alpha=(0.25, 0.5, 0.75, 0.875), packed=True),
    "bias": Case(weights="softmax", level=0.02, width=9),
    "bias, not causal": Case(weights="softmax", level=0.02, width=60, causal=False),
    "grouped heads, value size": Case(heads=6, kv_heads=2, value_dim=24, power=2.0),
    "fewer queries": Case(weights="softmax", level=0.02, length=3, width=9),
    "more queries": Case(weights="softmax", level=0.02, many=30),
    "padding": Case(weights="softmax", level=0.02, seen=0.6, width=9),
    "window": Case(weights="softmax", level=0.02, length=70, many=70, window=(12, 0), width=9),
    "window on both sides": Case(power=2.0, many=50, causal=False, window=(7, 3), seen=0.8),
    "window, packed": Case(weights="softmax", level=0.02, window=(5, 4), causal=False, packed=True, width=4),
    "packed": Case(weights="softmax", level=0.02, width=9, packed=True),
    "packed, more keys, grouped heads": Case(heads=4, kv_heads=2, many=60, power=2.0, packed=True),
    "scale": Case(scale=1.1, level=1.0),
    "scale, softmax, head size 40": Case(weights="softmax", level=0.02, scale=0.5, head_dim=40, value_dim=24),
}


def attend(given: tuple[Tensor | None, ...], case: Case, backend: str | None) -> tuple[Tensor, ...]:
    """The output and the mass."""
    query, key, value, theta, bias, alpha, mask = given
    options: dict[str, Any] = {"weights": case.weights, "power": case.power, "bias": bias, "backend": backend}
    options |= {
        "alpha": (case.alpha if alpha is None else alpha) if case.weights == "diffmax" else None,
        "is_causal": case.causal,
        "return_mass": True,
        "window_size": case.window,
        "scale": case.scale,
    }
    assert query is not None and key is not None and value is not None and theta is not None  # noqa: PT018
    if not case.packed:
        out, mass = diffmax.threshold_attention(query, key, value, theta, attn_mask=mask, **options)
        return out, mass
    ends = [
        torch.tensor([0, 7, 7, last] if last == case.length else [0, 12, 20, last], dtype=torch.int32, device=query.device)
        for last in (case.length, case.many)
    ]
    q, k, v = (t.squeeze(0).transpose(0, 1) for t in (query, key, value))
    longest = (case.length, case.many)
    out, mass = diffmax.threshold_attention_varlen(q, k, v, theta.squeeze(0), ends[0], ends[1], *longest, **options)
    return out, mass


def results_pass_the_gate(backend: str, device: str, case: Case, dtype: torch.dtype) -> None:
    """Output and mass are as near to the truth as the gate asks."""
    given = case.inputs(dtype)
    wanted = gates(lambda *drawn: attend(drawn, case, "reference"), *given)
    moved = tuple(t if t is None else t.to(device) for t in given)
    with _unchanged(moved):
        ours = attend(moved, case, backend)
    for what, got, gate in zip(("output", "mass"), ours, wanted, strict=True):
        kind = dtype if what == "output" else accumulation_dtype(dtype)
        _expect(got.shape == gate.exact.shape and got.dtype == kind, f"got {got.dtype} {tuple(got.shape)}")
        _within(got, *gate, what)


def gradients_are_right_on_average(backend: str, device: str, case: Case, dtype: torch.dtype) -> None:
    """Through autograd, for all that is given; the gate holds for the mean error, as of attention's gradients."""
    given = case.inputs(dtype)
    grads = tuple(random_strided(t).to(t.dtype) for t in attend(given, case, "reference"))

    def gradients(of: str, *drawn: Tensor | None) -> tuple[Tensor, ...]:
        leaves = [t if t is None else t.detach().clone().requires_grad_() for t in drawn[2:8]]
        out = attend((*leaves, drawn[8]), case, of)
        return torch.autograd.grad(out, [t for t in leaves if t is not None], [t for t in drawn[:2] if t is not None])

    wanted = gates(lambda *drawn: gradients("reference", *drawn), *grads, *given, average=True)
    moved = tuple(t if t is None else t.to(device) for t in (*grads, *given))
    with _unchanged(moved):
        ours = gradients(backend, *moved)
    names = [name for name, t in zip(NAMES, given, strict=False) if t is not None]
    for name, got, gate in zip(names, ours, wanted, strict=True):
        _near_on_average(got, gate, f"gradient for {name}")


def _kinds(features: frozenset[str]) -> list[str]:
    """What of scores thresholds can be subtracted from."""
    return ["scores", *(kind for kind in ("softmax", "diffmax") if f"threshold_{kind}" in features)]


def _gradients(results: tuple[Tensor, ...], leaves: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(results, leaves, [torch.ones_like(t) for t in results])


def _leaves(case: Case, dtype: torch.dtype, device: str) -> list[Tensor]:
    """Query, key, value, threshold and, if the case has one, bias."""
    return [t.to(device).requires_grad_() for t in case.inputs(dtype)[:5] if t is not None]


def _all_of(leaves: list[Tensor]) -> tuple[Tensor | None, ...]:
    return (*leaves, *[None] * (7 - len(leaves)))


def gradients_match_differences(backend: str, device: str, kind: str) -> None:
    """torch.autograd.gradcheck and gradgradcheck in float64."""
    case = Case(batch=1, length=3, many=4, head_dim=2, value_dim=2, weights=kind, power=3.0, level=0.05)

    def run(*leaves: Tensor) -> tuple[Tensor, ...]:
        return attend(_all_of([*leaves]), case, backend)

    leaves = _leaves(case, torch.float64, device)
    _expect(torch.autograd.gradcheck(run, leaves), "gradients do not match differences")
    _expect(torch.autograd.gradgradcheck(run, leaves), "second derivatives do not match differences")


def bad_numbers_stay_where_they_belong(backend: str, device: str, dtype: torch.dtype, features: frozenset[str]) -> None:
    """NaN spoils the queries that it is for or that see it, and their own gradients; no others.

    Every key that is seen has a weight here. Whether a NaN in a value, or in a key that a query does not see, reaches other
    queries of its head is not asked.
    """
    for kind in _kinds(features):
        case = Case(weights=kind, level=-10.0, width=4 if "distance_bias" in features else 0)
        row, seen = [(0, 0, 5)], [(0, 0, n) for n in range(20, 40)]
        far = [(b, 0, n) for b in range(2) for n in range(3, 40)]
        for what, place, spoiled in (
            ("query", (0, 0, 5, 3), row),
            ("key", (0, 0, 20, 2), seen),
            ("value", (0, 0, 20, slice(None)), seen),
            ("threshold", (0, 0, 5), row),
            ("bias", (0, 3), far),
        ):
            if what == "bias" and not case.width:
                continue
            leaves = _leaves(case, dtype, device)
            with torch.no_grad():
                leaves[NAMES.index(what)][place] = nan
            out, mass = attend(_all_of(leaves), case, backend)
            of_query, _, _, of_theta, *_ = _gradients((out, mass), leaves)
            wanted = torch.zeros(2, 2, 40, dtype=torch.bool)
            wanted[tuple(zip(*spoiled, strict=True))] = True
            for result, t in (("output", out), ("query's gradient", of_query), ("threshold's gradient", of_theta.unsqueeze(3))):
                found = t.isnan().all(3).cpu()
                _expect(bool(found[wanted].all()), f"{kind}: a NaN in {what} is lost in the {result}")
                clean = ~wanted
                if what == "value" or (what == "key" and result == "query's gradient"):
                    clean[0, 0] = False
                _expect(bool(t.isfinite().all(3).cpu()[clean].all()), f"{kind}: a NaN in {what} spoils the {result} of others")
            if what != "value":
                _expect(torch.equal(mass.isnan().cpu(), wanted), f"{kind}: the mass is NaN elsewhere than a NaN in {what} says")
        leaves = _leaves(case, dtype, device)
        with torch.no_grad():
            leaves[0][0, 0, 5] = inf
        finite = attend(_all_of(leaves), case, backend)[0].isfinite().all(3).cpu()
        _expect(not bool(finite[0, 0, 5]), f"{kind}: an infinite query has a finite output")
        _expect(int((~finite).sum()) == 1, f"{kind}: an infinite query spoils others")


def nothing_comes_of_nothing(backend: str, device: str, dtype: torch.dtype, features: frozenset[str]) -> None:
    """Keys of zeros, a threshold of inf, hidden keys, one key, no keys, tokens, heads or entries."""
    for kind in _kinds(features):
        case = Case(weights=kind, level=0.1, width=0)
        leaves = _leaves(case, dtype, device)
        with torch.no_grad():
            leaves[1].zero_()
        out, mass = attend(_all_of(leaves), case, backend)
        theta = leaves[3].detach().double().cpu()
        even = torch.zeros(40, dtype=torch.float64) if kind == "scores" else 1 / torch.arange(1, 41, dtype=torch.float64)
        weight = (even - theta).clamp_min(0)
        sums = leaves[2].detach().double().cpu().cumsum(2)
        acc = accumulation_dtype(dtype)
        count = torch.arange(1, 41, dtype=torch.float64)
        _within(mass, weight * count, 4 * reordered(40, weight * count, acc), f"{kind}: mass of keys of zeros")
        exact = weight.unsqueeze(3) * sums
        _within(out, exact, 4 * reordered(40, exact, dtype), f"{kind}: output of keys of zeros")
        leaves = _leaves(case, dtype, device)
        with torch.no_grad():
            leaves[3][0, 0] = inf
        results = attend(_all_of(leaves), case, backend)
        grads = _gradients(results, leaves)
        for name, t in (("output", results[0]), ("mass", results[1]), ("query", grads[0]), ("threshold", grads[3])):
            _expect(not bool(t[0, 0].any()), f"{kind}: the {name} or its gradient is not 0 above all scores")
        _expect(all(bool(t.isfinite().all()) for t in grads), f"{kind}: a gradient is not finite below a threshold of inf")
        if "mask" in features:
            leaves = _leaves(case, dtype, device)
            mask = torch.ones(2, 1, 40, 40, dtype=torch.bool, device=device)
            mask[0, :, :7], mask[:, :, :, 9] = False, False
            results = attend((*leaves, None, None, mask), replace(case, level=-1.0), backend)
            grads = _gradients(results, leaves)
            rows = (results[0], results[1], grads[0], grads[3])
            _expect(not any(bool(t[0, :, :7].any()) for t in rows), f"{kind}: a query that sees nothing is not 0")
            _expect(not any(bool(t[:, :, 9].any()) for t in grads[1:3]), f"{kind}: a key that nobody sees has a gradient")
            _expect(all(bool(t.isfinite().all()) for t in grads), f"{kind}: a gradient is not finite beside hidden keys")
        one = replace(case, length=1, many=1)
        leaves = _leaves(one, dtype, device)
        out, mass = attend(_all_of(leaves), one, backend)
        query, key, value, theta = (t.detach().double().cpu() for t in leaves)
        above = ((query * key).sum(3) / 4 if kind == "scores" else 1.0) - theta
        _within(mass, above.clamp_min(0), 4 * reordered(16, above, acc), f"{kind}: mass of one key")
        _within(out, above.clamp_min(0).unsqueeze(3) * value, 8 * reordered(16, value, dtype), f"{kind}: output of one key")
        for shape, width in (((0, 2, 5, 8), 8), ((1, 2, 0, 8), 8), ((1, 2, 5, 8), 0), ((1, 0, 5, 8), 8)):
            x = torch.randn(shape).to(dtype).to(device)
            value = torch.randn(*shape[:3], width).to(dtype).to(device).requires_grad_()
            if shape[3] == width or "value_dim" in features:
                out = diffmax.threshold_attention(x, x, value, 0.1, weights=kind, backend=backend)  # type: ignore[call-overload]
                _expect(out.shape == value.shape, f"{kind}: got {tuple(out.shape)} of {shape}")
                (grad,) = torch.autograd.grad(out, value, torch.ones_like(out))
                _expect(grad.shape == value.shape, f"{kind}: got a gradient {tuple(grad.shape)} of {shape}")
        x, nobody = torch.randn(1, 2, 5, 8).to(dtype).to(device), torch.empty(1, 2, 0, 8, dtype=dtype, device=device)
        out, mass = diffmax.threshold_attention(x, nobody, nobody, -1.0, weights=kind, return_mass=True, backend=backend)  # type: ignore[call-overload]
        _expect(not bool(out.any() | mass.any()), f"{kind}: no keys give weights")


def huge_scores(backend: str, device: str, dtype: torch.dtype, features: frozenset[str]) -> None:
    """Scores up to a thousand overflow nothing: of softmax and diffmax one key is left, and relu keeps them."""
    for kind in _kinds(features):
        case = Case(weights=kind, level=0.1, head_dim=16, value_dim=16)
        query, key, value, theta, *_ = case.inputs(dtype)
        assert query is not None and key is not None and value is not None and theta is not None  # noqa: PT018
        given = (query * 16, key * 16, value, theta, None, None, None)
        wanted = gates(lambda *drawn, case=case: attend(drawn, case, "reference"), *given)
        found = attend(tuple(t if t is None else t.to(device) for t in given), case, backend)
        for what, got, gate in zip(("output", "mass"), found, wanted, strict=True):
            _expect(bool(got.isfinite().all()), f"{kind}: the {what} overflows")
            _within(got, *gate, f"{kind}: {what} of huge scores")


def strided_inputs(backend: str, device: str, dtype: torch.dtype) -> None:
    """Slices of one tensor, tokens before heads, give what copies of them give, and so do their gradients."""
    case = Case(power=2.0)
    packed = torch.randn(2, 40, 3, 2, 32).to(dtype).to(device)[..., ::2]
    theta = torch.rand(2, 40, 2).to(accumulation_dtype(dtype)).to(device).transpose(1, 2)
    views = [*(packed[:, :, which].transpose(1, 2) for which in range(3)), theta]
    found = []
    for given in (views, [t.contiguous() for t in views]):
        leaves = [t.detach().requires_grad_() for t in given]
        results = attend(_all_of(leaves), case, backend)
        found.append((*results, *_gradients(results, leaves)))
    for ours, theirs in zip(*found, strict=True):
        _within(ours, theirs.detach().cpu().double(), 4 * reordered(40 * 16, theirs, dtype), "strided")


def is_repeatable(backend: str, device: str, dtype: torch.dtype) -> None:
    """The same input gives the same bits, forward and backward."""
    case = Case(length=130, many=130, heads=4, kv_heads=4, power=2.0)
    leaves = _leaves(case, dtype, device)

    def run() -> tuple[Tensor, ...]:
        results = attend(_all_of(leaves), case, backend)
        return (*results, *_gradients(results, leaves))

    repeats(run)


def residuals_are_exchangeable(backend: str, device: str, dtype: torch.dtype, features: frozenset[str]) -> None:
    """Its forward with the reference's backward, and the other way round."""
    for kind in _kinds(features):
        case = Case(weights=kind, level=0.05)
        query, key, value, theta = (t.to(device) for t in case.inputs(dtype)[:4] if t is not None)
        call = ThresholdCall(scale=0.25, theta=theta, weights=kind, e=0.5 if kind == "diffmax" else 0.0)
        grad = torch.randn(query.shape).to(dtype).to(device)
        found = []
        for forward, backward in ((backend, "reference"), ("reference", backend), (backend, backend)):
            saved = ThresholdResults(*FORWARD(query, key, value, True, call, forward)).saved
            found.append(BACKWARD(grad, None, query, key, value, saved, ThresholdWanted(theta=True), call, backward)[:4])
        for what, ours, other, own in zip(NAMES, *found, strict=False):
            allowed = 4 * reordered(40 * 16, own, dtype)
            _within(ours, own.cpu().double(), allowed, f"{kind}: gradient for {what} by the reference's backward")
            _within(other, own.cpu().double(), allowed, f"{kind}: gradient for {what} from the reference's forward")


def compiles_in_one_graph(backend: str, device: str, dtype: torch.dtype, features: frozenset[str]) -> None:
    """torch.compile(fullgraph=True), forward and backward, for several lengths, equals eager."""
    kind = _kinds(features)[min(1, len(_kinds(features)) - 1)]

    def step(x: Tensor) -> Tensor:
        options: dict[str, Any] = {"weights": kind, "return_mass": True, "backend": backend}
        out, mass = diffmax.threshold_attention(x * 2, x, x, 0.05, **options)
        product: Tensor = out.sin() * mass.unsqueeze(3).to(out.dtype)
        return product

    compiles_like_eager(step, (torch.randn(1, 2, length, 16).to(dtype).to(device) for length in (20, 33)), terms=16)


def passes_opcheck(backend: str, device: str, dtype: torch.dtype, features: frozenset[str]) -> None:
    """torch.library.opcheck, forward and backward; of what is claimed, with all options."""
    for rich in (False, True):
        kind = _kinds(features)[-1] if rich else "scores"
        case = Case(length=8, many=8, weights=kind, width=3 if rich and "distance_bias" in features else 0)
        query, key, value, theta, *bias = _leaves(case, dtype, device)
        mask = torch.rand(2, 1, 1, 8).to(device) < 0.7 if rich and "mask" in features else None
        options: dict[str, Any] = {"scale": 0.25, "weights": kind, "e": 0.5 if kind == "diffmax" else 0.0, "mask": mask}
        call = ThresholdCall(theta=theta, bias=bias[0] if bias else None, **options)
        flat = FORWARD.flatten(query, key, value, True, call, backend)
        _opcheck("threshold_attention", device, flat)
        with torch.no_grad():
            found = ThresholdResults(*FORWARD(query, key, value, True, call, backend))
            plain = ThresholdCall(theta=theta.detach(), bias=bias[0].detach() if bias else None, **options)
            rows = (query.detach(), key.detach(), value.detach())
            grads = (torch.ones_like(found.out), torch.ones_like(found.mass))
            flat = BACKWARD.flatten(*grads, *rows, found.saved, ThresholdWanted(True, bool(bias)), plain, backend)
        _opcheck("threshold_attention_backward", device, flat)
