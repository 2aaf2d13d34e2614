"""What is kept of compiled kernels belongs to the sources that they were compiled from."""

import shutil
from pathlib import Path

import diffmax
from tests import fresh

AGAIN = """
import torch
from diffmax.kernels.numba.attention import weights_again
from diffmax.kernels.numba.jobs import compiled
scores = torch.zeros(1, 16)
p, s = torch.empty(1, 16), torch.empty(1, 16)
weights_again(scores, p, s, torch.zeros(1, 1), torch.zeros(1, 1), 0.37, False)
print(float(p[0, 0]), compiled("again", torch.float32).cache_hits)
"""


def test_an_edited_module_never_meets_the_code_of_before(tmp_path):
    """Numba looks at the file of the cached function alone: after a change of simd.py the old machine code ran on."""
    package = tmp_path / "diffmax"
    shutil.copytree(Path(diffmax.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))

    def run():
        weight, hits = fresh.python(AGAIN, tmp_path, NUMBA_CACHE_DIR=str(tmp_path / "cache")).stdout.split()
        return float(weight), int(hits)

    assert run() == (1.0, 0)
    sibling = package / "kernels" / "numba" / "gradient.py"
    before = sibling.read_text()
    line = "        store(p, i, weights)\n        store(s, i, slopes)\n"
    assert before.count(line) == 1
    sibling.write_text(before.replace(line, line.replace("weights)", "weights + 1.0)")))
    assert run() == (2.0, 0)
    sibling.write_text(before)
    assert run() == (1.0, 1)  # kept, and found again: two versions that share a folder do not overwrite each other
