"""The Fenchel-Young loss; `diffmax.operators.loss.api` has it."""

from diffmax.operators.loss.api import DiffmaxLoss, diffmax_loss

__all__ = ["DiffmaxLoss", "diffmax_loss"]
