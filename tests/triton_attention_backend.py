"""The shared Triton backward of attention as backends for CPU tensors, behind the forward of the reference.

`triton-backward` steps through whole tiles; `triton-backward-pieces` cuts them into pieces, and takes two tiles of
queries at once; `triton-backward-small` has the smallest pieces, of heads too.
"""

import torch

import diffmax
from diffmax.kernels.triton.attention.launch import AttentionOperator
from diffmax.kernels.triton.attention.settings import Backward, Block
from diffmax.plugin import FEATURES, Backend

BLOCKS = {
    "triton-backward": Backward(Block(64, 64, 4, 2), Block(64, 64, 4, 2), Block(64, 64, 4, 1)),
    "triton-backward-pieces": Backward(Block(128, 32, 4, 2), Block(32, 64, 4, 2), Block(32, 32, 4, 1)),
    "triton-backward-small": Backward(Block(32, 32, 4, 1, 16), Block(16, 32, 4, 1, 16), Block(64, 32, 4, 1, 16)),
}


class Operator(AttentionOperator):
    def __init__(self, blocks):
        super().__init__(lambda device: "sm90", lambda device: 0, ptx=False)  # filled by any call
        self.blocks = blocks

    def backward_blocks(self, device, dtype, size, call):
        return self.blocks


OPERATORS = {name: Operator(blocks) for name, blocks in BLOCKS.items()}
for _name, _operator in OPERATORS.items():
    globals()[_name.replace("-", "_")] = _operator.attention_backward


def register():
    for name in OPERATORS:
        diffmax.register_backend(
            Backend(
                name=name,
                device_types=("cpu",),
                kernels={
                    "attention": "diffmax.reference.attention:attention",
                    "attention_backward": f"{__name__}:{name.replace('-', '_')}",
                },
                dtypes=(torch.float16, torch.bfloat16, torch.float32),
                features=frozenset(FEATURES),
                automatic=False,
            )
        )
