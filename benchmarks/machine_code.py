"""The instructions that a compiled kernel executes along its likely way, from its disassembly: loops, ways, products.

The code is a graph of blocks. A loop is what a branch backwards closes. It is counted as one turn, from its head to its head.
At a branch the way takes the side with more arithmetic, if that is at least a quarter of what the side costs, and else the
shorter side: the way through a whole tile computes powers, and jumps over the masks of a tile at an edge, which compare and
select.
`idle` asks for the shortest way that holds products: a dead tile.

Nothing here depends on registers or on the order of blocks. Predicated instructions count, because they are issued.
"""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import triton

from diffmax.testing.ahead_of_time import Compiled

# A way through a side is likely if this times its arithmetic is at least its instructions
ARITHMETIC_WORTH = 4

ARITHMETIC = re.compile(r"F(ADD|MUL|FMA)|MUFU|H(ADD|MUL|FMA)2|v_(pk_)?(add|sub|mul|fma|fmac|fmamk|fmaak)_f|v_(exp|log|rcp)_f")
SPECIAL = re.compile(r"MUFU|v_(exp|log|rcp|rsq|sqrt)_f")
STORE = re.compile(r"STG|(global|buffer)_store")
END = re.compile(r"EXIT|RET|BRX|s_endpgm|s_setpc")
JUMP = re.compile(r"BRA|s_c?branch")
# What `numerics.log2_1p` subtracts from the bits of a number, or its negative: the series that stands for a logarithm
SERIES = re.compile(r"0x(3f3504f3|c0cafb0d)", re.IGNORECASE)

# Multiply-adds of a matrix instruction, by warp (HGMMA: by four warps): M x N x K in its name
_MMA = re.compile(r"(?:HMMA|QMMA)\.(16)(8)(4|8|16|32)")
_WGMMA = re.compile(r"HGMMA\.(\d+)x(\d+)x(\d+)")
_MFMA = re.compile(r"v_s?mfmac?_f32_(\d+)x(\d+)x(\d+)")
_WMMA = re.compile(r"v_wmma_f32_(\d+)x(\d+)x(\d+)")


@dataclass(frozen=True)
class Instruction:
    """Its name; whether it runs under a predicate; where it may jump; whether it begins a series for a logarithm."""

    name: str
    conditional: bool
    target: str | None
    series: bool = False

    @property
    def falls_through(self) -> bool:
        """Whether the next instruction can follow."""
        return self.conditional or not (END.match(self.name) or (self.target is not None and JUMP.match(self.name)))

    @property
    def products(self) -> int:
        """Multiply-adds of its matrix product by one warp."""
        for pattern, warps in ((_WGMMA, 4), (_MMA, 1), (_MFMA, 1), (_WMMA, 1)):
            if found := pattern.match(self.name):
                m, n, k = map(int, found.groups())
                return m * n * k // warps
        return 0


@dataclass(frozen=True)
class Tally:
    """What is executed by one warp: instructions, arithmetic, special functions, multiply-adds of products, stores, series."""

    instructions: int = 0
    arithmetic: int = 0
    special: int = 0
    products: int = 0
    stores: int = 0
    series: int = 0

    def __add__(self, other: Tally) -> Tally:
        mine, others = vars(self).values(), vars(other).values()
        return Tally(*(a + b for a, b in zip(mine, others, strict=True)))

    @classmethod
    def of(cls, instructions: Iterable[Instruction]) -> Tally:
        """Of a block."""
        names = Counter(instructions)
        return cls(
            sum(names.values()),
            sum(number for one, number in names.items() if ARITHMETIC.match(one.name) or one.products),
            sum(number for one, number in names.items() if SPECIAL.match(one.name)),
            sum(number * one.products for one, number in names.items()),
            sum(number for one, number in names.items() if STORE.match(one.name)),
            sum(number for one, number in names.items() if one.series),
        )


Order = Callable[[Tally], tuple[int, ...]]


def likely(tally: Tally) -> tuple[int, ...]:
    """The way of a live, whole tile."""
    return (tally.products, ARITHMETIC_WORTH * tally.arithmetic - tally.instructions)


def by_hardware(tally: Tally) -> tuple[int, ...]:
    """The way of a live, whole tile that takes the hardware's logarithm rather than a series: e is not tiny."""
    return (tally.products, -tally.series, ARITHMETIC_WORTH * tally.arithmetic - tally.instructions)


def idle(tally: Tally) -> tuple[int, ...]:
    """The way of a tile that only its products found dead."""
    return (tally.products > 0, -tally.instructions)


def straight(tally: Tally) -> tuple[int, ...]:
    """The shortest way that stores all results."""
    return (tally.stores, -tally.instructions)


@dataclass(frozen=True)
class Loop:
    """A head, the blocks of a turn, and those that jump back to the head."""

    head: int
    blocks: frozenset[int]
    latches: frozenset[int]


