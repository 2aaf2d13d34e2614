"""Shared by attention's backward kernels: from a tile of products to p and s = p^alpha, recomputed from m and delta (Eq. 5).

A tile is queries by keys, or the transpose: `rows`, `keys`, and the values per query (m, delta, the mean of dP) have shapes
that broadcast.

A query whose weights are all 0 is silent: it propagates no gradient, not even NaN. The first kernel detects this, and stores
-inf as the mean for the others.
"""

import triton
import triton.language as tl

from diffmax.kernels.triton.common.numerics import alpha_weight, exp2_of, integer_power, log2_1p, log2_of
from diffmax.kernels.triton.common.scores import score, visible


@triton.jit
def heard_mean(mean):
    """The mean of dP, and whether the query is not silent."""
    heard = mean != -float("inf")
    return tl.where(heard, mean, 0.0), heard


@triton.jit
def base_and_slope(x, m, delta, e, k, K: tl.constexpr, HARDWARE: tl.constexpr, PTX: tl.constexpr):
    """b = [e (x - m) + 1 - delta]_+, s = b^(k-1) and, except for integer exponents, log2 b. The weight is s b.

    If delta of a query is NaN, all three are. m is finite.
    """
    u = e * (x - m) - delta
    dead = u <= -1.0
    b = tl.where(dead, 0.0, u + 1.0)
    log_b = b
    if K > 0:
        s = integer_power(b, K - 1)
    else:
        log_b = tl.where(dead, 0.0, log2_1p(u, HARDWARE, PTX))
        s = tl.where(dead, 0.0, exp2_of((k - 1.0) * log_b, PTX))
    return b, s, log_b


@triton.jit
def weight_of_alpha(b, p, log_b, e, k, K: tl.constexpr, TERMS: tl.constexpr):
    """w of Eq. 6."""
    if K != 0:
        log_b = tl.where(b == 0.0, 0.0, log2_of(b))
    return alpha_weight(p, k * log_b, tl.zeros((1,), tl.float32) + e, TERMS)


@triton.jit
def recompute(
    x, rows, keys, rules, m, delta, e, k,
    OPTIONS: tl.constexpr, K: tl.constexpr, HARDWARE: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """From products x: b, s, log2 b as in `base_and_slope`, and the capped scores for `score_gradient`."""
    scores, capped = score(x, rows, keys, rules, OPTIONS)
    seen = visible(rows, keys, keys < rules.n_keys, rules, OPTIONS) & (rows < rules.n_rows)
    scores = tl.where(seen, scores, -float("inf"))
    b, s, log_b = base_and_slope(scores, m, delta, e, k, K, HARDWARE, PTX)
    return b, s, log_b, capped
