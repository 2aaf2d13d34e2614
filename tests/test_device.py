"""`python -m benchmarks.device` rehearsed: on the interpreter, with faults on purpose, killed in the middle, and resumed."""

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch

import diffmax
from benchmarks.device import bundle, cells_timed, lines, place, report, site, stages, tables, tuning
from benchmarks.device.cells import Cell, rehearsed
from diffmax.kernels.triton.common.tuning import KERNELS, Case, Tile, Tunable, read_tables

ROOT = Path(__file__).resolve().parent.parent
ROWS, ATTENTION = "rows float32 a0.5 s1 8x48", "attention randn 0 a0.5 20 H1 D16 float32"
DECODE, OPTION = "decode needles B1 40", "option causal, randn 0 20 H1 D16 float32"
FAULTS = {
    "raise": "smoke rows backward float32",
    "wrong": ATTENTION,
    "die": "smoke decode float32",
    "sticky": "smoke rows forward bfloat16",
    "hang": "matmul tf32",
    "missing": "entmax",
}


def command(out, *more):
    work = out.parent / "work"
    start = [sys.executable, "-m", "benchmarks.device", "--interpret", "--seed", "1", "--out", str(out), "--work", str(work)]
    return [*start, "--bundle", str(out.parent / "bundle"), *more]


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "DEVICE_PATIENCE": "0.1"}


