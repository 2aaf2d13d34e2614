"""What is tuned: each kernel for the sizes and dtypes that most calls have. A cell has a part of the candidates.

What is shipped takes part in every cell, so that parts can be compared: by how many times its time.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from benchmarks.device.cells import Cell

WIDTHS = (4096, 1024, 16384, 2048, 8192, 256, 64)
PARTS = {
    "attention_solve": 3,
    "attention_out": 4,
    "attention_dq": 8,
    "attention_dkv": 8,
    "decode": 4,
    "split": 3,
    "split_backward": 3,
}


def cells(kind: str) -> Iterator[Cell]:
    """For a kind of machine, what most calls need first."""
    if kind in ("npu", "npu-rehearsal"):
        return  # its kernels are not Triton's, but for one
    if kind == "interpret":
        yield tuned("rows", "float32", 32, most=2)
        return
    for kernel in ("rows", "rows_backward"):
        for dtype in ("float32", "bfloat16"):
            yield from parts(kernel, dtype, WIDTHS[0])
    for size, kernel in itertools.product((64, 128), ("attention_solve", "attention_out", "attention_dkv", "attention_dq")):
        yield from parts(kernel, "bfloat16", size)
    yield from parts("decode", "bfloat16", 128)
    for kernel, dtype in itertools.product(("stream", "split", "stream_backward", "split_backward"), ("float32", "bfloat16")):
        yield from parts(kernel, dtype, 0)
    for width, kernel, dtype in itertools.product(WIDTHS[1:], ("rows", "rows_backward"), ("float32", "bfloat16")):
        yield from parts(kernel, dtype, width)
    yield from parts("decode", "bfloat16", 64)
    for dtype, size, kernel in itertools.product(("float16", "float32"), (64, 128), ("attention_solve", "attention_out")):
        yield from parts(kernel, dtype, size)
    for dtype, size, kernel in itertools.product(("float16", "float32"), (64, 128), ("attention_dq", "attention_dkv")):
        yield from parts(kernel, dtype, size)


def parts(kernel: str, dtype: str, size: int) -> Iterator[Cell]:
    count = PARTS.get(kernel, 1)
    for part in range(count):
        yield tuned(kernel, dtype, size, part, count)


def tuned(kernel: str, dtype: str, size: int, part: int = 0, count: int = 1, most: int = 1000) -> Cell:
    case = {"kernel": kernel, "dtype": dtype, "size": size, "part": part, "parts": count, "most": most}
    name = f"tune {kernel} {dtype} {size}" + (f" part {part + 1} of {count}" if count > 1 else "")
    return Cell(name, "tuning:tune", case, 90, kernels=name)
