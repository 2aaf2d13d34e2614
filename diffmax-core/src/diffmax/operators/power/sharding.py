"""How power attention may be sharded: along the batch and along heads, of which each has its own gates and state."""

from __future__ import annotations

from diffmax.operators.common.placements import Result, rule
from diffmax.operators.power import operator

_TENSORS = {"query": "BHLD", "key": "BHSD", "value": "BHSD"}
_CALL = {"log_gates": "BHS", "sums": "BHPD", "norm": "BHP"}

RULES = {
    "power_attention": rule(
        operator.FORWARD,
        {**_TENSORS, **_CALL},
        {
            "out": Result("BHLD"),
            "total": Result("BHL", made=lambda given: given["keep"]),
            "sums": Result("BHPD", like="key", summed=False, made=lambda given: given.get("final", False)),
            "norm": Result("BHP", like="key", summed=False, made=lambda given: given.get("final", False)),
            "exact": Result("BHLD", made=lambda given: given["keep"]),
        },
    ),
    "power_attention_backward": rule(
        operator.BACKWARD,
        {"grad": "BHLD", "grad_sums": "BHPD", "grad_norm": "BHP", **_TENSORS, "out": "BHLD", "total": "BHL", **_CALL},
        {
            "query": Result("BHLD", like="query"),
            "key": Result("BHSD", like="key"),
            "value": Result("BHSD", like="value"),
            "log_gates": Result("BHS", like="log_gates", made=lambda given: given["needs_log_gates"]),
            "sums": Result("BHPD", like="sums", made=lambda given: given["needs_state"]),
            "norm": Result("BHP", like="norm", made=lambda given: given["needs_state"]),
        },
    ),
}
