"""States of power attention in the layouts of other packages, to and from the exact one.

Theirs hold some monomials more than once, because a tile of them is dense, and some of them multiplied, because part of the
multinomial coefficient stands on the keys' side:

- "blocks" of 16 x 16, degree 2 (power-attention and retention, their reference and Triton): for each block y, for all
  a < 16 (y + 1), for the 16 entries b of the block: k_a k_b, times 2 where a is in an earlier block.
- "tiles" of size t, any degree (vidrial): for each T_1 <= ... <= T_p in lexicographic order a dense block of t^p products of
  one entry of each tile, times the square root of the number of orders of (T_1, ..., T_p).

What is held more than once is averaged on the way back, which is what a query reads of it.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffmax.operators.common.checks import _dtype, _shape, as_int, is_whole
from diffmax.operators.common.numerics import accumulation_dtype
from diffmax.operators.power.state import PowerState
from diffmax.operators.power.symmetric import expanded_dim, first_of, indices, multiplicities

BLOCK = 16


def tiled_dim(size: int, degree: int = 2, tile: int | None = None) -> int:
    """The number of rows of a state in a tiled layout.

    Args:
        size: D, of a head.
        degree: p.
        tile: t, for vidrial's tiles; None: the blocks of power-attention and retention.
    Raises:
        TypeError, ValueError: `size` is not a multiple of the tile, or blocks are asked for a degree other than 2.
    Example:
        >>> tiled_dim(32), tiled_dim(32, tile=8), tiled_dim(32, tile=1)
        (768, 640, 528)
    """
    size, degree, tile = _checked("diffmax.power.tiled_dim", size, degree, tile)
    width = tile or BLOCK
    return int(width**degree * expanded_dim(size // width, degree))


def default_tile(size: int, degree: int) -> int:
    """vidrial's tile where none is named."""
    if size not in (16, 32, 64):
        return 1
    return {2: 4 if size == 16 else 8, 3: 4, 4: 2}.get(degree, 1)


def to_tiled(
    state: PowerState | tuple[Tensor, Tensor], size: int, degree: int = 2, tile: int | None = None
) -> tuple[Tensor, Tensor]:
    """A state in a layout of power-attention, retention or vidrial.

    Args:
        state: Of any leading dimensions, (..., P, D_v) and (..., P).
        size: D, of a head.
        degree: p.
        tile: t, for vidrial's tiles; None: the blocks of power-attention and retention, of degree 2.
    Returns:
        The sums (..., P', D_v) and the norm (..., P'), P' = `tiled_dim`, in their dtypes; differentiable any number of times.
    Raises:
        TypeError, ValueError: Shapes do not fit, `size` is not a multiple of the tile, or the degree has no such layout.
    Numerics: Of blocks, `from_tiled` makes the same numbers again. Tiles have square roots as factors, and it errs by rounding.
    Source: the reference code of retention 1.0.7 and vidrial 0.2.1 (Apache-2.0). Written for diffmax.
    Example:
        >>> import diffmax
        >>> k, v = torch.randn(2, 1, 4, 100, 32).unbind()
        >>> _, state = diffmax.power_attention(k, k, v, return_final_state=True)
        >>> sums, norm = to_tiled(state, 32)
        >>> state.sums.shape[2], sums.shape[2], bool((from_tiled(sums, norm, 32).sums == state.sums).all())
        (528, 768, True)
    """
    name = "diffmax.power.to_tiled"
    size, degree, tile = _checked(name, size, degree, tile)
    if not (isinstance(state, tuple) and len(state) == 2):
        raise TypeError(f"{name}: state must be a PowerState or a pair (sums, norm), got {type(state).__name__}")
    _check_rows(name, "state.sums", "state.norm", state[0], state[1], expanded_dim(size, degree))
    return rows_to_tiled(state[0], -2, size, degree, tile), rows_to_tiled(state[1], -1, size, degree, tile)


def from_tiled(sums: Tensor, norm: Tensor, size: int, degree: int = 2, tile: int | None = None) -> PowerState:
    """The exact state that one in a layout of power-attention, retention or vidrial is.

    Args:
        sums, norm: (..., P', D_v) and (..., P') with P' = `tiled_dim`.
        size, degree, tile: As for `to_tiled`.
    Returns:
        The state, in float32 (float64 for float64): queries read from it what they read from the other. Differentiable any
        number of times.
    Raises:
        TypeError, ValueError: As `to_tiled`.
    Numerics: Equal copies of a monomial stay as they are; others are averaged.
    Example:
        >>> from_tiled(torch.ones(1, 4, 768, 32), torch.ones(1, 4, 768), 32).sums.shape
        torch.Size([1, 4, 528, 32])
    """
    name = "diffmax.power.from_tiled"
    size, degree, tile = _checked(name, size, degree, tile)
    _check_rows(name, "sums", "norm", sums, norm, tiled_dim(size, degree, tile))
    acc = accumulation_dtype(torch.promote_types(sums.dtype, norm.dtype))
    return PowerState(
        rows_from_tiled(sums.to(acc), -2, size, degree, tile), rows_from_tiled(norm.to(acc), -1, size, degree, tile)
    )


