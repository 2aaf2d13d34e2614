"""The argument checks of `diffmax.attention` and `diffmax.attention_varlen`, which run before any backend is chosen."""

from __future__ import annotations

import math
import numbers
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from diffmax.operators.common.checks import (
    _check_alpha_values,
    _dtype,
    _readable,
    _shape,
    as_int,
    broadcasts,
    check_flag,
    check_strided,
    check_tensor,
    complement,
    has_shape,
    is_whole,
    not_an_alpha,
    one_minus_alpha,
    plain_complement,
    to_float,
)
from diffmax.operators.common.numerics import accumulation_dtype

ALIGNMENTS = ("upper_left", "lower_right")

# Kernels compute in float32: a bound that it does not hold would be none.
_LEAST_CAP = torch.finfo(torch.float32).tiny


def check_tensors(name: str, query: Tensor, key: Tensor, value: Tensor, layout: str) -> None:
    """Check types, dtypes, devices and shapes; `layout` is the axes' names, such as "BHLD"."""
    facts = (query, key, value)
    for what, t in zip(("query", "key", "value"), facts, strict=True):
        check_tensor(name, what, t)
    if not query.dtype == key.dtype == value.dtype:
        raise TypeError(f"{name}: query, key and value must have one dtype, got\n{_facts(*facts)}\nconvert two of them")
    if not query.device == key.device == value.device:
        raise ValueError(f"{name}: query, key and value must be on one device, got\n{_facts(*facts)}")
    if not query.ndim == key.ndim == value.ndim == len(layout):
        axes = ", ".join(layout)
        raise ValueError(f"{name}: query, key and value must have {len(layout)} dimensions ({axes}), got\n{_facts(*facts)}")
    heads, length = layout.index("H"), layout.index("L" if "L" in layout else "T")
    if key.shape[length] != value.shape[length]:
        lengths = f"{key.shape[length]} and {value.shape[length]}"
        raise ValueError(f"{name}: key and value must have the same length, got {lengths}\n{_facts(*facts)}")
    if key.shape[heads] != value.shape[heads]:
        counts = f"{key.shape[heads]} and {value.shape[heads]}"
        raise ValueError(f"{name}: key and value must have the same number of heads, got {counts}\n{_facts(*facts)}")
    if "B" in layout and not query.shape[0] == key.shape[0] == value.shape[0]:
        raise ValueError(f"{name}: query, key and value must have one batch size, got\n{_facts(*facts)}")
    if query.shape[-1] != key.shape[-1]:
        sizes = f"{query.shape[-1]} and {key.shape[-1]}"
        raise ValueError(f"{name}: query and key must have the same head size, got {sizes}\n{_facts(*facts)}")


def _facts(query: Tensor, key: Tensor, value: Tensor) -> str:
    named = (("query", query), ("key", key), ("value", value))
    return "  " + "   ".join(f"{name} {_shape(t)} {_dtype(t)} {t.device}" for name, t in named)


