"""What is kept of compiled kernels belongs to the sources that they were compiled from."""

import shutil
from pathlib import Path

import diffmax
from tests import fresh

GRADIENT = """
import torch
from diffmax.kernels.numba.jobs import compiled
from diffmax.kernels.numba.rows import bisect_backward
p = torch.zeros(1, 16)
p[0, 0] = 1.0
grad, _ = bisect_backward(torch.zeros(1, 16), p, torch.zeros(1, 1), torch.zeros(1, 1), None, 0.37, 1, False)
print(float(grad[0, 0]), compiled("backward", torch.float32).cache_hits)
"""


def test_an_edited_module_never_meets_the_code_of_before(tmp_path):
    """Numba looks at the file of the cached function alone: after a change of simd.py the old machine code ran on."""
    package = tmp_path / "diffmax"
    shutil.copytree(Path(diffmax.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))

    def run():
        value, hits = fresh.python(GRADIENT, tmp_path, NUMBA_CACHE_DIR=str(tmp_path / "cache")).stdout.split()
        return float(value), int(hits)

    assert run() == (0.0, 0)
    sibling = package / "kernels" / "numba" / "gradient.py"
    before = sibling.read_text()
    line = "store(grad_x, i, load(s, i) * (load(g, i) - mean))"
    assert before.count(line) == 1
    sibling.write_text(before.replace(line, line.replace("- mean", "- mean + 1.0")))
    assert run() == (1.0, 0)
    sibling.write_text(before)
    assert run() == (0.0, 1)  # kept, and found again: two versions that share a folder do not overwrite each other