def children(marker):
    """Processes whose command line names a path of this run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if marker.encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    """A run with every fault, killed as soon as it has some lines of smoke, and then run again to the end."""
    folder = tmp_path_factory.mktemp("device")
    out = folder / "out"
    injected = [f"{kind}:{where.replace(' ', '_')}" for kind, where in FAULTS.items()]
    injected.append(f"die:{ROWS.replace(' ', '_')}@softmax")
    run = command(out, "--seconds", "400", "--inject", *injected)
    first = subprocess.Popen(run, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while time.monotonic() < until and not (out / "smoke.jsonl").exists():
        time.sleep(0.05)
    while time.monotonic() < until and len((out / "smoke.jsonl").read_text().splitlines()) < 2:
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    first.wait()
    until = time.monotonic() + 20
    while time.monotonic() < until and children(str(folder)):
        time.sleep(0.2)
    left = children(str(folder))
    before = list(lines.read([out]))
    second = subprocess.run(run, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False, timeout=400)
    return out, before, left, second


def of(found, cell):
    return [line for line in found if line["cell"] == cell and "contestant" not in line]


@pytest.mark.slow
def test_a_killed_run_leaves_valid_lines_and_no_process(rehearsal):
    out, before, left, _ = rehearsal
    assert left == []
    assert {line["stage"] for line in before} == {"run", "ceilings", "smoke"}
    for path in out.glob("*.jsonl"):
        assert all(isinstance(json.loads(text), dict) for text in path.read_text().splitlines() if text.endswith("}"))


@pytest.mark.slow
def test_the_next_run_goes_on_where_it_was_killed(rehearsal):
    out, before, _, second = rehearsal
    through = {line["cell"] for line in before if line["status"] == "ok"}
    assert through
    after = list(lines.read([out]))
    for cell in through:
        assert len([line for line in of(after, cell) if line["status"] == "ok"]) == 1, cell
    assert "smoke" in second.stdout


@pytest.mark.slow
def test_every_cell_has_its_line_whatever_happened_to_others(rehearsal):
    out, *_ = rehearsal
    found = {line["cell"] for line in lines.read([out])}
    assert set(stages.every_cell("interpret")) <= found
    assert any(cell.startswith("kits TestRows test_empty_and_single") for cell in found)


@pytest.mark.slow
def test_each_fault_is_a_line_of_its_kind(rehearsal):
    out, *_ = rehearsal
    found = list(lines.read([out]))
    raised = of(found, "smoke rows backward float32 a0.85")
    assert [line["status"] for line in raised] == ["error", "error"]  # once more at the end
    assert raised[0]["reason"] == "KernelFaultError: this kernel does not compile"
    died = of(found, "smoke decode float32 plain")
    assert [line["status"] for line in died] == ["error", "ok"]
    assert died[0]["reason"] == "the process was killed by SIGKILL"
    lost = of(found, "smoke rows forward bfloat16 a0.85")
    assert [line["status"] for line in lost] == ["error", "ok"]
    assert lost[0]["context_lost"]
    hung = of(found, "matmul tf32")
    assert [line["status"] for line in hung] == ["timeout", "ok"]
    assert of(found, "rival entmax")[0]["status"] == "skipped"
    assert "no module named 'entmax'" in of(found, "rival entmax")[0]["reason"]
    for line in found:
        if line["status"] in ("ok", "wrong", "error") and line["stage"] not in ("run", "kits"):
            assert {"seconds", "attempt"} <= set(line), line


@pytest.mark.slow
def test_a_wrong_result_has_its_figures_and_no_time(rehearsal):
    out, *_ = rehearsal
    (first, again) = of(list(lines.read([out])), ATTENTION)
    assert first["status"] == again["status"] == "wrong"
    assert first["seed"] != again["seed"]
    assert first["error"] > first["allowed"] > 0
    assert "median_ms" not in json.dumps(first["contestants"]["diffmax"])
    assert first["contestants"]["sdpa"]["forward"]["median_ms"] > 0


@pytest.mark.slow
def test_who_kills_the_process_is_left_out_and_the_others_are_measured(rehearsal):
    out, *_ = rehearsal
    found = [line for line in lines.read([out]) if line["cell"] == ROWS]
    assert [line["status"] for line in found if line.get("contestant") == "softmax"] == ["error"]
    (line,) = of(found, ROWS)
    assert line["status"] == "ok"
    assert line["contestants"]["diffmax"]["forward"]["median_ms"] > 0
    assert "softmax" not in line["contestants"]
    assert line["contestants"]["entmax_bisect"]["status"] == "skipped"


@pytest.mark.slow
def test_a_run_leaves_few_files_that_name_no_machine(rehearsal):
    out, *_ = rehearsal
    files = list(out.iterdir())
    assert len(files) <= 8
    assert all(path.is_file() for path in files)
    text = "".join(path.read_text() for path in out.glob("*.jsonl"))
    assert str(out.parent) not in text
    assert str(ROOT) not in text
    assert os.uname().nodename not in text


@pytest.mark.slow
def test_a_stage_that_hangs_does_not_starve_the_next(tmp_path):
    out = tmp_path / "out"
    run = command(out, "--seconds", "60", "--only", "ceilings", "smoke", "--inject", "hang:copy")
    subprocess.run(run, cwd=ROOT, env={**environment(), "DEVICE_PATIENCE": "1"}, check=False, timeout=120)
    found = list(lines.read([out]))
    assert of(found, "copy")[0]["reason"].startswith("the stage's time was up")
    assert any(line["status"] == "ok" for line in found if line["stage"] == "smoke")


def test_a_machine_without_a_device_is_told_so(tmp_path):
    run = [sys.executable, "-m", "benchmarks.device", "--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2
    assert "torch sees no device here" in done.stderr
    reasons = [line["reason"] for line in lines.read([tmp_path / "out"]) if "reason" in line]
    assert reasons[0].startswith("torch sees no GPU here")


def test_a_line_that_was_cut_off_spoils_no_other(tmp_path):
    file = lines.Lines(tmp_path, "smoke")
    file.write("a", "ok", value=float("nan"), path="/usr/lib/x/y.py", text="z" * 5000)
    os.write(file.file, b'{"stage": "smoke", "cell": "b", "sta')
    file.close()
    lines.Lines(tmp_path, "smoke").write("c", "error")
    found = list(lines.read([tmp_path]))
    assert [line["cell"] for line in found] == ["a", "c"]
    assert found[0]["value"] == "nan"
    assert found[0]["path"] == "y.py"
    assert len(found[0]["text"]) < 2000
    assert lines.outcomes([tmp_path]) == ({"a"}, {"c": 1})


def test_the_orchestrator_needs_neither_torch_nor_diffmax():
    code = "import sys, benchmarks.device.__main__; assert not {'torch', 'diffmax', 'numpy'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize("kind", stages.KINDS)
def test_cells_have_names_of_their_own_and_functions_that_take_their_case(kind):
    import inspect

    cells = stages.every_cell(kind)
    assert all(isinstance(cell, Cell) for cell in cells.values())
    for cell in cells.values():
        if cell.run and not rehearsed(kind):  # Triton interprets from its import on
            module, _, function = cell.run.partition(":")
            signature = inspect.signature(getattr(importlib.import_module(f"benchmarks.device.{module}"), function))
            signature.bind(None, **cell.case)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["cuda", "rocm"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_each_kernel_that_is_tuned_has_its_launcher(kernel, backend):
    """Decoding's module had moved: its tuning raised ModuleNotFoundError, on a device alone."""
    there = place.Place(backend, "cuda", backend)
    assert there.real
    assert isinstance(tuning.operator_of(types.SimpleNamespace(place=there), kernel), Tunable)


