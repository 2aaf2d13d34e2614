"""diffmax-cuda and diffmax-rocm without their devices: listed with the reason, chosen by runtime, breaking nothing."""

import inspect
import re
from pathlib import Path

import pytest
import torch
import triton

import diffmax
import diffmax_cuda._plugin
import diffmax_cuda.configs
import diffmax_cuda.probe
import diffmax_rocm._plugin
import diffmax_rocm.configs
import diffmax_rocm.probe
from diffmax.errors import NoBackendError
from diffmax.kernels import requirements
from diffmax.kernels.claims import reference_kernels
from diffmax.kernels.triton.common.tuning import Table, read_tables, write_tables
from diffmax.machine import warmup as warming
from diffmax.machine.dispatch import choose, describe, import_function, registry
from diffmax.operators.common.spec import adapted
from diffmax.plugin import OPERATOR_FEATURES
from tests import fresh

ROOT = Path(__file__).parents[1]
PROBES = {"cuda": diffmax_cuda.probe, "rocm": diffmax_rocm.probe}
BUILDS = {"cuda": ("cuda", "12.9"), "rocm": ("hip", "6.4")}


class Machine:
    """Fakes what the probes look at: torch's build, the devices that it sees, their architecture."""

    def __init__(self, monkeypatch):
        self.monkeypatch = monkeypatch

    def build(self, vendor):
        for name, version in BUILDS.values():
            self.monkeypatch.setattr(torch.version, name, version if name == BUILDS[vendor][0] else None)

    def devices(self, capabilities, architectures):
        """Several, of which the last is the current one."""
        self.device(capabilities[-1], architectures[-1])
        for name, value in {
            "current_device": lambda: len(capabilities) - 1,
            "device_count": lambda: len(capabilities),
            "get_device_capability": lambda index=-1: capabilities[index],
            "get_device_name": lambda index=-1: f"GPU {index}",
            "get_device_properties": lambda index=-1: type("Properties", (), {"gcnArchName": architectures[index]})(),
        }.items():
            self.monkeypatch.setattr(torch.cuda, name, value)

    def device(self, capability=(9, 0), architecture="gfx942:sramecc+:xnack-"):
        properties = type("Properties", (), {"gcnArchName": architecture, "multi_processor_count": 132})()
        for name, value in {
            "is_available": True,
            "current_device": 0,
            "device_count": 1,
            "get_device_name": "Some GPU",
            "get_device_capability": capability,
            "get_device_properties": properties,
        }.items():
            self.monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)


@pytest.fixture
def machine(monkeypatch):
    return Machine(monkeypatch)


# What is missing first, on a machine without a GPU
MISSING = {
    "cuda": f"torch {torch.__version__} is built without CUDA" if torch.version.cuda is None else "torch sees no NVIDIA device",
    "rocm": f"torch {torch.__version__} is built without ROCm" if torch.version.hip is None else "torch sees no AMD device",
}


@pytest.mark.usefixtures("with_vendors")
def test_both_are_listed_as_unavailable_with_the_reason():
    records = {record.backend: record for record in diffmax.backends() if record.operator == "bisect"}
    for name in ("cuda", "rocm"):
        assert records[name].distribution == f"diffmax-{name}"
        assert records[name].status == "unavailable"
        assert MISSING[name] in records[name].reason
        assert "pytorch.org" in records[name].reason
    assert records["numba"].status == "active"


@pytest.mark.usefixtures("with_vendors")
def test_named_without_a_device_it_raises_with_the_reason():
    with pytest.raises(NoBackendError, match=r"cuda: serves cuda, not cpu"):
        diffmax.diffmax_bisect(torch.zeros(3), 0.5, backend="cuda")
    with pytest.raises(NoBackendError, match=re.escape(f"cuda: {MISSING['cuda']}")):
        choose(describe("bisect", "cuda", torch.float32), "cuda")


@pytest.mark.usefixtures("with_vendors")
@pytest.mark.parametrize("vendor", ["cuda", "rocm"])
@pytest.mark.parametrize("operator", ["bisect", "bisect_backward"])
def test_the_runtime_chooses_between_the_two(vendor, operator, machine):
    machine.build(vendor)
    machine.device()
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        assert choose(describe(operator, "cuda", dtype, OPERATOR_FEATURES[operator])).name == vendor
    other = {"cuda": "rocm", "rocm": "cuda"}[vendor]
    with pytest.raises(NoBackendError, match=f"{other}: needs the .* runtime, this is"):
        choose(describe(operator, "cuda", torch.float32), other)


