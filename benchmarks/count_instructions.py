"""Instructions per score of the compiled kernels, without a GPU, and the table of budgets that tests hold them to.

    python -m benchmarks.count_instructions [--write] [--targets sm90] [--sizes 64] [--alphas 0.5] [--operators rows]

Compiles the real launch code ahead of time and counts what a warp executes (`benchmarks.machine_code` has the rule), for:

- attention (causal) and decoding: one turn of the loop over tiles, divided by the tile's scores. Which loop it is follows from
  its products and stores: the dense pass stores the tiles' largest scores, the further pass does not. "dead" is the shortest
  way through a turn; where it does not differ from the live way by a tenth, tiles are not skipped.
  alpha as a tensor is counted where e is at least 1/64: closer to softmax a series takes the logarithm's place. Backwards are
  counted twice: "tensor" with alpha's gradient, "fixed" without.
- power (with gates, two heads to one of the keys; its variants are degrees in place of alphas): one turn of the loop over
  monomials, divided by its monomials times tokens.
- threshold (causal, power 1; its variants are weights in place of alphas; sm90 alone): one turn of a loop over tiles, divided
  by the tile's scores. The loops are for the log-sum-exp, the output, the mean of softmax's gradient, dQ, and dK with dV.
- rows: "once" is the way from entry to end that skips the solver's loops, "step" one turn of the loop with the most arithmetic,
  "early step" of the one before it, which uses the hardware's logarithm. As a tensor alpha is at most 63/64 here too.

Scores of decoding count the padded rows of its tiles. An AMD warp has 64 lanes, and its scalar instructions count too.
`--write` renews the counted lines of instructions.json, and the tables of docs/performance.md. The version of Triton is part of
a line's key; another Triton is put first on the path (`PYTHONPATH`). Where all cases of an operator are counted, the table
notes the fingerprint of its sources (`benchmarks.sources`): while it is the same, tests need not count again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.compile_kernels import call_attention, call_decoding, call_power, call_rows, call_threshold, kernels
from benchmarks.machine_code import Loop, Order, Program, Tally, by_hardware, idle, likely
from benchmarks.sources import fingerprint
from diffmax.plugin import TILE
from diffmax.testing.ahead_of_time import Compiled, Target, recording

TABLE = Path(__file__).with_name("instructions.json")
PAGE = Path(__file__).resolve().parents[1] / "docs" / "performance.md"
BEGIN, END = "<!-- instructions:begin -->", "<!-- instructions:end -->"

TARGETS = ("sm90", "sm80", "gfx942")
ALPHAS = ("0.5", "0.85", "0.9", "tensor", "fixed")
PRODUCTS = ("0.5", "0.9")  # whose powers are products
BACKWARD = ("rows backward", "dQ", "dK, dV")
SIZES = {"rows": (1024, 4096), "attention": (64, 128), "decoding": (64, 128), "power": (32, 64), "threshold": (64,)}
DTYPES = {
    **dict.fromkeys(("rows", "threshold"), ("float32", "bfloat16")),
    **dict.fromkeys(("attention", "decoding", "power"), ("bfloat16",)),
}
DEGREES = ("p2", "p4")
WEIGHTS = ("softmax", "scores")

# Most instructions per score on sm90, bfloat16, heads of 64, alpha = 0.5
GOALS = {
    "dense pass": 12.0, "dense pass, dead": 5.0, "output, inference": 10.0, "output, training": 12.0,
    "dQ": 10.0, "dK, dV": 14.0,
}  # fmt: skip
# What alpha as a tensor may cost, times alpha = 0.85
TENSOR_GOAL = 1.3


@dataclass(frozen=True)
class Case:
    """What is compiled together: an operator's kernels for a target, dtype, size (of rows or heads) and alpha or variant."""

    operator: str
    target: str
    dtype: str
    size: int
    alpha: str

    def __str__(self) -> str:
        return " ".join(map(str, asdict(self).values()))


@dataclass(frozen=True)
class Line:
    """A line of the table: the case, the part of a kernel, what a score costs there, and what the kernel takes.

    Attributes:
        instructions, special: Per score: all, and those of the special-function unit.
        registers, spilled: Of a thread; the latter in bytes.
        programs: How many run on a multiprocessor at a time.
    """

    triton: str
    target: str
    part: str
    dtype: str
    size: int
    alpha: str
    instructions: float
    special: float
    warps: int
    registers: int
    spilled: int
    shared: int
    programs: int

    @property
    def key(self) -> tuple[str, str, str, str, int, str]:
        """What identifies the line."""
        return self.triton, self.target, self.part, self.dtype, self.size, self.alpha


