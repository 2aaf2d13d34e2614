"""`replace`: set an alpha and a scale per head, in the model and in its configuration."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Container, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from diffmax.integrations.transformers.attention import _attention_forward, register_functions
from diffmax.integrations.transformers.heads import NAME, Heads, heads_of, parts_of, refuse_anothers
from diffmax.nn._precision import PreciseBuffers


def replace(model: nn.Module, heads: Heads | None = None, share: float = 1.0) -> nn.Module:
    """Give a transformers model diffmax attention with an alpha and a scale per head, in place.

    Args:
        model: The model.
        heads: The result of `calibrate` or `suggest_alpha`, or made by hand: of each attention layer, by its name in the model,
            a number for each query head, {"model.layers.0.self_attn": {"alpha": [0.5, 0.9], "scale": [1.0, 1.0]}}. None: the
            value in `model.config.diffmax`, which `save_pretrained` writes. `from_pretrained` calls `replace` by itself.
        share: How far to move from softmax, 0 < share <= 1: (1 - alpha) and (1 - scale) are multiplied by it. 1 is the full
            change. The configuration holds what they are then.
    Returns:
        The model. Parts of a composite model of which `heads` names no layer keep their attention, with a warning.
    Raises:
        TypeError: The model is not one of transformers, or heads is no dictionary of numbers.
        ValueError: `heads` names a layer that the model lacks, or does not hold an alpha in (0, 1) and a positive scale for
            each head; or it is None and the configuration has no heads; or the model caps its scores, which takes one scale for
            all heads; or share is out of range. The model is then unchanged. A layer that got no heads raises when it runs.
    Numerics: alphas and scales stay float32 if the model is converted to float16 or bfloat16, before or after.
    """
    if not 0 < share <= 1:
        raise ValueError(f"replace: share must satisfy 0 < share <= 1, got {share}")
    if not hasattr(model, "set_attn_implementation"):
        raise TypeError(f"replace: the model must be one of transformers, got {type(model).__name__}")
    config: Any = model.config
    is_given = heads is not None
    heads = heads if heads is not None else heads_of(config)
    if not isinstance(heads, Mapping):
        raise TypeError(
            f"replace: heads must be a dictionary of alphas and scales per layer, got {heads!r}\n"
            'for one alpha in the whole model, or a tensor with one per head, register(alpha=..., scale="match") and '
            'model.set_attn_implementation("diffmax")'
        )
    if not heads:
        raise ValueError(
            "replace: heads must be given for a model that was not adapted before, got none\n"
            "diffmax.integrations.transformers.calibrate finds them; an alpha that was given to register is in no "
            "configuration: register it again"
        )
    modules = {name: _module(model, name) for name in heads}
    for of_part in {id(part): part for part in (config, *(getattr(m, "config", None) for m in modules.values()))}.values():
        refuse_anothers(of_part)
    heads = {name: _checked(name, modules[name], of_layer, share) for name, of_layer in heads.items()}
    kept = _kept(config, model, modules)
    is_new = is_given and not any(hasattr(module, "diffmax_heads") for module in modules.values())
    register_functions(NAME, _attend_adapted, "replace", partial=None)
    for name, of_layer in heads.items():
        module: Any = modules[name]
        if not hasattr(module, "diffmax_heads"):
            module.diffmax_heads = PreciseBuffers()
        for what, values in of_layer.items():
            # a buffer moves with the model to its device; the configuration is what is saved
            tensor = torch.tensor(values, dtype=torch.float32, device="cpu")
            module.diffmax_heads.register_buffer(what, tensor.to(_device(module, model)), persistent=False)
    before = heads_of(config)
    config.diffmax = {name: before[name] for name in kept} | heads
    parts: dict[int, tuple[Any, Heads]] = {}  # of a composite model, whose layers look into configurations of their own
    for name, layer in (kept | modules).items():
        part = config if getattr(layer, "config", None) is None else layer.config
        parts.setdefault(id(part), (part, {}))[1][name] = config.diffmax[name]
    for part, of_part in parts.values():
        if part is not config:
            part.diffmax = of_part
    wanted = _wanted(config, parts)
    if is_new:
        _warn_of_the_rest(config, model, wanted)
    model.set_attn_implementation(wanted)  # type: ignore[operator]
    return model


def adapted_when_loaded() -> None:
    """Let `from_pretrained` give a model the heads in its configuration, unless another attn_implementation is asked for.

    `save_pretrained` then writes the attention of an adapted model, so that it does not run softmax in silence where diffmax is
    not imported.

    Raises:
        ImportError: transformers is missing or too old.
    """
    register_functions(NAME, _attend_adapted, "replace", partial=None)
    import transformers

    kind: Any = transformers.PreTrainedModel
    load, save = kind.from_pretrained.__func__, kind.save_pretrained
    if hasattr(load, "_diffmax_adapts"):
        return

    @functools.wraps(load)
    def load_adapted(cls: Any, *args: Any, **kwargs: Any) -> Any:
        given = kwargs.get("attn_implementation")
        loaded = load(cls, *args, **kwargs)
        if isinstance(given, str) and given != NAME:
            return loaded
        others = _others(given if isinstance(given, dict) else kwargs.get("config"))
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # with output_loading_info
        config = getattr(model, "config", None)
        if not {"", *parts_of(config)} <= others:
            chosen = {key: _attention_of(config, key) for key in others}
            _adapt(model)
            changed = {key: name for key, name in chosen.items() if _attention_of(config, key) != name}
            if changed:
                model.set_attn_implementation(changed)
        return loaded

    @functools.wraps(save)
    def save_adapted(self: Any, *args: Any, **kwargs: Any) -> Any:
        config = self.config
        parts = list({id(part): part for part in parts_of(config).values()}.values())
        if vars(config).get("diffmax", "") is None:  # given up, for the parts too
            for part in parts:
                part.diffmax = None
        with_heads = [part for part in parts if heads_of(part)] or ([config] if heads_of(config) else [])
        others = {str(part._attn_implementation): None for part in with_heads if part._attn_implementation != NAME}
        if others:
            warnings.warn(
                f"save_pretrained: this {type(self).__name__} runs {', '.join(others)} where its configuration has heads, and "
                "will load with these heads again\nto save it with softmax, set its config.diffmax to None before",
                stacklevel=2,
            )
        if not with_heads and any(part._attn_implementation == NAME for part in parts or [config]):
            warnings.warn(
                f"save_pretrained: this {type(self).__name__} runs with heads that its configuration does not have, and will "
                "load with softmax\nto keep the heads, call replace(model, heads) before",
                stacklevel=2,
            )
        # so that it does not run softmax in silence where diffmax is not imported
        told = [part for part in with_heads if part._attn_implementation == NAME]
        for part in told:
            part.attn_implementation = NAME
        try:
            return save(self, *args, **kwargs)
        finally:
            for part in told:
                del part.attn_implementation

    load_adapted._diffmax_adapts = True  # type: ignore[attr-defined]
    kind.from_pretrained, kind.save_pretrained = classmethod(load_adapted), save_adapted


def _attention_of(config: Any, key: str) -> Any:
    """The attn_implementation of a part, or of the model itself: ""."""
    return getattr(config if not key else getattr(config, key, None), "_attn_implementation", None)


def _wanted(config: Any, with_heads: Container[int]) -> str | dict[str, str]:
    """What has the attention of adapted models: the parts of a composite model that have heads, by their ids, or all of it."""
    named = {key: NAME for key, part in parts_of(config).items() if id(part) in with_heads}
    return {"": NAME, **named} if named and id(config) not in with_heads else NAME


def _warn_of_the_rest(config: Any, model: nn.Module, wanted: str | Mapping[str, str]) -> None:
    """Warn of parts of a composite model that keep their attention, and of heads that will not be saved."""
    attending = {id(getattr(m, "config", None)) for m in model.modules() if "Attention" in type(m).__name__}
    parts = {} if isinstance(wanted, str) else parts_of(config)
    left = [key for key, part in parts.items() if key not in wanted and id(part) in attending]
    if left:
        warnings.warn(f"replace: heads name no layer of {', '.join(left)}, which keeps its attention", stacklevel=3)
    if hasattr(model, "peft_config"):
        warnings.warn(
            "replace: heads are in the configuration of the base model, which save_pretrained does not write with an adapter\n"
            "save the base with its heads before it gets one, or merge them: merge_and_unload()",
            stacklevel=3,
        )


def _others(asked: Any) -> set[str]:
    """The parts of a model that are asked to have another attention than that of adapted models; "" is its own.

    Asked by a dictionary, or by the configuration, where the Auto classes put what from_pretrained is asked for.
    """
    found = asked if isinstance(asked, dict) else {key: _attention_of(asked, key) for key in ("", *parts_of(asked))}
    return {key for key, name in found.items() if name not in (None, NAME)}


def _adapt(model: Any) -> None:
    """Apply the heads of a model's configuration, or those of the models that it was put together from."""
    if not heads_of(getattr(model, "config", None)):
        inner = [part for part in model.children() if hasattr(part, "set_attn_implementation")]
        for part in inner:
            _adapt(part)
        return
    try:
        replace(model)
    except ValueError as error:
        raise ValueError(f'{error}\nto load it with softmax, pass attn_implementation="eager"') from error


