"""Attention's Triton backward against the reference, on a CPU: Triton decides at its import whether it interprets.

So the tests run in a process of their own; `triton_attention_interpreted.py` holds them.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def test_the_kernels_pass_under_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-n", "2", str(HERE / "triton_attention_interpreted.py")]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=HERE.parent, env=environment)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed, done.stdout
    assert int(passed[1]) >= 60
    assert "skipped" not in done.stdout
