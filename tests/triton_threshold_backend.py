"""The shared Triton threshold attention as a backend for CPU tensors: what tests are run on where Triton interprets."""

import torch

import diffmax
from diffmax.kernels.capability import THRESHOLD
from diffmax.kernels.triton.threshold.launch import ThresholdOperator
from diffmax.kernels.triton.threshold.settings import Block, Blocks
from diffmax.plugin import Backend

NAME = "triton-threshold"
# tiles of several sizes, so that no kernel relies on those of another
SETTINGS = Blocks(output=Block(32, 16, 4, 1), dq=Block(32, 16, 4, 1), dkv=Block(16, 32, 4, 1), dbias=Block(16, 32, 4, 1))


class Operator(ThresholdOperator):
    def __init__(self):
        super().__init__(lambda device: "gfx942", ptx=False)

    def blocks(self, query, value):
        return SETTINGS


operator = Operator()
threshold_attention = operator.threshold_attention
threshold_attention_backward = operator.threshold_attention_backward


def register():
    diffmax.register_backend(
        Backend(
            name=NAME,
            device_types=("cpu",),
            kernels={name: f"{__name__}:{name}" for name in ("threshold_attention", "threshold_attention_backward")},
            dtypes=(torch.float16, torch.bfloat16, torch.float32),
            features=THRESHOLD,
            automatic=False,
        )
    )
