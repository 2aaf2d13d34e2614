"""The launcher of threshold attention. A vendor's distribution creates one `ThresholdOperator`.

Nothing waits for the device, and no two programs add to one number: the same input gives the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffmax.kernels.triton.attention.call import aligned, layout_of, rows_of_entries, score_strides, strides
from diffmax.kernels.triton.common.launch import Launch, Plans, on_device, padded, signature
from diffmax.kernels.triton.common.scores import NO_LIMIT, Options
from diffmax.kernels.triton.threshold import settings
from diffmax.kernels.triton.threshold.dbias import threshold_bwd_dbias_kernel
from diffmax.kernels.triton.threshold.dkv import threshold_bwd_dkv_kernel
from diffmax.kernels.triton.threshold.dq import threshold_bwd_dq_kernel
from diffmax.kernels.triton.threshold.output import threshold_out_kernel
from diffmax.plugin import ThresholdCall, ThresholdGradients, ThresholdResults, ThresholdSaved, ThresholdWanted

Names = dict[str, Any]
LENGTH = 64  # of example calls
EACH = 32  # blocks of queries that a program of the bias's gradient walks over


class BackwardPlan(NamedTuple):
    """The launches of a backward; that for the bias only if its gradient is wanted.

    Attributes:
        shares: Partial sums of the gradient for the bias.
        values: Numbers of scratch memory for a head's queries.
    """

    dq: Launch
    dkv: Launch
    dbias: Launch | None
    shares: int
    values: int


class ThresholdOperator:
    """`threshold_attention` and `threshold_attention_backward` for one vendor, as in `diffmax.reference.threshold`.

    Args:
        architecture: A function that returns the architecture of a device, such as "sm90" or "gfx942".
        ptx: Whether the compiler accepts NVIDIA's assembly.
    Attributes:
        precision: Of float32 products: three tf32 products on NVIDIA's matrix cores; AMD's support float32 (decision 0056).
        rounded: Of products of weights with float16 tensors.
        plans: The launch plans of earlier calls.
    """

    def __init__(self, architecture: Callable[[torch.device], str], *, ptx: bool) -> None:
        self.architecture = architecture
        self.ptx = ptx
        self.precision = "tf32x3" if ptx else "ieee"
        self.rounded = "tf32" if ptx else "ieee"
        self.plans = Plans()

    def blocks(self, query: Tensor, value: Tensor) -> settings.Blocks:
        """Settings of the kernels."""
        size = padded(max(query.shape[3], value.shape[3]))
        return settings.blocks(self.architecture(query.device), query.dtype, size)

    def threshold_attention(
        self, query: Tensor, key: Tensor, value: Tensor, call: ThresholdCall, keep: bool
    ) -> ThresholdResults:
        """Forward kernel; arguments and results as `diffmax.reference.threshold.threshold_attention`."""
        out = value.new_empty((*query.shape[:3], value.shape[3]))
        mass = query.new_empty(query.shape[:3], dtype=torch.float32)
        lse = torch.empty_like(mass) if keep and call.weights == "softmax" else mass.new_empty(0)
        if 0 in (query.numel(), key.numel(), value.numel()):
            return ThresholdResults(out.zero_(), mass.zero_(), lse.fill_(-torch.inf))
        query, key, value = (rows_of_entries(t) for t in (query, key, value))
        planned: Launch = self.plans.get(
            signature(query, key, value, *vars(call).values(), keep, query.device, self.precision),
            lambda: self._forward_plan(query, key, value, call, keep),
        )
        with on_device(query.device):
            given = {"q_ptr": query, "k_ptr": key, "v_ptr": value, "out_ptr": out, "mass_ptr": mass, "lse_ptr": lse}
            planned(_tensors(call, query) | given)
        return ThresholdResults(out, mass, lse)

    def threshold_attention_backward(
        self,
        grad: Tensor,
        grad_mass: Tensor | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        saved: ThresholdSaved,
        call: ThresholdCall,
        wanted: ThresholdWanted,
    ) -> ThresholdGradients:
        """Backward kernel; arguments and results as `diffmax.reference.threshold.threshold_attention_backward`."""
        of_query, of_key, of_value = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (query, key, value))
        of_theta = query.new_empty(query.shape[:3] if wanted.theta else (0,), dtype=torch.float32)
        of_bias = of_theta.new_empty(call.bias.shape if wanted.bias and call.bias is not None else (0,))
        results = ThresholdGradients(of_query, of_key, of_value, of_theta, of_bias, of_theta.new_empty(0))
        if 0 in (query.numel(), key.numel(), value.numel()):
            return ThresholdGradients(*(t.zero_() for t in results))
        grad = rows_of_entries(grad.to(value.dtype))
        query, key, value = (rows_of_entries(t) for t in (query, key, value))
        lse, mass = saved.statistic.contiguous(), None if grad_mass is None else grad_mass.contiguous()
        planned: BackwardPlan = self.plans.get(
            signature(grad, mass, query, key, value, lse, *vars(call).values(), wanted, query.device, self.precision),
            lambda: self._backward_plan(grad, mass is not None, query, key, value, call, wanted),
        )
        values = of_theta.new_empty(query.shape[0] * query.shape[1] * planned.values)
        parts = of_theta.new_empty((planned.shares, *of_bias.shape))
        with on_device(query.device):
            given = {
                "g_ptr": grad, "q_ptr": query, "k_ptr": key, "v_ptr": value, "lse_ptr": lse,
                "grad_mass_ptr": of_theta if mass is None else mass,
                "grad_q_ptr": of_query, "grad_k_ptr": of_key, "grad_v_ptr": of_value, "grad_theta_ptr": of_theta,
                "values_ptr": values, "parts_ptr": parts,
            }  # fmt: skip
            tensors = _tensors(call, query) | given
            planned.dq(tensors)
            planned.dkv(tensors)
            if planned.dbias is not None:
                planned.dbias(tensors)
                torch.sum(parts, 0, out=of_bias)
        return results

    def warmup(
        self,
        device: torch.device,
        dtype: torch.dtype,
        head_dim: int,
        value_dim: int,
        e: float | None,
        backward: bool,
        features: frozenset[str],
    ) -> None:
        """Compile the kernels for later causal calls of power 1, by calls on tiny tensors.

        Args:
            device: Device of the calls.
            dtype: Dtype of query, key and value.
            head_dim, value_dim: Head dimensions of queries and of values.
            e: Ignored.
            backward: Whether the results of the calls will be differentiated. With a gradient for the mass, or another power,
                kernels are compiled at the first call.
            features: The `diffmax.plugin.FEATURES` of the calls.
        """
        sizes = ((2, head_dim), (1 if "gqa" in features else 2, head_dim), (1 if "gqa" in features else 2, value_dim))
        query, key, value = (torch.zeros(1, heads, LENGTH, size, dtype=dtype, device=device) for heads, size in sizes)
        call = example_call(device, features)
        found = self.threshold_attention(query, key, value, call, backward)
        if backward:
            wanted = ThresholdWanted(True, call.bias is not None)
            self.threshold_attention_backward(found.out, None, query, key, value, found.saved, call, wanted)

    def _arguments(self, call: ThresholdCall, query: Tensor, key: Tensor, value: Tensor, *more: Tensor) -> Names:
        """What every kernel takes, besides tensors and its settings."""
        bounded = call.right >= 0 or call.left >= 0
        options = Options(
            WINDOW=bounded, SOFTCAP=False, ALIBI=False, MASK=layout_of(call.mask), PACKED=call.cu_seqlens_q is not None,
            LOWER_RIGHT=bounded or call.bias is not None, PRECISION=self.precision,
        )  # fmt: skip
        return {
            **strides("q", query), **strides("k", key), **strides("v", value),
            **score_strides("mask", call.mask),
            "heads": query.shape[1], "group": query.shape[1] // key.shape[1], "length": query.shape[2], "n_keys": key.shape[2],
            "n_sequences": 0 if call.cu_seqlens_q is None else call.cu_seqlens_q.shape[0] - 1,
            "width": 0 if call.bias is None else call.bias.shape[1],
            "left": call.left if call.left >= 0 else NO_LIMIT.value, "right": call.right if call.right >= 0 else NO_LIMIT.value,
            "scale": call.scale, "power": call.power,
            "HEAD_DIM": query.shape[3], "BLOCK_D": padded(query.shape[3]),
            "VALUE_DIM": value.shape[3], "BLOCK_V": padded(value.shape[3]),
            "ALIGNED": all(aligned(t) for t in (query, key, value, *more)), "OPTIONS": options, "BIAS": call.bias is not None,
            "SOFTMAX": call.weights == "softmax", "POWER": int(call.power) if call.power in (1, 2) else 0, "PTX": self.ptx,
        }  # fmt: skip

    def _forward_plan(self, query: Tensor, key: Tensor, value: Tensor, call: ThresholdCall, keep: bool) -> Launch:
        block = self.blocks(query, value).output
        blocks = _blocks(call, query.shape[2], block.rows)
        arguments = self._arguments(call, query, key, value) | {
            **_theta_strides(call, query), "n_blocks": blocks, "KEEP": keep and call.weights == "softmax",
            "ROUNDED": self.rounded, **block.arguments(),
        }  # fmt: skip
        return Launch(threshold_out_kernel, (query.shape[0] * query.shape[1] * blocks,), arguments)

    def _backward_plan(
        self,
        grad: Tensor,
        mass: bool,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        call: ThresholdCall,
        wanted: ThresholdWanted,
    ) -> BackwardPlan:
        dq, dkv, dbias = self.blocks(query, value)[1:]
        batch, heads, length = query.shape[:3]
        n_dq, n_dkv = _blocks(call, length, dq.rows), _blocks(call, key.shape[2], dkv.keys)
        planes = (3 if call.weights == "softmax" else 1) + mass
        places = n_dq * dq.rows
        shared = self._arguments(call, query, key, value, grad) | strides("g", grad)
        shared |= {"places": places, "PLANES": planes, "MASS": mass}
        own, shares = {**shared, "ROUNDED": self.rounded}, 0
        of_bias = None
        if wanted.bias and call.bias is not None:
            n_rows, distances = _blocks(call, length, dbias.rows), -(-call.bias.shape[1] // dbias.rows)
            shares = -(-batch * n_rows // EACH)
            of_bias = Launch(
                threshold_bwd_dbias_kernel,
                (shares * heads * distances,),
                {
                    **shared, "n_blocks": n_rows, "items": batch * n_rows, "each": EACH, "distances": distances,
                    "QUERIES": dq.rows, "BLOCK": dbias.rows, **dbias.options(),
                },
            )  # fmt: skip
        return BackwardPlan(
            Launch(
                threshold_bwd_dq_kernel,
                (batch * heads * n_dq,),
                {**own, **_theta_strides(call, query), "n_blocks": n_dq, "NEEDS_THETA": wanted.theta, **dq.arguments()},
            ),
            Launch(
                threshold_bwd_dkv_kernel,
                (batch * key.shape[1] * n_dkv,),
                {**own, "QUERIES": dq.rows, "n_blocks": n_dkv, **dkv.arguments()},
            ),
            of_bias,
            shares,
            planes * places,
        )


def example_call(device: torch.device, features: frozenset[str]) -> ThresholdCall:
    """A causal call with these features on two heads of `LENGTH` queries and keys."""
    ends = torch.tensor([0, LENGTH], dtype=torch.int32, device=device) if "varlen" in features else None
    return ThresholdCall(
        scale=1.0, theta=torch.zeros(1, 2, LENGTH, device=device),
        weights="softmax" if "threshold_softmax" in features else "scores", power=1.5 if "real_power" in features else 1.0,
        bias=torch.zeros(2, LENGTH, device=device) if "distance_bias" in features else None,
        mask=torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool, device=device) if "mask" in features else None,
        cu_seqlens_q=ends, cu_seqlens_k=ends, max_seqlen_q=LENGTH, max_seqlen_k=LENGTH,
    )  # fmt: skip


def _blocks(call: ThresholdCall, length: int, size: int) -> int:
    """The number of blocks of `size` rows; with packed sequences including those for rows behind the last one."""
    packed = call.cu_seqlens_q
    return -(-length // size) if packed is None else length // size + packed.shape[0]


def _theta_strides(call: ThresholdCall, query: Tensor) -> Names:
    return strides("theta", call.theta.expand(query.shape[0], -1, -1))


def _tensors(call: ThresholdCall, query: Tensor) -> dict[str, Tensor]:
    """The call's tensors by the names of kernel pointers. The queries stand for a missing one, which no kernel reads."""
    given = {
        "theta_ptr": call.theta, "bias_ptr": None if call.bias is None else call.bias.contiguous(),
        "mask_ptr": None if call.mask is None else call.mask.view(torch.uint8),
        "cu_q_ptr": call.cu_seqlens_q, "cu_k_ptr": call.cu_seqlens_k,
    }  # fmt: skip
    return {name: query if t is None else t for name, t in given.items()}
