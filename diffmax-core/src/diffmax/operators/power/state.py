"""The state of power attention: what all keys so far come to."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class PowerState(NamedTuple):
    """Sums over keys j of their monomials m(k_j), decayed by the gates since (docs/theory.md, Eq. 32).

    Its layout is exact and the same on every backend: P = C(D + p - 1, p) monomials in lexicographic order, without
    multiplicities (`diffmax.power.indices`); `diffmax.power.to_tiled` and `from_tiled` convert it.

    Attributes:
        sums: (B, H_kv, P, D_v), sum of m(k_j) v_j. float32, or float64 for float64.
        norm: (B, H_kv, P), sum of m(k_j).
    """

    sums: Tensor
    norm: Tensor
