"""Attention's Triton forward: against the reference under the interpreter, and compiled ahead of time for each architecture.

Triton decides at its import whether it interprets, so those tests run in a process of their own, which
`triton_forward_interpreted.py` holds. Budget of what is compiled: zero bytes spilled, and shared memory within the device's
limit.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from diffmax.kernels.triton.attention_fwd_out import attention_out_kernel
from diffmax.kernels.triton.attention_fwd_solve import attention_solve_kernel
from diffmax.kernels.triton.attention_launch import AttentionOperator
from diffmax.plugin import AttentionCall
from diffmax.testing.ahead_of_time import TARGETS, recording

HERE = Path(__file__).parent


def test_the_kernels_pass_under_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-n", "2", str(HERE / "triton_forward_interpreted.py")]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=HERE.parent, env=environment)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed, done.stdout
    assert int(passed[1]) >= 80
    assert "skipped" not in done.stdout


OPTIONS = {
    "causal": {"right": 0},
    "window, sink": {"left": 100, "right": 10, "sink": torch.zeros(2)},
    "mask": {"mask": torch.ones(2, 1, 256, 512, dtype=torch.bool)},
    "bias, ALiBi": {"bias": torch.zeros(1, 2, 256, 512, dtype=torch.bfloat16), "alibi": torch.zeros(2), "right": 0},
    "softcap, dropout": {"softcap": 3.0, "dropout_p": 0.1, "seed": torch.zeros(2, dtype=torch.int64), "right": 0},
}


def launches(target, dtype, size, e, keep, kind="causal", length=256, heads=2):
    operator = AttentionOperator(lambda device: target, lambda device: 132, ptx=TARGETS[target].backend == "cuda")
    query, key, value = (torch.zeros(2, heads, n, size, dtype=dtype) for n in (length, 2 * length, 2 * length))
    call = AttentionCall(scale=0.1, e=torch.full((heads,), 0.3) if e is None else e, **OPTIONS[kind])
    with recording(target, attention_solve_kernel, attention_out_kernel) as launched:
        operator.attention(query, key, value, call, keep, False)
    assert [compiled.name for compiled in launched] == ["attention_solve_kernel", "attention_out_kernel"]
    return launched


def check_budget(launched):
    for compiled in launched:
        found = compiled.resources
        assert found["spilled"] == 0, f"{compiled.name} spills {found['spilled']} bytes: {found}"
        assert found["shared"] <= compiled.target.shared, f"{compiled.name}: {found}"


@pytest.mark.parametrize("target", ["sm80", "sm86", "sm90", "sm100", "sm120", "gfx90a", "gfx942", "gfx950", "gfx1100"])
def test_the_shipped_settings_spill_nothing(target):
    check_budget(launches(target, torch.bfloat16, 128, 0.15, True))


@pytest.mark.parametrize(
    ("target", "dtype", "size", "e", "kind"),
    [
        ("sm80", torch.float16, 64, 0.15, "causal"),
        ("sm90", torch.bfloat16, 64, 0.5, "window, sink"),
        ("sm80", torch.bfloat16, 64, None, "mask"),
        ("sm90", torch.bfloat16, 128, 0.15, "bias, ALiBi"),
        ("sm90", torch.bfloat16, 64, 0.15, "softcap, dropout"),
        ("gfx942", torch.bfloat16, 64, None, "mask"),
        ("sm80", torch.bfloat16, 256, 0.15, "causal"),
        ("gfx942", torch.bfloat16, 256, 0.15, "causal"),
        ("gfx1100", torch.bfloat16, 64, 0.15, "causal"),
        ("sm80", torch.float32, 80, 0.15, "causal"),
        ("gfx942", torch.float32, 64, 0.15, "causal"),
    ],
)
def test_other_sizes_and_dtypes_spill_nothing(target, dtype, size, e, kind):
    check_budget(launches(target, dtype, size, e, True, kind))


def test_matrix_cores_are_used():
    for target, instruction in (("sm90", "wgmma.mma_async"), ("sm80", "mma.sync"), ("gfx942", "v_mfma_f32")):
        for compiled in launches(target, torch.bfloat16, 128, 0.15, True):
            assert instruction in compiled.text


def test_lengths_heads_and_alphas_share_their_binaries():
    operator = AttentionOperator(lambda device: "sm90", lambda device: 132, ptx=True)
    with recording("sm90", attention_solve_kernel, attention_out_kernel) as launched:
        for length, heads, e in ((64, 1, 0.15), (1000, 4, 0.31), (4097, 3, 0.7), (16, 2, 0.99)):
            tensor = torch.zeros(1, heads, length, 64, dtype=torch.bfloat16)
            operator.attention(tensor, tensor, tensor, AttentionCall(scale=0.1, e=e, right=0), True, False)
    assert len({id(compiled.kernel) for compiled in launched}) == 2


def test_scratch_belongs_to_the_programs_that_run():
    """However many blocks of queries there are, the grid is the device's."""
    launched = launches("sm90", torch.bfloat16, 64, 0.5, True, length=16384)
    assert max(compiled.grid[0] for compiled in launched) <= 2 * 132
