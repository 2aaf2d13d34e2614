"""Attention's launcher. A vendor's distribution makes one `AttentionOperator`.

The forward's two launches are in `launch_forward`, the backward's in `launch_backward`. Nothing waits for the device. Kernels
are compiled for a bounded number of cases: dtype, head sizes, which features, five integer exponents; not for each length,
stride, number of heads or alpha.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffmax.kernels.triton.attention.launch_backward import attention_backward
from diffmax.kernels.triton.attention.launch_forward import attention_forward
from diffmax.kernels.triton.attention.settings import Backward, Forward, backward_blocks, forward_settings
from diffmax.kernels.triton.common.tuning import Table, Tunable, no_table
from diffmax.plugin import TILE, AttentionCall, AttentionGradients, AttentionResults, Saved, Wanted


class AttentionOperator(Tunable):
    """`attention` and `attention_backward` for one vendor, with the signatures of `diffmax.reference.attention`.

    Args:
        architecture: Of a device, such as "sm90" or "gfx942".
        processors: How many multiprocessors (compute units) a device has.
        ptx: Whether the compiler takes NVIDIA's assembly.
        table: The tuning table of a device's own architecture, if there is one.
    Attributes:
        forward_precision: Of products of float32 in the forward: three products of tf32 on NVIDIA's matrix cores, AMD's take
            float32 itself. That three are enough for the gate was found by emulating sums that round to nearest. Matrix cores
            cut off instead, which only a device can show: the kit's `test_float32_products` asks. Where it fails, "ieee" is
            right and slower.
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

    def forward_settings(self, device: torch.device, dtype: torch.dtype, size: int, call: AttentionCall) -> Forward:
        """How the two forward kernels are launched, for heads of `size` entries."""
        extras = any(t is not None for t in (call.mask, call.bias, call.alibi)) or call.softcap > 0 or call.dropout_p > 0
        rule, table = forward_settings(self.architecture(device), dtype, size, extras), self.table(device)
        return Forward(
            self.tuned(table, "attention_solve", dtype, size, extras) or rule.solve,
            self.tuned(table, "attention_out", dtype, size, extras) or rule.output,
        )

    def backward_blocks(self, device: torch.device, dtype: torch.dtype, size: int, call: AttentionCall) -> Backward:
        """How the three backward kernels are launched, likewise."""
        rule, table = backward_blocks(self.architecture(device), dtype, size), self.table(device)
        blocks = Backward(
            *(self.tuned(table, f"attention_{name}", dtype, size) or getattr(rule, name) for name in rule._fields)
        )
        if not self.ptx and (call.mask is not None or call.dropout_p > 0):
            return blocks.without_overlap()
        return blocks

    def attention(
        self, query: Tensor, key: Tensor, value: Tensor, call: AttentionCall, keep: bool, stats: bool
    ) -> AttentionResults:
        """Forward kernel; arguments and results as `diffmax.reference.attention.attention`."""
        device, dtype = query.device, query.dtype
        return attention_forward(
            query, key, value, call, keep, stats, self.forward_settings(device, dtype, _size(query, value), call),
            processors=self.processors(device), ptx=self.ptx,
            precision=self.forward_precision if dtype == torch.float32 else "ieee",
        )  # fmt: skip

    def attention_backward(
        self, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, saved: Saved, call: AttentionCall, wanted: Wanted
    ) -> AttentionGradients:
        """Backward kernel; arguments and results as `diffmax.reference.attention.attention_backward`."""
        blocks = self.backward_blocks(query.device, query.dtype, _size(query, value), call)
        return attention_backward(grad, query, key, value, saved, call, wanted, blocks, ptx=self.ptx)

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
        """Compile what calls need, by calling on tiny tensors.

        A mask is prepared as one of keys and as one of queries and keys, a bias as one of queries and keys. Calls that are to
        be differentiated and those that are not have forward kernels of their own.

        Args:
            device: Where the calls will run.
            dtype: Of query, key and value.
            head_dim, value_dim: Sizes of a query and of a value.
            e: 1 - alpha, or None for alpha as a tensor.
            backward: Whether the calls will be differentiated.
            features: Of `diffmax.plugin.FEATURES`, what the calls have. Where "alpha_gradient" or "attention_stats" is among
                them, calls without it are prepared too.
        """
        length, kv_heads = TILE, 1 if "gqa" in features else 2
        sizes = ((2, head_dim), (kv_heads, head_dim), (kv_heads, value_dim))
        for call in example_calls(device, dtype, length, e, features):
            query, key, value = (torch.zeros(1, heads, length, size, dtype=dtype, device=device) for heads, size in sizes)
            for stats in (False, True) if "attention_stats" in features else (False,):
                found = self.attention(query, key, value, call, backward, stats)
            for needs_e in ((False, True) if "alpha_gradient" in features else (False,)) if backward else ():
                wanted = Wanted(needs_e, call.bias is not None, call.sink is not None)
                self.attention_backward(found.out, query, key, value, found.saved, call, wanted)


def example_calls(
    device: torch.device, dtype: torch.dtype, length: int, e: float | None, features: frozenset[str]
) -> list[AttentionCall]:
    """Calls with these features on two heads of `length` queries and keys: for each layout of a mask one."""

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


def _size(query: Tensor, value: Tensor) -> int:
    return max(query.shape[3], value.shape[3])
