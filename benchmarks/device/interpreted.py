"""The shared Triton kernels as a backend of CPU tensors, interpreted: what a rehearsal runs in a device's place.

Rows beyond 256 scores are streamed, and split where there are fewer than four, so that a few scores reach every kernel.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import diffmax
from benchmarks.device import faults
from diffmax.kernels.capability import FLOATS, shared_kernels
from diffmax.kernels.triton.attention.launch import AttentionOperator
from diffmax.kernels.triton.common.tuning import predicted_table
from diffmax.kernels.triton.decoding.launch import Decoder
from diffmax.kernels.triton.power.launch import PowerOperator
from diffmax.kernels.triton.rows.launch import RowOperator
from diffmax.kernels.triton.threshold.launch import ThresholdOperator
from diffmax.plugin import Backend, Kernel
from diffmax.testing.interpreter import harden, quicken

NAME = "triton"
PROCESSORS = 4


def _short(tiles: Any) -> Any:
    return {width: tile for width, tile in tiles.items() if width <= 256}


_WHOLE = predicted_table(lanes=32, most_warps=32)
TABLE = replace(_WHOLE, forward=_short(_WHOLE.forward), backward=_short(_WHOLE.backward), stream_block=256)
ROWS = RowOperator(lambda device: TABLE, lambda device: PROCESSORS, ptx=False)
ATTENTION = AttentionOperator(lambda device: "sm90", lambda device: PROCESSORS, ptx=False)
DECODER = Decoder(lambda device: PROCESSORS, ptx=False)
POWER = PowerOperator(lambda device: "sm90", ptx=False)
THRESHOLD = ThresholdOperator(lambda device: "sm90", ptx=False)


def bisect(*arguments: Any) -> Any:
    return faults.bend(ROWS.bisect(*arguments))


def bisect_backward(*arguments: Any) -> Any:
    return faults.bend(ROWS.bisect_backward(*arguments))


def attention(*arguments: Any) -> Any:
    return faults.bend(ATTENTION.attention(*arguments))


def attention_backward(*arguments: Any) -> Any:
    return faults.bend(ATTENTION.attention_backward(*arguments))


def attention_kvcache(*arguments: Any) -> Any:
    return faults.bend(DECODER.attention_kvcache(*arguments))


def power_attention(*arguments: Any) -> Any:
    return faults.bend(POWER.power_attention(*arguments))


def power_attention_backward(*arguments: Any) -> Any:
    return faults.bend(POWER.power_attention_backward(*arguments))


def threshold_attention(*arguments: Any) -> Any:
    return faults.bend(THRESHOLD.threshold_attention(*arguments))


def threshold_attention_backward(*arguments: Any) -> Any:
    return faults.bend(THRESHOLD.threshold_attention_backward(*arguments))


def _kernel(operator: str, vendors: Kernel) -> Kernel:
    """A vendor's kernel, from this module, where no type has 64 bits."""
    dtypes = tuple(dtype for dtype in FLOATS if dtype in vendors.dtypes)
    return replace(vendors, function=f"{__name__}:{operator}", dtypes=dtypes, warmup=None)


def register() -> None:
    """Make the backend known, and Triton's interpreter right."""
    harden()
    quicken()
    warnings.filterwarnings("ignore", "All-NaN slice encountered", RuntimeWarning)
    warnings.filterwarnings("ignore", "Conversion of an array with ndim", DeprecationWarning)
    diffmax.register_backend(
        Backend(
            name=NAME,
            device_types=("cpu",),
            kernels={operator: _kernel(operator, vendors) for operator, vendors in shared_kernels(NAME).items()},
            automatic=False,
        )
    )
