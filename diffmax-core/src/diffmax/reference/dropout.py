"""The keep mask of dropout: a random word per weight, the same on every backend, recomputed on demand.

The word for query i and key j, in head h of H and batch entry b, is the first output of Philox4x32-10 (Salmon et al., "Parallel
random numbers: as easy as 1, 2, 3", SC 2011) for the counter (j, i, b * H + h, 0) and the key (seed[0], seed[1]), of which only
the low 32 bits are used. In packed sequences i and j are positions in the sequence, and b is its number. A weight is kept if
its word is at least `threshold(dropout_p)`, compared as unsigned numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffmax.plugin import AttentionCall

_LOW = 0xFFFFFFFF
_FACTORS = (0xD2511F53, 0xCD9E8D57)
_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def threshold(dropout_p: float) -> int:
    """The smallest word whose weight is kept."""
    return min(round(dropout_p * 2**32), _LOW)


def philox(
    counter: tuple[Tensor | int, Tensor | int, Tensor | int, Tensor | int], key: tuple[Tensor | int, Tensor | int]
) -> tuple[Tensor | int, Tensor | int, Tensor | int, Tensor | int]:
    """Four random words for a counter and a key: int64 tensors that broadcast, or ints, with values from 0 to 2^32 - 1."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for step in range(_ROUNDS):
        if step:
            k0, k1 = (k0 + _STEPS[0]) & _LOW, (k1 + _STEPS[1]) & _LOW
        # int64 products wrap, which keeps the low 64 bits; the sign bits of the shift are masked
        a, b = c0 * _FACTORS[0], c2 * _FACTORS[1]
        c0, c1, c2, c3 = (b >> 32) & _LOW ^ c1 ^ k0, b & _LOW, (a >> 32) & _LOW ^ c3 ^ k1, a & _LOW
    return c0, c1, c2, c3


def kept(call: AttentionCall, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Dropout factors of the weights, (B, H, L, S): 0 or 1 / (1 - dropout_p)."""
    batch, heads, length, keys = shape
    if call.seed is None:
        raise ValueError("attention: dropout_p comes with a seed, got dropout_p alone")
    key = call.seed & _LOW
    head = torch.arange(batch * heads, device=key.device).view(batch, heads, 1, 1)
    i, j = torch.arange(length, device=key.device).unsqueeze(1), torch.arange(keys, device=key.device)
    word = philox((j, i, head, 0), (key[0], key[1]))[0]
    return (torch.as_tensor(word) >= threshold(call.dropout_p)).to(dtype) / (1 - call.dropout_p)