@pytest.mark.parametrize("vendor", [diffmax_cuda, diffmax_rocm], ids=lambda vendor: vendor.__name__)
def test_every_kernel_is_called_as_it_is_written(vendor):
    """The plugins said interface 1.3 when the shared launchers took bundles already: attention's backward raised TypeError."""
    (backend,) = vendor._plugin.plugin.diffmax_backends()
    references = reference_kernels()
    for operator, kernel in backend.provided.items():
        written, reference = (import_function(known.function) for known in (kernel, references[operator]))
        arguments = list(inspect.signature(written).parameters)
        assert arguments == list(inspect.signature(reference).parameters)[: len(arguments)]
        assert adapted(operator, written, backend.api_version) is written


@pytest.mark.usefixtures("with_vendors")
@pytest.mark.parametrize("vendor", ["cuda", "rocm"])
@pytest.mark.parametrize("operator", ["attention", "attention_backward"])
def test_attention_goes_to_the_vendor_and_says_what_it_does_not_take(vendor, operator, machine):
    machine.build(vendor)
    machine.device()
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert choose(describe(operator, "cuda", dtype, frozenset({"causal", "gqa"}), 64, 256)).name == vendor
    for spec in (
        describe(operator, "cuda", torch.float64, frozenset(), 64, 64),
        describe(operator, "cuda", torch.float16, frozenset(), 64, 272),
    ):
        with pytest.warns(RuntimeWarning, match="the reference runs"):
            assert choose(spec).name == "reference"
        with pytest.raises(NoBackendError, match=r"not float64|heads of at most 256 entries, not 272"):
            choose(spec, vendor)
        registry.noticed.clear()


@pytest.mark.usefixtures("with_vendors")
def test_attention_on_an_old_architecture_goes_to_the_reference(machine):
    machine.build("cuda")
    machine.device(capability=(7, 5))
    assert choose(describe("bisect", "cuda", torch.float16)).name == "cuda"
    spec = describe("attention", "cuda", torch.float16, frozenset(), 64, 64)
    with pytest.raises(NoBackendError, match=r"its attention needs compute capability 8.0 or newer, Some GPU has 7.5"):
        choose(spec, "cuda")
    with pytest.warns(RuntimeWarning, match="the reference runs"):
        assert choose(spec).name == "reference"


@pytest.mark.usefixtures("with_vendors")
def test_an_integer_dtype_is_refused_with_a_reason(machine):
    machine.build("cuda")
    machine.device()
    with pytest.raises(NoBackendError, match=r"cuda: takes float16, bfloat16, float32, float64, not float8_e5m2"):
        choose(describe("bisect", "cuda", torch.float8_e5m2), "cuda")


@pytest.mark.parametrize("vendor", ["cuda", "rocm"])
def test_the_probe_says_what_is_missing(vendor, machine, monkeypatch):
    probe = PROBES[vendor].probe
    machine.build({"cuda": "rocm", "rocm": "cuda"}[vendor])
    assert "is built without" in probe()
    machine.build(vendor)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    variable = {"cuda": "CUDA_VISIBLE_DEVICES", "rocm": "HIP_VISIBLE_DEVICES"}[vendor]
    monkeypatch.delenv(variable, raising=False)
    assert "there is none, or its driver is not loaded" in probe()
    monkeypatch.setattr(PROBES[vendor].Path, "exists", lambda path: True)
    assert "check the driver's version" in probe()
    monkeypatch.setenv(variable, "")
    assert f"{variable}=''" in probe()
    machine.device()
    assert probe() is None


def test_the_probe_names_an_architecture_that_is_too_old(machine):
    machine.build("cuda")
    machine.device(capability=(7, 0))
    assert diffmax_cuda.probe.probe() == "Some GPU has compute capability 7.0, needed is 7.5 or newer"
    machine.build("rocm")
    machine.device(architecture="gfx906:sramecc-:xnack-")
    assert "Some GPU is gfx906; the kernels are compiled and checked for gfx90a" in diffmax_rocm.probe.probe()


def test_on_a_mixed_machine_the_least_capable_device_decides(machine):
    """The current device's capability was asked and the answer kept for all: wrong where another one is older."""
    machine.build("cuda")
    machine.devices([(7, 5), (9, 0)], ["", ""])
    assert diffmax_cuda.probe.probe() is None
    spec = describe("attention", "cuda", torch.float16, frozenset(), 64, 64)
    (reason,) = diffmax_cuda.probe.unsupported(spec)
    assert "GPU 0 (cuda:0, the least capable of 2 devices; CUDA_VISIBLE_DEVICES can hide it) has 7.5" in reason
    machine.devices([(9, 0), (6, 1), (9, 0)], ["", "", ""])
    assert "GPU 1 (cuda:1, the least capable of 3 devices" in diffmax_cuda.probe.probe()
    machine.build("rocm")
    machine.devices([(9, 4), (9, 4)], ["gfx906:sramecc-", "gfx942"])
    assert "GPU 0 (cuda:0 of 2 devices; HIP_VISIBLE_DEVICES can hide it) is gfx906" in diffmax_rocm.probe.probe()


