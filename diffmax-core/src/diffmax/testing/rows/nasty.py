"""Rows that break careless kernels, each with the reason in its name."""

INF = float("inf")

# Finite scores and -inf only, at least one of them finite.
NASTY_ROWS: dict[str, list[float]] = {
    "one entry": [0.7],
    "one entry far from zero": [-1e30],
    "two entries": [0.25, -0.5],
    "all tied": [0.5] * 7,
    "tied at the top": [2.0, 2.0, 1.0, 2.0, -1.0],
    "tied at zero weight": [3.0, -20.0, -20.0, -20.0],
    "offset of 1e9": [1e9, 1e9 - 64.0, 1e9 - 128.0, 1e9 + 64.0],
    "offset of -1e9": [-1e9, -1e9 - 64.0, -1e9 + 128.0],
    "offset of -1000": [-1000.0, -1000.5, -1001.0, -1003.0],
    "masked entries": [1.0, -INF, 0.5, -INF, 0.25],
    "masked but for one": [-INF, -INF, 0.3, -INF],
    "huge negative fill instead of a mask": [0.2, -1e9, 0.1, -1e9],
    "the whole range of float32": [3e38, -3e38, 0.0],
    "peaked": [50.0, 0.0, -50.0, 49.0],
    "subnormal differences": [1e-40, 0.0, 2e-40, 1e-39],
    "evenly spread": [-0.05 * i for i in range(40)],
    "many just above the cut": [0.0] + [-0.999] * 30,
    "one, and many near it": [1.0] + [0.99 - 1e-4 * i for i in range(63)],
    "descending by powers of two": [-(2.0**i) for i in range(-10, 8)],
}
