"""An operator of torch.library, declared from the types of its arguments and results: nothing is written twice.

torch takes flat arguments alone. An operator's arguments are a named tuple, of which an entry may be a bundle: a dataclass or a
named tuple, whose fields take its place. A field `float | Tensor` becomes two arguments, of which the tensor is read if it is
given. docs/operators.md shows the schemas that come of it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Generic, NamedTuple, TypeVar, get_args, get_type_hints

import torch
from torch import Tensor

Arguments = TypeVar("Arguments", bound=tuple[Any, ...])

LIBRARY = torch.library.Library("diffmax", "DEF")  # type: ignore[no-untyped-call]
_TAGS = (torch.Tag.pt2_compliant_tag,)
_NOTHING = object()


class _Slot(NamedTuple):
    """One argument of torch's: which entry it belongs to, which field of a bundle it is, its name, type and default."""

    entry: int
    field: str
    name: str
    kind: str
    default: Any


class Schema(Generic[Arguments]):
    """The schema of torch.ops.diffmax.<name>, and the way from its arguments to torch's and back.

    Args:
        name: The operator's.
        arguments: A named tuple; entries with defaults come last.
        results: A named tuple of tensors.
        prefixes: What names of a bundle's fields begin with, by the name of the entry; "results" is that of the results.
        mutated: Names of the tensors that are changed in place.
        sizes: Whether ints may be symbolic.
    """

    def __init__(
        self,
        name: str,
        arguments: type[Arguments],
        results: type[tuple[Any, ...]],
        *,
        prefixes: Mapping[str, str] | None = None,
        mutated: Sequence[str] = (),
        sizes: bool = False,
    ) -> None:
        self.name, self.arguments, self.results = name, arguments, results
        self._prefixes, self._integer = prefixes or {}, "SymInt" if sizes else "int"
        self._slots = tuple(self._flat(arguments))
        self.names = tuple(slot.name for slot in self._slots)
        self.place = {name: place for place, name in enumerate(self.names)}
        self._runs = tuple(self._runs_of(arguments))
        self.text = self._declared(mutated)

    def define(self) -> None:
        """Tell torch."""
        LIBRARY.define(self.text, tags=_TAGS)  # type: ignore[no-untyped-call]

    def __call__(self, *entries: Any) -> Any:
        """Call torch.ops.diffmax.<name> with these entries of the arguments."""
        return getattr(torch.ops.diffmax, self.name)(*self.flatten(*entries))

    def flatten(self, *entries: Any) -> tuple[Any, ...]:
        """What torch takes for these entries of the arguments."""
        flat = []
        for entry, field, _, kind, _ in self._slots:
            if entry >= len(entries):
                break
            given = getattr(entries[entry], field) if field else entries[entry]
            if isinstance(given, Tensor):
                given = 0.0 if kind == "float" else given
            elif kind == "Tensor?":
                given = None
            flat.append(given)
        return tuple(flat)

    def rebuild(self, flat: Sequence[Any]) -> Arguments:
        """The reverse. torch leaves defaults at the end out."""
        entries: list[Any] = []
        for bundle, first, last, names, pairs in self._runs:
            if bundle is None:
                entries += flat[first:last]
                continue
            given = dict(zip(names, flat[first:last], strict=False))
            for name, tensor in pairs:
                chosen = given.pop(tensor, None)
                if chosen is not None:
                    given[name] = chosen
            entries.append(bundle(**given))
        return self.arguments(*entries)

    def _runs_of(self, arguments: type) -> Iterator[tuple[Any, int, int, tuple[str, ...], tuple[tuple[str, str], ...]]]:
        """For each entry: its bundle's type, if it is one; its first argument and the one behind its last; names; pairs."""
        for entry, kind in enumerate(_types(arguments).values()):
            places = [place for place, slot in enumerate(self._slots) if slot.entry == entry]
            slots = [self._slots[place] for place in places]
            doubled = {slot.field for slot in slots if [other.field for other in slots].count(slot.field) > 1}
            names = tuple(
                f"{slot.field}_tensor" if slot.field in doubled and slot.kind == "Tensor?" else slot.field for slot in slots
            )
            pairs = tuple((field, f"{field}_tensor") for field in sorted(doubled - {""}))
            yield kind if _fields(kind) else None, places[0], places[-1] + 1, names, pairs

    def _flat(self, arguments: type) -> list[_Slot]:
        slots = []
        for entry, (name, kind) in enumerate(_types(arguments).items()):
            if not _fields(kind):
                default = getattr(arguments, "_field_defaults", {}).get(name, _NOTHING)
                slots.append(_Slot(entry, "", name, self._kind(kind), default))
                continue
            prefix = self._prefixes.get(name, "")
            for field, (own, default) in _fields(kind).items():
                if set(get_args(own)) == {float, Tensor}:
                    slots.append(_Slot(entry, field, prefix + field, "float", _NOTHING))
                    slots.append(_Slot(entry, field, f"{prefix}{field}_tensor", "Tensor?", _NOTHING))
                else:
                    slots.append(_Slot(entry, field, prefix + field, self._kind(own), default))
        return slots

    def _kind(self, kind: Any) -> str:
        known = {Tensor: "Tensor", float: "float", bool: "bool", int: self._integer, str: "str", Tensor | None: "Tensor?"}
        if kind not in known:
            raise TypeError(f"schema of {self.name}: a field may be {', '.join(map(str, known))}, got {kind}")
        return known[kind]

    def _declared(self, mutated: Sequence[str]) -> str:
        marks = {name: f"({chr(ord('a') + place)}!)" for place, name in enumerate(mutated)}
        declared, may_have_default = [], True
        for slot in reversed(self._slots):  # a default may be followed by others alone
            may_have_default = may_have_default and slot.default is not _NOTHING
            kind = slot.kind.replace("Tensor", f"Tensor{marks.get(slot.name, '')}")
            default = f"={_default(slot.default)}" if may_have_default else ""
            declared.append(f"{kind} {slot.name}{default}")
        prefix = self._prefixes.get("results", "")
        results = ", ".join(f"Tensor {prefix}{name}" for name in _types(self.results))
        return f"{self.name}({', '.join(reversed(declared))}) -> ({results})"


def _default(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value)


@functools.cache
def _types(of: Any) -> dict[str, Any]:
    hints = get_type_hints(of)
    names = of._fields if hasattr(of, "_fields") else [field.name for field in dataclasses.fields(of)]
    return {name: hints[name] for name in names}


def _fields(kind: Any) -> dict[str, tuple[Any, Any]]:
    """The fields of a bundle, with their types and defaults; empty for what is none."""
    if dataclasses.is_dataclass(kind):
        defaults = {f.name: _NOTHING if f.default is dataclasses.MISSING else f.default for f in dataclasses.fields(kind)}
    elif hasattr(kind, "_fields"):
        defaults = {name: kind._field_defaults.get(name, _NOTHING) for name in kind._fields}
    else:
        return {}
    return {name: (own, defaults[name]) for name, own in _types(kind).items()}
