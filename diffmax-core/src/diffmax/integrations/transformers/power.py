"""Power attention in models of Hugging Face transformers: `register_power()`, then `attn_implementation="power"`."""

from __future__ import annotations

import functools
import numbers
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from diffmax.integrations.transformers import refusals
from diffmax.integrations.transformers.attention import _RESERVED, _import_transformers
from diffmax.integrations.transformers.power_masks import check_call, padding_mask_of
from diffmax.nn.schedule import AlphaSchedule
from diffmax.operators.power.api import power_attention
from diffmax.operators.power.checks import check_degree

PerModule: TypeAlias = "float | Tensor | Callable[[nn.Module], float | Tensor]"


def register_power(
    name: str = "power",
    *,
    degree: int = 2,
    log_gates: PerModule | None = None,
    interpolate: PerModule | AlphaSchedule = 1.0,
    partial: bool = False,
) -> None:
    """Make power attention an attention implementation of Hugging Face transformers, under `name`.

    With `interpolate` t, a layer's output is (1 - t) softmax attention + t power attention: so a pretrained softmax model
    becomes one of power attention step by step, while it is trained.

    Args:
        name: The name to register, as in `register`.
        degree: p, even.
        log_gates: The log of a fixed gate for each key/value head, at most 0: a float, a tensor () or (H_kv,), which may
            require a gradient, or a function of the attention module that returns one. None: gates of 1, as a
            pretrained model has none; log(0.999) is the published start.
        interpolate: t in [0, 1]: a number, a function of the attention module, or an `AlphaSchedule`, of which t is the
            `share`. 0 is the model's softmax.
        partial: As in `register`.
    Raises:
        ImportError: transformers is missing or too old.
        TypeError, ValueError: An argument has the wrong type or is out of range. Later, from a model: it asks for what a state
            cannot do, such as a sliding window, a mask that is not causal, softcap, sinks, position biases or dropout.

    Causal attention, grouped query heads, padding and all caches but static ones work. With a `PowerModelCache`, `generate`
    takes constant memory and time for each token. Padding before and behind a sequence is left out: its keys are zeros, and its
    gates 1.

    Example:
        >>> register_power("power-4", degree=4, log_gates=-0.001)
        >>> from transformers import LlamaConfig, LlamaModel
        >>> config = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)
        >>> model = LlamaModel(config)
        >>> model.set_attn_implementation("power-4")
        >>> model(torch.tensor([[1, 2, 3, 4]])).last_hidden_state.shape
        torch.Size([1, 4, 8])
    """
    degree = check_degree("register_power", degree)
    check_option("register_power", "log_gates", log_gates, -float("inf"), 0.0)
    if not isinstance(interpolate, AlphaSchedule):
        check_option("register_power", "interpolate", interpolate, 0.0, 1.0)
        if interpolate is None:
            raise TypeError("register_power: interpolate must be a number from 0 to 1, got None\n1 is power attention alone")
    label = f'attn_implementation="{name}"'
    attend = functools.partial(_attend, label=label, degree=degree, log_gates=log_gates, interpolate=interpolate)
    register_state("register_power", name, label, attend, partial)


def register_state(function: str, name: Any, label: str, attend: Callable[..., Any], partial: bool) -> None:
    """Register an attention function that keeps a state, and its mask function."""
    if not isinstance(name, str):
        raise TypeError(f"{function}: name must be a string, got {name!r}")
    if any(word in name for word in _RESERVED):
        raise ValueError(f"{function}: name must not contain {', '.join(_RESERVED)}, got {name!r}")
    attention_interface, mask_interface, _ = _import_transformers()
    attention_interface.register(name, attend)
    mask_interface.register(name, functools.partial(padding_mask_of, label))
    refusals.watch(name, label, partial)