def test_what_is_wrong_with_triton_is_named(monkeypatch):
    assert requirements.triton_problem("nvidia") is None
    assert requirements.triton_problem("amd") is None
    assert "does not compile for ascend, only for amd, nvidia" in requirements.triton_problem("ascend")
    monkeypatch.setattr(triton, "__version__", "3.2.0")
    assert re.search(r"Triton is too old: .* has version 3.2.0, needed is 3.6 or newer", requirements.triton_problem("nvidia"))
    monkeypatch.setattr(requirements.importlib.util, "find_spec", lambda name: None)
    assert "Triton is not installed" in requirements.triton_problem("nvidia")


def test_importing_diffmax_with_both_installed_imports_no_triton_and_no_kernel():
    code = (
        "import sys, diffmax\n"
        "loaded = [m for m in sys.modules if m == 'triton' or m.startswith(('diffmax.kernels.triton', 'diffmax_cuda.rows'))]\n"
        "assert not loaded, loaded\n"
        "assert {'diffmax_cuda._plugin', 'diffmax_rocm._plugin'} <= set(sys.modules)\n"
    )
    fresh.python(code)


def test_each_architecture_gets_the_nearest_table():
    cuda, rocm = diffmax_cuda.configs, diffmax_rocm.configs
    assert cuda.table(9, 0) is cuda.tables()["9.0"]
    assert cuda.table(8, 9) is cuda.tables()["8.0"]
    assert cuda.table(12, 0) is cuda.tables()["10.0"]
    assert cuda.table(7, 0) is cuda.tables()["7.5"]
    assert rocm.table("gfx942:sramecc+:xnack-") is rocm.tables()["gfx942"]
    assert rocm.table("gfx90a") is rocm.tables()["gfx942"]
    assert rocm.table("gfx1201") is rocm.tables()["gfx1100"]
    for table in (*cuda.tables().values(), *rocm.tables().values()):
        assert all(n == 1 << (n.bit_length() - 1) for n in table.forward)
        assert table.origin


def test_tables_survive_writing_and_reading(tmp_path):
    tables = diffmax_cuda.configs.tables()
    write_tables(tmp_path / "tables.json", tables)
    assert read_tables(tmp_path / "tables.json") == tables
    assert Table.of(tables["9.0"].plain()) == tables["9.0"]


def test_the_launchers_know_their_device(machine):
    from diffmax_cuda import attention as cuda_attention
    from diffmax_cuda import rows as cuda_rows
    from diffmax_rocm import attention as rocm_attention
    from diffmax_rocm import rows as rocm_rows

    machine.device()
    device = torch.device("cuda", 0)
    for rows in (cuda_rows, rocm_rows):
        assert rows.processors.__wrapped__(device) == 132
        assert rows.operator.ptx == (rows is cuda_rows)
    assert cuda_attention.architecture.__wrapped__(device) == "sm90"
    assert rocm_attention.architecture.__wrapped__(device) == "gfx942"
    assert cuda_rows.table.__wrapped__(device) is diffmax_cuda.configs.tables()["9.0"]
    assert rocm_rows.table.__wrapped__(device) is diffmax_rocm.configs.tables()["gfx942"]


def test_both_have_the_same_files():
    """What differs between the vendors is inside files of one name."""
    names = [sorted(p.name for p in (ROOT / f"diffmax-{v}" / "src" / f"diffmax_{v}").iterdir() if p.is_file()) for v in PROBES]
    assert names[0] == names[1]


def test_warmup_says_what_to_pass():
    with pytest.raises(TypeError, match=r"lengths must be a sequence, got 64\npass \[64\]"):
        diffmax.warmup(64)
    with pytest.raises(TypeError, match=r"dtypes must be a sequence, got torch.float32"):
        diffmax.warmup([64], torch.float32)
    with pytest.raises(TypeError, match=r"dtypes must be torch dtypes, such as torch.float32, got 'float32'"):
        diffmax.warmup([64], ("float32",))
    for options, kind, says in (
        ({"lengths": []}, ValueError, "lengths or head_dims must have an entry"),
        ({"lengths": [8], "alphas": ()}, ValueError, "alphas must have an entry"),
        ({"lengths": [8], "alphas": 0.5}, TypeError, r"alphas must be a sequence, got 0.5\npass \[0.5\]"),
        ({"lengths": [8], "alphas": ["a"]}, TypeError, "alphas must be floats"),
        ({"lengths": [8.5]}, TypeError, "lengths must be ints, got 8.5"),
        ({"head_dims": 64}, TypeError, "head_dims must be a sequence, got 64"),
        ({"head_dims": ["64"]}, TypeError, "head_dims must be ints, or pairs of them, got '64'"),
        ({"head_dims": [(8, 8, 8)]}, TypeError, r"head_dims must be ints, or pairs of them, got \(8, 8, 8\)"),
        ({"head_dims": [8], "features": "causal"}, TypeError, r"features must be a sequence, got 'causal'"),
    ):
        with pytest.raises(kind, match=f"warmup: {says}"):
            diffmax.warmup(**options)
    if not torch.cuda.is_available():
        with pytest.raises(diffmax.NoBackendError, match="torch sees no device 'cuda' here"):
            diffmax.warmup([64], device="cuda")


