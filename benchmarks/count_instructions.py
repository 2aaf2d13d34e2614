"""Instructions per entry of the compiled row kernels, without a GPU: `docs/performance.md` quotes them.

    python -m benchmarks.count_instructions

A row of 1024 entries whose solver evaluates twice executes the whole code once: the first evaluation, one turn of the
loop, the weights. One thread holds 32 entries.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

import torch

ENTRIES_PER_THREAD = 32


def main() -> None:
    import triton

    from diffmax.kernels.triton.rows.backward import bisect_bwd_rows_kernel
    from diffmax.kernels.triton.rows.forward import bisect_rows_kernel
    from diffmax.kernels.triton.rows.launch import RowOperator
    from diffmax.testing.ahead_of_time import recording
    from diffmax_cuda import configs

    disassembler = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    operator = RowOperator(lambda _: configs.table(9, 0), lambda _: 132, ptx=True)
    for dtype in (torch.float32, torch.bfloat16):
        for e in (0.15, 0.5):
            x, m = torch.zeros(3, 1024, dtype=dtype), torch.zeros(3, 1)
            with recording("sm90", bisect_rows_kernel, bisect_bwd_rows_kernel) as launched:
                operator.bisect(x, e, 1, 50, True)
                operator.bisect_backward(x, x, m, m, None, e, 1, False)
            for compiled in launched:
                with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
                    file.write(compiled.kernel.asm["cubin"])
                    file.flush()
                    command = [str(disassembler), "-c", file.name]
                    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
                names = re.findall(r"\*/\s+(?:@!?U?P\d+ )?([A-Z][A-Z0-9_.]+)", text)
                special = sum(name.startswith("MUFU") for name in names)
                print(
                    f"{compiled.name:24} {str(dtype).removeprefix('torch.'):8} alpha {1 - e:4}: "
                    f"{len(names) / ENTRIES_PER_THREAD:5.1f} instructions, {special / ENTRIES_PER_THREAD:.1f} special functions"
                )


if __name__ == "__main__":
    main()
