"""What diffmax and its backends are tested with.

`diffmax.testing.rows.conformance.BackendConformance` is the kit for vendors (docs/backends.md). The rest serves it and
diffmax's own tests: an oracle, rows that break careless kernels, and the gate for errors.

The oracle and the kit need `pip install "diffmax-core[testing]"`.
"""

from diffmax.testing.gate import Gate, gates
from diffmax.testing.oracle import solve_exactly
from diffmax.testing.rows.nasty import NASTY_ROWS

__all__ = ["NASTY_ROWS", "Gate", "gates", "solve_exactly"]