class Program:
    """The graph of a kernel's blocks."""

    def __init__(self, instructions: list[Instruction], labels: dict[str, int]) -> None:
        starts = {0, *labels.values()} | {at + 1 for at, one in enumerate(instructions) if one.target or END.match(one.name)}
        cuts = sorted(start for start in starts if start < len(instructions))
        number = {start: index for index, start in enumerate(cuts)}
        self.tallies: list[Tally] = []
        self.following: list[list[int]] = []
        for start, end in zip(cuts, [*cuts[1:], len(instructions)], strict=True):
            last = instructions[end - 1]
            after = [number[labels[last.target]]] if last.target in labels and labels[last.target] in number else []
            if last.falls_through and end in number:
                after.append(number[end])
            self.tallies.append(Tally.of(instructions[start:end]))
            self.following.append(after)
        self.backward, self.order = self._depth_first()

    @classmethod
    def of(cls, compiled: Compiled) -> Program:
        """From a binary."""
        return cls(
            *(_parse_sass(_disassembly(compiled)) if compiled.target.backend == "cuda" else _parse_amdgcn(compiled.text))
        )

    def _depth_first(self) -> tuple[set[tuple[int, int]], list[int]]:
        """The edges that jump backwards, and the blocks in an order in which all other edges go forwards."""
        backward, finished, opened = set(), [], set()
        done: set[int] = set()
        stack = [(0, iter(self.following[0]))]
        opened.add(0)
        while stack:
            block, rest = stack[-1]
            for after in rest:
                if after in opened:
                    backward.add((block, after))
                elif after not in done:
                    opened.add(after)
                    stack.append((after, iter(self.following[after])))
                    break
            else:
                stack.pop()
                opened.discard(block)
                done.add(block)
                finished.append(block)
        return backward, finished[::-1]

    @functools.cached_property
    def loops(self) -> list[Loop]:
        """All loops, those with one head merged."""
        before: dict[int, list[int]] = {}
        for block, after in enumerate(self.following):
            for each in after:
                before.setdefault(each, []).append(block)
        latches: dict[int, set[int]] = {}
        for latch, head in self.backward:
            latches.setdefault(head, set()).add(latch)
        found = []
        for head, ends in latches.items():
            inside, open_blocks = {head}, [end for end in ends if end != head]
            while open_blocks:
                block = open_blocks.pop()
                if block not in inside:
                    inside.add(block)
                    open_blocks += before.get(block, [])
            found.append(Loop(head, frozenset(inside), frozenset(ends)))
        return found

    def product_loops(self) -> list[Loop]:
        """The loops with products that hold no smaller such loop."""
        found = [loop for loop in self.loops if any(self.tallies[block].products for block in loop.blocks)]
        return [loop for loop in found if not any(other.blocks < loop.blocks for other in found)]

    def inner_loops(self) -> list[Loop]:
        """The loops that hold no other loop."""
        return [loop for loop in self.loops if not any(other.blocks < loop.blocks for other in self.loops)]

    def turn(self, loop: Loop, order: Order = likely, special: int | None = None) -> Tally:
        """One turn of a loop, by the way that `order` likes most, of those with so many special functions if there are any.

        AMD's compiler may write "if a, else b" as "if not a" and "if a" in turn: a way through neither, or both, has too few
        special functions, or too many.
        """
        return self._way(loop.head, loop.blocks, loop.latches, order, special)

    def whole(self, order: Order = straight) -> Tally:
        """From the kernel's entry to its end, each loop that the way enters taken once."""
        ends = frozenset(block for block, after in enumerate(self.following) if not after)
        return self._way(0, frozenset(self.order), ends, order)

    def _way(self, start: int, inside: frozenset[int], ends: frozenset[int], order: Order, special: int | None = None) -> Tally:
        """The best way; where the number of special functions matters, the best of each is kept on the way."""

        def kind(tally: Tally) -> int:
            return 0 if special is None else tally.special

        best: dict[int, dict[int, Tally]] = {start: {kind(self.tallies[start]): self.tallies[start]}}
        for block in self.order:
            if block not in inside or block not in best:
                continue
            for after in self.following[block]:
                if after not in inside or (block, after) in self.backward:
                    continue
                found = best.setdefault(after, {})
                for before in best[block].values():
                    way = before + self.tallies[after]
                    if kind(way) not in found or order(way) > order(found[kind(way)]):
                        found[kind(way)] = way
        found = [way for end in ends for way in best.get(end, {}).values()]
        return max([way for way in found if way.special == special] or found, key=order)


def _disassembly(compiled: Compiled) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.kernel.asm["cubin"])
        file.flush()
        return subprocess.run([str(tool), "-c", file.name], capture_output=True, text=True, check=True).stdout


def _parse_sass(text: str) -> tuple[list[Instruction], dict[str, int]]:
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if found := re.match(r"(\.L_x_\d+):", line):
            labels[found[1]] = len(instructions)
        elif found := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)(.*);", line):
            name, rest = found[2], found[3]
            target = re.search(r"`\((\.L_x_\d+)\)", rest) if JUMP.match(name) else None
            # a predicate may also stand among the operands of a branch
            asked = bool(found[1]) or bool(target and re.match(r"\s+!?U?P\d|\s+UR\d", rest))
            instructions.append(Instruction(name, asked, target[1] if target else None, bool(SERIES.search(rest))))
    return instructions, labels


def _parse_amdgcn(text: str) -> tuple[list[Instruction], dict[str, int]]:
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if found := re.match(r"(\.?L\w+):", line):
            labels[found[1]] = len(instructions)
        elif found := re.match(r"\s+([sv]_\w+|ds_\w+|global_\w+|buffer_\w+|flat_\w+|scratch_\w+)(.*)", line):
            target = re.match(r"\s+(\.?L\w+)", found[2]) if JUMP.match(found[1]) else None
            asked, series = found[1].startswith("s_cbranch"), bool(SERIES.search(found[2]))
            instructions.append(Instruction(found[1], asked, target[1] if target else None, series))
    return instructions, labels
