"""The page of an `AttentionReport`: one HTML file without a network, of bounded size."""

from __future__ import annotations

import html
import json
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor

from diffmax.operators.attention.weights import SparseWeights

MOST_TOKENS = 512
MOST_WEIGHTS = 300_000
# Weights are written as whole numbers of this part of 1.
PARTS = 10_000


def page(layers: list[tuple[str, SparseWeights]], batch: int, labels: dict[int, list[str]]) -> str:
    """The page of one batch entry; `labels` are the tokens' names by their number."""
    heads = sum(weights.shape[1] for _, weights in layers)
    tokens = max(16, min(MOST_TOKENS, MOST_WEIGHTS // (4 * max(1, heads))))
    per_query, notes = _largest_that_fits(layers, batch, tokens), []
    longest = max(labels, default=0)
    if longest > tokens:
        notes.append(f"Of {longest} tokens the first {tokens} are here; weights on later ones are left out.")
    if per_query is not None:
        notes.append(f"Of each token's weights the {per_query} largest are here.")
    data = {
        "parts": PARTS,
        "notes": " ".join(notes),
        "labels": {str(size): [text[:40] for text in names[:tokens]] for size, names in labels.items()},
        "layers": [
            {
                "name": name,
                "queries": weights.shape[2],
                "keys": weights.shape[3],
                "heads": [_of_head(weights.head(batch, h), tokens, per_query) for h in range(weights.shape[1])],
            }
            for name, weights in layers
        ],
    }
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=True)
    text = text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")  # no text of a token ends the script
    return files("diffmax.inspecting").joinpath("page.html").read_text(encoding="utf-8").replace("@data@", text)


def framed(made: str, height: int = 520) -> str:
    """The page for a notebook: in a frame of its own, so that nothing of it meets the notebook's."""
    return (
        f'<iframe srcdoc="{html.escape(made)}" sandbox="allow-scripts" title="attention" '
        f'style="width: 100%; height: {height}px; border: 1px solid #ccc"></iframe>'
    )


def _largest_that_fits(layers: list[tuple[str, SparseWeights]], batch: int, tokens: int) -> int | None:
    """How many weights of a query a page can hold; None: all."""
    counts = [weights.supports()[batch, :, :tokens].flatten() for _, weights in layers]
    every = torch.cat(counts) if counts else torch.zeros(1, dtype=torch.int64)
    limit = int(every.max()) if every.numel() else 0
    if int(every.sum()) <= MOST_WEIGHTS:
        return None
    while limit > 1 and int(every.clamp_max(limit).sum()) > MOST_WEIGHTS:
        limit = max(1, limit * 3 // 4)
    return limit


def _of_head(weights: SparseWeights, tokens: int, per_query: int | None) -> dict[str, Any]:
    """Offsets, keys and weights of the first tokens, the largest weight of a query first."""
    end = int(weights.offsets[min(tokens, weights.shape[0])])
    rows, keys, values = (t[:end] for t in (weights.rows(), weights.indices.long(), weights.values.double()))
    order = values.argsort(descending=True, stable=True)
    order = order[rows[order].argsort(stable=True)]
    rank = torch.arange(end) - weights.offsets[rows]
    kept = keys[order] < tokens
    if per_query is not None:
        kept &= rank < per_query
    order = order[kept]
    counts = torch.bincount(rows[order], minlength=min(tokens, weights.shape[0]))
    return {
        "o": [0, *counts.cumsum(0).tolist()],
        "k": keys[order].tolist(),
        "w": _whole(values[order]),
        "n": weights.supports()[:tokens].tolist(),
        "s": None if weights.sink is None else _whole(weights.sink[:tokens], 0),
    }


def _whole(values: Tensor, least: int = 1) -> list[int]:
    """In parts, at least `least`: a weight that is listed is not 0. NaN is -1."""
    found: list[int] = (values.double() * PARTS).round().clamp_min(least).nan_to_num(-1.0).long().tolist()
    return found
