"""What diffmax and its backends are tested with: an oracle, rows that break careless kernels, and the gate for errors.

Needs `pip install "diffmax-core[testing]"`.
"""

from diffmax.testing.gate import allowed_error
from diffmax.testing.oracle import solve_exactly
from diffmax.testing.rows import NASTY_ROWS

__all__ = ["NASTY_ROWS", "allowed_error", "solve_exactly"]