def _checked(name: str, module: nn.Module, of_layer: Any, share: float) -> dict[str, list[float]]:
    """A layer's alpha and scale per head, moved from softmax by a share, as numbers of its own that JSON can hold."""
    if not isinstance(of_layer, Mapping) or set(of_layer) != {"alpha", "scale"}:
        got = sorted(map(str, of_layer)) if isinstance(of_layer, Mapping) else type(of_layer).__name__
        raise ValueError(f"replace: the heads of {name} must be a dictionary of alpha and scale, got {got}")
    found: dict[str, Any] = {}
    for what, rule, largest in (("alpha", "lie strictly between 0 and 1", 1.0), ("scale", "be positive", math.inf)):
        try:
            found[what] = torch.as_tensor(of_layer[what], dtype=torch.float64, device="cpu").tolist()
        except (TypeError, ValueError, RuntimeError):
            found[what] = None
        if not isinstance(found[what], list) or not all(isinstance(number, float) for number in found[what]):
            raise TypeError(f"replace: {what} of {name} must be a list with a number per head, got {of_layer[what]!r}")
        wrong = [number for number in found[what] if not 0 < number < largest]
        if wrong:
            raise ValueError(f"replace: each {what} of {name} must {rule}, got {wrong[0]}")
    given, heads = (len(found["alpha"]), len(found["scale"])), _head_count(module)
    if given != (given[0] if heads is None else heads,) * 2:
        raise ValueError(
            f"replace: {name} must have an alpha and a scale per head, got {given[0]} and {given[1]}"
            f"{'' if heads is None else f' for {heads} heads'}"
        )
    if getattr(module, "attn_logit_softcapping", None):
        raise ValueError(
            f"replace: {type(module).__name__} caps its scores, which takes one scale for all heads, got one per head\n"
            'use register(alpha=..., scale="match") with one alpha for all heads'
        )
    return {what: [x if share == 1 else 1 - share * (1 - x) for x in values] for what, values in found.items()}


