"""The alphas and scales of a model's heads, where its configuration keeps them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

# The attn_implementation of a model with heads of its own.
NAME = "diffmax-adapted"

# Per attention layer, by its name in the model: the alpha of each head, and the scale of its scores.
Heads: TypeAlias = "dict[str, dict[str, list[float]]]"


def heads_of(config: Any) -> Heads:
    """What `replace` wrote into a configuration, spoilt or not; empty if that has nothing, or another's entry of that name."""
    found = getattr(config, "diffmax", None)
    if not isinstance(found, Mapping):
        return {}
    ours = any(isinstance(of_layer, Mapping) and {"alpha", "scale"} & set(of_layer) for of_layer in found.values())
    return dict(found) if ours else {}


def parts_of(config: Any) -> dict[str, Any]:
    """The configurations of the parts of a composite model, by their names in its own."""
    found = {key: getattr(config, key, None) for key in getattr(config, "sub_configs", ())}
    return {key: part for key, part in found.items() if part is not None}


def refuse_anothers(config: Any) -> None:
    """Refuse to write over an entry of another's."""
    found = getattr(config, "diffmax", None)
    if found and not heads_of(config):
        raise ValueError(
            f"replace: the entry diffmax of the {type(config).__name__} must be free, got {found!r}\nmove it to another name"
        )
