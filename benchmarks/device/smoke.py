"""Every kernel once, at small sizes, against the oracle, by the functions of the conformance kits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from benchmarks.device.context import Context
from diffmax.testing.attention import checks as attention_checks
from diffmax.testing.decoding import checks as decoding_checks
from diffmax.testing.power import checks as power_checks
from diffmax.testing.rows import checks
from diffmax.testing.threshold import checks as threshold_checks

SIGMAS = (1.0, 10.0)
KITS = {"power": power_checks, "threshold": threshold_checks}


def rows(context: Context, direction: str, dtype: str, alpha: float, shapes: list[list[int]]) -> None:
    """Rows of one dtype at one alpha: "forward", "backward", or "bad_rows"."""
    torch.manual_seed(context.seed)
    place, kind = context.place, getattr(torch, dtype)
    if direction == "bad_rows":
        checks.masks_and_bad_rows(place.backend, place.device, kind)
        checks.empty_and_single(place.backend, place.device, kind)
        checks.writes_all_that_it_allocates(place.backend, place.device, kind)
        return
    for shape in shapes:
        for sigma in SIGMAS if shape[-1] < 10000 and place.real else SIGMAS[:1]:
            x = checks.random_scores(tuple(shape), kind, sigma)
            if direction == "forward":
                checks.forward_passes_the_gate(place.backend, place.device, x, alpha)
            else:
                checks.backward_passes_the_gate(place.backend, place.device, x, alpha)


def attention(context: Context, direction: str, dtype: str, case: dict[str, Any]) -> None:
    """One case of the attention kit, with other sizes if `case` says so."""
    torch.manual_seed(context.seed)
    place = context.place
    given = replace(attention_checks.CASES[case["of"]], **{key: value for key, value in case.items() if key != "of"})
    check = (
        attention_checks.forward_passes_the_gate if direction == "forward" else attention_checks.gradients_are_right_on_average
    )
    check(place.backend, place.device, given, getattr(torch, dtype))


def attention_check(context: Context, check: str, dtype: str) -> None:
    """A whole test of the attention kit."""
    torch.manual_seed(context.seed)
    getattr(attention_checks, check)(context.place.backend, context.place.device, getattr(torch, dtype))


def decoding(context: Context, dtype: str, case: str) -> None:
    """One case of the decoding kit."""
    torch.manual_seed(context.seed)
    place = context.place
    decoding_checks.decoding_passes_the_gate(place.backend, place.device, decoding_checks.CASES[case], getattr(torch, dtype))


def of_kit(context: Context, kit: str, direction: str, dtype: str, case: str) -> None:
    """One case of the power or the threshold kit."""
    torch.manual_seed(context.seed)
    place, checks = context.place, KITS[kit]
    check = checks.results_pass_the_gate if direction == "forward" else checks.gradients_are_right_on_average
    check(place.backend, place.device, checks.CASES[case], getattr(torch, dtype))
