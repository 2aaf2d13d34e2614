"""Hugging Face transformers: diffmax as an attention implementation, and a recipe that adapts a pretrained model to it."""

from diffmax.integrations.transformers.adapting import Heads, adapt, calibrate, distil, refit, replace
from diffmax.integrations.transformers.attention import ModelAlpha, register
from diffmax.integrations.transformers.schedule import alpha_callback

__all__ = ["Heads", "ModelAlpha", "adapt", "alpha_callback", "calibrate", "distil", "refit", "register", "replace"]
