"""Lower the kernels that `npu-triton` launches by Triton-Ascend's compiler, as far as that goes without CANN, and lint them.

Runs in a process whose `triton` is Triton-Ascend; .ci/check_npu.py makes one. The real launcher is called with tensors on the
CPU; each launch is lowered to what the compiler of the chip would get ("linalg"), and nothing runs. Lowering does not enforce
the limits that Triton-Ascend documents, so they are looked for in the text and in the launch.
"""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from typing import Any

import torch
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction

from diffmax_npu import triton_rows

TYPES = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
BYTES = {"f64": 8, "i64": 8, "f32": 4, "i32": 4, "f16": 2, "bf16": 2, "i16": 2, "i8": 1, "i1": 1}

# Half of a core's 192 KiB, the other half being loaded ahead; and how many tiles the row kernels keep at a time.
BUFFER_BYTES, LIVE_TILES = 96 * 1024, 12

CASES = {
    "float32": (torch.float32, 300, 1024, 0.15),
    "float32, alpha 0.5": (torch.float32, 300, 1024, 0.5),
    "float16, alpha per row": (torch.float16, 300, 48, None),
    "bfloat16, longest tile": (torch.bfloat16, 3, 2048, 0.15),
    "float32, streamed": (torch.float32, 3, 65536, 0.15),
    "float32, many rows": (torch.float32, 200_000, 16, 0.1),
}


class Launch:
    """A launch as Triton saw it: types of the run-time arguments, constants, grid, and which arguments share memory."""

    def __init__(self, kernel: Any, arguments: tuple[Any, ...], keywords: dict[str, Any], grid: tuple[int, ...]) -> None:
        self.kernel, self.grid = kernel, grid
        values = dict(zip((p.name for p in kernel.params), arguments, strict=False)) | keywords
        self.types: dict[str, str] = {}
        self.constants: dict[str, Any] = {}
        self.pointers: dict[str, int] = {}
        for parameter in kernel.params:
            value = values[parameter.name]
            if parameter.is_constexpr:
                self.constants[parameter.name] = value
            elif isinstance(value, torch.Tensor):
                self.types[parameter.name], self.pointers[parameter.name] = TYPES[value.dtype], value.data_ptr()
            elif isinstance(value, int):
                self.types[parameter.name] = "i64" if abs(value) >= 1 << 31 else "i32"
            else:
                self.types[parameter.name] = "fp32"

    @property
    def key(self) -> str:
        """Launches of one key have one binary."""
        return f"{self.kernel.fn.__name__} {self.types} {self.constants}"

    def lowered(self) -> str:
        """The text that the chip's compiler would get. Raises subprocess.CalledProcessError, or what the frontend raises."""
        backend = make_backend(GPUTarget("npu", "Ascend910B2", 0))
        options, context, stages = backend.parse_options({}), ir.context(), {}
        ir.load_dialects(context)
        backend.load_dialects(context)
        backend.add_stages(stages, options)
        metadata = {"hash": "check", "target": backend.target, **options.__dict__}
        source = ASTSource(self.kernel, self.types, self.constants)
        module = source.make_ir(options, backend.get_codegen_implementation(), backend.get_module_map(), context)
        text: str = stages["ttadapter"](stages["ttir"](module, metadata), metadata)
        return text

    def problems(self, text: str) -> list[str]:
        """Documented limits that it does not keep."""
        found = []
        programs = 1
        for size in self.grid:
            programs *= size
        if programs > triton_rows.MOST_PROGRAMS:
            found.append(f"grid of {programs} programs, more than {triton_rows.MOST_PROGRAMS}")
        tiles = re.findall(r"(?:tensor|memref)<((?:\d+x)+)([a-z]+\d+)", text)
        largest = max((_size(shape) * BYTES.get(kind, 8) for shape, kind in tiles), default=0)
        if largest * LIVE_TILES > BUFFER_BYTES:
            found.append(f"tile of {largest} bytes: {LIVE_TILES} of them exceed {BUFFER_BYTES}")
        if re.search(r"\bf64\b|xf64", text):
            found.append("float64 arithmetic")
        if re.search(r"arith\.select .*x(?:i64|f64)>", text):
            found.append("tl.where of int64 or float64")
        if "inline_asm" in text or "inline_assembly" in text:
            found.append("inline assembly")
        used = _used_pointers(text, list(self.pointers))
        for name, other in itertools.combinations(sorted(used), 2):
            if self.pointers[name] == self.pointers[other]:
                found.append(f"arguments {name} and {other} share memory")
        return found


def _size(shape: str) -> int:
    size = 1
    for part in shape.strip("x").split("x"):
        size *= int(part)
    return size


def _used_pointers(text: str, names: list[str]) -> set[str]:
    """The kernel's tensors that it reads or writes: Triton-Ascend marks them, behind two arguments of its own."""
    signature = text.split("func.func @")[1].split("attributes")[0]
    pointers = re.findall(r"%arg\d+: memref<[^>]*>( \{tt\.tensor_kind)?", signature)[2:]
    return {name for name, mark in zip(names, pointers, strict=True) if mark}


def record() -> list[Launch]:
    """What the real launcher launches, forward and backward, for every case."""
    launched: list[Launch] = []

    def noted(kernel: Any, *arguments: Any, grid: tuple[int, ...], warmup: bool, **keywords: Any) -> None:
        launched.append(Launch(kernel, arguments, keywords, grid))

    JITFunction.run = noted
    for dtype, rows, n, e in CASES.values():
        x, m = torch.zeros(1, n, dtype=dtype).expand(rows, n), torch.zeros(rows, 1)
        delta, row_e = torch.zeros(rows, 1), torch.full((rows, 1), 0.3) if e is None else e
        p = torch.zeros_like(x)
        triton_rows.bisect(x, row_e, 1, 50, True)
        triton_rows.bisect_backward(p + 1, p, m, delta, p + 2 if dtype == torch.float16 else None, row_e, 1, True)
    return launched


def main() -> int:
    """Lower and lint each distinct launch; 1 if one fails."""
    launched, failures = record(), 0
    distinct = {launch.key: launch for launch in launched}
    for launch in launched:
        if launch.grid > distinct[launch.key].grid:
            distinct[launch.key] = launch  # the largest grid is the one to lint
    for launch in distinct.values():
        name = f"{launch.kernel.fn.__name__} {launch.types['x_ptr']}, grid {launch.grid}"
        try:
            text = launch.lowered()
            problems = launch.problems(text)
        except subprocess.CalledProcessError as error:
            problems = ["the compiler failed: " + (error.stderr or b"").decode(errors="replace").strip()[:300]]
        except Exception as error:  # noqa: BLE001  (whatever the frontend raises is what this script is there to show)
            problems = [f"{type(error).__name__}: {str(error).strip()[-300:]}"]
        failures += bool(problems)
        print(f"  {'FAILED' if problems else 'lowered'} {name}" + "".join(f"\n    {problem}" for problem in problems))
    kinds = {launch.kernel.fn.__name__ for launch in distinct.values()}
    print(f"  {len(distinct)} launches of {len(kinds)} kernels, {failures} failed; as far as a machine without CANN can tell")
    return 1 if failures or len(kinds) < 4 else 0


if __name__ == "__main__":
    sys.exit(main())
