"""What acts on a score, once for every kernel that computes scores: attention's forward and backward, and decoding.

A rule is a function here. What changes a score is called by `score`, and if it is not an addition its slope is in
`score_gradient`; what hides a score is called by `visible`. A tile is queries by keys, or the other way round: `rows` and
`keys` are positions, and they and whatever belongs to a query come shaped to broadcast.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

# A window without an end: added to a position, it stays within int32
NO_LIMIT = tl.constexpr(1 << 30)

# How a mask or a bias lies in memory. Where all queries share a row of it, a tile is one row.
ABSENT = tl.constexpr(0)
SHARED_BY_QUERIES = tl.constexpr(1)
ADJACENT_KEYS = tl.constexpr(2)
ANY_STRIDES = tl.constexpr(3)

# (tanh(x) / x - 1) / x^2 in powers of x^2 for |x| < 0.55, highest first; relative error 4e-9 in tanh before rounding
_T4 = tl.constexpr(-0.006610227831108231)
_T3 = tl.constexpr(0.021309388664439034)
_T2 = tl.constexpr(-0.053909428827459534)
_T1 = tl.constexpr(0.13333113729020862)
_T0 = tl.constexpr(-0.3333333200797698)


class Options(NamedTuple):
    """What kernels are compiled for, as their OPTIONS.

    Attributes:
        WINDOW: Whether a query sees only keys from `left` before its own position to `right` after it. Causality is right = 0.
        SOFTCAP, ALIBI: Whether the call has it.
        MASK, BIAS: How it lies in memory, or `ABSENT`.
        PACKED: Whether sequences lie one after the other.
        LOWER_RIGHT: Whether the last query stands at the last key.
        PRECISION: Of products.
    """

    WINDOW: bool
    SOFTCAP: bool
    ALIBI: bool
    MASK: int = 0
    BIAS: int = 0
    PACKED: bool = False
    LOWER_RIGHT: bool = False
    PRECISION: str = "ieee"


class PerPair(NamedTuple):
    """A mask or a bias of one batch entry and head: the address of its first entry, and strides."""

    ptr: Any
    row: Any
    key: Any


class Rules(NamedTuple):
    """What the rules are told of a batch entry and head.

    Attributes:
        scale: Of the products.
        softcap: c of c tanh(x / c).
        slope: ALiBi's.
        left, right: The window, `NO_LIMIT` for none.
        shift: Query i stands at key i + shift.
        n_rows, n_keys: How many queries and keys there are.
        mask, bias: Each a `PerPair`, read only where OPTIONS says so.
    """

    scale: Any
    softcap: Any
    slope: Any
    left: Any
    right: Any
    shift: Any
    n_rows: Any
    n_keys: Any
    mask: Any
    bias: Any


@triton.jit
def score(x, rows, keys, rules, OPTIONS: tl.constexpr):
    """Scores from products x; and for `score_gradient`, the scores before anything was added to them."""
    capped = softcapped(x * rules.scale, rules.softcap, OPTIONS.SOFTCAP)
    scores = with_alibi(capped, rows, keys, rules, OPTIONS.ALIBI)
    scores = with_bias(scores, rows, keys, rules, OPTIONS.BIAS)
    return scores, capped


@triton.jit
def score_gradient(d_scores, capped, rules, OPTIONS: tl.constexpr):
    """The gradient for scale * products, from that for the scores."""
    if OPTIONS.SOFTCAP:
        tangent = capped / rules.softcap
        return d_scores * (1.0 - tangent * tangent)
    else:
        return d_scores


@triton.jit
def visible(rows, keys, valid, rules, OPTIONS: tl.constexpr):
    """Which of the valid places of a tile are seen: by window and mask."""
    seen = valid
    if OPTIONS.WINDOW:
        after = keys_after(rows, keys, rules)
        seen = seen & in_window(after, after, rules)
    if OPTIONS.MASK != ABSENT:
        seen = seen & (load_per_pair(rules.mask, rows, keys, rules, OPTIONS.MASK, 0) != 0)  # a byte for each entry
    return seen


@triton.jit
def keys_after(rows, keys, rules):
    """How many keys after its query's own position a key stands."""
    return keys - rows - rules.shift


@triton.jit
def in_window(first, last, rules):
    """Whether the window holds some of the keys from `first` to `last`, which `keys_after` counts."""
    return (last >= -rules.left) & (first <= rules.right)


@triton.jit
def softcapped(x, softcap, SOFTCAP: tl.constexpr):
    """c tanh(x / c)."""
    if SOFTCAP:
        return softcap * tanh(x / softcap)
    else:
        return x


@triton.jit
def with_alibi(x, rows, keys, rules, ALIBI: tl.constexpr):
    """ALiBi: the slope times the distance less."""
    if ALIBI:
        return x - rules.slope * tl.abs(rows + rules.shift - keys).to(tl.float32)
    else:
        return x


@triton.jit
def with_bias(x, rows, keys, rules, BIAS: tl.constexpr):
    """The additive bias, in its own dtype."""
    if BIAS != ABSENT:
        return x + load_per_pair(rules.bias, rows, keys, rules, BIAS, 0.0).to(tl.float32)
    else:
        return x


@triton.jit
def load_per_pair(pair, rows, keys, rules, LAYOUT: tl.constexpr, other):
    """What a mask or a bias holds for a tile."""
    key_offsets = tl.cast(keys, tl.int64) * pair.key
    if LAYOUT == ADJACENT_KEYS or LAYOUT == SHARED_BY_QUERIES:  # noqa: SIM109  (Triton knows no tuples of constants)
        key_offsets = keys
    if LAYOUT == SHARED_BY_QUERIES:
        return tl.load(pair.ptr + key_offsets, mask=keys < rules.n_keys, other=other)
    else:
        inside = (rows < rules.n_rows) & (keys < rules.n_keys)
        return tl.load(pair.ptr + tl.cast(rows, tl.int64) * pair.row + key_offsets, mask=inside, other=other)


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
def keep_mask(seed_ptr, rows, keys, sequence_and_head, threshold):
    """Which weights of a tile dropout keeps: Philox4x32-10 of (key, query, sequence * heads + head, 0), word 0 >= threshold.

    threshold holds the bits of a uint32.
    """
    low = tl.load(seed_ptr).to(tl.uint64, bitcast=True) & 0xFFFFFFFF
    high = tl.load(seed_ptr + 1).to(tl.uint64, bitcast=True) & 0xFFFFFFFF
    keys, rows = tl.broadcast(keys, rows)
    zero = rows * 0
    word, _, _, _ = tl.philox(low | (high << 32), keys, rows, zero + sequence_and_head, zero)
    return word >= tl.cast(threshold, tl.uint32, bitcast=True)
