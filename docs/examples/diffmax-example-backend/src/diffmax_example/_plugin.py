"""The description of the backend. `import diffmax` imports this module, so it imports no kernel and touches no device."""

from __future__ import annotations

from importlib.metadata import version

import torch

from diffmax.plugin import Backend, Kernel, hookimpl

DTYPES = (torch.float16, torch.float32, torch.float64)  # NumPy has no bfloat16
ALPHA = frozenset({"tensor_alpha", "deterministic"})


class Plugin:
    """Describes the backend `example`."""

    @hookimpl
    def diffmax_backends(self) -> tuple[Backend, ...]:
        """The one backend of this distribution."""
        return (
            Backend(
                name="example",
                device_types=("cpu",),
                kernels={
                    "bisect": Kernel("diffmax_example.kernels:bisect", DTYPES, ALPHA),
                    "bisect_backward": Kernel("diffmax_example.kernels:bisect_backward", DTYPES, ALPHA | {"alpha_gradient"}),
                },
                priority=40,  # core's CPU kernels have 50, its plain PyTorch 0
                automatic=False,  # opt-in, because diffmax has faster backends for CPUs
            ),
        )

    @hookimpl
    def diffmax_env_report(self) -> dict[str, str]:
        """A line for `python -m diffmax`."""
        return {"numpy": version("numpy")}


plugin = Plugin()
