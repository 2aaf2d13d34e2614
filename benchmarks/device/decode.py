"""One decoding step, in CUDA graphs and as a host calls it: diffmax, with bounds and without, beside torch's attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import diffmax
from benchmarks.device import allowed
from benchmarks.device.contest import Contestant, poisoned
from benchmarks.device.contest import compete as contest
from benchmarks.device.context import Context, WrongError

PREPARED = 4096
MOST_REPEATED = 1 << 18  # tokens whose keys and values may be laid out for every head
# one draw has few outputs, and the reference errs by little on some of them (diffmax.testing.decoding.checks.DRAWS)
SLACK = 2


def inputs(
    context: Context, batch: int, length: int, content: str, kv_heads: int, group: int, head_dim: int, kind: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """q (B, 1, H, D), k_cache and v_cache (B, length, H_kv, D)."""

    def drawn(*shape: int) -> Tensor:
        return context.randn(*shape).to(kind)

    q = drawn(batch, 1, kv_heads * group, head_dim)
    k_cache, v_cache = (drawn(batch, length, kv_heads, head_dim) for _ in range(2))
    if content == "needles":  # a few keys that the query looks for
        first = q[:, 0, ::group].clone()
        q = first.repeat_interleave(group, 1).unsqueeze(1) + q / 8
        k_cache *= 0.2
        for place in (3, length // 3, length - 2):
            k_cache[:, place] = 1.5 * first
    return q, k_cache, v_cache


def compete(
    context: Context,
    batch: int,
    length: int,
    content: str,
    alpha: float,
    kv_heads: int,
    group: int,
    head_dim: int,
    dtype: str,
) -> dict[str, Any]:
    """A full cache, one new query per head."""
    place, kind = context.place, getattr(torch, dtype)
    length = min(length, PREPARED) if context.prepare else length
    q, k_cache, v_cache = inputs(context, batch, length, content, kv_heads, group, head_dim, kind)

    def ours(given: tuple[Tensor, ...], bounds: diffmax.PageBounds | None, **more: Any) -> Any:
        options = {"alpha": alpha, "backend": place.backend, **more}
        return diffmax.attention_with_kvcache(*given, page_bounds=bounds, **options)

    def of(bounded: bool) -> Callable[[], Contestant]:
        def built() -> Contestant:
            bounds = diffmax.page_bounds(k_cache, length) if bounded else None

            def check() -> dict[str, Any]:
                fresh = inputs(context, batch, length, content, kv_heads, group, head_dim, kind)
                limits = diffmax.page_bounds(fresh[1], length) if bounded else None
                with poisoned():
                    out, stats = ours(fresh, limits, return_stats=True)
                found = judged(context, out, fresh, alpha)
                return {**found, "pages_read": int(stats.pages_read.sum()), "support": float(stats.support_size.float().mean())}

            call = torch.no_grad()(lambda: ours((q, k_cache, v_cache), bounds))
            return Contestant({"step": call}, check, graph=("step",), host=True)

        return built

    heads_first = [t.transpose(1, 2) for t in (q, k_cache, v_cache)]
    softmax = torch.no_grad()(lambda: scaled_dot_product_attention(*heads_first, enable_gqa=True))
    field = {"diffmax": of(False), "diffmax, bounds": of(True)}
    if not context.prepare:
        field["sdpa"] = lambda: Contestant({"step": softmax}, lambda: None, graph=("step",), host=True)
        if batch * length <= MOST_REPEATED and place.graphs:
            repeated = [heads_first[0], *(t.repeat_interleave(group, 1) for t in heads_first[1:])]
            field["sdpa, heads repeated"] = lambda: Contestant(
                {"step": torch.no_grad()(lambda: scaled_dot_product_attention(*repeated))}, lambda: None, graph=("step",)
            )
    cache_bytes = 2 * k_cache.numel() * k_cache.element_size()
    return {"cache_bytes": cache_bytes, "pages": -(-length // 64) * batch * kv_heads, **contest(context, field)}


def judged(context: Context, out: Tensor, given: tuple[Tensor, ...], alpha: float) -> dict[str, Any]:
    """One sequence's output against the reference in float64."""
    device, which = context.place.float64(), context.seed % out.shape[0]
    own = [t[which : which + 1] for t in given]
    exact, same = (
        diffmax.attention_with_kvcache(*(t.to(device, kind) for t in own), alpha=alpha, backend="reference")
        for kind in (torch.float64, own[0].dtype)
    )
    error = float((out[which : which + 1].double().to(device) - exact).abs().max())
    limit = SLACK * allowed.largest(exact, same)
    if not error <= limit:
        raise WrongError(f"the output errs by {error:.3g}, allowed {limit:.3g}", error=error, allowed=limit)
    return {"error": error, "allowed": limit}
