"""`python -m benchmarks.bench_revisions BEFORE`: whether a change cost time: two revisions of diffmax, which take turns.

Each revision computes in a process of its own, with its sources before those that are installed. BEFORE and AFTER are anything
that git knows, or "." for the working tree, which AFTER is if it is not given. Only public functions are called, so that old
revisions can take part. The results of both must agree before the clock runs. One thread, processor time.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tarfile
from io import BytesIO
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.harness import Row
from benchmarks.timing import CALLS_PER_TURN, SLOW_SECONDS, summarize

ROOT = Path(__file__).resolve().parents[1]
REVISIONS = ROOT / "build" / "revisions"
AGREE = {"float32": 1e-4, "bfloat16": 2e-2}
WORSE = 1.1
WORKING_TREE = "."
ROUNDS = 7

# What a process of one revision executes: a line with a case prepares its call, a line with a number of calls times them.
WORKER = """
import json, sys, time, torch, diffmax
torch.set_num_threads(1)

def scores(*shape, dtype, requires_grad=True):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    return x.to(getattr(torch, dtype)).requires_grad_(requires_grad)

def function(case):
    dtype, alpha, n = case["dtype"], case["alpha"], case["n"]
    if case["operator"] == "rows":
        x = scores(max(1, 2 ** 19 // n), n, dtype=dtype)
        return lambda: diffmax.diffmax_bisect(x, alpha), (x,)
    if case["operator"] == "loss":
        x, y = scores(8, n, dtype=dtype), torch.arange(8)
        return lambda: diffmax.diffmax_loss(x, y, alpha), (x,)
    q, k, v = (t.detach().requires_grad_() for t in scores(3, 1, 8, n, 64, dtype=dtype))
    if case["operator"] == "decoding":
        q, k, v = (t.detach().transpose(1, 2) for t in (q[:, :, :1], k, v))
        lengths = torch.tensor([n], dtype=torch.int32)
        return lambda: diffmax.attention_with_kvcache(q, k, v, cache_seqlens=lengths, alpha=alpha), ()
    return lambda: diffmax.attention(q, k, v, alpha=alpha, is_causal=case["causal"]), (q, k, v)

def prepare(case):
    call, leaves = function(case)
    out = call()
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    if case["direction"] == "forward":
        return torch.no_grad()(call), [out]
    if case["direction"] == "backward":
        chosen = lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)
    else:
        chosen = lambda: torch.autograd.grad(call(), leaves, grad)
    return chosen, chosen()

for line in sys.stdin:
    asked = json.loads(line)
    try:
        if isinstance(asked, dict):
            call, results = prepare(asked)
            flat = [t.detach().double().flatten() for t in results]
            signs = [torch.randn(len(t), generator=torch.Generator().manual_seed(2)).sign() for t in flat]
            answer = [[t.norm().item(), (t * sign).sum().item()] for t, sign in zip(flat, signs)]
        else:
            answer = []
            for _ in range(asked):
                start = time.process_time()
                call()
                answer.append(time.process_time() - start)
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        answer = f"{type(error).__name__}: {error}".splitlines()[0]
    print(json.dumps(answer), flush=True)
"""


class Revision:
    """A process that computes with the sources of one revision."""

    def __init__(self, name: str) -> None:
        folder = ROOT if name == WORKING_TREE else _checked_out(name)
        sources = os.pathsep.join(str(path) for path in sorted(folder.glob("diffmax-*/src")))
        environ = {**os.environ, "PYTHONPATH": sources, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER], env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, what: Row | int) -> Any:
        """Its answer to a case: the size and a sum of each result; to a number of calls, seconds. A string is an error."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(what) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the process of a revision ended with status {self.process.wait()}")
        return json.loads(answer)

    def stop(self) -> None:
        self.process.communicate()  # closes its input, at which it ends


def main(arguments: list[str]) -> None:
    parser = harness.command_line("bench_revisions", __doc__ or "")
    parser.add_argument("before", help="the revision that is compared with")
    parser.add_argument(
        "after", nargs="?", default=WORKING_TREE, help="the revision that is judged (default: the working tree)"
    )
    options = parser.parse_args(arguments)
    revisions = {"before": Revision(options.before), "after": Revision(options.after)}

    def found() -> Row:
        rows = harness.rows_of(cells(options.quick), lambda case: run_case(case, revisions, 1 if options.quick else ROUNDS))
        return {"before": _commit(options.before), "after": _commit(options.after), "ratios": ratios(rows), "rows": rows}

    try:
        harness.publish("bench_revisions", arguments, options.output, found, shown)
    finally:
        for revision in revisions.values():
            revision.stop()


