"""Bytes and time of context parallel attention on up to 1024 ranks, by a model: nothing is sent and nothing is measured.

    python -m benchmarks.simulate_ranks [--tokens 1048576] [--output FILE]

One causal layer, forward, of one sequence in bfloat16. Assumptions:

- A message takes its latency and its bytes over the bandwidth. Up to 8 ranks are one node (5 us, 300 GB/s a rank), more are
  nodes of 8 (10 us, 50 GB/s a rank). An all-gather is a ring of n - 1 steps, an all-to-all sends n - 1 messages one after the
  other. The agreement is a ring of 2 (n - 1) steps. Nothing overlaps with anything.
- Products run at 300 TFLOP/s: one dense Q K^T of what the layout and causality leave, then Q K^T and P V of the live tiles.
- The bytes are those of Eq. 41, 42 and 49 of docs/distributed.md; the zigzag layout, so that all ranks compute alike.
- Live tiles, of 64 queries and 64 keys, are those of a model, by head: examples/results/lm.json. They were measured on 2048
  tokens; longer sequences are likely to have more empty tiles.
- "live_blocks" sends keys that are live for any query of a rank. Between two bounds: "least", if the same keys are live for all
  tiles of queries, so that the share sent is the share of live tiles; "most", if tiles of queries choose independently, so that
  it is 1 - (1 - live)^(tiles of a rank). Both take it that Eq. 48 finds every empty tile, which it does not for keys that are
  spread out. Its bounds are a product of all queries with all means.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
SHARES = ROOT / "examples" / "results" / "lm.json"
RESULT = Path(__file__).with_name("simulated_ranks.json")

HEADS, KV_HEADS, DIM, WIDTH = 32, 8, 128, 2
FLOPS, NODE = 300e12, 8
TILE, BLOCK = 64, 32
RANKS = (8, 32, 128, 512, 1024)
POINTS = ("2048/0.85/matched", "2048/0.75/matched", "2048/0.5/matched")


class Link(NamedTuple):
    """Seconds of a message, and bytes per second of a rank."""

    latency: float
    bandwidth: float


def link(ranks: int) -> Link:
    """The slowest of the links between the ranks."""
    return Link(5e-6, 300e9) if ranks <= NODE else Link(10e-6, 50e9)


def bytes_sent(method: str, ranks: int, tokens: int, share: float = 1.0) -> float:
    """Of a rank, forward: Eq. 41, 42, or 49 with the share f."""
    own = tokens / ranks
    if method == "ulysses":
        return (ranks - 1) / ranks * own * (HEADS + KV_HEADS) * 2 * DIM * WIDTH
    if method == "all_gather":
        return (ranks - 1) * own * KV_HEADS * 2 * DIM * WIDTH
    return (ranks - 1) * KV_HEADS * (own / BLOCK * (4 * (DIM + 1) + 1) + share * own * 2 * DIM * WIDTH)


def seconds(method: str, ranks: int, tokens: int, live: float, share: float = 1.0) -> dict[str, float]:
    """Of messages and of products, of a rank, forward."""
    latency, bandwidth = link(ranks)
    passes = {"ulysses": 2, "all_gather": 1, "live_blocks": 3}[method]
    messages = ((ranks - 1) * passes + 2 * (ranks - 1)) * latency + bytes_sent(method, ranks, tokens, share) / bandwidth
    product = 2 * HEADS * DIM * tokens * tokens / 2 / ranks / FLOPS
    bounds = 2 * product / BLOCK if method == "live_blocks" else 0.0  # against the mean of every block, seen or not
    return {"messages": messages, "products": product * (1 + 2 * live) + bounds}


def shares(live: Sequence[float], ranks: int, tokens: int) -> tuple[float, float]:
    """The least and the most of the other ranks' keys that a rank is sent, mean of the heads; causality leaves 3/4 of them."""
    tiles = tokens / ranks / TILE
    visible = (3 * ranks - 1) / (4 * ranks)
    return tuple(  # type: ignore[return-value]
        visible * sum(of_heads) / len(live) for of_heads in (live, [1 - (1 - share) ** tiles for share in live])
    )


def simulate(tokens: int) -> list[dict[str, Any]]:
    """A row for each model point, number of ranks and method."""
    points = json.loads(SHARES.read_text())["points"]
    rows = []
    for point in POINTS:
        live = [1 - empty for layer in points[point]["empty_tiles_by_head"] for empty in layer]
        mean = sum(live) / len(live)
        for ranks in RANKS:
            least, most = shares(live, ranks, tokens)
            cases: list[tuple[str, str, float]] = [("all_gather", "", 1.0)]
            if KV_HEADS % ranks == 0:
                cases.insert(0, ("ulysses", "", 1.0))
            cases += [("live_blocks", "least", least), ("live_blocks", "most", most)]
            for method, bound, share in cases:
                row: dict[str, Any] = {"point": point, "live": round(mean, 4), "ranks": ranks, "method": method, "bound": bound}
                row |= {"share": round(share, 4), "gigabytes": round(bytes_sent(method, ranks, tokens, share) / 1e9, 4)}
                took = seconds(method, ranks, tokens, mean, share)
                rows.append(row | {what: round(1e3 * s, 3) for what, s in took.items()})  # in ms
    return rows


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The table of docs/distributed.md: "least" and "most" in one line."""
    lines = [
        "| alpha | live tiles | ranks | method | GB a rank | messages, ms | products, ms |",
        "|---|---|---|---|---|---|---|",
    ]
    merged: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        merged.setdefault((row["point"].split("/")[1], row["live"], row["ranks"], row["method"]), []).append(row)
    for (alpha, live, ranks, method), of_method in merged.items():
        cells = []
        for what, digits in (("gigabytes", 2), ("messages", 1), ("products", 1)):
            cells.append(" to ".join(dict.fromkeys(f"{row[what]:.{digits}f}" for row in of_method)))
        lines.append(f"| {alpha} | {live:.2f} | {ranks} | {method} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    """Print the table; write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1 << 20)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    rows = simulate(given.tokens)
    print("\n".join(table(rows)))
    if given.output:
        settings = {"tokens": given.tokens, "heads": HEADS, "kv_heads": KV_HEADS, "dim": DIM, "flops": FLOPS, "node": NODE}
        links = {"in a node": link(NODE)._asdict(), "between": link(NODE + 1)._asdict()}
        written = {"simulated": True, "settings": settings | {"links": links}, "rows": rows}
        given.output.write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main()
