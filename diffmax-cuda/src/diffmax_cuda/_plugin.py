"""What the backend `cuda` offers. diffmax imports this module with itself, so it imports no kernel and touches no device."""

from __future__ import annotations

import torch

from diffmax.plugin import FEATURES, Backend, hookimpl


class Plugin:
    """Describes the backend `cuda`."""

    @hookimpl
    def diffmax_backends(self) -> tuple[Backend, ...]:
        """The one backend of this distribution."""
        return (
            Backend(
                name="cuda",
                device_types=("cuda",),  # torch's name for NVIDIA devices: the runtime tells them apart
                runtime="cuda",
                kernels={
                    "bisect": "diffmax_cuda.rows:bisect",
                    "bisect_backward": "diffmax_cuda.rows:bisect_backward",
                    "attention": "diffmax_cuda.attention:attention",
                    "attention_backward": "diffmax_cuda.attention:attention_backward",
                    "attention_kvcache": "diffmax_cuda.kvcache:attention_kvcache",
                },
                dtypes=(torch.float16, torch.bfloat16, torch.float32, torch.float64),
                features=frozenset(FEATURES),
                probe="diffmax_cuda.probe:probe",
                unsupported="diffmax_cuda.probe:unsupported",
                install_hint="install a torch built for CUDA (pytorch.org, Get Started)",
                warmup="diffmax_cuda.rows:warmup",
                api_version=(1, 2),
                shared_kernels=1,
            ),
        )


plugin = Plugin()