def as_heads(
    name: str, query: Tensor, key: Tensor, value: Tensor, attn_mask: Any, enable_gqa: bool
) -> tuple[Tensor, Tensor, Tensor, Any]:
    """Query, key and value as (B, H, L, D), where they have fewer or more dimensions, or sizes of 1 for others to share.

    As torch's own attention takes them: what stands before (H, L, D) is one batch. One head of keys that all queries share is
    left as it is.
    """
    given = (query, key, value)
    if not all(isinstance(t, Tensor) for t in given) or _are_heads(query, key, value, enable_gqa):
        return query, key, value, attn_mask
    for what, t in zip(("query", "key", "value"), given, strict=True):
        check_tensor(name, what, t)
    if any(t.ndim < 2 for t in given):
        raise ValueError(f"{name}: query, key and value must have at least 2 dimensions (L, D), got\n{_facts(*given)}")
    heads = [t.shape[-3] if t.ndim > 2 else 1 for t in given]
    if heads[1] == heads[2] and (enable_gqa or heads[1] == 1):
        wanted = heads
    elif enable_gqa:
        wanted = [heads[0], max(heads[1:]), max(heads[1:])]
    else:
        wanted = [max(heads)] * 3
    try:
        batch: torch.Size = torch.broadcast_shapes(*(t.shape[:-3] for t in given))  # type: ignore[no-untyped-call]
    except RuntimeError:
        raise ValueError(f"{name}: query, key and value must have one batch size, got\n{_facts(*given)}") from None
    query, key, value = (
        _of_batch(t if t.ndim > 2 else t.unsqueeze(0), batch, count if own == 1 else own)
        for t, own, count in zip(given, heads, wanted, strict=True)
    )
    if isinstance(attn_mask, Tensor) and len(batch) > 1 and attn_mask.ndim > 3 and not hasattr(attn_mask, "variant"):
        try:
            attn_mask = _of_batch(attn_mask, batch, attn_mask.shape[-3])
        except RuntimeError:
            wanted_shape = (*batch, query.shape[1], query.shape[2], key.shape[2])
            raise ValueError(
                f"{name}: attn_mask must broadcast to (..., H, L, S) = {wanted_shape}, got shape {_shape(attn_mask)}"
            ) from None
    return query, key, value, attn_mask


def _are_heads(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> bool:
    if not query.ndim == key.ndim == value.ndim == 4 or not query.shape[0] == key.shape[0] == value.shape[0]:
        return False
    return key.shape[1] == value.shape[1] and (enable_gqa or query.shape[1] == key.shape[1])


def _of_batch(t: Tensor, batch: tuple[int, ...], heads: int) -> Tensor:
    """(..., H or 1, m, n) as (B, H, m, n); what stands before becomes one dimension."""
    t = t.expand(*batch, heads, *t.shape[-2:])
    return t.flatten(0, -4) if len(batch) > 1 else t if batch else t.unsqueeze(0)


def check_heads(name: str, heads: int, kv_heads: int, enable_gqa: bool) -> None:
    """Check that query heads share key heads evenly, and only where that is wanted."""
    if heads != kv_heads and not enable_gqa:
        raise ValueError(
            f"{name}: query and key must have the same number of heads, got {heads} and {kv_heads}\n"
            "for grouped query heads, pass enable_gqa=True"
        )
    if heads != kv_heads and (kv_heads == 0 or heads % kv_heads):
        raise ValueError(f"{name}: the query heads must be a multiple of the key heads, got {heads} and {kv_heads}")


def check_alpha(name: str, query: Tensor, alpha: float | Tensor, heads: int) -> tuple[float, Tensor | None]:
    """Check alpha and turn it into e = 1 - alpha: as a float, or as a tensor (H,) with a gradient."""
    if not isinstance(alpha, Tensor):
        if type(alpha) is not float and (not isinstance(alpha, numbers.Real) or isinstance(alpha, bool)):
            raise not_an_alpha(name, alpha)
        return one_minus_alpha(name, query, to_float(alpha), query.ndim - 1)
    check_strided(name, "alpha", alpha)
    if not alpha.is_floating_point():
        raise TypeError(f"{name}: alpha must be of a floating dtype, got {_dtype(alpha)}")
    if not has_shape(alpha, (), (1,), (heads,)):
        hint = f"\nfor one alpha per head, pass alpha.view({heads})" if alpha.numel() == heads else ""
        hint = hint or f"\na tensor holds one alpha, or one per query head, of which there are {heads}"
        raise ValueError(f"{name}: alpha must be a float or of shape () or ({heads},), got shape {_shape(alpha)}{hint}")
    if alpha.device != query.device and not (alpha.ndim == 0 and alpha.device.type == "cpu"):
        raise ValueError(f"{name}: alpha and query must be on one device, got {alpha.device} and {query.device}")
    if (e := plain_complement(alpha, query)) is not None:
        return e, None
    _check_alpha_values(name, alpha)
    e_tensor = complement(alpha, accumulation_dtype(query.dtype))
    if e_tensor.device != query.device:
        e_tensor = e_tensor.to(query.device)
    if e_tensor.numel() == 1 and type(query).__name__ == "DTensor" != type(e_tensor).__name__:
        e_tensor = e_tensor.reshape(()) * query.new_ones(
            (), dtype=e_tensor.dtype
        )  # one number is what torch takes on every rank
    return 0.0, e_tensor.expand(heads).contiguous()


def check_mask(name: str, query: Tensor, key: Tensor, mask: Tensor) -> Tensor:
    """Check a mask, boolean or of numbers to be added, and give it four dimensions."""
    wanted = (*query.shape[:3], key.shape[2])
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name}: attn_mask must be a boolean or floating tensor or a CausalBias, got {type(mask).__name__}")
    check_strided(name, "attn_mask", mask)
    if mask.dtype not in (torch.bool, query.dtype, torch.float32):
        if mask.is_floating_point():
            way = f"a floating mask is added to the scores: pass attn_mask.to(torch.{_dtype(query)})"
        else:
            way = (
                "a boolean mask is True where a key is seen: of one that is 1 where seen and 0 elsewhere pass attn_mask.bool()"
            )
        raise TypeError(
            f"{name}: attn_mask must be boolean, or floating and of query's dtype or float32, got {_dtype(mask)}\n"
            f"  query is {_dtype(query)}\n{way}"
        )
    if mask.device != query.device:
        raise ValueError(f"{name}: attn_mask and query must be on one device, got {mask.device} and {query.device}")
    if not broadcasts(mask, wanted):
        raise ValueError(
            f"{name}: attn_mask must broadcast to (B, H, L, S), got shape {_shape(mask)}\n"
            f"  query {_shape(query)}   key {_shape(key)}   attn_mask must broadcast to {wanted}{_mask_hint(mask, wanted)}"
        )
    return mask.view((1,) * (4 - mask.ndim) + tuple(mask.shape))


