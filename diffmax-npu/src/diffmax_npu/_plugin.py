"""What the backends of this distribution offer. diffmax imports this module with itself: no kernel, no device."""

from __future__ import annotations

import torch

from diffmax.plugin import FEATURES, Backend, hookimpl

# Features of an operator that this distribution has no kernel for
DECODING = {"kv_cache", "paged"}


class Plugin:
    """Describes the backend `npu`, and the experimental `npu-triton`."""

    @hookimpl
    def diffmax_backends(self) -> tuple[Backend, ...]:
        """What this distribution has for the device."""
        return (
            Backend(
                name="npu",
                device_types=("npu",),
                runtime="cann",
                kernels={
                    "bisect": "diffmax_npu.rows:bisect",
                    "bisect_backward": "diffmax_npu.rows:bisect_backward",
                    "attention": "diffmax_npu.attention:attention",
                    "attention_backward": "diffmax_npu.attention:attention_backward",
                },
                dtypes=(torch.float16, torch.bfloat16, torch.float32),
                features=frozenset(FEATURES) - DECODING,
                probe="diffmax_npu.probe:probe",
                unsupported="diffmax_npu.probe:unsupported",
                install_hint="docs/npu.md has the versions that go together, and the order of installation",
                api_version=(1, 2),
            ),
            Backend(
                name="npu-triton",
                device_types=("npu",),
                runtime="cann",
                kernels={
                    "bisect": "diffmax_npu.triton_rows:bisect",
                    "bisect_backward": "diffmax_npu.triton_rows:bisect_backward",
                },
                dtypes=(torch.float16, torch.bfloat16, torch.float32),
                features=frozenset({"tensor_alpha", "alpha_gradient", "deterministic"}),
                automatic=False,  # no device has run it
                probe="diffmax_npu.probe:probe_triton",
                unsupported="diffmax_npu.probe:unsupported",
                install_hint="docs/npu.md has the versions that go together",
                api_version=(1, 2),
                shared_kernels=1,
            ),
        )

    @hookimpl
    def diffmax_env_report(self) -> dict[str, str]:
        """The version of CANN whose environment is set."""
        from diffmax_npu.probe import cann_version

        return {"CANN": cann_version() or "no environment set"}


plugin = Plugin()