@pytest.mark.slow
def test_reports_are_made_from_partial_folders_and_a_rehearsal_publishes_nothing(rehearsal, tmp_path, capsys):
    out, before, *_ = rehearsal
    (tmp_path / "part").mkdir()
    with (tmp_path / "part" / "smoke.jsonl").open("w") as file:
        file.writelines(json.dumps(line) + "\n" for line in before if line["stage"] == "smoke")
    (tmp_path / "empty").mkdir()
    page = tmp_path / "page.md"
    page.write_text(f"a {report.BEGIN} b {report.END} c")
    for folder in (tmp_path / "part", tmp_path / "empty", out):
        arguments = [str(folder), "--results", str(tmp_path / "results"), "--page", str(page)]
        assert report.main(arguments) == 0
        assert "nothing is written" in capsys.readouterr().out
    assert not (tmp_path / "results").exists()
    assert page.read_text() == f"a {report.BEGIN} b {report.END} c"
    assert report.main([str(out), str(tmp_path / "part"), "--to", str(tmp_path / "to")]) == 0
    written = json.loads((tmp_path / "to" / "device.json").read_text())
    assert {"environment", "targets", "rows"} == set(written)
    assert {row["cell"] for row in written["rows"]} >= set(stages.every_cell("interpret"))
    text = (tmp_path / "to" / "report.md").read_text()
    assert "A rehearsal" in text
    assert "KernelFaultError: this kernel does not compile" in text
    assert f"| {ATTENTION} | wrong |" in text
    assert (tmp_path / "to" / "device-rows.png").exists()


def times(ms, **more):
    return {"median_ms": ms, "p20_ms": ms, "p80_ms": ms, "samples": 3, **more}


def measured_run(folder):
    """Lines as a device would leave them."""
    folder.mkdir()
    lines.Lines(folder, "run").write("run", "part", kind="gpu", faults="", date="2026-01-02", commit="abc", seed=1)
    packages = {"torch": "2.11.0", "triton": "3.6.0"}
    facts = {"device": "NVIDIA H100 80GB HBM3", "backend": "cuda", "packages": packages, "lanes": 32}
    lines.Lines(folder, "ceilings").write("device", "ok", **facts)
    decisive = lines.Lines(folder, "decisive")
    cell = cells_timed.rows("float32", 0.85, 4096)
    field = {"diffmax": 1.0, "softmax": 0.8, "copy": 0.95}
    contestants = {name: {"status": "ok", "forward": times(ms)} for name, ms in field.items()}
    decisive.write(cell.id, "ok", **cell.case, contestants=contestants)
    step = cells_timed.decode(1, 131072, "spread")
    found = {"sdpa": (0.3, 0.05), "diffmax": (0.4, 0.04), "diffmax, bounds": (0.4, 0.06)}
    contestants = {
        name: {"status": "ok", "step": times(eager, graph=times(graph), graph_cold=times(graph), host_us=70.0)}
        for name, (eager, graph) in found.items()
    }
    decisive.write(step.id, "ok", **step.case, contestants=contestants)
    # a contestant's line, and then the power went off
    lone = cells_timed.attention("randn", 0.9, 16384)
    decisive.write(lone.id, "ok", contestant="diffmax", forward=times(5.0))
    tuned = {"kernel": "rows", "dtype": "float32", "size": 4096, "architecture": "9.0"}
    settings = {"0": {"rows": 1, "warps": 2, "keep": True}, "1": {"rows": 1, "warps": 4, "keep": False}}
    field = {"shipped": 1.0, "0": 0.8, "1": 0.9}
    contestants = {name: {"status": "ok", "forward": times(ms)} for name, ms in field.items()}
    lines.Lines(folder, "tuning").write("tune rows float32 4096", "ok", **tuned, settings=settings, contestants=contestants)


