"""Tests that run on the ranks of a gloo group, each rank a process of its own; all of a file's tests share one launch, also
those that pytest-xdist gave to other processes.

`on_ranks(2, 4)` turns a function without arguments, which runs on each rank, into a test per group size; of more than two ranks
they are slow, and the ranks leave out what is slow where that was deselected. A rank on which one fails ends there, so that
the others do not wait for messages that never come; the tests after it are then reported as not reached. The first rank imports
what all need, and the others are its forks. They meet in a file: no port is chosen.
"""

import functools
import importlib.util
import json
import os
import sys
import tempfile
import traceback
from datetime import timedelta
from pathlib import Path

import pytest
from filelock import FileLock

from tests import fresh

# A rank that waits for a message gives up after the first, the whole launch after the second.
COLLECTIVE_SECONDS = 30
LAUNCH_SECONDS = 300
ROOT = Path(__file__).parents[1]
CODE = """
import torch
torch.set_num_threads(1)
from tests import ranks
ranks.run_ranks(*{arguments})
"""


def on_ranks(*world_sizes, marks=()):
    """Decorate a test with the sizes of the groups it runs on; it fails if it raises on any rank."""

    def decorate(body):
        @pytest.mark.parametrize("world_size", [pytest.param(n, marks=[pytest.mark.slow] * (n > 2)) for n in world_sizes])
        def test(world_size, tmp_path_factory, request):
            tier = "fast" if request.config.getoption("markexpr") == "not slow" else "all"
            folder = tmp_path_factory.getbasetemp()
            folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder  # of one run, whatever the process
            ended = launch(body.__code__.co_filename, world_size, folder, tier)
            failures = [f"rank {rank}: {what}" for rank, what in ended(body.__name__)]
            assert not failures, "\n".join(failures)

        test.__name__, test.__doc__, test.body, test.world_sizes = body.__name__, body.__doc__, body, world_sizes
        for mark in marks:
            test = mark(test)
        return test

    return decorate


def loopback():
    """The variable by which gloo takes the machine's own network, whatever the host's name resolves to."""
    return {"GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo")} if sys.platform == "linux" else {}


def launch_here(path, world_size, tier):
    """What each rank reported on the tests of a tier, and what it last wrote to its stderr."""
    with tempfile.TemporaryDirectory() as folder:
        code = CODE.format(arguments=(path, world_size, folder, tier))
        first = fresh.python(code, ROOT, check=False, seconds=LAUNCH_SECONDS, **loopback())
        reports = [Path(folder, f"report{rank}") for rank in range(world_size)]
        found = [json.loads(report.read_text()) if report.exists() else {} for report in reports]
        errors = [Path(folder, f"stderr{rank}") for rank in range(1, world_size)]
        ends = [first.stderr, *(error.read_text() if error.exists() else "was not started" for error in errors)]
    return found, [end[-3000:] for end in ends]


@functools.cache
def launch(path, world_size, shared, tier):
    """Run what the file has for this group size in the tier; returns a function from test name to [(rank, what went wrong)].

    Processes of tests with the same folder `shared` launch it once.
    """
    kept = Path(shared, f"ranks-{Path(path).stem}-{world_size}.json")
    with FileLock(f"{kept}.lock"):
        if not kept.exists():
            kept.write_text(json.dumps(launch_here(path, world_size, tier)))
    found, ends = json.loads(kept.read_text())

    def failures(name):
        unreached = [(rank, f"did not finish {name}\n{ends[rank]}") for rank in range(world_size) if name not in found[rank]]
        return unreached + [(rank, report[name]) for rank, report in enumerate(found) if report.get(name)]

    return failures


def run_ranks(path, world_size, folder, tier):
    """What the first rank's process does: import the file, fork the other ranks, be the first, and wait for the others."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    others = []
    for rank in range(1, world_size):
        child = os.fork()
        if not child:
            os.dup2(os.open(Path(folder, f"stderr{rank}"), os.O_WRONLY | os.O_CREAT), 2)
            run_bodies(module, world_size, rank, folder, tier)
        others.append(child)
    run_bodies(module, world_size, 0, folder, tier, others)


def run_bodies(module, world_size, rank, folder, tier, others=()):
    """What each rank does until its process ends, the first after the others."""
    import torch
    import torch.distributed as dist

    store = dist.FileStore(str(Path(folder, "store")), world_size)
    timeout = timedelta(seconds=COLLECTIVE_SECONDS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timeout)
    report = {}
    for test in list(vars(module).values()):
        marks = getattr(test, "pytestmark", ())
        skips = [mark.args[0] for mark in marks if mark.name == "skipif"]
        skips += [mark.name == "slow" and tier == "fast" for mark in marks]
        if world_size not in getattr(test, "world_sizes", ()) or any(skips):
            continue
        torch.manual_seed(0)
        try:
            test.body()
            report[test.__name__] = None
        except BaseException:  # noqa: BLE001 - whatever it is, the test that started this process reports it
            report[test.__name__] = traceback.format_exc()
        Path(folder, f"report{rank}").write_text(json.dumps(report))
        if report[test.__name__]:
            break
    sys.stderr.flush()
    for other in others:
        os.waitpid(other, 0)
    os._exit(0)  # torch 2.4 can hang while it destroys a gloo group
