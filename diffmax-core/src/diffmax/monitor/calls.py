"""The sums that a `Monitor` keeps for each call, on the device of the call. Nothing here waits for the device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from diffmax.errors import NoBackendError
from diffmax.machine.dispatch import selected
from diffmax.operators.attention import operator as attention_operator
from diffmax.operators.attention.stats import tile_sparsity
from diffmax.operators.common.numerics import hides
from diffmax.plugin import AttentionCall

# How two values of a name are combined, if not by addition.
Sums = dict[str, Tensor]
_BY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "support_max": torch.maximum,
    "alpha_min": torch.minimum,
    "alpha_max": torch.maximum,
}


def of_rows(X: Tensor, weights: Tensor, e: float | Tensor, dim: int) -> Sums:
    """The sums for rows along `dim`."""
    visible, live = ~hides(X), weights > 0
    broken = weights.isnan().any(dim)
    return _counted(live.sum(dim), visible.sum(dim), broken) | _alphas(e, X)


def of_attention(query: Tensor, key: Tensor, value: Tensor, call: AttentionCall) -> Sums:
    """The sums for the queries of an attention, which runs a second time for its statistics."""
    try:
        _, m, _, _, live, support = attention_operator.attention(query, key, value, True, call, selected(None))
    except NoBackendError:  # the requested backend computes no statistics
        _, m, _, _, live, support = attention_operator.attention(query, key, value, True, call, "reference")
    seen = visible_keys(query, key, call)
    tiles = tile_sparsity(query, key, live, call)
    of_tiles = {"tiles": tiles.nansum(), "tile_counts": (~tiles.isnan()).sum()}
    return _counted(support, seen.expand_as(support), m.isnan()) | _alphas(call.e, query) | of_tiles


def _counted(support: Tensor, visible: Tensor, broken: Tensor) -> Sums:
    """Sums over rows that are not fully masked and hold no NaN."""
    counts = (visible > 0) & ~broken
    support, visible = (torch.where(counts, t.long(), 0) for t in (support, visible))
    return {
        "rows": counts.sum(),
        "support": support.sum(),
        "support_max": support.amax() if support.numel() else support.sum(),
        "visible": visible.sum(),
        "rows_masked": ((visible == 0) & ~broken).sum(),
        "rows_nan": broken.sum(),
    }


def _alphas(e: float | Tensor, like: Tensor) -> Sums:
    alpha = 1 - (e.detach() if isinstance(e, Tensor) else torch.tensor(e, device=like.device))
    return {
        "alpha_sum": alpha.mean(),
        "alpha_min": alpha.amin(),
        "alpha_max": alpha.amax(),
        "calls": torch.ones_like(alpha.amin()),
    }


def together(sums: Sums, more: Sums) -> Sums:
    """The sums of two sets of calls; names that occur in only one are kept."""
    return sums | {n: _BY.get(n, torch.add)(sums[n], t.to(sums[n].device)) if n in sums else t for n, t in more.items()}


def metrics_of(sums: Sums) -> dict[str, Tensor]:
    """The metrics computed from the sums."""
    result = {
        "support_mean": sums["support"] / sums["rows"],
        "support_max": sums["support_max"],
        "zeros_share": (sums["visible"] - sums["support"]) / sums["visible"],
        "rows_masked": sums["rows_masked"],
        "rows_nan": sums["rows_nan"],
        "alpha/mean": sums["alpha_sum"] / sums["calls"],
        "alpha/min": sums["alpha_min"],
        "alpha/max": sums["alpha_max"],
    }
    if "tiles" in sums:
        result["tile_sparsity"] = sums["tiles"] / sums["tile_counts"]
    return result


def visible_keys(query: Tensor, key: Tensor, call: AttentionCall) -> Tensor:
    """The number of keys visible to each query; broadcasts to (B, H, L)."""
    row, keys = torch.arange(query.shape[2], device=query.device), torch.tensor(key.shape[2], device=query.device)
    place = row + (key.shape[2] - query.shape[2] if call.lower_right else 0)
    if call.cu_seqlens_q is not None and call.cu_seqlens_k is not None:
        ends_q, ends_k = call.cu_seqlens_q.long(), call.cu_seqlens_k.long()
        sequence = torch.searchsorted(ends_q[1:].contiguous(), row, right=True).clamp_max(max(len(ends_q) - 2, 0))
        keys = ends_k.diff()[sequence]
        place = row - ends_q[sequence] + keys - ends_q.diff()[sequence]
    zero = torch.zeros_like(place)
    first = zero if call.left < 0 else torch.minimum((place - call.left).clamp_min(0), keys)
    end = zero + keys if call.right < 0 else torch.minimum((place + call.right + 1).clamp_min(0), keys)
    mask = call.mask if call.bias is None else ~hides(call.bias)
    if mask is None:
        return (end - first).clamp_min(0)
    so_far = mask.expand(*mask.shape[:-1], key.shape[2]).cumsum(-1, dtype=torch.int32)
    before = torch.nn.functional.pad(so_far, (1, 0)).expand(*mask.shape[:-2], query.shape[2], -1)
    at_first, at_end = (before.gather(-1, at.unsqueeze(1).expand(*before.shape[:-1], 1)).squeeze(-1) for at in (first, end))
    return (at_end - at_first).clamp_min(0)