class _Places(NamedTuple):
    """Of a tiled layout: which monomial a row is, times what; for a monomial its first row, and the number of its rows."""

    which: Tensor
    weight: Tensor
    first: Tensor
    copies: Tensor


def rows_to_tiled(t: Tensor, dim: int, size: int, degree: int, tile: int | None) -> Tensor:
    """Dimension `dim` of t, from exact to tiled."""
    places = _places(size, degree, tile)
    return t.index_select(dim, places.which.to(t.device)) * _along(places.weight, t, dim)


def rows_from_tiled(t: Tensor, dim: int, size: int, degree: int, tile: int | None) -> Tensor:
    """Dimension `dim` of t, from tiled to exact."""
    places = _places(size, degree, tile)
    first = places.first.to(t.device)
    found = t.index_select(dim, first)
    if places.first.numel() < places.which.numel():
        which = places.which.to(t.device)
        away = t - found.index_select(dim, which)  # 0 for equal copies, so that these stay as they are
        found = found + torch.zeros_like(found).index_add(dim, which, away) / _along(places.copies, t, dim)
    return found / _along(places.weight[places.first], t, dim)


def _along(values: Tensor, t: Tensor, dim: int) -> Tensor:
    return values.to(device=t.device, dtype=t.dtype).view(-1, *(1,) * (-dim - 1))


@lru_cache(maxsize=16)
def _places(size: int, degree: int, tile: int | None) -> _Places:
    variables, weight = _blocks(size) if tile is None else _tiles(size, degree, tile)
    which = _rank(variables.sort(0).values, size)
    rows, many = torch.arange(which.numel()), expanded_dim(size, degree)
    first = rows.new_full((many,), which.numel()).scatter_reduce(0, which, rows, "amin")
    return _Places(which, weight, first, torch.bincount(which, minlength=many))


def _blocks(size: int) -> tuple[Tensor, Tensor]:
    """The variables (2, P') of each row and its factor (P',)."""
    pairs, factors = [], []
    for start in range(0, size, BLOCK):
        outer = torch.arange(start + BLOCK).repeat_interleave(BLOCK)
        inner = torch.arange(start, start + BLOCK).repeat(start + BLOCK)
        pairs.append(torch.stack([outer, inner]))
        factors.append(torch.where(outer < start, 2.0, 1.0).double())
    return torch.cat(pairs, 1), torch.cat(factors)


def _tiles(size: int, degree: int, tile: int) -> tuple[Tensor, Tensor]:
    """Likewise, (p, P') and (P',)."""
    tiles, one = indices(size // tile, degree), torch.arange(tile)
    inside = torch.cartesian_prod(*[one] * degree).view(-1, degree).mT
    variables = (tiles.unsqueeze(2) * tile + inside.unsqueeze(1)).flatten(1)
    return variables, multiplicities(size // tile, degree).sqrt().repeat_interleave(tile**degree)


def _rank(variables: Tensor, size: int) -> Tensor:
    """Which monomial these are, for ascending variables (p, n)."""
    degree, found = variables.shape[0], variables[-1]
    for place in range(degree - 1):
        left = degree - place
        behind = [first_of(size, left, index) - first_of(size, left - 1, index) for index in range(size)]
        found = found + torch.tensor(behind)[variables[place]]
    return found


def _checked(name: str, size: Any, degree: Any, tile: Any) -> tuple[int, int, int | None]:
    for what, given in (("size", size), ("degree", degree), *((("tile", tile),) if tile is not None else ())):
        if not is_whole(given):
            raise TypeError(f"{name}: {what} must be an int, got {given!r} of type {type(given).__name__}")
        if given < 1:
            raise ValueError(f"{name}: {what} must be at least 1, got {given}")
    size, degree, tile = as_int(size), as_int(degree), None if tile is None else as_int(tile)
    if tile is None and degree != 2:
        raise ValueError(f"{name}: the layout of blocks has degree 2 alone, got {degree}\nvidrial's has others: pass tile")
    if size % (tile or BLOCK):
        raise ValueError(f"{name}: size must be a multiple of the tile, {tile or BLOCK}, got {size}")
    return size, degree, tile


def _check_rows(name: str, of_sums: str, of_norm: str, sums: Any, norm: Any, rows: int) -> None:
    for what, t in ((of_sums, sums), (of_norm, norm)):
        if not isinstance(t, Tensor) or not t.is_floating_point():
            got = _dtype(t) if isinstance(t, Tensor) else type(t).__name__
            raise TypeError(f"{name}: {what} must be a floating tensor, got {got}")
    if sums.ndim < 2 or sums.shape[-2] != rows or norm.shape != sums.shape[:-1]:
        raise ValueError(
            f"{name}: {of_sums} and {of_norm} must have shapes (..., {rows}, D_v) and (..., {rows}), got {_shape(sums)} and "
            f"{_shape(norm)}"
        )
