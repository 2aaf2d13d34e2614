"""diffmax-npu without a device: through the kit on a stand-in, its probe's answers, its place among the backends."""

import importlib.util
import os
import re
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import importlib_metadata
import pytest
import torch

import diffmax
from diffmax.errors import NoBackendError
from diffmax.machine.dispatch import choose, describe
from diffmax.plugin import API_VERSION, OPERATOR_FEATURES, OPERATORS
from diffmax_npu import probe
from diffmax_npu._plugin import plugin
from tests import fresh

TESTS = Path(__file__).parent
ROOT = TESTS.parent

needs_python_backends = pytest.mark.skipif(
    not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"),
    reason=f"torch {torch.__version__} cannot host a device written in Python (2.11 can)",
)

# Of the kit: in float32 all that tells one case from another, in the half precisions what is theirs: conversions, small
# weights, gradients from scores. `PYTHONPATH=tests python -m pytest --noconftest tests/npu_on_standin.py` runs everything.
IN_CI = (
    "not test_importing and not (test_random_rows and (0.01 or 0.75 or 0.9- or 0.99-)) and (float32 or not (test_forward or"
    " test_gradients or test_random_rows or test_nasty_rows or test_opcheck or test_compiles or test_strides_and_dims or"
    " test_packed or test_dropout or test_repeatable) or (bfloat16 and (test_nasty_rows or test_forward) and (0.85 or sparse or"
    " grouped-heads-bfloat16 or plain)) or (test_gradients and (0.1-float16 or sparse-float16 or causal-bfloat16)))"
)

FEW = "float32 and (0.5- or 0.85- or plain or empty or masked or masks or symmetries)"


