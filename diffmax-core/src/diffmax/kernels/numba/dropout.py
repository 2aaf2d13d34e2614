"""`diffmax.kernels.cpu.dropout`, compiled: all words of a row side by side in the processor's vectors."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from torch import Tensor, empty

from diffmax.kernels.numba.cache import compiled_on_call
from diffmax.reference.dropout import threshold


def factors(weights: Tensor, head: Tensor, row: Tensor, place: Tensor, seed: Tensor, dropout_p: float) -> Tensor:
    """Arguments and result as `diffmax.kernels.cpu.dropout.factors`."""
    result = empty(weights.shape, dtype=weights.dtype)
    counters = (t.numpy().astype(np.uint64) for t in (head, row, place))
    key = (seed.numpy() & 0xFFFFFFFF).astype(np.uint64)
    _compiled(result.numpy(), *counters, key[0], key[1], np.uint64(threshold(dropout_p)), 1 / (1 - dropout_p))
    return result


def _fill(result: Any, head: Any, row: Any, place: Any, k0: Any, k1: Any, least: Any, passed: float) -> None:
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    first, second = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
    step0, step1 = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
    for r in range(result.shape[0]):
        for c in range(result.shape[1]):
            c0, c1, c2, c3 = place[c], row[r], head[r], np.uint64(0)
            key0, key1 = k0, k1
            for _ in range(10):
                a, b = c0 * first, c2 * second
                c0, c1, c2, c3 = (b >> half) ^ c1 ^ key0, b & low, (a >> half) ^ c3 ^ key1, a & low
                key0, key1 = (key0 + step0) & low, (key1 + step1) & low
            result[r, c] = passed if c0 >= least else 0.0


_compiled = compiled_on_call(njit, nogil=True, error_model="numpy", function=_fill)
