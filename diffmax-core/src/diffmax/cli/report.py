"""The report of `python -m diffmax`: versions, devices, backends, and advice. Unlike an import, it may touch devices."""

from __future__ import annotations

import math
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from diffmax.machine import discovery, env
from diffmax.machine.dispatch import registry
from diffmax.machine.inspection import KernelTable, backends, format_table, wrapped
from diffmax.machine.metadata import PackageNotFoundError, core_version, version
from diffmax.machine.runtimes import RUNTIMES, Runtime, runtime_of

_CGROUP = "/sys/fs/cgroup"
_OPTIONAL_PACKAGES = ("triton", "pytorch-triton-rocm", "triton-ascend", "torch-npu", "numba")


@dataclass(frozen=True)
class Device:
    """A device that torch sees, such as "cuda:0", its runtime, and its name."""

    device: str
    runtime: str
    name: str


@dataclass(frozen=True)
class Report:
    """The content of the report of `python -m diffmax`; its `asdict` is the JSON output."""

    versions: dict[str, str]
    devices: tuple[Device, ...]
    environment: dict[str, str]
    backends: KernelTable
    failures: dict[str, str]
    plugins: dict[str, str]
    advice: tuple[str, ...]
    problems: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """The report as plain data."""
        return asdict(self) | {"backends": [asdict(record) for record in self.backends]}

    def __str__(self) -> str:
        return self.text()

    def text(self, kernels: bool = False) -> str:
        """The report as text; with `kernels`, a row per kernel instead of a row per backend."""
        table = repr(self.backends) if kernels else str(self.backends)
        parts = [
            _listing("versions", self.versions),
            _listing("devices", {device.device: device.name for device in self.devices}),
            _listing("environment", self.environment) if self.environment else "environment\n  no DIFFMAX_* variable is set",
            "\n  ".join(["backends", *table.splitlines()]),
        ]
        parts += [_listing(title, facts) for title, facts in (("failures", self.failures), ("plugins", self.plugins)) if facts]
        parts += [
            "\n".join([title, *(line for text in lines for line in wrapped(text, indent="  "))])
            for title, lines in (("advice", self.advice), ("problems", self.problems))
            if lines
        ]
        return "\n\n".join(parts)


def collect() -> Report:
    """Collect the report for this process and this machine."""
    devices = visible_devices()
    return Report(
        versions=_versions(),
        devices=devices,
        environment=env.seen(),
        backends=backends(),
        failures={str(plugin): _last_words(plugin.error) for plugin in registry.plugins if plugin.error},
        plugins=discovery.env_report(registry.manager),
        advice=tuple(_advice(devices)),
        problems=tuple(_problems()),
    )


def visible_devices() -> tuple[Device, ...]:
    """The CPU, and every accelerator that torch can use."""
    threads = torch.get_num_threads()
    devices = [Device("cpu", "cpu", f"{_cpu_name()}, torch uses {threads} thread{'s' * (threads != 1)}")]
    kinds = [*dict.fromkeys(runtime.device_type for runtime in RUNTIMES), "xpu", "mps"]
    accelerator = torch.accelerator.current_accelerator() if hasattr(torch, "accelerator") else None  # torch 2.6
    if accelerator is not None and accelerator.type not in kinds:
        kinds.append(accelerator.type)
    for kind in kinds:
        module = getattr(torch, kind, None)
        if module is None or not getattr(module, "is_available", lambda: False)():  # torch.mps has had it since 2.5
            continue
        name_of = getattr(module, "get_device_name", lambda _, kind=kind: kind)
        for index in range(getattr(module, "device_count", lambda: 1)()):
            devices.append(Device(f"{kind}:{index}", runtime_of(kind), name_of(index)))
    return tuple(devices)


def has_device_file(runtime: Runtime) -> bool:
    """Whether the vendor's driver has a device, even if torch was not built for it."""
    return Path(runtime.device_file).exists()


def built_for(runtime: Runtime) -> bool:
    """Whether this torch, with the installed packages, supports such a device."""
    return (_installed(runtime.adapter) if runtime.adapter else getattr(torch.version, runtime.name)) is not None


