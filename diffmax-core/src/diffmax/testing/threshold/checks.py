"""What every backend's threshold attention has to get right, as functions: the kit and the tests call them.

The truth is `diffmax.reference.threshold` in float64 on the CPU, which diffmax's own tests hold to finite differences and to
its special cases. The gate is the row operator's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import diffmax
from diffmax.operators.threshold.operator import BACKWARD, FORWARD
from diffmax.plugin import ThresholdCall, ThresholdResults, ThresholdWanted
from diffmax.testing.gate import gates
from diffmax.testing.rows.checks import _expect, _near_on_average, _opcheck, _within

NAMES = ("query", "key", "value", "threshold", "bias")


@dataclass(frozen=True)
class Case:
    """Sizes and options of one call. `level`: what thresholds lie around; `seen`: the share of keys that a mask shows."""

    batch: int = 2
    heads: int = 2
    kv_heads: int = 2
    length: int = 40
    many: int = 40
    head_dim: int = 16
    value_dim: int = 16
    weights: str = "scores"
    power: float = 1.0
    level: float = 0.3
    width: int = 0
    causal: bool = True
    seen: float = 1.0
    packed: bool = False

    def features(self) -> set[str]:
        """Those of `diffmax.plugin.FEATURES` that the call needs."""
        needs = {
            "gqa": self.heads != self.kv_heads,
            "value_dim": self.head_dim != self.value_dim,
            "mask": self.seen < 1,
            "varlen": self.packed,
            "distance_bias": self.width > 0,
            "threshold_softmax": self.weights == "softmax",
            "threshold_diffmax": self.weights == "diffmax",
            "real_power": self.power not in (1, 2),
        }
        return {name for name, needed in needs.items() if needed}

    def inputs(self, dtype: torch.dtype) -> tuple[Tensor | None, ...]:
        """Random query, key, value, threshold and bias on the CPU, from torch's global generator; the mask comes last."""
        acc = torch.float64 if dtype == torch.float64 else torch.float32
        batch = 1 if self.packed else self.batch
        query = torch.randn(batch, self.heads, self.length, self.head_dim).to(dtype)
        key = torch.randn(batch, self.kv_heads, self.many, self.head_dim).to(dtype)
        value = torch.randn(batch, self.kv_heads, self.many, self.value_dim).to(dtype)
        theta = (self.level * (1 + 0.2 * torch.randn(batch, self.heads, self.length))).to(acc)
        bias = torch.randn(self.heads, self.width).to(acc) if self.width else None
        mask = torch.rand(batch, 1, 1, self.many) < self.seen if self.seen < 1 else None
        return query, key, value, theta, bias, mask


CASES = {
    "rectified scores": Case(level=0.0, length=70, many=70),
    "square above a threshold": Case(power=2.0),
    "cube root": Case(power=1.5, heads=4),
    "softmax": Case(weights="softmax", level=0.02, length=70, many=70),
    "softmax below zero": Case(weights="softmax", level=-0.02),
    "diffmax": Case(weights="diffmax", level=0.02),
    "bias": Case(weights="softmax", level=0.02, width=9),
    "bias, not causal": Case(weights="softmax", level=0.02, width=60, causal=False),
    "grouped heads, value size": Case(heads=6, kv_heads=2, value_dim=24, power=2.0),
    "fewer queries": Case(weights="softmax", level=0.02, length=3, width=9),
    "more queries": Case(weights="softmax", level=0.02, many=30),
    "padding": Case(weights="softmax", level=0.02, seen=0.6, width=9),
    "packed": Case(weights="softmax", level=0.02, width=9, packed=True),
}


def attend(given: tuple[Tensor | None, ...], case: Case, backend: str | None) -> tuple[Tensor, ...]:
    """The output and the mass."""
    query, key, value, theta, bias, mask = given
    options: dict[str, Any] = {"weights": case.weights, "alpha": 0.5, "power": case.power, "bias": bias, "backend": backend}
    options |= {"is_causal": case.causal, "return_mass": True}
    assert query is not None and key is not None and value is not None and theta is not None  # noqa: PT018
    if not case.packed:
        out, mass = diffmax.threshold_attention(query, key, value, theta, attn_mask=mask, **options)
        return out, mass
    ends = torch.tensor([0, 7, 7, case.many], dtype=torch.int32, device=query.device)
    q, k, v = (t.squeeze(0).transpose(0, 1) for t in (query, key, value))
    out, mass = diffmax.threshold_attention_varlen(q, k, v, theta.squeeze(0), ends, ends, case.many, case.many, **options)
    return out, mass


def results_pass_the_gate(backend: str, device: str, case: Case, dtype: torch.dtype) -> None:
    """Output and mass are as near to the truth as the gate asks."""
    given = case.inputs(dtype)
    wanted = gates(lambda *drawn: attend(drawn, case, "reference"), *given)
    ours = attend(tuple(t if t is None else t.to(device) for t in given), case, backend)
    for what, got, gate in zip(("output", "mass"), ours, wanted, strict=True):
        _expect(got.shape == gate.exact.shape, f"got {tuple(got.shape)}")
        _within(got, *gate, what)


def gradients_are_right_on_average(backend: str, device: str, case: Case, dtype: torch.dtype) -> None:
    """Through autograd, for all that is given; the gate holds for the mean error, as of attention's gradients."""
    given = case.inputs(dtype)
    grads = tuple(torch.randn_like(t) for t in attend(given, case, "reference"))

    def gradients(of: str, *drawn: Tensor | None) -> tuple[Tensor, ...]:
        leaves = [t if t is None else t.detach().clone().requires_grad_() for t in drawn[2:7]]
        out = attend((*leaves, drawn[7]), case, of)
        return torch.autograd.grad(out, [t for t in leaves if t is not None], [t for t in drawn[:2] if t is not None])

    wanted = gates(lambda *drawn: gradients("reference", *drawn), *grads, *given, average=True)
    ours = gradients(backend, *(t if t is None else t.to(device) for t in (*grads, *given)))
    names = [name for name, t in zip(NAMES, given, strict=False) if t is not None]
    for name, got, gate in zip(names, ours, wanted, strict=True):
        _near_on_average(got, gate, f"gradient for {name}")


def passes_opcheck(backend: str, device: str, dtype: torch.dtype) -> None:
    """torch.library.opcheck, forward and backward."""
    given = Case(length=8, many=8).inputs(dtype)
    query, key, value, theta = (t.to(device).requires_grad_() for t in given[:4] if t is not None)
    call = ThresholdCall(scale=0.25, theta=theta)
    flat = FORWARD.flatten(query, key, value, True, call, backend)
    _opcheck("threshold_attention", device, flat)
    with torch.no_grad():
        found = ThresholdResults(*FORWARD(query, key, value, True, call, backend))
        plain = ThresholdCall(scale=0.25, theta=theta.detach())
        rows = (query.detach(), key.detach(), value.detach())
        grads = (torch.ones_like(found.out), torch.ones_like(found.mass))
        flat = BACKWARD.flatten(*grads, *rows, found.saved, ThresholdWanted(theta=True), plain, backend)
    _opcheck("threshold_attention_backward", device, flat)
