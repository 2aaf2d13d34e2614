"""Which table of tables.json serves an architecture. `benchmarks.tune_triton` and `benchmarks.device report` write it."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from diffmax.kernels.triton.common.tuning import Table, read_tables


@lru_cache
def tables() -> dict[str, Table]:
    """By compute capability, such as "9.0"."""
    return read_tables(Path(__file__).with_name("tables.json"))


def table(major: int, minor: int) -> Table:
    """The table of the newest architecture that is not newer than the device, else the oldest."""
    known = sorted(tuple(int(part) for part in name.split(".")) for name in tables())
    fitting = [version for version in known if version <= (major, minor)] or known[:1]
    return tables()["{}.{}".format(*fitting[-1])]
