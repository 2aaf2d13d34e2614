"""The shared Triton kernels as backends for CPU tensors, in a process where Triton interprets: what the kit is run on.

Three of them, so that every kernel is reached on rows short enough for an interpreter: `triton` has the tiles of an NVIDIA GPU;
`triton-stream` and `triton-split` hold only short rows in registers, and stream or split the others.
"""

from dataclasses import replace
from functools import partial

import torch

import diffmax
from diffmax.kernels.triton.common.tuning import Tile, predicted_table
from diffmax.kernels.triton.rows.launch import RowOperator
from diffmax.plugin import FEATURES, Backend

TABLE = predicted_table(lanes=32, most_warps=32)
# the longest width does not keep its last evaluation, so that this way of ending is tested too
TABLE = replace(TABLE, forward={**TABLE.forward, 16384: Tile(1, 32, keep=False), 64: Tile(16, 1, keep=False)})
SHORT = replace(
    TABLE,
    **{kind: {16: Tile(32, 1)} for kind in ("forward", "backward", "forward_float64", "backward_float64")},
    stream_block=256,
)

OPERATORS = {
    "triton": RowOperator(lambda device: TABLE, lambda device: 4, ptx=False),
    "triton-stream": RowOperator(lambda device: SHORT, lambda device: 1, ptx=False),
    "triton-split": RowOperator(lambda device: SHORT, lambda device: 1 << 20, ptx=False),
}
# streaming is the same code for every dtype: two each; float64 has a test of its own
DTYPES = {
    "triton": (torch.float16, torch.bfloat16, torch.float32, torch.float64),
    "triton-stream": (torch.float16, torch.float32),
    "triton-split": (torch.bfloat16, torch.float32),
}


def _bound(name, method):
    return getattr(OPERATORS[name], method)


for _name in OPERATORS:
    for _method in ("bisect", "bisect_backward", "warmup"):
        globals()[f"{_name.replace('-', '_')}_{_method}"] = _bound(_name, _method)


def register():
    for name in OPERATORS:
        function = partial("{}:{}_{}".format, __name__, name.replace("-", "_"))
        diffmax.register_backend(
            Backend(
                name=name,
                device_types=("cpu",),
                kernels={"bisect": function("bisect"), "bisect_backward": function("bisect_backward")},
                dtypes=DTYPES[name],
                features=frozenset(FEATURES),
                warmup=function("warmup"),
                automatic=False,
            )
        )
