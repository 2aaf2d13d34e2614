"""The calls of attention that the kit is made of: sizes, features and inputs of each, and nothing that judges a result."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from diffmax.testing.rows.cases import inf


@dataclass(frozen=True)
class Case:
    """Sizes and features of one attention call; `sigma` is the spread of queries and keys.

    `masked` and `bias` are the axes of (B, H, L, S) along which mask and bias vary, `alibi` those of the slopes: "H" or "BH".
    """

    batch: int = 2
    heads: int = 2
    kv_heads: int = 2
    length: int = 65
    keys: int = 129
    head_dim: int = 16
    value_dim: int = 0
    sigma: float = 1.5
    alpha: float | tuple[float, ...] = 0.7
    masked: str = ""
    bias: str = ""
    alibi: str = ""
    sink: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def tensors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value on the CPU, in (B, L, H, D) memory, from torch's global generator."""
        value_dim = self.value_dim or self.head_dim
        sizes = ((self.length, self.heads, self.head_dim), (self.keys, self.kv_heads, self.head_dim))
        query, key = (torch.randn(self.batch, *size) * self.sigma for size in sizes)
        value = torch.randn(self.batch, self.keys, self.kv_heads, value_dim)
        query, key, value = (t.to(dtype).transpose(1, 2) for t in (query, key, value))
        return query, key, value

    def mask(self) -> Tensor | None:
        """A mask that hides a third of the keys, and everything from one query; None if the case has none."""
        return self._hides(self.masked) if self.masked else None

    def _hides(self, axes: str) -> Tensor:
        mask = torch.rand(self._shape(axes)) > 1 / 3
        if "L" in axes:
            mask[..., self.length // 2, :] = False
        return mask

    def _shape(self, axes: str) -> list[int]:
        sizes = {"B": self.batch, "H": self.heads, "L": self.length, "S": self.keys}
        return [size if axis in axes else 1 for axis, size in sizes.items()]

    def inputs(self, dtype: torch.dtype) -> dict[str, Any]:
        """The arguments of `diffmax.attention` that are tensors, and alpha."""
        query, key, value = self.tensors(dtype)
        given: dict[str, Any] = {"query": query, "key": key, "value": value, "attn_mask": self.mask()}
        given["alpha"] = torch.tensor(self.alpha, dtype=torch.float64) if isinstance(self.alpha, tuple) else self.alpha
        if self.bias:
            bias = torch.randn(self._shape(self.bias)).to(dtype)
            given["attn_mask"] = bias.masked_fill(~self._hides(self.bias), -inf) if "S" in self.bias else bias
        if self.alibi:
            heads = 0.5 ** torch.arange(1.0, self.heads + 1)
            entries = 1 + torch.arange(self.batch).view(-1, 1) / 2
            given["alibi_slopes"] = heads * entries if self.alibi == "BH" else heads
        if self.sink:
            given["sink"] = torch.randn(self.heads).double()  # its gradient too, to compare it with its terms
        return given

    @property
    def scores(self) -> int:
        """How many there are."""
        return self.batch * self.heads * self.length * self.keys

    def features(self) -> set[str]:
        """Those of `diffmax.plugin.FEATURES` that the call needs."""
        causal, window = self.options.get("is_causal"), self.options.get("window_size", (-1, -1))
        needs = {
            "causal": causal or window[1] == 0,
            "window": window[0] >= 0 or (window[1] > 0 and not causal),
            "mask": bool(self.masked),
            "bias": bool(self.bias),
            "alibi": bool(self.alibi),
            "sink": self.sink,
            "softcap": "softcap" in self.options,
            "dropout": "dropout_p" in self.options,
            "gqa": self.heads != self.kv_heads,
            "value_dim": self.value_dim not in (0, self.head_dim),
            "tensor_alpha": isinstance(self.alpha, tuple),
        }
        return {name for name, needed in needs.items() if needed}


def _lower_right(**more: Any) -> dict[str, Any]:
    return {"causal_alignment": "lower_right", **more}


# Every feature alone, the pairs that interact, and in two cases with everything each of the other pairs.
CASES: dict[str, Case] = {
    "plain": Case(),
    "one query": Case(length=1, keys=200),
    "one key": Case(length=70, keys=1),
    "one of each": Case(batch=1, heads=1, kv_heads=1, length=1, keys=1),
    "63 by 127": Case(length=63, keys=127),
    "129 by 64": Case(length=129, keys=64),
    "long": Case(batch=1, heads=1, kv_heads=1, length=200, keys=3000, sigma=2.0),
    # more than a GPU has multiprocessors, each with 128 queries: kernels may take more of them at a time then
    "many queries": Case(batch=9, heads=16, kv_heads=16, length=128, keys=17),
    "dense": Case(sigma=0.3, alpha=0.95),
    "sparse": Case(sigma=4.0, alpha=0.3),
    "alpha 0.5": Case(alpha=0.5),
    "alpha 0.01": Case(alpha=0.01),
    "alpha 0.999": Case(alpha=0.999),
    "alpha per head": Case(heads=4, kv_heads=4, alpha=(0.1, 0.5, 0.9, 0.99)),
    "sparsemax and softmax heads": Case(alpha=(0.0, 1.0)),
    "head size 40": Case(head_dim=40),
    "head size 80": Case(head_dim=80, sigma=1.0),
    "head size 256": Case(head_dim=256, sigma=0.7, batch=1),
    "value size 24": Case(value_dim=24),
    "scale": Case(options={"scale": 0.7}),
    "negative scale": Case(options={"scale": -0.2}),
    "causal": Case(keys=65, options={"is_causal": True}),
    "causal, fewer queries": Case(options={"is_causal": True}),
    "causal, more queries": Case(length=150, keys=70, options={"is_causal": True}),
    "causal, lower right": Case(options=_lower_right(is_causal=True)),
    "causal, lower right, more queries": Case(length=150, keys=70, options=_lower_right(is_causal=True)),
    "window": Case(length=140, keys=140, options={"window_size": (20, 5)}),
    "window to the left": Case(length=140, keys=140, options={"window_size": (70, -1)}),
    "window to the right": Case(length=140, keys=140, options={"window_size": (-1, 3)}),
    "window of the own key": Case(keys=65, options={"window_size": (0, 0)}),
    "causal window, lower right": Case(keys=200, options=_lower_right(is_causal=True, window_size=(30, -1))),
    "window beyond the keys": Case(length=150, keys=60, options={"window_size": (10, 10)}),
    "mask of keys": Case(masked="BS"),
    "mask of queries and keys": Case(masked="LS"),
    "mask of everything": Case(masked="BHLS"),
    "mask, causal": Case(keys=65, masked="BLS", options={"is_causal": True}),
    "grouped heads": Case(heads=6, kv_heads=2),
    "one key head": Case(heads=5, kv_heads=1, length=130),
    "grouped heads, causal, alpha per head": Case(
        heads=4, kv_heads=2, alpha=(0.2, 0.5, 0.8, 0.97), options={"is_causal": True}
    ),
    "grouped heads, mask, window": Case(heads=4, kv_heads=1, masked="HLS", options={"window_size": (40, 40)}),
    "bias": Case(bias="BHLS"),
    "bias of queries and keys": Case(bias="LS", sigma=3.0, alpha=0.5),
    "bias of heads and keys": Case(heads=4, kv_heads=2, bias="HS"),
    "bias of queries": Case(bias="BL"),
    "bias, causal window": Case(keys=65, bias="HLS", options={"is_causal": True, "window_size": (30, -1)}),
    "ALiBi": Case(length=130, keys=200, alibi="H", sigma=2.5, alpha=0.5),
    "ALiBi by sequence, causal, lower right": Case(heads=4, kv_heads=2, alibi="BH", options=_lower_right(is_causal=True)),
    "softcap": Case(sigma=3.0, options={"softcap": 4.0}),
    "softcap, bias, ALiBi": Case(sigma=3.0, bias="LS", alibi="H", options={"softcap": 3.0}),
    "sink": Case(sink=True),
    "sink, everything hidden": Case(masked="BHLS", sink=True, sigma=3.0, alpha=0.5),
    "sink, sparsemax and softmax heads": Case(alpha=(0.0, 1.0), sink=True),
    "sink, causal, grouped heads": Case(heads=4, kv_heads=1, sink=True, alpha=0.5, options={"is_causal": True}),
    "dropout": Case(options={"dropout_p": 0.3}),
    "dropout, causal, grouped heads": Case(
        heads=4, kv_heads=2, length=130, keys=200, sigma=3.0, alpha=0.5, options={"dropout_p": 0.6, "is_causal": True}
    ),
    "dropout, sink, window, value size 24": Case(
        length=140, keys=140, value_dim=24, sink=True, options={"dropout_p": 0.2, "window_size": (20, 5)}
    ),
    "everything": Case(
        heads=4,
        kv_heads=2,
        length=130,
        keys=150,
        value_dim=8,
        alpha=(0.0, 0.5, 0.9, 1.0),
        bias="HLS",
        alibi="H",
        sink=True,
        options=_lower_right(is_causal=True, window_size=(90, -1), softcap=5.0, dropout_p=0.2),
    ),
    "everything, with a mask": Case(
        heads=4,
        kv_heads=2,
        length=130,
        keys=150,
        value_dim=8,
        alpha=(0.0, 0.5, 0.9, 1.0),
        masked="BLS",
        alibi="H",
        sink=True,
        options=_lower_right(is_causal=True, window_size=(90, -1), softcap=5.0, dropout_p=0.2),
    ),
}
