"""Nested tensors: their sequences packed one after the other for the operators, and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffmax.operators.common.checks import _readable, _shape, as_int, is_whole


class Packed(NamedTuple):
    """The sequences of a nested tensor (B, H, j, D), or (B, j, D) for one head.

    Attributes:
        tokens: (T, H, D), which leads back to the nested tensor by autograd.
        ends: (B + 1,): where each sequence begins, and the end.
        longest: The longest sequence's length.
    """

    tokens: Tensor
    ends: Tensor
    longest: int


def pack(name: str, what: str, t: Tensor) -> Packed:
    """Check a nested tensor of attention, and pack it."""
    ragged = t._ragged_idx if t.layout is torch.jagged else t.dim() - 2  # type: ignore[attr-defined]
    if t.dim() not in (3, 4) or ragged != t.dim() - 2:
        hint = f"\npass {what}.transpose(1, 2)" if t.dim() == 4 and ragged == 1 else ""
        raise ValueError(
            f"{name}: a nested {what} must have its sequences at dimension -2, as (B, H, j, D) or (B, j, D), got "
            f"{t.dim()} dimensions with them at {ragged}{hint}"
        )
    if t.layout is torch.jagged:
        return _pack_jagged(t)
    parts = list(t.unbind())
    lengths = [part.shape[-2] for part in parts]
    tokens = [part.transpose(0, 1) if part.dim() == 3 else part.unsqueeze(1) for part in parts]
    ends = torch.tensor([0, *lengths], dtype=torch.int32, device="cpu").cumsum(0, dtype=torch.int32).to(t.device)
    return Packed(torch.cat(tokens), ends, max(lengths))


def _pack_jagged(t: Any) -> Packed:
    sequences = t.transpose(1, 2) if t.dim() == 4 else t
    if sequences.lengths() is not None:  # with holes between the sequences
        sequences = sequences.contiguous()
    tokens = sequences.values()
    longest = getattr(sequences, "_maybe_max_seqlen", None)  # what is known without a look at the device
    ends = sequences.offsets()
    if longest is None:
        longest = int(ends.diff().max()) if _readable(ends) else tokens.shape[0]
    return Packed(tokens if t.dim() == 4 else tokens.unsqueeze(1), ends, longest)


def like(t: Tensor, rows: Tensor) -> Tensor:
    """Rows (T, H, ...) of t's sequences as t is nested: (B, H, j, ...), or (B, j, ...) for one head."""
    if t.dim() == 3:
        rows = rows.squeeze(1)
    if t.layout is not torch.jagged:
        lengths = [part.shape[-2] for part in t.unbind()]
        parts = [part.transpose(0, 1) if t.dim() == 4 else part for part in torch.split(rows, lengths)]
        return torch.nested.as_nested_tensor(parts, layout=torch.strided)
    sequences: Any = t.transpose(1, 2) if t.dim() == 4 else t
    if sequences.lengths() is not None:
        sequences = sequences.contiguous()
    made = torch.nested.nested_tensor_from_jagged(rows, sequences.offsets())
    return made.transpose(1, 2) if t.dim() == 4 else made


def weights(name: str, X: Any, dim: int, solve: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Weights of nested scores along `dim`, as torch.softmax takes them: `solve` gives those of dense scores along its dim."""
    if not is_whole(dim) or not -X.dim() <= dim < X.dim() or dim % X.dim() == 0:
        raise ValueError(
            f"{name}: dim must lie in [1, {X.dim() - 1}] for a nested X of {X.dim()} dimensions, the first its batch, "
            f"got {dim!r}"
        )
    dim = as_int(dim) % X.dim()
    if X.layout is not torch.jagged:
        parts = [solve(part, dim - 1) for part in X.unbind()]
        return torch.nested.as_nested_tensor(parts, layout=torch.strided)
    ragged = X._ragged_idx
    if dim != ragged:
        solved = solve(X.values(), dim - 1)
        return torch.nested.nested_tensor_from_jagged(solved, X.offsets(), X.lengths(), jagged_dim=ragged)
    if ragged != 1:
        return weights(name, X.transpose(1, ragged), 1, solve).transpose(1, ragged)
    if X.lengths() is not None:
        X = X.contiguous()
    solved = solve(X.to_padded_tensor(-torch.inf), 1)
    inside = torch.arange(solved.shape[1], device=solved.device) < X.offsets().diff().unsqueeze(1)
    return torch.nested.nested_tensor_from_jagged(solved[inside], X.offsets())


def check_all(name: str, query: Tensor, key: Tensor, value: Tensor, attn_mask: Any) -> None:
    """Check that all are nested in one way, without a mask."""
    given = {"query": query, "key": key, "value": value}
    kinds = {what: ("nested " if t.is_nested else "") + str(t.layout) for what, t in given.items() if isinstance(t, Tensor)}
    if len(kinds) < 3 or len(set(kinds.values())) > 1:
        facts = "   ".join(f"{what} {kinds.get(what, type(t).__name__)}" for what, t in given.items())
        raise TypeError(
            f"{name}: query, key and value must all be nested, of one layout, or none of them, got\n  {facts}\n"
            "nest the others with torch.nested.nested_tensor, or pad the nested ones with .to_padded_tensor(0.0)"
        )
    if attn_mask is not None:
        got = _shape(attn_mask) if type(attn_mask) is Tensor else type(attn_mask).__name__
        raise ValueError(
            f"{name}: attn_mask must be None for nested tensors, got {got}\n"
            "is_causal, window_size and alibi_slopes act within each sequence"
        )


def check_same_lengths(name: str, key: Packed, value: Packed) -> None:
    """Check that key and value have the same sequences."""
    if key.ends is value.ends:
        return
    same = key.ends.shape == value.ends.shape and (not _readable(key.ends) or torch.equal(key.ends, value.ends))
    if not same:
        lengths = " and ".join(str(packed.ends.diff().tolist()) for packed in (key, value))
        raise ValueError(f"{name}: nested key and value must have sequences of the same lengths, got {lengths}")
