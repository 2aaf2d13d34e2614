"""Candidates of a kernel's launch settings, each checked and timed beside what is shipped."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import torch

import diffmax
from benchmarks.device import attention, rows
from benchmarks.device.contest import Contestant
from benchmarks.device.contest import compete as contest
from benchmarks.device.context import Context, SkipError
from benchmarks.device.decode import inputs, judged
from benchmarks.device.inputs import tensors
from benchmarks.device.place import VENDORS
from benchmarks.device.tuning_names import SHIPPED
from diffmax.kernels.triton.common.tuning import candidates, with_settings

ALPHA = 0.85  # of rows
ATTENTION_ALPHA = 0.9
ELEMENTS = 1 << 25
STREAMED, SPLIT = (256, 131072), (2, 1 << 20)
LENGTH, JUDGED_LENGTH = 8192, 1024
DECODED = 131072
MS = 24.0


def tune(context: Context, kernel: str, dtype: str, size: int, part: int, parts: int, most: int) -> dict[str, Any]:
    """One kernel at one size."""
    operator = operator_of(context, kernel)
    found = candidates(kernel, getattr(torch, dtype), size, architecture(context))[part::parts][:most]
    work = WORK["attention" if kernel.startswith("attention") else "decode" if kernel == "decode" else "rows"]
    build = work(context, kernel, dtype, size)

    def forced(settings: Any) -> Callable[[], Contestant]:
        def inside(call: Callable[..., Any]) -> Callable[..., Any]:
            @functools.wraps(call)
            def launched(*arguments: Any) -> Any:
                with with_settings(operator, **({} if settings is None else {kernel: settings})):
                    return call(*arguments)

            return launched

        def built() -> Contestant:
            one = inside(build)()
            return replace(one, calls={name: inside(call) for name, call in one.calls.items()}, check=inside(one.check))

        return built

    field = {SHIPPED: forced(None)} | {f"{i * parts + part}": forced(settings) for i, settings in enumerate(found)}
    settings = {f"{i * parts + part}": asdict(settings) for i, settings in enumerate(found)}
    return {"architecture": table_name(context), "settings": settings, **contest(context, field, MS)}


def operator_of(context: Context, kernel: str) -> Any:
    """The vendor's operator that launches a kernel."""
    if not context.place.real:
        from benchmarks.device import interpreted

        return {"attention": interpreted.ATTENTION, "decode": interpreted.DECODER}.get(kernel.split("_")[0], interpreted.ROWS)
    package = VENDORS[context.place.backend]
    module, name = {"attention": ("attention", "operator"), "decode": ("decoding", "decoder")}.get(
        kernel.split("_")[0], ("rows", "operator")
    )
    return getattr(importlib.import_module(f"{package}.{module}"), name)


def architecture(context: Context) -> str:
    """As candidates are asked for: "sm90", "gfx942"."""
    if not context.place.real:
        return "sm90"
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(0).gcnArchName).partition(":")[0]
    return "sm{}{}".format(*torch.cuda.get_device_capability())


def table_name(context: Context) -> str:
    """As the vendor's file of tables has it: "9.0", "gfx942"."""
    name = architecture(context)
    return f"{name[2:-1]}.{name[-1]}" if name.startswith("sm") else name


def _rows(context: Context, kernel: str, dtype: str, size: int) -> Callable[[], Contestant]:
    place, kind = context.place, getattr(torch, dtype)
    passed = "backward" if kernel.endswith("backward") else "forward"
    shape = (
        STREAMED if kernel.startswith("stream") else SPLIT if kernel.startswith("split") else (ELEMENTS // max(size, 1), size)
    )
    if context.prepare or not place.real:
        few = 300 if place.real else 4
        shape = (shape[0] if kernel.startswith("split") else few, shape[1])
    x = rows.scores(context, *shape, 1.0, kind)
    grad = torch.randn(shape, device=place.device).to(kind)

    def function(x: torch.Tensor) -> torch.Tensor:
        return diffmax.diffmax_bisect(x, ALPHA, backend=place.backend)

    def check() -> dict[str, Any]:
        passes = ["forward", passed]
        return rows.judged(context, function, shape, 1.0, kind, 1 - ALPHA, True, passes)

    return lambda: Contestant({passed: rows.timed(passed, x, grad, function)}, check)


def _attention(context: Context, kernel: str, dtype: str, size: int) -> Callable[[], Contestant]:
    place = context.place
    length = JUDGED_LENGTH if context.prepare else LENGTH
    backward = kernel in ("attention_dq", "attention_dkv", "attention_dbias")
    alpha = ATTENTION_ALPHA

    def attend(*given: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = diffmax.attention(*given, is_causal=True, alpha=alpha, backend=place.backend)
        return out

    def built() -> Contestant:
        calls: dict[str, Callable[[], object]] = {}
        for scores, sparsity in (("randn", 0.0), ("band", 0.58)):
            given = tensors(context, scores, length, 16, size, alpha, sparsity, dtype)[:3]
            every = attention.passes(attend, *given)
            # the forward of a training step, which keeps what a backward needs, launches the same kernels with more to write
            calls[scores] = every["backward" if backward else "forward"]
        fresh = tensors(context, "randn", JUDGED_LENGTH, 2, size, alpha, 0.0, dtype)[:3]
        return Contestant(calls, lambda: attention.judged(context, attend, fresh, alpha, True))

    return built


def _decode(context: Context, kernel: str, dtype: str, size: int) -> Callable[[], Contestant]:
    place, kind = context.place, getattr(torch, dtype)
    if not place.real:
        raise SkipError("decoding is not tuned in a rehearsal")

    def built() -> Contestant:
        length = 4096 if context.prepare else DECODED
        calls: dict[str, Callable[[], object]] = {}
        for content in ("spread", "needles"):
            given = inputs(context, 1, length, content, 2, 8, size, kind)
            calls[content] = torch.no_grad()(
                lambda given=given: diffmax.attention_with_kvcache(*given, alpha=0.5, backend=place.backend)
            )

        def check() -> dict[str, Any]:
            fresh = inputs(context, 1, 16384, "spread", 2, 8, size, kind)
            return judged(context, diffmax.attention_with_kvcache(*fresh, alpha=0.5, backend=place.backend), fresh, 0.5)

        return Contestant(calls, check, graph=("spread", "needles"), host=True)

    return built


WORK = {"rows": _rows, "attention": _attention, "decode": _decode}
