"""The shared Triton kernels over the conformance kit, on a CPU: Triton decides at its import whether it interprets.

So they run in a process of their own; `triton_interpreted.py` holds the tests. In this one kernels are compiled.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.parametrize("what", ["TestRows", "not TestRows"])
def test_the_kernels_pass_under_the_interpreter(what):
    command = [sys.executable, "-m", "pytest", "-q", "-n", "2", "-k", what, str(HERE / "triton_interpreted.py")]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=HERE.parent, env=environment)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed, done.stdout
    assert int(passed[1]) >= 50
    assert "skipped" not in done.stdout
