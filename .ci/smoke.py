"""What an installed diffmax-core must do: run by packages.py in a fresh environment, isolated from the repository."""

import importlib.util
import sys
from pathlib import Path

import torch

import diffmax
from diffmax import DiffmaxBisectModule, HillMap, diffmax_bisect

assert diffmax.__version__ == sys.argv[1], f"version {diffmax.__version__}, expected {sys.argv[1]}"
assert Path(diffmax.__file__).is_relative_to(sys.prefix), f"diffmax was imported from {diffmax.__file__}"

x = torch.tensor([[3.0, 2.0, 1.0, 0.0]], requires_grad=True)
alpha = torch.tensor(0.5, requires_grad=True)
p = diffmax_bisect(x, alpha)
assert p[0, 2:].tolist() == [0.0, 0.0], f"weights {p.tolist()}, expected two zeros at the end"
assert abs(p.sum().item() - 1) < 1e-6
p[0, 0].backward()
assert abs(x.grad.sum().item()) < 1e-6
assert x.grad[0, 0] > 0
assert alpha.grad != 0

module = DiffmaxBisectModule(torch.full((2, 1, 1), 0.85), alpha_map=HillMap(c=0.3))
module(torch.randn(3, 2, 4, 4)).square().sum().backward()
assert module.log_beta.grad.shape == (2, 1, 1)

kernels = diffmax.backends()
assert {record.backend for record in kernels} >= {"cpu", "reference"}, kernels
assert any(record.status == "active" for record in kernels), kernels

for name in ("cuda", "rocm", "npu"):
    if importlib.util.find_spec(f"diffmax_{name}") is not None:
        reasons = {record.reason for record in kernels if record.backend == name}
        assert reasons, f"diffmax-{name} is installed and not listed"
        assert (name != "npu" and torch.cuda.is_available()) or hasattr(torch, "npu") or all(reasons), (
            f"diffmax-{name} gives no reason: {kernels}"
        )

print(f"import, forward, backward, module, backends(): fine on Python {sys.version.split()[0]}, torch {torch.__version__}")
