"""Scores of attention's tiles: the arguments of the rules, products, and the forward's blocks of queries.

The rules of the scores are in `common.scores`.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from diffmax.kernels.triton.attention.tiles import (
    TILE,
    keys_of_rows,
    load_rows,
    locate_block,
    locate_other,
    position_shift,
    rows_inside,
)
from diffmax.kernels.triton.common.scores import ABSENT, PerPair, Rules, score, unmasked, visible


class Block(NamedTuple):
    """A block of 64 or 128 queries, processed by a forward program.

    Attributes:
        index: Index of the block.
        batch, head, kv_head: Batch entry and head of its queries, and head of their keys.
        sequence: Its packed sequence.
        q_start, k_start: Start of the sequence in queries and keys.
        first, last: First and last query of the block, as positions in the sequence.
        n_rows, n_keys: Number of queries and keys of the sequence.
        shift: Query i has the position of key i + shift.
        low_key, high_key: The keys in range, [low_key, high_key); none for a block after the end of its sequence.
    """

    index: Any
    batch: Any
    head: Any
    kv_head: Any
    sequence: Any
    q_start: Any
    k_start: Any
    first: Any
    last: Any
    n_rows: Any
    n_keys: Any
    shift: Any
    low_key: Any
    high_key: Any


@triton.jit
def block_of(
    item, heads, group, n_blocks, length, n_keys, n_sequences, left, right, cu_q_ptr, cu_k_ptr, OPTIONS: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """The block of ROWS queries of a work item. The last blocks run first: under causality they see the most keys."""
    index = n_blocks - 1 - item % n_blocks
    batch, head = (item // n_blocks // heads).to(tl.int64), (item // n_blocks % heads).to(tl.int64)
    sequence, q_start, n_rows, first = locate_block(index, cu_q_ptr, n_sequences, length, ROWS, OPTIONS.PACKED)
    k_start, keys_in_all = locate_other(sequence, cu_k_ptr, n_sequences, n_keys, OPTIONS.PACKED)
    shift = position_shift(n_rows, keys_in_all, OPTIONS.LOWER_RIGHT)
    low_key, high_key = keys_of_rows(first, n_rows, keys_in_all, shift, left, right, ROWS, OPTIONS.WINDOW)
    high_key = tl.where(first < n_rows, high_key, low_key)
    last = tl.minimum(first + ROWS, n_rows) - 1
    return Block(
        index,
        batch,
        head,
        head // group,
        sequence,
        q_start,
        k_start,
        first,
        last,
        n_rows,
        keys_in_all,
        shift,
        low_key,
        high_key,
    )


@triton.jit
def rules_of(
    batch, head, shift, n_rows, n_keys, mask_ptr, bias_ptr, alibi_ptr,
    mask_b, mask_h, mask_row, mask_key, bias_b, bias_h, bias_row, bias_key, alibi_b, left, right, scale, softcap,
    OPTIONS: tl.constexpr,
):  # fmt: skip
    """The arguments of the rules for a head. batch and head in int64."""
    slope = 0.0
    if OPTIONS.ALIBI:
        slope = tl.load(alibi_ptr + batch * alibi_b + head)
    mask = PerPair(mask_ptr + batch * mask_b + head * mask_h, mask_row, mask_key)
    bias = PerPair(bias_ptr + batch * bias_b + head * bias_h, bias_row, bias_key)
    return Rules(scale, softcap, slope, left, right, shift, n_rows, n_keys, mask, bias)


@triton.jit
def products(
    a_ptr, a_first, a_valid, a_row, b_ptr, b_first, b_valid, b_row, PRECISION: tl.constexpr,
    A: tl.constexpr, B: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """A rows times B rows, (A, B) in float32, CHUNK entries at a time, because whole rows would take too many registers.

    It ends with the chunk that holds a row's last entry: what lies behind belongs to something else.
    """
    WHOLE: tl.constexpr = SIZE % CHUNK == 0
    x = tl.zeros((A, B), tl.float32)
    for at in range(0, SIZE, CHUNK):
        a = load_rows(a_ptr + at, a_first, a_valid, a_row, SIZE - at, A, CHUNK, WHOLE)
        b = load_rows(b_ptr + at, b_first, b_valid, b_row, SIZE - at, B, CHUNK, WHOLE)
        x = tl.dot(a, tl.trans(b), x, input_precision=PRECISION)
    return x


@triton.jit
def queries_of(q_ptr, q_row, block, SIZE: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr):
    """The queries of the block; if heads are split into chunks, which are loaded on demand, the address of the queries."""
    if CHUNK == BLOCK_D:
        valid = rows_inside(block.first, block.n_rows, ROWS)
        return load_rows(q_ptr, block.first, valid, q_row, SIZE, ROWS, BLOCK_D, SIZE == BLOCK_D)
    else:
        return q_ptr


@triton.jit
def sampled_products(
    q, q_row, k_ptr, k_row, keys, block, PRECISION: tl.constexpr,
    SIZE: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The queries of the block times keys at any positions in range."""
    x = tl.zeros((TILE, TILE), tl.float32)
    for at in range(0, SIZE, CHUNK):
        cols = at + tl.arange(0, CHUNK)
        inside = (keys < block.high_key)[:, None] & (cols < SIZE)[None, :]
        k = tl.load(k_ptr + tl.cast(keys, tl.int64)[:, None] * k_row + cols[None, :], mask=inside, other=0.0)
        if CHUNK == BLOCK_D:
            x = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        else:
            valid = rows_inside(block.first, block.n_rows, TILE)
            part = load_rows(q + at, block.first, valid, q_row, SIZE - at, TILE, CHUNK, SIZE % CHUNK == 0)
            x = tl.dot(part, tl.trans(k), x, input_precision=PRECISION)
    return x


