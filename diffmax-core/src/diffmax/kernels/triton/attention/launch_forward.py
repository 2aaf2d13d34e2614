"""Attention's launcher: memory, strides, grids. A vendor's distribution makes one `AttentionOperator`.

Two launches forward; the backward's are in `launch_backward`. Nothing here waits for the device. Kernels are compiled for
a bounded number of cases: dtype, head sizes, which features, five integer exponents; not for each length, stride, number of
heads or alpha.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffmax.kernels.triton.attention import launch_backward
from diffmax.kernels.triton.attention.launch_backward import (
    Backward,
    _aligned,
    _hardware,
    _layout,
    _lower_right,
    _rows_of_entries,
)
from diffmax.kernels.triton.attention.output import attention_out_kernel
from diffmax.kernels.triton.attention.solve import attention_solve_kernel
from diffmax.kernels.triton.attention.tiles import NO_LIMIT
from diffmax.kernels.triton.attention.tuning_backward import Blocks, backward_blocks
from diffmax.kernels.triton.attention.tuning_forward import Settings, forward_settings
from diffmax.kernels.triton.common.launch import COMPILER_OPTIONS, SOLVED, Exponent, on_device, padded
from diffmax.kernels.triton.common.tuning import Table, Tunable, no_table
from diffmax.operators.common.numerics import newton_steps
from diffmax.plugin import TILE, AttentionCall
from diffmax.reference.attention import Forward, live_shape
from diffmax.reference.dropout import threshold

# How far from its root, in units of the slope, the threshold may be when the output is computed: `attention_steps.good_enough`
CUT = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 2e-3}

Names = dict[str, Any]


class Options(NamedTuple):
    """What the forward kernels are compiled for.

    Attributes:
        WINDOW, SOFTCAP, ALIBI, PACKED, LOWER_RIGHT: Whether the call has it.
        MASK, BIAS: How it lies in memory, as `attention.tiles` numbers it.
        PRECISION: Of products.
    """

    WINDOW: bool
    MASK: int
    SOFTCAP: bool
    ALIBI: bool
    BIAS: int
    PACKED: bool
    LOWER_RIGHT: bool
    PRECISION: str


class AttentionOperator(Tunable):
    """`attention` and `attention_backward` for one vendor, with the signatures of `diffmax.reference.attention`.

    Args:
        architecture: Of a device, such as "sm90" or "gfx942".
        processors: How many multiprocessors (compute units) a device has.
        ptx: Whether the compiler takes NVIDIA's assembly.
        table: The tuning table of a device's own architecture, if there is one.
    Attributes:
        precision: Of products of float32 in the backward.
        forward_precision: The same in the forward: three products of tf32 on NVIDIA's matrix cores, AMD's take float32 itself.
            That three are enough for the gate was found by emulating sums that round to nearest. Matrix cores cut off instead,
            which only a device can show: the kit's `test_float32_products` asks. Where it fails, "ieee" is right and slower.
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
        self.precision = "ieee"
        self.forward_precision = "tf32x3" if ptx else "ieee"

    def forward_settings(
        self, device: torch.device, dtype: torch.dtype, size: int, call: AttentionCall
    ) -> tuple[Settings, Settings]:
        """How the two forward kernels are launched, for heads of `size` entries."""
        extras = any(t is not None for t in (call.mask, call.bias, call.alibi)) or call.softcap > 0 or call.dropout_p > 0
        solver, writer = forward_settings(self.architecture(device), dtype, size, extras)
        table = self.table(device)
        return (
            self.tuned(table, "attention_solve", dtype, size, extras) or solver,
            self.tuned(table, "attention_out", dtype, size, extras) or writer,
        )

    def backward_blocks(self, device: torch.device, dtype: torch.dtype, size: int) -> Blocks:
        """The backward's tiles, likewise."""
        rule, table = backward_blocks(self.architecture(device), dtype, size), self.table(device)
        return Blocks(
            self.tuned(table, "attention_dq", dtype, size) or rule.queries,
            self.tuned(table, "attention_dkv", dtype, size) or rule.keys,
            self.tuned(table, "attention_dbias", dtype, size) or rule.bias,
        )

    def attention(self, query: Tensor, key: Tensor, value: Tensor, call: AttentionCall, keep: bool, stats: bool) -> Forward:
        """Forward kernel; arguments and results as `diffmax.reference.attention.attention`."""
        rows, device = query.shape[:3], query.device
        out = value.new_empty((*rows, value.shape[3]))
        m = torch.empty(rows, dtype=torch.float32, device=device)
        delta = torch.empty_like(m)
        u = torch.empty_like(out) if keep else out.new_empty(0)
        live = torch.empty(live_shape(query, key, call), dtype=torch.int32, device=device)
        support = torch.empty(rows if stats else (0,), dtype=torch.int32, device=device)
        if m.numel() > 0:
            self._launch(query, key, value, call, out, m, delta, u, live, support)
        return out, m, delta, u, live if keep or stats else live.new_empty(0), support

    def attention_backward(
        self,
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        m: Tensor,
        delta: Tensor,
        u: Tensor,
        live: Tensor,
        call: AttentionCall,
        needs_e: bool,
        needs_bias: bool = False,
        needs_sink: bool = False,
    ) -> Backward:
        """Backward kernel; arguments and results as `diffmax.reference.attention.attention_backward`."""
        return launch_backward.attention_backward(
            self, grad, query, key, value, m, delta, u, live, call, needs_e, needs_bias, needs_sink
        )

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
                out, m, delta, u, live, _ = self.attention(query, key, value, call, backward, stats)
            for needs_e in ((False, True) if "alpha_gradient" in features else (False,)) if backward else ():
                self.attention_backward(
                    out, query, key, value, m, delta, u, live, call, needs_e, call.bias is not None, call.sink is not None
                )

    def _launch(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        call: AttentionCall,
        out: Tensor,
        m: Tensor,
        delta: Tensor,
        u: Tensor,
        live: Tensor,
        support: Tensor,
    ) -> None:
        query, key, value = (_rows_of_entries(t) for t in (query, key, value))
        device, dtype, keep = query.device, query.dtype, u.numel() > 0
        size = max(padded(query.shape[3]), padded(value.shape[3]))
        solver, writer = self.forward_settings(device, dtype, size, call)
        tensors, shared = self._shared(query, key, call)
        items = query.shape[0] * query.shape[1] * shared["blocks"]
        shared |= {
            "items": items, "words": live.shape[3], "most_tiles": _most_tiles(key.shape[2], call),
            "ALIGNED": all(_aligned(t) for t in (query, key, value)),
        }  # fmt: skip
        keys = call.max_seqlen_k if call.cu_seqlens_k is not None else key.shape[2]
        e = 1.0 if isinstance(call.e, Tensor) else shared["e"]

        def scratch(settings: Settings, per_tile: int, kind: torch.dtype) -> tuple[int, Tensor]:
            programs = min(items, self.processors(device) * settings.programs)
            return programs, torch.empty(programs * shared["most_tiles"] * per_tile, dtype=kind, device=device)

        start = torch.empty_like(delta)
        with on_device(device):
            programs, tops = scratch(solver, TILE, torch.float32)
            attention_solve_kernel[(programs,)](
                query, key, m, start, live, **tensors, tops_ptr=tops, list_ptr=scratch(solver, 1, torch.int32)[1], **shared,
                newton_steps=newton_steps(200, keys + 1, e, torch.float32), LINEAR=keep, CUT=CUT[dtype],
                CHUNK=min(solver.chunk, shared["BLOCK_D"]), num_warps=solver.warps, num_stages=solver.stages,
            )  # fmt: skip
            programs, listed = scratch(writer, 1, torch.int32)
            attention_out_kernel[(programs,)](
                query, key, value, out, u if keep else out, m, start, delta, live, support if support.numel() else live,
                **tensors, list_ptr=listed, seed_ptr=live if call.seed is None else call.seed,
                v_b=value.stride(0), v_h=value.stride(1), v_row=value.stride(2), **shared, **_dropout(call),
                VALUE_DIM=value.shape[3], BLOCK_V=min(writer.values, padded(value.shape[3])),
                KEEP=keep, SUPPORT=support.numel() > 0, CUT=CUT[dtype], SOLVED=SOLVED[dtype],
                KEYS=writer.keys, PARTS=TILE // writer.keys, CHUNK=min(writer.chunk, shared["BLOCK_D"]),
                num_warps=writer.warps, num_stages=writer.stages,
            )  # fmt: skip

    def _shared(self, query: Tensor, key: Tensor, call: AttentionCall) -> tuple[Names, Names]:
        """What both kernels are told of the call: tensors, and the rest."""
        exponent: Exponent = Exponent.of(call.e, torch.float32)
        alibi = None if call.alibi is None else call.alibi.contiguous()
        packed = call.cu_seqlens_q is not None
        length = query.shape[2]
        n_sequences = call.cu_seqlens_q.shape[0] - 1 if call.cu_seqlens_q is not None else 0

        def given(t: Tensor | None) -> Tensor:
            return query if t is None else t

        tensors = {
            "e_ptr": given(call.e if isinstance(call.e, Tensor) else None),
            "mask_ptr": given(None if call.mask is None else call.mask.view(torch.uint8)), "bias_ptr": given(call.bias),
            "alibi_ptr": given(alibi), "sink_ptr": given(call.sink),
            "cu_q_ptr": given(call.cu_seqlens_q), "cu_k_ptr": given(call.cu_seqlens_k),
        }  # fmt: skip
        options = Options(
            WINDOW=call.left >= 0 or call.right >= 0, MASK=_layout(call.mask), SOFTCAP=call.softcap > 0,
            ALIBI=alibi is not None, BIAS=_layout(call.bias), PACKED=packed, LOWER_RIGHT=_lower_right(query, key, call),
            PRECISION=self.forward_precision if query.dtype == torch.float32 else "ieee",
        )  # fmt: skip
        return tensors, {
            "q_b": query.stride(0), "q_h": query.stride(1), "q_row": query.stride(2),
            "k_b": key.stride(0), "k_h": key.stride(1), "k_row": key.stride(2),
            **_beside("mask", call.mask), **_beside("bias", call.bias),
            "alibi_b": alibi.stride(0) if alibi is not None and alibi.ndim == 2 else 0,
            "heads": query.shape[1], "group": query.shape[1] // key.shape[1], "length": length, "n_keys": key.shape[2],
            "n_sequences": n_sequences, "blocks": length // TILE + n_sequences + 1 if packed else -(-length // TILE),
            "left": call.left if call.left >= 0 else NO_LIMIT.value, "right": call.right if call.right >= 0 else NO_LIMIT.value,
            "scale": call.scale, "softcap": call.softcap, "e": exponent.e, "k": exponent.k,
            "HEAD_DIM": query.shape[3], "BLOCK_D": padded(query.shape[3]), "OPTIONS": options,
            "E_TENSOR": exponent.tensor, "K": exponent.integer, "SINK": call.sink is not None,
            "HARDWARE": _hardware(exponent, query.dtype), "PTX": self.ptx,
            **COMPILER_OPTIONS,
        }  # fmt: skip


