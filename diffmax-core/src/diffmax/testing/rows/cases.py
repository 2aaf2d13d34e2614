"""What the row kit is made of: alphas, spreads and shapes. `nasty.py` has the rows that break careless kernels."""

from __future__ import annotations

import math

inf, nan = math.inf, math.nan

ALPHAS = (0.01, 0.1, 0.5, 0.75, 0.85, 0.9, 0.99, 0.999)
SIGMAS = (0.3, 1.0, 3.0, 10.0)
SHAPES = ((5, 1), (4, 2), (3, 63), (7, 64), (3, 127), (2, 3, 129), (2, 1000), (1, 4099), (700, 17), (2, 40000))
GRADIENT_SHAPES = ((7, 64), (3, 129), (40, 257), (2, 5000))
# A kernel decides by alpha, and what it decides must hold in the precision that it computes in: beside each value with a kernel
# of its own, at distances that float32 and float64 see or do not see.
DISTANCES = (1e-13, 1e-12, 1e-10, 1e-8, 5e-8, 1e-7, 1e-6)
SPECIAL_ALPHAS = (
    *DISTANCES,
    *(1 - distance for distance in DISTANCES),
    *(
        alpha + step
        for alpha in (1 / 2, 2 / 3, 3 / 4, 4 / 5, 9 / 10)
        for d in (0.0, *DISTANCES)
        for step in ((-d, d) if d else (d,))
    ),
)
