"""What the backend `cuda` offers. diffmax imports this module with itself, so it imports no kernel and touches no device."""

from __future__ import annotations

from diffmax.kernels.capability import shared_kernels
from diffmax.plugin import Backend, hookimpl


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
                kernels=shared_kernels("diffmax_cuda"),
                probe="diffmax_cuda.probe:probe",
                unsupported="diffmax_cuda.probe:unsupported",
                install_hint="install a torch built for CUDA (pytorch.org, Get Started)",
                api_version=(1, 6),
                shared_kernels=2,
            ),
        )


plugin = Plugin()
