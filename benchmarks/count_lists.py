"""Would lists of weights make attention's GPU forward faster? Counted on a language model's own queries and keys, by layer.

    python -m benchmarks.device.capture FILE --every-layer --length 8192
    python -m benchmarks.count_lists FILE [--output JSON]

Today a tile of 64 queries by 64 keys with one weight is visited whole: by further evaluations and by the output. The first
further evaluation knows a bound of the threshold (a step of Newton's from the left). It could note what lies above, and the
later passes take that alone:

- "gather": a bit for each entry; then each query gathers the keys and values of its own weights for the output.
- "keys": a bit for each key that may have a weight for any of the 64 queries; then tiles are made of such keys alone.

Where the dense pass suffices, there is nothing to note. What lists cost besides is left out: to turn bits into positions, to
load those, and to mask single entries. So both are bounds of what could be gained.

Counted of each layer, at the score scales that keep the model's quality: the zeros, the tiles and keys with a weight for some
query of a block, weights per query, and the solver's evaluations (`benchmarks.count_products`). The output visits what either
half of 128 queries needs, in tiles and in keys. What noting and gathering
execute is counted from compiled code (`benchmarks.list_kernels`), what the passes do from the table of budgets. From them the
clocks of a block of queries for inference, by the model of `benchmarks.model_of_time`; a gathered row of keys or values comes
from the L2 cache. No device has run any of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

import diffmax
from benchmarks import count_instructions, count_products, harness, list_kernels
from benchmarks.harness import Row
from benchmarks.machine_code import Program, Tally, idle
from benchmarks.model_of_time import BYTES_PER_CLOCK, SIZE, clocks
from diffmax.testing.ahead_of_time import recording

TILE, WIDE = 64, 128
# alpha, and the scale of all scores at which the model loses little
CASES = ((0.75, 0.5), (0.5, 0.35))
LENGTHS = (2048, 8192)
NOTES = ("nothing", "bits", "segments", "scan", "atomics", "keys")
GATHERED = 32  # rows of values at a time
WARPS_ISSUED = 4 * 0.8  # instructions of warps per clock of a multiprocessor
# The parts of a pass over tiles, and of what alpha of the table: integer exponents have the code of 1/2
PARTS = ("dense pass", "dense pass, dead", "further pass", "output, inference")


def main(arguments: list[str]) -> None:
    parser = harness.command_line("count_lists", __doc__ or "")
    parser.add_argument("captured", type=Path, help="what benchmarks.device.capture wrote")
    parser.add_argument("--blocks", type=int, default=4, help="blocks of queries per head (default: %(default)s)")
    options = parser.parse_args(arguments)
    layers = torch.load(options.captured, weights_only=True)
    if options.quick:
        layers = dict(list(layers.items())[:1])

    def found() -> Row:
        costs = counted()
        return {"instructions": costs, "layers": list(of_layers(layers, costs, options.blocks))}

    without_file = [argument for argument in arguments if argument != str(options.captured)]
    harness.publish("count_lists", without_file, options.output, found, table)


def counted() -> dict[str, float]:
    """Instructions per score of the dense pass with each kind of note, and of the gather per weight and warp; of sm90."""

    def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(shape, dtype=dtype)

    narrow, room = torch.bfloat16, TILE * 64
    lists = (zeros(TILE * room, dtype=torch.int16), zeros(TILE * room, dtype=narrow))
    found = {}
    for note in NOTES:
        kernel = list_kernels.dense_pass_kernel
        with recording("sm90", kernel) as launched:
            kernel[(1,)](
                zeros(TILE, SIZE, dtype=narrow), zeros(room, SIZE, dtype=narrow), zeros(TILE), zeros(64, TILE),
                zeros(3, TILE, 8), zeros(TILE * TILE * 8, dtype=torch.int8), *lists, zeros(TILE, 8, dtype=torch.int32),
                64, room // 8, 0.1, 0.1, getattr(list_kernels, note.upper()).value, num_warps=4, num_stages=2,
            )  # fmt: skip
        program = Program.of(launched[0])
        loop = max(program.product_loops(), key=lambda loop: program.turn(loop, _longest).products)
        per_score = 32 * launched[0].resources["warps"] / TILE**2
        found[note] = round(program.turn(loop, _longest).instructions * per_score, 2)
        found[f"{note}, dead"] = round(program.turn(loop, idle).instructions * per_score, 2)
    kernel = list_kernels.gather_kernel
    with recording("sm90", kernel) as launched:
        kernel[(TILE,)](
            *lists, zeros(room, SIZE, dtype=narrow), zeros(TILE, SIZE, dtype=narrow), zeros(TILE, dtype=torch.int32), room, 0.1,
            GATHERED, num_warps=1, num_stages=2,
        )  # fmt: skip
    program = Program.of(launched[0])
    turn = max((program.turn(loop, _longest) for loop in program.inner_loops()), key=_longest)
    found["gather"] = round(turn.instructions / GATHERED, 2)
    return found


def _longest(tally: Tally) -> tuple[int, ...]:
    """The way of a live tile: nothing but a dead tile jumps here."""
    return tally.products, tally.instructions


def of_layers(
    layers: Mapping[str, Sequence[Tensor]], costs: Mapping[str, float], blocks: int, lengths: Sequence[int] = LENGTHS
) -> Iterator[Row]:
    """A row for each case, length and layer: means over the blocks of all heads."""
    table = {line.part: line.instructions for line in _budgets()}
    for length in lengths:
        for alpha, scale in CASES:
            for name, (query, key, *_) in layers.items():
                drawn = scores(query[0, :, :length], key[0, :, :length], scale, blocks)
                kinds = [kind_of_block(x, alpha) for x in drawn]
                means = {what: sum(kind[what] for kind in kinds) / len(kinds) for what in kinds[0]}
                times = [clocks_of(kind, table, costs) for kind in kinds]
                means |= {way: sum(time[way] for time in times) / len(times) for way in times[0]}
                row: Row = {"tokens": length, "alpha": alpha, "scale": scale, "layer": name, "blocks": len(kinds)}
                row |= {what: round(value, 4) for what, value in means.items()}
                print(row, flush=True)
                yield row


def _budgets() -> list[count_instructions.Line]:
    """The plain forward's lines in the table: sm90, bfloat16, heads of 64, alpha = 1/2, of the newest Triton in it."""
    lines = [
        line
        for line in count_instructions.read().values()
        if (line.target, line.dtype, line.size, line.alpha) == ("sm90", "bfloat16", SIZE, "0.5") and line.part in PARTS
    ]
    newest = max((line.triton for line in lines), key=lambda version: [*map(int, version.split("."))])
    return [line for line in lines if line.triton == newest]


