"""`backends()` and `explain(...)`: the state of the backends, and their selection for a call."""

from __future__ import annotations

import html
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, fields
from typing import Any

import torch

from diffmax.errors import NoBackendError
from diffmax.machine import dispatch
from diffmax.operators.common.spec import Question, public_functions
from diffmax.plugin import OPERATOR_FEATURES, Backend, CallSpec


@dataclass(frozen=True)
class KernelRecord:
    """One kernel of one backend, or a plugin that is not loaded."""

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
    """Records that print as a narrow table of backends; `repr` and, in a notebook, HTML show every kernel."""

    def __str__(self) -> str:
        rows, reasons = [("backend", "device", "status", "operators")], [""]
        for name in dict.fromkeys(record.backend for record in self):
            row, reason = _summary([record for record in self if record.backend == name])
            rows.append(row)
            reasons.append(reason)
        begins = format_table([(*row[:-1], "|") for row in rows]).splitlines()
        room = _WIDTH - begins[0].index("|")
        lines = []
        for begin, (*_, operators), reason in zip(begins, rows, reasons, strict=True):
            first, *more = wrapped(operators, width=room) or [""]
            line = (begin[:-1] + first).rstrip()
            lines.append(_with_reason("\n".join([line, *(" " * (_WIDTH - room) + rest for rest in more)]), reason))
        return "\n".join(lines)

    def __repr__(self) -> str:
        return format_table([_HEADER, *map(astuple, self)])

    def _repr_html_(self) -> str:
        def row(tag: str, cells: Sequence[str]) -> str:
            return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

        return f"<table>{row('th', _HEADER)}{''.join(row('td', astuple(record)) for record in self)}</table>"


_HEADER = tuple(field.name for field in fields(KernelRecord))


# The status of a backend is the first of these that one of its kernels has.
_STATUSES = ("active", "available")
_WIDTH = 97  # indented by two it stays under 100


def _summary(records: Sequence[KernelRecord]) -> tuple[tuple[str, str, str, str], str]:
    """The row of one backend, and why it is not active, per operator if the reasons differ."""
    status = next((s for s in _STATUSES if any(record.status == s for record in records)), records[0].status)
    names = [record.operator for record in records if record.operator]
    operators = ", ".join(
        f"{name} (no backward)" if f"{name}_backward" in OPERATOR_FEATURES and f"{name}_backward" not in names else name
        for name in dict.fromkeys(names)
        if not name.endswith("_backward")
    )
    devices = ", ".join(dict.fromkeys(record.device for record in records))
    reasons = dict.fromkeys(record.reason for record in records)
    if len(reasons) == 1:
        reason = records[0].reason
    else:
        of_each = {text: ", ".join(dict.fromkeys(r.operator for r in records if r.reason == text)) for text in reasons if text}
        reason = "; ".join(f"{where}: {text}" for text, where in of_each.items())
    return (records[0].backend, devices, status, operators), reason


def _with_reason(line: str, reason: str) -> str:
    """The row with the reason next to it, or below it if it is too long."""
    beside = f"{line}  {reason}".rstrip()
    return beside if len(beside.splitlines()[-1]) <= _WIDTH else "\n".join([line, *wrapped(reason, indent="    ")])