def example_calls(
    device: torch.device, dtype: torch.dtype, length: int, e: float | None, features: frozenset[str]
) -> list[AttentionCall]:
    """Calls with these features on two heads of `length` queries and keys: for each layout of a mask one."""

    def zeros(*shape: int, kind: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(shape, dtype=kind, device=device)

    given: Names = {"scale": 1.0, "e": zeros(2) + 0.5 if e is None or "tensor_alpha" in features else e}
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


def _most_tiles(n_keys: int, call: AttentionCall) -> int:
    """How many tiles of keys one block of queries can meet."""
    tiles = -(-(call.max_seqlen_k if call.cu_seqlens_k is not None else n_keys) // TILE)
    if call.left >= 0 and call.right >= 0:
        tiles = min(tiles, (call.left + call.right + 2 * TILE - 2) // TILE + 1)
    return max(tiles, 1)


def _beside(name: str, t: Tensor | None) -> Names:
    """A mask's or a bias's strides, 0 where it is broadcast."""
    steps = (0, 0, 0, 0) if t is None else (0 if size == 1 else t.stride(axis) for axis, size in enumerate(t.shape))
    return dict(zip((f"{name}_{axis}" for axis in ("b", "h", "row", "key")), steps, strict=True))


def _dropout(call: AttentionCall) -> Names:
    """The smallest random word that is kept, as the int32 with its bits, and what weights are multiplied by."""
    least = threshold(call.dropout_p)
    return {
        "least": least - (1 << 32) if least >= 1 << 31 else least, "DROPOUT": call.dropout_p > 0,
        "unkept": 1 / (1 - call.dropout_p) if call.dropout_p < 1 else 0.0,
    }  # fmt: skip
