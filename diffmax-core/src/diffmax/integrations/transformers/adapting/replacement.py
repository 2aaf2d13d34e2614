"""`replace`: set an alpha and a scale per head, in the model and in its configuration."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from diffmax.integrations.transformers.attention import _attention_forward, register_functions
from diffmax.nn._precision import PreciseBuffers

# Per attention layer, by its name in the model: the alpha of each head, and the scale of its scores.
Heads: TypeAlias = "dict[str, dict[str, list[float]]]"

NAME = "diffmax-adapted"


def replace(model: nn.Module, heads: Heads | None = None, share: float = 1.0) -> nn.Module:
    """Give a transformers model diffmax attention with an alpha and a scale per head, in place.

    Args:
        model: The model.
        heads: The result of `calibrate`. None: the value in `model.config.diffmax`, which `save_pretrained` and
            `from_pretrained` preserve.
        share: How far to move from softmax, 0 < share <= 1: (1 - alpha) and (1 - scale) are multiplied by it. 1 is the full
            change.
    Returns:
        The model.
    Raises:
        ValueError: `heads` names a layer that the model lacks, or does not hold an alpha in (0, 1) and a positive scale for
            each head; or it is None and the configuration has no heads; or share is out of range. The model is then unchanged.
    Numerics: alphas and scales stay float32 if the model is converted to float16 or bfloat16, before or after.
    """
    if not 0 < share <= 1:
        raise ValueError(f"replace: share must satisfy 0 < share <= 1, got {share}")
    config: Any = model.config
    heads = heads if heads is not None else getattr(config, "diffmax", None)
    if not heads:
        raise ValueError(
            "replace: heads must be given for a model that was not adapted before, got none\n"
            "diffmax.integrations.transformers.calibrate finds them"
        )
    modules = {name: _module(model, name) for name in heads}
    for name, of_layer in heads.items():
        _check_heads(name, modules[name], of_layer)
    register_functions(NAME, _attend_adapted, "replace")
    for name, of_layer in heads.items():
        module: Any = modules[name]
        if not hasattr(module, "diffmax_heads"):
            module.diffmax_heads = PreciseBuffers()
        for what, values in of_layer.items():
            # a buffer moves with the model to its device; the configuration is what is saved
            tensor = 1 - share * (1 - torch.tensor(values, dtype=torch.float32, device="cpu"))
            module.diffmax_heads.register_buffer(what, tensor.to(_device(module, model)), persistent=False)
    config.diffmax = heads
    model.set_attn_implementation(NAME)  # type: ignore[operator]
    return model


def _check_heads(name: str, module: nn.Module, of_layer: Mapping[str, Sequence[float]]) -> None:
    """Check that the layer has an alpha and a scale per head."""
    if not isinstance(of_layer, Mapping) or set(of_layer) != {"alpha", "scale"}:
        got = sorted(map(str, of_layer)) if isinstance(of_layer, Mapping) else type(of_layer).__name__
        raise ValueError(f"replace: the heads of {name} must be a dictionary of alpha and scale, got {got}")
    for what, rule, largest in (("alpha", "lie strictly between 0 and 1", 1.0), ("scale", "be positive", math.inf)):
        wrong = [number for number in of_layer[what] if not 0 < number < largest]
        if wrong:
            raise ValueError(f"replace: each {what} of {name} must {rule}, got {wrong[0]}")
    given = len(of_layer["alpha"]), len(of_layer["scale"])
    heads = _head_count(module)
    if given != (given[0] if heads is None else heads,) * 2:
        raise ValueError(
            f"replace: {name} must have an alpha and a scale per head, got {given[0]} and {given[1]}"
            f"{'' if heads is None else f' for {heads} heads'}"
        )


def _head_count(module: nn.Module) -> int | None:
    """The number of query heads that an attention layer states, if any."""
    config = getattr(module, "config", None)
    said = [getattr(module, name, None) for name in ("num_heads", "num_attention_heads", "n_heads")]
    return next((n for n in (*said, getattr(config, "num_attention_heads", None)) if isinstance(n, int)), None)


def _module(model: nn.Module, name: str) -> nn.Module:
    """The attention layer of that name, even if the model was saved with or without a head or a wrapper around it."""
    found = [m for n, m in model.named_modules() if n == name or n.endswith(f".{name}") or (n and name.endswith(f".{n}"))]
    if len(found) != 1:
        raise ValueError(f"replace: {type(model).__name__} must have one layer {name}, got {len(found)}\nis it another model?")
    module: nn.Module = found[0]
    return module


def _device(module: nn.Module, model: nn.Module) -> torch.device:
    """The device of the layer, or of the model's first parameter if the layer is on "meta" between calls (offloaded)."""
    places = (parameter.device for part in (module, model) for parameter in part.parameters())
    return next((place for place in places if place.type != "meta"), torch.device("cpu"))


def _attend_adapted(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Attention of a module to which `replace` has added alphas and scales of shape (H,)."""
    heads = getattr(module, "diffmax_heads", None)
    if heads is None:
        raise ValueError(
            f"diffmax attention: {type(module).__name__} has no heads yet\n"
            "call diffmax.integrations.transformers.replace(model) after from_pretrained"
        )
    # on another device only if the layer's parameters are moved for the call, as accelerate does
    alpha, scale = (t.to(query.device) for t in (heads.alpha, heads.scale))
    return _attention_forward(module, query, key, value, attention_mask, alpha=alpha, scale=scale, **kwargs)
