"""How often warps of a compiled program do a product that another does too, from the layouts in Triton's GPU dialect."""

from __future__ import annotations

import re

from benchmarks.compile_kernels import CALLS, kernels
from diffmax.testing.ahead_of_time import Compiled, recording

_LAYOUT = re.compile(r"^(#\w+) = #ttg\.(?:amd_mfma|nvidia_mma)<\{(.*)\}>", re.MULTILINE)
_PRODUCT = re.compile(r"tt\.dot .*-> tensor<(\d+)x(\d+)x\w+, (#\w+)>")


def repeated(compiled: Compiled) -> float:
    """The most of all products: 1 where each warp has a part of its own, 2 where two have the same."""
    text = compiled.kernel.asm["ttgir"]
    layouts = {}
    for name, fields in _LAYOUT.findall(text):
        warps, instruction = (
            [int(size) for size in re.search(rf"{key} = \[([\d, ]+)\]", fields)[1].split(",")][:2]
            for key in ("warpsPerCTA", "instrShape")
        )
        layouts[name] = [many * side for many, side in zip(warps, instruction, strict=True)]
    products = [(int(rows), int(columns), layouts[name]) for rows, columns, name in _PRODUCT.findall(text)]
    assert products, "no product in the kernel's text: has the dialect changed?"
    return max(max(1, covered[0] / rows) * max(1, covered[1] / columns) for rows, columns, covered in products)


def of_operator(operator: str, target: str, besides: tuple[str, ...] = (), **case: str) -> list[str]:
    """The kernels of a call in which warps repeat each other; `besides`: parts of the names of those without a product."""
    own = [kernel for kernel in kernels() if kernel.__name__.startswith(operator)]
    with recording(target, *own) as launched:
        CALLS[operator]({"target": target, **case})
    assert launched
    return [one.name for one in launched if not any(part in one.name for part in besides) and repeated(one) > 1]
