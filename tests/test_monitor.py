"""diffmax_bisect_monitored: the same result, true figures, one look at the device, and nothing at all when it is off."""

import subprocess
import sys
from pathlib import Path

import entmax
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from diffmax import diffmax_bisect, diffmax_bisect_monitored, use_backend
from diffmax.monitor import Monitor
from diffmax.testing.oracle import solve_exactly
from tests import fresh


class Kept(list):
    """A log that keeps what it is given."""

    def __call__(self, metrics, *, step):
        self.append((step, metrics))


class Operators(TorchDispatchMode):
    """The names of all operators that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def metrics_of(X, alpha=0.5, dim=-1, **kwargs):
    log = Kept()
    diffmax_bisect_monitored(X, alpha, dim, name_prefix="m", step=0, log=log, **kwargs)
    ((_, metrics),) = log
    return {name.removeprefix("m/"): value for name, value in metrics.items()}


@pytest.mark.sampled(9)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(("shape", "dim"), [((5,), 0), ((), 0), ((2, 3, 7, 9), -1), ((2, 9, 4), 1), ((0, 4), -1), ((3, 0), -1)])
def test_result_and_gradients_are_those_of_the_function_to_the_bit(shape, dim, dtype):
    def run(function, **kwargs):
        torch.manual_seed(1)
        X = torch.randn(shape, dtype=dtype).requires_grad_()
        alpha = torch.tensor(0.6, requires_grad=True)
        p = function(X, alpha, dim, **kwargs)
        (p * torch.randn(shape).to(dtype)).sum().backward()
        return p, X.grad, alpha.grad

    log = Kept()
    for ours, expected in zip(run(diffmax_bisect_monitored, step=3, log=log), run(diffmax_bisect), strict=True):
        assert torch.equal(ours, expected)
    assert [step for step, _ in log] == [3, 3]  # forward, backward


def test_every_argument_is_passed_on():
    X = torch.randn(4, 6)
    log = Kept()
    p = diffmax_bisect_monitored(X, 0.3, 0, 2, False, step=0, log=log, backend="reference")
    assert torch.equal(p, diffmax_bisect(X, 0.3, 0, 2, False, backend="reference"))
    assert len(log) == 1


def test_off_means_the_same_operators_and_the_same_graph():
    X, alpha = torch.randn(3, 5, requires_grad=True), torch.tensor(0.6, requires_grad=True)

    def operators(function, **kwargs):
        with Operators() as seen:
            p = function(X, alpha, **kwargs)
            torch.autograd.grad(p.square().sum(), (X, alpha))
        return seen.names, p.grad_fn.name(), [type(f).__name__ for f, _ in p.grad_fn.next_functions if f is not None]

    plain = operators(diffmax_bisect)
    log = Kept()
    assert operators(diffmax_bisect_monitored) == plain
    assert operators(diffmax_bisect_monitored, step=7, every=10, log=log) == plain
    assert not log
    assert len(operators(diffmax_bisect_monitored, step=10, every=10, log=log)[0]) > len(plain[0])


@pytest.mark.skipif(torch.__version__ < "2.5", reason="needs graphs without reads of attributes: pip install 'torch>=2.13'")
def test_off_gives_the_same_compiled_graph():
    def graph(function):
        graphs = []

        def keep(module, _):
            graphs.append(module.code)
            return module.forward

        torch._dynamo.reset()
        torch.compile(lambda x: function(x, 0.6), backend=keep, fullgraph=True)(torch.randn(3, 5))
        return graphs

    assert graph(diffmax_bisect_monitored) == graph(diffmax_bisect)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's own, at a graph break
def test_a_logged_call_inside_compiled_code_logs_the_same():
    logs = Kept(), Kept()

    def run(x, log):
        return diffmax_bisect_monitored(2 * x, 0.6, step=1, log=log).square().sum()

    for function, log in zip((run, torch.compile(run, backend="eager")), logs, strict=True):
        torch.manual_seed(0)
        function(torch.randn(3, 5, requires_grad=True), log).backward()
    assert logs[0] == logs[1]
    assert len(logs[0]) == 2


def test_one_look_at_the_device_per_dictionary():
    """A tensor's numbers are read by `_local_scalar_dense`, or all at once by one copy to the host, which is tolist here."""
    X = torch.randn(3, 5, requires_grad=True)
    log, reads = Kept(), []
    tolist = torch.Tensor.tolist
    with pytest.MonkeyPatch.context() as patch, Operators() as seen:
        patch.setattr(torch.Tensor, "tolist", lambda t: reads.append(t.shape) or tolist(t))
        p = diffmax_bisect_monitored(X, 0.6, step=0, log=log, backend="reference")
        assert len(reads) == 1
        p.sum().backward()
    assert len(reads) == len(log) == 2
    assert not [name for name in seen.names if "_local_scalar_dense" in name or "nonzero" in name or "is_nonzero" in name]


