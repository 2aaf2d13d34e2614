"""Which backend runs a call. Plugins are found once, at import; per call a cached decision is looked up.

The order of choice: the `backend` argument, `use_backend(...)`, DIFFMAX_BACKEND, then the largest priority. A backend that is
named never falls back: if it cannot run the call, the error gives every reason.
"""

from __future__ import annotations

import importlib
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from diffmax.errors import BackendError, NoBackendError
from diffmax.machine import builtin, discovery, env
from diffmax.machine.discovery import Plugin, PluginRefusedError
from diffmax.machine.runtimes import RUNTIMES, runtime_of
from diffmax.operators.common.results import checked
from diffmax.operators.common.spec import adapted
from diffmax.plugin import Backend, CallSpec

_HINT = "run `python -m diffmax` to see what is installed"
_NOT_CHOSEN: Any = object()


class Registry:
    """What this process knows of backends: settings, plugins, probes' answers, and decisions made."""

    def __init__(self) -> None:
        self.settings = env.Settings()
        self.manager = discovery.make_plugin_manager()
        self.plugins: list[Plugin] = []
        self.kernels: dict[tuple[object, ...], Callable[..., Any] | None] = {}
        self.probes: dict[str, tuple[str, str]] = {}
        self.noticed: set[str] = set()
        self.lock = threading.RLock()

    def discover(self) -> None:
        """Read the environment, find the plugins, load them after diffmax-core's own."""
        with self.lock:
            if self.plugins:  # a plugin's import led back here
                return
            self.settings = env.read()
            core = Plugin("core", "diffmax-core", discovery.CORE_VERSION)
            core.accept(discovery.register(builtin.plugin, core, self.manager))
            self.plugins = [core, *discovery.find(self.settings)]
            self.load_deferred()
            unknown = sorted(set(self.settings.block) - {plugin.name for plugin in self.plugins})
            if unknown and self.settings.plugins:
                own = sorted({backend.name for backend in core.backends} & set(unknown))
                hint = (
                    f"\n{', '.join(own)}: diffmax-core's own backends cannot be blocked; use_backend chooses one" if own else ""
                )
                discovery.warn(f"diffmax: DIFFMAX_BLOCK names {', '.join(unknown)}, and no such plugin is installed{hint}")

    def load_deferred(self) -> None:
        """Load the plugins that have not been. One whose backend has a taken name is shadowed."""
        with self.lock:
            for plugin in [plugin for plugin in self.plugins if plugin.status == "deferred"]:
                owners = {b.name: p for p in self.plugins for b in p.backends}
                discovery.load(plugin, self.manager)
                taken = [b.name for b in plugin.backends if b.name in owners]
                if taken:
                    plugin.backends = ()
                    plugin.refuse("shadowed", f"the backend name {taken[0]!r} is taken by {owners[taken[0]].distribution}")
                if plugin.status != "deferred":
                    self.kernels.clear()
            for plugin in self.plugins:
                plugin.warn_if_refused()

    def backends(self) -> list[Backend]:
        """All that are loaded, in the order in which the automatic choice tries them."""
        self.load_deferred()
        loaded = [backend for plugin in self.plugins for backend in plugin.backends]
        return sorted(loaded, key=lambda backend: (-backend.priority, backend.name))

    def owner(self, backend: Backend) -> Plugin:
        """The plugin that registered `backend`."""
        return next(plugin for plugin in self.plugins if backend in plugin.backends)

    def probe(self, backend: Backend) -> tuple[str, str]:
        """Ask once whether the backend can run on this machine: ("", "") if so, else status and reason."""
        with self.lock:
            if backend.name not in self.probes:
                try:
                    reason = import_function(backend.probe)() if backend.probe else None
                    hint = f"; {backend.install_hint}" if backend.install_hint else ""
                    self.probes[backend.name] = ("unavailable", f"{reason}{hint}") if reason else ("", "")
                except (Exception, SystemExit) as error:  # noqa: BLE001  (a probe may not raise; if it does, its backend is out, no other)
                    self.probes[backend.name] = ("failed", f"its probe raised {type(error).__name__}: {error}")
            return self.probes[backend.name]


