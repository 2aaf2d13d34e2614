"""timm and diffusers import torchvision, whose wheels fit one build of torch.

Beside another build, such as torch for a CPU alone, its compiled operators are missing, and importing it stops where it describes
them. The names are declared here then, so that timm can be imported; no test needs the operators.
"""

import re
import sys

import torch


def importable():
    """Import torchvision, declaring the operators that its compiled part lacks."""
    operators = torch.library.Library("torchvision", "FRAGMENT")
    for _ in range(20):
        try:
            import torchvision  # noqa: F401
        except RuntimeError as error:
            missing = re.fullmatch(r"operator torchvision::(\w+) does not exist", str(error))
            if missing is None:
                raise
            operators.define(f"{missing[1]}(Tensor x) -> Tensor")
            for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
                del sys.modules[name]
        else:
            return operators
    raise ImportError("torchvision cannot be imported")


KEPT = importable()
