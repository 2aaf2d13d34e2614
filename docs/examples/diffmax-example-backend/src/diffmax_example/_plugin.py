"""What the backend offers. diffmax imports this module with itself, so it imports no kernel and touches no device."""

from __future__ import annotations

from importlib.metadata import version

import torch

from diffmax.plugin import Backend, hookimpl


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
                    "bisect": "diffmax_example.kernels:bisect",
                    "bisect_backward": "diffmax_example.kernels:bisect_backward",
                },
                dtypes=(torch.float16, torch.float32, torch.float64),  # NumPy has no bfloat16
                features=frozenset({"tensor_alpha", "alpha_gradient", "deterministic"}),
                priority=40,  # core's CPU kernels have 50, its plain PyTorch 0
                automatic=False,  # CPUs are served already: used only when it is asked for by name
            ),
        )

    @hookimpl
    def diffmax_env_report(self) -> dict[str, str]:
        """A line for `python -m diffmax`."""
        return {"numpy": version("numpy")}


plugin = Plugin()
