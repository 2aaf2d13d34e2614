"""What is timed: ceilings, the figures that decide, and the grid, the cells that say most first."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from benchmarks.device.cells import Cell, rehearsed

RIVALS = ("flash", "cudnn", "flex", "adasplash", "entmax", "compiled")
ELEMENTS = 1 << 26
SIZES = (4096, 1024, 16384, 131072, 32768, 256, 64, 1 << 20)
SPARSITIES = ((4096, 0.51), (16384, 0.64), (131072, 0.85), (8192, 0.58), (65536, 0.75))
EVERY_SPARSITY = (0.0, 0.25, 0.51, 0.58, 0.64, 0.70, 0.75, 0.85)
LENGTHS = (16384, 4096, 32768, 65536, 131072)
DECODED = (131072, 1 << 20, 32768, 4096)
CONTENTS = {"needles": 0.5, "flat": 0.9, "spread": 0.5}  # of a cache, and their alpha
BATCHES = (1, 16)
MOST_CACHE_BYTES = 24 << 30
CAPTURED = ("encoder", "causal LM", "causal LM, late layer")


def ceilings(kind: str) -> Iterator[Cell]:
    """What the device can do at most, and who is there to compete."""
    tiny = rehearsed(kind)
    yield Cell("device", "ceilings:device")
    yield Cell("copy", "ceilings:copy", {"bytes": 1 << 16 if tiny else 1 << 30})
    for dtype in ("bfloat16", "tf32", "float32"):
        yield Cell(f"matmul {dtype}", "ceilings:matmul", {"dtype": dtype, "n": 64 if tiny else 8192})
    yield Cell("launch", "ceilings:launch")
    npu = kind in ("npu", "npu-rehearsal")
    if not npu:
        yield Cell("graph replay", "ceilings:graph")
    for name in ("npu_fusion_attention",) if npu else RIVALS:
        yield Cell(f"rival {name}", "ceilings:rival", {"name": name}, 90)


def decisive(kind: str) -> Iterator[Cell]:
    """The figures that say whether the goals are met (`goals`)."""
    if rehearsed(kind):
        yield rows("float32", 0.5, 48, 8, compiled=True, rivals=True, passes=("forward", "both"))
        yield attention("randn", 0.5, 20, 16, heads=1, dtype="float32", flex=False)
        if kind == "interpret":
            yield decode(1, 40, "needles", kv_heads=1, group=2, size=16, dtype="float32")
            yield first_call("rows")
        return
    for dtype, alpha in itertools.product(("float32", "bfloat16"), (0.85, 0.5, 0.95)):
        yield rows(dtype, alpha, 4096, compiled=True)
    if kind == "npu":
        for length in (2048, 512):
            yield attention("randn", 0.85, length, 64, heads=16, flex=False)
        return
    for size, heads in ((64, 16), (128, 8)):
        yield attention("band", 0.5, 32768, size, sparsity=0.70, heads=heads, flex=size == 64)
        yield attention("randn", 0.9, 16384, size, heads=heads, flex=size == 64)
    for length in (131072, 1 << 20):
        yield decode(1, length, "spread")
        yield decode(1, length, "needles")
    for name in CAPTURED[:2]:
        yield attention(name, 0.5, 4096, flex=False)
        yield attention(name, 0.9, 4096, flex=False)
    yield rows("float32", 0.85, 131072)
    yield rows("float32", 0.85, 1 << 20)
    yield rows("bfloat16", 0.85, 131072)
    yield rows("float32", 0.85, 1 << 20, 1, passes=("forward",))
    yield decode(1, 131072, "flat")
    for operator in ("attention", "decode", "rows"):
        yield first_call(operator)


def grid(kind: str) -> Iterator[Cell]:
    """Everything else, in the order in which one wants to know it."""
    if rehearsed(kind):
        yield rows("bfloat16", 0.85, 40, 4, passes=("forward",))
        yield option("causal", "randn", 20, heads=1, size=16, dtype="float32")
        return
    seen = {cell.id for cell in decisive(kind)}
    for cell in _grid(kind):
        if cell.id not in seen:
            seen.add(cell.id)
            yield cell


def _grid(kind: str) -> Iterator[Cell]:
    if kind == "npu":
        for dtype, alpha, n in itertools.product(("float32", "bfloat16"), (0.85, 0.5), (1024, 64, 16384)):
            yield rows(dtype, alpha, n, passes=("forward", "both"))
        for length, alpha in itertools.product((2048, 512, 4096), (0.85, 0.5)):
            yield attention("randn", alpha, length, 64, heads=8, flex=False)
        return
    for length, sparsity in SPARSITIES:
        yield attention("band", 0.5, length, sparsity=sparsity, flex=length <= 32768)
    for dtype, n in itertools.product(("float32", "bfloat16"), SIZES):
        yield rows(dtype, 0.85, n, rivals=n in (1024, 16384))
    for length, batch, content in itertools.product(DECODED, BATCHES, CONTENTS):
        if 4 * batch * length * 2 * 128 <= MOST_CACHE_BYTES:
            yield decode(batch, length, content)
    for scores, sparsity in (("randn", 0.0), ("band", 0.58)):
        for name in OPTION_NAMES:
            yield option(name, scores, 8192, sparsity)
    for length, alpha in itertools.product(LENGTHS, (0.5, 0.9, 0.85)):
        yield attention("randn", alpha, length, flex=alpha == 0.9 and length <= 32768)
    for name, length, alpha in itertools.product(CAPTURED, (2048, 6144), (0.5, 0.75, 0.9)):
        yield attention(name, alpha, length, flex=False)
    for alpha, dtype, sigma, n in itertools.product((0.85, 0.5, 0.1, 0.95), ("float32", "bfloat16"), (1.0, 3.0, 10.0), SIZES):
        yield rows(dtype, alpha, n, sigma=sigma, rivals=sigma == 1 and n in (1024, 16384))
    for length, sparsity in itertools.product((16384, 32768), EVERY_SPARSITY):
        yield attention("band", 0.5, length, sparsity=sparsity, flex=False)
    for dtype, size in itertools.product(("float16", "float32"), (64, 128)):
        yield attention("randn", 0.9, 8192, size, dtype=dtype, flex=False)


OPTION_NAMES = (
    "plain", "causal", "window", "mask", "bias", "bias that learns", "bias of keys that learns", "ALiBi", "softcap",
    "sink that learns", "dropout", "alpha as a tensor", "alpha that learns", "statistics",
)  # fmt: skip


def rows(
    dtype: str,
    alpha: float,
    n: int,
    count: int = 0,
    *,
    sigma: float = 1.0,
    compiled: bool = False,
    rivals: bool = False,
    passes: tuple[str, ...] = ("forward", "backward", "both"),
) -> Cell:
    """Rows of n scores; `compiled` and `rivals`: who else runs."""
    count = count or max(1, ELEMENTS // n)
    case: dict[str, Any] = {"dtype": dtype, "alpha": alpha, "sigma": sigma, "n": n, "rows": count, "passes": list(passes)}
    padded = 1 << (n - 1).bit_length()
    return Cell(
        f"rows {dtype} a{alpha} s{sigma:g} {count}x{n}",
        "rows:compete",
        {**case, "compiled": compiled, "others": rivals},
        90,
        kernels=f"rows {dtype} {alpha} {padded} {count < 264}",
    )


def attention(
    scores: str,
    alpha: float,
    length: int,
    size: int = 64,
    *,
    sparsity: float = 0.0,
    heads: int = 16,
    dtype: str = "bfloat16",
    flex: bool = True,
) -> Cell:
    """Causal attention (an encoder's own is not); captured scores have their own heads and sizes."""
    case = {"scores": scores, "alpha": alpha, "length": length, "head_dim": size, "sparsity": sparsity, "heads": heads}
    name = f"attention {scores} {sparsity:g} a{alpha} {length} H{heads} D{size} {dtype}"
    if scores in CAPTURED:
        name = f"attention {scores} a{alpha} {length} {dtype}"
    kernels = f"attention {dtype} {scores if scores in CAPTURED else size} {alpha}"
    return Cell(name, "attention:compete", {**case, "dtype": dtype, "flex": flex}, 120, kernels=kernels)


def option(
    name: str, scores: str, length: int, sparsity: float = 0.0, *, heads: int = 16, size: int = 64, dtype: str = "bfloat16"
) -> Cell:
    """One of attention's options, without rivals."""
    case = {"option": name, "scores": scores, "alpha": 0.5, "length": length, "head_dim": size, "sparsity": sparsity}
    where = f"{scores} {sparsity:g} {length} H{heads} D{size} {dtype}"
    case |= {"heads": heads, "dtype": dtype}
    return Cell(f"option {name}, {where}", "attention:option", case, 120, kernels=f"option {name} {dtype} {size}")


def decode(
    batch: int,
    length: int,
    content: str,
    *,
    kv_heads: int = 2,
    group: int = 8,
    size: int = 128,
    dtype: str = "bfloat16",
) -> Cell:
    """One step over a full cache."""
    case = {"batch": batch, "length": length, "content": content, "alpha": CONTENTS[content]}
    case |= {"kv_heads": kv_heads, "group": group, "head_dim": size, "dtype": dtype}
    kernels = f"decode {dtype} {size} {CONTENTS[content]} {batch}"
    return Cell(f"decode {content} B{batch} {length}", "decode:compete", case, 90, kernels=kernels)


def first_call(operator: str) -> Cell:
    return Cell(f"first call {operator}", "first_call:measure", {"operator": operator}, 150)
