"""Seeds every test, so that a failure repeats; deals the tests out in tiers; counts at the end what was left out, and why.

`make test` runs the fast tier: all that is not `slow`. Of a test marked `sampled(n)` the first case and every n-th after it are
fast, and the others slow; `--sample 8` samples every other test too. `make test-all`, and pytest called by hand, run both
tiers. With `--share 2/3` the slow ones are dealt into three shares by their names, and the second is run.
"""

import argparse
import contextlib
import os
import zlib
from collections import Counter

import pytest
import torch
from hypothesis import settings

from diffmax.machine.dispatch import registry

# helpers without tests: to collect the stand-in device is to import it, and to turn this process into its host; model_types
# needs transformers and repeated_products Triton, which `make floor` does not install
collect_ignore = [
    "fresh.py",
    "interpreted.py",
    "model_types.py",
    "npu_on_standin.py",
    "overlay.py",
    "ranks.py",
    "repeated_products.py",
    "standin_device.py",
    "standin_npu.py",
    "timm_standin.py",
]

if os.environ.get("TRITON_INTERPRET") != "1":  # test_triton_*.py run these in processes of their own
    collect_ignore_glob = ["triton_*.py"]

FILES_WITH_FAST_TESTS = pytest.StashKey[dict[str, bool]]()
LEFT_OUT = pytest.StashKey[int]()


def pytest_addoption(parser):
    parser.addoption("--sample", type=int, default=1, metavar="N", help="what is not marked sampled is sampled(N)")
    parser.addoption("--share", type=_share, default=(1, 1), metavar="K/N", help="of the slow tests the K-th of N shares")


def _share(text):
    """The two numbers of K/N."""
    k, _, n = text.partition("/")
    if not (k.isdecimal() and n.isdecimal() and 1 <= int(k) <= int(n)):
        raise argparse.ArgumentTypeError(f"expected K/N with 1 <= K <= N, got {text!r}")
    return int(k), int(n)


def pytest_configure(config):
    config.stash[LEFT_OUT] = 0


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Mark what is slow, before pytest chooses by marks; note which files have something that is not."""
    sample = config.getoption("--sample")
    cases, fast = Counter(), {}
    for item in items:
        test = item.nodeid.partition("[")[0]
        sampled = item.get_closest_marker("sampled")
        every = sampled.args[0] if sampled else sample
        if cases[test] % every:
            item.add_marker(pytest.mark.slow)
        cases[test] += 1
        file = item.nodeid.partition("::")[0]
        fast[file] = fast.get(file, False) or item.get_closest_marker("slow") is None
    config.stash[FILES_WITH_FAST_TESTS] = fast
    k, n = config.getoption("--share")
    others = [item for item in items if item.get_closest_marker("slow") and zlib.crc32(item.nodeid.encode()) % n != k - 1]
    if others:
        config.hook.pytest_deselected(items=others)
        left = set(others)
        items[:] = [item for item in items if item not in left]
    if any("timm.py" in item.nodeid or "timm.md" in item.nodeid for item in items):  # examples that import timm
        from tests.timm_standin import import_timm

        with contextlib.suppress(ImportError):
            import_timm()
    # What runs for minutes, in processes of its own, starts first: the processes of tests then end at the same time.
    items.sort(key=lambda item: item.get_closest_marker("interpreter") is None)


def pytest_deselected(items):
    for item in items:
        item.config.stash[LEFT_OUT] += item.get_closest_marker("slow") is not None


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):  # one of pytest-xdist's processes, each of which collects all tests
        session.config.workeroutput["left out"] = session.config.stash[LEFT_OUT]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    node.config.stash[LEFT_OUT] = getattr(node, "workeroutput", {}).get("left out", 0)


def pytest_terminal_summary(terminalreporter, config):
    """How many tests were skipped for each reason, and how many are left to the other tier."""
    reasons = Counter(report.longrepr[2].removeprefix("Skipped: ") for report in terminalreporter.stats.get("skipped", ()))
    for reason, count in reasons.most_common():
        terminalreporter.write_line(f"{count} skipped: {reason}")
    if config.stash[LEFT_OUT]:
        terminalreporter.write_line(f"{config.stash[LEFT_OUT]} left to `make test-all`")


settings.register_profile("diffmax", max_examples=100, deadline=None)  # deadlines measure the machine, not the code
settings.register_profile("nightly", max_examples=10_000, deadline=None)  # make nightly
settings.load_profile("diffmax")


@pytest.fixture
def files_with_fast_tests(request):
    """Of the files of which something was collected, whether one of their tests is not slow."""
    return request.config.stash[FILES_WITH_FAST_TESTS]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _backends_as_they_were():
    """A test that leaves a backend behind fails, not the ones after it."""
    before = list(registry.plugins)
    yield
    after, registry.plugins[:] = list(registry.plugins), before
    assert [plugin.name for plugin in after] == [plugin.name for plugin in before]


# The vendors' distributions are installed beside core. Tests see what comes with core, unless they ask for `with_vendors`.
_vendors = [plugin for plugin in registry.plugins if plugin.distribution in ("diffmax-cuda", "diffmax-rocm", "diffmax-npu")]
registry.plugins[:] = [plugin for plugin in registry.plugins if plugin not in _vendors]


@pytest.fixture
def with_vendors(monkeypatch):
    monkeypatch.setattr(registry, "plugins", [*registry.plugins, *_vendors])
    monkeypatch.setattr(registry, "kernels", {})
    monkeypatch.setattr(registry, "probes", {})
    monkeypatch.setattr(registry, "noticed", set())