def test_the_figures_against_independent_ones():
    X = torch.randn(2, 3, 6, 8, dtype=torch.float64)
    X[..., 6:] = -torch.inf
    got = metrics_of(X, 0.5)
    p = entmax.entmax15(X, dim=-1)  # another package, alpha' = 2 - 1/2
    assert got["forward/support_mean"] == pytest.approx((p > 0).sum(-1).double().mean().item(), rel=1e-12)
    assert got["forward/support_max"] == (p > 0).sum(-1).max()
    assert got["forward/zeros_share"] == pytest.approx((p[..., :6] == 0).double().mean().item(), rel=1e-12)
    assert got["forward/entropy_mean"] == pytest.approx(torch.special.entr(p).sum(-1).mean().item(), rel=1e-9)
    assert got["forward/row_max_mean"] == pytest.approx(p.amax(-1).mean().item(), rel=1e-12)
    sinks = (p.mean(-2) > 0.3).double().flatten(0, 1).mean(0)
    assert got["forward/sink_rate"] == sinks.max()
    assert got["forward/sink_rate_first"] == sinks[0]
    assert [got[f"alpha/{name}"] for name in ("mean", "min", "max")] == [0.5] * 3
    rows = X[..., :6].flatten(0, 2).tolist()
    roots = [max(row) - float(max(solve_exactly(row, 0.5))) ** 0.5 / 0.5 for row in rows]  # Eq. 1, solved for tau
    assert got["convergence/tau_mean"] == pytest.approx(sum(roots) / len(roots), rel=1e-12)
    assert 0 <= got["convergence/residual_mean"] <= got["convergence/residual_max"] < 1e-13


def test_a_solver_stopped_early_shows_in_residual_and_steps():
    X = torch.randn(50, 4)
    with use_backend("reference"):
        stopped, finished = metrics_of(X, 0.9, n_iter=1), metrics_of(X, 0.9)
    assert stopped["convergence/residual_max"] > 1e-4 > finished["convergence/residual_max"]
    assert finished["convergence/iterations_max"] >= finished["convergence/iterations_mean"] > 1
    assert metrics_of(torch.tensor([[9.0, 0.0]]), 0.5)["convergence/iterations_max"] == 0  # t = -1 is the root


def test_a_sink_is_found_on_its_key_and_only_there():
    X = torch.zeros(4, 5, 5)
    X[:3, :, 2] = 5.0  # a sink at key 2 in three of four maps
    got = metrics_of(X, 0.9)
    assert got["forward/sink_rate"] == 0.75
    assert got["forward/sink_rate_first"] == 0
    causal = torch.zeros(1, 6, 6).masked_fill(~torch.ones(6, 6, dtype=torch.bool).tril(), -torch.inf)
    # key 0 gets 1, 1/2, ... 1/6 from the queries that see it: 0.41 on average; the last gets 1/6 from one query
    assert metrics_of(causal, 0.9)["forward/sink_rate_first"] == 1


def test_masked_rows_and_nan_are_counted_and_left_out():
    X = torch.randn(4, 5)
    clean = metrics_of(X[:2])
    X[2] = -torch.inf
    X[3, 0] = torch.nan
    got = metrics_of(X)
    assert (got.pop("forward/rows_masked"), got.pop("forward/rows_nan")) == (1, 1)
    clean = {name: value for name, value in clean.items() if "rows_" not in name and "sink" not in name}
    assert {name: got[name] for name in clean} == pytest.approx(clean)


def test_gradient_norms_are_those_of_this_call_alone():
    X = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    alpha = torch.full((3, 1, 1), 0.6, dtype=torch.float64, requires_grad=True)
    G = torch.randn(3, 4, 5, dtype=torch.float64)
    log = Kept()
    p = diffmax_bisect_monitored(X, alpha, step=2, log=log, name_prefix="layer 1")
    ((p * G).sum() + X.square().sum()).backward()  # X has another use, which does not count
    q = diffmax_bisect(X, alpha)
    grad_x, grad_alpha = torch.autograd.grad((q * G).sum(), (X, alpha))
    step, got = log[1]
    assert step == 2
    expected = {"grad_weights_norm": G.norm(), "grad_scores_norm": grad_x.norm(), "grad_alpha_norm": grad_alpha.norm()}
    assert got == pytest.approx({f"layer 1/backward/{name}": value.item() for name, value in expected.items()})


