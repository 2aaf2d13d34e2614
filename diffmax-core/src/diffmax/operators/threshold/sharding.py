"""How threshold attention may be sharded: along the batch and along heads, of which each has its own threshold and bias."""

from __future__ import annotations

from diffmax.operators.common.placements import Result, rule
from diffmax.operators.threshold import operator

_TENSORS = {"query": "BHLD", "key": "BHSD", "value": "BHSD"}
_CALL = {"theta": "BHL", "e_tensor": "H", "bias": "HW", "mask": "BHLS", "cu_seqlens_q": "", "cu_seqlens_k": ""}

RULES = {
    "threshold_attention": rule(
        operator.FORWARD,
        {**_TENSORS, **_CALL},
        {
            "out": Result("BHLD"),
            "mass": Result("BHL"),
            "statistic": Result("BHL", made=lambda given: given["keep"] and given.get("weights", "scores") != "scores"),
        },
    ),
    "threshold_attention_backward": rule(
        operator.BACKWARD,
        {"grad": "BHLD", "grad_mass": "BHL", **_TENSORS, "statistic": "BHL", **_CALL},
        {
            "query": Result("BHLD", like="query"),
            "key": Result("BHSD", like="key"),
            "value": Result("BHSD", like="value"),
            "theta": Result("BHL", made=lambda given: given["needs_theta"]),
            "bias": Result("HW", like="bias", made=lambda given: given["needs_bias"]),
            "e": Result("BHL", made=lambda given: given["needs_e"]),
        },
    ),
}
