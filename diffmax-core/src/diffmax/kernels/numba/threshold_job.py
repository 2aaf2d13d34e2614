"""What a call of threshold attention is to the compiled kernels: attention's words, and its own."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor

from diffmax.kernels.numba.attention_job import COMPUTING, DIRECT_ROWS, LEAST_ROWS, Job, _Layout, _layout, _multiple, _Sizes
from diffmax.kernels.numba.attention_words import Word
from diffmax.kernels.numba.products import DEPTH, PANEL_BYTES
from diffmax.kernels.numba.simd import BYTES
from diffmax.kernels.numba.threshold_backward import make_backward
from diffmax.kernels.numba.threshold_forward import make_forward
from diffmax.kernels.numba.threshold_rows import BLOCK, DIFFMAX, SCORES, SOFTMAX
from diffmax.plugin import TILE, AttentionCall, ThresholdCall

# What a thread holds of scores, and in the backward also of weights and their gradients, at a time.
FORWARD_BYTES = 1 << 19
BACKWARD_BYTES = 1 << 20
WEIGHING = {"scores": SCORES, "softmax": SOFTMAX, "diffmax": DIFFMAX}


class ThresholdJob(Job):
    """The words of a call of threshold attention."""

    makers: ClassVar[dict[str, Callable[[Any], Any]]] = {"forward": make_forward, "backward": make_backward}

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, call: ThresholdCall) -> None:
        visible = AttentionCall(
            scale=call.scale,
            e=call.e if call.weights == "diffmax" else 0.5,
            mask=call.mask,
            left=call.left,
            right=call.right,
            lower_right=True,
            cu_seqlens_q=call.cu_seqlens_q,
            cu_seqlens_k=call.cu_seqlens_k,
            max_seqlen_q=call.max_seqlen_q,
            max_seqlen_k=call.max_seqlen_k,
        )
        super().__init__(query, key, value, visible)
        words, theta = self.words, self._kept(call.theta.resolve_neg())
        steps = [0 if size == 1 else step for size, step in zip(theta.shape, theta.stride(), strict=True)]
        words[Word.theta : Word.theta + 4] = theta.data_ptr(), *steps
        words[Word.weighing] = WEIGHING[call.weights]
        words[Word.power_kind] = int(call.power) if call.power in (1, 2) else 0
        words[Word.power] = COMPUTING[self.acc](call.power)
        self.solves = call.weights == "diffmax"
        if call.bias is not None:
            self.add_whole(Word.distances, call.bias.flip(1))
            words[Word.width] = call.bias.shape[1]

    def scratch_of_forward(self, keeps: bool = False) -> None:
        """Lay out the memory of the forward kernel, and choose how it multiplies queries by keys."""
        direct = self.length * self.words[Word.group] <= DIRECT_ROWS
        self.words[Word.direct] = direct
        sizes, form = self.sizes, self.form
        copies = form.converts or sizes.value_step != sizes.value_dim
        self._lay_out(_forward_layout(sizes, form.seen, min(self.length, TILE), copies, direct, self.solves))

    def scratch_of_backward(self) -> None:
        """Lay out the memory of the backward kernel."""
        sizes, form = self.sizes, self.form
        copies = (form.converts or sizes.head_step != sizes.head_dim, form.converts or sizes.value_step != sizes.value_dim)
        self._lay_out(_backward_layout(sizes, form.seen, min(self.length, TILE), *copies, self.solves))


def _rows(sizes: _Sizes, seen: int, most: int, most_bytes: int) -> tuple[int, int]:
    """How many rows of queries are held at a time, `most` are wanted, and their stride."""
    lanes, across = BYTES // sizes.itemsize, PANEL_BYTES // sizes.itemsize
    stride = _multiple(seen, across) + across + lanes
    fitting = max(LEAST_ROWS, most_bytes // (stride * sizes.itemsize))
    rows = next(size for size in (TILE, TILE // 2, LEAST_ROWS) if size <= fitting)
    return min(rows, _multiple(max(1, most), LEAST_ROWS)), stride


@functools.lru_cache(maxsize=256)
def _forward_layout(sizes: _Sizes, seen: int, most: int, copies: bool, direct: bool, solves: bool) -> _Layout:
    rows, stride = _rows(sizes, seen, most, FORWARD_BYTES)
    across = PANEL_BYTES // sizes.itemsize
    floats = {
        "panels": 0 if direct else sizes.longest * sizes.head_dim,
        "value_rows": (DEPTH if direct else sizes.longest) * sizes.value_step if copies else 0,
        "pack_rows": across * sizes.head_step,
        "query_rows": rows * sizes.head_step,
        "scores": rows * stride,
        "sums": (rows + 1) * sizes.value_step,
        "some_weights": stride,
        **dict.fromkeys(("z", "other"), stride if solves else 0),
    }
    return _layout(rows, stride, sizes, floats, {"some": stride, "touched": stride // BLOCK + 2}, rows)


@functools.lru_cache(maxsize=256)
def _backward_layout(sizes: _Sizes, seen: int, most: int, copies_keys: bool, copies_values: bool, solves: bool) -> _Layout:
    rows, stride = _rows(sizes, seen, most, BACKWARD_BYTES // 3)
    floats = {
        "panels": sizes.longest * sizes.head_dim,
        "value_panels": sizes.longest * sizes.value_dim,
        "key_rows": sizes.longest * sizes.head_step if copies_keys else 0,
        "value_rows": sizes.longest * sizes.value_step if copies_values else 0,
        "pack_rows": PANEL_BYTES // sizes.itemsize * max(sizes.head_step, sizes.value_step),
        "query_rows": rows * sizes.head_step,
        "grad_rows": rows * sizes.value_step,
        **dict.fromkeys(("scores", "weights", "gradients"), rows * stride),
        "sums": rows * sizes.head_step,
        "key_sums": sizes.longest * sizes.head_step,
        "value_sums": sizes.longest * sizes.value_step,
        "some_weights": stride,
        **dict.fromkeys(("z", "other", "slopes", "capped"), stride if solves else 0),
    }
    blocks = stride // BLOCK + 2
    integers = {"some": stride, "index": rows, "touched": blocks, "weighted": blocks}
    return _layout(rows, stride, sizes, floats, integers, max(rows, BLOCK))
