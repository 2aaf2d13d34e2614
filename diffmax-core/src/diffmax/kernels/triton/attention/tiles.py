"""Tiles of attention: the location of a block of queries or keys, the tiles in its range, live tiles, loads and stores.

Blocks are numbered like the tiles of `live`: those of packed sequence n begin at block cu_seqlens[n] // BLOCK + n, so a program
finds its sequence without a prefix sum. Lengths and positions are int32, offsets between blocks int64. The contract is in
`diffmax.reference.attention`.
"""

import triton
import triton.language as tl

from diffmax.kernels.triton.common.layout import vector_multiple

# Side of a tile, and tiles per word of bits: `diffmax.plugin.TILE`, `diffmax.reference.attention.WORD`
TILE = tl.constexpr(64)
WORD = tl.constexpr(32)

_SEQUENCES_AT_ONCE = tl.constexpr(128)


@triton.jit
def locate_block(block, cu_ptr, n_sequences, length, BLOCK: tl.constexpr, PACKED: tl.constexpr):
    """The location of a block of rows: its sequence, start and length of the sequence, and the first row of the block in it.

    Rows after the last packed sequence count as one more sequence, n_sequences. A grid has cdiv(length, BLOCK) blocks, or if
    PACKED length // BLOCK + n_sequences + 1; some of those are after the end of their sequence.
    """
    if PACKED:
        begun = 0
        for first in range(0, n_sequences + 1, _SEQUENCES_AT_ONCE):
            n = first + tl.arange(0, _SEQUENCES_AT_ONCE)
            starts = tl.load(cu_ptr + n, mask=n <= n_sequences, other=0)
            begun += tl.sum(((n <= n_sequences) & (starts // BLOCK + n <= block)).to(tl.int32))
        sequence = begun - 1
        start = tl.load(cu_ptr + sequence)
        end = tl.load(cu_ptr + sequence + 1, mask=sequence < n_sequences, other=length)
        return sequence, start, end - start, (block - start // BLOCK - sequence) * BLOCK
    else:
        return 0, 0, length, block * BLOCK


@triton.jit
def locate_other(sequence, cu_ptr, n_sequences, length, PACKED: tl.constexpr):
    """Start and length of a sequence in the other tensor; the length is 0 for rows after the last sequence."""
    if PACKED:
        start = tl.load(cu_ptr + sequence)
        end = tl.load(cu_ptr + sequence + 1, mask=sequence < n_sequences, other=0)
        return start, tl.maximum(end - start, 0)
    else:
        return 0, length


@triton.jit
def position_shift(length, n_keys, LOWER_RIGHT: tl.constexpr):
    """The shift with which query i has the position of key i + shift."""
    if LOWER_RIGHT:
        return n_keys - length
    else:
        return length * 0


@triton.jit
def keys_of_rows(first, length, n_keys, shift, left, right, ROWS: tl.constexpr, WINDOW: tl.constexpr):
    """Range [low, high) of keys visible to queries first, ..., first + ROWS - 1 by causality and window; low <= high."""
    if WINDOW:
        last = tl.minimum(first + ROWS, length) - 1
        high = tl.maximum(tl.minimum(n_keys, last + shift + right + 1), 0)
        return tl.minimum(tl.maximum(first + shift - left, 0), high), high
    else:
        return n_keys * 0, n_keys


@triton.jit
def rows_of_keys(first, length, n_keys, shift, left, right, KEYS: tl.constexpr, WINDOW: tl.constexpr):
    """Range [low, high) of queries that see some of the keys first, ..., first + KEYS - 1; low <= high."""
    if WINDOW:
        last = tl.minimum(first + KEYS, n_keys) - 1
        high = tl.maximum(tl.minimum(length, last - shift + left + 1), 0)
        return tl.minimum(tl.maximum(first - shift - right, 0), high), high
    else:
        return length * 0, length


@triton.jit
def bits_between(word, low, high):
    """The bits of the word-th int32 whose tiles overlap the positions [low, high)."""
    one = tl.full((), 1, tl.int64)
    begin = tl.minimum(tl.maximum(low // TILE - word * WORD, 0), WORD)
    end = tl.minimum(tl.maximum((high + TILE - 1) // TILE - word * WORD, 0), WORD)
    return tl.where((high > low) & (end > begin), (one << end) - (one << begin), 0).to(tl.int32)


@triton.jit
def bits_of_column(live_ptr, word, key_word, key_bit, n_tiles, n_words):
    """Bit i: whether query tile word * WORD + i is live for one key tile. live_ptr: the words of the first query tile."""
    tiles = word * WORD + tl.arange(0, WORD)
    words = tl.load(live_ptr + tiles * n_words + key_word, mask=tiles < n_tiles, other=0)
    return tl.sum(((words >> key_bit) & 1) << tl.arange(0, WORD)).to(tl.int32)


@triton.jit
def bit_count(word):
    """The number of set bits."""
    v = word.to(tl.uint32, bitcast=True)
    v = v - ((v >> 1) & 0x55555555)
    v = (v & 0x33333333) + ((v >> 2) & 0x33333333)
    v = (v + (v >> 4)) & 0x0F0F0F0F
    return ((v * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def lowest_bit(word):
    """The index of the lowest set bit, from the exponent of a float."""
    power = (word & -word).to(tl.uint32, bitcast=True).to(tl.float32)
    return (power.to(tl.int32, bitcast=True) >> 23) - 127


@triton.jit
def walk(bits, word, step, SIZE: tl.constexpr):
    """First position of the step-th piece of the live tiles of a word, and the bits that remain after it.

    Pieces have SIZE positions, a divisor of TILE. There are bit_count(bits) * (TILE // SIZE) steps: a counted loop, which the
    compiler can pipeline.
    """
    piece = tl.cast(step, tl.int32) % (TILE // SIZE)
    first = (word * WORD + lowest_bit(bits)) * TILE + piece * SIZE
    return first, tl.where(piece == TILE // SIZE - 1, bits & (bits - 1), bits)


@triton.jit
def row_ptr(ptr, batch, head, start, stride_b, stride_h, stride_row, ALIGNED: tl.constexpr):
    """The address of row `start` of a batch entry and head. batch and head in int64; stride_row has its alignment hint."""
    VECTOR: tl.constexpr = 128 // ptr.dtype.element_ty.primitive_bitwidth
    return ptr + vector_multiple(batch * stride_b + head * stride_h, ALIGNED, VECTOR) + tl.cast(start, tl.int64) * stride_row


@triton.jit
def rows_inside(first, length, ROWS: tl.constexpr):
    """Boolean (ROWS,): which rows from `first` on exist."""
    return tl.arange(0, ROWS) < length - first


@triton.jit
def load_rows(ptr, first, valid, stride, size, ROWS: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr):
    """(ROWS, BLOCK) tile from row `first` on, zeros for rows that are not valid and after the `size` entries of a row.

    WHOLE: a row has BLOCK entries or more.
    """
    rows, cols = tl.arange(0, ROWS), tl.arange(0, BLOCK)
    inside = valid[:, None]
    if not WHOLE:
        inside = inside & (cols < size)[None, :]
    return tl.load(ptr + tl.cast(first, tl.int64) * stride + rows[:, None] * stride + cols[None, :], mask=inside, other=0.0)


@triton.jit
def store_rows(ptr, tile, first, valid, stride, size, ROWS: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr):
    """The inverse of `load_rows`: entries outside the rows are not stored."""
    rows, cols = tl.arange(0, ROWS), tl.arange(0, BLOCK)
    inside = valid[:, None]
    if not WHOLE:
        inside = inside & (cols < size)[None, :]
    offsets = tl.cast(first, tl.int64) * stride + rows[:, None] * stride + cols[None, :]
    tl.store(ptr + offsets, tile.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def load_vector(ptr, first, length, ROWS: tl.constexpr, other):
    """One number per row, from row `first` on."""
    return tl.load(ptr + first + tl.arange(0, ROWS), mask=rows_inside(first, length, ROWS), other=other)
