"""Runs a file of tests where Triton interprets, which it decides at its import: in a process of its own, in two tiers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
# a process each: of each test the first case and every nth after it in `make test`, the others in `make test-all`
in_tiers = pytest.mark.parametrize("tier", ["not slow", pytest.param("slow", marks=pytest.mark.slow)], ids=["fast", "slow"])


def passes(file, tier, *options, sample=9):
    """Fail with what pytest printed, unless every test of the tier ran and passed."""
    command = [sys.executable, "-m", "pytest", "-q", "--sample", str(sample), "-m", tier, *options, str(HERE / file)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=HERE.parent, env=environment)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]  # 5 if no test was chosen
    assert "skipped" not in done.stdout
