"""First launch of decoding: new tokens into the cache, an upper bound of every page's scores, and two samples of scores.

The threshold of any subset of the scores is a lower bound of tau. Each split takes it from one tile, the one with the largest
bound, and guesses tau from another, as if all keys were like it. docs/decoding.md tells what the launches read.
"""

import triton
import triton.language as tl

from diffmax.kernels.triton.common.numerics import HARDWARE_NONE, expm1_of, first_iterate, powers, scaled_scores, sums_near_top
from diffmax.kernels.triton.common.scores import in_window, keys_after, softcapped
from diffmax.kernels.triton.decoding.tiles import (
    GUESS_DELTA,
    GUESS_TOP,
    SAMPLE_DELTA,
    SAMPLE_TOP,
    exponents,
    finite,
    largest,
    load_queries,
    load_tile,
    product,
    rows_of,
    rules_of,
    scores_of,
    stretch,
    tokens_of,
    whose,
    write_slot,
)

_EPS = tl.constexpr(2.0**-23)
_STEPS = tl.constexpr(2)
_PAGES = tl.constexpr(16)


@triton.jit
def subset_delta(scores, top, goal, e, k, K: tl.constexpr, PTX: tl.constexpr):
    """A lower bound of the delta at which the weights of these scores alone sum to `goal` <= 1: Newton's steps never pass it.

    Few steps, since it decides how much is read and where the solver starts, not the result.
    """
    z = scaled_scores(scores, top, e)
    near, count = sums_near_top(z)
    delta = first_iterate(near / goal, count / goal, e)
    for _ in tl.static_range(_STEPS):
        b, r = powers(z, delta, k, K, HARDWARE_NONE, PTX)
        total, slope = tl.sum(r * b * b, axis=1) / goal, tl.sum(r * b, axis=1) / goal
        step = -total * expm1_of(-e * tl.log(total)) / slope
        delta += tl.where((total > 1.0) & (step > 0.0), step, 0.0)
    return delta