def test_only_alpha_requires_a_gradient():
    alpha = torch.tensor(0.6, requires_grad=True)
    log = Kept()
    diffmax_bisect_monitored(torch.randn(3, 4), alpha, step=0, log=log).square().sum().backward()
    assert set(log[1][1]) == {"diffmax/backward/grad_weights_norm", "diffmax/backward/grad_alpha_norm"}
    with torch.no_grad():
        diffmax_bisect_monitored(torch.randn(3, 4), alpha, step=0, log=log)
    assert len(log) == 3


def test_second_derivatives_pass_through():
    X = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: diffmax_bisect_monitored(x, 0.7, step=0, log=Kept()), (X,))


@pytest.mark.parametrize(
    ("kwargs", "error", "words"),
    [
        ({"step": 1.0}, TypeError, "step must be an int, got 1.0 of type float"),
        ({"step": True}, TypeError, "step must be an int, got True"),
        ({"step": 1, "every": 0}, ValueError, "every must be at least 1, got 0"),
        ({"alpha": 1.5}, ValueError, "diffmax_bisect_monitored: alpha must lie strictly between 0 and 1, got 1.5"),
        ({"dim": 2}, ValueError, "diffmax_bisect_monitored: dim must lie in"),
    ],
)
def test_bad_input(kwargs, error, words):
    with pytest.raises(error, match=words):
        diffmax_bisect_monitored(torch.randn(3, 4), **kwargs)


@pytest.mark.parametrize(
    "call",
    [
        lambda f: torch.func.grad(lambda x: f(x).square().sum())(torch.randn(3, 4)),
        lambda f: torch.func.vmap(f)(torch.randn(3, 4)),
        lambda f: f(torch.randn(3, 4, device="meta")),
    ],
    ids=["grad", "vmap", "meta"],
)
def test_where_there_are_no_numbers_to_log_it_says_so(call):
    with pytest.raises(NotImplementedError, match=r'under torch\.func and on the device "meta", got step 7 .*\npass step=None'):
        call(lambda x: diffmax_bisect_monitored(x, 0.5, step=7, log=Kept()))
    call(lambda x: diffmax_bisect_monitored(x, 0.5, step=None, log=Kept()))


def test_without_swanlab_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "swanlab", None)
    with pytest.raises(ImportError, match=r'swanlab is needed .* got none\npip install "diffmax-core\[monitoring\]", or pass'):
        diffmax_bisect_monitored(torch.randn(3, 4), step=0)
    diffmax_bisect_monitored(torch.randn(3, 4))  # off: nothing is needed


def test_importing_diffmax_imports_neither_swanlab_nor_dynamo():
    code = "import torch, sys; before = set(sys.modules); import diffmax; new = set(sys.modules) - before\n"
    code += "sys.exit(any(name.startswith(('swanlab', 'matplotlib', 'torch._dynamo')) for name in new))"
    fresh.python(code)


OFFLINE_RUN = """
import swanlab, sys, torch
from diffmax import diffmax_bisect_monitored
swanlab.init(project="diffmax", mode="offline", {folder}=sys.argv[1])
for step in range(3):
    X = torch.randn(2, 3, 4, requires_grad=True)
    diffmax_bisect_monitored(X, 0.5, name_prefix="encoder", step=step).square().sum().backward()
swanlab.finish()
"""


@pytest.mark.slow
def test_a_real_swanlab_run_holds_the_metrics(tmp_path):
    """Offline: swanlab writes a run's records to a file, and asks no server. In a process of its own, for its threads."""
    swanlab = pytest.importorskip("swanlab", reason="needs swanlab: pip install 'diffmax-core[monitoring]'")
    folder = "log_dir" if tuple(map(int, swanlab.__version__.split(".")[:2])) >= (0, 10) else "logdir"
    subprocess.run([sys.executable, "-c", OFFLINE_RUN.replace("{folder}", folder), str(tmp_path)], check=True, timeout=120)
    written = b"".join(path.read_bytes() for path in Path(tmp_path).rglob("*") if path.is_file())
    for name in ("forward/support_mean", "alpha/mean", "convergence/residual_max", "backward/grad_scores_norm"):
        assert f"encoder/{name}".encode() in written


def test_swanlab_itself_says_when_no_run_was_started():
    pytest.importorskip("swanlab", reason="needs swanlab: pip install 'diffmax-core[monitoring]'")
    with pytest.raises(RuntimeError, match=r"swanlab\.init"):
        diffmax_bisect_monitored(torch.randn(3, 4), step=0)


def test_a_log_that_is_no_function_is_refused_before_the_work():
    with pytest.raises(TypeError, match=r"Monitor: log must be a function of \(metrics, step=...\), got 'tb' of type str"):
        Monitor(torch.nn.Linear(2, 2), "tb")
    with pytest.raises(TypeError, match="diffmax_bisect_monitored: log must be a function"):
        diffmax_bisect_monitored(torch.randn(2, 3), 0.5, step=0, log="x")
