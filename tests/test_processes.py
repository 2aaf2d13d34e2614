"""Threads and processes as users and operators set them: results are right, and nothing waits for ever."""

import os
import pickle
import subprocess
import sys

import pytest
import torch

from diffmax import DiffmaxBisectModule, DiffmaxLoss, HillMap, attention, diffmax_bisect
from diffmax.cli import report
from diffmax.nn import AlphaSchedule, DiffmaxAttention
from tests import fresh

# What a process computes: rows of every layout and attention, forward and backward, on both kernels, against the reference.
WORK = """
import sys, torch, diffmax
def tensors():
    generator = torch.Generator().manual_seed(0)
    shapes = (300, 400), (3, 1, 4, 200, 32), (1, 4, 200, 32)
    return [torch.randn(shape, generator=generator) for shape in shapes]
def results(backend):
    x, (q, k, v), grad = tensors()
    grads = torch.autograd.grad
    leaves = [t.requires_grad_() for t in (x, q.clone(), k.clone(), v.clone())]
    alpha = torch.full((4,), 0.6, requires_grad=True)
    rows = diffmax.diffmax_bisect(leaves[0], 0.5, backend=backend)
    columns = diffmax.diffmax_bisect(leaves[0], 0.7, dim=0, backend=backend)
    out = diffmax.attention(*leaves[1:], is_causal=True, alpha=alpha, backend=backend)
    more = diffmax.attention(q, k, v, alpha=0.5, dropout_p=0.0, backend=backend)
    ends, tokens = torch.tensor([0, 300, 800], dtype=torch.int32), torch.cat([q, k, v, q], 2)[0].transpose(0, 1)
    packed = diffmax.attention_varlen(tokens, tokens, tokens, ends, ends, 500, 500, alpha=0.5, backend=backend)
    of_rows, of_attention = grads(rows, leaves[:1], leaves[0].detach()), grads(out, [*leaves[1:], alpha], grad)
    return [rows, columns, out, more, packed, *of_rows, *of_attention]
def differences(got, wanted):
    pairs = zip(*([t.detach().numpy() for t in tensors] for tensors in (got, wanted)), strict=True)
    return [abs(a - b).max() for a, b in pairs]
def few(backend):
    x, (q, k, v), _ = tensors()
    rows = diffmax.diffmax_bisect(x.requires_grad_(), 0.5, backend=backend)
    out = diffmax.attention(q, k, v, alpha=0.5, is_causal=True, backend=backend)
    return [rows, out, *torch.autograd.grad(rows, x, x.detach())]
def right(wanted, backends=("numba", "cpu"), compute=results):
    for backend in backends:
        assert max(differences(compute(backend), wanted)) < 1e-4, backend
    return True
"""


