"""Triton's interpreter made right and strict, for tests: bfloat16 as hardware has it, in products too, checked bounds, races.

Set TRITON_INTERPRET=1 before Triton is imported, then call `harden()` once. Triton's own interpreter (3.6 to 3.9) truncates to
bfloat16 where hardware rounds to nearest even, reads and writes beyond a tensor without a word, and runs programs one after
the other, so that no race shows.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


class MemoryCheckError(RuntimeError):
    """A kernel left its tensors, or two programs stored to one address."""


def harden() -> None:
    """Patch the interpreter of this process."""
    np.seterr(all="ignore")  # as on a device: where a lane is masked, infinities and NaN are computed and dropped
    builder = interpreter.InterpreterBuilder
    interpreter._convert_float = _rounding(interpreter._convert_float)
    for name in ("binary_op", "unary_op"):
        setattr(builder, name, _refusing_bfloat16(getattr(builder, name)))
    builder.create_dot = _widening(builder.create_dot)
    interpreter.GridExecutor._init_args_hst = _noting_extents(interpreter.GridExecutor._init_args_hst)
    builder.create_masked_load = _checked_load(builder.create_masked_load)
    builder.create_masked_store = _checked_store(builder.create_masked_store)
    interpreter.ReduceOps.apply_impl = _at_once(interpreter.ReduceOps.apply_impl)


def _rounding(convert: Any) -> Any:
    def convert_float(data: Any, source: Any, target: Any, rounding_mode: Any) -> Any:
        if source == tl.float32 and target == tl.bfloat16:
            bits = np.ascontiguousarray(data, dtype=np.float32).view(np.uint32)
            rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
            return np.where(np.isnan(data), np.uint16(0x7FC0), rounded).astype(np.uint16).reshape(data.shape)
        if source == tl.bfloat16 and target == tl.float32:
            return (np.ascontiguousarray(data).astype(np.uint32) << 16).reshape(data.shape)
        return convert(data, source, target, rounding_mode)

    return convert_float


def _refusing_bfloat16(operation: Any) -> Any:
    def checked(self: Any, first: Any, *rest: Any) -> Any:
        if first.dtype.scalar == tl.bfloat16:
            raise TypeError("arithmetic on bfloat16, which the interpreter does on its bits: convert after the load")
        return operation(self, first, *rest)

    return checked


def _widening(dot: Any) -> Any:
    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        if a.dtype.scalar == tl.bfloat16:
            a, b = (interpreter.TensorHandle(_float_of_bits(t.data), tl.float32) for t in (a, b))
        return dot(self, a, b, *rest)

    return create_dot


def _float_of_bits(data: Any) -> Any:
    return (np.ascontiguousarray(data).astype(np.uint32) << 16).view(np.float32)


def _at_once(reduce: Any) -> Any:
    """The maximum that keeps NaN, which the interpreter would compute entry by entry."""

    def apply_impl(self: Any, given: Any) -> Any:
        if getattr(self.combine_fn, "__name__", "") == "larger_or_nan":
            return self.min_max(given[0], val_reduce_op=np.max)
        return reduce(self, given)

    return apply_impl


class _Extents:
    """The memory that a launch's arguments span, and who has stored where."""

    low: Any = np.zeros(0, np.uint64)
    high: Any = low
    writers: dict[int, tuple[int, ...]]


_extents = _Extents()


def _noting_extents(init: Any) -> Any:
    def init_args(self: Any, args: Any, kwargs: Any) -> Any:
        host_args, host_kwargs = init(self, args, kwargs)
        spans = []
        for argument in (*host_args, *host_kwargs.values()):
            tensor = getattr(argument, "base", argument)
            if hasattr(tensor, "untyped_storage") and tensor.numel():
                # the view's own extent, not the storage's: a write beside a slice is caught too
                last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
                spans.append((tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()))
        _extents.low = np.array([low for low, _ in spans], np.uint64)
        _extents.high = np.array([high for _, high in spans], np.uint64)
        _extents.writers = {}
        return host_args, host_kwargs

    return init_args


