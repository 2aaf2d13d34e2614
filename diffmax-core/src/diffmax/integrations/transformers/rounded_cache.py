"""A cache for transformers' `generate` that keeps the keys in 4 bits too, so that a new token reads few of them.

Keys and values of a layer lie in memory that has room for more, and what the layer returns are views of it, which any attention
function can read. The registered one knows the layer by the keys that it returned last (`layer_of`), and has it decode one new
token, as `diffmax.attention_with_kvcache` does with the layer's page bounds, which are brought up to date on the way.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from diffmax.integrations.transformers.masks import is_traced
from diffmax.machine.dispatch import selected
from diffmax.operators.attention import checks
from diffmax.operators.decoding.api import PageBounds, page_bounds
from diffmax.operators.decoding.checks import check_page_size
from diffmax.operators.decoding.operator import attention_kvcache
from diffmax.plugin import TILE, KVCacheCall

# Room for more tokens: so many at least, or this share of those there are.
LEAST_ROOM, MORE_ROOM = 256, 0.25
# The keys of fewer tokens, or of which more than a share have a weight, are read as fast as rounded ones.
LEAST_TOKENS, MOST_SUPPORT = 2048, 0.1
# Of more tokens than these, which came together, and of all before, bounds are made anew.
MOST_NEW = 64

_NAME = "diffmax.attention_with_kvcache"
_given = threading.local()


class RoundedLayer(DynamicLayer):
    """Of a `RoundedModelCache`."""

    def __init__(self, page_size: int) -> None:
        super().__init__()
        self.page_size = page_size
        self._forget()

    def _forget(self) -> None:
        """Have no memory of its own."""
        self._memory: tuple[Tensor, ...] = ()  # of keys and values, (B, room, H_kv, n)
        self._bounds: PageBounds | None = None
        self._bounded = 0  # tokens that the bounds know
        self._version = 0  # of the keys, which tells whether somebody else wrote to them
        self._reads_all = False  # since too many keys had a weight when the bounds were made

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values (B, H_kv, n, D); return all of them."""
        held = self.get_seq_length()
        # a backward keeps tensors, which must not be written to; what is of another kind is joined, or refused, by torch
        if torch.is_grad_enabled() or is_traced() or not (held == 0 or self._is_alike(key_states, value_states)):
            self._forget()
            keys, values = super().update(key_states, value_states, *args, **kwargs)
            return keys, values
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        tokens = held + key_states.shape[2]
        if held == 0 or not self._fits(tokens):
            self._move(key_states, value_states, held, tokens)
        if self._memory[0]._version != self._version:
            self._bounds = None
        for memory, new in zip(self._memory, (key_states, value_states), strict=True):
            memory[:, held:tokens] = new.transpose(1, 2)
        self._version = self._memory[0]._version
        self._bounded = min(self._bounded, held)
        _given.layer = weakref.ref(self)
        return self._show(tokens)

    def _is_alike(self, *new: Tensor) -> bool:
        """Whether new keys and values are of the same kind as those that are held."""
        return all(
            old is not None and t.dtype == old.dtype and t.device == old.device and _sizes(t) == _sizes(old)
            for t, old in zip(new, (self.keys, self.values), strict=True)
        )

    def _show(self, tokens: int) -> tuple[Tensor, Tensor]:
        """Have so many tokens of the memory as keys and values."""
        keys, values = (memory[:, :tokens].transpose(1, 2) for memory in self._memory)
        self.keys, self.values = keys, values
        return keys, values

    def _fits(self, tokens: int) -> bool:
        """Whether the keys and values are views of the memory, which may be written to and has room for so many."""
        return bool(self._memory) and all(
            _is_view(t, memory, tokens) for t, memory in zip(self._shown, self._memory, strict=True)
        )

    @property
    def _shown(self) -> tuple[Tensor | None, Tensor | None]:
        return self.keys, self.values

    def _move(self, key_states: Tensor, value_states: Tensor, held: int, tokens: int) -> None:
        """To larger memory."""
        self._forget()
        room = -(-(tokens + max(LEAST_ROOM, int(MORE_ROOM * tokens))) // self.page_size) * self.page_size
        with torch.inference_mode(False):  # it is written to in any mode
            self._memory = tuple(
                torch.empty(new.shape[0], room, new.shape[1], new.shape[3], dtype=new.dtype, device=new.device)
                for new in (key_states, value_states)
            )
        for memory, t in zip(self._memory, self._shown, strict=True):
            if t is not None and held:
                memory[:, :held] = t.transpose(1, 2)
        self._version = self._memory[0]._version

    def decode(
        self, query: Tensor, *, softmax_scale: float | None, alpha: Any, softcap: float, sink: Any, cache_leftpad: Any
    ) -> Tensor:
        """Attention (B, 1, H, D_v) of one query (B, H, 1, D) to all tokens; other arguments as of `attention_with_kvcache`.

        The rest of what that function checks is so by construction, and in each layer for each token its checks take as long as
        the kernel.
        """
        keys, values = self._memory
        tokens, heads = self.get_seq_length(), query.shape[1]
        bounds = self._bounds
        is_first = bounds is None or tokens - self._bounded > MOST_NEW
        if bounds is None or is_first:
            with torch.inference_mode(False), torch.no_grad():
                self._bounds = bounds = page_bounds(keys, tokens, page_size=self.page_size, bits=4)
            self._bounded = tokens
        # the operator brings the bounds up to date as it appends: tokens that stand there already, so it is given copies
        held = self._bounded
        k, v = (None, None) if held == tokens else (t[:, held:tokens].clone() for t in self._memory)
        e, of_heads = checks.check_alpha(_NAME, query, alpha, heads)
        call = KVCacheCall(
            scale=checks.check_scale(_NAME, query, softmax_scale),
            e=e if of_heads is None else of_heads,
            cache_seqlens=torch.full((len(keys),), held, dtype=torch.int32),
            k=k,
            v=v,
            low=bounds.low,
            high=bounds.high,
            page_size=bounds.page_size,
            softcap=checks.check_softcap(_NAME, softcap),
            sink=checks.check_sink(_NAME, query, sink, heads),
            leftpad=cache_leftpad,
            codes=bounds.codes,
        )
        result = attention_kvcache(query.transpose(1, 2), keys, values, call, is_first, selected())
        if is_first:
            self._reads_all = bool(result.support.double().mean() > MOST_SUPPORT * tokens)
        self._bounded, self._version = tokens, keys._version
        return result.out

    def serves(self, query: Tensor) -> bool:
        """Whether it can decode, since a kernel reads keys in 4 bits, and it pays."""
        if self.device.type != "cpu" or self._reads_all or self.get_seq_length() < LEAST_TOKENS or not self._fits(0):
            return False
        keys, values = self._memory
        alike = query.dtype == keys.dtype == values.dtype and query.device == keys.device and len(query) == len(keys)
        return alike and self._version == keys._version and not torch.is_autocast_enabled("cpu")

    def _change(self, change: Callable[[Tensor], Tensor]) -> None:
        """Change what is held of the sequences."""
        tokens, bounds = self.get_seq_length(), self._bounds
        if self.keys is None or self.values is None or tokens == 0:
            return
        if not self._fits(0):
            self.keys, self.values = change(self.keys), change(self.values)
            return
        with torch.inference_mode(False), torch.no_grad():
            self._memory = tuple(change(t) for t in self._memory)
            if bounds is not None and bounds.codes is not None:
                low, high, codes = (change(t) for t in (bounds.low, bounds.high, bounds.codes))
                self._bounds = PageBounds(low, high, bounds.page_size, codes)
        self._version = self._memory[0]._version
        self._show(tokens)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the sequences, for beam search."""
        self._change(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these sequences."""
        self._change(lambda t: t[indices])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence."""
        self._change(lambda t: t.repeat_interleave(repeats, 0))

    def reset(self) -> None:
        """Forget all tokens."""
        self._forget()
        self.keys = self.values = None  # transformers 5.0 kept them, as zeros
        self.is_initialized = False

    @property
    def memory(self) -> int:
        """Bytes held."""
        held = self._memory if self._fits(0) else self._shown
        return sum(t.nbytes for t in (*held, *(self._bounds or ())) if isinstance(t, Tensor))


def layer_of(query: Tensor, key: Tensor, value: Tensor) -> RoundedLayer | None:
    """The layer that returned these keys and values just now, if it can decode for the query."""
    noted = getattr(_given, "layer", None)
    layer: RoundedLayer | None = None if noted is None else noted()
    if layer is None or layer.keys is not key or layer.values is not value:
        return None
    return layer if layer.serves(query) else None


def _sizes(t: Tensor) -> tuple[int, int, int]:
    """Batch, heads, numbers of each."""
    return t.shape[0], t.shape[1], t.shape[3]


def _is_view(t: Tensor | None, memory: Tensor, tokens: int) -> bool:
    """Whether a tensor (B, H, S, n) is a view of memory (B, room, H, n), which may be written to and has room for so many."""
    if t is None or t.ndim != 4 or t.data_ptr() != memory.data_ptr() or tokens > memory.shape[1]:
        return False
    if memory.is_inference() and not torch.is_inference_mode_enabled():  # a copy that was made there
        return False
    batch, row, head, number = memory.stride()
    return _sizes(t) == (memory.shape[0], *memory.shape[2:]) and t.stride() == (batch, head, row, number)


class RoundedModelCache(DynamicCache):
    """A cache for `attn_implementation="diffmax"` on the CPU that keeps the keys in 4 bits too: a new token reads few keys.

    `model.generate(..., past_key_values=RoundedModelCache(model.config))`. Scores are those of all keys up to rounding: which
    keys are read follows from bounds (docs/decoding.md). A token is written where there is room; `DynamicCache` copies all
    tokens for each new one; so `copy.deepcopy` keeps a state, and a reference to its tensors does not. It takes the memory of
    `DynamicCache`, room for a quarter more tokens, and 5/32 of the bytes of float32 keys or 9/32 of bfloat16's.

    From 2048 tokens on the keys in 4 bits are read first, in each layer where at most a tenth of the keys have a weight. Other
    layers, and shorter texts, read all keys. So do prompts, other attention functions, models that make keys anew from what is
    cached (DeepSeek), autocast, and other devices. Padding, beam search, assisted generation, sliding windows and copies work
    as with `DynamicCache`. While gradients are on it joins tensors as that does: fill a prefix under `torch.no_grad()`.

    Args:
        config: The model's configuration. With it, layers with a sliding window hold no more than that.
        page_size: Tokens whose keys are rounded together, between the bounds that they share.
    Raises:
        TypeError, ValueError: config is no configuration; page_size is no int, or below 1.
    Example:
        >>> from diffmax.integrations.transformers import RoundedModelCache, register
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> register("diffmax-sparser", alpha=0.5)
        >>> sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=9, attn_implementation="diffmax-sparser"))
        >>> cache = RoundedModelCache(model.config)
        >>> out = model.generate(torch.tensor([[1, 3, 4]]), past_key_values=cache, max_new_tokens=6, eos_token_id=None)
        >>> out.shape, cache.get_seq_length()
        (torch.Size([1, 9]), 8)
    """

    def __init__(self, config: Any = None, *, page_size: int = TILE) -> None:
        if config is not None and not hasattr(config, "get_text_config"):
            raise TypeError(
                f"RoundedModelCache: config must be a model's configuration or None, got {config!r}\npass model.config"
            )
        check_page_size("RoundedModelCache", page_size)
        super().__init__(config=config)
        make = partial(RoundedLayer, int(page_size))
        self.layers = [make() if type(layer) is DynamicLayer else layer for layer in self.layers]
        if self.layer_class_to_replicate is not None:
            self.layer_class_to_replicate = make  # type: ignore[assignment]

    @property
    def memory(self) -> int:
        """Bytes held by the layers that keep keys in 4 bits."""
        return sum(layer.memory for layer in self.layers if isinstance(layer, RoundedLayer))