def run(code, tmp_path, timeout=600, arguments=(), **environment):
    """Run a script, as a file that children can import, and fail rather than wait."""
    script = tmp_path / "script.py"
    script.write_text(WORK + code)
    done = subprocess.run(
        [sys.executable, *arguments, str(script)],
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
        env={**os.environ, "OMP_WAIT_POLICY": "passive", **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "environment",
    [
        {"OMP_NUM_THREADS": "1"},
        {"OMP_NUM_THREADS": "3"},
        {"OMP_NUM_THREADS": "24"},  # far more than there are processors
        {"OMP_NUM_THREADS": "4", "OMP_THREAD_LIMIT": "1"},  # fewer than are asked for
        {"OMP_NUM_THREADS": "4", "OMP_DYNAMIC": "true"},
        {"OMP_NUM_THREADS": "4", "MKL_NUM_THREADS": "1"},
    ],
    ids=lambda environment: " ".join(f"{name}={value}" for name, value in environment.items()),
)
@pytest.mark.slow
def test_any_number_of_threads_of_openmp(environment, tmp_path):
    code = "assert right(results('reference')); print(torch.get_num_threads())"
    assert int(run(code, tmp_path, **environment)) >= 1


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs os.sched_setaffinity")
@pytest.mark.slow
def test_fewer_processors_than_the_machine_has(tmp_path):
    run("import os\nos.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\nassert right(results('reference'))", tmp_path)


@pytest.mark.slow
def test_a_number_of_threads_that_changes_after_the_first_call(tmp_path):
    code = """
wanted = results("reference")
for threads in (1, 5, 2, 1, 3):
    torch.set_num_threads(threads)
    assert right(wanted)
    assert torch.get_num_threads() == threads
"""
    run(code, tmp_path)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_forked_child_and_its_child_do_not_wait_for_openmps_threads(tmp_path):
    """Attention hung in a child: torch's operators in the kernels waited for threads that had stayed in the parent."""
    code = """
import os, signal
torch.set_num_threads(2)
wanted = results("reference")
assert right(wanted)
def fork(depth):
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    signal.alarm(100)
    status = 1
    try:
        assert right(wanted)
        assert torch.get_num_threads() == 2
        status = fork(depth - 1) if depth else 0
    finally:
        os._exit(int(status != 0))
assert fork(1) == 0
"""
    run(code, tmp_path)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.slow
def test_threads_of_a_forked_child_call_at_once(tmp_path):
    code = """
import os, signal
from concurrent.futures import ThreadPoolExecutor
torch.set_num_threads(2)
wanted = results("reference")
assert right(wanted)
child = os.fork()
if child == 0:
    signal.alarm(100)
    status = 1
    try:
        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(lambda _: right(wanted), range(4)))
        status = 0
    finally:
        os._exit(status)
assert os.waitpid(child, 0)[1] == 0
"""
    run(code, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_pools_and_workers_of_a_data_loader(method, tmp_path):
    code = f"""
import multiprocessing
class Weights(torch.utils.data.Dataset):
    def __len__(self):
        return 4
    def __getitem__(self, i):
        return torch.stack([t.detach().double().sum() for t in results(("numba", "cpu")[i % 2])])
def work(_):
    return right(results("reference")) if {method != "fork"} else len(results("numba"))
if __name__ == "__main__":
    torch.set_num_threads(2)
    wanted = results("reference")
    assert right(wanted)  # the kernels were used before
    sums = torch.stack([t.detach().double().sum() for t in wanted])
    loader = torch.utils.data.DataLoader(Weights(), batch_size=None, num_workers=1, multiprocessing_context={method!r})
    for batch in loader:
        torch.testing.assert_close(batch, sums, atol=2e-2, rtol=1e-4)
    with multiprocessing.get_context({method!r}).Pool(2) as pool:
        assert all(pool.map_async(work, range(3)).get(timeout=150))
"""
    run(code, tmp_path)


@pytest.mark.slow
def test_many_threads_compile_and_call_at_once(tmp_path):
    """The first calls of a process come from eight threads, and nothing was compiled before."""
    code = """
import sys
from concurrent.futures import ThreadPoolExecutor
sys.setswitchinterval(1e-5)
torch.set_num_threads(2)
wanted = few("reference")
with ThreadPoolExecutor(8) as pool:
    assert all(pool.map(lambda _: right(wanted, ("numba",), few), range(16)))
    assert all(pool.map(lambda i: right(wanted, (("numba", "cpu")[i % 2],), few), range(8)))
"""
    run(code, tmp_path, NUMBA_CACHE_DIR=str(tmp_path))


@pytest.mark.slow
def test_two_processes_fill_one_cache(tmp_path):
    (tmp_path / "cache").mkdir()
    script = tmp_path / "script.py"
    script.write_text(WORK + "assert right(few('reference'), ('numba',), few)")
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    started = [subprocess.Popen([sys.executable, str(script)], env=environment) for _ in range(2)]
    assert [process.wait(timeout=600) for process in started] == [0, 0]


@pytest.mark.slow
def test_signals_arrive_between_calls_and_change_nothing(tmp_path):
    code = """
import signal
wanted, seen = results("reference"), []
assert right(wanted)
signal.signal(signal.SIGALRM, lambda *_: seen.append(1))
signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
assert right(wanted)
signal.setitimer(signal.ITIMER_REAL, 0)
assert seen
"""
    run(code, tmp_path)


def test_modules_and_schedules_go_through_pickle():
    x, scores = torch.randn(1, 5, 8), torch.randn(2, 4, 6, 6)
    for module, given in (
        (DiffmaxBisectModule(torch.full((4, 1, 1), 0.8), alpha_map=HillMap(c=0.5)), (scores,)),
        (DiffmaxBisectModule(AlphaSchedule(0.5, 4)), (scores,)),
        (DiffmaxAttention(8, 2, sink="learned", head_gate=True, length_scale=True), (x,)),
        (DiffmaxLoss(0.5), (torch.randn(3, 7), torch.tensor([1, 2, 3]))),
    ):
        again = pickle.loads(pickle.dumps(module))
        assert torch.equal(again(*given), module(*given))
    assert pickle.loads(pickle.dumps((diffmax_bisect, attention))) == (diffmax_bisect, attention)


DEVELOPMENT = """
import contextlib, io, os
from diffmax import nn, monitor
from diffmax.__main__ import main
from diffmax.compat import adasplash, entmax
assert right(results("reference"))
x = torch.randn(3, 40, requires_grad=True)
for call in (entmax.entmax15, entmax.sparsemax, entmax.entmax_bisect, entmax.normmax_bisect):
    call(x).sum().backward()
entmax.budget_bisect(x, 2).sum().backward()
diffmax.diffmax_loss(x, torch.tensor([1, 2, -100])).backward()
q = torch.randn(1, 2, 40, 16, requires_grad=True)
adasplash.adasplash(q, q, q, 1.5, True).sum().backward()
for backend in ("numba", "cpu", "reference"):
    diffmax.attention(q, q, q, dropout_p=0.1, alpha=0.5, backend=backend, return_stats=True)[0].sum().backward()
ends, tokens = torch.tensor([0, 10, 40], dtype=torch.int32), torch.randn(40, 2, 16)
diffmax.attention_varlen(tokens, tokens, tokens, ends, ends, 30, 30)
cache = torch.randn(1, 40, 2, 16)
diffmax.attention_with_kvcache(cache[:, :1], cache, cache, return_stats=True)
model = nn.DiffmaxAttention(16, 2, alpha_map=diffmax.HillMap(c=0.5), sink="learned", head_gate=True, length_scale=True)
with monitor.Monitor(model, lambda metrics, *, step: None) as watch:
    model(torch.randn(1, 5, 16)).sum().backward()
    watch.step()
nn.AlphaSchedule(nn.DiffmaxAttention(16, 2), 3).step()
torch.optim.AdamW(nn.param_groups(model, 1e-3)).step()
with contextlib.redirect_stdout(io.StringIO()):
    for arguments in ([], ["--json"], ["--verbose"], ["explain", "--operator", "attention", "--backward"]):
        assert main(arguments) == 0
diffmax.warmup()
"""


@pytest.mark.slow
def test_in_pythons_development_mode_there_is_no_warning(tmp_path):
    run(DEVELOPMENT, tmp_path, arguments=("-X", "dev", "-W", "error"))


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({"cpu.max": "50000 100000\n"}, 0.5),
        ({"cpu.max": "350000 100000\n"}, 3.5),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "200000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 2.0),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({}, None),
    ],
)
def test_the_report_says_where_a_container_may_use_less_than_torch_does(files, quota, tmp_path, monkeypatch):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(report, "_CGROUP", str(tmp_path))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    assert report.cpu_quota() == quota
    said = [line for line in report.collect().advice if "this container may use" in line]
    assert len(said) == (quota is not None)
    assert all(f"may use {quota:g} CPUs and torch uses 8 threads" in line and "set OMP_NUM_THREADS=" in line for line in said)


def test_without_the_global_lock_the_compiled_kernels_are_refused_and_the_plain_ones_serve():
    """As a free-threaded Python says of itself; none was at hand to run this in."""
    said = fresh.python(FREE_THREADED).stdout.splitlines()
    assert said[0] == "cpu"
    assert said[1].startswith("this Python runs without the global interpreter lock, where the compiled kernels were never run")


FREE_THREADED = """
import sys, torch
sys._is_gil_enabled = lambda: False
import diffmax
assert diffmax.diffmax_bisect(torch.randn(4, 8)).sum() > 3.99
rows = [row for row in diffmax.backends() if row.device == "cpu" and row.operator == "bisect"]
print(next(row.backend for row in rows if row.status == "active"))
print(next(row.reason for row in rows if row.backend == "numba"))
"""
