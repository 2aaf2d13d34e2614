"""Models that would keep softmax, in whole or in part, are refused: when they are loaded, or at their first forward pass.

transformers accepts any registered name for any model. A class that computes attention itself then keeps softmax, or worse:
it calls the registered mask function, and misinterprets the result. Two checks find such models. First, the source of a class
must read ALL_ATTENTION_FUNCTIONS. Second, during the first forward pass, three things are traced back to their module: a
softmax whose result enters a product, a softmax in a class named after attention, and a call of torch's own attention. A module
that may compute attention and did not run then, as a projector without an image, is checked when it first runs.

And a model that was checked does not get softmax back unasked: transformers changes the attention of some models itself.
"""

from __future__ import annotations

import ast
import functools
import gc
import inspect
import re
import sys
import threading
import warnings
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from diffmax.integrations.transformers.heads import NAME, heads_of, parts_of
from diffmax.integrations.transformers.masks import is_traced


@dataclass(frozen=True)
class _Registration:
    """A registered name: its label in errors; whether a model may keep softmax in a part of its attention, None: it warns."""

    label: str
    partial: bool | None


_registered: dict[str, _Registration] = {}
_built: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # all of transformers' models since `watch` was first called
_verified: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # their first forward pass was checked
_watched: weakref.WeakKeyDictionary[nn.Module, list[RemovableHandle]] = (
    weakref.WeakKeyDictionary()
)  # their first forward pass is not checked yet
_late: weakref.WeakKeyDictionary[nn.Module, list[RemovableHandle]] = weakref.WeakKeyDictionary()  # as `_watched`
_current = threading.local()

_INTERFACE = re.compile(r"ALL_ATTENTION_FUNCTIONS|AttentionInterface")
# transformers 5.0 indexes ALL_ATTENTION_FUNCTIONS too
_CLASS_TABLE = re.compile(r"\b(?!ALL_ATTENTION_FUNCTIONS\b)\w*ATTENTION\w*\[[^\]]*_attn_implementation\b")
_ATTENTION_NAME = re.compile(r"Attention|Attn")
_ATTENTION_CLASS = re.compile(r"^class \w*(?:Attention|Attn)\w*\(", re.MULTILINE)
_FUSED = (
    "_native_multi_head_attention",
    "_transformer_encoder_layer_fwd",
    "multi_head_attention_forward",
    "scaled_dot_product_attention",
)
_SOFTMAX = ("softmax", "_softmax", "log_softmax", "softmin")
_SOFTMAX_MODULES = (nn.Softmax, nn.LogSoftmax, nn.Softmin, nn.Softmax2d)  # the module that calls them is named instead
_MAY_ATTEND = re.compile(r"softmax|scaled_dot_product_attention|MultiheadAttention")
# What to do where transformers' own code would change the attention: by the module that does it.
_UNASKED = {
    "transformers.generation.continuous_batching": "continuous batching keeps its own paged cache: call model.generate instead",
    "transformers.modeling_utils": "another model has this configuration: give the new one copy.deepcopy(config)",
    "transformers.models.whisper": "call generate without return_token_timestamps, pipelines without return_timestamps='word'",
}
_PRODUCTS = ("matmul", "mm", "mv", "bmm", "baddbmm", "einsum", "linear", "tensordot", "__matmul__", "__rmatmul__")


