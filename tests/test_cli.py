"""python -m diffmax: the report, explain, selftest, bench, new-backend."""

import dataclasses
import importlib.util
import json
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

import diffmax
from diffmax import plugin
from diffmax.__main__ import main
from diffmax.cli import bench, report, selftest
from diffmax.errors import NoBackendError
from diffmax.machine import dispatch
from diffmax.machine.discovery import Plugin
from diffmax.machine.dispatch import registry
from diffmax.machine.env import Settings
from diffmax.operators.common import spec
from diffmax.plugin import AttentionResults, Backend, hookimpl
from diffmax.reference import attention as reference_attention
from diffmax.testing.rows import bench as rows_bench
from tests import fresh


@pytest.fixture
def settings(monkeypatch):
    def set_to(**fields):
        monkeypatch.setattr(dispatch.registry, "settings", Settings(**fields))

    return set_to


@pytest.fixture
def machine(monkeypatch):
    """A machine with these devices and device files, and a torch built for these runtimes."""

    def pretend(devices=(), files=(), built_for=()):
        monkeypatch.setattr(report, "visible_devices", lambda: tuple(devices))
        monkeypatch.setattr(report, "has_device_file", lambda runtime: runtime.name in files)
        monkeypatch.setattr(report, "built_for", lambda runtime: runtime.name in built_for)

    return pretend


@pytest.fixture
def register():
    added = []

    def add(name="mine", **fields):
        kernels = {"bisect": "diffmax.reference:bisect", "bisect_backward": "diffmax.reference:bisect_backward"}
        description = {"device_types": ("cpu",), "kernels": kernels, "dtypes": (torch.float32,), "priority": 1} | fields
        diffmax.register_backend(Backend(name=name, **description))
        added.append(name)

    yield add
    for name in added:
        diffmax.unregister_backend(name)


def wrong_forward(x, e, dim, n_iter, ensure_sum_one):
    p, m, delta = diffmax.reference.bisect(x, e, dim, n_iter, ensure_sum_one)
    return p + 0.25, m, delta


def raising_forward(*_):
    raise RuntimeError("launch failed")


def why_not():
    return "there is no such device"


# the report


