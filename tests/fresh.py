"""Python code in a process where diffmax was never imported, without the seconds that the import of torch takes.

One process imports torch and forks for each request: the code finds what a new process would have, and torch imported. What
depends on how Python or torch starts (options of Python, threads of OpenMP) needs a process of its own.
"""

import atexit
import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

SERVER = """
import contextlib, json, os, signal, sys, torch
requests, replies = sys.stdin.buffer, os.dup(1)
for line in iter(requests.readline, b""):
    request = json.loads(line)
    child = os.fork()
    if not child:
        break
    def end(*_):  # with what it forked, unless that made a session of its own
        with contextlib.suppress(OSError):  # no such group, or none that still runs
            os.killpg(child, signal.SIGKILL)
    with contextlib.suppress(OSError):  # the child has done it
        os.setpgid(child, child)
    signal.signal(signal.SIGALRM, end)  # here, because a process that waits in C runs no handler of Python's
    signal.setitimer(signal.ITIMER_REAL, request["seconds"])
    status = os.waitpid(child, 0)[1]
    signal.setitimer(signal.ITIMER_REAL, 0)
    end()
    os.write(replies, b"%d\\n" % os.waitstatus_to_exitcode(status))
else:
    sys.exit()
os.setpgid(0, 0)
signal.signal(signal.SIGALRM, signal.SIG_DFL)
os.close(replies)
for name, number in (("/dev/null", 0), (request["out"], 1), (request["err"], 2)):
    os.dup2(os.open(name, os.O_RDWR), number)
os.environ.clear()
os.environ.update(request["environment"])
sys.path[1:1] = request["folders"]
exec(compile(request["code"], "<string>", "exec"), {"__name__": "__main__"})
"""


def python(code, *folders, check=True, seconds=300, **environment):
    """Run code with the folders in front of the path; returns what `subprocess.run` does. With `check`, it must succeed."""
    command = [sys.executable, "-W", "ignore", "-c", code]
    environment = {**os.environ, **environment}
    if hasattr(os, "fork"):
        done = _forked(command, folders, environment, seconds)
    else:
        environment["PYTHONPATH"] = os.pathsep.join([*map(str, folders), environment.get("PYTHONPATH", "")])
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=seconds)
    if check and done.returncode:
        raise AssertionError(done.stderr)
    return done


def _forked(command, folders, environment, seconds):
    server = _server()
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        out.touch(), err.touch()
        path = [str(folder) for folder in folders]
        request = {"code": command[-1], "folders": path, "environment": environment, "seconds": seconds}
        request.update(out=str(out), err=str(err))
        server.stdin.write(json.dumps(request).encode() + b"\n")
        server.stdin.flush()
        return subprocess.CompletedProcess(command, int(server.stdout.readline()), out.read_text(), err.read_text())


@functools.cache
def _server():
    command = [sys.executable, "-W", "ignore", "-c", SERVER]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    atexit.register(lambda: (server.stdin.close(), server.stdout.close(), server.wait()))
    return server
