"""The shared Triton attention as backends for CPU tensors: what the kit's checks are run on where Triton interprets.

`triton-attention` works in whole tiles, two at once in the pass over all, and writes the output of 128 queries at once where
that leaves no program idle. `triton-attention-pieces` cuts heads into chunks, values into shares, and tiles of keys in two, and
one program goes through all blocks.
"""

import torch

import diffmax
from diffmax.kernels.triton.attention.launch import AttentionOperator
from diffmax.kernels.triton.attention.settings import Forward, Settings
from diffmax.plugin import FEATURES, Backend


class Operator(AttentionOperator):
    def __init__(self, processors, solver, writer):
        super().__init__(lambda device: "sm90", lambda device: processors, ptx=False)
        self.settings = Forward(solver, writer)

    def forward_settings(self, device, dtype, size, call):
        return self.settings


OPERATORS = {
    "triton-attention": Operator(3, Settings(4, 2, 1, keys=128), Settings(8, 2, 1, rows=128)),
    "triton-attention-pieces": Operator(1, Settings(4, 2, 1, chunk=16), Settings(4, 2, 1, keys=32, chunk=16, values=16)),
}
for _name, _operator in OPERATORS.items():
    globals()[_name.replace("-", "_")] = _operator.attention
    globals()[_name.replace("-", "_") + "_backward"] = _operator.attention_backward


def register():
    for name in OPERATORS:
        function = f"{__name__}:{name.replace('-', '_')}"
        diffmax.register_backend(
            Backend(
                name=name,
                device_types=("cpu",),
                kernels={"attention": function, "attention_backward": f"{function}_backward"},
                dtypes=(torch.float16, torch.bfloat16, torch.float32),
                features=frozenset(FEATURES),
                automatic=False,
            )
        )
