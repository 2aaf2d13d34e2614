"""What torch's FlopCounterMode counts for diffmax's operators: nominal figures, in which a power is one operation.

Importing this module tells torch. `import diffmax` does so only if `torch.utils.flop_counter` has been imported before: that
imports triton, which an import of diffmax must not.

Forward, per score: the maximum, a subtraction and a product; four evaluations of a difference, two powers and two sums (the
iterations of a row with unit variance, docs/performance.md); the division. Backward: a power, two products, two sums, a
difference and a product. The loss adds a power and a sum; its backward is a difference and a product.

Attention counts as torch's fused own does, whatever a mask or alpha leaves to skip: its dense matrix products, two forward and
five backward; of packed sequences each one's own, of caches over their whole length. Its row operator is not counted,
as softmax is not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.flop_counter import flop_registry, register_flop_formula

from diffmax.operators.attention.operator import BACKWARD, FORWARD
from diffmax.operators.decoding.operator import SCHEMA
from diffmax.plugin import AttentionCall

FORWARD_FLOPS = 3 + 4 * 5 + 1
BACKWARD_FLOPS = 7
LOSS_FLOPS = 2


def _bisect(x_shape: Sequence[int], *_: Any, **__: Any) -> int:
    return FORWARD_FLOPS * math.prod(x_shape)


def _bisect_backward(grad_shape: Sequence[int], *_: Any, **__: Any) -> int:
    return BACKWARD_FLOPS * math.prod(grad_shape)


def _attention(*flat: Any, **_: Any) -> int:
    given = FORWARD.rebuild(flat)
    return 2 * _pairs(given.query, given.key, given.call) * (given.query.shape[3] + given.value.shape[3])


def _attention_backward(*flat: Any, **_: Any) -> int:
    given = BACKWARD.rebuild(flat)
    # scores once more, and the gradients of query and key; those of weights and value
    return 2 * _pairs(given.query, given.key, given.call) * (3 * given.query.shape[3] + 2 * given.value.shape[3])


def _attention_kvcache(*flat: Any, **_: Any) -> int:
    given = SCHEMA.rebuild(flat)
    query, k_cache, table = given.query, given.k_cache, given.call.block_table
    keys = k_cache.shape[1] * (1 if table is None else table.shape[1])
    return int(2 * math.prod(query.shape[:3]) * keys * (query.shape[3] + given.v_cache.shape[3]))


def _loss(x_shape: Sequence[int], *_: Any, **__: Any) -> int:
    return (FORWARD_FLOPS + LOSS_FLOPS) * math.prod(x_shape)


def _loss_backward(_grad_shape: Any, x_shape: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * math.prod(x_shape)


def _pairs(query: Tensor, key: Tensor, call: AttentionCall) -> int:
    """Of a query and a key in one sequence, over all heads."""
    if call.cu_seqlens_q is None or call.cu_seqlens_k is None:
        return math.prod(query.shape[:3]) * key.shape[2]
    offsets = (call.cu_seqlens_q, call.cu_seqlens_k)
    if any(t.is_meta or isinstance(t, FakeTensor) for t in offsets):  # lengths are not known: all have the longest
        return query.shape[1] * (len(offsets[0]) - 1) * call.max_seqlen_q * call.max_seqlen_k
    lengths_q, lengths_k = (t.diff().long() for t in offsets)
    return query.shape[1] * int((lengths_q * lengths_k).sum())


if torch.ops.diffmax.bisect not in flop_registry:
    register_flop_formula(torch.ops.diffmax.bisect)(_bisect)
    register_flop_formula(torch.ops.diffmax.bisect_backward)(_bisect_backward)
    register_flop_formula(torch.ops.diffmax.loss)(_loss)
    register_flop_formula(torch.ops.diffmax.loss_backward)(_loss_backward)
    register_flop_formula(torch.ops.diffmax.attention, get_raw=True)(_attention)
    register_flop_formula(torch.ops.diffmax.attention_backward, get_raw=True)(_attention_backward)
    register_flop_formula(torch.ops.diffmax.attention_kvcache, get_raw=True)(_attention_kvcache)