def scores(query: Tensor, key: Tensor, scale: float, blocks: int) -> Iterator[Tensor]:
    """(128, keys up to the last query) of blocks spread evenly over each head's queries, float64; -inf behind the query."""
    heads, length = query.shape[0], query.shape[1]
    group, n_blocks = heads // key.shape[0], length // WIDE
    behind = torch.ones(WIDE, WIDE, dtype=torch.bool).triu(1)
    for head in range(heads):
        for i in range(blocks):
            first = (2 * i + 1) * n_blocks // (2 * blocks) * WIDE
            rows = query[head, first : first + WIDE].double()
            x = rows @ key[head // group, : first + WIDE].double().T * (scale / query.shape[2] ** 0.5)
            x[:, first:].masked_fill_(behind, -torch.inf)
            yield x


def kind_of_block(x: Tensor, alpha: float) -> dict[str, float]:
    """Of 128 queries, which the first kernel takes in halves: tiles seen; shares of tiles and keys; evaluations by share."""
    weighed = diffmax.diffmax_bisect(x, alpha=alpha) > 0
    tiles, e = x.shape[1] // TILE, 1 - alpha
    ways = [count_products.follow(half, e, "bfloat16", False) for half in x.split(TILE)]
    # before the first further evaluation: what may have a weight, by the threshold's certain bound
    low = torch.cat([way.low for way in ways])
    possible = e * (x - x.amax(1, keepdim=True)) - low[:, None] + 1 > 0

    def of_halves(found: Sequence[float]) -> float:
        return sum(found) / len(found)

    def of_keys(entries: Tensor, rows: int) -> float:
        """The keys with such an entry for one of `rows` queries, in whole tiles."""
        counts = [int(part.any(0).sum()) for part in entries.split(rows)]
        return of_halves([-(-count // TILE) / tiles for count in counts])

    def of_tiles(rows: int) -> float:
        return of_halves(
            [part.unflatten(1, (tiles, TILE)).any(2).any(0).double().mean().item() for part in weighed.split(rows)]
        )

    return {
        "tiles": tiles,
        "zeros": 1 - (weighed.sum() / (x > -torch.inf).sum()).item(),
        "tiles with a weight": of_tiles(TILE),
        "for 128 queries": of_tiles(WIDE),
        "keys with a weight": of_halves([part.any(0).double().mean().item() for part in weighed.split(TILE)]),
        "keys that may have one": of_halves([part.any(0).double().mean().item() for part in possible.split(TILE)]),
        "in whole tiles": of_keys(possible, TILE),
        "in whole tiles, for 128 queries": of_keys(possible, WIDE),
        "weights per query": weighed.sum(1).double().mean().item(),
        "first further evaluation": of_halves([sum(way.further[:1]) for way in ways]),
        "later evaluations": of_halves([sum(way.further[1:]) for way in ways]),
        "number of them": of_halves([len(way.further[1:]) for way in ways]),
        "passes of the output": max(way.passes for way in ways),
    }


def clocks_of(kind: Mapping[str, float], table: Mapping[str, float], costs: Mapping[str, float]) -> dict[str, float]:
    """Clocks of a multiprocessor for 64 queries: as it is, and with either kind of note if an evaluation can note."""
    live, first, passes = (kind[of] for of in ("tiles with a weight", "first further evaluation", "passes of the output"))
    further_pass, output_pass = (clocks(part, table[part]) for part in ("further pass", "output, inference"))
    before = live * clocks("dense pass", table["dense pass"]) + (1 - live) * clocks(
        "dense pass, dead", table["dense pass, dead"]
    )
    later = kind["later evaluations"] * further_pass
    now = before + first * further_pass + later + passes * kind["for 128 queries"] * output_pass

    def noted(what: str) -> float:
        return before + first * clocks("further pass", table["further pass"] + costs[what] - costs["nothing"])

    # scores again, and values: a row of each from the L2 cache for each weight, each with the instructions of a gather
    of_weight = max(2 * costs["gather"] / WARPS_ISSUED, 2 * SIZE * 2 / BYTES_PER_CLOCK)
    by_entry = noted("bits") + later + passes * TILE * kind["weights per query"] * of_weight / kind["tiles"]
    # the later passes take tiles made of the noted keys
    by_key = noted("keys") + kind["number of them"] * kind["in whole tiles"] * further_pass
    by_key += passes * kind["in whole tiles, for 128 queries"] * output_pass
    ways = {"now": now, "gather": by_entry if first else now, "keys": by_key if first else now}
    return {way: kind["tiles"] * time for way, time in ways.items()}


def table(result: Row) -> str:
    """Instructions, and a table of means over the layers, with the layers that each way gains most and least in."""
    costs, rows = result["instructions"], result["layers"]
    lines = ["| the dense pass notes | instructions per score, live | dead |", "|---|---|---|"]
    lines += [f"| {note} | {costs[note]:.1f} | {costs[f'{note}, dead']:.1f} |" for note in NOTES]
    shown = (
        "zeros",
        "tiles with a weight",
        "for 128 queries",
        "keys with a weight",
        "keys that may have one",
        "weights per query",
    )
    lines += [f"gather: {costs['gather']:.1f} instructions of a warp per weight", ""]
    lines += [
        f"| tokens | alpha | scale | {' | '.join(shown)} | gather, times now | keys, times now |",
        "|---" * (len(shown) + 5) + "|",
    ]
    for case in dict.fromkeys((row["tokens"], row["alpha"], row["scale"]) for row in rows):
        own = [row for row in rows if (row["tokens"], row["alpha"], row["scale"]) == case]
        means = [f"{sum(row[what] for row in own) / len(own):.2f}" for what in shown]
        ratios = []
        for way in ("gather", "keys"):
            each = [row[way] / row["now"] for row in own]
            whole = sum(row[way] for row in own) / sum(row["now"] for row in own)
            ratios.append(f"{whole:.2f} ({min(each):.2f} to {max(each):.2f} by layer)")
        lines.append(f"| {' | '.join(map(str, case))} | {' | '.join([*means, *ratios])} |")
    return "\n".join(lines)


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