def _kept(config: Any, model: nn.Module, given: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Layers that have heads already and get no others, by their names in the configuration."""
    before = {name: _found(model, name) for name in heads_of(config) if name not in given}
    new = set(given.values())
    return {
        name: found[0]
        for name, found in before.items()
        if len(found) == 1 and found[0] not in new and hasattr(found[0], "diffmax_heads")
    }


def _head_count(module: nn.Module) -> int | None:
    """The number of query heads that an attention layer states, if any."""
    config = getattr(module, "config", None)
    said = [getattr(module, name, None) for name in ("num_heads", "num_attention_heads", "n_heads")]
    return next((n for n in (*said, getattr(config, "num_attention_heads", None)) if isinstance(n, int)), None)


def _found(model: nn.Module, name: str) -> list[nn.Module]:
    """The layers of that name, even if the model was saved with or without a head or a wrapper around it."""
    return [m for n, m in model.named_modules() if n == name or n.endswith(f".{name}") or (n and name.endswith(f".{n}"))]


def _module(model: nn.Module, name: str) -> nn.Module:
    """The attention layer of that name."""
    found = _found(model, name)
    if len(found) != 1:
        raise ValueError(f"replace: {type(model).__name__} must have one layer {name}, got {len(found)}\nis it another model?")
    inner = [n for n, part in found[0].named_modules() if n and "Attention" in type(part).__name__]
    if inner:
        raise ValueError(f"replace: {name} is no attention layer, but holds one\nis {name}.{inner[-1]} meant?")
    return found[0]


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
        layer = getattr(module, "layer_idx", None)
        raise ValueError(
            f"diffmax attention: this {type(module).__name__}{'' if layer is None else f' of layer {layer}'} has no heads yet\n"
            "call diffmax.integrations.transformers.replace(model); heads that are given must name every layer that runs\n"
            "a model whose configuration was adapted through another model, which shares it, needs a call of its own"
        )
    # on another device only if the layer's parameters are moved for the call, as accelerate does
    alpha, scale = (t.to(query.device) for t in (heads.alpha, heads.scale))
    return _attention_forward(module, query, key, value, attention_mask, alpha=alpha, scale=scale, **kwargs)
