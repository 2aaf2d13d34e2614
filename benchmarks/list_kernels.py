"""Kernels that nothing runs, whose instructions `benchmarks.count_lists` counts: a dense pass that notes weights, and a gather.

Each is the plain case: heads of 64 entries, bfloat16, whole tiles of 64 by 64, k = 2, the constants of a row folded
(`diffmax.kernels.triton.attention.evaluation`).
"""

import triton
import triton.language as tl

TILE = tl.constexpr(64)

# How the dense pass notes which entries may have a weight
NOTHING = tl.constexpr(0)
BITS = tl.constexpr(1)  # a bit for each entry
SEGMENTS = tl.constexpr(2)  # (key, score) behind each other, in eight lists per row, one to a thread
SCAN = tl.constexpr(3)  # (key, score) behind each other, in one list per row, in order
ATOMICS = tl.constexpr(4)  # (key, score) in one list per row, in the order of arrival
KEYS = tl.constexpr(5)  # a bit for each key that may have a weight for any of the 64 queries


@triton.jit
def _either(a, b):
    return a | b


@triton.jit
def dense_pass_kernel(
    q_ptr, k_ptr, t_ptr, tops_ptr, sums_ptr, bits_ptr, keys_ptr, scores_ptr, counts_ptr, tiles, room, c, low, NOTE: tl.constexpr
):  # fmt: skip
    """S, S_1 and S_0 of 64 queries, the largest scores of every tile, and by NOTE the entries above t - low."""
    rows, lanes = tl.arange(0, TILE), tl.arange(0, TILE)
    q = tl.load(q_ptr + rows[:, None] * 64 + tl.arange(0, 64)[None, :])
    t = tl.load(t_ptr + rows)
    total = tl.zeros((TILE, 8), tl.float32)
    slope, curve = total, total
    ends = tl.zeros((TILE, 8), tl.int32)  # of the lists of a row
    end = tl.zeros((TILE,), tl.int32)
    segments = (rows[:, None] * 8 + tl.arange(0, 8)[None, :]) * room
    for i in range(0, tiles):
        key = tl.load(k_ptr + (i * TILE + lanes)[None, :] * 64 + tl.arange(0, 64)[:, None])
        x = tl.dot(q, key)
        top = tl.max(x, axis=1)
        tl.store(tops_ptr + i * TILE + rows, top)
        if tl.max((top * c > t - low).to(tl.int32)) > 0:
            y = x * c - t[:, None]
            b = tl.maximum(y, 0.0, propagate_nan=tl.PropagateNan.ALL)
            total += tl.sum(tl.reshape(b * b, (TILE, 8, 8)), axis=1)
            slope += tl.sum(tl.reshape(b, (TILE, 8, 8)), axis=1)
            curve += tl.sum(tl.reshape(tl.minimum(b, 2.0**-100), (TILE, 8, 8)), axis=1)
            noted = y > -low
            if (NOTE == BITS) | (NOTE == KEYS):
                place = 1 << (lanes // 8)
                bits = tl.reduce(tl.reshape(tl.where(noted, place[None, :], 0), (TILE, 8, 8)), 1, _either)
                if NOTE == BITS:
                    tl.store(bits_ptr + (i * TILE + rows[:, None]) * 8 + tl.arange(0, 8)[None, :], bits.to(tl.int8))
                else:
                    tl.store(bits_ptr + i * 8 + tl.arange(0, 8), tl.reduce(bits, 0, _either).to(tl.int8))
            elif NOTE == SEGMENTS:
                flags = tl.reshape(noted.to(tl.int32), (TILE, 8, 8))
                at = (segments + ends)[:, None, :] + tl.cumsum(flags, axis=1) - 1
                keys = tl.reshape(tl.broadcast_to((i * TILE + lanes)[None, :], (TILE, TILE)), (TILE, 8, 8))
                tl.store(keys_ptr + at, keys.to(tl.int16), mask=flags > 0)
                tl.store(scores_ptr + at, tl.reshape(y, (TILE, 8, 8)).to(tl.bfloat16), mask=flags > 0)
                ends += tl.sum(flags, axis=1)
            elif NOTE == SCAN:
                flags = noted.to(tl.int32)
                at = (rows * 8 * room + end)[:, None] + tl.cumsum(flags, axis=1) - 1
                keys = tl.broadcast_to((i * TILE + lanes)[None, :], (TILE, TILE))
                tl.store(keys_ptr + at, keys.to(tl.int16), mask=noted)
                tl.store(scores_ptr + at, y.to(tl.bfloat16), mask=noted)
                end += tl.sum(flags, axis=1)
            elif NOTE == ATOMICS:
                counter = tl.broadcast_to((counts_ptr + rows)[:, None], (TILE, TILE))
                at = (rows * 8 * room)[:, None] + tl.atomic_add(counter, 1, mask=noted, sem="relaxed")
                keys = tl.broadcast_to((i * TILE + lanes)[None, :], (TILE, TILE))
                tl.store(keys_ptr + at, keys.to(tl.int16), mask=noted)
                tl.store(scores_ptr + at, y.to(tl.bfloat16), mask=noted)
    eighths = rows[:, None] * 8 + tl.arange(0, 8)[None, :]
    for of in tl.static_range(3):
        tl.store(sums_ptr + of * TILE * 8 + eighths, total if of == 0 else slope if of == 1 else curve)
    if NOTE == SEGMENTS:
        tl.store(counts_ptr + eighths, ends)
    elif NOTE == SCAN:
        tl.store(counts_ptr + rows, end)


@triton.jit
def gather_kernel(keys_ptr, scores_ptr, v_ptr, out_ptr, counts_ptr, room, t, ENTRIES: tl.constexpr):
    """The output of a row from its list, by one warp: ENTRIES rows of values at a time. Grid: rows."""
    row, d = tl.program_id(0), tl.arange(0, 64)
    count = tl.load(counts_ptr + row)
    acc = tl.zeros((64,), tl.float32)
    total = tl.zeros((ENTRIES,), tl.float32)
    for first in range(0, count, ENTRIES):
        at = first + tl.arange(0, ENTRIES)
        key = tl.load(keys_ptr + row * room + at, mask=at < count, other=0).to(tl.int32)
        y = tl.load(scores_ptr + row * room + at, mask=at < count, other=-float("inf")).to(tl.float32)
        b = tl.maximum(y - t, 0.0)
        p = b * b
        total += p
        value = tl.load(v_ptr + key[:, None] * 64 + d[None, :]).to(tl.float32)
        acc += tl.sum(p[:, None] * value, axis=0)
    tl.store(out_ptr + row * 64 + d, (acc / tl.sum(total)).to(tl.bfloat16))