def cpu_quota() -> float | None:
    """The CPU limit of this container, which torch ignores; None if it has none."""
    quota, _, period = _read(f"{_CGROUP}/cpu.max").strip().partition(" ")
    if not quota:  # cgroup version 1
        quota, period = (_read(f"{_CGROUP}/cpu/cpu.cfs_{name}_us").strip() for name in ("quota", "period"))
    try:
        share = int(quota) / int(period)
    except (ValueError, ZeroDivisionError):  # "max", or no such file
        return None
    return share if share > 0 else None


def _advice(devices: tuple[Device, ...]) -> list[str]:
    installed = {plugin.distribution for plugin in registry.plugins}
    lines = []
    quota, threads = cpu_quota(), torch.get_num_threads()
    if quota is not None and threads > math.ceil(quota):
        lines.append(
            f"this container may use {quota:g} CPUs and torch uses {threads} threads, which wait for each other: "
            f"set OMP_NUM_THREADS={math.ceil(quota)}, or call torch.set_num_threads({math.ceil(quota)})"
        )
    for runtime in RUNTIMES:
        seen = next((device for device in devices if device.runtime == runtime.name), None)
        has_file = has_device_file(runtime)
        if seen is None and has_file:
            lines.append(_why_unseen(runtime))
        if (seen is not None or has_file) and runtime.package not in installed:
            where = f"{seen.device} is {seen.name}" if seen else f"{runtime.device_file} is there"
            lines.append(f"{where}, {runtime.package} is not installed: run: pip install {runtime.package}")
    return lines


def _why_unseen(runtime: Runtime) -> str:
    found = f"{runtime.device_file} shows an {runtime.vendor} device that torch {torch.__version__} does not see"
    if built_for(runtime):
        return f"{found}, though it is built for it: check the driver and the variables that hide devices"
    if runtime.adapter:
        module = runtime.adapter.replace("-", "_")
        return f"{found}: {module} is not installed; install the {runtime.adapter} that fits this torch"
    lacks, install = f"this build of torch lacks {runtime.toolkit}", f"install a torch built for {runtime.toolkit}"
    return f"{found}: {lacks}; {install} (pytorch.org, Get Started)"


def _problems() -> list[str]:
    """Why DIFFMAX_BACKEND fails. All names in it must be loaded, and one must be available."""
    known = {backend.name: backend for backend in registry.backends()}
    reasons = {}
    for name in registry.settings.backend:
        if name not in known:
            return [f"DIFFMAX_BACKEND names {name!r}, which is not loaded; loaded: {', '.join(known)}"]
        status, reason = registry.probe(known[name])
        reasons[name] = f"DIFFMAX_BACKEND names {name!r}, which is {status}: {reason}" if status else ""
    return list(reasons.values()) if all(reasons.values()) else []


def _versions() -> dict[str, str]:
    versions = {
        "diffmax-core": core_version(),
        "Python": f"{platform.python_version()} on {platform.platform()}",
        "torch": torch.__version__,
        "torch built for CUDA": torch.version.cuda or "no",
        "torch built for HIP": torch.version.hip or "no",
    }
    versions |= {name: _installed(name) or "not installed" for name in _OPTIONAL_PACKAGES}
    for runtime in RUNTIMES:
        text = _read(runtime.driver_file)
        if text:
            versions[f"{runtime.vendor} driver"] = text.splitlines()[0].strip()
    return versions


def _installed(package: str) -> str | None:
    try:
        return version(package)  # from the metadata, because importing torch_npu would open the device
    except PackageNotFoundError:
        return None


def _last_words(error: str) -> str:
    """The last line of a traceback, and the last location in it."""
    lines = error.strip().splitlines()
    places = [line.strip() for line in lines if line.lstrip().startswith("File ")]
    return "; ".join([lines[-1].strip(), *places[-1:]])


def _cpu_name() -> str:
    for line in _read("/proc/cpuinfo").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _listing(title: str, facts: dict[str, str]) -> str:
    return "\n  ".join([title, *format_table(list(facts.items())).splitlines()])
