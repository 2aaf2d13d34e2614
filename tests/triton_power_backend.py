"""The shared Triton power attention as a backend for CPU tensors: what tests are run on where Triton interprets."""

import torch

import diffmax
from diffmax.kernels.triton.power.launch import PowerOperator
from diffmax.kernels.triton.power.settings import Block, Blocks
from diffmax.plugin import FEATURES, Backend

NAME = "triton-power"
# tiles of three sizes, so that no kernel relies on those of another
SETTINGS = Blocks(
    update=Block(16, 32, 0, 4, 1), output=Block(32, 16, 16, 4, 1), dq=Block(32, 32, 16, 4, 1), dkv=Block(16, 16, 32, 4, 1)
)


class Operator(PowerOperator):
    def __init__(self):
        super().__init__(lambda device: "sm90", ptx=True)

    def blocks(self, query, sizes):
        return SETTINGS


operator = Operator()
power_attention = operator.power_attention
power_attention_backward = operator.power_attention_backward


def register():
    diffmax.register_backend(
        Backend(
            name=NAME,
            device_types=("cpu",),
            kernels={name: f"{__name__}:{name}" for name in ("power_attention", "power_attention_backward")},
            dtypes=(torch.float16, torch.bfloat16, torch.float32),
            features=frozenset(FEATURES),
            automatic=False,
        )
    )