def cases(
    targets: Sequence[str] = TARGETS,
    operators: Sequence[str] = tuple(SIZES),
    sizes: Sequence[int] = (),
    alphas: Sequence[str] = ALPHAS,
) -> Iterator[Case]:
    """Those selected; no sizes: all."""
    for target, operator in itertools.product(targets, operators):
        variants = {"power": DEGREES, "threshold": WEIGHTS}.get(operator, alphas)
        if operator == "decoding":
            variants = [alpha for alpha in variants if alpha != "fixed"]
        for variant, dtype, size in itertools.product(variants, DTYPES[operator], SIZES[operator]):
            if (not sizes or size in sizes) and (variant, size) != ("p4", 64):  # which is quadratic at every length of use
                yield Case(operator, target, dtype, size, variant)


def triton_version() -> str:
    """As in the table: without the last number."""
    import triton

    return ".".join(triton.__version__.split(".")[:2])


def counted(case: Case) -> list[Line]:
    """Compile a case and count. A forward does not know whether alpha's gradient will be wanted, and is counted once."""
    return [line for line in _counted(case) if case.alpha != "fixed" or line.part in BACKWARD]


def _counted(case: Case) -> list[Line]:
    of = {"target": case.target, "dtype": case.dtype, "alpha": case.alpha}
    found: list[Line] = []
    if case.operator == "rows":
        for compiled in _launched(call_rows, case, of | {"length": str(case.size)}):
            found += _rows_lines(case, compiled)
        return found
    of |= {"size": str(case.size), "options": "plain"}
    if case.operator == "power":
        of |= {"degree": case.alpha.removeprefix("p"), "features": "gates"}
        for purpose in ("training", "inference"):
            for compiled in _launched(call_power, case, of | {"for": purpose}):
                found += _power_lines(case, compiled, purpose)
        return list({line.key: line for line in found}.values())
    if case.operator == "threshold":
        for compiled in _launched(call_threshold, case, of | {"weights": case.alpha}):
            found += _threshold_lines(case, compiled)
        return found
    if case.operator == "decoding":
        for compiled in _launched(call_decoding, case, of):
            if part := {"kvcache_read_kernel": "decode, read", "kvcache_values_kernel": "decode, values"}.get(compiled.name):
                found.append(_decode_line(case, compiled, part))
        return found
    of["options"] = "causal"
    for purpose in ("training", "inference"):
        for compiled in _launched(call_attention, case, of | {"for": purpose}):
            if purpose == "training" or compiled.name == "attention_out_kernel":
                found += _attention_lines(case, compiled, purpose)
    return found


def _launched(call: Callable[[dict[str, str]], None], case: Case, of: dict[str, str]) -> list[Compiled]:
    """Each binary of a call once."""
    with recording(case.target, *kernels()) as launched:
        call(of)
    return list({id(compiled.kernel): compiled for compiled in launched}.values())


def _rows_lines(case: Case, compiled: Compiled) -> list[Line]:
    program, constants = Program.of(compiled), _constants(compiled)
    scores = constants["ROWS"] * constants["BLOCK"]
    if "bwd" in compiled.name:
        return [_line(case, compiled, "rows backward", program.whole(), scores)]
    turns = sorted((program.turn(loop) for loop in program.inner_loops()), key=lambda tally: tally.arithmetic)
    # as a tensor each step is there twice, the way of the hardware's logarithm first
    if case.alpha in ("tensor", "fixed") and case.dtype != "float64":
        quick = max(turns, key=lambda tally: tally.special)
        turns = [quick] if case.dtype == "bfloat16" else [quick, turns[-1]]
    found = [
        _line(case, compiled, "rows, once", program.whole(), scores),
        _line(case, compiled, "rows, step", turns[-1], scores),
    ]
    lanes = compiled.target.lanes * compiled.resources["warps"]
    if len(turns) > 1 and turns[-2].arithmetic * lanes > 2 * scores:
        found.append(_line(case, compiled, "rows, early step", turns[-2], scores))
    return found


def _decode_line(case: Case, compiled: Compiled, part: str) -> Line:
    constants = _constants(compiled)
    loop = _most_products(Program.of(compiled))
    return _line(case, compiled, part, loop(likely, None), constants["BLOCK_M"] * constants["BLOCK_N"])


