"""Dropout's factors for a matrix of weights, in plain PyTorch: where weights are 0, none, as a random word takes long."""

import torch
from torch import Tensor

from diffmax.reference.dropout import philox, threshold

# Words computed at once: their integers stay in the nearer caches.
_TOGETHER = 1 << 14


def factors(weights: Tensor, head: Tensor, row: Tensor, place: Tensor, seed: Tensor, dropout_p: float) -> Tensor:
    """What dropout multiplies the weights by; anything where the weight is 0.

    Args:
        weights: (rows, n).
        head, row: (rows,), int64: b * H + h, and the query's place.
        place: (n,), int64: the keys' places.
        seed: (2,), int64.
        dropout_p: In (0, 1).
    """
    result = torch.zeros(weights.shape, dtype=weights.dtype)
    key = (int(seed[0]) & 0xFFFFFFFF, int(seed[1]) & 0xFFFFFFFF)
    least, passed = threshold(dropout_p), 1 / (1 - dropout_p)
    for index in torch.split(weights.reshape(-1).nonzero().squeeze(1), _TOGETHER):
        of_row = index // weights.shape[1]
        word = philox((place[index - of_row * weights.shape[1]], row[of_row], head[of_row], 0), key)[0]
        result.view(-1)[index] = (torch.as_tensor(word) >= least).to(weights.dtype) * passed
    return result
