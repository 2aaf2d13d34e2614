"""Which kernel runs an operator, and the list of kernels that `diffmax.backends()` shows."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import astuple, dataclass, fields
from typing import Any

import torch
from importlib_metadata import version

from diffmax._numerics import FLOAT_DTYPES
from diffmax.errors import NoBackendError


@dataclass(frozen=True, kw_only=True)
class Backend:
    """A set of kernels for one kind of device.

    Attributes:
        name: What `backends()` lists.
        device_type: torch device type that it serves, or "any".
        kernels: Operator name to "module:function"; imported on first use.
        priority: The largest that serves a device is used.
    """

    name: str
    device_type: str
    kernels: dict[str, str]
    priority: int
    dtypes: tuple[torch.dtype, ...] = FLOAT_DTYPES
    distribution: str = "diffmax-core"

    def serves(self, operator: str, device_type: str) -> bool:
        return operator in self.kernels and self.device_type in ("any", device_type)


_BACKENDS = (
    Backend(
        name="cpu",
        device_type="cpu",
        kernels={"bisect": "diffmax.cpu.rows:bisect", "bisect_backward": "diffmax.cpu.rows:bisect_backward"},
        priority=50,
    ),
    Backend(
        name="reference",
        device_type="any",
        kernels={"bisect": "diffmax.reference:bisect", "bisect_backward": "diffmax.reference:bisect_backward"},
        priority=0,
    ),
)


@functools.cache
def kernel(operator: str, device_type: str, backend: str = "") -> Callable[..., Any]:
    """The function that computes `operator` on `device_type`: of the named backend, or of the best one.

    Raises:
        NoBackendError: The named backend is unknown or does not serve the device.
    """
    candidates = [b for b in _BACKENDS if b.serves(operator, device_type) and backend in ("", b.name)]
    if not candidates:
        known = ", ".join(f"{b.name} ({b.device_type})" for b in _BACKENDS if operator in b.kernels)
        raise NoBackendError(
            f"no backend named {backend!r} computes {operator} on {device_type}\n"
            f"  installed: {known}\n"
            "run diffmax.backends() to see them all"
        )
    best = max(candidates, key=lambda b: (b.priority, b.name))
    module, _, attribute = best.kernels[operator].partition(":")
    function: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
    return function


@dataclass(frozen=True)
class KernelRecord:
    """One kernel of one backend, as `diffmax.backends()` lists it."""

    backend: str
    distribution: str
    version: str
    device: str
    operator: str
    kernel: str
    status: str
    reason: str
    dtypes: str


class KernelTable(tuple[KernelRecord, ...]):
    """Records that print as a table."""

    def __repr__(self) -> str:
        header = tuple(field.name for field in fields(KernelRecord))
        lines = [header, *(astuple(record) for record in self)]
        widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
        return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def backends() -> KernelTable:
    """List every kernel that is installed, the best for each device first.

    Returns:
        Records with the fields backend, distribution, version, device (torch's device type, or "any"), operator, kernel
        ("module:function"), status, reason and dtypes. Status "active": calls on that device type go to it; "available": it
        can run, but another is preferred there, for the reason given. The records print as a table.
    Example:
        >>> import diffmax
        >>> sorted({record.backend for record in diffmax.backends()})
        ['cpu', 'reference']
    """
    records = []
    for backend in sorted(_BACKENDS, key=lambda b: (-b.priority, b.name)):
        for operator, target in backend.kernels.items():
            preferred = [b.name for b in _BACKENDS if b.priority > backend.priority and b.serves(operator, backend.device_type)]
            device_types = {b.device_type for b in _BACKENDS if operator in b.kernels} - {"any"}
            reason = f"devices other than {', '.join(sorted(device_types))}" if backend.device_type == "any" else ""
            records.append(
                KernelRecord(
                    backend=backend.name,
                    distribution=backend.distribution,
                    version=version(backend.distribution),
                    device=backend.device_type,
                    operator=operator,
                    kernel=target,
                    status="available" if preferred else "active",
                    reason=f"{', '.join(preferred)} is preferred" if preferred else reason,
                    dtypes=", ".join(str(dtype).removeprefix("torch.") for dtype in backend.dtypes),
                )
            )
    return KernelTable(records)
