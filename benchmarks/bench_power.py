"""Power attention on the CPU against torch's attention and retention's reference: training and decoding, by length.

    python -m benchmarks.bench_power               # 1k to 64k tokens, on one thread; about 8 minutes
    python -m benchmarks.bench_power --only decode
    python -m benchmarks.bench_power --quick
    python -m benchmarks.bench_power --draw RESULT.json

In float32, in processor time. Of one head: "forward", and "both", the forward and all gradients, of gates too. Of `DECODING`
heads, as a layer has them: "decode", a token after so many others, with a state and a tail, folded into it every `TAIL`
tokens. diffmax is measured as a user gets it: with the best backend that is installed. Of degree 4, retention has the
quadratic form alone, and so no decoding. Its chunks are of `CHUNK` tokens, with which it was fastest here. Outputs and
gradients are checked against the float64 reference first.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, scaled_dot_product_attention

import diffmax
from benchmarks import harness
from benchmarks.bench_attention import ULP, difference, outcome, step
from benchmarks.environment import ROOT
from benchmarks.harness import Call, Row
from benchmarks.memory import peak_bytes
from benchmarks.report import target, targets_block
from diffmax import power

Attention = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

SHAPES = ((32, 2), (64, 2), (16, 4), (32, 4))  # size of a head, degree
LENGTHS = {  # by operation and degree
    ("forward", 2): (1024, 2048, 4096, 8192, 16384, 32768, 65536),
    ("forward", 4): (1024, 4096, 16384),
    ("both", 2): (1024, 4096, 8192, 16384),
    ("both", 4): (1024, 4096),
    ("decode", 2): (1024, 4096, 16384, 65536),
    ("decode", 4): (1024, 4096, 16384, 65536),
}
QUADRATIC = 4096  # retention's quadratic form, with its matrices in memory, up to this length
CHECKED, CHUNK, TAIL, DECODING = 320, 256, 128, 8
SHOWN = 16384  # peak memory is measured up to this length: it takes a call of its own
ROUNDS = 3
PLOT = ROOT / "docs" / "images" / "power_attention.svg"
COLORS = {"sdpa": "tab:gray", "retention": "tab:orange", "diffmax": "tab:blue"}


def main(arguments: list[str]) -> None:
    parser = harness.command_line("bench_power", __doc__ or "")
    parser.add_argument("--draw", type=Path, metavar="RESULT", help="draw the plot of a result, and measure nothing")
    parser.add_argument(
        "--plot", type=Path, help="where the plot goes (default: docs/images/power_attention.svg; quick: nowhere)"
    )
    parser.add_argument("--only", choices=("forward", "both", "decode"), help="these cells alone, without a plot")
    options = parser.parse_args(arguments)
    if options.draw:
        draw(json.loads(options.draw.read_text()), options.plot or PLOT)
        return
    chosen = [case for case in cells(options.quick) if options.only in (None, case["operation"])]
    plot = options.plot or (None if options.quick or options.only else PLOT)

    def found() -> Row:
        with harness.threads(1):
            rows = harness.rows_of(chosen, lambda case: run_case(case, 1 if options.quick else ROUNDS))
        try:
            rival = importlib.metadata.version("retention")
        except importlib.metadata.PackageNotFoundError:
            rival = None
        return {"retention": rival, "crossovers": crossovers(rows), "targets": targets(rows), "rows": rows}

    def show(result: Row) -> str:
        return f"{table(result['rows'])}\n{_crossings(result['crossovers'])}\n{targets_block(result['targets'])}"

    harness.publish("bench_power", arguments, options.output, found, show)
    if plot is not None:
        result = Path(options.output) if options.output else _newest()
        draw(json.loads(result.read_text()), plot)


def cells(quick: bool) -> list[Row]:
    found = []
    for operation in ("forward", "both", "decode"):
        for size, degree in SHAPES:
            lengths = (512,) if quick else LENGTHS[operation, degree]
            found += harness.grid(operation=(operation,), size=(size,), degree=(degree,), length=lengths, threads=(1,))
    return found


def inputs(size: int, length: int, seed: int = 0, heads: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """query, key, value (1, heads, length, size) and log gates (1, heads, length), near 0.98."""
    generator = torch.Generator().manual_seed(seed)
    query, key, value = torch.randn(3, 1, heads, length, size, generator=generator).unbind()
    return query, key, value, logsigmoid(torch.randn(1, heads, length, generator=generator) + 4)


def attentions(case: Row) -> dict[str, Attention]:
    """By name, functions of query, key, value and log gates, which torch's attention has not."""
    degree, is_chunked = case["degree"], case["degree"] == 2

    def theirs(query: Tensor, key: Tensor, value: Tensor, log_gates: Tensor) -> Tensor:
        from retention.reference import power_retention

        tokens = [t.transpose(1, 2) for t in (query, key, value, log_gates)]
        tokens = [t if t.is_contiguous() else t.contiguous() for t in tokens]
        chunk = CHUNK if is_chunked and query.shape[2] > CHUNK else None
        return power_retention(*tokens, deg=degree, chunk_size=chunk).transpose(1, 2)

    field: dict[str, Attention] = {
        "sdpa": lambda query, key, value, log_gates: scaled_dot_product_attention(query, key, value, is_causal=True),
        "diffmax": lambda query, key, value, log_gates: diffmax.power_attention(query, key, value, log_gates, degree=degree),
    }
    return field | ({"retention": theirs} if is_chunked or case["length"] <= QUADRATIC else {})