@triton.jit
def sampled_scores(
    q, q_row, k_ptr, k_row, keys, block, rules, OPTIONS: tl.constexpr, LINEAR: tl.constexpr,
    SIZE: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """(TILE, TILE) scores with keys at any positions, or if LINEAR the products, -inf where masked."""
    PRECISION: tl.constexpr = OPTIONS.PRECISION  # a variable, because Triton 3.6 accepts no str from a tuple as an argument
    x = sampled_products(q, q_row, k_ptr, k_row, keys, block, PRECISION, SIZE, BLOCK_D, CHUNK)
    rows, keys = (block.first + tl.arange(0, TILE))[:, None], keys[None, :]
    if not LINEAR:
        x, _ = score(x, rows, keys, rules, OPTIONS)
    return tl.where(visible(rows, keys, keys < block.high_key, rules, OPTIONS), x, -float("inf"))


@triton.jit
def tile_scores(
    q, q_row, k_ptr, k_row, begin, block, rules, level, OPTIONS: tl.constexpr, LINEAR: tl.constexpr, EXACT: tl.constexpr,
    SHIFT: tl.constexpr, SIZE: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """(ROWS, KEYS) scores with the keys from position `begin` on, or if LINEAR the products, -inf where masked.

    If SHIFT, they are `evaluation.shifted` to the level.
    """
    PRECISION: tl.constexpr = OPTIONS.PRECISION
    # a tile crossed by neither the end of the keys nor the window is fully visible; a mask can hide any entry
    partly = begin + KEYS > block.n_keys
    if OPTIONS.WINDOW:
        partly = partly | (begin + KEYS - 1 - block.first - rules.shift > rules.right)
        partly = partly | (block.last + rules.shift - begin > rules.left)
    if OPTIONS.MASK != ABSENT:
        partly = True
    valid = rows_inside(begin, block.n_keys, KEYS)
    if CHUNK == BLOCK_D:
        k = load_rows(k_ptr, begin, valid, k_row, SIZE, KEYS, BLOCK_D, SIZE == BLOCK_D)
        x = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    else:
        x = products(
            q, block.first, rows_inside(block.first, block.n_rows, ROWS), q_row, k_ptr, begin, valid, k_row,
            PRECISION, ROWS, KEYS, SIZE, BLOCK_D, CHUNK,
        )  # fmt: skip
    rows, keys = (block.first + tl.arange(0, ROWS))[:, None], (begin + tl.arange(0, KEYS))[None, :]
    if not LINEAR:
        x, _ = score(x, rows, keys, rules, OPTIONS)
    if SHIFT and not EXACT:
        partly = partly | level.far  # in the same branch, so that most tiles take none
    if partly:
        x = tl.where(visible_in_tile(begin, block, rules, OPTIONS, ROWS, KEYS), x, -float("inf"))
        if OPTIONS.MASK != ABSENT:
            x = tl.where(unmasked(rows, keys, rules, OPTIONS), x, -float("inf"))
        if SHIFT and not EXACT:
            x = tl.where(level.far, x * level.unit - level.m[:, None], x)
    if SHIFT and EXACT:
        x = x * level.unit - level.m[:, None]
    return x


@triton.jit
def visible_in_tile(begin, block, rules, OPTIONS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr):
    """The entries of a tile that are visible by the number of keys and the window: a range of each row.

    A key is 8 j + c. Where a thread of a matrix unit holds all j, comparisons are with constants, which take no registers.
    """
    eights, c = 8 * tl.arange(0, KEYS // 8)[None, :, None], tl.arange(0, 8)[None, None, :]
    end = block.n_keys - begin
    if OPTIONS.WINDOW:
        position = block.first + tl.arange(0, ROWS) + rules.shift - begin
        end = tl.minimum(position + rules.right + 1, end)[:, None, None]
        seen = (eights < end - c) & (eights >= (position - rules.left)[:, None, None] - c)
    else:
        seen = (eights < end - c) & (tl.zeros((ROWS, 1, 1), tl.int32) == 0)
    return tl.reshape(seen, (ROWS, KEYS))
