"""Caches of constant size for transformers' `generate`: a tail of tokens and a state for each layer.

A layer of a model gives its new keys to the cache and then calls the attention function, which transformers does not tell of
the cache. So the cache's layer notes in this thread that keys were given to it, and returns them alone; the attention function
takes the layer that noted its very keys (`taken`), and attends through it. Another attention function would see the new keys
only: the layer's next update says so.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from diffmax.hybrid import HybridCache
from diffmax.operators.common.checks import is_whole
from diffmax.operators.power.api import power_attention
from diffmax.operators.power.state import PowerState

_given = threading.local()


class _Held(Protocol):
    """What a layer holds."""

    @property
    def memory(self) -> int: ...
    def reset(self) -> None: ...
    def reorder(self, index: Tensor) -> None: ...


class StateLayer(CacheLayerMixin):
    """A layer of a cache: the tokens that it holds are known to the attention function alone."""

    is_sliding = False
    is_compileable = False
    is_croppable = False
    supports_early_init = False

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options, self.held = options, None
        self._seen, self._waiting = 0, None

    held: Any
    _waiting: Tensor | None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: what is held is made by the attention function."""
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Note the new keys and values, and return them alone.

        Raises:
            RuntimeError: The keys before were not attended by a function that knows of the cache.
        """
        if self._waiting is not None:
            raise RuntimeError(
                "diffmax: a cache with a state must be read by the attention function that was registered for it, got new keys "
                "before the last were attended\ngive the model that attn_implementation; after a failed call, cache.reset()"
            )
        self.lazy_initialization(key_states, value_states)
        self._seen += key_states.shape[-2]
        self._waiting = key_states
        _given.layer = weakref.ref(self)
        return key_states, value_states

    def take(self) -> None:
        """The attention function has the keys."""
        self._waiting = None

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        """(number of keys, position of the first) for a mask: the new tokens."""
        return (len(query_length) if isinstance(query_length, Tensor) else query_length), self._seen

    def get_seq_length(self) -> int:
        """Number of tokens that were given."""
        return self._seen

    def get_max_length(self) -> int:
        """-1: unlimited."""
        return -1

    get_max_cache_shape = get_max_length  # its name before transformers 5.8

    def reset(self) -> None:
        """Forget all tokens."""
        self._seen, self._waiting, self.held = 0, None, None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the sequences, for beam search."""
        if self.held is not None:
            self.held.reorder(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these sequences."""
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence."""
        if self.held is not None:
            batch = torch.arange(self.held.batch_size, device=self.device)
            self.held.reorder(batch.repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Refused, unless it removes nothing.

        Raises:
            NotImplementedError: Tokens that are in a state cannot be taken out again.
        """
        if tokens_to_remove not in (0, self._seen):
            raise NotImplementedError(
                f"diffmax: crop must keep all {self._seen} tokens of a cache with a state, got {tokens_to_remove}\n"
                "what is in the state cannot be taken out: so there is no assisted generation with it"
            )

    def offload(self) -> None:
        """Refused.

        Raises:
            NotImplementedError: There is little to offload.
        """
        raise NotImplementedError("diffmax: a cache with a state stays on its device, got a call of offload\nit is small")

    prefetch = offload

    @property
    def memory(self) -> int:
        """Bytes held."""
        held: _Held | None = self.held
        return 0 if held is None else held.memory


def taken(key: Tensor) -> StateLayer | None:
    """The layer of a cache that these keys were given to just now; None if they were given to none.

    Its `take` is called when they were attended: so an attention that fails is noticed at the layer's next update.

    Raises:
        RuntimeError: Other keys were given to one.
    """
    noted, _given.layer = getattr(_given, "layer", None), None
    layer: StateLayer | None = None if noted is None else noted()
    if layer is None or layer._waiting is None:
        return None
    waiting = layer._waiting
    if waiting is not key and (waiting.shape != key.shape or waiting.data_ptr() != key.data_ptr()):
        raise RuntimeError(
            f"diffmax: attention must get the keys that the cache got, of shape {tuple(waiting.shape)}, got others of shape "
            f"{tuple(key.shape)}\nthe model changes its keys behind the cache, or a call before this one failed: cache.reset()"
        )
    return layer


class _ModelCache(Cache):
    def __init__(self, make: Callable[[], StateLayer]) -> None:
        super().__init__(layer_class_to_replicate=make)  # type: ignore[arg-type]

    @property
    def memory(self) -> int:
        """Bytes held by all layers."""
        return sum(layer.memory for layer in self.layers if isinstance(layer, StateLayer))


class PowerLayer(StateLayer):
    """Of a `PowerModelCache`."""

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, log_gates: Tensor | None, degree: int, scale: float | None
    ) -> Tensor:
        """Append tokens and attend from them; (B, H, L, D_v)."""
        if self.held is None:
            self.held = TailAndState(self.options["switch_over"])
        out: Tensor = self.held.attend(query, key, value, log_gates, degree, scale)
        self.take()
        return out


class TailAndState:
    """Tokens until there are `switch_over`; then they are folded into a state, and the tail starts anew."""

    def __init__(self, switch_over: int) -> None:
        self.switch_over = switch_over
        self.reset()

    def reset(self) -> None:
        """Forget all tokens."""
        self.state: PowerState | None = None
        self.tail: tuple[Tensor, Tensor, Tensor | None] | None = None

    @property
    def batch_size(self) -> int:
        """B."""
        given = self.tail or self.state
        return -1 if given is None else given[0].shape[0]

    @property
    def memory(self) -> int:
        """Bytes held."""
        return sum(t.numel() * t.element_size() for t in (*(self.tail or ()), *(self.state or ())) if t is not None)

    def reorder(self, index: Tensor) -> None:
        """Replace the sequences."""
        if self.tail is not None:
            key, value, gates = self.tail
            gates = None if gates is None else gates.index_select(0, index.to(gates.device))
            self.tail = key.index_select(0, index.to(key.device)), value.index_select(0, index.to(value.device)), gates
        if self.state is not None:
            self.state = PowerState(*(t.index_select(0, index.to(t.device)) for t in self.state))

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, gates: Tensor | None, degree: int, scale: float | None
    ) -> Tensor:
        """Append tokens and attend from them."""
        tail, state = self.tail, self.state
        new, held = key.shape[2], 0 if tail is None else tail[0].shape[2]
        folds = held + new > self.switch_over
        if folds and new > 1 and tail is not None:  # many queries take the linear way, which starts from a state
            k, v, g = tail
            _, state = power_attention(k[:, :, :0], k, v, g, state, degree=degree, return_final_state=True)
            tail = None
        if tail is not None:
            old_key, old_value, old_gates = tail
            if gates is not None or old_gates is not None:  # None is a gate of 1
                parts = ((old_gates, old_key), (gates, key))
                gates = torch.cat([t.new_zeros(t.shape[:3]).float() if g is None else g for g, t in parts], 2)
            key, value = torch.cat([old_key, key], 2), torch.cat([old_value, value], 2)
        settings: dict[str, Any] = {"degree": degree, "scale": scale}
        out: Tensor
        if folds:
            tail = None
            out, state = power_attention(query, key, value, gates, state, return_final_state=True, **settings)
        else:
            if tail is None:  # of what the caller may write to
                key, value, gates = key.clone(), value.clone(), None if gates is None else gates.clone()
            tail = key, value, gates
            out = power_attention(query, key, value, gates, state, **settings)
        self.tail, self.state = tail, state  # last: a call that fails changes nothing
        return out


class PowerModelCache(_ModelCache):
    """A cache for `attn_implementation="power"`: for each layer a power state, and a tail of tokens that are not in it yet.

    Its size does not grow with the tokens: `model.generate(..., past_key_values=PowerModelCache())`. The result is that of the
    quadratic form over all tokens, up to rounding. Beam search and left padding work; `crop`, and so assisted generation, not.

    Args:
        switch_over: Tokens that the tail holds at most. Then it is folded into the state.
    Raises:
        TypeError, ValueError: switch_over is no int, or below 0.
    Example:
        >>> from diffmax.integrations.transformers import PowerModelCache, register_power
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> register_power()
        >>> sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=9, attn_implementation="power"))
        >>> cache = PowerModelCache(switch_over=4)
        >>> out = model.generate(torch.tensor([[1, 3, 4]]), past_key_values=cache, max_new_tokens=6, eos_token_id=None)
        >>> out.shape, cache.get_seq_length()
        (torch.Size([1, 9]), 8)
    """

    def __init__(self, switch_over: int = 512) -> None:
        if not is_whole(switch_over):
            raise TypeError(f"PowerModelCache: switch_over must be an int, got {switch_over!r}")
        if switch_over < 0:
            raise ValueError(f"PowerModelCache: switch_over must not be negative, got {switch_over}")
        super().__init__(lambda: PowerLayer(switch_over=int(switch_over)))


class HybridLayer(StateLayer):
    """Of a `HybridModelCache`; it holds a `diffmax.HybridCache`."""

    def cache(self, make: Callable[[], HybridCache]) -> HybridCache:
        """The cache, made at the first call."""
        if self.held is None:
            self.held = make()
        cache: HybridCache = self.held
        return cache


class HybridModelCache(_ModelCache):
    """A cache for `attn_implementation="diffmax_hybrid"`: a `diffmax.HybridCache` for each layer, of constant size.

    `model.generate(..., past_key_values=HybridModelCache())`. Tail, block and degree are those of `register_hybrid`. Beam
    search and left padding work; `crop`, and so assisted generation, do not.

    Example:
        >>> from diffmax.integrations.transformers import HybridModelCache, register_hybrid
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> register_hybrid("small-hybrid", tail=4, block=2)
        >>> sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=9, attn_implementation="small-hybrid"))
        >>> cache = HybridModelCache()
        >>> model.generate(torch.tensor([[1, 3, 4]]), past_key_values=cache, max_new_tokens=6, eos_token_id=None).shape
        torch.Size([1, 9])
    """

    def __init__(self) -> None:
        super().__init__(HybridLayer)
