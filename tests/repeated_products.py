"""How often warps of a compiled program do a product that another does too, from the layouts in Triton's GPU dialect."""

from __future__ import annotations

import re

from benchmarks.compile_kernels import CALLS, kernels
from diffmax.testing.ahead_of_time import Compiled, recording

_LAYOUT = re.compile(r"^(#\w+) = #ttg\.(?:amd_mfma|amd_wmma|nvidia_mma)<\{(.*)\}>", re.MULTILINE)
_PRODUCT = re.compile(r"tt\.dot .*-> tensor<(\d+)x(\d+)x\w+, (#\w+)>")


def repeated(compiled: Compiled) -> float:
    """The most of all products: 1 where each warp has a part of its own, 2 where two have the same."""
    text = compiled.kernel.asm["ttgir"]
    layouts = {}
    for name, fields in _LAYOUT.findall(text):
        instruction = _numbers(fields, "instrShape")[:2] if "instrShape" in fields else [16, 16]
        layouts[name] = [many * side for many, side in zip(_warps(fields), instruction, strict=True)]
    products = [(int(rows), int(columns), layouts[name]) for rows, columns, name in _PRODUCT.findall(text)]
    assert products, "no product in the kernel's text: has the dialect changed?"
    return max(max(1, covered[0] / rows) * max(1, covered[1] / columns) for rows, columns, covered in products)


def _warps(fields: str) -> list[int]:
    """Along rows and columns. From Triton 3.7 on RDNA's are given by the steps that each bit of a warp's number takes."""
    if "warpsPerCTA" in fields:
        return _numbers(fields, "warpsPerCTA")[:2]
    steps = re.findall(r"\[(\d+), (\d+)\]", re.search(r"warp = \[(.*?\])\]", fields)[1])
    return [1 + sum(int(step[axis]) for step in steps) for axis in (0, 1)]


def _numbers(fields: str, name: str) -> list[int]:
    return [int(size) for size in re.search(rf"{name} = \[([\d, ]+)\]", fields)[1].split(",")]


def of_operator(operator: str, target: str, besides: tuple[str, ...] = (), **case: str) -> list[str]:
    """The kernels of a call in which warps repeat each other; `besides`: parts of the names of those without a product."""
    own = [kernel for kernel in kernels() if kernel.__name__.startswith(operator)]
    with recording(target, *own) as launched:
        CALLS[operator]({"target": target, **case})
    assert launched
    return [one.name for one in launched if not any(part in one.name for part in besides) and repeated(one) > 1]
