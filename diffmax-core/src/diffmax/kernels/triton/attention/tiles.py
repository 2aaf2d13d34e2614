"""What attention's Triton kernels share: where a block of queries or keys lies, which tiles it meets, loads, scores.

Blocks are counted as `live` counts its tiles: those of packed sequence n begin at block cu_seqlens[n] // BLOCK + n, so that a
program finds its place without a prefix sum. Lengths and places are int32, offsets between blocks int64. The contract is in
`diffmax.reference.attention`.
"""

import triton
import triton.language as tl

# Queries and keys of one tile, and tiles whose bits share a word: `diffmax.plugin.TILE`, `diffmax.reference.attention.WORD`
TILE = tl.constexpr(64)
WORD = tl.constexpr(32)

# A window without an end: added to a place, it stays within int32
NO_LIMIT = tl.constexpr(1 << 30)

# How a mask or a bias lies in memory. Where all queries share a row of it, a tile is one row.
ABSENT = tl.constexpr(0)
SHARED_BY_QUERIES = tl.constexpr(1)
ADJACENT_KEYS = tl.constexpr(2)
ANY_STRIDES = tl.constexpr(3)

_SEQUENCES_AT_ONCE = tl.constexpr(128)

# (tanh(x) / x - 1) / x^2 in powers of x^2 for |x| < 0.55, highest first; relative error 4e-9 in tanh before rounding
_T4 = tl.constexpr(-0.006610227831108231)
_T3 = tl.constexpr(0.021309388664439034)
_T2 = tl.constexpr(-0.053909428827459534)
_T1 = tl.constexpr(0.13333113729020862)
_T0 = tl.constexpr(-0.3333333200797698)


@triton.jit
def block_place(block, cu_ptr, n_sequences, length, BLOCK: tl.constexpr, PACKED: tl.constexpr):
    """Where a block of rows lies: its sequence, where that begins, its length, and the block's first row in it.

    What follows the last packed sequence counts as one more, n_sequences. A grid has cdiv(length, BLOCK) blocks, or if PACKED
    length // BLOCK + n_sequences + 1; some of those lie beyond their sequence's end.
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
def other_side(sequence, cu_ptr, n_sequences, length, PACKED: tl.constexpr):
    """Where a sequence begins in the other tensor, and its length there: 0 for what follows the last one."""
    if PACKED:
        start = tl.load(cu_ptr + sequence)
        end = tl.load(cu_ptr + sequence + 1, mask=sequence < n_sequences, other=0)
        return start, tl.maximum(end - start, 0)
    else:
        return 0, length


@triton.jit
def place_shift(length, n_keys, LOWER_RIGHT: tl.constexpr):
    """Query i stands at key i + shift."""
    if LOWER_RIGHT:
        return n_keys - length
    else:
        return length * 0


@triton.jit
def keys_of_rows(first, length, n_keys, shift, left, right, ROWS: tl.constexpr, WINDOW: tl.constexpr):
    """Keys [low, high) that some of the queries first, ..., first + ROWS - 1 see by causality and window; low <= high."""
    if WINDOW:
        last = tl.minimum(first + ROWS, length) - 1
        high = tl.maximum(tl.minimum(n_keys, last + shift + right + 1), 0)
        return tl.minimum(tl.maximum(first + shift - left, 0), high), high
    else:
        return n_keys * 0, n_keys


@triton.jit
def rows_of_keys(first, length, n_keys, shift, left, right, KEYS: tl.constexpr, WINDOW: tl.constexpr):
    """Queries [low, high) that see some of the keys first, ..., first + KEYS - 1; low <= high."""
    if WINDOW:
        last = tl.minimum(first + KEYS, n_keys) - 1
        high = tl.maximum(tl.minimum(length, last - shift + left + 1), 0)
        return tl.minimum(tl.maximum(first - shift - right, 0), high), high
    else:
        return length * 0, length


@triton.jit
def bits_between(word, low, high):
    """Which bits of the word-th int32 stand for tiles that hold some of the places [low, high)."""
    one = tl.full((), 1, tl.int64)
    begin = tl.minimum(tl.maximum(low // TILE - word * WORD, 0), WORD)
    end = tl.minimum(tl.maximum((high + TILE - 1) // TILE - word * WORD, 0), WORD)
    return tl.where((high > low) & (end > begin), (one << end) - (one << begin), 0).to(tl.int32)


@triton.jit
def bits_of_column(live_ptr, word, key_word, key_bit, n_tiles, n_words):
    """Bit i: whether query tile word * WORD + i is live with one tile of keys. live_ptr: the first query tile's words."""
    tiles = word * WORD + tl.arange(0, WORD)
    words = tl.load(live_ptr + tiles * n_words + key_word, mask=tiles < n_tiles, other=0)
    return tl.sum(((words >> key_bit) & 1) << tl.arange(0, WORD)).to(tl.int32)