def _power_lines(case: Case, compiled: Compiled, purpose: str) -> list[Line]:
    """Of a kernel that reads or writes states. Its loop over a chunk's own tokens comes behind that over monomials."""
    constants = _constants(compiled)
    parts = {
        "power_update_kernel": "power update, of queries" if constants.get("QUERIES") else f"power update, {purpose}",
        "power_out_kernel": f"power output, {purpose}",
        "power_bwd_dq_kernel": "power dQ",
        "power_bwd_dkv_kernel": "power dK, dV",
    }
    if compiled.name not in parts:
        return []
    program = Program.of(compiled)
    loops = sorted(program.product_loops(), key=lambda loop: loop.head)
    if len(loops) == 1 and compiled.name != "power_update_kernel":
        return []
    turn = program.turn(loops[0])
    return [_line(case, compiled, parts[compiled.name], turn, constants["BLOCK_P"] * constants["BLOCK_T"])]


def _threshold_lines(case: Case, compiled: Compiled) -> list[Line]:
    """A kernel's loops in order: a pass that only softmax takes comes first."""
    constants, program = _constants(compiled), Program.of(compiled)
    parts = {
        "threshold_out_kernel": ("threshold log-sum-exp", "threshold output"),
        "threshold_bwd_dq_kernel": ("threshold mean", "threshold dQ"),
        "threshold_bwd_dkv_kernel": ("threshold dK, dV",),
    }[compiled.name]
    loops = sorted(program.product_loops(), key=lambda loop: loop.head)
    scores, found = constants["BLOCK_M"] * constants["BLOCK_N"], []
    for part, loop in zip(parts[-len(loops) :], loops, strict=True):
        live, dead = program.turn(loop, likely), program.turn(loop, idle)
        found.append(_line(case, compiled, part, live, scores))
        if dead.instructions < 0.9 * live.instructions:
            found.append(_line(case, compiled, f"{part}, dead", dead, scores))
    return found


def _attention_lines(case: Case, compiled: Compiled, purpose: str) -> list[Line]:
    """A turn takes the scores of a tile, whose size is among the kernel's constants."""
    program, constants = Program.of(compiled), _constants(compiled)
    if compiled.name == "attention_solve_kernel":
        tile = TILE * TILE
        loops = {
            "dense pass": (_most_products(program, storing=True), tile * constants["AT_ONCE"]),
            "further pass": (_most_products(program, storing=False), tile),
        }
    elif compiled.name == "attention_out_kernel":
        loops = {f"output, {purpose}": (_most_products(program), constants["ROWS"] * constants["KEYS"])}
    elif compiled.name in ("attention_bwd_dq_kernel", "attention_bwd_dkv_kernel"):
        part = "dQ" if compiled.name == "attention_bwd_dq_kernel" else "dK, dV"
        loops = {part: (_most_products(program), constants["BLOCK_M"] * constants["BLOCK_N"])}
    else:
        return []
    found = []
    for part, (loop, scores) in loops.items():
        live, dead = loop(likely, None), loop(idle, None)
        if case.alpha not in PRODUCTS:  # a logarithm and an exponential by the hardware for each
            live = loop(
                _shortest_by_hardware if part in BACKWARD else by_hardware,
                2 * scores // (compiled.target.lanes * compiled.resources["warps"]),
            )
        found.append(_line(case, compiled, part, live, scores))
        if part == "dense pass" and dead.instructions < 0.9 * live.instructions:
            found.append(_line(case, compiled, "dense pass, dead", dead, scores))
    return found


def _shortest_by_hardware(tally: Tally) -> tuple[int, ...]:
    """As `by_hardware` where all k go one way, and what is near softmax, another series, a longer one."""
    return (tally.products, -tally.series, -tally.instructions)


def _most_products(program: Program, storing: bool | None = None) -> Callable[[Order, int | None], Tally]:
    """A turn of the loop with the most products, by an order; of several the cheapest, such as that over whole tiles only."""

    def of(loop: Loop) -> Tally:
        return program.turn(loop, likely)

    loops = [loop for loop in program.product_loops() if storing is None or (_stores(program, loop) == storing)]
    most = max(of(loop).products for loop in loops)
    best = min((loop for loop in loops if of(loop).products == most), key=lambda loop: of(loop).instructions)
    return lambda order, special: program.turn(best, order, special)


def _stores(program: Program, loop: Loop) -> bool:
    return any(program.tallies[block].stores for block in loop.blocks)


def _constants(compiled: Compiled) -> dict[str, int]:
    """The constexprs by name."""
    source = compiled.kernel.src
    return {source.fn.arg_names[index[0]]: value for index, value in source.constants.items() if isinstance(value, int)}


