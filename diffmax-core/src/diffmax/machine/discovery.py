"""Discovery of plugins: importlib-metadata lists them, pluggy validates their hooks. Nothing here raises for a bad plugin.

A plugin must pass these checks in turn; the first failure determines its status and reason: it is not blocked, its name is not
taken (shadowed), the requirements of its distribution are met (incompatible: its code is never imported), it can be imported
with valid hooks and descriptions (failed), and it is written for this plugin interface (incompatible).
"""

from __future__ import annotations

import logging
import re
import sys
import traceback
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pluggy

from diffmax.machine.env import Settings
from diffmax.machine.metadata import EntryPoint, PackageNotFoundError, core_version, entry_points_of, facts, version
from diffmax.plugin import API_VERSION, ENTRY_POINT_GROUP, SHARED_KERNELS_VERSION, Backend, HookSpecs

CORE_VERSION = core_version()


@dataclass
class Plugin:
    """An entry point of a plugin, and its status.

    Attributes:
        name: Name of the entry point.
        distribution, version: The distribution that provides it.
        status: "loaded", "deferred", "blocked", "shadowed", "incompatible" or "failed".
        reason: The reason for the status, in words.
        backends: The registered backends, if it was loaded.
        error: Traceback of a failure.
    """

    name: str
    distribution: str
    version: str
    status: str = "deferred"
    reason: str = ""
    backends: tuple[Backend, ...] = ()
    error: str = ""
    entry_point: EntryPoint | None = field(default=None, repr=False)
    warned: bool = False
    is_second: bool = False  # another plugin has its name, and DIFFMAX_BLOCK would leave out both

    def __str__(self) -> str:
        return f"plugin {self.name!r} of {self.distribution} {self.version}"

    def accept(self, backends: tuple[Backend, ...]) -> None:
        """Take the descriptions."""
        self.status, self.reason, self.backends = "loaded", "", backends

    def refuse(self, status: str, reason: str, error: str = "") -> None:
        """Set the status; `warn_if_refused` tells the user."""
        self.status, self.reason, self.error = status, reason, error

    def warn_if_refused(self) -> None:
        """Warn once that the plugin is not used, with the remedy."""
        if self.status in ("loaded", "deferred", "blocked") or self.warned:
            return
        self.warned = True
        advice = "" if self.is_second else f"\nset DIFFMAX_BLOCK={self.name} to leave it out without this warning"
        warn(f"diffmax: {self} is {self.status}: {self.reason}{advice}")


class PluginRefusedError(Exception):
    """Internal: a plugin is not used; the arguments are (status, reason)."""


def warn(message: str) -> None:
    """Issue a RuntimeWarning; if warnings are errors, a log record instead, because an import must not fail."""
    try:
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    except RuntimeWarning:
        logging.getLogger("diffmax").warning(message)


def make_plugin_manager() -> pluggy.PluginManager:
    """A plugin manager with diffmax's hooks."""
    manager = pluggy.PluginManager("diffmax")
    manager.add_hookspecs(HookSpecs)
    return manager


def find(settings: Settings) -> list[Plugin]:
    """The installed plugins, in an order that does not depend on the file system; blocked and shadowed ones are marked."""
    if not settings.plugins:
        return []
    plugins: dict[tuple[str, str], Plugin] = {}
    taken: dict[str, Plugin] = {}
    for point in sorted(entry_points_of(ENTRY_POINT_GROUP), key=_sort_key):
        plugin = Plugin(point.name, *_origin(point), entry_point=point)
        # an editable and a wheel install of one distribution show the same entry point twice
        if plugins.setdefault((point.name, point.value), plugin) is not plugin:
            continue
        if point.name in settings.block:
            plugin.refuse("blocked", "by DIFFMAX_BLOCK")
        elif taken.setdefault(point.name, plugin) is not plugin:
            plugin.is_second = True
            plugin.refuse("shadowed", f"the name is taken by {taken[point.name].distribution}; uninstall one of the two")
    return list(plugins.values())


def load(plugin: Plugin, manager: pluggy.PluginManager) -> None:
    """Import a plugin and store its descriptions; set its status.

    A plugin whose module is currently being imported (it was imported before diffmax, and imports diffmax) stays "deferred".
    """
    point = plugin.entry_point
    if point is None or plugin.status != "deferred":
        return
    try:
        _check_requirements(point)
        if _is_initialising(point.module):
            return
        plugin.accept(register(point.load(), plugin, manager))
    except PluginRefusedError as refusal:
        plugin.refuse(*refusal.args)
    except (Exception, SystemExit) as error:  # noqa: BLE001  (whatever a plugin's import raises must not break `import diffmax`)
        plugin.refuse("failed", f"{type(error).__name__}: {error}", traceback.format_exc())


