"""What the backend `rocm` offers. diffmax imports this module with itself, so it imports no kernel and touches no device."""

from __future__ import annotations

import torch

from diffmax.plugin import Backend, Kernel, hookimpl

ROWS, ATTENTION, DECODING = "diffmax_rocm.rows", "diffmax_rocm.attention", "diffmax_rocm.kvcache"
FLOATS = (torch.float16, torch.bfloat16, torch.float32)
EVERY_FLOAT = (*FLOATS, torch.float64)
MOST_ENTRIES = 256  # of a query, a key or a value

# What the shared kernels have of `diffmax.plugin.FEATURES`
ALPHA = frozenset({"tensor_alpha", "deterministic"})
SCORES = frozenset({"causal", "window", "gqa", "value_dim", "alibi", "softcap", "sink"})


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
                    "bisect": Kernel(f"{ROWS}:bisect", EVERY_FLOAT, ALPHA, warmup=f"{ROWS}:warmup"),
                    "bisect_backward": Kernel(f"{ROWS}:bisect_backward", EVERY_FLOAT, ALPHA | {"alpha_gradient"}),
                    "attention": Kernel(
                        f"{ATTENTION}:attention",
                        FLOATS,
                        ALPHA | SCORES | {"mask", "bias", "varlen", "dropout", "attention_stats"},
                        max_head_dim=MOST_ENTRIES,
                        warmup=f"{ATTENTION}:warmup",
                    ),
                    "attention_backward": Kernel(
                        f"{ATTENTION}:attention_backward",
                        FLOATS,
                        ALPHA | SCORES | {"mask", "bias", "varlen", "dropout", "alpha_gradient"},
                        max_head_dim=MOST_ENTRIES,
                    ),
                    "attention_kvcache": Kernel(
                        f"{DECODING}:attention_kvcache",
                        FLOATS,
                        ALPHA | SCORES | {"kv_cache", "paged", "attention_stats"},
                        max_head_dim=MOST_ENTRIES,
                        warmup=f"{DECODING}:warmup",
                    ),
                },
                probe="diffmax_rocm.probe:probe",
                install_hint="install a torch built for ROCm (pytorch.org, Get Started)",
                api_version=(1, 3),
                shared_kernels=1,
            ),
        )


plugin = Plugin()