def test_runs_as_a_module():
    result = subprocess.run([sys.executable, "-m", "diffmax"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("versions\n  diffmax-core")


def test_reports_versions_devices_and_backends(capsys):
    assert main([]) == 0
    output = capsys.readouterr().out
    for words in (diffmax.__version__, torch.__version__, "torch-npu", "triton", "torch built for CUDA"):
        assert words in output
    assert "cpu  " in output


def test_the_table_has_a_row_per_backend_and_is_narrow(capsys, with_vendors):
    main([])
    output = capsys.readouterr().out
    names = list(dict.fromkeys(record.backend for record in diffmax.backends()))
    table = output.partition("\nbackends\n")[2].partition("\n\n")[0].splitlines()
    assert [line.split()[0] for line in table if line[2] != " "] == ["backend", *names]  # what is indented is a reason
    assert max(len(line) for line in output.splitlines() if "kept in /" not in line) < 100  # a path is as long as it is
    assert table[1].split() == ["numba", "cpu", "active", "bisect,", "attention,", "attention_kvcache,", "power_attention,"]


def test_verbose_lists_every_kernel(capsys):
    assert main(["--verbose"]) == 0
    output = capsys.readouterr().out
    for record in diffmax.backends():
        assert record.kernel in output


def test_json_holds_the_same(capsys):
    assert main(["--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["versions"]["diffmax-core"] == diffmax.__version__
    assert report["devices"][0]["device"] == "cpu"
    assert {(r["backend"], r["status"]) for r in report["backends"]} >= {
        ("numba", "active"),
        ("cpu", "available"),
        ("reference", "active"),
    }
    assert set(report) == {"versions", "devices", "environment", "backends", "failures", "plugins", "advice", "problems"}


def test_shows_the_variables_that_are_set(monkeypatch, capsys):
    monkeypatch.setenv("DIFFMAX_STRICT", "1")
    main([])
    assert "DIFFMAX_STRICT  1" in capsys.readouterr().out


def test_shows_where_a_failed_plugin_failed(monkeypatch, capsys):
    error = 'Traceback:\n  File "a.py", line 1\n  File "b.py", line 7, in load\n    x()\nImportError: no libacme.so\n'
    failed = Plugin("acme", "diffmax-acme", "2.0", "failed", "ImportError: no libacme.so", error=error)
    monkeypatch.setattr(dispatch.registry, "plugins", [*dispatch.registry.plugins, failed])
    assert main([]) == 0
    output = capsys.readouterr().out
    assert "plugin 'acme' of diffmax-acme 2.0  ImportError: no libacme.so; File \"b.py\", line 7, in load" in output


def test_shows_what_plugins_report_of_themselves(capsys):
    class Reporting:
        @hookimpl
        def diffmax_env_report(self):
            return {"firmware": "7.1"}

    reporting = Reporting()
    dispatch.registry.manager.register(reporting, "acme")
    try:
        main([])
    finally:
        dispatch.registry.manager.unregister(reporting)
    assert "acme: firmware 7.1" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("runtime", "device", "package"),
    [("cuda", "cuda:0", "diffmax-cuda"), ("hip", "cuda:0", "diffmax-rocm"), ("cann", "npu:0", "diffmax-npu")],
)
def test_says_which_plugin_a_visible_device_lacks(machine, capsys, monkeypatch, runtime, device, package):
    machine(devices=[report.Device(device, runtime, "Big GPU")])
    main([])
    assert f"{device} is Big GPU, {package} is not installed: run: pip install {package}" in capsys.readouterr().out
    there = Plugin(package, package, "1.0", "failed", "broken")
    monkeypatch.setattr(dispatch.registry, "plugins", [*dispatch.registry.plugins, there])
    main([])
    assert "pip install" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("runtime", "cause"),
    [
        ("cuda", "/dev/nvidia0 shows an NVIDIA device that torch .* does not see: this build of torch lacks CUDA"),
        ("hip", "/dev/kfd shows an AMD device .*: this build of torch lacks ROCm; install a torch built for ROCm"),
        ("cann", "/dev/davinci0 shows an Ascend device .*: torch_npu is not installed"),
    ],
)
def test_says_when_torch_is_built_for_something_else(machine, runtime, cause):
    machine(files=[runtime])
    advice = report.collect().advice
    assert len(advice) == 2
    assert re.search(cause, advice[0])
    assert "pip install diffmax-" in advice[1]


def test_suspects_the_driver_where_torch_is_built_for_the_device(machine):
    machine(files=["cuda"], built_for=["cuda"])
    assert "check the driver" in report.collect().advice[0]


@pytest.mark.parametrize(("hip", "runtime"), [(None, "cuda"), ("6.4", "hip")])
def test_sees_accelerators_by_name_and_runtime(monkeypatch, hip, runtime):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
    monkeypatch.setattr(torch.version, "hip", hip)
    cpu, *gpus = report.visible_devices()
    assert cpu.device == "cpu"
    assert gpus == [report.Device(f"cuda:{index}", runtime, f"GPU {index}") for index in range(2)]


def test_sees_an_npu_that_torch_npu_added(monkeypatch):
    class Npu:
        is_available, device_count, get_device_name = (staticmethod(f) for f in (lambda: True, lambda: 1, lambda _: "910B"))

    monkeypatch.setattr(torch, "npu", Npu, raising=False)
    assert report.visible_devices()[-1] == report.Device("npu:0", "cann", "910B")


def test_gives_no_advice_where_there_is_no_hardware(machine, capsys):
    machine()
    main([])
    assert "advice" not in capsys.readouterr().out


def test_fails_when_the_backend_of_the_environment_is_not_loaded(settings, capsys):
    settings(backend=("nope",))
    assert main([]) == 1
    assert "DIFFMAX_BACKEND names 'nope', which is not loaded; loaded: numba, cpu, reference" in capsys.readouterr().out


def test_fails_when_the_backend_of_the_environment_is_not_available(settings, register, capsys):
    register(probe=f"{__name__}:why_not")
    settings(backend=("mine",))
    assert main(["--json"]) == 1
    (problem,) = json.loads(capsys.readouterr().out)["problems"]
    assert problem == "DIFFMAX_BACKEND names 'mine', which is unavailable: there is no such device"
    settings(backend=("mine", "cpu"))
    assert main([]) == 0


# explain


def test_explain_prints_what_diffmax_explain_does(capsys):
    x, alpha = torch.zeros(2, 3, requires_grad=True), torch.full((2, 1), 0.5, requires_grad=True)
    for options, arguments in (
        ([], (x.detach(),)),
        (["--alpha-tensor"], (x.detach(), alpha.detach())),
        (["--backward"], (x,)),
        (["--alpha-gradient"], (x, alpha)),
        (["--dtype", "bfloat16"], (x.detach().bfloat16(),)),
    ):
        assert main(["explain", *options]) == 0
        assert capsys.readouterr().out == f"{diffmax.explain('diffmax_bisect', *arguments)!r}\n"
    assert main(["explain", "--backend", "reference"]) == 0
    assert capsys.readouterr().out == f"{diffmax.explain('diffmax_bisect', x.detach(), backend='reference')!r}\n"


@pytest.mark.parametrize("device", ["cuda", "npu", "cuda:3"])
def test_explain_needs_no_device(capsys, device):
    assert main(["explain", "--device", device]) == 0
    output = capsys.readouterr().out
    assert ": reference, by priority" in output
    assert f"cpu: serves cpu, not {device.partition(':')[0]}" in output


def test_explain_knows_every_operator_and_says_what_to_install(capsys, monkeypatch):
    for operator in ("attention", "attention_varlen", "attention_with_kvcache", "diffmax_loss"):
        assert main(["explain", "--operator", operator, "--backend", "cpu"]) == 0
        assert ": cpu, by the backend argument" in capsys.readouterr().out
    assert (
        main(["explain", "--operator", "attention", "--features", "causal", "gqa", "--head-dim", "80", "--value-dim", "32"])
        == 0
    )
    assert "head size 80 and 32, needs causal, gqa" in capsys.readouterr().out
    plugins = [p for p in registry.plugins if not p.distribution.startswith("diffmax-") or p.distribution == "diffmax-core"]
    monkeypatch.setattr(registry, "plugins", plugins)
    assert main(["explain", "--operator", "attention", "--device", "cuda"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "run: pip install diffmax-cuda"
    with pytest.raises(NoBackendError, match=r"no backend is named 'cuda'(.|\n)*run: pip install diffmax-cuda"):
        diffmax.diffmax_bisect(torch.zeros(3), backend="cuda")


def test_explain_of_a_call_knows_decoding_and_the_loss():
    q, cache = torch.zeros(1, 1, 2, 16), torch.zeros(1, 8, 2, 16)
    decoding = diffmax.explain(diffmax.attention_with_kvcache, q, cache, cache, cache_seqlens=4, causal=True)
    ((spec, chosen, _, _),) = decoding.calls
    assert (spec.operator, spec.features, spec.head_dim, chosen) == ("attention_kvcache", {"kv_cache", "causal"}, 16, "numba")
    loss = diffmax.explain("diffmax_loss", torch.zeros(2, 5, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.int64))
    assert loss.calls[0][0].dtype == torch.float32


def test_explain_says_what_is_wrong_with_its_arguments(capsys):
    assert main(["explain", "--features", "causal"]) == 1
    assert "explain: --features are attention's, got causal for diffmax_bisect" in capsys.readouterr().err
    assert main(["explain", "--operator", "attention", "--features", "paged"]) == 1
    assert "explain: attention has no feature 'paged', it has: " in capsys.readouterr().err
    assert main(["explain", "--operator", "attention_with_kvcache", "--backward"]) == 1
    assert "attention_with_kvcache has no backward" in capsys.readouterr().err
    assert main(["explain", "--device", "abacus"]) == 1
    assert "explain: device must be one that torch knows" in capsys.readouterr().err
    assert main(["explain", "--backend", "nope"]) == 1
    assert "no backend is named 'nope'" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["explain", "--dtype", "int8"])
    assert "invalid choice: 'int8'" in capsys.readouterr().err


# selftest


@pytest.mark.slow
def test_selftest_passes_on_cores_own_kernels(capsys):
    assert main(["selftest", "--backend", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 * len(selftest.CHECKS) + 1
    assert all(line.startswith("ok") for line in lines[:-1])
    assert lines[-1] == f"all passed: {len(lines) - 1} checks, 0 lines not run"


@pytest.mark.parametrize(
    ("function", "words"), [("wrong_forward", "weights at alpha="), ("raising_forward", "RuntimeError: launch failed")]
)
def test_selftest_names_what_fails(register, capsys, function, words):
    register(kernels={"bisect": f"{__name__}:{function}"})
    assert main(["selftest", "--backend", "mine"]) == 1
    output = capsys.readouterr().out
    assert "FAILED  mine cpu bisect float32 Random rows, short to long: " in output
    assert words in output
    assert "not run mine cpu bisect float32 Alpha per head and per row: the backend does not claim tensor_alpha" in output
    assert "not run mine cpu attention: the backend does not provide it" in output
    assert " failed, " in output.splitlines()[-1]


def test_selftest_fails_for_a_named_backend_that_cannot_run(register, capsys, monkeypatch):
    register(probe=f"{__name__}:why_not")
    monkeypatch.setattr(selftest, "_check_operator", lambda *_: iter(()))  # of the others
    assert main(["selftest", "--backend", "mine"]) == 1
    assert "FAILED  mine cpu: unavailable: there is no such device" in capsys.readouterr().out
    assert [o.not_run for o in selftest.run() if o.backend == "mine"] == ["unavailable: there is no such device"]


def test_selftest_does_not_pass_where_nothing_was_run(capsys, monkeypatch):
    """A backend that had attention alone was told "all passed" after six lines "not run"."""
    monkeypatch.setattr(selftest, "run", lambda *_: iter([selftest.Outcome("mine", "cpu", not_run="unavailable")]))
    assert main(["selftest"]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "nothing was run"


def test_selftest_covers_every_operator_of_every_backend():
    """Each operator has a check; and each that a backend of the CPU provides is run or left out with a reason."""
    assert {check.operator for check in selftest.CHECKS} == set(plugin.OPERATORS)
    assert all(check.name for check in selftest.CHECKS)


def test_selftest_of_attention_alone_checks_attention(register, capsys):
    register(kernels={"attention": "diffmax.kernels.cpu.attention:attention"}, features=frozenset({"causal", "mask", "gqa"}))
    assert main(["selftest", "--backend", "mine"]) == 0
    output = capsys.readouterr().out
    assert "ok      mine cpu attention float32 Causal, lower right" in output
    assert "not run mine cpu bisect: the backend does not provide it" in output


def own_scale(query, key, value, call, keep, stats):
    return reference_attention.attention(
        query, key, value, dataclasses.replace(call, scale=query.shape[3] ** -0.5), keep, stats
    )


def nan_before_any_key(query, key, value, call, keep, stats):
    out, *rest = reference_attention.attention(query, key, value, call, keep, stats)
    before = query.shape[2] - key.shape[2]
    if call.right == 0 and call.lower_right and before > 0:
        out[:, :, :before] = torch.nan
    return AttentionResults(out, *rest)


def no_window(query, key, value, call, keep, stats):
    return reference_attention.attention(query, key, value, dataclasses.replace(call, left=-1, right=-1), keep, stats)


@pytest.mark.parametrize(
    ("function", "features", "words"),
    [
        ("own_scale", {"causal", "gqa"}, "float32 Scale: "),
        ("nan_before_any_key", {"causal"}, "float32 Queries that see nothing, NaN, +inf: "),
        ("no_window", {"causal", "window"}, "float32 Window: "),
    ],
)
def test_selftest_catches_what_a_vendor_may_forget(register, capsys, function, features, words):
    """All passed."""
    register(kernels={"attention": f"{__name__}:{function}"}, features=frozenset(features))
    assert main(["selftest", "--backend", "mine"]) == 1
    output = capsys.readouterr().out
    assert f"FAILED  mine cpu attention {words}" in output
    assert "ok      mine cpu attention float32 Plain" in output


def test_selftest_says_which_backends_and_devices_there_are(capsys):
    assert main(["selftest", "--backend", "nope"]) == 1
    assert "selftest: no backend is named 'nope', loaded: numba, cpu, reference" in capsys.readouterr().err
    assert main(["selftest", "--device", "cuda:77"]) == 1
    assert "selftest: device must be one that torch sees, got 'cuda:77'\n  seen: cpu" in capsys.readouterr().err


@pytest.mark.slow
def test_selftest_needs_no_test_packages():
    code = (
        "import sys; sys.modules.update(pytest=None, scipy=None, hypothesis=None)\n"
        "from diffmax.__main__ import main; sys.exit(main(['selftest', '--backend', 'reference']))"
    )
    fresh.python(code)


# bench


@pytest.mark.slow
def test_bench_prints_a_table_of_ratios(capsys, monkeypatch):
    monkeypatch.setattr(rows_bench, "LENGTHS", (16, 64))
    tables = [table.splitlines() for table in bench.run(elements=1024, seconds=1e-3)]
    assert [len(table) for table in tables] == [5, 5, 3, 5]
    assert all(line.split()[-1].endswith("x") for table in tables for line in table[1:])
    assert [table[0].split()[0].rstrip(",") for table in tables] == ["diffmax_bisect", "attention", "decoding", "power"]
    assert main(["bench", "--device", "cuda:77"]) == 1
    assert "bench: device must be one that torch sees" in capsys.readouterr().err


def test_bench_times_what_an_operator_says(monkeypatch, capsys):
    """Its spec is all that is needed: no list is edited."""
    function = spec.Function("bisect", lambda: None, bench="diffmax.testing.rows.bench:BENCH")
    monkeypatch.setitem(spec.SPECS, "new", spec.OperatorSpec(name="new", rank=99, functions={"new_function": function}))
    monkeypatch.setattr(rows_bench, "LENGTHS", (16,))
    monkeypatch.setattr(bench, "run", partial(bench.run, elements=1024, seconds=1e-3))
    assert list(bench.timed()) == ["diffmax_bisect", "attention", "attention_with_kvcache", "power_attention", "new_function"]
    assert main(["bench", "--operator", "new_function"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ["diffmax_bisect", "forward", "forward+backward"]


def test_bench_says_that_the_machine_is_busy(capsys, monkeypatch):
    """On shared cores it printed ratios of hundreds without a word."""
    monkeypatch.setattr(bench, "run", lambda *_: iter(["a table"]))
    monkeypatch.setattr(bench, "SHARED", 2.0)
    assert main(["bench"]) == 0
    assert "this machine is busy (a loop had " in capsys.readouterr().out
    monkeypatch.setattr(bench, "SHARED", 0.0)
    monkeypatch.setattr(bench.os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    assert main(["bench"]) == 0
    assert "busy" not in capsys.readouterr().out
    monkeypatch.setattr(bench.os, "getloadavg", lambda: (1e3, 0.0, 0.0))
    assert "the load average is 1000.0" in bench.busy(by_load=True)


# new-backend


@pytest.mark.parametrize(
    ("name", "kind", "operator"),
    [
        ("acme", [], "bisect"),
        ("Acme_2", [], "bisect"),
        ("2d", ["--attention"], "attention"),
        ("acme", ["--power"], "power_attention"),
    ],
)
def test_new_backend_writes_a_plugin_without_placeholders(tmp_path, capsys, name, kind, operator):
    folder = tmp_path / "deep" / "plugin"
    assert main(["new-backend", name, *kind, "--to", str(folder)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"wrote {folder}",
        "next:",
        f'  python -m pip install --editable "{folder}[testing]"',
        f"  python -m diffmax selftest --backend {name}",
        f'  python -m pytest "{folder}"',
        "on a CPU the last two take minutes, and less with the environment variable OMP_NUM_THREADS=1",
    ]
    package = f"diffmax_{name.lower()}"
    files = {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}
    sources = [f"src/{package}/{file}" for file in ("__init__.py", "_plugin.py", "kernels.py")]
    assert sorted(files) == sorted(["README.md", "pyproject.toml", "tests/test_conformance.py", *sources])
    for path, text in files.items():
        assert not re.search(r"@\w+@", text), path
        if path.endswith(".py"):
            compile(text, path, "exec")
    assert f'{name} = "{package}._plugin:plugin"' in files["pyproject.toml"]
    for function in (operator, f"{operator}_backward"):
        assert f'"{function}": Kernel("{package}.kernels:{function}"' in files[f"src/{package}/_plugin.py"]
        assert f"\ndef {function}(" in files[f"src/{package}/kernels.py"]


def test_new_backend_makes_one_operator_at_a_time(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["new-backend", "acme", "--attention", "--power", "--to", str(tmp_path / "plugin")])
    assert "argument --power: not allowed with argument --attention" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("a-b", "name must be letters, digits and, inside it, '_', got 'a-b'"),
        ("_a", "name must be letters"),
        ("", "name must be letters"),
        ("cpu", "the name 'cpu' is taken by diffmax-core"),
        ("CUDA", "the name 'CUDA' is kept for diffmax's own distributions: core, cuda, rocm, npu"),
    ],
)
def test_new_backend_refuses_a_name_that_does_not_fit(tmp_path, capsys, name, words):
    assert main(["new-backend", name, "--to", str(tmp_path / "new")]) == 1
    assert words in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_new_backend_does_not_write_into_a_folder_that_exists(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "diffmax-acme").mkdir()
    assert main(["new-backend", "acme"]) == 1
    assert "new-backend: the folder must not exist yet, got diffmax-acme\nchoose another one" in capsys.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="needs Numba: pip install 'diffmax-core[numba]'")
def test_says_where_compiled_kernels_are_kept(tmp_path, capsys, monkeypatch):
    """That a user could keep none was said by a warning of the first call alone."""
    monkeypatch.setattr("numba.core.config.CACHE_DIR", str(tmp_path))
    assert main([]) == 0
    assert f"core: compiled kernels  kept in {tmp_path}" in capsys.readouterr().out
    monkeypatch.setattr("numba.core.caching.CacheImpl._locator_classes", [])
    assert main([]) == 0
    assert "compiled anew in each process: set NUMBA_CACHE_DIR to a folder" in " ".join(capsys.readouterr().out.split())


# report


def _report_file(folder, tests, **run):
    run = {"backend": "acme", "distribution": "diffmax-acme", "version": "1.2", "device": "acc", "counts": {}} | run
    path = folder / "acme.json"
    path.write_text(json.dumps({"environment": {"torch": "2.13.0"}, "note": "a prototype", "runs": [run | {"tests": tests}]}))
    return path


def test_report_counts_outcomes_by_operator_and_names_what_did_not_pass(tmp_path, capsys):
    tests = [
        {"operator": "attention", "test": "test_a[plain]", "outcome": "passed"},
        {"operator": "attention", "test": "test_b[a|b]", "outcome": "failed", "reason": "0.1 too far\nmore"},
        {"operator": "bisect", "test": "test_c", "outcome": "expected failure", "reason": "not yet"},
        {"operator": "bisect", "test": "test_d", "outcome": "refused"},
    ]
    claims = {"bisect": {"dtypes": ["float32"], "features": ["tensor_alpha"]}}
    assert main(["report", str(_report_file(tmp_path, tests, claims=claims, **{"left out": 3}))]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "| `acme` | acc | `attention` | 1 | 0 | 1 | 0 | 0 |" in lines
    assert "| `acme` | acc | `bisect` | 0 | 1 | 0 | 1 | 0 |" in lines
    assert "| `acme` | `bisect` | float32 | tensor_alpha |" in lines
    assert "| `acme` | diffmax-acme 1.2 | torch 2.13.0 | a prototype | 3 |" in lines
    assert "| `attention` | `test_b[a\\|b]` | failed | 0.1 too far |" in lines
    assert "| `bisect` | `test_c` | expected failure | not yet |" in lines


def test_report_refuses_what_is_no_report(tmp_path, capsys):
    path = tmp_path / "other.json"
    path.write_text('{"runs": [{"backend": "acme"}], "environment": {}}')
    assert main(["report", str(path), "--to", str(tmp_path / "page.md")]) == 1
    words = capsys.readouterr().err
    assert words.startswith(f"report: the file must be what pytest's --diffmax-report wrote, got {path}\n  KeyError: 'tests'")
    assert not (tmp_path / "page.md").exists()


def test_the_page_of_published_reports_is_made_of_the_committed_reports(tmp_path):
    docs = Path(__file__).parents[1] / "docs"
    reports = sorted((docs / "reports").glob("*.json"))
    runs = {run["backend"]: run for path in reports for run in json.loads(path.read_text())["runs"]}
    assert runs.keys() >= {"cpu", "numba", "reference", "npu"}
    assert not [run["backend"] for run in runs.values() if run["counts"].keys() != {"passed"}]
    assert main(["report", *map(str, reports), "--to", str(tmp_path / "page.md")]) == 0
    assert (tmp_path / "page.md").read_text() == (docs / "published_reports.md").read_text()


@pytest.mark.parametrize("flag", ["--head-dim", "--value-dim"])
def test_explain_refuses_a_head_without_entries(flag, capsys):
    assert main(["explain", "--operator", "attention", flag, "0"]) != 0
    assert f"explain: {flag} must be at least 1, got 0" in "".join(capsys.readouterr())


@pytest.mark.parametrize(
    ("operator", "options"),
    [
        ("diffmax_bisect", {}),
        ("diffmax_bisect", {"X": torch.ones(2), "foo": 1}),
        ("attention", {"query": torch.ones(2)}),
        ("diffmax_loss", {}),
    ],
    ids=str,
)
def test_explain_names_the_function_whose_arguments_do_not_fit(operator, options):
    with pytest.raises(TypeError, match=f"^explain: {operator}: (missing|got an unexpected)"):
        diffmax.explain(operator, **options)