@needs_python_backends
@pytest.mark.interpreter
@pytest.mark.parametrize(("chosen", "least"), [(FEW, 10), pytest.param(IN_CI, 200, marks=pytest.mark.slow)], ids=["few", "all"])
def test_the_kit_passes_on_a_stand_in_that_has_torch_npu_s_operators_alone(chosen, least):
    path = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider", "-k", chosen]
    done = subprocess.run(
        [*command, str(TESTS / "npu_on_standin.py")],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > least
    assert "skipped" not in done.stdout


def script(name):
    """A module of .ci/."""
    spec = importlib.util.spec_from_file_location(name, ROOT / ".ci" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Machine:
    """Fakes what the probe looks at: packages, modules, the environment, the device."""

    def __init__(self, monkeypatch, tmp_path):
        self.monkeypatch, self.folder = monkeypatch, tmp_path
        for name in ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME", "LD_LIBRARY_PATH", "ASCEND_RT_VISIBLE_DEVICES"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.delitem(sys.modules, "torch_npu", raising=False)
        self.installed(None)

    def installed(self, found):
        def version(name):
            if name != "torch-npu" or found is None:
                raise importlib_metadata.PackageNotFoundError(name)
            return found

        self.monkeypatch.setattr(probe, "version", version)

    def cann(self):
        (self.folder / "lib64").mkdir()
        (self.folder / "lib64" / probe.LIBRARY).touch()
        (self.folder / "x86_64-linux").mkdir()
        (self.folder / "x86_64-linux" / "ascend_toolkit_install.info").write_text("package_name=Ascend\nversion=8.5.0\n")
        self.monkeypatch.setenv("ASCEND_HOME_PATH", str(self.folder))

    def loaded(self, version=torch.__version__, **facts):
        module = types.ModuleType("torch_npu")
        module.__version__ = version
        self.monkeypatch.setitem(sys.modules, "torch_npu", module)
        facts = {"is_initialized": True, "_is_in_bad_fork": False, "device_count": 8, "get_device_name": "Ascend910B2"} | facts
        device = types.SimpleNamespace(**{name: lambda *_, value=value: value for name, value in facts.items()})
        device.utils = types.SimpleNamespace(is_support_inf_nan=lambda: facts.get("infinity", True))
        self.monkeypatch.setattr(torch, "npu", device, raising=False)


@pytest.fixture
def machine(monkeypatch, tmp_path):
    return Machine(monkeypatch, tmp_path)


def test_the_probe_says_what_is_missing_and_what_to_do(machine, monkeypatch):
    release = torch.__version__.partition("+")[0]
    assert probe.probe() == f"torch_npu is not installed; pip install torch-npu=={release}"
    machine.installed("2.1.0.post9")
    assert "torch-npu 2.1.0.post9 is made for torch 2.1.0, this is torch" in probe.probe()
    assert f"pip install torch-npu=={release}" in probe.probe()
    machine.installed(f"{release}.post1")
    assert "CANN is not found: ASCEND_HOME_PATH is not set" in probe.probe()
    assert "set_env.sh" in probe.probe()
    monkeypatch.setenv("ASCEND_HOME_PATH", "/nowhere")
    assert "CANN is not where ASCEND_HOME_PATH='/nowhere' says" in probe.probe()
    machine.cann()
    assert probe.cann_version() == "8.5.0"
    assert "not imported in this process (torch did not load it by itself); import torch_npu first" in probe.probe()
    monkeypatch.setenv("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    assert "(TORCH_DEVICE_BACKEND_AUTOLOAD='0'); import torch_npu first" in probe.probe()


def test_the_probe_asks_an_open_device_and_opens_none(machine, monkeypatch):
    machine.loaded()
    assert probe.probe() is None
    machine.loaded(device_count=0)
    assert probe.probe() == "torch_npu counts no device"
    machine.loaded(version="2.1.0")
    assert "torch-npu 2.1.0 is made for torch 2.1.0" in probe.probe()
    machine.loaded(_is_in_bad_fork=True)
    assert "forked after the device was opened; start workers with the method 'spawn'" in probe.probe()

    machine.loaded(is_initialized=False)
    torch.npu.device_count = None  # to call it is to open the device
    assert "there is no /dev/davinci0" in probe.probe()
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", "")
    assert "ASCEND_RT_VISIBLE_DEVICES='' hides every device" in probe.probe()
    monkeypatch.delenv("ASCEND_RT_VISIBLE_DEVICES")
    monkeypatch.setattr(probe.Path, "glob", lambda path, pattern: iter([path / "davinci3"]))
    assert probe.probe() is None


def test_what_the_chip_lacks_is_said_of_an_open_device_alone(machine):
    half = describe("bisect", "npu", torch.bfloat16)
    machine.loaded(is_bf16_supported=False)
    assert probe.unsupported(half) == ["Ascend910B2 has no bfloat16: pass float16 or float32"]
    assert probe.unsupported(describe("bisect", "npu", torch.float16)) == []
    machine.loaded(is_bf16_supported=False, is_initialized=False)
    assert probe.unsupported(half) == []
    machine.loaded(infinity=False)
    assert "Ascend910B2 has no infinity in this mode, and masks need it: set INF_NAN_MODE_ENABLE=1" in probe.unsupported(half)


def test_it_claims_everything_and_is_for_the_device_alone():
    (backend, *_) = plugin.diffmax_backends()
    assert set(backend.provided) == set(OPERATORS) - {"attention_kvcache"}
    for operator, kernel in backend.provided.items():
        of_diffmax = {"threshold_diffmax", "tensor_alpha", "alpha_gradient"}
        lacks = of_diffmax | {"deterministic"} if operator.startswith("threshold") else set()
        assert kernel.features == OPERATOR_FEATURES[operator] - lacks
    assert (backend.name, tuple(backend.device_types), backend.runtime) == ("npu", ("npu",), "cann")
    assert backend.api_version <= API_VERSION
    assert backend.reasons_against(describe("bisect", "cpu", torch.float32))


@pytest.mark.usefixtures("with_vendors")
def test_it_is_listed_with_the_reason_and_named_it_raises_with_it():
    record = next(record for record in diffmax.backends() if record.backend == "npu")
    assert (record.distribution, record.status) == ("diffmax-npu", "unavailable")
    assert "torch_npu is not installed; pip install torch-npu==" in record.reason
    assert "diffmax/npu.html" in record.reason
    with pytest.raises(NoBackendError, match=r"npu: torch_npu is not installed"):
        choose(describe("attention", "npu", torch.float16), "npu")
    with pytest.raises(NoBackendError, match=r"npu: takes .* not float64; the device has no float64: pass float32, or backend"):
        choose(describe("attention", "npu", torch.float64), "npu")


def test_importing_diffmax_imports_neither_torch_npu_nor_a_kernel_and_renames_no_device():
    code = (
        "import sys, torch, diffmax, diffmax_npu._plugin\n"
        "diffmax.backends()\n"
        "loaded = {'torch_npu', 'triton', 'diffmax_npu.rows', 'diffmax_npu.attention'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
        "assert torch._C._get_privateuse1_backend_name() == 'privateuseone'\n"
    )
    fresh.python(code)


def test_the_list_of_operators_is_what_its_script_reads_from_a_wheel(tmp_path, capsys):
    listing_script = script("npu_operators")
    wheel = tmp_path / "torch_npu-2.13.0-cp311-cp311-linux.whl"
    listing = (
        "supported:\n  - as_strided\n  - func: add.Tensor(Tensor self, Tensor other, *, Scalar alpha=1) -> Tensor\ncustom: []\n"
    )
    with zipfile.ZipFile(wheel, "w") as files:
        for source in listing_script.SOURCES:
            files.writestr(f"torch_npu/csrc/aten/{source}", listing)
    assert listing_script.operators(wheel) == {"as_strided", "add.Tensor"}
    assert listing_script.main(["nothing"]) == 1
    assert "give one wheel of torch-npu, got nothing" in capsys.readouterr().err
    lines = listing_script.LISTING.read_text(encoding="utf-8").splitlines()
    assert lines[0] == "# torch-npu 2.13.0, written by .ci/npu_operators.py"
    assert lines[1:] == sorted(lines[1:])
    assert len(lines) > 1000
    assert not {"lgamma", "cummax"} & set(lines)


def test_the_triton_backend_says_which_triton_it_needs(machine, monkeypatch):
    assert "torch_npu is not installed" in probe.probe_triton()
    machine.loaded()
    for found, words in (
        ([], "Triton-Ascend is not installed; pip install triton-ascend"),
        (["triton"], "the package triton comes from triton, which does not compile for Ascend; pip uninstall triton"),
        (["triton", "triton-ascend"], "comes from triton and triton-ascend, which does not compile for Ascend"),
    ):
        monkeypatch.setattr(probe, "packages_distributions", lambda found=found: {"triton": found})
        assert words in probe.probe_triton()
    monkeypatch.setattr(probe, "packages_distributions", lambda: {"triton": ["triton-ascend"]})
    assert probe.probe_triton() is None


def test_the_triton_backend_is_never_chosen_by_itself():
    (_, experimental) = plugin.diffmax_backends()
    assert (experimental.name, experimental.automatic) == ("npu-triton", False)
    assert set(experimental.kernels) == {"bisect", "bisect_backward"}


IN_THE_INTERPRETER = """
from diffmax.testing.interpreter import harden
harden()
import torch
from diffmax import reference
from diffmax.testing import gates
from diffmax_npu import triton_rows
triton_rows.MOST_PROGRAMS = 3  # so that rows go in pieces
torch.manual_seed(0)
for dtype, e, dim in (
    (torch.float32, 0.15, 1), (torch.float32, 1 - torch.rand(2, 1, 7), 1), (torch.float16, 0.5, 2), (torch.bfloat16, 0.5, 0)
):
    x, grad = (torch.randn(2, 5, 7).mul(3).to(dtype) for _ in range(2))
    in_ = lambda t: e if isinstance(e, float) else e.to(torch.promote_types(t.dtype, torch.float32))
    (wanted,) = gates(lambda x: reference.bisect(x, in_(x), dim + 1, 200, True)[0], x, stacked=True)
    assert (triton_rows.bisect(x, e, dim, 50, True)[0].double() - wanted.exact).abs().max() <= wanted.allowed, (dtype, dim)
    given = grad, *reference.bisect(x, e, dim, 50, True)
    kept = x if dtype == torch.float16 else None
    wanted = gates(lambda *t: reference.bisect_backward(*t, kept, in_(t[0]), dim + 1, True), *given, stacked=True)
    for a, (exact, allowed) in zip(triton_rows.bisect_backward(*given, kept, e, dim, True), wanted):
        assert a.shape == exact.shape and (a.double() - exact).abs().max() <= allowed, (dtype, dim)
print("passed")
"""


@pytest.mark.slow
def test_the_triton_backend_computes_rows_in_pieces():
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", IN_THE_INTERPRETER],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
    )
    assert done.stdout.strip() == "passed", done.stdout + done.stderr


def test_the_lint_of_lowered_kernels_finds_what_breaks_a_limit():
    lint = script("lower_for_ascend")
    launch = object.__new__(lint.Launch)
    launch.grid, launch.pointers = (70000,), {"x_ptr": 1, "p_ptr": 2, "e_ptr": 2}
    own = "%arg0: memref<?xi8>, %arg1: memref<?xi8>, %arg2: memref<?xf32> {tt.tensor_kind = 0 : i32}, "
    text = f"func.func @k({own}%arg3: memref<?xf32> {{tt.tensor_kind = 1 : i32}}, %arg4: memref<?xf32>) attributes {{}} {{\n"
    assert launch.problems(text) == ["grid of 70000 programs, more than 65535"]
    launch.grid = (2, 3)
    assert launch.problems(text + "tensor<2x1024xf32>") == []
    for more, words in {
        "tensor<2x8192xf32>": "tile of 65536 bytes: 12 of them exceed 98304",
        "tensor<16xf64>": "float64 arithmetic",
        "%1 = arith.select %a, %b, %c : tensor<16xi1>, tensor<16xi64>": "tl.where of int64 or float64",
        "tt.elementwise_inline_asm": "inline assembly",
    }.items():
        assert words in launch.problems(text + more)
    shared = text.replace("%arg4: memref<?xf32>", "%arg4: memref<?xf32> {tt.tensor_kind = 0 : i32}")
    assert launch.problems(shared) == ["arguments e_ptr and p_ptr share memory"]


def test_check_npu_skips_with_the_reason_and_fails_with_the_check(monkeypatch, tmp_path, capsys):
    check = script("check_npu")
    monkeypatch.setattr(check, "FOLDER", tmp_path)
    monkeypatch.setattr(check, "PYTHONS", ((3, 0), (3, 1)))
    assert check.main([]) == 0
    assert "skipped, its wheels are for Python 3.9 to 3.11, this is" in capsys.readouterr().out
    monkeypatch.setattr(check, "PYTHONS", ((3, 0), (4, 0)))
    failure = subprocess.CompletedProcess([], 1, "", "ERROR: No matching distribution found for triton-ascend==3.2.0\n")
    monkeypatch.setattr(check.subprocess, "run", lambda *_, **__: failure)
    assert check.main([]) == 0
    assert "skipped, ERROR: No matching distribution found" in capsys.readouterr().out
    (tmp_path / f"triton-ascend-{check.TRITON_ASCEND}").mkdir()
    assert check.main([]) == 1  # it is installed now, and the lowering fails
