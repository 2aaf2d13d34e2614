"""A device `npu` without hardware, for a process of its own: torch's PrivateUse1 key, its memory that of CPU tensors.

Each operator on it runs on CPU tensors over the same memory. What torch's dispatcher, autograd and diffmax's choice of a
backend do with such a device is real, and so are shapes, strides and views; only the arithmetic is borrowed. Fresh memory
holds NaN. `OPERATORS` counts what reached the device, `MEMORY` the bytes that live there, and inside `strict(...)` whatever
the real device would do on the host, or not at all, is an error.
"""

import collections
import contextlib
import functools

import torch
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

OPERATORS: collections.Counter[str] = collections.Counter()
MEMORY = {"now": 0, "peak": 0, "allocations": 0}
READ = "aten::_local_scalar_dense"
VIEWS = {"aten::as_strided", "aten::view", "aten::_reshape_alias", "aten::unfold"}  # which launch nothing

# Allocation, copies and views, which are told apart below
_ELSEWHERE = {
    "_to_copy",
    "as_strided_",
    "clone",
    "copy_",
    "empty_like",
    "full",
    "is_pinned",
    "new_empty_strided",
    "record_stream",
}
_ELSEWHERE |= {"_pin_memory", "_lazy_clone", "contiguous", "resize_as_", "set_", "squeeze", "unsqueeze", "unfold", "is_set_to"}

_rules: dict[str, object] = {"allowed": None, "dtypes": None}
_META = torch._C.DispatchKeySet(torch._C.DispatchKey.Meta)


class _Memory:
    """CPU memory behind a storage of the device, for as long as that lives."""

    def __init__(self, t: torch.Tensor) -> None:
        storage = t.untyped_storage()
        self.flat, self.size = torch.empty(0, dtype=t.dtype).set_(storage), storage.nbytes()
        MEMORY["now"] += self.size
        MEMORY["allocations"] += 1
        MEMORY["peak"] = max(MEMORY["peak"], MEMORY["now"])

    def __del__(self) -> None:
        MEMORY["now"] -= self.size


@contextlib.contextmanager
def strict(allowed, refused_dtypes=(torch.float64, torch.complex64, torch.complex128)):
    """Within, an operator that is not in `allowed`, a dtype that is refused, or a read by the host raises RuntimeError."""
    before = dict(_rules)
    _rules.update(allowed=allowed, dtypes=refused_dtypes)
    try:
        yield
    finally:
        _rules.update(before)


def own_kernels(names) -> None:
    """Run these operators as one call each, as a device with kernels of its own does, where torch would compose them."""
    for name in names:
        base, _, overload = name.partition(".")
        operator = getattr(getattr(torch.ops.aten, base, None), overload or "default", None)
        composed = operator is not None and any(
            torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", key)
            for key in ("CompositeExplicitAutograd", "CompositeExplicitAutogradNonFunctional")
        )
        if composed and base not in _ELSEWHERE:
            _aten.impl(name, functools.partial(_fallback, operator), "PrivateUse1")


def to_device(t: torch.Tensor) -> torch.Tensor:
    """A tensor on the device with `t`'s values, and its strides."""
    handle = torch._C._acc.create_empty_tensor((0,), t.dtype)
    handle.untyped_storage().memory = _Memory(t)
    return _strided(handle, t)


def to_cpu(t: torch.Tensor) -> torch.Tensor:
    """A CPU tensor over the memory of a tensor on the device."""
    return t.untyped_storage().memory.flat.as_strided(t.shape, t.stride(), t.storage_offset())