def test_warmup_checks_its_arguments_and_passes_over_who_compiles_nothing():
    assert diffmax.warmup([1024], (torch.float32, torch.float64)) == {"numba": 2}
    for few in ({0.5}, torch.tensor([0.5]), [torch.tensor(0.5)], {0.5: 1}.keys(), (a for a in [0.5])):
        assert diffmax.warmup([8], alphas=few, backend="reference") == {"reference": 0}
    for few in ({64}, map(int, [64]), [torch.tensor([64, 32])], ((64, 32),)):
        assert diffmax.warmup(head_dims=few, backend="reference") == {"reference": 0}
    with pytest.raises(ValueError, match=r"warmup: lengths must be at least 1, got 0"):
        diffmax.warmup([0])
    with pytest.raises(ValueError, match=r"warmup: alphas must lie between 0 and 1, or be None for a tensor, got 1.0"):
        diffmax.warmup([8], alphas=(1.0,))
    with pytest.raises(NoBackendError, match="no backend is named 'nope'"):
        diffmax.warmup([8], backend="nope")
    with pytest.raises(ValueError, match=r"warmup: head_dims must be at least 1, got \(64, 0\)"):
        diffmax.warmup(head_dims=[(64, 0)])
    with pytest.raises(ValueError, match=r"warmup: no such feature of attention: 'causel', known: alibi, attention_stats, "):
        diffmax.warmup(head_dims=[64], features=["causel"])


@pytest.mark.slow
def test_warmup_prepares_attention_and_decoding_too():
    """Without arguments it prepares what an image is built with; afterwards nothing is compiled."""
    code = (
        "import time, torch, diffmax\n"
        "assert diffmax.warmup() == {'numba': 5}\n"
        "from numba.core.dispatcher import Dispatcher\n"
        "from unittest import mock\n"
        "q = torch.randn(1, 2, 70, 64, requires_grad=True)\n"
        "with mock.patch.object(Dispatcher, 'compile', side_effect=AssertionError('compiles')):\n"
        "    for causal in (False, True):\n"
        "        diffmax.attention(q, q, q, is_causal=causal, alpha=0.5).sum().backward()\n"
        "    diffmax.attention_with_kvcache(*torch.randn(3, 1, 9, 2, 64), cache_seqlens=5)\n"
        "    diffmax.diffmax_bisect(q).sum().backward()\n"
    )
    fresh.python(code)
    assert diffmax.warmup(head_dims=[64], features=["gqa", "dropout"], dtypes=[torch.float64], decoding=True) == {"numba": 2}
    assert diffmax.warmup(head_dims=[(64, 32)], backend="cpu") == {"cpu": 0}


@pytest.mark.usefixtures("with_vendors")
def test_warmup_calls_the_backend_of_the_device(machine, monkeypatch):
    calls = []
    machine.build("cuda")
    machine.device()
    monkeypatch.setattr(warming, "import_function", lambda target: lambda *arguments: calls.append((target, *arguments)))
    assert diffmax.warmup([64, 4096], (torch.bfloat16,), (0.5, None), device="cuda") == {"cuda": 4}
    assert ("diffmax_cuda.rows:warmup", torch.device("cuda", 0), torch.bfloat16, 64, 0.5, True) in calls
    assert calls[-1][3:] == (4096, None, True)
    calls.clear()
    more = {"features": ["causal"], "decoding": True, "backward": False, "device": "cuda"}
    assert diffmax.warmup(dtypes=[torch.float16], alphas=(None,), head_dims=[(64, 32)], **more) == {"cuda": 2}
    given = (torch.device("cuda", 0), torch.float16, 64, 32, None, False)
    assert calls == [
        ("diffmax_cuda.attention:warmup", *given, {"causal", "value_dim"}),
        ("diffmax_cuda.decoding:warmup", *given, {"causal", "value_dim", "kv_cache"}),
    ]
    calls.clear()
    diffmax.warmup(dtypes=[torch.float16], alphas=(None,), head_dims=[(64, 32)], **{**more, "features": ["gates"]})
    assert ("diffmax_cuda.power:warmup", *given, {"gates", "value_dim"}) in calls
