"""Every kernel once, at small sizes, against the float64 oracle: the functions are those of the conformance kits."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from benchmarks.device.cells import Cell, rehearsed

DTYPES = ("float32", "bfloat16", "float16")
# 1/2 and its neighbour that float32 cannot tell from it; integer exponents; the limits
ALPHAS = (0.5, 0.5 + 1e-9, 0.85, 0.9, 0.1, 0.75, 0.95, 0.99, 0.999)
HEAD_SIZES = (64, 128, 40, 256)
OPTIONS = (
    "causal", "window", "mask of everything", "bias", "bias of heads and keys", "ALiBi", "softcap", "sink", "dropout",
    "alpha per head", "sparsemax and softmax heads", "grouped heads", "value size 24", "causal, lower right",
    "softcap, bias, ALiBi", "sink, everything hidden", "long", "alpha 0.999", "alpha 0.01", "sparse", "everything",
)  # fmt: skip
DECODING = (
    "plain", "new token", "pages, new token", "pages of 5, chunk", "bounds", "bounds, softcap, slopes, sink", "grouped heads",
    "alpha per head", "dense", "sparse", "rows of a larger cache", "window", "head size 128, value size 24",
)  # fmt: skip
POWER = (
    "plain", "head size 64", "chunks that do not divide", "gates near 1", "grouped heads", "state in, state out",
    "tail and state", "tail, state out, in chunks", "degree 4",
)  # fmt: skip
THRESHOLD = (
    "rectified scores", "square above a threshold", "softmax", "bias", "grouped heads, value size", "padding", "window",
    "packed", "packed, more keys, grouped heads", "scale",
)  # fmt: skip
WHOLE = (
    "packed_sequences_are_each_on_their_own", "masked_and_bad_queries", "dropout_keeps_what_the_contract_says",
    "strides_of_every_kind", "empty_calls",
)  # fmt: skip


def cells(kind: str) -> Iterator[Cell]:
    """The kernels of a kind of machine, those that most depends on first."""
    if rehearsed(kind):
        yield from _tiny(kind)
        return
    yield from itertools.chain(_rows(kind), _attention(kind), _decoding(kind), _of_kits())


def _rows(kind: str) -> Iterator[Cell]:
    dtypes = DTYPES if kind == "npu" else (*DTYPES, "float64")
    for alpha, dtype in itertools.product(ALPHAS, dtypes):
        yield rows("forward", dtype, alpha, [[5, 129], [7, 1000], [300, 17]])
    for alpha, dtype in itertools.product((0.5, 0.5 + 1e-9, 0.85, 0.1), dtypes):
        yield rows("backward", dtype, alpha, [[7, 64], [40, 257]])
    for dtype in dtypes:
        yield rows("bad_rows", dtype, 0.6, [])
    # longer than registers: one program per row, then several
    for what, shapes in (("streamed", [[200, 20000]]), ("split", [[2, 40000], [1, 300000]])):
        for alpha, dtype in itertools.product((0.5, 0.85), ("float32", "bfloat16")):
            yield rows("forward", dtype, alpha, shapes, what)
            yield rows("backward", dtype, alpha, [[shapes[0][0], 20000]], what)


def _attention(kind: str) -> Iterator[Cell]:
    both = ("forward", "backward")

    def sized(dtype: str, size: int, alpha: float, direction: str) -> Cell:
        causal = {"of": "causal", "head_dim": size, "alpha": alpha, "sigma": 1.0, "length": 200, "keys": 200}
        return attention(direction, dtype, causal, f"D {size} a{alpha}")

    for size, alpha, direction in itertools.product(HEAD_SIZES[:2], (0.5, 0.9), both):
        yield sized("bfloat16", size, alpha, direction)
    for name, dtype in itertools.product(WHOLE, ("bfloat16", "float32")):
        yield Cell(f"smoke attention {name} {dtype}", "smoke:attention_check", {"check": name, "dtype": dtype}, 120)
    for name in ("plain", "alpha per head", "everything", "softcap, bias, ALiBi"):  # products of float32 as three of tf32
        yield attention("forward", "float32", {"of": name}, name)
        yield attention("backward", "float32", {"of": name}, name)
    for name, direction in itertools.product(OPTIONS, both):
        yield attention(direction, "bfloat16", {"of": name}, name)
    for dtype, size, alpha, direction in itertools.product(DTYPES, HEAD_SIZES, (0.5, 0.9), both):
        if dtype != "bfloat16" or size not in HEAD_SIZES[:2]:
            yield sized(dtype, size, alpha, direction)


def _decoding(kind: str) -> Iterator[Cell]:
    if kind == "npu":
        return
    for name in DECODING:
        yield decoding("bfloat16", name)
    for name, dtype in itertools.product(("plain", "pages, new token", "bounds"), ("float32", "float16")):
        yield decoding(dtype, name)


def _of_kits() -> Iterator[Cell]:
    both = ("forward", "backward")
    for dtype in ("bfloat16", "float32"):
        for kit, names in (("power", POWER), ("threshold", THRESHOLD)):
            for name, direction in itertools.product(names, both):
                yield of_kit(kit, direction, dtype, name)


def _tiny(kind: str) -> Iterator[Cell]:
    yield rows("forward", "float32", 0.5, [[3, 33]])
    yield rows("forward", "bfloat16", 0.85, [[3, 33]])
    yield rows("backward", "float32", 0.85, [[3, 33]])
    yield rows("forward", "float32", 0.85, [[5, 300]], "streamed")
    yield rows("forward", "float32", 0.5, [[2, 600]], "split")
    small: dict[str, Any] = {"of": "causal", "batch": 1, "heads": 1, "kv_heads": 1, "length": 20, "keys": 20}
    for direction in ("forward", "backward"):
        yield attention(direction, "float32", small, "small")
    if kind == "interpret":
        yield decoding("float32", "plain")
    yield of_kit("power", "forward", "float32", "one token")
    yield of_kit("threshold", "backward", "float32", "fewer queries")


def rows(direction: str, dtype: str, alpha: float, shapes: list[list[int]], what: str = "") -> Cell:
    name = f"smoke rows {direction} {what + ' ' if what else ''}{dtype} a{alpha!r}"
    return Cell(name, "smoke:rows", {"direction": direction, "dtype": dtype, "alpha": alpha, "shapes": shapes}, 120)


def attention(direction: str, dtype: str, case: dict[str, Any], name: str) -> Cell:
    given = {"direction": direction, "dtype": dtype, "case": case}
    return Cell(f"smoke attention {direction} {dtype} {name}", "smoke:attention", given, 180)


def decoding(dtype: str, name: str) -> Cell:
    return Cell(f"smoke decode {dtype} {name}", "smoke:decoding", {"dtype": dtype, "case": name}, 120)


def of_kit(kit: str, direction: str, dtype: str, name: str) -> Cell:
    given = {"kit": kit, "direction": direction, "dtype": dtype, "case": name}
    return Cell(f"smoke {kit} {direction} {dtype} {name}", "smoke:of_kit", given, 120)