@triton.jit
def bit_count(word):
    """How many bits are set."""
    v = word.to(tl.uint32, bitcast=True)
    v = v - ((v >> 1) & 0x55555555)
    v = (v & 0x33333333) + ((v >> 2) & 0x33333333)
    v = (v + (v >> 4)) & 0x0F0F0F0F
    return ((v * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def lowest_bit(word):
    """The place of the lowest bit that is set, read off a float's exponent."""
    power = (word & -word).to(tl.uint32, bitcast=True).to(tl.float32)
    return (power.to(tl.int32, bitcast=True) >> 23) - 127


@triton.jit
def walk(bits, word, step, SIZE: tl.constexpr):
    """First place of the step-th piece of SIZE, a divisor of TILE, of the word's live tiles; and the bits that remain after it.

    There are bit_count(bits) * (TILE // SIZE) steps. A counted loop over them is one that the compiler can pipeline.
    """
    piece = tl.cast(step, tl.int32) % (TILE // SIZE)
    first = (word * WORD + lowest_bit(bits)) * TILE + piece * SIZE
    return first, tl.where(piece == TILE // SIZE - 1, bits & (bits - 1), bits)


@triton.jit
def whole(stride, ALIGNED: tl.constexpr, VECTOR: tl.constexpr):
    """`stride`, for the compiler a multiple of VECTOR where ALIGNED promises it."""
    if ALIGNED:
        return stride // VECTOR * VECTOR
    else:
        return stride


@triton.jit
def first_row(ptr, batch, head, start, stride_b, stride_h, stride_row, ALIGNED: tl.constexpr, VECTOR: tl.constexpr):
    """Where the matrix of a batch entry and head begins, or its rows from `start` on. batch and head in int64."""
    ptr += batch * whole(stride_b, ALIGNED, VECTOR) + head * whole(stride_h, ALIGNED, VECTOR)
    return ptr + start * tl.cast(whole(stride_row, ALIGNED, VECTOR), tl.int64)


@triton.jit
def load_rows(ptr, first, length, stride, ROWS: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """(ROWS, BLOCK) tile from row `first` on. A row has SIZE entries side by side; there are zeros beside and below them."""
    return load_these_rows(ptr, first, tl.arange(0, ROWS) < length - first, stride, ROWS, SIZE, BLOCK)


@triton.jit
def load_these_rows(ptr, first, wanted, stride, ROWS: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """The same, with zeros for the rows that are not wanted."""
    rows = tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK)
    inside = wanted[:, None]
    if SIZE != BLOCK:
        inside = inside & (cols < SIZE)[None, :]
    return tl.load(ptr + tl.cast(first, tl.int64) * stride + rows[:, None] * stride + cols[None, :], mask=inside, other=0.0)


@triton.jit
def store_rows(ptr, tile, first, length, stride, ROWS: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """The reverse: what lies beside and below the rows is dropped."""
    rows = tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK)
    inside = (rows < length - first)[:, None]
    if SIZE != BLOCK:
        inside = inside & (cols < SIZE)[None, :]
    offsets = tl.cast(first, tl.int64) * stride + rows[:, None] * stride + cols[None, :]
    tl.store(ptr + offsets, tile.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def load_vector(ptr, first, length, ROWS: tl.constexpr, other):
    """One number for each of the rows from `first` on."""
    rows = tl.arange(0, ROWS)
    return tl.load(ptr + first + rows, mask=rows < length - first, other=other)


@triton.jit
def load_beside_scores(ptr, rows, keys, length, n_keys, stride_row, stride_key, LAYOUT: tl.constexpr, other):
    """What a mask or a bias holds for a tile of scores; ptr: its first entry for this batch entry and head."""
    keys_at = tl.cast(keys, tl.int64) * stride_key
    if LAYOUT == ADJACENT_KEYS or LAYOUT == SHARED_BY_QUERIES:  # noqa: SIM109  (Triton knows no tuples of constants)
        keys_at = keys
    if LAYOUT == SHARED_BY_QUERIES:
        return tl.load(ptr + keys_at, mask=keys < n_keys, other=other)
    else:
        inside = (rows < length) & (keys < n_keys)
        return tl.load(ptr + tl.cast(rows, tl.int64) * stride_row + keys_at, mask=inside, other=other)


@triton.jit
def is_visible(
    rows, keys, length, n_keys, shift, left, right, mask_ptr, mask_row, mask_key,
    WINDOW: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Which keys of a tile its queries see. rows and keys are places, shaped to broadcast to the tile.

    A mask has one byte per entry. Rows beyond the last are not looked at: their scores are of zeros, and are not stored.
    """
    seen = keys < n_keys
    if WINDOW:
        distance = keys - rows - shift
        seen = seen & (distance >= -left) & (distance <= right)
    if MASK != ABSENT:
        seen = seen & (load_beside_scores(mask_ptr, rows, keys, length, n_keys, mask_row, mask_key, MASK, 0) != 0)
    return seen


@triton.jit
def tanh(x):
    """The hyperbolic tangent: a polynomial where the exponential would lose digits."""
    size = tl.abs(x)
    y = x * x
    series = tl.fma(y, _T4, _T3)
    series = tl.fma(y, series, _T2)
    series = tl.fma(y, series, _T1)
    series = tl.fma(y, series, _T0)
    far = 1.0 - 2.0 / (tl.exp(2.0 * tl.minimum(size, 20.0)) + 1.0)
    far = tl.where(x < 0.0, -far, far)
    return tl.where(size != size, x, tl.where(size < 0.55, tl.fma(x * y, series, x), far))


@triton.jit
def capped(x, softcap, SOFTCAP: tl.constexpr):
    """c tanh(x / c)."""
    if SOFTCAP:
        return softcap * tanh(x / softcap)
    else:
        return x


@triton.jit
def with_biases(
    x, rows, keys, length, n_keys, shift, slope, bias_ptr, bias_row, bias_key,
    ALIBI: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """Scores, scaled and capped, with ALiBi's penalty and the additive bias. slope: of this head."""
    if ALIBI:
        x = x - slope * tl.abs(rows + shift - keys).to(tl.float32)
    if BIAS != ABSENT:
        bias = load_beside_scores(bias_ptr, rows, keys, length, n_keys, bias_row, bias_key, BIAS, 0.0)
        x = x + bias.to(tl.float32)
    return x


@triton.jit
def kept(seed_ptr, rows, keys, sequence_and_head, threshold):
    """Which weights of a tile dropout keeps: Philox4x32-10 of (key, query, sequence * heads + head, 0), word 0 >= threshold.

    threshold holds the bits of a uint32.
    """
    low = tl.load(seed_ptr).to(tl.uint64, bitcast=True) & 0xFFFFFFFF
    high = tl.load(seed_ptr + 1).to(tl.uint64, bitcast=True) & 0xFFFFFFFF
    keys, rows = tl.broadcast(keys, rows)
    zero = rows * 0
    word, _, _, _ = tl.philox(low | (high << 32), keys, rows, zero + sequence_and_head, zero)
    return word >= tl.cast(threshold, tl.uint32, bitcast=True)
