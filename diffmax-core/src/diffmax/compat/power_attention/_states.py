"""States in the layouts of power-attention, retention and vidrial: which one it is, and what it is in ours."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from diffmax.operators.common.checks import _dtype, _shape
from diffmax.operators.power.layouts import BLOCK, default_tile, rows_from_tiled, rows_to_tiled, tiled_dim
from diffmax.operators.power.state import PowerState
from diffmax.operators.power.symmetric import expanded_dim

Layout = Literal["exact", "tiled"] | int
"""diffmax's; the 16 x 16 blocks of power-attention and retention; the tiles of vidrial, by their size."""


def default_layout(size: int, degree: int) -> Layout:
    """Theirs where they have one, and else the exact one."""
    return "tiled" if degree == 2 and size and size % BLOCK == 0 else "exact"


def check_layout(name: str, layout: Any, size: int, degree: int) -> Layout:
    """A layout that was named, or the default one."""
    if layout is None:
        return default_layout(size, degree)
    if layout not in ("exact", "tiled"):
        raise ValueError(f'{name}: state_layout must be "exact", "tiled" or None, got {layout!r}')
    if layout == "tiled" and default_layout(size, degree) != "tiled":
        raise ValueError(
            f"{name}: the tiled layout needs degree 2 and heads of a multiple of {BLOCK} entries, got degree {degree}, {size}\n"
            'pass state_layout="exact", which has no limits'
        )
    return "exact" if layout == "exact" else "tiled"


def vidrial_tile(name: str, size: int, degree: int, tile: Any) -> int:
    """vidrial's tile, which by default depends on the size of a head."""
    found = default_tile(size, degree) if tile is None else tile
    tiled_dim(size, degree, found)  # refuses what is none
    del name
    return int(found)


def rows(layout: Layout, size: int, degree: int) -> int:
    """D, the number of rows of a state."""
    if layout == "exact":
        return expanded_dim(size, degree)
    return tiled_dim(size, degree, None if layout == "tiled" else int(layout))


def layout_of(name: str, what: str, many: int, size: int, degree: int) -> Layout:
    """The layout that has this many rows: the sizes of the three differ wherever the layouts do."""
    known: list[Layout] = ["exact"]
    if default_layout(size, degree) == "tiled":
        known.append("tiled")
    if default_tile(size, degree) > 1:
        known.append(default_tile(size, degree))
    for layout in known:
        if rows(layout, size, degree) == many:
            return layout
    sizes = " or ".join(str(rows(layout, size, degree)) for layout in known)
    raise ValueError(f"{name}: {what} must have {sizes} rows for heads of {size} entries and degree {degree}, got {many}")


def check_pair(name: str, S: Any, s: Any, what: str, of_keys: str) -> None:
    """The sums of a state and its sums of keys: floating, (..., D, e) and (..., D), on one device."""
    for label, t in ((what, S), (of_keys, s)):
        if not isinstance(t, Tensor) or not t.is_floating_point():
            got = _dtype(t) if isinstance(t, Tensor) else type(t).__name__
            raise TypeError(f"{name}: {label} must be a floating tensor, got {got}")
    if S.ndim < 2 or S.shape[:-1] != s.shape:
        raise ValueError(
            f"{name}: {of_keys} must have the shape of {what} without its last dimension, got {_shape(S)} and {_shape(s)}"
        )
    if S.device != s.device:
        raise ValueError(f"{name}: {what} and {of_keys} must be on one device, got {S.device} and {s.device}")


def to_exact(S: Tensor, s: Tensor, layout: Layout, size: int, degree: int, acc: torch.dtype) -> PowerState:
    """diffmax's state, from sums (..., D, e) and sums of keys (..., D)."""
    S, s = S.to(acc), s.to(acc)
    if layout == "exact":
        return PowerState(S, s)
    tile = None if layout == "tiled" else int(layout)
    return PowerState(rows_from_tiled(S, -2, size, degree, tile), rows_from_tiled(s, -1, size, degree, tile))


def from_exact(state: PowerState, layout: Layout, size: int, degree: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Sums in a dtype, and sums of keys in float32 (float64 for float64)."""
    S, s = state
    if layout != "exact":
        tile = None if layout == "tiled" else int(layout)
        S, s = rows_to_tiled(S, -2, size, degree, tile), rows_to_tiled(s, -1, size, degree, tile)
    return S.to(dtype), s
