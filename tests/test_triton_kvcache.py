"""Decoding's Triton kernels: under the interpreter, in a process of their own, and how they are launched."""

import pytest
import torch

from diffmax.kernels.triton.decoding import read as kvcache_read
from diffmax.kernels.triton.decoding import start as kvcache_start
from diffmax.kernels.triton.decoding import values as kvcache_values
from diffmax.kernels.triton.decoding.launch import Decoder
from diffmax.testing.ahead_of_time import recording
from tests import interpreted

KERNELS = (
    kvcache_start.kvcache_start_kernel,
    kvcache_read.kvcache_read_kernel,
    kvcache_values.kvcache_values_kernel,
)


@pytest.mark.interpreter
@interpreted.in_tiers
def test_the_kernels_pass_under_the_interpreter(tier):
    interpreted.passes("triton_kvcache.py", tier, sample=24)


def test_three_launches_fill_a_device():
    """For a cache of 64k tokens and GQA 8, with bounds and a new token. Registers and spills: `make check-triton`."""
    decoder, features = Decoder(lambda device: 132, ptx=True), frozenset({"gqa", "causal"})
    with recording("sm90", *KERNELS) as launched:
        decoder.warmup(torch.device("cpu"), torch.bfloat16, 128, 128, 0.15, False, features, room=65536, bounds=True)
    assert [compiled.name for compiled in launched] == [kernel.__name__ for kernel in KERNELS]
    for compiled in launched:
        assert compiled.grid[0] * compiled.grid[1] >= 100
