"""Run a model with softmax, and record the calls of its attention layers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diffmax.integrations.transformers import refusals
from diffmax.integrations.transformers.adapting.outputs import Batch, Output
from diffmax.integrations.transformers.attention import _refuse_what_changes_the_weights, register_functions
from diffmax.integrations.transformers.masks import merged_mask, read
from diffmax.integrations.transformers.unfused import masked
from diffmax.operators.common.numerics import accumulation_dtype, hides

_RECORDING = "diffmax-recording"

# Arguments of attention layers that the measurement handles: it refuses them or ignores them.
_MEASURED = {
    "cu_seq_lens_k",
    "cu_seq_lens_q",
    "dropout",
    "is_causal",
    "max_length_k",
    "max_length_q",
    "position_bias",
    "s_aux",
    "scaling",
    "sliding_window",
    "softcap",
}


class Scored(NamedTuple):
    """What a call computes, in float32 or better: masked scores (B, H, L, S), values (B, H, S, D), output (B, H, L, D).

    The output is softmax's. As fused attention computes it: in float16 small weights would be 0, and squares infinite.
    """

    scores: Tensor
    values: Tensor
    output: Tensor


@dataclass
class Call:
    """A call of an attention layer: queries (B, H, L, D), keys and values (B, H_kv, S, D), the output of softmax (B, H, L, D).

    Scores are not kept: of all layers together they would take most of the memory.
    """

    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    is_causal: bool
    scale: float
    output: Tensor

    def scored(self, step: int = 1) -> Scored:
        """The scores, those of each step-th query alone, and what belongs to them."""
        acc = accumulation_dtype(self.query.dtype)
        query, key, value = self.query.to(acc), *(_for_heads(t.to(acc), self.query.shape[1]) for t in (self.key, self.value))
        mask = self.mask
        if mask is not None and mask.dtype != torch.bool:  # what hides does so by its own dtype's least number
            mask = mask.to(acc).masked_fill(hides(mask), -torch.inf)
        scores = masked(query @ key.mT * self.scale, mask, self.is_causal)[:, :, ::step]
        return Scored(scores, value, _weights(scores) @ value)


def record(function: str, model: nn.Module, batch: Batch, output: Output) -> tuple[list[Call], Tensor]:
    """The calls of the model's attention layers, and the model's output. Errors name `function`."""
    if torch.is_inference_mode_enabled():
        raise RuntimeError(f"{function}: gradients are needed, which torch.inference_mode() forbids\ncall it outside")
    calls: list[Call] = []

    def attend(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        calls.append(_attend_with_softmax(function, *args, **kwargs))
        return calls[-1].output.transpose(1, 2).contiguous(), None

    with as_it_was(model):
        register_functions(_RECORDING, attend, function, partial=None)
        model.eval()
        model.set_attn_implementation(_RECORDING)  # type: ignore[operator]
        with torch.enable_grad():
            final = output(model(**batch), batch)
    return calls, final


def _attend_with_softmax(
    function: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> Call:
    """Softmax attention for a layer that calls the attention interface of transformers; its output requires a gradient."""
    refusals.called()
    _refuse_what_changes_the_weights({name: given for name, given in kwargs.items() if name not in _MEASURED})
    for name in ("softcap", "s_aux", "cu_seq_lens_q", "cu_seq_lens_k"):
        if kwargs.get(name) is not None:
            raise ValueError(f"{function}: {name} is not implemented, got {type(module).__name__} with one")
    scale = query.shape[-1] ** -0.5 if kwargs.get("scaling") is None else kwargs["scaling"]
    attention_mask, causal = read(module, attention_mask, kwargs.get("is_causal"), query.shape[2], key.shape[2])
    mask = merged_mask(attention_mask, kwargs.get("position_bias"))
    # the backward computes scores and weights again, a layer at a time
    result = checkpoint(_softmax, query, key, value, mask, causal, scale, use_reentrant=False, preserve_rng_state=False)
    if not result.requires_grad:
        result.requires_grad_()
    mask = mask if mask is None else mask.detach()
    return Call(module, query.detach(), key.detach(), value.detach(), mask, causal, scale, result)


def _softmax(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scale: float) -> Tensor:
    """Softmax attention. A fully masked query gives 0, as with diffmax."""
    key, value = (_for_heads(t, query.shape[1]) for t in (key, value))
    return _weights(masked(query @ key.mT * scale, mask, is_causal)) @ value


def _weights(scores: Tensor) -> Tensor:
    """Softmax; 0 in a row that is fully masked."""
    weights = torch.where((scores == -torch.inf).all(-1, keepdim=True), 0.0, scores).softmax(-1)
    return weights.masked_fill(scores == -torch.inf, 0.0)


def _for_heads(t: Tensor, heads: int) -> Tensor:
    """Keys or values (B, H_kv, S, D) as those of each query head."""
    return t.repeat_interleave(heads // t.shape[1], dim=1)


@contextmanager
def as_it_was(model: nn.Module) -> Iterator[None]:
    """Restore the modes and attention implementations of the model and its parts on exit."""
    modes = [(module, module.training) for module in model.modules()]
    configs = [config for module in model.modules() for config in _configs(getattr(module, "config", None))]
    implementations = [(config, config._attn_implementation) for config in configs]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for config, implementation in implementations:
            # not the property without "_internal", which also writes to nested configurations
            config._attn_implementation_internal = implementation


def _configs(config: Any) -> Iterator[Any]:
    """A transformers configuration, and its nested ones."""
    if hasattr(config, "_attn_implementation"):
        yield config
        for name in config.sub_configs:
            yield from _configs(getattr(config, name, None))
