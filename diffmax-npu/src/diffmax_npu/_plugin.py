"""Descriptions of the backends. `import diffmax` imports this module, so it imports no kernel and touches no device."""

from __future__ import annotations

import torch

from diffmax.plugin import Backend, Kernel, hookimpl

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
ALPHA = frozenset({"tensor_alpha", "deterministic"})
SCORES = frozenset({"causal", "window", "gqa", "value_dim", "alibi", "softcap", "sink", "mask", "bias", "varlen", "dropout"})

THRESHOLD = frozenset({"gqa", "value_dim", "mask", "window", "varlen", "distance_bias", "threshold_softmax", "real_power"})
POWER = frozenset({"gqa", "value_dim", "gates", "state", "high_degree", "deterministic"})


class Plugin:
    """Describes the backend `npu`, and the experimental `npu-triton`."""

    @hookimpl
    def diffmax_backends(self) -> tuple[Backend, ...]:
        """The backends of this distribution."""
        return (
            Backend(
                name="npu",
                device_types=("npu",),
                runtime="cann",
                kernels={
                    "bisect": Kernel("diffmax_npu.rows:bisect", FLOATS, ALPHA),
                    "bisect_backward": Kernel("diffmax_npu.rows:bisect_backward", FLOATS, ALPHA | {"alpha_gradient"}),
                    "attention": Kernel("diffmax_npu.attention:attention", FLOATS, ALPHA | SCORES | {"attention_stats"}),
                    "attention_backward": Kernel(
                        "diffmax_npu.attention:attention_backward", FLOATS, ALPHA | SCORES | {"alpha_gradient"}
                    ),
                    "power_attention": Kernel("diffmax_npu.power:power_attention", FLOATS, POWER),
                    "power_attention_backward": Kernel("diffmax_npu.power:power_attention_backward", FLOATS, POWER),
                    "threshold_attention": Kernel("diffmax_npu.threshold:threshold_attention", FLOATS, THRESHOLD),
                    "threshold_attention_backward": Kernel(
                        "diffmax_npu.threshold:threshold_attention_backward", FLOATS, THRESHOLD
                    ),
                },
                probe="diffmax_npu.probe:probe",
                unsupported="diffmax_npu.probe:unsupported",
                install_hint="https://diffmax.github.io/diffmax/npu.html has the versions that go together, in their order",
                api_version=(1, 6),
                shared_kernels=2,
            ),
            Backend(
                name="npu-triton",
                device_types=("npu",),
                runtime="cann",
                kernels={
                    "bisect": Kernel("diffmax_npu.triton_rows:bisect", FLOATS, ALPHA),
                    "bisect_backward": Kernel("diffmax_npu.triton_rows:bisect_backward", FLOATS, ALPHA | {"alpha_gradient"}),
                },
                automatic=False,  # never run on a device
                probe="diffmax_npu.probe:probe_triton",
                unsupported="diffmax_npu.probe:unsupported",
                install_hint="https://diffmax.github.io/diffmax/npu.html has the versions that go together",
                api_version=(1, 6),
                shared_kernels=2,
            ),
        )

    @hookimpl
    def diffmax_env_report(self) -> dict[str, str]:
        """The CANN version of the environment."""
        from diffmax_npu.probe import cann_version

        return {"CANN": cann_version() or "no environment set"}


plugin = Plugin()
