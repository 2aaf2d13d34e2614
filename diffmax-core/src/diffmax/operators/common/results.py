"""What kernels return, and a look at what one that is not core's own has returned.

An operator's fake implementation says it: the shapes and dtypes of the results, made from arguments without data. Core's own
kernels are held to it by tests.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Returned(NamedTuple):
    """What the kernels of an operator return.

    Attributes:
        names: Of the results.
        like: Tensors like the results, from the kernel's arguments.
        optional: Names of the results that may be left out, as (0,).
    """

    names: tuple[str, ...]
    like: Callable[..., Sequence[Tensor]]
    optional: Collection[str]


RETURNED: dict[str, Returned] = {}
"""By kernel. Operators enter theirs with `operators.common.wiring.enter`."""


def checked(operator: str, run: Callable[..., Any], refuse: Callable[[str], Exception]) -> Callable[..., Any]:
    """The kernel, whose results are looked at in its first call with each combination of flags.

    What it raises gets a note that says whose it is (from Python 3.11 on).

    Args:
        operator: What it computes.
        run: The kernel.
        refuse: Makes the error of what it must return and what it did.
    """
    seen: set[tuple[Any, ...]] = set()

    def run_and_look(*arguments: Any) -> Any:
        try:
            results = run(*arguments)
        except Exception as error:  # raised again: whoever calls sees which backend it comes from
            if hasattr(error, "add_note"):
                error.add_note(str(refuse("raised this")))
            raise
        # flags, and bundles of them such as `plugin.Wanted`
        flags = tuple([t for t in arguments if t is True or t is False or (isinstance(t, tuple) and isinstance(t[0], bool))])
        if flags not in seen:
            fault = _fault(operator, arguments, results)
            if fault:
                raise refuse(fault)
            seen.add(flags)
        return results

    return run_and_look


def _fault(operator: str, arguments: tuple[Any, ...], results: Any) -> str:
    """How the results differ from what the operator's kernels return; "" if they do not."""
    names, like, optional = RETURNED[operator]
    if not isinstance(results, (tuple, list)):
        return f"must return {', '.join(names)}, got {_kind(results)}"
    if len(results) != len(names):
        return f"must return {', '.join(names)}, got {len(results)} results"
    device = next(given.device for given in arguments if isinstance(given, Tensor))
    for name, expected, got in zip(names, like(*map(_without_data, arguments)), results, strict=True):
        is_right = isinstance(got, Tensor) and got.dtype == expected.dtype and got.device == device
        is_left_out = name in optional and is_right and got.shape == (0,)
        if not (is_right and got.shape == expected.shape) and not is_left_out:
            wanted = _described(expected.dtype, expected.shape, device)
            found = _described(got.dtype, got.shape, got.device) if isinstance(got, Tensor) else _kind(got)
            return f"must return {', '.join(names)}, with {name} {wanted}, got {found}"
    return ""


def _without_data(given: Any) -> Any:
    """An argument of a kernel with tensors on the device "meta"."""
    if isinstance(given, Tensor):
        return torch.empty_like(given, device="meta")
    if isinstance(given, tuple):
        return type(given)(*map(_without_data, given)) if hasattr(given, "_fields") else given
    if dataclasses.is_dataclass(given) and not isinstance(given, type):
        fields = {field.name: getattr(given, field.name) for field in dataclasses.fields(given)}
        return dataclasses.replace(given, **{name: _without_data(t) for name, t in fields.items() if isinstance(t, Tensor)})
    return given


def _described(dtype: torch.dtype, shape: Sequence[int], device: torch.device) -> str:
    return f"{str(dtype).removeprefix('torch.')} {tuple(shape)} on {device}"


def _kind(given: Any) -> str:
    return "None" if given is None else f"a {type(given).__name__}"
