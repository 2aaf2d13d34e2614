"""The rules of the scores, shared by every kernel that computes scores: attention's forward and backward, and decoding.

Each rule is a function. `score` calls the rules that change a score; unless a rule only adds, its slope is in `score_gradient`.
`visible` calls the rules that mask. A tile is queries by keys, or the transpose: `rows` and `keys` are positions; they and all
values per query have shapes that broadcast against the tile.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

# An unlimited window: added to a position, it does not overflow int32
NO_LIMIT = tl.constexpr(1 << 30)

# Memory layout of a mask or a bias. If all queries share a row of it, a tile is one row.
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
    """The compile-time options of a kernel, its OPTIONS.

    Attributes:
        WINDOW: Whether a query sees only keys from `left` before its position to `right` after it. Causality is right = 0.
        SOFTCAP, ALIBI: Whether the call has this option.
        MASK, BIAS: Memory layout, or `ABSENT`.
        PACKED: Whether the call has packed sequences.
        LOWER_RIGHT: Whether the last query has the position of the last key.
        PRECISION: Precision of products.
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
    """A mask or a bias for one batch entry and head: the address of its first entry, and strides."""

    ptr: Any
    row: Any
    key: Any


class Rules(NamedTuple):
    """The runtime arguments of the rules for one batch entry and head.

    Attributes:
        scale: Factor of the products.
        softcap: c in c tanh(x / c).
        slope: The ALiBi slope.
        left, right: The window; `NO_LIMIT`: unlimited.
        shift: Query i has the position of key i + shift.
        n_rows, n_keys: Number of queries and keys.
        mask, bias: A `PerPair` each, read only if OPTIONS has it.
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
    """Scores from products x, and for `score_gradient` the capped scores, before additive terms."""
    capped = softcapped(x * rules.scale, rules.softcap, OPTIONS.SOFTCAP)
    scores = with_alibi(capped, rows, keys, rules, OPTIONS.ALIBI)
    scores = with_bias(scores, rows, keys, rules, OPTIONS.BIAS)
    return scores, capped


@triton.jit
def score_gradient(d_scores, capped, rules, OPTIONS: tl.constexpr):
    """The gradient for scale * products, from the gradient for the scores."""
    if OPTIONS.SOFTCAP:
        tangent = capped / rules.softcap
        return d_scores * (1.0 - tangent * tangent)
    else:
        return d_scores


@triton.jit
def visible(rows, keys, valid, rules, OPTIONS: tl.constexpr):
    """The valid entries of a tile that are visible by window and mask."""
    seen = valid
    if OPTIONS.WINDOW:
        after = keys_after(rows, keys, rules)
        seen = seen & in_window(after, after, rules)
    if OPTIONS.MASK != ABSENT:
        seen = seen & unmasked(rows, keys, rules, OPTIONS)
    return seen


@triton.jit
def unmasked(rows, keys, rules, OPTIONS: tl.constexpr):
    """The entries that the mask, with one byte per entry, leaves visible."""
    return load_per_pair(rules.mask, rows, keys, rules, OPTIONS.MASK, 0) != 0


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
    """ALiBi: subtracts the slope times the distance."""
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
    """Load the tile of a mask or a bias."""
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
    """The hyperbolic tangent; a polynomial where the exponential would lose digits."""
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
    """The keep mask of a tile: word 0 of Philox4x32-10 for (key, query, sequence * heads + head, 0) is >= threshold.

    threshold holds the bits of a uint32.
    """
    low = tl.load(seed_ptr).to(tl.uint64, bitcast=True) & 0xFFFFFFFF
    high = tl.load(seed_ptr + 1).to(tl.uint64, bitcast=True) & 0xFFFFFFFF
    keys, rows = tl.broadcast(keys, rows)
    zero = rows * 0
    word, _, _, _ = tl.philox(low | (high << 32), keys, rows, zero + sequence_and_head, zero)
    return word >= tl.cast(threshold, tl.uint32, bitcast=True)