def _line(case: Case, compiled: Compiled, part: str, tally: Tally, scores: int) -> Line:
    resources, target = compiled.resources, compiled.target
    per_score = target.lanes * resources["warps"] / scores
    return Line(
        triton_version(), case.target, part, case.dtype, case.size, case.alpha,
        round(tally.instructions * per_score, 2), round(tally.special * per_score, 2),
        resources["warps"], resources["registers"], resources["spilled"], resources["shared"],
        programs_at_a_time(target, resources["warps"], resources["registers"], resources["shared"]),
    )  # fmt: skip


def programs_at_a_time(target: Target, warps: int, registers: int, shared: int) -> int:
    """How many programs a multiprocessor or a compute unit holds, by registers, shared memory and warps."""
    if target.backend == "hip":
        waves = min(8, 512 // max(8, -(-registers // 8) * 8))  # of each of four units
        return min(4 * waves // warps, target.shared // shared if shared else 99)
    of_warps = 48 if target.arch in (86, 89, 120) else 64
    by_registers = 65536 // (max(8, -(-registers // 8) * 8) * 32) // warps
    room = target.shared + 1024  # the device keeps 1 KiB for each program
    return min(by_registers, room // (shared + 1024), of_warps // warps, 32)


def read() -> dict[tuple[str, str, str, str, int, str], Line]:
    """The table in the repository."""
    lines = [Line(**each) for each in _stored()["lines"]]
    return {line.key: line for line in lines}


def sources(operator: str) -> str:
    """The fingerprint of what an operator's lines are counted from."""
    return fingerprint(operator, Path(__file__))


def up_to_date(operator: str) -> bool:
    """Whether the table has all lines of an operator for this Triton, from the sources as they are."""
    return bool(_stored()["sources"].get(triton_version(), {}).get(operator) == sources(operator))


def _stored() -> dict[str, Any]:
    return json.loads(TABLE.read_text(encoding="utf-8")) if TABLE.exists() else {"sources": {}, "lines": []}


def write(found: Sequence[Line], whole: Sequence[str] = ()) -> None:
    """Renew lines of the table; those of the same cases that no longer occur go.

    Args:
        found: The new lines.
        whole: Operators of which every case was counted with this Triton.
    """
    renewed = {(line.triton, line.target, line.dtype, line.size, line.alpha) for line in found}
    parts = {_family(line.part) for line in found}
    kept = [
        line
        for line in read().values()
        if (line.triton, line.target, line.dtype, line.size, line.alpha) not in renewed or _family(line.part) not in parts
    ]
    lines = sorted([*kept, *found], key=lambda line: line.key)
    made_from = _stored()["sources"]
    made_from[triton_version()] = made_from.get(triton_version(), {}) | {operator: sources(operator) for operator in whole}
    table = ",\n".join(json.dumps(asdict(line)) for line in lines)
    TABLE.write_text(
        f'{{"sources": {json.dumps(made_from, indent=1, sort_keys=True)},\n"lines": [\n{table}\n]}}\n', encoding="utf-8"
    )
    page = PAGE.read_text(encoding="utf-8")
    start, end = page.index(BEGIN) + len(BEGIN), page.index(END)
    PAGE.write_text(f"{page[:start]}\n{readable()}{page[end:]}", encoding="utf-8")


def _family(part: str) -> str:
    """The operator of a part."""
    return part.split(",")[0].split(" ")[0] if part.startswith(("rows", "decode", "power", "threshold")) else "attention"


def readable() -> str:
    """The table as Markdown: sm90, for the oldest Triton and the newest of it."""
    lines = [line for line in read().values() if line.target == "sm90"]
    versions = sorted({line.triton for line in lines}, key=lambda name: [*map(int, name.split("."))])
    out = []
    for version in dict.fromkeys([versions[0], versions[-1]]) if versions else ():
        own = [line for line in lines if line.triton == version]
        out += [f"Instructions per score, and in parentheses special functions, sm_90, Triton {version}:\n"]
        out += _rows(
            [line for line in own if _family(line.part) not in ("power", "threshold")],
            {alpha: f"alpha {alpha}" for alpha in ALPHAS[:-1]} | {"fixed": "the same, without its gradient"},
        )
        out += [f"Power attention: instructions per monomial and token, sm_90, Triton {version}:\n"]
        out += _rows([line for line in own if _family(line.part) == "power"], {of: f"degree {of[1:]}" for of in DEGREES})
        out += [f"Threshold attention: instructions per score, sm_90, Triton {version}:\n"]
        out += _rows([line for line in own if _family(line.part) == "threshold"], {of: of for of in WEIGHTS})
    return "\n".join([*out, *goal_lines(lines)])


def _rows(lines: Sequence[Line], variants: dict[str, str]) -> list[str]:
    """A table with a row for each part, and a column for each variant, by its title."""
    cells = {(line.part, line.dtype, line.size, line.alpha): line for line in lines}
    titles = list(variants.values())
    out = [
        f"| part | dtype | size | {' | '.join(titles)} | registers, programs at {titles[0]} |",
        "|---|---|---|" + "---|" * len(titles) + "---|",
    ]
    for row in dict.fromkeys(key[:3] for key in cells):
        found = [cells.get((*row, variant)) for variant in variants]
        taken = f"{found[0].registers}, {found[0].programs}" if found[0] else "-"
        out.append(f"| {' | '.join(map(str, row))} | {' | '.join(map(_cell, found))} | {taken} |")
    return [*out, ""]


def _cell(line: Line | None) -> str:
    if line is None:
        return "-"
    special = f" ({line.special:.1f})" if line.special >= 0.05 else ""
    return f"{line.instructions:.1f}{special}"


def goal_lines(lines: Sequence[Line]) -> list[str]:
    """Goals on sm90 (bfloat16, heads of 64), each with what the worse Triton has."""
    out = ["| goal, sm_90, bfloat16, heads of 64 | at most | counted |", "|---|---|---|"]
    size = {"rows": 1024}  # else heads of 64
    own = [line for line in lines if line.dtype == "bfloat16" and line.size == size.get(_family(line.part), 64)]
    for part, most in GOALS.items():
        counts = [line.instructions for line in own if line.part == part and line.alpha == "0.5"]
        out.append(f"| {part}, alpha 0.5 | {most:g} | {_verdict(max(counts), most) if counts else 'none: not skipped'} |")
    by_key = {line.key: line for line in own}
    wholes = {part: (part,) for part in dict.fromkeys(line.part for line in own)} | {"dQ, dK, dV": ("dQ", "dK, dV")}
    for name, parts in wholes.items():
        kinds = {"tensor": "alpha as a tensor"}
        if parts[0] in BACKWARD:
            kinds = {"fixed": "alpha as a tensor", "tensor": "with alpha's gradient too"}
        for alpha, title in kinds.items():
            ratios = []
            for version in dict.fromkeys(line.triton for line in own):
                keys = [(version, "sm90", part, own[0].dtype, size.get(_family(part), 64)) for part in parts]
                tensors, floats = ([by_key[(*key, a)] for key in keys if (*key, a) in by_key] for a in (alpha, "0.85"))
                if len(tensors) == len(floats) == len(parts):
                    ratios.append(sum(one.instructions for one in tensors) / sum(one.instructions for one in floats))
            if ratios:
                out.append(f"| {name}, {title}, times alpha 0.85 | {TENSOR_GOAL} | {_verdict(max(ratios), TENSOR_GOAL)} |")
    return [*out, ""]


def _verdict(value: float, most: float) -> str:
    return f"{value:.1f}" if value <= most else f"**{value:.1f}, missed**"


def show(line: Line) -> str:
    """As a line of text."""
    return (
        f"{line.target:7} {line.part:18} {line.dtype:9} {line.size:5} alpha {line.alpha:7}"
        f" {line.instructions:6.1f} instructions, {line.special:4.1f} special, {line.warps:2} warps,"
        f" {line.registers:3} registers, {line.spilled:3} spilled, {line.shared:6} shared, {line.programs:2} programs"
    )


def main(arguments: Sequence[str]) -> int:
    """Count, print and, if asked, write."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.count_instructions", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--write", action="store_true", help="renew the table and docs/performance.md")
    parser.add_argument("--targets", nargs="+", default=TARGETS)
    parser.add_argument("--operators", nargs="+", default=tuple(SIZES), choices=SIZES)
    parser.add_argument("--sizes", nargs="+", type=int, default=())
    parser.add_argument("--alphas", nargs="+", default=ALPHAS)
    options = parser.parse_args(arguments)
    for case in cases(options.targets, options.operators, options.sizes, options.alphas):
        found = counted(case)
        for line in found:
            print(show(line), flush=True)
        if options.write:  # case by case, so that what an interrupted run counted stays
            write(found)
    if options.write and (tuple(options.targets), options.sizes, tuple(options.alphas)) == (TARGETS, (), ALPHAS):
        write((), options.operators)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
