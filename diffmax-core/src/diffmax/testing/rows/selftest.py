"""What `python -m diffmax selftest` checks of the row operator."""

from __future__ import annotations

import torch

from diffmax.testing.rows import checks
from diffmax.testing.selftest import Check


def _closed_form(backend: str, device: str, dtype: torch.dtype) -> None:
    """The closed form at alpha = 1/2."""
    checks.has_its_closed_form(backend, device, dtype)


def _random_rows(backend: str, device: str, dtype: torch.dtype) -> None:
    """Random rows, short to long."""
    for shape in ((7, 64), (2, 3, 129), (2, 4099)):
        for alpha in (0.1, 0.5, 0.9, 0.999):
            checks.forward_passes_the_gate(backend, device, checks.random_scores(shape, dtype, 3.0), alpha)


def _nasty_rows(backend: str, device: str, dtype: torch.dtype) -> None:
    """Ties, huge offsets, masks."""
    for alpha in (0.1, 0.85):
        checks.nasty_rows_pass_the_gate(backend, device, dtype, alpha)


def _bad_rows(backend: str, device: str, dtype: torch.dtype) -> None:
    """Fully masked rows, NaN, +inf, empty rows."""
    checks.masks_and_bad_rows(backend, device, dtype)
    checks.empty_and_single(backend, device, dtype)


def _alpha_tensors(backend: str, device: str, dtype: torch.dtype) -> None:
    """Alpha per head and per row."""
    checks.alpha_tensors(backend, device, dtype)
    checks.bad_alphas_on_the_device_give_nan_rows(backend, device, dtype)


def _gradients(backend: str, device: str, dtype: torch.dtype) -> None:
    """Gradients for given residuals."""
    for alpha in (0.1, 0.85):
        checks.backward_passes_the_gate(backend, device, checks.random_scores((3, 129), dtype), alpha)


def _residuals(backend: str, device: str, dtype: torch.dtype) -> None:
    """Forward and backward of different backends."""
    checks.residuals_are_exchangeable(backend, device, dtype)


CHECKS = (
    Check("bisect", _closed_form, holds_for_reference=True),
    Check("bisect", _random_rows),
    Check("bisect", _nasty_rows),
    Check("bisect", _bad_rows, holds_for_reference=True),
    Check("bisect", _alpha_tensors, frozenset({"tensor_alpha"})),
    Check("bisect_backward", _gradients),
    Check("bisect_backward", _residuals),
)
