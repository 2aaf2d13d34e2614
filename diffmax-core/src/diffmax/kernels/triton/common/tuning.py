"""Launch settings per architecture: the vendors' tables, candidates for tuning, and a way to run them.

If a table has no entry, the rules in the code decide: `attention.settings`, the defaults of `Decode`. A benchmark runs an
operator with each of `candidates` inside `with_settings`, adds the fastest to the table of the architecture with
`Table.with_entry`, and writes the file with `write_tables`.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias

import torch

from diffmax.kernels.triton.attention.settings import Block, Settings, backward_blocks, forward_settings


@dataclass(frozen=True)
class Tile:
    """Settings for rows that fit the registers of a program.

    Attributes:
        rows: Rows per program.
        warps: Warps per program.
        keep: Forward only: keep the last evaluation in registers until the weights are written, instead of repeating it.
    """

    rows: int
    warps: int
    keep: bool = True


@dataclass(frozen=True)
class Stream:
    """Settings for rows that are too long for the registers of a program.

    Attributes:
        block: Entries per tile.
        warps: Warps per program.
        programs: Programs per multiprocessor, for rows that are split over several programs.
    """

    block: int
    warps: int
    programs: int = 2


@dataclass(frozen=True)
class Decode:
    """Settings of decoding's launches.

    Attributes:
        start_warps, read_warps, values_warps: Warps per program in the launches that read keys and values.
        tile_bytes: Bytes of keys or values per tile.
        tiles_per_split: Minimum number of tiles per program, if the cache is full.
        programs: Programs per multiprocessor.
    """

    start_warps: int = 8
    read_warps: int = 4
    values_warps: int = 4
    tile_bytes: int = 1 << 14
    tiles_per_split: int = 2
    programs: int = 2


Launch: TypeAlias = Tile | Stream | Settings | Block | Decode

# The kernels that a table can have entries for, and the class of their settings
KERNELS: dict[str, type[Any]] = {
    "rows": Tile,
    "rows_backward": Tile,
    "stream": Stream,
    "stream_backward": Stream,
    "split": Stream,
    "split_backward": Stream,
    "attention_solve": Settings,
    "attention_out": Settings,
    "attention_dq": Block,
    "attention_dkv": Block,
    "attention_dbias": Block,
    "decode": Decode,
}


@dataclass(frozen=True)
class Case:
    """The case that an entry is for.

    Attributes:
        dtype: The dtype of the scores or the queries.
        size: For rows in registers their padded length; for attention and decoding the padded head dimension, at least 64;
            else 0.
        extras: Whether it is attention's forward with a mask, bias, ALiBi, softcap or dropout.
    """

    dtype: torch.dtype
    size: int = 0
    extras: bool = False

    @classmethod
    def of(cls, kernel: str, dtype: torch.dtype, size: int = 0, extras: bool = False) -> Case:
        """The case of a call: `size` is the row length, or the larger head dimension of keys and values."""
        padded = 1 << max(size - 1, 0).bit_length()
        if kernel.startswith("rows"):
            return cls(dtype, max(16, padded))
        if kernel.startswith("s"):
            return cls(dtype)
        return cls(dtype, max(64, padded), extras and kernel in ("attention_solve", "attention_out"))

    def __str__(self) -> str:
        """The key of a table, such as "bfloat16 64 extras"."""
        words = [str(self.dtype).removeprefix("torch."), *([str(self.size)] if self.size else []), *(["extras"] * self.extras)]
        return " ".join(words)

    @classmethod
    def read(cls, text: str) -> Case:
        """The inverse of `str`."""
        name, *rest = text.split()
        sizes = [int(word) for word in rest if word != "extras"]
        return cls(getattr(torch, name), sizes[0] if sizes else 0, "extras" in rest)


@dataclass(frozen=True)
class Entry:
    """Settings of one kernel for one case, and their origin: "predicted", or "measured on ..." device, torch, triton."""

    launch: Launch
    origin: str

    def plain(self) -> dict[str, Any]:
        """As what JSON can hold."""
        return asdict(self.launch) | {"origin": self.origin}

    @classmethod
    def of(cls, kernel: str, plain: Mapping[str, Any]) -> Entry:
        """From what `plain` returned."""
        return cls(KERNELS[kernel](**{k: v for k, v in plain.items() if k != "origin"}), plain["origin"])


@dataclass(frozen=True)
class Table:
    """The tuning table of one architecture.

    Attributes:
        origin: The origin of the numbers: "predicted", or the result file of the run that measured them.
        forward, backward: From the padded length of a row (a power of two) to its settings. Longer rows are streamed.
        forward_float64, backward_float64: The same for float64.
        stream_block, stream_warps: The tile of a streamed row; for float64 half the block.
        adjacent_elements: Entries per program if neighbouring rows, instead of the entries of a row, are adjacent in memory.
        entries: Settings for single cases, by kernel; they take precedence.
    """

    origin: str
    forward: Mapping[int, Tile]
    backward: Mapping[int, Tile]
    forward_float64: Mapping[int, Tile]
    backward_float64: Mapping[int, Tile]
    stream_block: int
    stream_warps: int
    adjacent_elements: int
    entries: Mapping[str, Mapping[Case, Entry]] = field(default_factory=dict)

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Table:
        """From what `plain` returned."""
        tiles = {name: {int(n): Tile(*tile) for n, tile in plain[name].items()} for name in TILES}
        entries = {
            kernel: {Case.read(case): Entry.of(kernel, entry) for case, entry in found.items()}
            for kernel, found in plain.get("entries", {}).items()
        }
        return cls(**{**plain, **tiles, "entries": entries})

    def plain(self) -> dict[str, Any]:
        """As what JSON can hold."""
        tiles = {name: {str(n): [*asdict(t).values()] for n, t in getattr(self, name).items()} for name in TILES}
        numbers = {name: getattr(self, name) for name in ("stream_block", "stream_warps", "adjacent_elements")}
        entries = {
            kernel: {str(case): entry.plain() for case, entry in sorted(found.items(), key=lambda item: str(item[0]))}
            for kernel, found in sorted(self.entries.items())
        }
        return {"origin": self.origin, **tiles, **numbers, **({"entries": entries} if entries else {})}

    def with_entry(
        self, kernel: str, dtype: torch.dtype, size: int, launch: Launch, origin: str, *, extras: bool = False
    ) -> Table:
        """This table with an entry added or replaced.

        Args:
            kernel: A name in `KERNELS`.
            dtype, size, extras: As for `candidates`.
            launch: The settings.
            origin: Such as "measured on NVIDIA H100 80GB HBM3, torch 2.11.0, triton 3.6.0", or "predicted".
        """
        if not isinstance(launch, KERNELS[kernel]):
            raise TypeError(f"with_entry: {kernel} is launched by a {KERNELS[kernel].__name__}, got {launch!r}")
        found = {**self.entries.get(kernel, {}), Case.of(kernel, dtype, size, extras): Entry(launch, origin)}
        return replace(self, entries={**self.entries, kernel: found})


TILES = ("forward", "backward", "forward_float64", "backward_float64")


def read_tables(path: Path) -> dict[str, Table]:
    """The tables of a file, by architecture."""
    return {name: Table.of(plain) for name, plain in json.loads(path.read_text(encoding="utf-8")).items()}


def write_tables(path: Path, tables: Mapping[str, Table]) -> None:
    """Write the tables with one line per kind of tile and per entry, so that a diff shows the changes."""
    blocks = []
    for name, table in sorted(tables.items()):
        plain = table.plain()
        entries = plain.pop("entries", {})
        lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in plain.items()]
        if entries:
            kernels = []
            for kernel, found in entries.items():
                cases = ",\n".join(f"    {json.dumps(case)}: {json.dumps(entry)}" for case, entry in found.items())
                kernels.append(f"   {json.dumps(kernel)}: {{\n{cases}\n   }}")
            lines.append('  "entries": {\n' + ",\n".join(kernels) + "\n  }")
        blocks.append(f" {json.dumps(name)}: {{\n" + ",\n".join(lines) + "\n }")
    path.write_text("{\n" + ",\n".join(blocks) + "\n}\n", encoding="utf-8")


def no_table(device: torch.device) -> None:
    """The lookup of an operator without tables: always None."""


class Tunable:
    """The settings of an operator: forced ones, else the entry in the table of the device.

    Attributes:
        forced: Settings by kernel, for all cases, set by `with_settings`.
    """

    forced: Mapping[str, Launch] = MappingProxyType({})

    def tuned(self, table: Table | None, kernel: str, dtype: torch.dtype, size: int = 0, extras: bool = False) -> Any:
        """The settings, or None if the rules in the code decide."""
        if kernel in self.forced:
            return self.forced[kernel]
        if table is None or kernel not in table.entries:
            return None
        entry = table.entries[kernel].get(Case.of(kernel, dtype, size, extras))
        return None if entry is None else entry.launch


@contextlib.contextmanager
def with_settings(operator: Tunable, **launches: Launch) -> Iterator[None]:
    """A context in which `operator` launches the named kernels with these settings, regardless of tables and rules.

    This also affects public functions that use the operator. Not thread-safe. Settings that do not fit the device raise errors
    of Triton at the call: `triton.runtime.errors.OutOfResources`, or a `triton.compiler.errors.CompilationError`.

    Args:
        operator: A vendor's, such as `diffmax_cuda.attention.operator`, `diffmax_cuda.rows.operator`,
            `diffmax_cuda.decoding.decoder`.
        launches: Settings by the kernel's name in `KERNELS`.
    Raises:
        TypeError: A kernel does not exist, or its settings have the wrong class.
    Example:
        >>> from diffmax.kernels.triton.attention.launch import AttentionOperator
        >>> operator = AttentionOperator(lambda device: "sm90", lambda device: 132, ptx=True)
        >>> solver = candidates("attention_solve", torch.bfloat16, 64, "sm90")[1]
        >>> with with_settings(operator, attention_solve=solver):
        ...     operator.tuned(None, "attention_solve", torch.bfloat16, 64) == solver
        True
    """
    for kernel, launch in launches.items():
        if kernel not in KERNELS or not isinstance(launch, KERNELS[kernel]):
            raise TypeError(f"with_settings: {kernel} is not launched by {launch!r}")
    before = operator.forced
    operator.forced = {**before, **launches}
    try:
        yield
    finally:
        operator.forced = before


def candidates(kernel: str, dtype: torch.dtype, size: int, architecture: str, *, extras: bool = False) -> list[Any]:
    """Settings worth timing, without repetitions; for attention and decoding the first is that of the rules in the code.

    Some may not fit the device, or may spill: a benchmark should skip those.

    Args:
        kernel: A name in `KERNELS`.
        dtype: The dtype of the scores or the queries.
        size: Length of the rows; for attention and decoding the larger head dimension of keys and values.
        architecture: Such as "sm90" or "gfx942".
        extras: For attention's forward, whether the call has a mask, bias, ALiBi, softcap or dropout.
    """
    lanes = 64 if architecture.startswith("gfx9") else 32
    case = Case.of(kernel, dtype, size, extras)
    found: Iterable[Any]
    if kernel.startswith("rows"):
        found = _tiles(case.size, lanes, keeps=kernel == "rows")
    elif kernel.startswith("s"):
        found = _streams(dtype, lanes, splits=kernel.startswith("split"))
    elif kernel in ("attention_solve", "attention_out"):
        forward, writes = forward_settings(architecture, dtype, case.size, extras), kernel == "attention_out"
        found = _forward(forward.output if writes else forward.solve, case.size, writes)
    elif kernel == "decode":
        found = _decoding()
    else:
        rule = getattr(backward_blocks(architecture, dtype, case.size), kernel.removeprefix("attention_"))
        found = _backward(rule, case.size, tall=kernel == "attention_dq")
    return list(dict.fromkeys(found))


def _tiles(width: int, lanes: int, keeps: bool) -> Iterator[Tile]:
    for per_thread in (32, 16, 64, 8, 4):
        wide = width >= per_thread * lanes
        for warps in (width // (per_thread * lanes),) if wide else (1, 4):
            if warps * lanes <= 1024:
                rows = max(1, per_thread * lanes * warps // width)
                yield Tile(rows, warps)
                if keeps and per_thread >= 32:
                    yield Tile(rows, warps, keep=False)


def _streams(dtype: torch.dtype, lanes: int, splits: bool) -> Iterator[Stream]:
    blocks = (1024, 2048, 4096) if dtype == torch.float64 else (2048, 4096, 8192)
    for block, warps, programs in itertools.product(blocks, (4, 8, 16), (1, 2, 4) if splits else (2,)):
        if 4 <= block // (warps * lanes) <= 32:
            yield Stream(block, warps, programs)


def _forward(rule: Settings, size: int, writes: bool) -> Iterator[Settings]:
    yield rule
    chunks = (rule.chunk, *(chunk for chunk in (64, 32) if chunk < size and rule.chunk != chunk))
    for warps, stages, programs, keys, chunk, rows in itertools.product(
        (4, 8), (1, 2, 3), (1, 2, 3), (16, 32, 64) if writes else (64, 128), chunks, (64, 128) if writes else (64,)
    ):
        # one number is changed, or the warps, with them the rows, and another number
        changed = (stages != rule.stages) + (programs != rule.programs) + (keys != rule.keys) + (chunk != rule.chunk)
        if changed <= 1 and warps * programs <= 16 and 16 * warps >= rows:
            yield replace(rule, warps=warps, stages=stages, programs=programs, keys=keys, chunk=chunk, rows=rows)


def _backward(rule: Block, size: int, tall: bool) -> Iterator[Block]:
    yield rule
    for rows, keys, warps, stages in itertools.product((16, 32, 64, *([128] if tall else [])), (16, 32, 64), (4, 8), (1, 2)):
        if 512 <= rows * keys <= 8192:
            yield Block(rows, keys, warps, stages, rule.chunk)
    if rule.chunk >= size > 64:
        yield from (replace(rule, chunk=chunk) for chunk in (32, 64))


def _decoding() -> Iterator[Decode]:
    yield Decode()
    for warps, tile_bytes in itertools.product((2, 4, 8), (1 << 12, 1 << 13, 1 << 14, 1 << 15)):
        yield Decode(warps, warps, warps, tile_bytes)
    for tiles_per_split, programs in itertools.product((2, 4, 8), (1, 2, 4)):
        yield Decode(tiles_per_split=tiles_per_split, programs=programs)
    for warps in (2, 4):
        yield from (Decode(start_warps=warps), Decode(read_warps=warps), Decode(values_warps=warps))


def predicted_table(*, lanes: int, most_warps: int) -> Table:
    """A table predicted from register counts, without compilation or measurement.

    A thread holds 16 entries of a row and their intermediate results, 32 if that avoids a sum over warps, 8 in float64.

    Args:
        lanes: Threads per warp.
        most_warps: Maximum number of warps per program.
    """

    def tiles(longest: int, single: int, shared: int) -> dict[int, Tile]:
        result = {}
        for n in (1 << power for power in range(4, longest.bit_length())):
            per_thread = single if n <= single * lanes else shared
            result[n] = Tile(max(1, per_thread * lanes // n), min(most_warps, max(1, n // (per_thread * lanes))))
        return result

    return Table(
        origin="predicted",
        forward=tiles(16384, 32, 16),
        backward=tiles(8192, 32, 16),
        forward_float64=tiles(4096, 8, 8),
        backward_float64=tiles(4096, 8, 8),
        stream_block=8192,
        stream_warps=most_warps,
        adjacent_elements=4096,
    )
