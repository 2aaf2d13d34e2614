"""What a call of a Triton operator does on the host: a launch plan per signature, and no second look for the binary."""

import json
import threading

import pytest
import torch
from triton.runtime.jit import JITFunction

from benchmarks import bench_host
from benchmarks.bench_host import calls, operators
from benchmarks.compile_kernels import kernels
from diffmax.kernels.triton.common import launch
from diffmax.kernels.triton.common.launch import Plans, signature
from diffmax.kernels.triton.rows.launch import RowOperator
from diffmax.testing import ahead_of_time
from diffmax.testing.ahead_of_time import recording
from diffmax_cuda import configs

pytestmark = pytest.mark.compiler
NAMES = ("rows", "rows, backward", "attention", "attention, training", "attention, backward", "decoding", "decoding, bounds")
PUBLIC = ("public: rows", "public: attention", "public: decoding")


@pytest.fixture
def handed_over(monkeypatch):
    """What every launcher is given: the grid and all arguments behind the hooks."""
    found = []

    def launcher(source, metadata):
        return lambda *given: found.append((metadata.name, given[:3], [_plain(one) for one in given[8:]]))

    driver = ahead_of_time._Driver

    def with_launcher(target):
        made = driver(target)
        made.launcher_cls = launcher
        return made

    monkeypatch.setattr(ahead_of_time, "_Driver", with_launcher)
    return found


def _plain(argument):
    """Of a tensor what a kernel sees of it but the address, which differs for memory allocated by the call."""
    return (argument.dtype, argument.device) if isinstance(argument, torch.Tensor) else argument


@pytest.fixture
def searches(monkeypatch):
    """The kernels for which Triton was asked to find a binary."""
    found, run = [], JITFunction.run

    def counted(self, *arguments, **keywords):
        found.append(self.__name__)
        return run(self, *arguments, **keywords)

    monkeypatch.setattr(JITFunction, "run", counted)
    return found


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", NAMES)
def test_a_second_call_makes_no_plan_and_launches_the_same(name, handed_over, searches):
    ours = operators()
    with recording("sm90", *kernels()) as launched:
        bodies = calls(ours)
        bodies[name]()
        made, found, given = sum(one.plans.made for one in ours), list(launched), list(handed_over)
        searches.clear(), launched.clear(), handed_over.clear()
        bodies[name]()
    assert sum(one.plans.made for one in ours) == made
    assert searches == []
    assert [id(one.kernel) for one in launched] == [id(one.kernel) for one in found[-len(launched) :]]
    assert handed_over
    assert handed_over == given[-len(handed_over) :]


def rows_operator():
    table = configs.table(9, 0)
    return RowOperator(lambda device: table, lambda device: 132, ptx=True)


@pytest.mark.parametrize(
    "other",
    [
        torch.zeros(8, 129)[:, :128],
        torch.zeros(9, 128),
        torch.zeros(8 * 128 + 1)[1:].view(8, 128),
        torch.zeros(8, 128, dtype=torch.bfloat16),
        torch.zeros(128, 8).t(),
    ],
    ids=["strides", "shape", "alignment", "dtype", "layout"],
)
def test_another_signature_gets_another_plan(other):
    operator = rows_operator()
    with recording("sm90") as launched:
        operator.bisect(torch.zeros(8, 128), 0.5, 1, 50, True)
        operator.bisect(other, 0.5, 1, 50, True)
        assert operator.plans.made == 2
        operator.bisect(other, 0.5, 1, 50, True)
        operator.bisect(torch.ones(8, 128), 0.5, 1, 50, True)
    assert operator.plans.made == 2
    assert launched[0].kernel is launched[3].kernel
    assert launched[1].kernel is launched[2].kernel


def test_a_copied_call_is_launched_as_its_plan_says(handed_over):
    """Outer dimensions that do not merge into three are copied, in each call."""
    x = torch.zeros(6, 4, 5, 7, 64)[::2, :, ::2, ::3]
    x = x.as_strided((2, 2, 2, 2, 64), (3000, 1100, 500, 200, 1))
    operator = rows_operator()
    with recording("sm90", *kernels()):
        for _ in range(2):
            operator.bisect(x, torch.full((2, 1, 2, 1, 1), 0.3), 4, 50, True)
    assert operator.plans.made == 1
    assert handed_over[0] == handed_over[1]


def test_another_driver_is_asked_for_its_own_binary():
    operator, x = rows_operator(), torch.zeros(8, 128)
    found = []
    for target in ("sm90", "sm80"):
        with recording(target, *kernels()) as launched:
            operator.bisect(x, 0.5, 1, 50, True)
        found += launched
    assert found[0].kernel is not found[1].kernel
    assert [one.kernel.metadata.target.arch for one in found] == [90, 80]
    for one in found:  # from 3.8 on Triton asks the driver of the moment, which is gone, to unload a binary that is let go
        one.kernel.module = None


def test_the_number_of_plans_is_bounded():
    plans = Plans()
    for number in range(launch.MOST_PLANS + 10):
        assert plans.get(number, lambda number=number: str(number)) == str(number)
    assert len(plans._plans) == launch.MOST_PLANS
    assert plans.get(launch.MOST_PLANS, lambda: "made anew") == str(launch.MOST_PLANS)
    assert plans.get(0, lambda: "made anew") == "made anew"


def test_threads_share_the_plans():
    plans, found = Plans(), []

    def work():
        for number in range(2000):
            found.append(plans.get(number % 400, lambda number=number: number % 400) == number % 400)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8000
    assert all(found)
    assert len(plans._plans) <= launch.MOST_PLANS


def test_a_signature_holds_no_tensor():
    x = torch.zeros(3, 4)
    assert signature(x, 0.5, None) == (((3, 4), (4, 1), torch.float32, True), 0.5, None)


@pytest.mark.slow
def test_the_benchmark_runs_and_writes_what_it_prints(tmp_path, capsys):
    bench_host.main(["--quick", "--output", str(tmp_path / "host.json")])
    result, printed = json.loads((tmp_path / "host.json").read_text()), capsys.readouterr().out
    assert set(result["calls"]) == {"torch.add", *NAMES, *PUBLIC}
    for name, row in result["calls"].items():
        assert row["ratio_add"] > 0
        assert name in printed
    assert len(result["targets"]) == len(NAMES)