def wrapped(text: str, indent: str = "", width: int = _WIDTH) -> list[str]:
    """Lines of at most `width` columns, broken only at spaces: a path or a command stays whole."""
    return textwrap.wrap(
        text, width, initial_indent=indent, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """Columns padded to their widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def backends() -> KernelTable:
    """List every kernel of every backend, and every plugin that is not loaded, with status and reason.

    Returns:
        Records with the fields backend, distribution, version, device (torch's device type, or "any"), operator, kernel
        ("module:function"), status, reason, dtypes. They print as a table with a row per backend; `repr` has a row per
        kernel, and all fields. The statuses:
        "active": float32 calls on that device type use it; "available": it can run, but another is preferred;
        "unavailable": according to its probe it cannot run on this machine; "incompatible": its requirements are not met;
        "failed": it raised; "blocked": by DIFFMAX_BLOCK; "shadowed": its name is taken.
    Example:
        >>> import diffmax
        >>> {record.status for record in diffmax.backends() if record.backend == "reference"}
        {'active'}
    """
    with dispatch.registry.lock:  # or a backend could be unregistered while the table is made
        return KernelTable(_records())


def _records() -> list[KernelRecord]:
    records = []
    for backend in dispatch.registry.backends():
        plugin = dispatch.registry.owner(backend)
        for operator, kernel in backend.provided.items():
            for device in backend.device_types:
                records.append(
                    KernelRecord(
                        backend.name,
                        plugin.distribution,
                        plugin.version,
                        "any" if device == "*" else device,
                        operator,
                        kernel.function,
                        *_status(backend, operator, device),
                        ", ".join(map(_dtype_name, kernel.dtypes)),
                    )
                )
    for plugin in dispatch.registry.plugins:
        if plugin.status not in ("loaded", "deferred"):
            records.append(
                KernelRecord(plugin.name, plugin.distribution, plugin.version, "", "", "", plugin.status, plugin.reason, "")
            )
    return records


def _status(backend: Backend, operator: str, device: str) -> tuple[str, str]:
    status, reason = dispatch.registry.probe(backend)
    if reason:
        return status, reason
    dtypes = backend.provided[operator].dtypes
    dtype = torch.float32 if torch.float32 in dtypes else dtypes[0]
    spec = dispatch.describe(operator, "cpu" if device == "*" else device, dtype)
    if backend.runtime is not None and backend.runtime != spec.runtime:
        return "available", f"for the {backend.runtime} runtime, this is {spec.runtime}"
    try:
        names = dispatch.names_for(spec, "")
    except NoBackendError:  # the list must work in this case too
        return "available", "but DIFFMAX_BACKEND names a backend that is not loaded"
    if device == "*":
        return "active", "on devices that no other backend serves"
    verdicts = dispatch.judge(spec, names)
    first = next((candidate for candidate, reasons in verdicts if not reasons), None)
    if first is backend:
        return "active", ""
    return "available", f"{first.name} is preferred" if first is not None and backend.automatic else "opt-in: pass backend="


@dataclass(frozen=True)
class Explanation:
    """The selection of a backend for one call. Prints as text.

    Attributes:
        calls: Per operator of the call: its CallSpec, the name of the selected backend ("" if none), the candidates in order
            as (name, reasons against it), and the deciding rule.
    """

    calls: tuple[tuple[CallSpec, str, tuple[tuple[str, tuple[str, ...]], ...], str], ...]

    @property
    def chosen(self) -> str:
        """The backend of the forward call, "" if none can run it."""
        return self.calls[0][1]

    def __repr__(self) -> str:
        lines = []
        for spec, chosen, candidates, decided_by in self.calls:
            lines.append(f"{spec}: {chosen or 'no backend'}, by {decided_by}")
            lines += [f"  {name}: {'; '.join(reasons) or 'can run it'}" for name, reasons in candidates]
        advice = dispatch.missing_package(self.calls[0][0].runtime)
        return "\n".join([*lines, advice] if advice else lines)


def explain(op: str | Callable[..., Any], *arguments: Any, **options: Any) -> Explanation:
    """Explain which backend would run a call, and why the others would not.

    Nothing is computed, so tensors may be on the device "meta".

    Args:
        op: `diffmax.diffmax_bisect`, `diffmax.diffmax_loss`, `diffmax.attention`, `diffmax.attention_varlen` or
            `diffmax.attention_with_kvcache`, or one of these names.
        arguments, options: The arguments of the call, which are checked as in the call. The backward is explained too if one of
            them requires a gradient and gradients are enabled.
    Raises:
        TypeError, ValueError: diffmax has no such operator, or the call would be refused.
        NoBackendError: `backend` or DIFFMAX_BACKEND names one that is not loaded.
    Example:
        >>> import torch, diffmax
        >>> diffmax.explain("diffmax_bisect", torch.randn(4, 5), 0.5)
        bisect of float32 on cpu: numba, by priority
          numba: can run it
          cpu: can run it
          reference: can run it
        >>> x = torch.randn(1, 2, 100, 64)
        >>> diffmax.explain(diffmax.attention, x, x, x, is_causal=True, backend="cpu")
        attention of float32 on cpu, head size 64, needs causal: cpu, by the backend argument
          cpu: can run it
    """
    name = op if isinstance(op, str) else getattr(op, "__name__", repr(op))
    known = public_functions()
    if name not in known:
        hint = "\nit calls threshold_attention: ask for that" if name.startswith(("lazy_attention", "threshold_")) else ""
        raise ValueError(f"explain: no operator {name!r}, known: {', '.join(known)}{hint}")
    try:
        asked = known[name].asks(*arguments, **options)
    except TypeError as error:  # Python's own, of arguments that do not fit the signature, name another function or none
        if str(error).startswith(("explain:", "diffmax")):
            raise
        raise TypeError(f"explain: {name}: {str(error).removeprefix('_asks() ')}") from None
    return explain_question(asked)


def explain_question(asked: Question) -> Explanation:
    """`explain` for a description of a call, without tensors or a device."""
    needed = asked.features | {"tensor_alpha"} if asked.tensor_alpha else asked.features
    if torch.are_deterministic_algorithms_enabled():
        needed |= {"deterministic"}
    where, head_dims = (asked.device_type, asked.dtype), (asked.head_dim, asked.value_dim)
    specs = [dispatch.describe(asked.operator, *where, needed, *head_dims)]
    if asked.backward:
        needed = (needed | {"alpha_gradient"} if asked.alpha_gradient else needed) - {"attention_stats"}
        specs.append(dispatch.describe(f"{asked.operator}_backward", *where, needed, *head_dims))
    backend = asked.backend or dispatch.selected()
    return Explanation(tuple(_explain_one(spec, backend, bool(asked.backend)) for spec in specs))


def _explain_one(
    spec: CallSpec, backend: str, by_argument: bool
) -> tuple[CallSpec, str, tuple[tuple[str, tuple[str, ...]], ...], str]:
    names = dispatch.names_for(spec, backend)
    verdicts = dispatch.judge(spec, names)
    chosen = next((candidate.name for candidate, reasons in verdicts if not reasons), "")
    decided_by = "priority"
    if names:
        decided_by = ("the backend argument" if by_argument else "use_backend") if backend else "DIFFMAX_BACKEND"
    return spec, chosen, tuple((candidate.name, tuple(reasons)) for candidate, reasons in verdicts), decided_by


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
