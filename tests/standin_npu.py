"""The stand-in device dressed as torch_npu: its module, its list of operators, and diffmax-npu's kernels held to that list."""

import functools
import sys
import types
from pathlib import Path

import standin_device
import torch

import diffmax_npu.attention
import diffmax_npu.blocks
import diffmax_npu.rows
from diffmax import register_backend
from diffmax.machine.dispatch import registry
from diffmax_npu._plugin import plugin

LISTING = Path(__file__).with_name("data") / "torch_npu_operators.txt"
# What waits for the device to tell a shape
WAITING = {
    "_local_scalar_dense",
    "masked_select",
    "nonzero",
    "repeat_interleave.Tensor",
    "unique_consecutive",
    "_unique2",
    "unique_dim",
}
ALLOWED = {line for line in LISTING.read_text(encoding="utf-8").splitlines() if not line.startswith("#")} - WAITING


def _strictly(kernel):
    @functools.wraps(kernel)
    def checked(*args):
        with standin_device.strict(ALLOWED):
            return kernel(*args)

    return checked


diffmax_npu.rows.BLOCK_ELEMENTS = 1 << 13  # so that small cases have several blocks
diffmax_npu.blocks.BLOCK_ELEMENTS = 1 << 15
diffmax_npu.blocks.SHARE_WITH_DROPOUT = 2
standin_device.own_kernels(ALLOWED)
_FACTS = {"is_initialized": True, "_is_in_bad_fork": False, "device_count": 1, "get_device_name": "stand-in"}
for _name, _value in _FACTS.items():
    setattr(torch.npu, _name, lambda *_, value=_value: value)
torch.npu.get_rng_state = lambda *_: torch.get_rng_state()
torch.npu.set_rng_state = lambda state, *_: torch.set_rng_state(state)
sys.modules["torch_npu"] = types.ModuleType("torch_npu")
sys.modules["torch_npu"].__version__ = torch.__version__
for _module, _names in (
    (diffmax_npu.rows, ("bisect", "bisect_backward")),
    (diffmax_npu.attention, ("attention", "attention_backward")),
):
    for _name in _names:
        setattr(_module, _name, _strictly(getattr(_module, _name)))
if "npu" not in {backend.name for backend in registry.backends()}:
    for _backend in plugin.diffmax_backends():
        register_backend(_backend)