def _strided(base: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A view of a tensor on the device with the sizes and strides of a CPU tensor."""
    # the kernel for meta tensors asks nothing of the storage, which has no memory of its own
    return torch.ops.aten.as_strided.default.redispatch(_META, base, like.shape, like.stride(), like.storage_offset())


def _on_device(value):
    return isinstance(value, torch.Tensor) and value.device.type == "npu"


def _unwrap(value):
    if isinstance(value, list | tuple):
        return [_unwrap(part) for part in value]
    return to_cpu(value) if _on_device(value) else value


def _check(name, values):
    if _rules["allowed"] is None:
        return
    if name == READ:
        raise RuntimeError("strict: the host waits for the device to read a value")
    if name.removeprefix("aten::") not in _rules["allowed"]:
        raise RuntimeError(f"strict: torch_npu has no kernel of its own for {name}")
    if name == "aten::index.Tensor" and any(isinstance(t, torch.Tensor) and t.dtype == torch.bool for t in values[1:]):
        raise RuntimeError(f"strict: {name} by a mask waits for the device to tell the shape")
    wide = [t.dtype for t in values if isinstance(t, torch.Tensor) and t.dtype in _rules["dtypes"]]
    if wide:
        raise RuntimeError(f"strict: {name} of {wide[0]}")


@functools.cache
def _described(operator):
    """Its name; what a result aliases: nothing, the argument of this name or place that it writes to, or some argument."""
    schema = operator._schema
    first = schema.returns[0].alias_info if schema.returns else None
    if first is None:
        return operator.name(), "nothing", None
    if not first.is_write:
        return operator.name(), "view", None
    outs = [argument.name for argument in schema.arguments if argument.is_out]
    return operator.name(), "written", outs[0] if outs else 0


def _fallback(operator, *args, **kwargs):
    name, aliases, written = _described(operator)
    OPERATORS[name] += name not in VIEWS
    given = [t for value in (*args, *kwargs.values()) for t in (value if isinstance(value, list | tuple) else (value,))]
    given = [t for t in given if isinstance(t, torch.Tensor)]
    _check(name, given)
    for t in given:
        if t.device.type == "cpu" and t.ndim > 0:
            raise RuntimeError(f"{name}: a tensor of shape {tuple(t.shape)} is on the CPU, others are on the device")
    if kwargs.get("device") is not None:
        kwargs["device"] = torch.device("cpu")
    result = operator(*map(_unwrap, args), **{key: _unwrap(value) for key, value in kwargs.items()})
    if aliases == "written":
        return args[0] if written == 0 else kwargs[written]
    _check(name, result if isinstance(result, list | tuple) else (result,))
    if aliases == "view":
        return _wrapped(result, lambda value: _strided(given[0], value))
    return _wrapped(result, to_device)


def _wrapped(value, wrap):
    if isinstance(value, torch.Tensor):
        return wrap(value)
    return type(value)(_wrapped(part, wrap) for part in value) if isinstance(value, list | tuple) else value


def _copy(source, target, non_blocking=False):
    OPERATORS["aten::copy_"] += 1
    if _rules["allowed"] is not None and not (_on_device(source) and _on_device(target)):
        raise RuntimeError("strict: a copy between the host and the device")
    _check("aten::copy_", (source, target))
    _unwrap(target).copy_(_unwrap(source))
    return target


def _read(t):
    OPERATORS[READ] += 1
    _check(READ, ())
    return to_cpu(t).item()


def _poisoned(t):
    t.untyped_storage().fill_(0xFF)
    return to_device(t)


def _empty(size, dtype=None, memory_format=None, **_):
    layout = memory_format or torch.contiguous_format
    return _poisoned(torch.empty(size, dtype=dtype or torch.get_default_dtype(), memory_format=layout))


def _empty_strided(size, stride, dtype=None, **_):
    return _poisoned(torch.empty_strided(size, stride, dtype=dtype or torch.get_default_dtype()))


def _as_strided_in_place(t, size, stride, storage_offset=None):
    offset = t.storage_offset() if storage_offset is None else storage_offset
    t.data = _strided(t, to_cpu(t).as_strided(size, stride, offset))
    return t


_setup_privateuseone_for_python_backend("npu")
_all = torch.library.Library("_", "IMPL")
_all.fallback(_fallback, "PrivateUse1")
_all.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")  # as torch_npu does
_aten = torch.library.Library("aten", "IMPL")
_aten.impl("_copy_from", _copy, "PrivateUse1")
_aten.impl("_local_scalar_dense", _read, "PrivateUse1")
_aten.impl("empty.memory_format", _empty, "PrivateUse1")
_aten.impl("empty_strided", _empty_strided, "PrivateUse1")
_aten.impl("as_strided_", _as_strided_in_place, "PrivateUse1")
