"""What the backend `rocm` offers. diffmax imports this module with itself, so it imports no kernel and touches no device."""

from __future__ import annotations

import torch

from diffmax.plugin import FEATURES, Backend, hookimpl


class Plugin:
    """Describes the backend `rocm`."""

    @hookimpl
    def diffmax_backends(self) -> tuple[Backend, ...]:
        """The one backend of this distribution."""
        return (
            Backend(
                name="rocm",
                device_types=("cuda",),  # torch's name for AMD devices too: the runtime tells them apart
                runtime="hip",
                kernels={
                    "bisect": "diffmax_rocm.rows:bisect",
                    "bisect_backward": "diffmax_rocm.rows:bisect_backward",
                    "attention": "diffmax_rocm.attention:attention",
                    "attention_backward": "diffmax_rocm.attention:attention_backward",
                    "attention_kvcache": "diffmax_rocm.kvcache:attention_kvcache",
                },
                dtypes=(torch.float16, torch.bfloat16, torch.float32, torch.float64),
                features=frozenset(FEATURES),
                probe="diffmax_rocm.probe:probe",
                unsupported="diffmax_rocm.probe:unsupported",
                install_hint="install a torch built for ROCm (pytorch.org, Get Started)",
                warmup="diffmax_rocm.rows:warmup",
                api_version=(1, 2),
                shared_kernels=1,
            ),
        )


plugin = Plugin()