def _mask_hint(mask: Tensor, wanted: tuple[int, ...]) -> str:
    """For a mask of padding (B, S), of batches (B, L, S) or of nn.MultiheadAttention (B * H, L, S): the shape that is meant."""
    batch, heads, length, keys = wanted
    if tuple(mask.shape) == (batch, keys):
        return f"\nfor a mask of padding (B, S), pass attn_mask.view({batch}, 1, 1, {keys})"
    if mask.ndim == 3 and mask.shape[0] == batch and mask.shape[1] in (1, length) and mask.shape[2] in (1, keys):
        return "\nfor a mask of each batch (B, L, S), pass attn_mask.unsqueeze(1)"
    if tuple(mask.shape) == (batch * heads, length, keys):
        return f"\nfor a mask of each batch and head (B * H, L, S), pass attn_mask.view({batch}, {heads}, {length}, {keys})"
    return ""


def check_alibi(name: str, query: Tensor, slopes: Tensor | None, sizes: tuple[int, ...]) -> Tensor | None:
    """Check ALiBi's slopes, of shape `sizes` or its last, and convert them to the accumulation dtype."""
    if slopes is None:
        return None
    _check_floating(name, "alibi_slopes", slopes, query)
    if not has_shape(slopes, sizes, sizes[-1:]):
        wanted = " or ".join(str(shape) for shape in dict.fromkeys((sizes[-1:], sizes)))
        raise ValueError(f"{name}: alibi_slopes must have one number per head, shape {wanted}, got {_shape(slopes)}")
    if slopes.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name}: alibi_slopes must not require grad (no gradient is implemented), got some that do\n"
            "pass alibi_slopes.detach(), or the bias itself as attn_mask, which has one"
        )
    return slopes.detach().to(accumulation_dtype(query.dtype))


def check_sink(name: str, query: Tensor, sink: Tensor | None, heads: int) -> Tensor | None:
    """Check the sink's scores, one per head, and convert them to the accumulation dtype."""
    if sink is None:
        return None
    _check_floating(name, "sink", sink, query)
    if not has_shape(sink, (heads,)):
        hint = f"\npass sink.view({heads})" if sink.numel() == heads else f"\na null slot is torch.zeros({heads})"
        raise ValueError(f"{name}: sink must have one number per head, shape ({heads},), got {_shape(sink)}{hint}")
    return sink.to(accumulation_dtype(query.dtype))