def check_option(function: str, what: str, given: Any, low: float, high: float) -> None:
    """Check a number that may be a tensor or a function; None is left to the caller."""
    if given is None or (callable(given) and not isinstance(given, Tensor)):
        return
    if isinstance(given, Tensor):
        if not given.is_floating_point() or given.ndim > 1:
            raise ValueError(f"{function}: {what} must be floating of shape () or one number per head, got {given.dtype}")
        return
    if not isinstance(given, numbers.Real) or isinstance(given, bool):
        raise TypeError(f"{function}: {what} must be a number, a tensor or a function of the attention module, got {given!r}")
    if not low <= float(given) <= high:
        raise ValueError(f"{function}: {what} must lie in [{low}, {high}], got {given}")


def option_of(module: nn.Module, given: Any) -> Any:
    """The number or tensor for a layer."""
    return given(module) if callable(given) and not isinstance(given, Tensor) else given


def gates_of(label: str, module: nn.Module, given: Any, key: Tensor, tokens: Tensor | None) -> Tensor | None:
    """Log gates (B, H_kv, S) in float32 or wider, 0 at padding; None for gates of 1."""
    gate = option_of(module, given)
    if gate is None:
        return None
    heads, dtype = key.shape[1], torch.promote_types(key.dtype, torch.float32)
    gate = torch.as_tensor(gate, device=key.device).to(dtype)
    if gate.shape not in ((), (heads,)):
        raise ValueError(f"{label}: log_gates must be () or (H_kv,) = ({heads},), got {tuple(gate.shape)}")
    gates = gate.reshape(1, -1, 1).expand(key.shape[:3])
    return gates if tokens is None else gates.masked_fill(~tokens.unsqueeze(1), 0.0)


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
    degree: int,
    log_gates: Any,
    interpolate: Any,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The registered function: query (B, H, L, D), key and value (B, H_kv, S, D) to output (B, L, H, D_v)."""
    from diffmax.integrations.transformers.power_cache import PowerLayer, taken

    refusals.called()
    tokens = check_call(label, module, query, key, attention_mask, dropout, is_causal, kwargs)
    layer = taken(key)
    share = interpolate.share if isinstance(interpolate, AlphaSchedule) else option_of(module, interpolate)
    whole = not isinstance(share, Tensor) and share == 1
    if layer is not None and not (isinstance(layer, PowerLayer) and whole):
        what = type(layer).__name__ if whole else f"a PowerModelCache with interpolate={share}"
        raise ValueError(
            f"{label}: the cache must be a PowerModelCache, with interpolate=1, or one of transformers, got {what}\n"
            "a blend needs all keys: leave past_key_values out"
        )
    if not isinstance(share, Tensor) and not 0 <= share <= 1:
        raise ValueError(f"{label}: interpolate must lie in [0, 1], got {share}")
    gates = gates_of(label, module, log_gates, key, tokens)
    if tokens is not None:  # values too: 0 times NaN would be NaN
        key, value = (t.masked_fill(~tokens[:, None, :, None], 0.0) for t in (key, value))
    powered: Tensor | None = None
    if isinstance(share, Tensor) or share > 0:
        if isinstance(layer, PowerLayer):
            powered = layer.attend(query, key, value, gates, degree, scaling)
        else:
            powered = power_attention(query, key, value, gates, degree=degree, scale=scaling)
    if whole and powered is not None:
        out = powered
    else:
        out = _softmax(query, key, value, tokens, scaling)
        out = out if powered is None else out + (powered - out) * share
    return out.transpose(1, 2).contiguous(), None


def _softmax(query: Tensor, key: Tensor, value: Tensor, tokens: Tensor | None, scaling: float | None) -> Tensor:
    """Causal softmax attention by torch."""
    length, many = query.shape[2], key.shape[2]
    mask = None
    if tokens is not None or 1 < length < many:
        place = torch.arange(many, device=key.device)
        own = place[many - length :].unsqueeze(1)
        mask = place <= own
        if tokens is not None:  # padding sees itself, which is better than nothing: softmax would be NaN
            mask = mask & (tokens[:, None, None, :] | (place == own))
    key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (key, value))  # torch 2.4 has no enable_gqa
    causal = mask is None and length > 1
    return nn.functional.scaled_dot_product_attention(query, key, value, mask, is_causal=causal, scale=scaling)