registry = Registry()

# What `use_backend` set in this thread. Thread-local rather than a ContextVar, which torch.compile cannot trace; and no
# subclass with a default in the class, on which torch.compile would set no guard.
_selection = threading.local()
_selection.name = ""


def kernel(
    operator: str,
    scores: Tensor,
    backend: str,
    *,
    tensor_alpha: bool = False,
    alpha_gradient: bool = False,
    features: frozenset[str] = frozenset(),
    head_dims: tuple[int, int] = (0, 0),
) -> Callable[..., Any]:
    """The function that computes `operator` for these scores: of the named backend, or of the best one for backend "".

    `features` are further ones that the call needs; `head_dims`, for attention, the sizes of a query and of a value.

    Raises:
        NoBackendError: No backend can, or the named one cannot.
        BackendError: The chosen kernel cannot be imported.
    """
    deterministic = torch.are_deterministic_algorithms_enabled()
    key = (
        operator,
        scores.device.type,
        scores.dtype,
        backend,
        tensor_alpha,
        alpha_gradient,
        deterministic,
        features,
        head_dims,
    )
    found = registry.kernels.get(key)
    if found is None:
        wanted = {"tensor_alpha": tensor_alpha, "alpha_gradient": alpha_gradient, "deterministic": deterministic}
        needed = features | {name for name, on in wanted.items() if on}
        spec = describe(operator, scores.device.type, scores.dtype, needed, *head_dims)
        with registry.lock:  # or a backend that is unregistered meanwhile would stay
            found = registry.kernels[key] = _load_kernel(choose(spec, backend), operator)
    return found


def weights_kernel(scores: Tensor, backend: str) -> Callable[..., Tensor] | None:
    """What the chosen kernel offers for scores on the CPU of which the weights alone are wanted; None if it offers nothing."""
    key = (scores.dtype, backend, torch.are_deterministic_algorithms_enabled())
    found: Callable[..., Tensor] | None = registry.kernels.get(key, _NOT_CHOSEN)  # once: another thread may empty it
    if found is _NOT_CHOSEN:
        with registry.lock:
            found = registry.kernels[key] = getattr(kernel("bisect", scores, backend), "weights", None)
    return found


def describe(
    operator: str,
    device_type: str,
    dtype: torch.dtype,
    features: frozenset[str] = frozenset(),
    head_dim: int = 0,
    value_dim: int = 0,
) -> CallSpec:
    """A CallSpec, with the runtime that drives the device type in this process."""
    return CallSpec(operator, device_type, runtime_of(device_type), dtype, features, head_dim, value_dim)


def choose(spec: CallSpec, backend: str = "") -> Backend:
    """The backend for a call; notice once if that is plain PyTorch on an accelerator."""
    names = names_for(spec, backend)
    verdicts = judge(spec, names)
    chosen = next((candidate for candidate, reasons in verdicts if not reasons), None)
    if chosen is None:
        named = f"the backend{'s' * (len(names) > 1)} {', '.join(names)} cannot run" if names else "no backend can run"
        raise NoBackendError(f"{named} {spec}\n{_listed(verdicts)}\n{missing_package(spec.runtime) or _HINT}")
    if chosen.name == "reference" and not names and spec.device_type not in ("cpu", "meta"):
        _notice_reference(spec, verdicts)
    return chosen


def names_for(spec: CallSpec, backend: str) -> tuple[str, ...]:
    """The explicitly requested backends; () leaves the dispatch to the priorities.

    A backend that provides no backward at all leaves that operator to the others, also when it is named.
    """
    names = (backend,) if backend else registry.settings.backend
    known = {b.name: b for b in registry.backends()}
    for name in names:
        if name not in known:
            raise NoBackendError(_unknown_name(name, known))
    if spec.operator.endswith("_backward") and not any(spec.operator in known[name].kernels for name in names):
        return ()
    return names