@triton.jit
def page_bound(q, low, high, in_rows, place, query, page_size, rules, OPTIONS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """(BLOCK_M, pages): no score of the page, as it is computed, is larger. `place` is each page's first."""
    kind: tl.constexpr = q.dtype
    wide_q, wide_low, wide_high = q.to(tl.float32), low.to(tl.float32), high.to(tl.float32)
    wide_q = tl.where(rules.scale < 0.0, -wide_q, wide_q)
    size = tl.abs(rules.scale)
    bound = product(tl.maximum(wide_q, 0.0).to(kind), tl.trans(high))
    bound += product(tl.minimum(wide_q, 0.0).to(kind), tl.trans(low))
    reach = tl.maximum(tl.abs(wide_low), tl.abs(wide_high)).to(kind)
    reach = product(tl.abs(wide_q).to(kind), tl.trans(reach))
    bound = size * (bound + (2 * HEAD_DIM + 16) * _EPS * reach)
    if OPTIONS.SOFTCAP:
        bound = softcapped(bound, rules.softcap, True) + 32 * _EPS * rules.softcap
    first = keys_after(query[:, None], place[None, :], rules)
    last = first + page_size - 1
    if OPTIONS.ALIBI:
        near = tl.maximum(tl.maximum(first, -last), 0).to(tl.float32)
        far = tl.maximum(tl.abs(first), tl.abs(last)).to(tl.float32)
        taken = rules.slope * tl.where(rules.slope < 0.0, far, near)
        bound += 4 * _EPS * (tl.abs(taken) + tl.abs(bound)) - taken
    seen = in_rows[:, None] & (place[None, :] < rules.n_keys)
    if OPTIONS.WINDOW:
        seen = seen & in_window(first, last, rules)
    return tl.where(seen, tl.where(bound != bound, float("inf"), bound), -float("inf"))


@triton.jit
def join(a, b, LOW: tl.constexpr):
    """The smaller or the larger; NaN if one is."""
    if LOW:
        joined = tl.minimum(a, b)
    else:
        joined = tl.maximum(a, b)
    return tl.where((a != a) | (b != b), float("nan"), joined)


@triton.jit
def widen(
    bound_ptr, new_ptr, page, parts, page_size, b, kv_head, at, span, new_b, new_s, new_h, new_d,
    LOW: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Take a page's new keys into one of its bounds; a page whose first token is new starts afresh."""
    _opens, begin, _end = span
    column = tl.arange(0, BLOCK_D)
    outside = float("inf") if LOW else -float("inf")
    is_nan = tl.zeros((BLOCK_D,), tl.int32)
    found = tl.full((BLOCK_D,), outside, tl.float32)
    for tile in range(page * parts, page * parts + parts):
        place, there = tokens_of(tile, page_size, parts, span, BLOCK_N)
        fresh = (there & (place >= begin))[:, None] & (column < HEAD_DIM)[None, :]
        source = b * new_b + (place - begin).to(tl.int64)[:, None] * new_s + kv_head * new_h
        keys = tl.load(new_ptr + source + column.to(tl.int64)[None, :] * new_d, mask=fresh, other=outside).to(tl.float32)
        is_nan = tl.maximum(is_nan, tl.max((keys != keys).to(tl.int32), axis=0))
        keys = tl.where(keys != keys, outside, keys)
        found = tl.minimum(found, tl.min(keys, axis=0)) if LOW else tl.maximum(found, tl.max(keys, axis=0))
    found = tl.where(is_nan > 0, float("nan"), found)
    if page * page_size < begin:
        old = tl.load(bound_ptr + at + column, mask=column < HEAD_DIM, other=0.0).to(tl.float32)
        found = join(old, found, LOW)
    tl.store(bound_ptr + at + column, found.to(bound_ptr.dtype.element_ty), mask=column < HEAD_DIM)


@triton.jit
def sample_scores(
    tile, q, k_ptr, kn_ptr, table_ptr, b, held, kv_head, span, in_rows, query, rules, parts, page_size, table_b,
    k_b, k_s, k_h, k_d, kn_b, kn_s, kn_h, kn_d,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, PAGED: tl.constexpr, HAS_NEW: tl.constexpr,
    OPTIONS: tl.constexpr,
):  # fmt: skip
    """The scores of a tile, and which of its tokens are there. New ones are not read from the cache, which is being written."""
    _opens, begin, _end = span
    place, there = tokens_of(tile, page_size, parts, span, BLOCK_N)
    column = tl.arange(0, BLOCK_D)
    at = rows_of(table_ptr, b, held, tile, place, parts, page_size, table_b, k_b, k_s, PAGED)
    if HAS_NEW:
        keys = load_tile(k_ptr, at, column, there & (place < begin), kv_head, k_h, k_d, HEAD_DIM)
        fresh, at = there & (place >= begin), b * kn_b + (place - begin).to(tl.int64) * kn_s
        new = load_tile(kn_ptr, at, column, fresh, kv_head, kn_h, kn_d, HEAD_DIM)
        keys = tl.where(fresh[:, None], new, keys)
    else:
        keys = load_tile(k_ptr, at, column, there, kv_head, k_h, k_d, HEAD_DIM)
    return scores_of(q, keys, place, there, in_rows, query, rules, OPTIONS), there


@triton.jit(do_not_specialize=[
    "q_b", "q_l", "q_h", "kn_b", "kn_s", "kn_h", "vn_b", "vn_s", "vn_h", "table_b",
    "alibi_b", "new", "room", "page_size", "parts", "pages", "kv_heads", "group", "length", "blocks", "splits", "most_tiles",
    "left", "right", "scale", "softcap", "e", "k",
])  # fmt: skip
def kvcache_start_kernel(
    q_ptr, k_ptr, v_ptr, kn_ptr, vn_ptr, low_ptr, high_ptr, seqlens_ptr, places_ptr, table_ptr, e_ptr, alibi_ptr,
    tops_ptr, work_ptr,
    q_b, q_l, q_h, q_d, k_b, k_s, k_h, k_d, v_b, v_s, v_h, v_d, kn_b, kn_s, kn_h, kn_d, vn_b, vn_s, vn_h, vn_d,
    table_b, alibi_b,
    new, room, page_size, parts, pages, kv_heads, group, length, blocks, splits, most_tiles, left, right,
    scale, softcap, e, k,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, PAGED: tl.constexpr,
    HAS_NEW: tl.constexpr, PLACES: tl.constexpr, HAS_BOUNDS: tl.constexpr, OPTIONS: tl.constexpr,
    E_TENSOR: tl.constexpr, K: tl.constexpr, PTX: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """tops (block, tile, BLOCK_M): the bounds, and four slots of the work.  Grid: (B * H_kv * blocks of rows, splits)."""
    block, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b, kv_head, held, head, query, in_rows, span = whose(
        block, tl.arange(0, BLOCK_M), seqlens_ptr, places_ptr, kv_heads, group, length, blocks, new, room, PLACES, BLOCK_M
    )
    _opens, begin, end = span
    first, last = stretch(split, splits, span, length, left, page_size, parts, HAS_NEW, OPTIONS.WINDOW)
    row_e, row_k = exponents(e_ptr, e, k, head, E_TENSOR)
    rules = rules_of(b, head, span, length, alibi_ptr, alibi_b, left, right, scale, softcap, OPTIONS)
    q = load_queries(q_ptr, b, head, query, in_rows, q_b, q_l, q_h, q_d, HEAD_DIM, BLOCK_D)

    if HAS_NEW:
        if block % blocks == 0:
            for tile in range(tl.maximum(first, begin // page_size * parts), last):
                place, there = tokens_of(tile, page_size, parts, span, BLOCK_N)
                fresh = there & (place >= begin)
                source = (place - begin).to(tl.int64)[:, None]
                at = rows_of(table_ptr, b, held, tile, place, parts, page_size, table_b, k_b, k_s, PAGED)[:, None]
                d = tl.arange(0, BLOCK_D)[None, :]
                mask = fresh[:, None] & (d < HEAD_DIM)
                keys = tl.load(kn_ptr + b * kn_b + source * kn_s + kv_head * kn_h + d * kn_d, mask=mask)
                tl.store(k_ptr + at + kv_head * k_h + d * k_d, keys, mask=mask)
                at = rows_of(table_ptr, b, held, tile, place, parts, page_size, table_b, v_b, v_s, PAGED)[:, None]
                d = tl.arange(0, BLOCK_V)[None, :]
                mask = fresh[:, None] & (d < VALUE_DIM)
                values = tl.load(vn_ptr + b * vn_b + source * vn_s + kv_head * vn_h + d * vn_d, mask=mask)
                tl.store(v_ptr + at + kv_head * v_h + d * v_d, values, mask=mask)
                if HAS_BOUNDS:
                    if tile % parts == 0:
                        page = tile // parts
                        which = held * pages + page
                        if PAGED:
                            which = tl.load(table_ptr + b * table_b + page).to(tl.int64)
                        at_bound = (which * kv_heads + kv_head) * HEAD_DIM
                        widen(low_ptr, kn_ptr, page, parts, page_size, b, kv_head, at_bound, span,
                              kn_b, kn_s, kn_h, kn_d, True, HEAD_DIM, BLOCK_D, BLOCK_N)  # fmt: skip
                        widen(high_ptr, kn_ptr, page, parts, page_size, b, kv_head, at_bound, span,
                              kn_b, kn_s, kn_h, kn_d, False, HEAD_DIM, BLOCK_D, BLOCK_N)  # fmt: skip

    guess = first + (last - first) // 2
    best = guess
    if HAS_BOUNDS:
        best_bound = -float("inf")
        d = tl.arange(0, BLOCK_D)[None, :]
        for start in range(first, last, _PAGES):
            tile = start + tl.arange(0, _PAGES)
            page, here = tile // parts, tile < last
            # pages that are being written to have no bounds yet
            settled = here
            if HAS_NEW:
                settled = here & ((page + 1) * page_size <= begin)
            which = held * pages + page
            if PAGED:
                which = tl.load(table_ptr + b * table_b + page, mask=settled, other=0).to(tl.int64)
            at = ((which * kv_heads + kv_head) * HEAD_DIM)[:, None] + d
            mask = settled[:, None] & (d < HEAD_DIM)
            bound = page_bound(
                q, tl.load(low_ptr + at, mask=mask, other=0.0), tl.load(high_ptr + at, mask=mask, other=0.0), in_rows,
                page * page_size, query, page_size, rules, OPTIONS, HEAD_DIM,
            )  # fmt: skip
            bound = tl.where(settled[None, :] | (bound == -float("inf")), bound, float("inf"))
            at = (block * most_tiles + tile)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
            tl.store(tops_ptr + at, tl.trans(bound), mask=here[:, None])
            top = tl.where(here, tl.max(bound, axis=0), -float("inf"))
            if tl.max(top, axis=0) > best_bound:
                best_bound = tl.max(top, axis=0)
                best = start + tl.argmax(top, axis=0)

    guess_top, guess_delta = tl.full((BLOCK_M,), -float("inf"), tl.float32), tl.zeros((BLOCK_M,), tl.float32)
    sample_top, sample_delta = guess_top, guess_delta
    if first < last:
        scores, there = sample_scores(
            guess, q, k_ptr, kn_ptr, table_ptr, b, held, kv_head, span, in_rows, query, rules, parts, page_size, table_b,
            k_b, k_s, k_h, k_d, kn_b, kn_s, kn_h, kn_d, HEAD_DIM, BLOCK_D, BLOCK_N, PAGED, HAS_NEW, OPTIONS,
        )  # fmt: skip
        guess_top = largest(scores)
        share = tl.minimum(tl.sum(there.to(tl.float32), axis=0) / tl.maximum(end, 1), 1.0)
        guess_delta = subset_delta(scores, finite(guess_top), tl.maximum(share, 1e-30), row_e, row_k, K, PTX)
        if HAS_BOUNDS:
            scores, _ = sample_scores(
                best, q, k_ptr, kn_ptr, table_ptr, b, held, kv_head, span, in_rows, query, rules, parts, page_size, table_b,
                k_b, k_s, k_h, k_d, kn_b, kn_s, kn_h, kn_d, HEAD_DIM, BLOCK_D, BLOCK_N, PAGED, HAS_NEW, OPTIONS,
            )  # fmt: skip
        sample_top = largest(scores)
        sample_delta = subset_delta(scores, finite(sample_top), 1.0, row_e, row_k, K, PTX)
    write_slot(work_ptr, block, SAMPLE_TOP, split, sample_top, BLOCK_M, SPLITS)
    write_slot(work_ptr, block, SAMPLE_DELTA, split, sample_delta, BLOCK_M, SPLITS)
    write_slot(work_ptr, block, GUESS_TOP, split, guess_top, BLOCK_M, SPLITS)
    write_slot(work_ptr, block, GUESS_DELTA, split, guess_delta, BLOCK_M, SPLITS)
