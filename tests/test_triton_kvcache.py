"""Decoding's Triton kernels: under the interpreter, in a process of their own, and compiled for each architecture.

The budget is zero bytes spilled, and shared memory within the device's limit.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from diffmax.kernels.triton import kvcache_read, kvcache_start, kvcache_values
from diffmax.kernels.triton.kvcache_launch import Decoder
from diffmax.plugin import KVCacheCall
from diffmax.testing.ahead_of_time import TARGETS, recording

HERE = Path(__file__).parent
KERNELS = (
    kvcache_start.kvcache_start_kernel,
    kvcache_read.kvcache_read_kernel,
    kvcache_values.kvcache_values_kernel,
)


def test_the_kernels_pass_under_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-n", "2", str(HERE / "triton_kvcache.py")]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=HERE.parent, env=environment)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed, done.stdout
    assert int(passed[1]) == 21
    assert "skipped" not in done.stdout


def launches(target, dtype, *, options=False):
    """What a call with bounds and a new token launches, for a cache of 64k tokens and GQA 8."""
    decoder = Decoder(lambda device: 132, ptx=TARGETS[target].backend == "cuda")
    cache, new = torch.zeros(1, dtype=dtype).expand(1, 65536, 1, 128), torch.zeros(1, 1, 1, 128, dtype=dtype)
    bounds = torch.zeros(1, 1024, 1, 128, dtype=dtype)
    call = KVCacheCall(
        scale=0.1,
        e=torch.full((8,), 0.3) if options else 0.15,
        cache_seqlens=torch.zeros(1, dtype=torch.int32),
        k=new,
        v=new,
        low=bounds,
        high=bounds,
        softcap=9.0 if options else 0.0,
        sink=torch.zeros(8) if options else None,
        alibi=torch.zeros(1, 8) if options else None,
    )
    with recording(target, *KERNELS) as launched:
        decoder.attention_kvcache(torch.zeros(1, 1, 8, 128, dtype=dtype), cache, cache, call, options)
    return launched


@pytest.mark.parametrize("target", ["sm80", "sm90", "sm100", "gfx90a", "gfx942"])
def test_three_launches_fill_a_device_and_spill_nothing(target, record_property):
    launched = launches(target, torch.bfloat16)
    assert [compiled.name for compiled in launched] == [kernel.__name__ for kernel in KERNELS]
    for compiled in launched:
        found = compiled.resources
        record_property(compiled.name, str(found))
        assert found["spilled"] == 0, f"{compiled.name} spills {found['spilled']} bytes: {found}"
        assert found["shared"] <= compiled.target.shared, f"{compiled.name}: {found}"
        assert compiled.grid[0] * compiled.grid[1] >= 100


@pytest.mark.parametrize("target", ["sm90", "gfx942"])
def test_every_option_in_float32_spills_nothing(target):
    for compiled in launches(target, torch.float32, options=True):
        assert compiled.resources["spilled"] == 0, f"{compiled.name}: {compiled.resources}"
        assert compiled.resources["shared"] <= compiled.target.shared
