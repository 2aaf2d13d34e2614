"""What must work in the image: rows and attention, forward and backward, on the compiled kernels, as its user on its files.

`docker run ... python /opt/diffmax/check.py`. With --kept it also fails where a kernel had to be compiled, kept or not.
"""

import os
import sys
import time
import warnings
from pathlib import Path

import torch

import diffmax


def kept() -> set[Path]:
    """The compiled kernels that lie on the disk."""
    return set(Path(os.environ["NUMBA_CACHE_DIR"]).rglob("*.nbc"))


place = Path(diffmax.__file__).parent
assert os.getuid() != 0, "run as a user other than root"
try:
    (place / "written").touch()
except OSError:
    pass
else:
    raise AssertionError(f"{place} can be written to")

if "--kept" in sys.argv:  # where kernels cannot be kept they are compiled in memory, and diffmax warns
    warnings.filterwarnings("error", "diffmax: (kernels are compiled anew|what was kept)", RuntimeWarning)
before, start = kept(), time.perf_counter()
x = torch.randn(64, 1024, requires_grad=True)
diffmax.diffmax_bisect(x).square().sum().backward()
assert x.grad is not None
assert x.grad.isfinite().all()
assert diffmax.explain("diffmax_bisect", x).chosen == "numba"

query, key, value = torch.randn(3, 1, 4, 128, 64).unbind()
query.requires_grad_(True)
out = diffmax.attention(query, key, value, is_causal=True)
out.square().sum().backward()
assert query.grad is not None
took = time.perf_counter() - start

exact = diffmax.attention(query.detach().double(), key.double(), value.double(), is_causal=True, backend="reference")
assert (out - exact).abs().max() < 1e-5
compiled = kept() - before
if "--kept" in sys.argv:
    assert before, f"there are no kept kernels in {os.environ['NUMBA_CACHE_DIR']}"
    assert not compiled, f"{len(compiled)} kernels were compiled anew, such as {min(compiled).name}"
print(f"user {os.getuid()}, {place} is read-only, {len(before)} kernels kept, {len(compiled)} more compiled and kept")
print(f"rows and attention, forward and backward, in {took:.1f} s")
