"""What the backend `rocm` offers. diffmax imports this module with itself, so it imports no kernel and touches no device."""

from __future__ import annotations

from diffmax.kernels.capability import shared_kernels
from diffmax.plugin import Backend, hookimpl


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
                kernels=shared_kernels("diffmax_rocm"),
                probe="diffmax_rocm.probe:probe",
                install_hint="install a torch built for ROCm (pytorch.org, Get Started)",
                api_version=(1, 6),
                shared_kernels=2,
            ),
        )


plugin = Plugin()