def watch(name: str, label: str | None = None, partial: bool | None = False) -> None:
    """From now on check models with this attention implementation; errors start with `label`."""
    _registered[name] = _Registration(label or f'attn_implementation="{name}"', partial)
    import transformers

    kind: Any = transformers.PreTrainedModel
    if hasattr(kind, "_diffmax_checked"):
        return
    kind._diffmax_checked = True
    _watch_assignments(transformers.PreTrainedConfig)
    choose, change, restore = kind.get_correct_attn_implementation, kind.set_attn_implementation, kind.__setstate__

    @functools.wraps(choose)
    def choose_checked(self: Any, requested_attention: Any, *args: Any, **kwargs: Any) -> Any:
        if requested_attention is None and NAME in _registered and heads_of(self.config):
            requested_attention = NAME  # whose first forward pass raises where the heads are not given to the model
        chosen = choose(self, requested_attention, *args, **kwargs)
        _built.add(self)
        if chosen in _registered:
            _refuse_class(self.__class__, chosen)
            _watch_first_forward(self)
        return chosen

    @functools.wraps(change)
    def change_checked(self: Any, attn_implementation: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(attn_implementation, str) and attn_implementation in _registered:
            for part in self.modules():
                if isinstance(part, kind):
                    _refuse_class(part.__class__, attn_implementation)
        else:
            current = self.config._attn_implementation
            wanted = attn_implementation.get("", current) if isinstance(attn_implementation, dict) else attn_implementation
            asks, _ = _who_asks()
            if current in _registered and wanted not in _registered and asks.startswith("transformers."):
                raise ValueError(_unasked(type(self).__name__, current, wanted, asks))
        _built.update(part for part in self.modules() if isinstance(part, kind))
        result = change(self, attn_implementation, *args, **kwargs)
        if isinstance(attn_implementation, dict):
            _refuse_unchanged(self.config, attn_implementation)
        for part in self.modules():
            if isinstance(part, kind) and part.config._attn_implementation in _registered:
                _verified.discard(part)
                _watch_first_forward(part)
        return result

    @functools.wraps(restore)
    def restore_noted(self: Any, state: Any) -> None:  # of a copy, or what was pickled
        restore(self, state)
        _built.add(self)

    kind.get_correct_attn_implementation = choose_checked
    kind.set_attn_implementation = change_checked
    kind.__setstate__ = restore_noted


def _watch_assignments(kind: Any) -> None:
    """Check what is assigned to `config._attn_implementation`, which has the same effect on a model as its method."""
    assigned: Any = kind._attn_implementation
    nested = threading.local()

    @functools.wraps(assigned.fset)
    def assign_checked(config: Any, value: Any) -> None:
        if getattr(nested, "inside", False):
            assigned.fset(config, value)
            return
        before = [(part, getattr(part, "_attn_implementation_internal", None)) for part in _all_parts(config)]
        nested.inside = True
        try:
            assigned.fset(config, value)
            warned = False
            for part, old in before:
                warned = warned or _check_change(part, old, part._attn_implementation_internal)
        except BaseException:  # re-raised: what is refused must leave no mark
            for part, old in before:
                part._attn_implementation_internal = old
            raise
        finally:
            nested.inside = False

    kind._attn_implementation = assigned.setter(assign_checked)


def _check_change(config: Any, old: Any, new: Any) -> bool:
    """Refuse what was assigned to the configuration of models, warn of it, or check their next forward pass.

    Returns whether it warned.
    """
    if old == new or not (old in _registered or new in _registered):
        return False
    models = _models_of(config)
    if new in _registered:
        for model in models:
            _refuse_class(model.__class__, new)
            _verified.discard(model)
            _watch_first_forward(model)
        return False
    if models:  # some may be waiting to be collected
        del models
        gc.collect()
        models = _models_of(config)
    if not models:
        return False
    asks, depth = _who_asks()
    whole = max(models, key=lambda model: len(list(model.modules())))
    message = _unasked(type(whole).__name__, old, new, asks)
    if asks.startswith("transformers."):
        raise ValueError(message)
    warnings.warn(message, stacklevel=depth)
    return True


def _models_of(config: Any) -> list[Any]:
    return [model for model in list(_built) if model.config is config]


def _all_parts(config: Any) -> Iterator[Any]:
    yield config
    for part in parts_of(config).values():
        yield from _all_parts(part)


def _who_asks() -> tuple[str, int]:
    """The Python module whose code changes an attention implementation, and how many calls further out that is."""
    frame, depth = inspect.currentframe(), 0
    while frame is not None:
        where = str(frame.f_globals.get("__name__"))
        on_the_way = frame.f_code.co_name in ("__setattr__", "__strict_setattr__")  # the second is huggingface_hub's
        if where not in (__name__, "transformers.configuration_utils") and not on_the_way:
            return where, depth
        frame, depth = frame.f_back, depth + 1
    return "", depth


def _unasked(model: str, old: Any, new: Any, asks: str) -> str:
    label = _registered[old].label
    if not asks.startswith("transformers."):
        return (
            f'{label}: {model} now computes "{new}" instead, by an assignment to its configuration in {asks}\n'
            f'to say that it is meant, call model.set_attn_implementation("{new}")'
        )
    action = f'load this model with attn_implementation="{new}" for what needs it'
    for where, known in _UNASKED.items():
        action = known if asks.startswith(where) else action
    return (
        f'{label}: {model} must keep its attention, got "{new}" from {asks}, '
        f"which would compute other weights from then on\n{action}"
    )


def called() -> None:
    """Record a call of the attention function."""
    run = getattr(_current, "run", None)
    if run is not None:
        run.calls += 1


def refuse_heads(label: str, module: nn.Module) -> None:
    """Refuse a layer of a model that `replace` has adapted, in an attention that would not use its alpha and scale per head."""
    config = getattr(module, "config", None)
    if heads_of(config):
        raise ValueError(
            f"{label}: the configuration of this {type(module).__name__} has an alpha and a scale per head, which the chosen "
            "attn_implementation would not use\ncall diffmax.integrations.transformers.replace(model), or to give them up "
            f"set diffmax to None in that {type(config).__name__}"
        )


@functools.cache
def _refuse_class(kind: type, name: str) -> None:
    """Refuse a class that computes attention itself and whose source does not read the registered functions."""
    source = "\n".join(_source_of(base) for base in kind.__mro__)
    if _CLASS_TABLE.search(source):
        does = f'takes its attention from a table of classes, which has none for "{name}"'
    elif not _INTERFACE.search(source) and _ATTENTION_CLASS.search(source):
        does = "computes its attention itself and would keep softmax"
    else:
        return
    raise ValueError(
        f"{_registered[name].label}: {kind.__name__} {does}\n"
        f"its source, {kind.__module__}, does not read transformers' ALL_ATTENTION_FUNCTIONS: load this model with "
        f'attn_implementation="eager", or this part of it ({{"text_config": "{name}", "vision_config": "eager"}})'
    )


def _source_of(kind: type) -> str:
    """The source of a model's class, and recursively of the classes of its Python module that it uses."""
    classes = _classes(kind.__module__)
    found, waiting = {}, [kind.__name__]
    while waiting:
        name = waiting.pop()
        if name in classes and name not in found:
            found[name] = classes[name]
            waiting.extend(re.findall(r"\w+", classes[name]))
    return "\n".join(found.values())


@functools.cache
def _classes(module: str) -> dict[str, str]:
    """Source of the classes, and tables of classes, of a Python module, by name."""
    if module.partition(".")[0] in ("torch", "builtins", "abc", "typing") or module == "transformers.modeling_utils":
        return {}
    try:
        source = inspect.getsource(sys.modules[module])
    except (KeyError, OSError, TypeError):
        return {}
    tree = ast.parse(source)
    named: dict[str, ast.stmt] = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    for node in tree.body:
        if isinstance(node, ast.Assign):
            named.update({target.id: node for target in node.targets if isinstance(target, ast.Name)})
    return {name: ast.get_source_segment(source, node) or "" for name, node in named.items()}


def _refuse_unchanged(config: Any, wanted: dict[str, Any]) -> None:
    """Refuse a part whose implementation cannot be changed, which transformers only logs."""
    for key, name in wanted.items():
        part = config if key == "" else getattr(config, key, None)
        if isinstance(name, dict):
            _refuse_unchanged(part, name)
        elif name in _registered and part is not None and part._attn_implementation != name:
            raise ValueError(
                f'set_attn_implementation: {key or "the model"} must let its attention be chosen, got "{name}" for one that '
                f'keeps "{part._attn_implementation}"\nit computes its attention itself: leave it out of the dictionary'
            )


@dataclass
class _Run:
    """The first forward pass of a model, while it lasts."""

    model: nn.Module
    mode: _Softmaxes
    calls: int = 0
    inside: list[nn.Module] = field(default_factory=list)
    idle: dict[nn.Module, RemovableHandle] = field(default_factory=dict)  # what may compute attention, until it runs


class _Softmaxes(TorchFunctionMode):
    """Finds modules that compute attention themselves: those with a softmax whose result enters a product."""

    def __init__(self) -> None:
        super().__init__()
        # results of softmax and tensors derived from them, by id, with the module that computed them
        self.weights: dict[int, tuple[weakref.ref[Tensor], str]] = {}
        self.softmax_in: dict[str, None] = {}

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        if name in _FUSED:
            self._record(_owner())
        result = function(*args, **kwargs)
        if not isinstance(result, Tensor):
            return result
        if name in _SOFTMAX and result.dim() >= 2:
            owner = _owner()
            if owner is not None and _ATTENTION_NAME.search(owner):
                self._record(owner)  # however it uses the weights
            self._follow(result, owner if result.dim() >= 3 else None)
        for given in _tensors(args) if self.weights else ():
            owner = self._owner_of(given)
            if name in _PRODUCTS and not (name == "linear" and isinstance(args[1], nn.Parameter)):  # a layer reads it
                self._record(owner)
            elif result.numel() == given.numel() and result.is_floating_point():
                self._follow(result, owner)
        return result

    def _follow(self, tensor: Tensor, owner: str | None) -> None:
        if owner is not None:
            self.weights[id(tensor)] = weakref.ref(tensor), owner

    def _owner_of(self, tensor: Tensor) -> str | None:
        known = self.weights.get(id(tensor))
        return known[1] if known is not None and known[0]() is tensor else None

    def _record(self, owner: str | None) -> None:
        if owner is not None:
            self.softmax_in[owner] = None


def _tensors(args: Any) -> Iterator[Tensor]:
    for given in args:
        if isinstance(given, Tensor):
            yield given
        elif isinstance(given, (list, tuple)):
            yield from (inner for inner in given if isinstance(inner, Tensor))


def _owner() -> str | None:
    """The class of the running module, unless its configuration selects another implementation."""
    from transformers import PreTrainedModel

    frame = inspect.currentframe()
    owner: nn.Module | None = None
    while frame is not None:
        where = str(frame.f_globals.get("__name__"))
        if where.startswith("diffmax.") and where != __name__:
            return None  # one of diffmax's own functions
        module = frame.f_locals.get("self")
        if isinstance(module, nn.Module) and frame.f_code.co_name != "_call_impl":
            owner = module if owner is None and not isinstance(module, _SOFTMAX_MODULES) else owner
            config = getattr(module, "config", None)
            if owner is not None and (isinstance(module, PreTrainedModel) or hasattr(config, "_attn_implementation")):
                return type(owner).__name__ if getattr(config, "_attn_implementation", None) in _registered else None
        frame = frame.f_back
    return None


def _watch_first_forward(model: nn.Module) -> None:
    for module in model.modules() if _late else ():  # they are looked at again
        for hook in _late.pop(module, []):
            hook.remove()
    if model not in _watched:
        _watched[model] = [
            model.register_forward_pre_hook(_begin, prepend=True),
            model.register_forward_hook(_end, always_call=True),
        ]


def _begin(model: Any, _: Any) -> None:
    if is_traced():
        return
    run = getattr(_current, "run", None)
    if run is not None and not _is_running(run.model):  # it was interrupted; no hook reports that
        _stop(run)
        run = None
    if run is not None:
        run.inside.append(model)
    elif model not in _verified and model.config._attn_implementation in _registered:
        run = _current.run = _Run(model, _Softmaxes())
        for module in model.modules():
            if _may_attend(module.__class__):
                run.idle[module] = module.register_forward_pre_hook(lambda module, _: _runs(run, module))
        run.mode.__enter__()


def _runs(run: _Run, module: nn.Module) -> None:
    handle = run.idle.pop(module, None)
    if handle is not None:
        handle.remove()


@functools.cache
def _may_attend(kind: type) -> bool:
    """Whether a class, no model of its own, may compute attention: by its name and source."""
    from transformers import PreTrainedModel

    if issubclass(kind, PreTrainedModel):
        return False
    if issubclass(kind, nn.MultiheadAttention) or _ATTENTION_NAME.search(kind.__name__):
        return True
    return bool(_MAY_ATTEND.search(_classes(kind.__module__).get(kind.__name__, "")))


def _end(model: Any, _: Any, output: Any) -> None:
    run = None if is_traced() else getattr(_current, "run", None)
    if run is None or run.model is not model:
        return
    _stop(run)
    if output is None:  # the forward pass failed: check the next one
        return
    name = model.config._attn_implementation
    if not run.calls:
        if not run.mode.softmax_in and (_is_a_part(model) or _has_other_parts(model.config)):
            return
        does = (
            f"it computed softmax in {', '.join(run.mode.softmax_in)}"
            if run.mode.softmax_in
            else "it computed no attention at all"
        )
        raise ValueError(
            f"{_registered[name].label}: {type(model).__name__} must ask for its attention function, got a forward pass "
            f'without a call\n{does}: load this model with attn_implementation="eager"'
        )
    if run.mode.softmax_in and _registered[name].partial is None:
        warnings.warn(_keeps(name, type(model).__name__, run.mode), stacklevel=2)
    elif run.mode.softmax_in and not _registered[name].partial:
        raise ValueError(_also(name, type(model).__name__, run.mode))
    for seen in (model, *run.inside):
        _verified.add(seen)
        for hook in _watched.pop(seen, []):
            hook.remove()
    if not _registered[name].partial:
        for module in run.idle:
            _Late(name, type(model).__name__).watch(module)


def _keeps(name: str, model: str, mode: _Softmaxes) -> str:
    return f"{_registered[name].label}: {model} keeps softmax in {', '.join(mode.softmax_in)}, which computes it itself"


def _also(name: str, model: str, mode: _Softmaxes) -> str:
    return (
        f"{_registered[name].label}: {model} asks for its attention function, and also computes softmax itself, in "
        f"{', '.join(mode.softmax_in)}\nto have softmax there and diffmax elsewhere, write register(..., partial=True)"
    )


class _Late:
    """The hooks of a module that did not run in its model's first forward pass."""

    def __init__(self, name: str, model: str) -> None:
        self.name, self.model, self.is_checked = name, model, False

    def watch(self, module: nn.Module) -> None:
        """Check the module when it first runs."""
        _late[module] = [
            module.register_forward_pre_hook(self.begin, prepend=True),
            module.register_forward_hook(self.end, always_call=True),
        ]

    def begin(self, module: Any, _: Any) -> None:
        if not (self.is_checked or is_traced()) and getattr(_current, "run", None) is None:
            _current.run = _Run(module, _Softmaxes())
            _current.run.mode.__enter__()

    def end(self, module: Any, _: Any, output: Any) -> None:
        run = None if is_traced() else getattr(_current, "run", None)
        if run is None or run.model is not module:
            return
        _stop(run)
        if output is None:
            return
        partial = _registered[self.name].partial
        if run.mode.softmax_in and partial is False:
            raise ValueError(_also(self.name, self.model, run.mode))
        if run.mode.softmax_in and partial is None:
            warnings.warn(_keeps(self.name, self.model, run.mode), stacklevel=2)
        self.is_checked = True
        for hook in _late.pop(module, []):
            hook.remove()


def _stop(run: _Run) -> None:
    _current.run = None
    run.mode.__exit__(None, None, None)
    for handle in run.idle.values():
        handle.remove()


def _is_running(model: nn.Module) -> bool:
    frame = inspect.currentframe()
    while frame is not None and frame.f_locals.get("self") is not model:
        frame = frame.f_back
    return frame is not None


def _has_other_parts(config: Any) -> bool:
    """Whether a part of a composite model has another attention, and may be all that ran."""
    names = [getattr(part, "_attn_implementation", None) for part in parts_of(config).values()]
    return any(name is not None and name not in _registered for name in names)


def _is_a_part(model: nn.Module) -> bool:
    """Whether a larger watched model contains it, such as an encoder without attention that `generate` calls first."""
    return any(other is not model and any(part is model for part in other.modules()) for other in list(_watched))
