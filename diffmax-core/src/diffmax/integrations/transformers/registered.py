"""The registered alphas that a transformers model uses."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import nn

from diffmax.integrations.transformers.attention import ModelAlpha, _attend_registered


def alphas_of(model: nn.Module) -> Iterator[ModelAlpha]:
    """The alpha of each registered diffmax attention that a configuration in the model names, each once."""
    from transformers import AttentionInterface

    functions = AttentionInterface()
    names = {getattr(getattr(module, "config", None), "_attn_implementation", None) for module in model.modules()}
    for name in sorted(name for name in names if isinstance(name, str)):
        function: Any = functions.get(name)
        if isinstance(function, partial) and function.func is _attend_registered:
            yield function.keywords["alpha"]
