"""The alphas and scales of a model's heads, where its configuration keeps them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

# Per attention layer, by its name in the model: the alpha of each head, and the scale of its scores.
Heads: TypeAlias = "dict[str, dict[str, list[float]]]"


def heads_of(config: Any) -> Heads:
    """What `replace` wrote into a configuration; empty where there is nothing, or another's entry of that name."""
    found = getattr(config, "diffmax", None)
    if not isinstance(found, Mapping):
        return {}
    ours = all(isinstance(of_layer, Mapping) and set(of_layer) == {"alpha", "scale"} for of_layer in found.values())
    return dict(found) if ours else {}