def cells(quick: bool) -> list[Row]:
    """Every operator in each direction at a few sizes; those of `make bench`, and attention and decoding."""
    every, dtypes, no = ("forward", "backward", "both"), ("float32", "bfloat16"), (False,)
    grid = harness.grid
    if quick:
        return grid(
            operator=("rows", "loss"), direction=("forward", "both"), n=(64,), alpha=(0.5,), dtype=("float32",), causal=(False,)
        )
    return [
        *grid(
            operator=("rows",),
            direction=every,
            n=(16, 197, 336, 1024, 4096, 32768),
            alpha=(0.1, 0.5, 0.85, 0.9),
            dtype=dtypes,
            causal=no,
        ),
        *grid(operator=("loss",), direction=("both",), n=(32768, 131072), alpha=(0.5, 0.85), dtype=dtypes, causal=no),
        *grid(
            operator=("attention",),
            direction=every,
            n=(16, 197, 512, 2048),
            alpha=(0.5, 0.9),
            dtype=dtypes,
            causal=(False, True),
        ),
        *grid(operator=("decoding",), direction=("forward",), n=(16, 1024, 8192), alpha=(0.5, 0.9), dtype=dtypes, causal=no),
    ]


def run_case(case: Row, revisions: dict[str, Revision], rounds: int) -> list[Row]:
    """A row per revision. One that cannot run the case, or whose result is another, has the reason instead of a time."""
    results = {name: revision.ask(case) for name, revision in revisions.items()}
    reasons = {name: result if isinstance(result, str) else None for name, result in results.items()}
    if not any(reasons.values()) and not _agree(results["before"], results["after"], AGREE[case["dtype"]]):
        reasons["after"] = "another result than before"
    able = [name for name, reason in reasons.items() if reason is None]
    samples: dict[str, list[float]] = {name: [] for name in able}
    slow = {name: revisions[name].ask(1)[0] > SLOW_SECONDS for name in able}
    for turn in range(rounds):
        for name in able:
            if not slow[name]:  # one call that does not count, as in `timing.interleave`
                samples[name] += revisions[name].ask(1 + CALLS_PER_TURN)[1:]
            elif turn % 2 == 0:
                samples[name] += revisions[name].ask(1)
    times = {name: summarize(values) for name, values in samples.items()}
    rows = []
    for name in revisions:
        row = {**case, "contestant": name, "correct": reasons[name] is None, "reason": reasons[name], "ratio_before": None}
        if name in times:
            row |= {key: float(f"{value:.4g}") for key, value in times[name].items()} | {"clock": "cpu"}
            if "before" in times:
                row["ratio_before"] = float(f"{times[name]['median_s'] / times['before']['median_s']:.4g}")
        rows.append(row)
    return rows


def _agree(before: list[list[float]], after: list[list[float]], within: float) -> bool:
    """Whether norms agree, and sums with random signs, to some digits of the norm."""
    return all(
        abs(a - b) <= within * norm
        for (norm, *others), other in zip(before, after, strict=True)
        for a, b in zip((norm, *others), other, strict=True)
    )


def ratios(rows: list[Row]) -> list[Row]:
    """By operator and direction: the middle, least and largest time after over the time before, and how many are worse."""
    groups: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        if row["contestant"] == "after" and row["ratio_before"] is not None:
            groups.setdefault((row["operator"], row["direction"]), []).append(row["ratio_before"])
    return [
        {
            "operator": operator,
            "direction": direction,
            "median": round(statistics.median(values), 3),
            "least": min(values),
            "largest": max(values),
            "cells": len(values),
            "worse": sum(value > WORSE for value in values),
        }
        for (operator, direction), values in groups.items()
    ]


def shown(result: Row) -> str:
    lines = [f"{'':>10} {'':>9} {'median':>7} {'least':>7} {'largest':>8}  time after / before"]
    lines += [
        f"{row['operator']:>10} {row['direction']:>9} {row['median']:7.2f} {row['least']:7.2f} {row['largest']:8.2f}"
        f"  {row['worse']} of {row['cells']} worse by more than {WORSE - 1:.0%}"
        for row in result["ratios"]
    ]
    lines += [
        f"  {row['contestant']}: {row['operator']} {row['direction']}, n {row['n']}, alpha {row['alpha']}, {row['dtype']}: "
        f"{row['reason']}"
        for row in result["rows"]
        if not row["correct"]
    ]
    return "\n".join(lines)


def _checked_out(name: str) -> Path:
    """A folder with the sources of a revision."""
    commit = _commit(name)
    folder = REVISIONS / commit[:10]
    if not folder.exists():
        archive = subprocess.run(["git", "archive", commit], cwd=ROOT, check=True, capture_output=True).stdout
        with tarfile.open(fileobj=BytesIO(archive)) as tar:
            tar.extractall(folder, filter="data")
    return folder


def _commit(name: str) -> str:
    if name == WORKING_TREE:
        return "the working tree"
    done = subprocess.run(["git", "rev-parse", "--verify", f"{name}^{{commit}}"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"bench_revisions: {name!r} is not a revision that git knows here: {done.stderr.strip()}")
    return done.stdout.strip()


if __name__ == "__main__":
    main(sys.argv[1:])
