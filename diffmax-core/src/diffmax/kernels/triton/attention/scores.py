"""Scores of a block of 64 queries: which block a program has, which keys it meets, and a tile of scores with every option."""

from typing import NamedTuple

import triton
import triton.language as tl

from diffmax.kernels.triton.attention.tiles import (
    TILE,
    block_place,
    capped,
    is_visible,
    keys_of_rows,
    load_rows,
    other_side,
    place_shift,
    whole,
    with_biases,
)
from diffmax.kernels.triton.common.numerics import checked_e


class Options(NamedTuple):
    """What the kernels are compiled for, as their OPTIONS.

    Attributes:
        WINDOW, SOFTCAP, ALIBI, PACKED, LOWER_RIGHT: Whether the call has it.
        MASK, BIAS: How it lies in memory, as `attention.tiles` numbers it.
        PRECISION: Of products.
    """

    WINDOW: bool
    MASK: int
    SOFTCAP: bool
    ALIBI: bool
    BIAS: int
    PACKED: bool
    LOWER_RIGHT: bool
    PRECISION: str


@triton.jit
def block_of(item, heads, group, blocks, length, n_keys, n_sequences, left, right, cu_q_ptr, cu_k_ptr, OPTIONS: tl.constexpr):
    """The item's batch entry, head, key head and block; where its queries and keys begin; what it sees.

    The last blocks come first: under causality they see most. `sight` is what `scores_of` wants; the keys in sight are
    [low_key, high_key), none for a block beyond its packed sequence's end.
    """
    WINDOW: tl.constexpr = OPTIONS.WINDOW
    PACKED: tl.constexpr = OPTIONS.PACKED
    LOWER_RIGHT: tl.constexpr = OPTIONS.LOWER_RIGHT
    block = blocks - 1 - item % blocks
    b, h = (item // blocks // heads).to(tl.int64), (item // blocks % heads).to(tl.int64)
    sequence, q_start, n_rows, first = block_place(block, cu_q_ptr, n_sequences, length, TILE, PACKED)
    k_start, keys_in_all = other_side(sequence, cu_k_ptr, n_sequences, n_keys, PACKED)
    shift = place_shift(n_rows, keys_in_all, LOWER_RIGHT)
    low_key, high_key = keys_of_rows(first, n_rows, keys_in_all, shift, left, right, TILE, WINDOW)
    high_key = tl.where(first < n_rows, high_key, low_key)
    last = tl.minimum(first + TILE, n_rows) - 1
    sight = (first, last, n_rows, keys_in_all, shift, left, right)
    return block, b, h, h // group, sequence, q_start, k_start, sight, low_key, high_key


@triton.jit
def rows_at(ptr, b, h, start, stride_b, stride_h, stride_row, ALIGNED: tl.constexpr):
    """Where a head's rows begin, from row `start` on."""
    VECTOR: tl.constexpr = 128 // ptr.dtype.element_ty.primitive_bitwidth
    return ptr + whole(b * stride_b + h * stride_h, ALIGNED, VECTOR) + tl.cast(start, tl.int64) * stride_row


@triton.jit
def exponents(e_ptr, e, k, h, E_TENSOR: tl.constexpr):
    """e = 1 - alpha and 1/e, for each of the block's queries the same."""
    zero = tl.zeros((TILE,), tl.float32)
    if E_TENSOR:
        row_e = zero + checked_e(tl.load(e_ptr + h))
        return row_e, 1.0 / row_e
    else:
        return zero + e, zero + k


@triton.jit
def extras_of(
    scale, softcap, mask_at, mask_row, mask_key, bias_at, bias_row, bias_key, alibi_ptr, b, h, alibi_b,
    OPTIONS: tl.constexpr,
):  # fmt: skip
    """What `scores_of` wants beside places."""
    slope = 0.0
    if OPTIONS.ALIBI:
        slope = tl.load(alibi_ptr + b * alibi_b + h)
    return scale, softcap, slope, mask_at, mask_row, mask_key, bias_at, bias_row, bias_key


@triton.jit
def queries_of(q_ptr, q_row, first, n_rows, SIZE: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr):
    """The block's queries; where heads are cut into chunks, which are loaded when they are needed, their address."""
    if CHUNK == BLOCK_D:
        return load_rows(q_ptr, first, n_rows, q_row, TILE, SIZE, BLOCK_D)
    else:
        return q_ptr


@triton.jit
def products(
    q, q_row, k_ptr, k_row, begin, first, n_rows, n_keys, PRECISION: tl.constexpr,
    SIZE: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """The block's queries, from `queries_of`, times KEYS keys from the place `begin` on: a tile in float32."""
    if CHUNK == BLOCK_D:
        k = load_rows(k_ptr, begin, n_keys, k_row, KEYS, SIZE, BLOCK_D)
        return tl.dot(q, tl.trans(k), input_precision=PRECISION)
    else:
        x = tl.zeros((TILE, KEYS), tl.float32)
        for at in range(0, BLOCK_D, CHUNK):
            part = load_part(q + at, first, n_rows, q_row, SIZE - at, TILE, CHUNK, SIZE % CHUNK == 0)
            k = load_part(k_ptr + at, begin, n_keys, k_row, SIZE - at, KEYS, CHUNK, SIZE % CHUNK == 0)
            x = tl.dot(part, tl.trans(k), x, input_precision=PRECISION)
        return x


@triton.jit
def sampled_products(
    q, q_row, k_ptr, k_row, keys, first, n_rows, n_keys, PRECISION: tl.constexpr,
    SIZE: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Like `products`, with keys at any places."""
    x = tl.zeros((TILE, TILE), tl.float32)
    for at in range(0, BLOCK_D, CHUNK):
        cols = at + tl.arange(0, CHUNK)
        inside = (keys < n_keys)[:, None] & (cols < SIZE)[None, :]
        k = tl.load(k_ptr + tl.cast(keys, tl.int64)[:, None] * k_row + cols[None, :], mask=inside, other=0.0)
        if CHUNK == BLOCK_D:
            x = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        else:
            part = load_part(q + at, first, n_rows, q_row, SIZE - at, TILE, CHUNK, SIZE % CHUNK == 0)
            x = tl.dot(part, tl.trans(k), x, input_precision=PRECISION)
    return x


@triton.jit
def load_part(ptr, first, length, stride, size, ROWS: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr):
    """(ROWS, BLOCK) from row `first` on, of rows that have `size` more entries, BLOCK or more if WHOLE; zeros beside them."""
    rows = tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK)
    inside = (rows < length - first)[:, None]
    if not WHOLE:
        inside = inside & (cols < size)[None, :]
    return tl.load(ptr + tl.cast(first, tl.int64) * stride + rows[:, None] * stride + cols[None, :], mask=inside, other=0.0)


@triton.jit
def store_part(ptr, tile, first, length, stride, size, ROWS: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr):
    """The reverse."""
    rows = tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK)
    inside = (rows < length - first)[:, None]
    if not WHOLE:
        inside = inside & (cols < size)[None, :]
    offsets = tl.cast(first, tl.int64) * stride + rows[:, None] * stride + cols[None, :]
    tl.store(ptr + offsets, tile.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def scores_of(x, keys, partly, sight, extras, OPTIONS: tl.constexpr):
    """From the products with the keys at the places `keys` to scores, -inf where nothing is to be seen.

    partly: whether causality, the window or the last key can cut through them; a mask always can.
    sight: the block's first and last query, how many there are, how many keys, the shift, the window.
    extras: scale, softcap, ALiBi's slope, and where mask and bias lie.
    """
    first, _last, n_rows, n_keys, shift, left, right = sight
    scale, softcap, slope, mask_ptr, mask_row, mask_key, bias_ptr, bias_row, bias_key = extras
    WINDOW: tl.constexpr = OPTIONS.WINDOW
    MASK: tl.constexpr = OPTIONS.MASK
    SOFTCAP: tl.constexpr = OPTIONS.SOFTCAP
    ALIBI: tl.constexpr = OPTIONS.ALIBI
    BIAS: tl.constexpr = OPTIONS.BIAS
    rows, keys = (first + tl.arange(0, TILE))[:, None], keys[None, :]
    x = capped(x * scale, softcap, SOFTCAP)
    x = with_biases(x, rows, keys, n_rows, n_keys, shift, slope, bias_ptr, bias_row, bias_key, ALIBI, BIAS)
    if MASK != 0:
        partly = True
    if partly:
        seen = is_visible(rows, keys, n_rows, n_keys, shift, left, right, mask_ptr, mask_row, mask_key, WINDOW, MASK)
        x = tl.where(seen, x, -float("inf"))
    return x


@triton.jit
def scores_from(
    q, q_row, k_ptr, k_row, begin, sight, extras, OPTIONS: tl.constexpr,
    SIZE: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Scores with KEYS keys from the place `begin` on."""
    PRECISION: tl.constexpr = OPTIONS.PRECISION  # a name first: as an argument Triton 3.6 takes no str out of a tuple
    first, last, n_rows, n_keys, shift, left, right = sight
    partly = begin + KEYS > n_keys
    if OPTIONS.WINDOW:
        partly = partly | (begin + KEYS - 1 - first - shift > right) | (last + shift - begin > left)
    x = products(q, q_row, k_ptr, k_row, begin, first, n_rows, n_keys, PRECISION, SIZE, BLOCK_D, CHUNK, KEYS)
    return scores_of(x, begin + tl.arange(0, KEYS), partly, sight, extras, OPTIONS)