def _check_floating(name: str, what: str, t: Tensor, query: Tensor) -> None:
    if not isinstance(t, Tensor) or not t.is_floating_point():
        got = _dtype(t) if isinstance(t, Tensor) else type(t).__name__
        raise TypeError(f"{name}: {what} must be a floating tensor, got {got}")
    check_strided(name, what, t)
    if t.device != query.device:
        raise ValueError(f"{name}: {what} and query must be on one device, got {t.device} and {query.device}")


def check_softcap(name: str, softcap: float) -> float:
    """The bound of the scores, 0 for none."""
    if type(softcap) is not float:  # an abstract class takes microseconds to ask
        if isinstance(softcap, (bool, Tensor)) or not isinstance(softcap, (numbers.Real, torch.SymFloat)):
            raise TypeError(f"{name}: softcap must be a float, got {softcap!r} of type {type(softcap).__name__}")
        softcap = to_float(softcap)
    if not 0 <= softcap < math.inf:
        raise ValueError(f"{name}: softcap must be positive and finite, or 0 for none, got {softcap}")
    if 0 < softcap < _LEAST_CAP:
        raise ValueError(
            f"{name}: softcap must be at least {_LEAST_CAP:.3g}, the least that float32 holds, or 0 for none, got {softcap}"
        )
    return softcap


def check_scale(name: str, query: Tensor, scale: float | None) -> float:
    """The factor of the scores, 1 / sqrt(D) by default."""
    if scale is None:
        return 1 / math.sqrt(query.shape[-1]) if query.shape[-1] != 0 else 1.0
    if type(scale) is float:  # an abstract class takes microseconds to ask
        return _finite(name, scale)
    if isinstance(scale, Tensor) and scale.ndim == 0 and not scale.requires_grad and not scale.is_complex():
        scale = scale.item()  # as torch's own attention takes it
    if isinstance(scale, Tensor) and scale.requires_grad:
        raise TypeError(
            f"{name}: scale must be a float, got a tensor that requires a gradient\n"
            "for a scale that learns, multiply the query by it and pass scale=1.0"
        )
    if isinstance(scale, bool) or not isinstance(scale, (numbers.Real, torch.SymFloat)):
        got: object = scale
        message = f"{name}: scale must be a float, got {got!r} of type {type(got).__name__}"
        if got == "match":  # as where a model's softmax is replaced
            message += "\nfor the matched scale, pass scale=diffmax.matched_scale(alpha) / math.sqrt(query.shape[-1])"
        raise TypeError(message)
    return _finite(name, to_float(scale))


def _finite(name: str, scale: float) -> float:
    if not torch.compiler.is_compiling() and not math.isfinite(scale):  # there it may be known at run time alone
        raise ValueError(f"{name}: scale must be finite, got {scale}")
    return scale


def check_dropout(name: str, dropout_p: float) -> float:
    """The share of weights to drop."""
    if isinstance(dropout_p, (bool, Tensor)) or not isinstance(dropout_p, (numbers.Real, torch.SymFloat)):
        raise TypeError(f"{name}: dropout_p must be a float, got {dropout_p!r} of type {type(dropout_p).__name__}")
    if not 0 <= dropout_p <= 1:
        raise ValueError(f"{name}: dropout_p must lie between 0 and 1, got {dropout_p}")
    return to_float(dropout_p)


def served(
    name: str, query: Tensor, key: Tensor, value: Tensor, dropout_p: float, scale: float | None
) -> tuple[Tensor, Tensor, Tensor, float, float | None]:
    """What no kernel is asked for, in terms of what they compute: a head size of 0, and dropout of all weights."""
    dropout_p = check_dropout(name, dropout_p)
    if query.shape[-1] == 0:  # all scores are 0
        query, key = (torch.cat([t, t.new_zeros(*t.shape[:-1], 1)], -1) for t in (query, key))
        scale = 1.0 if scale is None else scale
    if dropout_p == 1:
        value, dropout_p = value.masked_fill(torch.ones((), dtype=torch.bool, device=value.device), 0.0), 0.0
    return query, key, value, dropout_p, scale