def _checked(pointers: Any, mask: Any, what: str) -> Any:
    size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
    addresses = np.atleast_1d(np.asarray(pointers.data, np.uint64))
    addresses = addresses[np.broadcast_to(np.asarray(mask.data, bool), addresses.shape)]
    spans = np.unique(np.stack([_extents.low, _extents.high]), axis=1)
    inside = ((addresses[:, None] >= spans[0]) & (addresses[:, None] + np.uint64(size) <= spans[1])).any(1)
    if not inside.all():
        where = interpreter.interpreter_builder.grid_idx
        raise MemoryCheckError(f"out-of-bounds {what}: {int((~inside).sum())} of {addresses.size} lanes, program {where}")
    return addresses


def _checked_load(load: Any) -> Any:
    def checked(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        _checked(pointers, mask, "load")
        return load(self, pointers, mask, *rest)

    return checked


def _checked_store(store: Any) -> Any:
    def checked(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        addresses = _checked(pointers, mask, "store")
        if np.unique(addresses).size != addresses.size:
            raise MemoryCheckError("two lanes of one program store to one address")
        program = tuple(self.grid_idx)
        for address in addresses.tolist():
            if _extents.writers.setdefault(address, program) != program:
                raise MemoryCheckError(f"programs {_extents.writers[address]} and {program} both store to one address")
        return store(self, pointers, value, mask, *rest)

    return checked


def quicken() -> None:
    """Leave out what the interpreter does again for each operation: two to three times as fast, with the same results."""
    _patch_once_per_launch()
    # of each sum and product of integers it computes another in 64 bits, for an assertion that is made in debug mode alone
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=builder.options.debug)
    interpreter._get_np_dtype = _known_by_name(interpreter._get_np_dtype)
    tl.block_type.with_element_ty = _made_once(tl.block_type.with_element_ty)
    tl.block_type.to_ir = lambda self, _: self  # what this builder makes of it is the same type again
    semantic = type(interpreter.interpreter_semantic)
    semantic.broadcast_impl_value = _skipped_for_equal_shapes(semantic.broadcast_impl_value)
    tl.tensor.__init__ = _filled_by_type(tl.tensor.__init__)


def _patch_once_per_launch() -> None:
    """Patch `triton.language` once per launch, not once per call of a helper."""
    patch = interpreter._patch_lang
    depth = 0

    class Scope:
        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def restore(self) -> None:
            nonlocal depth
            depth -= 1
            if self.inner is not None:
                self.inner.restore()

    class Everything:
        __globals__ = {"tl": tl, "core": tl.core}  # noqa: RUF012  (what `_patch_lang` looks at)

    def once(function: Any) -> Scope:
        nonlocal depth
        depth += 1
        return Scope(patch(Everything) if depth == 1 else None)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.rewrite()(*args, **kwargs)

    interpreter._patch_lang = once
    interpreter.InterpretedFunction.__call__ = call


def _known_by_name(np_dtype: Any) -> Any:
    known: dict[str, Any] = {}

    def of_type(dtype: Any) -> Any:
        name = dtype.scalar.name
        if name not in known:
            known[name] = np_dtype(dtype)
        return known[name]

    return of_type


def _made_once(with_element_ty: Any) -> Any:
    made: dict[tuple[str, str], Any] = {}

    def of_elements(self: Any, element: Any) -> Any:
        names = self.name, element.name
        if names not in made:
            made[names] = with_element_ty(self, element)
        return made[names]

    return of_elements


def _skipped_for_equal_shapes(broadcast: Any) -> Any:
    def broadcast_values(self: Any, a: Any, b: Any) -> Any:
        if a.type.is_block() and b.type.is_block() and [*a.type.shape] == [*b.type.shape]:
            return a, b
        return broadcast(self, a, b)

    return broadcast_values


def _filled_by_type(init: Any) -> Any:
    def filled(self: Any, handle: Any, type: Any) -> None:  # noqa: A002 - Triton's name
        rest = vars(type).get("rest_of_tensor")
        if rest is None:
            init(self, handle, type)
            type.rest_of_tensor = {name: value for name, value in vars(self).items() if name != "handle"}
        else:
            vars(self).update(rest, handle=handle)

    return filled