def test_a_devices_report_says_which_goals_are_met_and_writes_result_tables_and_page(tmp_path, monkeypatch, capsys):
    measured_run(tmp_path / "run")
    page, file = tmp_path / "page.md", tmp_path / "tables.json"
    page.write_text(f"before\n{report.BEGIN}\na prediction\n{report.END}\nafter")
    file.write_text(tables.FILES["cuda"].read_text())
    monkeypatch.setattr(tables.write, "__defaults__", ({"cuda": file},))
    assert report.main([str(tmp_path / "run"), "--results", str(tmp_path / "results"), "--page", str(page)]) == 0
    (path,) = (tmp_path / "results").rglob("*.json")
    assert path.relative_to(tmp_path / "results").as_posix() == "nvidia-h100-80gb-hbm3/2026-01-02-abc-device.json"
    judged = {goal["what"]: goal for goal in json.loads(path.read_text())["targets"]}
    assert judged["rows, float32, 1k to 128k, worst share of copy bandwidth"]["met"] is True
    assert judged["rows, float32, 1k to 128k, worst times softmax"]["value"] == 1.25
    assert judged["rows, float32, 1k to 128k, worst times softmax"]["met"] is False
    assert judged["decode, 128k tokens, spread, device time: times dense softmax"]["value"] == pytest.approx(0.8)
    assert judged["decode, host time of a call, us"]["met"] is False
    assert judged["rows, bfloat16, 1k to 128k, worst times softmax"]["met"] is None
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after")
    assert "a prediction" not in text
    assert "missed" in text
    assert "not measured" in text
    entry = read_tables(file)["9.0"].entries["rows"][Case.of("rows", torch.float32, 4096)]
    assert entry.launch == Tile(1, 2, True)
    assert entry.origin == "measured on NVIDIA H100 80GB HBM3, torch 2.11.0, triton 3.6.0"
    assert "| attention randn 0 a0.9 16384 H16 D64 bfloat16 | forward |" in capsys.readouterr().out


def test_the_band_has_the_share_of_empty_tiles_that_is_asked_for():
    from benchmarks.device import inputs
    from benchmarks.device.context import Context
    from benchmarks.device.place import Place

    for sparsity in (0.25, 0.7):
        context = Context(Cell("", ""), Place("npu-rehearsal", "cpu", "cpu"), 1, Path())
        query, key, value, _ = inputs.tensors(context, "band", 2048, 1, 64, 0.5, sparsity, "float32")
        _, stats = diffmax.attention(query, key, value, is_causal=True, alpha=0.5, return_stats=True)
        assert abs(float(stats.tile_sparsity.mean()) - sparsity) < 0.15


