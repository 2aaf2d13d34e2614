"""The launcher of attention. A vendor's distribution creates one `AttentionOperator`.

The launches of the forward are in `launch_forward`, those of the backward in `launch_backward`. Nothing waits for the device.
Kernels are compiled for a bounded number of cases: dtype, head dimensions, features, five integer exponents; not per length,
stride, number of heads or alpha.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffmax.kernels.triton.attention.launch_backward import BackwardPlan, attention_backward
from diffmax.kernels.triton.attention.launch_forward import ForwardPlan, attention_forward
from diffmax.kernels.triton.attention.settings import Backward, Forward, backward_blocks, forward_settings, partial_sums
from diffmax.kernels.triton.common.launch import Plans, signature
from diffmax.kernels.triton.common.tuning import Table, Tunable, no_table
from diffmax.plugin import TILE, AttentionCall, AttentionGradients, AttentionResults, Saved, Wanted


class AttentionOperator(Tunable):
    """`attention` and `attention_backward` for one vendor, with the signatures of `diffmax.reference.attention`.

    Args:
        architecture: A function that returns the architecture of a device, such as "sm90" or "gfx942".
        processors: A function that returns the number of multiprocessors (compute units) of a device.
        ptx: Whether the compiler accepts NVIDIA's assembly.
        table: A function that returns the tuning table of a device's own architecture, or None.
    Attributes:
        forward_precision: Precision of float32 products in the forward: three tf32 products on NVIDIA's matrix cores; AMD's
            support float32. An emulation whose sums round to nearest showed that three suffice for the gate. Matrix cores
            truncate instead, which only a device can test: see the kit's `test_float32_products`. If it fails, "ieee" is
            correct and slower.
        plans: The launch plans of earlier calls.
    """

    def __init__(
        self,
        architecture: Callable[[torch.device], str],
        processors: Callable[[torch.device], int],
        *,
        ptx: bool,
        table: Callable[[torch.device], Table | None] = no_table,
    ) -> None:
        self.architecture = architecture
        self.processors = processors
        self.table = table
        self.ptx = ptx
        self.forward_precision = "tf32x3" if ptx else "ieee"
        self.plans = Plans()

    def forward_settings(self, device: torch.device, dtype: torch.dtype, size: int, call: AttentionCall) -> Forward:
        """Settings of the two forward kernels, for head dimension `size`."""
        extras = _extras(call)
        rule, table = forward_settings(self.architecture(device), dtype, size, extras), self.table(device)
        output = self.tuned(table, "attention_out", dtype, size, extras)
        return Forward(
            self.tuned(table, "attention_solve", dtype, size, extras) or rule.solve,
            output or rule.output,
            None if output else rule.training,
        )

    def backward_blocks(self, device: torch.device, dtype: torch.dtype, size: int, call: AttentionCall) -> Backward:
        """Settings of the three backward kernels, for head dimension `size`."""
        rule, table = backward_blocks(self.architecture(device), dtype, size, _extras(call)), self.table(device)
        blocks = Backward(
            *(self.tuned(table, f"attention_{name}", dtype, size) or getattr(rule, name) for name in rule._fields)
        )
        if not self.ptx and (call.mask is not None or call.dropout_p > 0):
            return blocks.without_overlap()
        return blocks

    def _forward_settings(self, query: Tensor, value: Tensor, call: AttentionCall, keep: bool) -> Forward:
        found = self.forward_settings(query.device, query.dtype, _size(query, value), call)
        stays = "attention_out" in self.forced or self._fills(found.output_of(keep).rows, query, call)
        return found if stays else found.with_few_rows()

    def _backward_blocks(self, query: Tensor, value: Tensor, call: AttentionCall) -> Backward:
        found = self.backward_blocks(query.device, query.dtype, _size(query, value), call)
        stays = "attention_dq" in self.forced or self._fills(found.dq.rows, query, call)
        return found if stays else found.with_few_rows()

    def _fills(self, rows: int, query: Tensor, call: AttentionCall) -> bool:
        """Whether programs of `rows` whole queries leave no multiprocessor idle. Packed sequences, of any lengths, do not."""
        blocks = query.shape[0] * query.shape[1] * (query.shape[2] // rows)
        return rows <= TILE or (call.cu_seqlens_q is None and blocks >= self.processors(query.device))

    def attention(
        self, query: Tensor, key: Tensor, value: Tensor, call: AttentionCall, keep: bool, stats: bool
    ) -> AttentionResults:
        """Forward kernel; arguments and results as `diffmax.reference.attention.attention`."""

        def plan(query: Tensor, key: Tensor, value: Tensor) -> ForwardPlan:
            device, dtype = query.device, query.dtype
            precision = self.forward_precision if dtype == torch.float32 else "ieee"
            own = (keep, stats, device, precision, *self.forced.items())
            return self.plans.get(
                signature(query, key, value, *vars(call).values(), *own),
                lambda: ForwardPlan.of(
                    query, key, value, call, keep, stats, self._forward_settings(query, value, call, keep),
                    processors=self.processors(device), ptx=self.ptx, precision=precision,
                    partial=partial_sums(self.architecture(device)),
                ),
            )  # fmt: skip

        return attention_forward(query, key, value, call, keep, stats, plan)

    def attention_backward(
        self, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, saved: Saved, call: AttentionCall, wanted: Wanted
    ) -> AttentionGradients:
        """Backward kernel; arguments and results as `diffmax.reference.attention.attention_backward`."""

        def plan(tensors: tuple[Tensor, Tensor, Tensor, Tensor], saved: Saved) -> BackwardPlan:
            _, query, _, value = tensors
            return self.plans.get(
                signature(*tensors, *saved, *vars(call).values(), wanted, query.device, *self.forced.items()),
                lambda: BackwardPlan.of(
                    tensors, saved, call, wanted, self._backward_blocks(query, value, call), ptx=self.ptx,
                    partial=partial_sums(self.architecture(query.device)),
                ),
            )  # fmt: skip

        return attention_backward(grad, query, key, value, saved, call, wanted, plan)

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
        """Compile the kernels for later calls, by calls on tiny tensors.

        For masks, both a mask over keys and one over queries and keys are prepared; for biases, one over queries and keys.
        Calls with and without a backward use different forward kernels.

        Args:
            device: Device of the calls.
            dtype: Dtype of query, key and value.
            head_dim, value_dim: Head dimensions of queries and of values.
            e: 1 - alpha, or None for alpha as a tensor.
            backward: Whether the calls will be differentiated.
            features: The `diffmax.plugin.FEATURES` of the calls. With "alpha_gradient" or "attention_stats", calls without it
                are prepared too.
        """
        kv_heads = 1 if "gqa" in features else 2
        sizes = ((2, head_dim), (kv_heads, head_dim), (kv_heads, value_dim))
        for batch, length in example_shapes(self.processors(device), features):
            query, key, value = (torch.zeros(batch, heads, length, size, dtype=dtype, device=device) for heads, size in sizes)
            for call in example_calls(device, dtype, length, e, features):
                self._prepare(query, key, value, call, backward, features)

    def _prepare(
        self, query: Tensor, key: Tensor, value: Tensor, call: AttentionCall, backward: bool, features: frozenset[str]
    ) -> None:
        """Call the kernels as `warmup` says."""
        for stats in (False, True) if "attention_stats" in features else (False,):
            found = self.attention(query, key, value, call, backward, stats)
        for needs_e in ((False, True) if "alpha_gradient" in features else (False,)) if backward else ():
            wanted = Wanted(needs_e, call.bias is not None, call.sink is not None)
            self.attention_backward(found.out, query, key, value, found.saved, call, wanted)


def example_shapes(processors: int, features: frozenset[str]) -> list[tuple[int, int]]:
    """Batch and length of calls on two heads: a small one, and unless packed one with 128 queries for each processor."""
    return [(1, TILE)] if "varlen" in features else [(1, TILE), (-(-processors // 2), 2 * TILE)]


def example_calls(
    device: torch.device, dtype: torch.dtype, length: int, e: float | None, features: frozenset[str]
) -> list[AttentionCall]:
    """Calls with these features on two heads of `length` queries and keys, one per layout of a mask."""

    def zeros(*shape: int, kind: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(shape, dtype=kind, device=device)

    given: dict[str, Any] = {"scale": 1.0, "e": zeros(2) + 0.5 if e is None or "tensor_alpha" in features else e}
    if "causal" in features or "window" in features:
        given |= {"left": length if "window" in features else -1, "right": 0 if "causal" in features else length}
    if "varlen" in features:
        ends = torch.tensor([0, length], dtype=torch.int32, device=device)
        given |= {
            "cu_seqlens_q": ends,
            "cu_seqlens_k": ends,
            "max_seqlen_q": length,
            "max_seqlen_k": length,
            "lower_right": True,
        }
    if "bias" in features:
        given["bias"] = zeros(1, 2, length, length, kind=dtype)
    if "alibi" in features:
        given["alibi"] = zeros(2)
    if "softcap" in features:
        given["softcap"] = 1.0
    if "sink" in features:
        given["sink"] = zeros(2)
    if "dropout" in features:
        given |= {"dropout_p": 0.5, "seed": zeros(2, kind=torch.int64)}
    if "mask" not in features:
        return [AttentionCall(**given)]
    return [AttentionCall(**given, mask=zeros(1, 1, rows, length, kind=torch.bool) == 0) for rows in (1, length)]


def _extras(call: AttentionCall) -> bool:
    return any(t is not None for t in (call.mask, call.bias, call.alibi)) or call.softcap > 0 or call.dropout_p > 0


def _size(query: Tensor, value: Tensor) -> int:
    return max(query.shape[3], value.shape[3])
