"""What an operator says of itself: its folder's `spec.py` makes one `OperatorSpec` and registers it.

Whatever lists operators (descriptions of backends, `explain`, `warmup`, the self-test, `bench`, FLOP counts, DTensor's rules,
the documentation) reads `SPECS`. So adding an operator is a folder here, its reference, and kernels: no list elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from diffmax.operators.common.schema import Schema
from diffmax.plugin import API_VERSION, describe_operator


class Question(NamedTuple):
    """What a call asks of a backend, as far as the choice depends on it: see `machine.inspection.explain_question`."""

    operator: str
    device_type: str
    dtype: torch.dtype
    tensor_alpha: bool = False
    alpha_gradient: bool = False
    backward: bool = False
    backend: str | None = None
    features: frozenset[str] = frozenset()
    head_dim: int = 0
    value_dim: int = 0


class Function(NamedTuple):
    """A public function.

    Attributes:
        operator: Whose kernels it calls.
        asks: Of its arguments, checked as the call would: the `Question`.
        implies: Features that every call needs.
        bench: "module:BENCH" of `python -m diffmax bench`.
    """

    operator: str
    asks: Callable[..., Question]
    implies: frozenset[str] = frozenset()
    bench: str | None = None


class Needed(NamedTuple):
    """What `diffmax.warmup` is asked to prepare.

    Attributes:
        lengths: Of rows.
        head_dims: Sizes of a query and of a value.
        features: Sets of features, each of calls to come.
        decoding: Whether calls over a cache are to come.
    """

    lengths: Sequence[int]
    head_dims: Sequence[tuple[int, int]]
    features: Sequence[frozenset[str]]
    decoding: bool


class Case(NamedTuple):
    """One case to prepare: what the choice of a kernel depends on, and the sizes that its `warmup` is given."""

    operator: str
    features: frozenset[str]
    head_dims: tuple[int, int]
    sizes: tuple[int, ...]


class KernelSpec(NamedTuple):
    """A kernel that backends may provide.

    Attributes:
        features: What a call may need of it.
        adapt: Makes one written for an older version of the interface one of today: (function, version) -> function.
    """

    features: frozenset[str]
    adapt: Callable[[Callable[..., Any], tuple[int, int]], Callable[..., Any]] | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class OperatorSpec:
    """An operator, as the rest of diffmax knows it.

    Attributes:
        name: Of its folder, and of its kernels' module in every backend: "rows", "attention", ...
        rank: Where it comes in lists.
        kernels: What backends may provide. The reference, `diffmax.reference.<name>`, provides them all.
        functions: The public functions.
        described: Features that no operator before it has, with their meaning.
        schemas: Of its operators of torch.library.
        has_heads: Whether the choice of a kernel depends on sizes of heads.
        flops: Formulas of torch's FLOP counter, by operator of torch.library, of its arguments.
        sharding: DTensor's rules, likewise.
        prepares: The cases that `diffmax.warmup` prepares for a need.
        selftest: "module:CHECKS" of `python -m diffmax selftest`.
        kit: "module:Class" of the conformance kit.
    """

    name: str
    rank: int
    kernels: Mapping[str, KernelSpec] = field(default_factory=dict)
    functions: Mapping[str, Function]
    described: Mapping[str, str] = field(default_factory=dict)
    schemas: tuple[Schema[Any], ...] = ()
    has_heads: bool = False
    flops: Mapping[str, Callable[..., int]] = field(default_factory=dict)
    sharding: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    prepares: Callable[[Needed], Iterable[Case]] = lambda needed: ()
    selftest: str | None = None
    kit: str | None = None


SPECS: dict[str, OperatorSpec] = {}


def register(spec: OperatorSpec) -> None:
    """Make an operator known."""
    SPECS[spec.name] = spec
    for name, known in sorted(SPECS.items(), key=lambda entry: entry[1].rank):
        SPECS[name] = SPECS.pop(name)
        for kernel, what in known.kernels.items():
            describe_operator(kernel, what.features, known.described)


def spec_of(operator: str) -> OperatorSpec:
    """The spec that has this kernel, or that public function."""
    for spec in SPECS.values():
        if operator in spec.kernels or operator in spec.functions:
            return spec
    raise ValueError(f"no operator is named {operator!r}, known: {', '.join(SPECS)}")


def public_functions() -> dict[str, Function]:
    """Those of every operator."""
    return {name: function for spec in SPECS.values() for name, function in spec.functions.items()}


def adapted(operator: str, function: Callable[..., Any], version: tuple[int, int]) -> Callable[..., Any]:
    """A backend's kernel, written for this version of the interface, with the arguments and results of today."""
    adapt = spec_of(operator).kernels[operator].adapt
    return function if adapt is None or version >= API_VERSION else adapt(function, version)
