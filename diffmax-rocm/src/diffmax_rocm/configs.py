"""Which table of tables.json serves an architecture. `benchmarks.tune_triton` and `benchmarks.device report` write it."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from diffmax.kernels.triton.common.tuning import Table, read_tables


@lru_cache
def tables() -> dict[str, Table]:
    """By architecture, such as "gfx942"."""
    return read_tables(Path(__file__).with_name("tables.json"))


def table(architecture: str) -> Table:
    """The architecture's own table, else that of the one with the same width of a wavefront."""
    name = architecture.partition(":")[0]  # gfx942:sramecc+:xnack-
    return tables().get(name) or tables()["gfx942" if name.startswith("gfx9") else "gfx1100"]
