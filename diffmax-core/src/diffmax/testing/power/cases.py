"""Calls of power attention that every backend is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffmax.operators.power.symmetric import monomials


@dataclass(frozen=True)
class Case:
    """Sizes and features of one call.

    Attributes:
        length: Queries; None: as many as keys.
        gates: What the log gates are drawn around before logsigmoid; None: no gates.
        state: Whether there is a state before the first key.
        final: Whether the state after the last is wanted.
        chunk: Tokens of a chunk; None: the kernel's choice.
    """

    batch: int = 1
    heads: int = 2
    kv_heads: int = 2
    many: int = 70
    length: int | None = None
    head_dim: int = 16
    value_dim: int = 16
    degree: int = 2
    gates: float | None = None
    state: bool = False
    final: bool = False
    chunk: int | None = None

    def features(self) -> set[str]:
        """Those of `diffmax.plugin.FEATURES` that the call needs."""
        needs = {
            "gqa": self.heads != self.kv_heads,
            "value_dim": self.head_dim != self.value_dim,
            "gates": self.gates is not None,
            "state": self.state or self.final,
            "high_degree": self.degree > 2,
        }
        return {name for name, needed in needs.items() if needed}

    def options(self) -> dict[str, Any]:
        """Arguments that are no tensors."""
        return {"degree": self.degree, "chunk_size": self.chunk, "return_final_state": self.final}

    def inputs(self, dtype: torch.dtype) -> Inputs:
        """Random tensors on the CPU, from torch's global generator."""
        length = self.many if self.length is None else self.length
        acc = torch.float64 if dtype == torch.float64 else torch.float32
        query = torch.randn(self.batch, self.heads, length, self.head_dim).to(dtype)
        key = torch.randn(self.batch, self.kv_heads, self.many, self.head_dim).to(dtype)
        value = torch.randn(self.batch, self.kv_heads, self.many, self.value_dim).to(dtype)
        gates = sums = norm = None
        if self.gates is not None:
            gates = torch.nn.functional.logsigmoid(torch.randn(self.batch, self.kv_heads, self.many) + self.gates).to(acc)
        if self.state:
            before = monomials(torch.randn(self.batch, self.kv_heads, 9, self.head_dim).double(), self.degree)
            sums = (before.mT @ torch.randn(self.batch, self.kv_heads, 9, self.value_dim).double()).to(acc)
            norm = before.sum(2).to(acc)
        return Inputs(query, key, value, gates, sums, norm)


class Inputs(NamedTuple):
    """The tensors of a call."""

    query: Tensor
    key: Tensor
    value: Tensor
    log_gates: Tensor | None
    sums: Tensor | None
    norm: Tensor | None

    def moved(self, device: str) -> Inputs:
        """On another device."""
        return Inputs._make(t if t is None else t.to(device) for t in self)

    def leaves(self) -> Inputs:
        """Copies that require gradients."""
        return Inputs._make(t if t is None else t.detach().clone().requires_grad_() for t in self)


CASES = {
    "plain": Case(),
    "one token": Case(many=1),
    "head sizes 40 and 24": Case(head_dim=40, value_dim=24, many=65),
    "head size 64": Case(head_dim=64, value_dim=64, many=130, chunk=64),
    "chunks": Case(chunk=16),
    "chunks that do not divide": Case(chunk=23, gates=1.0),
    "gates": Case(gates=0.0, chunk=32),
    "gates near 1": Case(gates=7.0, chunk=32, many=200),
    "grouped heads": Case(heads=6, kv_heads=2, chunk=16, gates=2.0),
    "one key head": Case(heads=5, kv_heads=1, batch=2),
    "state in, state out": Case(batch=2, state=True, final=True, gates=2.0, chunk=16),
    "state out, quadratic": Case(batch=2, final=True, many=20),
    "tail and state": Case(batch=3, length=1, many=20, state=True, gates=3.0),
    "tail, state out, in chunks": Case(length=5, many=50, state=True, final=True, chunk=16, gates=2.0, heads=4),
    "state alone": Case(length=3, many=0, state=True),
    "degree 4": Case(degree=4, head_dim=8, value_dim=8, chunk=16, gates=2.0),
    "degree 4, head size 16": Case(degree=4, chunk=32, state=True, final=True),
    "degree 6": Case(degree=6, head_dim=5, value_dim=7, chunk=32, final=True),
    "batch": Case(batch=3, gates=1.0, chunk=32, many=33),
}
FAST = ("plain", "chunks that do not divide", "grouped heads", "state in, state out", "tail and state", "degree 4")