@pytest.mark.slow
def test_the_stages_for_an_npu_rehearse_too(tmp_path):
    out = tmp_path / "out"
    run = command(out, "--kind", "npu", "--seconds", "60", "--only", "decisive", "grid", "--inject", "missing:entmax")
    done = subprocess.run(run, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {line["cell"]: line for line in lines.read([out]) if "contestant" not in line}
    assert found[ROWS]["status"] == found[ATTENTION]["status"] == "ok"
    assert set(found[ATTENTION]["contestants"]) == {"diffmax", "sdpa"}


@pytest.mark.slow
def test_the_bundle_holds_wheels_that_unpack_into_an_installation(tmp_path, capsys):
    folder = tmp_path / "bundle"
    assert bundle.main(["--to", str(folder), "--offline", "--without-captured"]) == 0
    said = capsys.readouterr().out
    assert "MB  in all" in said
    assert len(bundle.line(str(folder))) < 2000
    assert bundle.line(str(folder)) in said
    paths, how = site.paths(folder, tmp_path)
    assert how == "unpacked diffmax_core, diffmax_cuda"
    code = "import diffmax, diffmax_cuda; print(diffmax.__file__); print([r.backend for r in diffmax.backends()])"
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
    done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert str(paths[0]) in done.stdout
    assert "'cuda'" in done.stdout
    note = json.loads((folder / "bundle.json").read_text())
    (folder / "bundle.json").write_text(json.dumps({**note, "tree": "of another state"}))
    paths, how = site.paths(folder, tmp_path)
    assert "our wheels are of other sources, which were used" in how
    assert not list(paths[0].glob("diffmax*"))


class StandIn(place.Place):
    """A device with events and graphs, on the CPU with core's kernels: for the branches that a rehearsal does not reach."""

    real = graphs = True

    @property
    def module(self):
        memory = {"memory_allocated": lambda: 0, "max_memory_allocated": lambda: 7, "reset_peak_memory_stats": lambda: None}
        return types.SimpleNamespace(synchronize=lambda: None, empty_cache=lambda: None, **memory)


@pytest.fixture
def standin(monkeypatch):
    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = time.perf_counter()

        def elapsed_time(self, end):
            return 1e3 * (end.at - self.at)

    class Graph:
        def replay(self):
            time.sleep(1e-5)

    class Driver:
        def get_empty_cache_for_benchmark(self):
            return torch.zeros(8)

        def clear_cache(self, cache):
            cache.zero_()

        def get_device_interface(self):
            return types.SimpleNamespace(Event=Event, synchronize=lambda: None)

    from triton.runtime import driver

    monkeypatch.setattr(driver, "_active", Driver())
    for name, fake in {
        "Event": Event,
        "CUDAGraph": Graph,
        "graph": lambda graph: contextlib.nullcontext(),
        "Stream": lambda: None,
        "stream": lambda stream: contextlib.nullcontext(),
        "synchronize": lambda: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return StandIn("gpu", "cpu", "cpu")


def ask(cell, where, **more):
    from benchmarks.device.context import Context

    module, _, function = cell.run.partition(":")
    told = []
    context = Context(cell, where, 1, Path(), part=lambda name, **found: told.append((name, found["status"])), **more)
    found = importlib.import_module(f"benchmarks.device.{module}").__dict__[function](context, **cell.case)
    return found, told


@pytest.mark.parametrize("prepare", [False, True])
def test_what_only_a_device_runs_runs_on_a_stand_in(standin, prepare):
    cells = [
        cells_timed.rows("bfloat16", 0.85, 64, 8, compiled=True, rivals=True),
        cells_timed.attention("band", 0.5, 600, 16, sparsity=0.5, heads=2, dtype="float32", flex=False),
        cells_timed.decode(2, 200, "needles", kv_heads=2, group=2, size=16, dtype="float32"),
        cells_timed.option("alpha that learns", "randn", 64, heads=2, size=16, dtype="float32"),
        cells_timed.option("mask", "randn", 64, heads=2, size=16, dtype="float32"),
    ]
    for cell in cells:
        found, told = ask(cell, standin, prepare=prepare)
        assert found["status"] == "ok", found
        own = {name: one for name, one in found["contestants"].items() if name.startswith("diffmax")}
        assert own
        assert all(one["status"] == "ok" for one in own.values())
        assert len(told) == len(found["contestants"])
        if prepare:
            assert "median_ms" not in json.dumps(found)
            continue
        for one in own.values():
            passes = [passed for passed in one.values() if isinstance(passed, dict)]
            assert passes
            assert all(passed["median_ms"] > 0 and passed["peak_bytes"] == 7 and passed["samples"] >= 3 for passed in passes)
        if cell.id.startswith("decode"):
            assert all(one["step"]["graph"]["median_ms"] > 0 for one in own.values())
            assert all(one["step"]["graph_cold"]["median_ms"] > 0 for one in own.values())
    rows = ask(cells[0], standin)[0]["contestants"]
    assert rows["entmax_bisect"]["status"] == "ok"
    assert rows["adasplash"]["status"] == rows["softmax_compiled"]["status"] == "skipped"


@pytest.mark.parametrize("name", ["copy", "matmul tf32", "launch"])
def test_ceilings_are_measured_on_a_stand_in(standin, name, monkeypatch):
    from benchmarks.device import ceilings

    class Launched:
        def __getitem__(self, grid):
            return lambda *arguments, **names: None

    monkeypatch.setattr(ceilings, "nothing_kernel", Launched())
    cell = stages.every_cell("interpret")[name]
    found, _ = ask(cell, standin)
    assert all(value > 0 for value in found.values())