def check_alignment(name: str, causal_alignment: str) -> bool:
    """Whether the alignment is the lower right."""
    if causal_alignment not in ALIGNMENTS:
        raise ValueError(f"{name}: causal_alignment must be one of {', '.join(ALIGNMENTS)}, got {causal_alignment!r}")
    return causal_alignment == "lower_right"


def check_window(name: str, window_size: Any, is_causal: bool, argument: str = "is_causal") -> tuple[int, int]:
    """How many keys a query sees to its left and right, -1 for all."""
    is_causal = check_flag(name, argument, is_causal)
    if window_size is None:
        window_size = (-1, -1)
    is_pair = isinstance(window_size, (tuple, list)) and len(window_size) == 2
    if not is_pair or not is_whole(window_size[0]) or not is_whole(window_size[1]):
        hint = f"\nto see the last {window_size} keys, the own one among them, pass ({window_size} - 1, 0)"
        raise TypeError(
            f"{name}: window_size must be a pair of ints (left, right), got {window_size!r}"
            f"{hint if is_whole(window_size) else ''}"
        )
    left, right = as_int(window_size[0]), as_int(window_size[1])
    if left < -1 or right < -1 or left >= 2**31 or right >= 2**31:
        raise ValueError(f"{name}: window_size must be from 0 to 2**31 - 1, or -1 for no bound, got {tuple(window_size)}")
    return left, 0 if is_causal else right


def check_longest(name: str, what: str, longest: Any) -> int:
    """max_seqlen_q or max_seqlen_k."""
    if not is_whole(longest):
        raise TypeError(f"{name}: max_seqlen_{what} must be an int, got {longest!r} of type {type(longest).__name__}")
    number = as_int(longest)
    if number < 0:
        raise ValueError(f"{name}: max_seqlen_{what} must not be negative, got {number}")
    return number


def check_packing(name: str, what: str, cu_seqlens: Tensor, longest: int, total: int, device: torch.device) -> Tensor:
    """Check where packed sequences begin and end; values are looked at on the CPU alone."""
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype not in (torch.int32, torch.int64) or cu_seqlens.ndim != 1:
        got = f"{_shape(cu_seqlens)} {_dtype(cu_seqlens)}" if isinstance(cu_seqlens, Tensor) else type(cu_seqlens).__name__
        raise TypeError(f"{name}: cu_seqlens_{what} must be an int32 tensor of one dimension, got {got}")
    check_strided(name, f"cu_seqlens_{what}", cu_seqlens)
    if cu_seqlens.shape[0] < 2:
        raise ValueError(
            f"{name}: cu_seqlens_{what} must have an entry more than there are sequences, of which one is needed, "
            f"got {_shape(cu_seqlens)}"
        )
    if cu_seqlens.device != device:
        raise ValueError(f"{name}: cu_seqlens_{what} and query must be on one device, got {cu_seqlens.device} and {device}")
    if _readable(cu_seqlens):
        places = cu_seqlens.tolist()
        lengths = [end - start for start, end in pairwise(places)]
        if places[0] != 0 or places[-1] != total or min(lengths) < 0:
            raise ValueError(
                f"{name}: cu_seqlens_{what} must ascend from 0 to the number of tokens, {total}, got {_few(places)}"
            )
        if longest < max(lengths):
            raise ValueError(f"{name}: max_seqlen_{what} must be at least the longest length, {max(lengths)}, got {longest}")
    return cu_seqlens.to(torch.int32)


def _few(values: list[int]) -> str:
    return str(values) if len(values) <= 8 else f"[{', '.join(map(str, values[:6]))}, ..., {values[-1]}]"