def judge(spec: CallSpec, names: Sequence[str] = ()) -> list[tuple[Backend, list[str]]]:
    """Each candidate with the reasons against it, in the order of choice."""
    candidates = registry.backends()
    if names:
        candidates = sorted((b for b in candidates if b.name in names), key=lambda b: names.index(b.name))
    return [(candidate, _reasons_against(candidate, spec, bool(names))) for candidate in candidates]


def selected(backend: str | None = None) -> str:
    """The backend of a call: the argument, else what `use_backend` set in this thread, else ""."""
    if backend is not None and not isinstance(backend, str):
        raise TypeError(
            f"diffmax: backend must be a name from diffmax.backends(), got {backend!r} of type {type(backend).__name__}"
        )
    used_here: str = getattr(_selection, "name", "")
    return backend or used_here


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run the calls made inside the `with` block, and the backward of those calls, on the named backend.

    It never falls back: a call that the backend cannot run raises NoBackendError with the reasons. It holds for the thread
    that entered the block, in eager mode and under torch.compile. What torch.utils.checkpoint computes again is a new call:
    enter the block inside the checkpointed function.

    Args:
        name: As `diffmax.backends()` lists it.
    Raises:
        TypeError: name is no string.
        NoBackendError: No such backend is loaded.
    Example:
        >>> import torch, diffmax
        >>> with diffmax.use_backend("reference"):
        ...     p = diffmax.diffmax_bisect(torch.tensor([3.0, 2.0, 1.0, 0.0]), alpha=0.5)
    """
    if not isinstance(name, str):
        raise TypeError(f"use_backend: name must be a string, as diffmax.backends() lists them, got {name!r}")
    known = {backend.name: backend for backend in registry.backends()}
    if name not in known:
        raise NoBackendError(_unknown_name(name, known))
    before = selected()
    _selection.name = name
    try:
        yield
    finally:
        _selection.name = before


def register_backend(backend: Backend, *, replace: bool = False) -> None:
    """Add a backend to this process, as a plugin would: for notebooks and tests.

    Args:
        backend: Its description.
        replace: Whether it may take the place of another one that was registered so.
    Raises:
        TypeError: `backend` is no Backend.
        ValueError: The name is taken, or it was written for another version of the plugin interface.
    """
    if not isinstance(backend, Backend):
        raise TypeError(f"register_backend: expected a diffmax.plugin.Backend, got {backend!r}")
    try:
        discovery.check_versions(backend)
    except PluginRefusedError as refusal:
        raise ValueError(f"register_backend: {backend.name} is {refusal.args[1]}") from None
    with registry.lock:
        if replace and any(p.name == backend.name and p.distribution == _BY_CALL for p in registry.plugins):
            unregister_backend(backend.name)
        taken = next((p for p in registry.plugins for b in p.backends if b.name == backend.name), None)
        if taken is not None:
            raise ValueError(f"register_backend: the name {backend.name!r} is taken by {taken.distribution}")
        plugin = Plugin(backend.name, _BY_CALL, "")
        plugin.accept((backend,))
        registry.plugins = [*registry.plugins, plugin]  # a new list: other threads may be reading the old one
        registry.kernels.clear()


def unregister_backend(name: str) -> None:
    """Remove a backend that `register_backend` added.

    Raises:
        ValueError: None of that name was.
    """
    with registry.lock:
        added = [p for p in registry.plugins if p.distribution == _BY_CALL]
        plugin = next((p for p in added if p.name == name), None)
        if plugin is None:
            known = ", ".join(p.name for p in added) or "none"
            raise ValueError(f"unregister_backend: no backend {name!r} was added with register_backend, added: {known}")
        registry.plugins = [p for p in registry.plugins if p is not plugin]
        registry.probes.pop(name, None)
        registry.kernels.clear()


_BY_CALL = "(register_backend)"


def _reasons_against(backend: Backend, spec: CallSpec, named: bool) -> list[str]:
    reasons = backend.reasons_against(spec)
    if not backend.automatic and not named:
        reasons.append("is opt-in: request it with backend=")
    if reasons:  # the device's own backend may know what to do about them
        return reasons + (_asked(backend, spec) if spec.device_type in backend.device_types else [])
    _, reason = registry.probe(backend)
    return [reason] if reason else _asked(backend, spec)


def _asked(backend: Backend, spec: CallSpec) -> list[str]:
    if backend.unsupported is None:
        return []
    try:
        found = import_function(backend.unsupported)(spec)
        return [found] if found and isinstance(found, str) else list(found)
    except (Exception, SystemExit) as error:  # noqa: BLE001  (it may not raise; if it does, its backend is out, not the others)
        return [f"its check of the call raised {type(error).__name__}: {error}"]


def _load_kernel(backend: Backend, operator: str) -> Callable[..., Any]:
    target, owner = backend.provided[operator].function, registry.owner(backend)

    def refuse(fault: str) -> BackendError:
        return BackendError(f"backend {backend.name}: its kernel {target} {fault}\nto leave it out, {_leave_out(owner)}")

    try:
        run = import_function(target)
    except (Exception, SystemExit) as error:
        raise refuse(f"cannot be imported: {error}") from error
    if not callable(run):
        raise refuse(f"of {operator} must be a function, got {run!r}")
    run = adapted(operator, run, backend.api_version)
    is_own = owner is registry.plugins[0]
    return run if is_own else checked(operator, run, lambda fault: refuse(f"of {operator} {fault}"))


def _leave_out(owner: Plugin) -> str:
    by_call = owner.distribution == _BY_CALL
    return f"call diffmax.unregister_backend({owner.name!r})" if by_call else f"set DIFFMAX_BLOCK={owner.name}"


def import_function(target: str) -> Callable[..., Any]:
    """What "module:function" names."""
    module, _, attribute = target.partition(":")
    function: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
    return function


def _listed(verdicts: list[tuple[Backend, list[str]]]) -> str:
    return "\n".join(f"  {backend.name}: {'; '.join(reasons)}" for backend, reasons in verdicts)


def _unknown_name(name: str, known: dict[str, Backend]) -> str:
    import difflib  # takes milliseconds, and is seldom asked

    by_variable = name in registry.settings.backend
    lines = [f"no backend is named {name!r}{', which DIFFMAX_BACKEND asks for' if by_variable else ''}"]
    lines.append(f"  loaded: {', '.join(known)}")
    lines += [f"  did you mean {near!r}?" for near in difflib.get_close_matches(name.lower(), known, 1)]
    lines += [f"  {p} is {p.status}: {p.reason}" for p in registry.plugins if p.name == name and p.reason]
    runtime = next((runtime.name for runtime in RUNTIMES if runtime.package == f"diffmax-{name}"), "")
    return "\n".join([*lines, missing_package(runtime) or _HINT])


def missing_package(runtime: str) -> str:
    """What to install for such a device's kernels; "" if it is there, or nothing is known for it."""
    package = next((known.package for known in RUNTIMES if known.name == runtime), "")
    return f"run: pip install {package}" if package and package not in {p.distribution for p in registry.plugins} else ""


def _notice_reference(spec: CallSpec, verdicts: list[tuple[Backend, list[str]]]) -> None:
    advice = missing_package(spec.runtime)
    against = _listed([(backend, reasons) for backend, reasons in verdicts if reasons])
    message = f"no fused kernel for {spec}: the reference runs, correct but slow\n{against}" + (f"\n{advice}" if advice else "")
    if registry.settings.strict:
        raise NoBackendError(f"DIFFMAX_STRICT=1: {message}\n{_HINT}")
    if spec.device_type not in registry.noticed:
        registry.noticed.add(spec.device_type)
        warnings.warn(f"diffmax: {message}", RuntimeWarning, stacklevel=2)
