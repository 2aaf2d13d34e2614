"""Masks of transformers, and a lazy mask that is materialized only if something reads it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only


class UnbuiltMask(Tensor):
    """A lazy boolean mask (B, 1, L, S), causal or all True, that is materialized when an operation reads it.

    For transformers' SDPA both are None, and a flag of the layer distinguishes them. If the flag is missing or wrong, a decoder
    sees future tokens. This mask carries its meaning itself, however the model passes it on, and needs no memory.
    """

    is_causal: bool
    build: Callable[[], Tensor]
    written: Tensor | None  # materialized by the first operation, which may have modified it

    def write(self) -> Tensor:
        """The materialized mask, the same tensor at every call."""
        if self.written is None:
            self.written = self.build()
        return self.written

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        if self.written is not None:
            return repr(self.written)
        return f"UnbuiltMask({'causal' if self.is_causal else 'everything'}, {tuple(self.shape)})"

    def __deepcopy__(self, memo: Any) -> Tensor:
        return self.write().clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.write().__reduce_ex__(protocol)

    def numpy(self, *, force: bool = False) -> Any:
        """The materialized mask as an array."""
        return self.write().numpy(force=force)

    def tolist(self) -> Any:
        """The materialized mask as lists."""
        return self.write().tolist()

    def data_ptr(self) -> int:
        """The address of the materialized mask."""
        return self.write().data_ptr()

    def share_memory_(self) -> Tensor:
        """The materialized mask, in shared memory."""
        shared: Tensor = self.write().share_memory_()
        return shared

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Every operation reads or modifies the materialized mask."""
        args, kwargs = tree_map_only(UnbuiltMask, UnbuiltMask.write, (args, kwargs or {}))
        return function(*args, **kwargs)


def unbuilt(is_causal: bool, shape: tuple[int, ...], device: Any, build: Callable[[], Tensor]) -> UnbuiltMask:
    """A lazy mask that `build` materializes."""
    make: Any = Tensor._make_wrapper_subclass
    mask: UnbuiltMask = make(UnbuiltMask, shape, dtype=torch.bool, device=device)
    mask.is_causal, mask.build, mask.written = is_causal, build, None
    return mask


def is_traced() -> bool:
    """Whether torch.compile, torch.export or torch.jit.trace is tracing: then nothing may depend on values."""
    return bool(torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None)


def mask_of(
    sdpa_mask: Callable[..., Tensor | None],
    *,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    **kwargs: Any,
) -> Tensor:
    """The registered mask function: transformers' own boolean mask, or a lazy one where transformers would return None."""
    build = partial(_written, sdpa_mask, kwargs)
    if is_traced():
        return build()
    for is_causal, allowed in ((True, allow_is_causal_skip), (False, allow_is_bidirectional_skip)):
        if allowed:
            mask = sdpa_mask(allow_is_causal_skip=is_causal, allow_is_bidirectional_skip=not is_causal, **kwargs)
            if mask is not None:
                return mask
            queries = int(kwargs["q_length"] if "q_length" in kwargs else len(kwargs["cache_position"]))
            shape = kwargs["batch_size"], 1, queries, int(kwargs["kv_length"])
            # a single query is the newest token: it sees the whole cache
            return unbuilt(is_causal and queries > 1, shape, kwargs.get("device", "cpu"), build)
    return build()


def _written(sdpa_mask: Callable[..., Tensor | None], kwargs: dict[str, Any]) -> Tensor:
    mask = sdpa_mask(allow_is_causal_skip=False, allow_is_bidirectional_skip=False, **kwargs)
    if mask is None:
        raise RuntimeError("diffmax attention: transformers' sdpa_mask must write a mask that it may not leave out, got None")
    return mask


def read(module: nn.Module, mask: Tensor | None, is_causal: bool | None, queries: int, keys: int) -> tuple[Tensor | None, bool]:
    """The mask or None, and whether the call is causal, from the mask, the argument and the layer of a call."""
    if isinstance(mask, UnbuiltMask):
        if mask.written is None and (not mask.is_causal or mask.shape[2:] == (queries, keys)):
            return None, mask.is_causal
        mask = mask.write()
    if mask is not None:
        return mask, False  # the mask includes causality
    if is_causal is None:
        is_causal = _is_causal_by_itself(module, queries)
    return None, bool(is_causal and queries > 1)


def _is_causal_by_itself(module: nn.Module, length: int) -> bool:
    """Whether a call without a mask is causal: the layer's flag, as in transformers' own SDPA function."""
    flag = getattr(module, "is_causal", None)
    if flag is None and length > 1:
        raise ValueError(
            f"diffmax attention: {type(module).__name__} must be given a mask or is_causal, got neither, for {length} queries\n"
            "eager attention would let each see the future, SDPA would not: build the mask with create_causal_mask of "
            "transformers.masking_utils, or hand on is_causal=True or False"
        )
    return bool(flag)


def merged_mask(attention_mask: Tensor | None, position_bias: Tensor | None) -> Tensor | None:
    """Both masks combined, for `diffmax.attention`: boolean, or floating with -inf at masked keys."""
    if attention_mask is None or attention_mask.dtype == torch.bool:
        if position_bias is None or attention_mask is None:
            return attention_mask if position_bias is None else position_bias
        return position_bias.masked_fill(~attention_mask, -torch.inf)
    if not attention_mask.is_floating_point():
        raise ValueError(
            f"diffmax attention: a mask must be boolean or floating, got {attention_mask.dtype}\n"
            "convert it first: True marks what is visible, and a floating mask is added to the scores"
        )
    # transformers masks with the most negative number: added to a whole row, it would not mask anything
    hidden = attention_mask <= torch.finfo(attention_mask.dtype).min
    bias = attention_mask if position_bias is None else attention_mask + position_bias
    return bias.masked_fill(hidden, -torch.inf)


def left_padding(mask: Tensor, batch: int, keys: int) -> Tensor | None:
    """int32 (B,): the keys before all that one query sees, if a mask (B, 1, 1, S) on the CPU hides nothing else."""
    if mask.dtype != torch.bool or mask.shape != (batch, 1, 1, keys) or mask.device.type != "cpu" or is_traced():
        return None
    visible = mask[:, 0, 0]
    hidden = (~visible).sum(1, dtype=torch.int32)
    # the first that is visible comes behind all that are hidden
    return hidden if bool((visible.int().argmax(1) == hidden).all()) else None
