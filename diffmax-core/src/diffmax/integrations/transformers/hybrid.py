"""The hybrid of diffmax and power attention in models of transformers: `attn_implementation="diffmax_hybrid"`."""

from __future__ import annotations

import functools
import math
import numbers
from typing import Any

from torch import Tensor, nn

from diffmax.hybrid import HybridCache
from diffmax.integrations.transformers import refusals
from diffmax.integrations.transformers.attention import ModelAlpha, _per_head
from diffmax.integrations.transformers.power import PerModule, check_option, gates_of, option_of, register_state
from diffmax.integrations.transformers.power_masks import check_call


def register_hybrid(
    name: str = "diffmax_hybrid",
    alpha: ModelAlpha = 0.9,
    *,
    tail: int = 1024,
    block: int = 128,
    degree: int = 2,
    offset: PerModule = 0.0,
    slope: PerModule = 1.0,
    log_gates: PerModule | None = None,
    score_scale: float = 1.0,
    partial: bool = False,
) -> None:
    """Make the hybrid of `diffmax.HybridCache` an attention implementation of Hugging Face transformers, under `name`.

    Every layer attends its recent tokens by diffmax, and all older ones as one key, through a state of power attention. With a
    `HybridModelCache`, `generate` takes constant memory and time for each token. With transformers' own cache, or without one
    (training), the same is computed from all keys.

    Args:
        name: The name to register, as in `register`.
        alpha: As in `register`. torch.tensor(1.0) is softmax.
        tail, block, degree: As in `diffmax.HybridCache`.
        offset, slope: As in its `attend`: a float, a tensor () or (H,), or a function of the attention module that returns one,
            such as a parameter for each layer. offset=-inf: no past.
        log_gates: As in `register_power`: the fading of the past.
        score_scale: Factor of the model's own scale of scores.
        partial: As in `register`.
    Raises:
        ImportError: transformers is missing or too old.
        TypeError, ValueError: An argument has the wrong type or is out of range. Later, from a model: as in `register_power`.
    Example:
        >>> register_hybrid("hybrid-2k", 0.9, tail=2048, offset=-4.0)
    """
    made = functools.partial(HybridCache, tail, block=block, degree=degree)
    made()  # checks the numbers
    check_option("register_hybrid", "alpha", alpha, 0.0, 1.0)
    for what, given in (("offset", offset), ("slope", slope)):
        check_option("register_hybrid", what, given, -math.inf, math.inf)
        if given is None:
            raise TypeError(f"register_hybrid: {what} must be a number, a tensor or a function, got None")
    check_option("register_hybrid", "log_gates", log_gates, -math.inf, 0.0)
    if isinstance(score_scale, bool) or not isinstance(score_scale, numbers.Real) or not score_scale > 0:
        raise ValueError(f"register_hybrid: score_scale must be a positive number, got {score_scale!r}")
    label = f'attn_implementation="{name}"'
    options: dict[str, Any] = {
        "alpha": alpha,
        "offset": offset,
        "slope": slope,
        "log_gates": log_gates,
        "score_scale": float(score_scale),
    }
    register_state("register_hybrid", name, label, functools.partial(_attend, label=label, made=made, **options), partial)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    *,
    label: str,
    made: Any,
    alpha: Any,
    offset: Any,
    slope: Any,
    log_gates: Any,
    score_scale: float,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The registered function: query (B, H, L, D), key and value (B, H_kv, S, D) to output (B, L, H, D_v)."""
    from diffmax.integrations.transformers.power_cache import HybridLayer, taken

    refusals.called()
    tokens = check_call(label, module, query, key, attention_mask, dropout, is_causal, kwargs)
    layer = taken(key)
    if layer is not None and not isinstance(layer, HybridLayer):
        raise ValueError(
            f"{label}: the cache must be a HybridModelCache, or one of transformers, got one with a {type(layer).__name__}"
        )
    cache: HybridCache = made() if layer is None else layer.cache(made)
    gates = gates_of(label, module, log_gates, key, tokens)
    scale = (query.shape[3] ** -0.5 if scaling is None else scaling) * score_scale
    out = cache.attend(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        None if gates is None else gates.transpose(1, 2),
        alpha=_per_head("alpha", option_of(module, alpha), query.shape[1]),
        softmax_scale=scale,
        offset=option_of(module, offset),
        slope=option_of(module, slope),
        padding=None if tokens is None else ~tokens,
    )
    if layer is not None:
        layer.take()
    return out, None