def register(registered: object, plugin: Plugin, manager: pluggy.PluginManager) -> tuple[Backend, ...]:
    """Register a plugin with pluggy, which checks its hooks, and return the backends that it describes."""
    manager.register(registered, plugin.name)
    try:
        manager.check_pending()
        others = [other for name, other in manager.list_name_plugin() if name != plugin.name]
        answers = manager.subset_hook_caller("diffmax_backends", remove_plugins=others)()
        if not answers:
            raise PluginRefusedError(
                "failed", f"{registered!r} implements no diffmax_backends marked with diffmax.plugin.hookimpl"
            )
        return tuple(backend for answer in answers for backend in _as_backends(answer))
    except BaseException:  # re-raised: pluggy must not keep a partly registered plugin
        manager.unregister(name=plugin.name)
        raise


def check_versions(backend: Backend) -> None:
    """Raise PluginRefusedError if the backend was written for another plugin interface or other shared kernels."""
    theirs, ours = tuple(backend.api_version), API_VERSION
    if theirs[0] != ours[0] or theirs > ours:
        raise PluginRefusedError(
            "incompatible",
            f"written for plugin API {theirs[0]}.{theirs[1]}, this diffmax-core has {ours[0]}.{ours[1]}; "
            f"upgrade {'diffmax-core' if theirs > ours else 'the plugin'}",
        )
    if backend.shared_kernels not in (None, SHARED_KERNELS_VERSION):
        raise PluginRefusedError(
            "incompatible",
            f"written for version {backend.shared_kernels} of diffmax.kernels, this diffmax-core has {SHARED_KERNELS_VERSION}; "
            "install versions of one release",
        )


def env_report(manager: pluggy.PluginManager) -> dict[str, str]:
    """The results of the `diffmax_env_report` hooks of loaded plugins."""
    report: dict[str, str] = {}
    for name, plugin in manager.list_name_plugin():
        others = [other for other_name, other in manager.list_name_plugin() if other_name != name]
        caller = manager.subset_hook_caller("diffmax_env_report", remove_plugins=others)
        try:
            for answer in caller():
                report.update({f"{name}: {key}": str(value) for key, value in answer.items()})
        except (Exception, SystemExit) as error:  # noqa: BLE001  (a report about problems must not fail because of one)
            report[name] = f"diffmax_env_report of {plugin!r} raised {type(error).__name__}: {error}"
    return report


def _sort_key(point: EntryPoint) -> tuple[str, str, str]:
    distribution, _ = _origin(point)
    return point.name, distribution, point.value


def _origin(point: EntryPoint) -> tuple[str, str]:
    try:
        return facts(point.dist)[:2] if point.dist is not None else ("unknown", "")
    except Exception:  # noqa: BLE001  (an interrupted uninstall leaves a distribution without metadata)
        return "unknown", ""


def _check_requirements(point: EntryPoint) -> None:
    doubtful = [text for text in (facts(point.dist).requires if point.dist is not None else ()) if not _is_surely_met(text)]
    if not doubtful:
        return
    from packaging.requirements import Requirement  # imported here: it compiles large patterns

    for text in doubtful:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            found = ""
        if not found or not requirement.specifier.contains(found, prereleases=True):
            raise PluginRefusedError(
                "incompatible",
                f"requires {requirement}, {f'found {found}' if found else 'which is not installed'}; "
                f"run: pip install '{requirement}'",
            )


def _is_surely_met(text: str) -> bool:
    """Whether a requirement of the simplest form is met: this very version, or a later release. packaging judges all others."""
    simple = re.fullmatch(r"([\w.-]+)\s*(==|>=)\s*(\d+(?:\.\d+)*)", text)
    if simple is None:
        return False
    name, relation, wanted = simple.groups()
    try:
        found = version(name)
    except PackageNotFoundError:
        return False
    return found == wanted if relation == "==" else _release(found) > _release(wanted)


def _release(version: str) -> list[int]:
    """The numbers of a release, without zeros at their end: 2.4.0rc1 is no later release than 2.4."""
    numbers = re.match(r"\d+(?:\.\d+)*", version)
    return [] if numbers is None else [int(n) for n in re.sub(r"(\.0+)+$", "", numbers[0]).split(".")]


def _is_initialising(module: str) -> bool:
    spec = getattr(sys.modules.get(module), "__spec__", None)
    return bool(getattr(spec, "_initializing", False))


def _as_backends(answer: object) -> Sequence[Backend]:
    if not isinstance(answer, Sequence) or isinstance(answer, (str, Mapping)):
        raise PluginRefusedError("failed", f"diffmax_backends must return a sequence of Backend, got {answer!r}")
    for backend in answer:
        if not isinstance(backend, Backend):
            raise PluginRefusedError("failed", f"diffmax_backends must return a sequence of Backend, got one of {backend!r}")
        check_versions(backend)
    return answer
