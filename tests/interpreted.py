"""Runs a file of tests where Triton interprets, which it decides at its import: in a process of its own, in two tiers."""

from pathlib import Path

import pytest

from tests import fresh

CODE = """
import os, sys, torch
torch.set_num_threads(1)
os.chdir({folder!r})
import pytest
sys.exit(pytest.main({arguments!r}))
"""
HERE = Path(__file__).parent
# a process each: of each test the first case and every nth after it in `make test`, the others in `make test-all`
in_tiers = pytest.mark.parametrize("tier", ["not slow", pytest.param("slow", marks=pytest.mark.slow)], ids=["fast", "slow"])


def passes(file, tier, *options, sample=9):
    """Fail with what pytest printed, unless every test of the tier ran and passed."""
    arguments = ["-q", "--sample", str(sample), "-m", tier, *options, str(HERE / file)]
    code = CODE.format(folder=str(HERE.parent), arguments=arguments)
    done = fresh.python(code, check=False, seconds=1100, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]  # 5 if no test was chosen
    assert "skipped" not in done.stdout