def decoders(case: Row) -> dict[str, Callable[[Sequence[Tensor]], list[Tensor]]]:
    """By name, functions that decode the last `TAIL` tokens of query, key, value and log gates, after the others were read."""
    degree, past = case["degree"], case["length"] - TAIL

    def dense(tokens: Sequence[Tensor]) -> list[Tensor]:
        query, key, value = tokens[:3]
        return [scaled_dot_product_attention(query[:, :, t : t + 1], key, value) for t in range(past, past + TAIL)]

    def ours(tokens: Sequence[Tensor]) -> list[Tensor]:
        query, key, value, log_gates, *state = tokens
        found, given = [], diffmax.PowerState(*state)
        for t in range(past, past + TAIL):
            tail = (x[:, :, past : t + 1] for x in (key, value, log_gates))
            decoded = power.inference(query[:, :, t : t + 1], *tail, given, degree=degree, switch_over=TAIL)
            found.append(decoded.out)
        return found

    def theirs(tokens: Sequence[Tensor]) -> list[Tensor]:
        from retention.reference import power_retention_inference

        query, key, value, log_gates, sums, norm = tokens
        found = []
        for t in range(past, past + TAIL):
            tail = (x[:, past : t + 1] for x in (key, value, log_gates))
            out, _, _ = power_retention_inference(query[:, t : t + 1], *tail, sums, norm, deg=degree, switch_over_seq_len=TAIL)
            found.append(out)
        return found

    return {"sdpa": dense, "diffmax": ours} | ({"retention": theirs} if degree == 2 else {})


def run_case(case: Row, rounds: int) -> list[Row]:
    """One row per contestant; who fails its check, or raises, is not timed and keeps the reason."""
    prepare = prepare_decoding if case["operation"] == "decode" else prepare_attention
    names = decoders(case) if case["operation"] == "decode" else attentions(case)
    tokens = TAIL if case["operation"] == "decode" else case["length"]

    def memory(call: Call) -> Row:
        return {"peak_bytes": peak_bytes(call) if case["length"] <= SHOWN else None}

    rows = {name: {"contestant": name, **case} for name in names}
    found = harness.measure(rows, lambda name: prepare(name, case), rounds, ("sdpa", "retention"), memory)
    return [row | ({"token_s": float(f"{row['median_s'] / tokens:.4g}")} if "median_s" in row else {}) for row in found]


def prepare_attention(name: str, case: Row) -> tuple[Row, Call]:
    """Outputs and gradients at a shorter length against float64; what is timed at the cell's."""
    short = {**case, "length": min(case["length"], CHECKED)}
    function, checked = attentions(short)[name], inputs(case["size"], short["length"], seed=1)
    some = slice(3) if name == "sdpa" else slice(4)

    def alone(*tensors: Tensor) -> Tensor:
        return function(*tensors, *checked[len(tensors) :])

    def exact(*tensors: Tensor) -> Tensor:
        if name == "sdpa":
            return alone(*tensors)
        return diffmax.power_attention(*tensors, degree=case["degree"], backend="reference")

    reason = difference(*(outcome(f, checked[some], d) for f, d in ((alone, torch.float32), (exact, torch.float64))))
    whole, timed = attentions(case)[name], inputs(case["size"], case["length"])
    return {"reason": reason}, step(lambda *tensors: whole(*tensors, *timed[len(tensors) :]), timed[some], case["operation"])


def prepare_decoding(name: str, case: Row) -> tuple[Row, Call]:
    """Every token of the tail against attention over the whole sequence in float64, at a shorter length."""
    short = {**case, "length": CHECKED}
    with torch.no_grad():
        given = inputs(case["size"], CHECKED, 1, DECODING)
        got = torch.cat(decoders(short)[name](_with_state(name, given, case["degree"])), 1 if name == "retention" else 2)
        got = got.transpose(1, 2) if name == "retention" else got
        wide = [t.double() for t in given]
        if name == "sdpa":
            exact = scaled_dot_product_attention(wide[0][:, :, -TAIL:], *wide[1:3])
        else:
            exact = diffmax.power_attention(*wide, degree=case["degree"], backend="reference")[:, :, -TAIL:]
        tokens = _with_state(name, inputs(case["size"], case["length"], 0, DECODING), case["degree"])
    error = ((got - exact).abs().mean() / exact.abs().max().clamp_min(1.0)).item() / torch.finfo(torch.float32).eps
    reason = None if error <= ULP else f"the output errs by {error:.0f} ulp, allowed {ULP}"
    return {"reason": reason}, torch.no_grad()(lambda: decoders(case)[name](tokens))


