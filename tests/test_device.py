"""`python -m benchmarks.device` rehearsed: on the interpreter, with faults on purpose, killed in the middle, and resumed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.device import lines, stages
from benchmarks.device.cells import Cell

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


def test_a_killed_run_leaves_valid_lines_and_no_process(rehearsal):
    out, before, left, _ = rehearsal
    assert left == []
    assert {line["stage"] for line in before} == {"run", "ceilings", "smoke"}
    for path in out.glob("*.jsonl"):
        assert all(isinstance(json.loads(text), dict) for text in path.read_text().splitlines() if text.endswith("}"))


def test_the_next_run_goes_on_where_it_was_killed(rehearsal):
    out, before, _, second = rehearsal
    through = {line["cell"] for line in before if line["status"] == "ok"}
    assert through
    after = list(lines.read([out]))
    for cell in through:
        assert len([line for line in of(after, cell) if line["status"] == "ok"]) == 1, cell
    assert "smoke" in second.stdout


def test_every_cell_has_its_line_whatever_happened_to_others(rehearsal):
    out, *_ = rehearsal
    found = {line["cell"] for line in lines.read([out])}
    assert set(stages.every_cell("interpret")) <= found
    assert any(cell.startswith("kits TestRows test_empty_and_single") for cell in found)


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


def test_a_wrong_result_has_its_figures_and_no_time(rehearsal):
    out, *_ = rehearsal
    (first, again) = of(list(lines.read([out])), ATTENTION)
    assert first["status"] == again["status"] == "wrong"
    assert first["seed"] != again["seed"]
    assert first["error"] > first["allowed"] > 0
    assert "median_ms" not in json.dumps(first["contestants"]["diffmax"])
    assert first["contestants"]["sdpa"]["forward"]["median_ms"] > 0


def test_who_kills_the_process_is_left_out_and_the_others_are_measured(rehearsal):
    out, *_ = rehearsal
    found = [line for line in lines.read([out]) if line["cell"] == ROWS]
    assert [line["status"] for line in found if line.get("contestant") == "softmax"] == ["error"]
    (line,) = of(found, ROWS)
    assert line["status"] == "ok"
    assert line["contestants"]["diffmax"]["forward"]["median_ms"] > 0
    assert "softmax" not in line["contestants"]
    assert line["contestants"]["entmax_bisect"]["status"] == "skipped"


def test_a_run_leaves_few_files_that_name_no_machine(rehearsal):
    out, *_ = rehearsal
    files = list(out.iterdir())
    assert len(files) <= 8
    assert all(path.is_file() for path in files)
    text = "".join(path.read_text() for path in out.glob("*.jsonl"))
    assert str(out.parent) not in text
    assert str(ROOT) not in text
    assert os.uname().nodename not in text


def test_a_stage_that_hangs_does_not_starve_the_next(tmp_path):
    out = tmp_path / "out"
    run = command(out, "--seconds", "30", "--only", "ceilings", "smoke", "--inject", "hang:copy")
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
    import importlib
    import inspect

    cells = stages.every_cell(kind)
    assert all(isinstance(cell, Cell) for cell in cells.values())
    for cell in cells.values():
        if cell.run and kind != "interpret":  # Triton interprets from its import on
            module, _, function = cell.run.partition(":")
            signature = inspect.signature(getattr(importlib.import_module(f"benchmarks.device.{module}"), function))
            signature.bind(None, **cell.case)
