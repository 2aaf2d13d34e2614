"""Processes of tests end: one that waits for ever is killed, with what it forked, and says so by its exit status."""

import os
import signal

import pytest
from filelock import FileLock

from tests import fresh

WAITS = """
import fcntl, os, signal, time
signal.signal(signal.SIGALRM, signal.SIG_IGN)
held = open({path!r}, "w")
fcntl.flock(held, fcntl.LOCK_EX)
os.fork()
time.sleep(600)
"""
LEAVES = """
import fcntl, os, time
held = open({path!r}, "w")
fcntl.flock(held, fcntl.LOCK_EX)
if not os.fork():
    time.sleep(600)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a system that forks")
def test_a_process_that_waits_for_ever_is_killed_with_what_it_forked(tmp_path):
    path = tmp_path / "held"
    done = fresh.python(WAITS.format(path=str(path)), check=False, seconds=1.5)
    assert done.returncode == -signal.SIGKILL
    with FileLock(path, timeout=30):  # raises if what it forked still holds it
        pass
    assert fresh.python(LEAVES.format(path=str(path))).returncode == 0
    with FileLock(path, timeout=30):  # also what a process leaves behind that ends by itself
        pass
    assert fresh.python("print(1)").stdout == "1\n", "the next request finds its server"
