"""Tests that run on the ranks of a gloo group, each rank a process of its own; all of a file's tests share one launch.

`on_ranks(2, 4)` turns a function without arguments, which runs on each rank, into a test per group size; of more than two ranks
they are slow. A rank on which one
fails ends there, so that the others do not wait for messages that never come; the tests after it are then reported as not
reached. The ranks meet in a file: no port is chosen.
"""

import functools
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import traceback
from datetime import timedelta
from pathlib import Path

import pytest

# A rank that waits for a message gives up after the first, the whole launch after the second.
COLLECTIVE_SECONDS = 30
LAUNCH_SECONDS = 300


def on_ranks(*world_sizes, marks=()):
    """Decorate a test with the sizes of the groups it runs on; it fails if it raises on any rank."""

    def decorate(body):
        @pytest.mark.parametrize("world_size", [pytest.param(n, marks=[pytest.mark.slow] * (n > 2)) for n in world_sizes])
        def test(world_size):
            failures = [f"rank {rank}: {what}" for rank, what in launch(body.__code__.co_filename, world_size)(body.__name__)]
            assert not failures, "\n".join(failures)

        test.__name__, test.__doc__, test.body, test.world_sizes = body.__name__, body.__doc__, body, world_sizes
        for mark in marks:
            test = mark(test)
        return test

    return decorate


@functools.cache
def launch(path, world_size):
    """Run what the file has for this group size; returns a function from a test's name to [(rank, what went wrong)]."""
    with tempfile.TemporaryDirectory() as folder:
        reports = [Path(folder, f"report{rank}") for rank in range(world_size)]
        errors = [Path(folder, f"stderr{rank}") for rank in range(world_size)]
        environment = dict(os.environ, OMP_NUM_THREADS="1", OMP_WAIT_POLICY="passive")
        if sys.platform == "linux":
            environment.setdefault("GLOO_SOCKET_IFNAME", "lo")  # whatever the host's name resolves to
        ranks = []
        for rank in range(world_size):
            command = [sys.executable, __file__, path, str(world_size), str(rank), folder]
            with errors[rank].open("w") as error:
                ranks.append(subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=error))
        try:
            for rank in ranks:
                rank.wait(timeout=LAUNCH_SECONDS)
        except subprocess.TimeoutExpired:
            pass  # the tests that were not reached say so
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()
        found = [json.loads(report.read_text()) if report.exists() else {} for report in reports]
        ends = [error.read_text()[-3000:] for error in errors]

    def failures(name):
        unreached = [(rank, f"did not finish {name}\n{ends[rank]}") for rank in range(world_size) if name not in found[rank]]
        return unreached + [(rank, report[name]) for rank, report in enumerate(found) if report.get(name)]

    return failures


def run_bodies(path, world_size, rank, folder):
    """What one rank's process does."""
    import torch
    import torch.distributed as dist

    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    store = dist.FileStore(str(Path(folder, "store")), world_size)
    timeout = timedelta(seconds=COLLECTIVE_SECONDS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timeout)
    report = {}
    for test in list(vars(module).values()):
        skips = [mark.args[0] for mark in getattr(test, "pytestmark", ()) if mark.name == "skipif"]
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
    os._exit(0)  # torch 2.4 can hang while it destroys a gloo group


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))  # as pytest has it: a file of tests may import another
    run_bodies(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
