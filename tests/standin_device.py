"""A device `npu` without hardware, for a process of its own: torch's PrivateUse1 key, its memory ordinary CPU tensors.

Each operator on it runs on the CPU tensors behind its arguments. What torch's dispatcher, autograd and diffmax's choice of a
backend do with such a device is real; only the arithmetic is borrowed. `OPERATORS` counts what reached the device.
"""

import collections

import torch
from torch.utils._pytree import tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

OPERATORS: collections.Counter[str] = collections.Counter()
_behind: dict[int, torch.Tensor] = {}  # by storage: autograd hands on shallow copies of a tensor, which share it


def to_device(t: torch.Tensor) -> torch.Tensor:
    """A tensor on the device with `t`'s values."""
    handle = torch._C._acc.create_empty_tensor(tuple(t.shape), t.dtype)
    _behind[handle.untyped_storage()._cdata] = t
    return handle


def to_cpu(t: torch.Tensor) -> torch.Tensor:
    """The values behind a tensor on the device."""
    return _behind[t.untyped_storage()._cdata]


def _unwrap(value):
    return to_cpu(value) if isinstance(value, torch.Tensor) and value.device.type == "npu" else value


def _fallback(operator, *args, **kwargs):
    OPERATORS[operator.name()] += 1
    if kwargs.get("device") is not None:
        kwargs["device"] = torch.device("cpu")
    result = operator(*tree_map(_unwrap, args), **tree_map(_unwrap, kwargs))
    returns = operator._schema.returns
    if returns and returns[0].alias_info is not None and returns[0].alias_info.is_write:
        out = [argument.name for argument in operator._schema.arguments if argument.is_out]
        return kwargs[out[0]] if out else args[0]
    return tree_map(lambda value: to_device(value) if isinstance(value, torch.Tensor) else value, result)


def _copy(source, target, non_blocking=False):
    _unwrap(target).copy_(_unwrap(source))
    return target


def _read(t):
    OPERATORS["aten::_local_scalar_dense"] += 1
    return to_cpu(t).item()


def _empty(size, dtype=None, **_):
    return to_device(torch.empty(size, dtype=dtype or torch.get_default_dtype()))


def _empty_strided(size, stride, dtype=None, **_):
    return to_device(torch.empty_strided(size, stride, dtype=dtype or torch.get_default_dtype()))


_setup_privateuseone_for_python_backend("npu")
_all = torch.library.Library("_", "IMPL")
_all.fallback(_fallback, "PrivateUse1")
_aten = torch.library.Library("aten", "IMPL")
_aten.impl("_copy_from", _copy, "PrivateUse1")
_aten.impl("_local_scalar_dense", _read, "PrivateUse1")
_aten.impl("empty.memory_format", _empty, "PrivateUse1")
_aten.impl("empty_strided", _empty_strided, "PrivateUse1")
