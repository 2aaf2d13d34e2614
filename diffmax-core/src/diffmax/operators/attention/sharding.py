"""How attention may be sharded: along the batch and along heads, of which each has its own alpha, sink and slope."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffmax.operators.attention import operator
from diffmax.operators.common.placements import INDEPENDENT, Result, rule

_TENSORS = {"query": "BHLD", "key": "BHSD", "value": "BHSD"}
_CALL = {
    "e_tensor": "H",
    "mask": "BHLS",
    "cu_seqlens_q": "",
    "cu_seqlens_k": "",
    "bias": "BHLS",
    "alibi": "BH",
    "sink": "H",
    "seed": "",
}


def _allowed(given: Mapping[str, Any]) -> str:
    """With dropout nothing: which weights are dropped depends on their place in the whole."""
    return "" if given.get("dropout_p", 0.0) > 0 else INDEPENDENT


RULES = {
    "attention": rule(
        operator.FORWARD,
        {**_TENSORS, **_CALL},
        {
            "out": Result("BHLD"),
            "m": Result("BHL"),
            "delta": Result("BHL"),
            "u": Result("BHLD", made=lambda given: given["keep"]),
            "live": Result("BHT", made=lambda given: given["keep"] or given["stats"]),
            "support": Result("BHL", made=lambda given: given["stats"]),
        },
        _allowed,
    ),
    "attention_backward": rule(
        operator.BACKWARD,
        {"grad": "BHLD", **_TENSORS, "m": "BHL", "delta": "BHL", "u": "BHLD", "live": "BHT", **_CALL},
        {
            "query": Result("BHLD", like="query"),
            "key": Result("BHSD", like="key"),
            "value": Result("BHSD", like="value"),
            "e": Result("BHL", made=lambda given: given["needs_e"]),
            "bias": Result("BHLS", like="bias", made=lambda given: given["needs_bias"]),
            "sink": Result("BHL", made=lambda given: given["needs_sink"]),
        },
        _allowed,
    ),
}
