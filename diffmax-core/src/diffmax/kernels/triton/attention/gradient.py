"""What attention's backward kernels share: from a tile of products to p and s = p^alpha, recomputed from m and delta (Eq. 5).

A tile is queries by keys, or the other way round: `rows`, `keys`, and what belongs to a query (m, delta, the mean of dP) come
shaped to broadcast.

A query whose weights are all 0 is silent: it passes nothing on, not even NaN. The first kernel, which knows, leaves -inf as its
mean for the others.
"""

import triton
import triton.language as tl

from diffmax.kernels.triton.attention.tiles import capped, is_visible, load_these_rows, with_biases
from diffmax.kernels.triton.common.numerics import alpha_weight, clamped_e, exp2_of, log2_1p, log2_of


@triton.jit
def products(
    a_ptr, a_first, a_wanted, a_row, b_ptr, b_first, b_wanted, b_row, PRECISION: tl.constexpr,
    A: tl.constexpr, B: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The products of A rows with B rows, CHUNK entries at a time: for compilers that would hold whole rows in registers."""
    x = tl.zeros((A, B), tl.float32)
    for at in tl.static_range(0, BLOCK, CHUNK):
        a = load_these_rows(a_ptr + at, a_first, a_wanted, a_row, A, SIZE - at, CHUNK)
        b = load_these_rows(b_ptr + at, b_first, b_wanted, b_row, B, SIZE - at, CHUNK)
        x = tl.dot(a, tl.trans(b), x, input_precision=PRECISION)
    return x


@triton.jit
def exponent_of_head(e_ptr, head, e, k, E_TENSOR: tl.constexpr):
    """e = 1 - alpha of a head, raised to the softmax limit, and k = 1/e."""
    if E_TENSOR:
        head_e = clamped_e(tl.load(e_ptr + head).to(tl.float32))
        return head_e, 1.0 / head_e
    else:
        return e, k


@triton.jit
def heard_mean(mean):
    """The mean of dP, and whether the query is not silent."""
    heard = mean != -float("inf")
    return tl.where(heard, mean, 0.0), heard


@triton.jit
def base_and_slope(x, m, delta, e, k, K: tl.constexpr, HARDWARE: tl.constexpr, PTX: tl.constexpr):
    """b = [e (x - m) + 1 - delta]_+, s = b^(k-1) and, but for integer exponents, log2 b. The weight is s b.

    NaN in a query's delta is in all three. m is finite.
    """
    u = e * (x - m) - delta
    dead = u <= -1.0
    b = tl.where(dead, 0.0, u + 1.0)
    log_b = b
    if K == 2:
        s = b
    elif K == 3:
        s = b * b
    elif K == 4:
        s = b * b * b
    elif K == 5:
        s = b * b
        s = s * s
    elif K == 10:
        s = b * b
        s = s * s
        s = s * s * b
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
    x, rows, keys, length, n_keys, shift, left, right, mask_ptr, mask_row, mask_key,
    softcap, slope, bias_ptr, bias_row, bias_key, m, delta, e, k,
    WINDOW: tl.constexpr, MASK: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, BIAS: tl.constexpr,
    K: tl.constexpr, HARDWARE: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """From x = scale * query . key: b, s, log2 b as `base_and_slope` gives them, and d(score) / dx."""
    cap = capped(x, softcap, SOFTCAP)
    scores = with_biases(cap, rows, keys, length, n_keys, shift, slope, bias_ptr, bias_row, bias_key, ALIBI, BIAS)
    seen = is_visible(rows, keys, length, n_keys, shift, left, right, mask_ptr, mask_row, mask_key, WINDOW, MASK)
    scores = tl.where(seen & (rows < length), scores, -float("inf"))
    b, s, log_b = base_and_slope(scores, m, delta, e, k, K, HARDWARE, PTX)
    slack = cap
    if SOFTCAP:
        slack = 1.0 - (cap / softcap) * (cap / softcap)
    return b, s, log_b, slack