def _with_state(name: str, tokens: Sequence[Tensor], degree: int) -> list[Tensor]:
    """The tokens in a contestant's layout, and its state of all but the last `TAIL`."""
    if name == "sdpa":
        return list(tokens)
    past, size = slice(tokens[0].shape[2] - TAIL), tokens[0].shape[3]
    _, state = diffmax.power_attention(*(t[:, :, past] for t in tokens), degree=degree, return_final_state=True)
    if name == "diffmax":
        return [*tokens, *state]
    return [*(t.transpose(1, 2).contiguous() for t in tokens), *power.to_tiled(state, size, degree)]


def targets(rows: list[Row]) -> list[dict[str, Any]]:
    """The goals that these rows can speak about: all for heads of 32 and degree 2."""
    found = []
    for operation in ("forward", "both"):
        ratio = _ratio(rows, operation, 8192, "ratio_retention")
        value = None if ratio is None else 1 / ratio
        found.append(
            target("diffmax", f"{operation}, 8k tokens, D=32, p=2: times faster than retention's reference", ">=", 5, value)
        )
    ratio = _ratio(rows, "forward", 16384, "ratio_sdpa")
    found.append(target("diffmax", "forward, 16k tokens, D=32, p=2: times sdpa", "<=", 1, ratio))
    return [goal for goal in found if goal is not None]


def _ratio(rows: list[Row], operation: str, length: int, what: str) -> float | None:
    cell = {"operation": operation, "length": length, "size": 32, "degree": 2, "contestant": "diffmax"}
    return next((row[what] for row in rows if row["correct"] and all(row[k] == v for k, v in cell.items())), None)


def crossovers(rows: list[Row]) -> list[Row]:
    """From which measured length on diffmax is always faster than torch's attention; None: at none."""
    found = []
    for case in {(row["operation"], row["size"], row["degree"]): None for row in rows}:
        cell = dict(zip(("operation", "size", "degree"), case, strict=True))
        own = [r for r in rows if r["contestant"] == "diffmax" and r["correct"] and all(r[k] == v for k, v in cell.items())]
        best = None
        for row in sorted(own, key=lambda row: -row["length"]):
            if row["ratio_sdpa"] is None or row["ratio_sdpa"] >= 1:
                break
            best = row["length"]
        found.append({**cell, "faster_from": best})
    return found


def _crossings(found: list[Row]) -> str:
    lines = [
        f"  {row['operation']}, D={row['size']}, p={row['degree']}: "
        + (f"{row['faster_from']} tokens" if row["faster_from"] else "no measured length")
        for row in found
    ]
    return "\n".join(["\nfaster than sdpa from", *lines])


def table(rows: list[Row]) -> str:
    title = f"one head, decoding {DECODING}, float32, one thread; times sdpa's time (microseconds per token)"
    return harness.table(
        title,
        rows,
        "sdpa",
        tables=("operation",),
        lines=("size", "degree", "length"),
        note=lambda row: f" ({1e6 * row['token_s']:.3g})",
    )


def draw(result: Row, path: Path) -> None:
    """Microseconds per token by length, one panel per operation, of degree 2 and heads of 32."""
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "diffmax", "svg.fonttype": "none"}):  # the same file from the same result
        _draw(result, path)


def _draw(result: Row, path: Path) -> None:
    from matplotlib.figure import Figure

    rows = [row for row in result["rows"] if row["correct"] and "token_s" in row and row["degree"] == 2]
    operations, sizes = list(dict.fromkeys(row["operation"] for row in rows)), sorted({row["size"] for row in rows})
    figure = Figure(figsize=(3.4 * len(operations), 3.4), layout="constrained")
    panels = figure.subplots(1, len(operations), squeeze=False)
    for axes, operation in zip(panels[0], operations, strict=True):
        for name, color in COLORS.items():
            for size in sizes:
                own = [r for r in rows if (r["operation"], r["contestant"], r["size"]) == (operation, name, size)]
                points = sorted((row["length"], 1e6 * row["token_s"]) for row in own)
                if points:
                    dashed = "-" if size == sizes[0] else "--"
                    axes.plot(
                        *zip(*points, strict=True), dashed, color=color, marker="o", markersize=3, label=f"{name}, D = {size}"
                    )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        lengths = sorted({row["length"] for row in rows if row["operation"] == operation})
        axes.set_xticks(lengths, [f"{n // 1024}k" if n >= 1024 else str(n) for n in lengths], fontsize=8)
        axes.set_title(
            {"both": "forward and backward", "decode": f"decode, {DECODING} heads"}.get(operation, operation), fontsize=10
        )
        axes.set_xlabel("tokens")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel("microseconds per token")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    env = result["environment"]
    note = f"p = 2, float32, one thread, {env['device']}, torch {env['packages']['torch']}, commit {env['commit']}"
    figure.suptitle(note, fontsize=7, color="gray")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def _newest() -> Path:
    """The result that was just written."""
    return max((ROOT / "benchmarks" / "results").glob("*/*-power.json"), key=lambda path: path.stat().st_mtime)


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
