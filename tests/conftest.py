"""Seeds every test, so that a failure repeats."""

import os

import pytest
import torch
from hypothesis import settings

from diffmax.machine.dispatch import registry

# helpers for processes of their own: to collect the stand-in device is to import it, and to turn this process into its host
collect_ignore = ["npu_on_standin.py", "overlay.py", "ranks.py", "standin_device.py", "standin_npu.py"]

if os.environ.get("TRITON_INTERPRET") != "1":  # test_triton_*.py run these in processes of their own
    collect_ignore_glob = ["triton_*.py"]


def pytest_collection_modifyitems(items):
    """What runs for minutes, in a process of its own, starts first: the processes of tests then end at the same time."""
    items.sort(key=lambda item: "under_the_interpreter" not in item.name and "on_a_stand_in" not in item.name)


settings.register_profile("diffmax", max_examples=100, deadline=None)  # deadlines measure the machine, not the code
settings.register_profile("nightly", max_examples=10_000, deadline=None)  # make nightly
settings.load_profile("diffmax")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


# The vendors' distributions are installed beside core. Tests see what comes with core, unless they ask for `with_vendors`.
_vendors = [plugin for plugin in registry.plugins if plugin.distribution in ("diffmax-cuda", "diffmax-rocm", "diffmax-npu")]
registry.plugins[:] = [plugin for plugin in registry.plugins if plugin not in _vendors]


@pytest.fixture
def with_vendors(monkeypatch):
    monkeypatch.setattr(registry, "plugins", [*registry.plugins, *_vendors])
    monkeypatch.setattr(registry, "kernels", {})
    monkeypatch.setattr(registry, "probes", {})
    monkeypatch.setattr(registry, "noticed", set())
