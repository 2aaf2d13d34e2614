"""The benchmarks run, write what they document, and print no number for a kernel that is wrong. No times are asserted."""

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import (
    bench_attention,
    bench_attention_options,
    bench_attention_threads,
    bench_context_parallel,
    bench_decode,
    bench_e2e_attention,
    bench_first_call,
    bench_import,
    bench_loss,
    bench_revisions,
    contestants,
    count_lists,
    count_products,
    harness,
    memory,
    plots,
    report,
    runner,
    shapes,
)
from diffmax.kernels.cpu import rows as cpu_rows
from diffmax.operators.rows import api as rows_api
from diffmax.operators.rows import operator as rows_operator

ROOT = Path(__file__).resolve().parent.parent
ROW = {"contestant", "operation", "n", "rows", "alpha", "sigma", "dtype", "threads", "correct", "reason", "error_ulp", "zeros"}
TIMED = {"median_s", "p20_s", "p80_s", "samples", "ratio_softmax", "ratio_diffmax", "peak_bytes", "clock"}
CASE = shapes.Case("forward", n=64, rows=32, alpha=0.85, sigma=1.0, dtype="float32", threads=1)


def contestant(name):
    return next(c for c in contestants.contestants() if c.name == name)


def run_case(case, *names):
    threads = torch.get_num_threads()
    try:
        return {row["contestant"]: row for row in runner.run_case(case, [contestant(name) for name in names], rounds=1)}
    finally:
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """The quick mode of the forward benchmark, in a process of its own as a user starts it; without the compiler, for time."""
    path = tmp_path_factory.mktemp("quick") / "result.json"
    names = ["softmax", "diffmax", *shapes.RIVALS]
    command = [sys.executable, "-m", "benchmarks.bench_forward", "--quick", "--output", str(path), "--only", *names]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout, path


def test_the_quick_mode_writes_the_documented_fields(quick):
    _, path = quick
    result = json.loads(path.read_text())
    assert {"environment", "rows", "targets"} == set(result)
    assert {"device", "python", "packages", "commit", "dirty", "command", "kernels", "cores"} <= set(result["environment"])
    assert result["rows"]
    for row in result["rows"]:
        assert set(row) == ROW | TIMED
        assert row["correct"], row
        assert row["p20_s"] <= row["median_s"] <= row["p80_s"]
    readme = (ROOT / "benchmarks" / "README.md").read_text()
    assert all(field in readme for field in ROW | TIMED)


def test_a_result_names_no_machine_user_or_absolute_path(quick):
    _, path = quick
    text = path.read_text()
    assert str(path.parent) not in text
    assert str(ROOT) not in text
    assert str(Path.home()) not in text
    assert os.uname().nodename not in text


def test_the_run_ends_with_a_table_and_the_targets(quick):
    stdout, _ = quick
    assert "forward, float32, threads: 1" in stdout
    assert "none judged" in stdout.split("targets:")[1]


def test_targets_say_met_or_missed_with_the_value():
    cell = {"operation": "forward", "n": 1024, "rows": 512, "alpha": 0.85, "sigma": 1.0, "dtype": "float32", "threads": 1}
    cell |= {"correct": True}
    rows = [
        {**cell, "contestant": "diffmax", "median_s": 0.01, "ratio_softmax": 20.0, "peak_bytes": 7 << 20},
        {
            **cell,
            "contestant": "entmax_bisect",
            "correct": True,
            "median_s": 0.2,
            "ratio_softmax": 400.0,
            "peak_bytes": 9 << 20,
        },
    ]
    block = report.targets_block(report.targets(rows, {"diffmax": report.PURE_KERNEL}))
    assert ">= 12: met (20)" in block
    assert "in tensors like the input <= 8: met (3.5)" in block
    assert "<= 3: missed (20)" in block
    assert ">= 100: missed (20)" in block
    rows[1]["correct"] = False
    assert "speed-up" not in report.targets_block(report.targets(rows, {}))


def test_plots_are_drawn_from_the_json(quick, tmp_path):
    _, path = quick
    plots.main([str(path), "--output", str(tmp_path)])
    assert {p.name for p in tmp_path.iterdir()} == {f"result-forward-{name}.png" for name in ("time", "speedup", "memory")}
    assert all(1000 < p.stat().st_size < 150_000 for p in tmp_path.iterdir())


@pytest.mark.parametrize("operation", ["forward", "backward", "both"])
def test_a_wrong_kernel_turns_red_and_gets_no_number(monkeypatch, operation):
    function = "bisect" if operation == "forward" else "bisect_backward"
    right = getattr(cpu_rows, function)

    def wrong(*args):
        first, *rest = right(*args)
        return (first * (1 + 1e-4), *rest)

    monkeypatch.setattr(rows_operator, "kernel", lambda name, *_, **__: wrong if name == function else right_kernel(name))
    for module in (rows_api, rows_operator):
        monkeypatch.setattr(module, "weights_kernel", lambda *_: None)
    right_kernel = {"bisect": cpu_rows.bisect, "bisect_backward": cpu_rows.bisect_backward}.__getitem__
    rows = run_case(shapes.Case(operation, 64, 32, 0.85, 1.0, "float32", 1), "softmax", "diffmax")
    assert rows["softmax"]["correct"]
    assert not rows["diffmax"]["correct"]
    assert "ulp" in rows["diffmax"]["reason"] or "sums to 1" in rows["diffmax"]["reason"]
    assert "median_s" not in rows["diffmax"]
    table = report.table(list(rows.values()))
    assert "RED" in table
    assert rows["diffmax"]["reason"] in table


def test_a_contestant_that_raises_keeps_its_reason_without_paths(monkeypatch):
    def no_compiler(*_, **__):
        raise RuntimeError("no C++ compiler at /usr/local/bin/g++\nand a long trace")

    contestants._compile.cache_clear()
    monkeypatch.setattr(torch, "compile", no_compiler)
    rows = run_case(CASE, "softmax", "softmax_compiled")
    assert rows["softmax_compiled"]["reason"] == "RuntimeError: no C++ compiler at g++"
    assert rows["softmax"]["ratio_softmax"] == 1
    assert rows["softmax_compiled"]["ratio_softmax"] is None


@pytest.mark.parametrize("dtype", shapes.DTYPES)
@pytest.mark.parametrize("operation", ["forward", "backward", "both"])
def test_every_contestant_passes_its_check(operation, dtype):
    for alpha in (0.1, 0.5, 0.85):
        case = shapes.Case(operation, 300, 64, alpha, 3.0, dtype, 1)
        names = [c.name for c in contestants.contestants() if c.name != "softmax_compiled"]
        names = [name for name in names if shapes.takes_part(name, case, "full")]
        assert {row["reason"] for row in run_case(case, *names).values()} == {None}


@pytest.mark.parametrize("stored", sorted((ROOT / "benchmarks" / "results").rglob("*.json")), ids=lambda path: path.stem)
def test_the_published_results_are_of_the_form_that_is_written(stored, tmp_path):
    harness.write(tmp_path / "folder" / "again.json", json.loads(stored.read_text()))
    assert (tmp_path / "folder" / "again.json").read_text() == stored.read_text()


def test_without_the_base_of_the_ratios_the_times_are_shown():
    """The table of attention raised KeyError when torch's own attention had failed."""

    def prepare(name):
        return {"reason": "too far" if name == "base" else None}, lambda: None

    rows = harness.measure({name: {"contestant": name, "n": 8} for name in ("base", "other")}, prepare, 1, ("base",))
    assert [row["ratio_base"] for row in rows] == [None, None]
    shown = harness.table("title", rows, "base", lines=("n",))
    assert re.search(r"8 +RED +~?[\d.e-]+ ms$", shown, re.MULTILINE)
    assert "base RED: too far; n: 8" in shown


def test_a_contestant_whose_memory_cannot_be_measured_is_not_timed():
    def memory(call):
        raise RuntimeError("no memory")

    (row,) = harness.measure({"one": {}}, lambda name: ({"reason": None}, lambda: None), 1, (), memory)
    assert row == {"correct": False, "reason": "RuntimeError: no memory"}


def test_peak_memory_counts_what_is_alive_at_once():
    x = torch.zeros(1 << 16)
    assert memory.peak_bytes(lambda: x + 1) // x.nbytes == 1
    assert memory.peak_bytes(lambda: ((x + 1) + 1) + 1) // x.nbytes == 2


def test_every_grid_holds_the_cells_that_the_targets_speak_about():
    default = list(shapes.cases(("forward",), "default", (1, 2)))
    assert shapes.Case("forward", 1024, 512, 0.85, 1.0, "float32", 1) in default
    assert {case.n for case in default} == set(shapes.SIZES)
    assert {case.threads for case in default} == {1, 2}
    assert set(default) < set(shapes.cases(("forward",), "full", (1, 2)))


@pytest.mark.slow
def test_first_calls_are_measured_and_some_of_their_compilation_is_spared(tmp_path, capsys):
    path = tmp_path / "first_call.json"
    bench_first_call.main(["--quick", "--output", str(path)])
    rows = json.loads(path.read_text())["rows"]
    assert [(row["operator"], row["direction"]) for row in rows[::2]] == [("rows", "forward"), ("rows", "backward")]
    assert [row["contestant"] for row in rows] == ["diffmax", "numba alone"] * 2
    assert rows[0]["of_numba_alone"] < 1
    assert "first forward of rows" in capsys.readouterr().out


@pytest.mark.slow
def test_revisions_take_turns_and_one_that_computes_something_else_has_no_time(tmp_path, capsys, monkeypatch):
    path = tmp_path / "revisions.json"
    bench_revisions.main([".", "--quick", "--output", str(path)])
    result = json.loads(path.read_text())
    assert [(row["operator"], row["direction"]) for row in result["ratios"]] == list(
        itertools.product(("rows", "loss"), ("forward", "both"))
    )
    assert all(row["correct"] and row["median_s"] > 0 for row in result["rows"])
    assert "worse by more than 10%" in capsys.readouterr().out

    monkeypatch.setattr(
        bench_revisions, "WORKER", bench_revisions.WORKER.replace("manual_seed(0)", "manual_seed(time.time_ns() % 10**9)")
    )
    (case, *_) = bench_revisions.cells(quick=True)
    revisions = {name: bench_revisions.Revision(".") for name in ("before", "after")}
    before, after = bench_revisions.run_case(case, revisions, 1)
    for revision in revisions.values():
        revision.stop()
    assert before["median_s"] > 0
    assert after["reason"] == "another result than before"
    with pytest.raises(SystemExit, match="'no-such-thing' is not a revision"):
        bench_revisions.main(["no-such-thing", "--quick", "--output", str(path)])


@pytest.mark.slow
def test_import_and_call_overhead_are_measured(tmp_path, capsys):
    path = tmp_path / "import.json"
    bench_import.main(["--quick", "--output", str(path)])
    result = json.loads(path.read_text())
    assert result["import"]["heavy"] == []
    assert result["import"]["processor_s"] > 0
    assert {"bare_operator", "bare_schema", "softmax", "diffmax", "choice"} == set(result["calls"])
    assert [target["goal"] for target in result["targets"]] == [50, 2, 2]
    assert "targets:" in capsys.readouterr().out


def test_the_loss_benchmark_writes_what_it_documents_and_names_no_machine(tmp_path, capsys):
    path = tmp_path / "loss.json"
    bench_loss.main(["--quick", "--output", str(path)])
    result = json.loads(path.read_text())
    readme = (ROOT / "benchmarks" / "README.md").read_text()
    assert {row["contestant"] for row in result["rows"]} >= {"cross_entropy", "diffmax_loss", "entmax_bisect_loss"}
    for row in result["rows"]:
        assert row["correct"], row
        assert row["p20_s"] <= row["median_s"] <= row["p80_s"]
    assert all(field in readme for field in ("ratio_cross_entropy", "peak_tensors"))
    assert "diffmax_loss" in capsys.readouterr().out
    assert str(tmp_path) not in path.read_text()
    assert os.uname().nodename not in path.read_text()


@pytest.mark.parametrize("wrong", ["loss", "gradient"])
def test_a_wrong_loss_turns_red_and_gets_no_number(wrong):
    def loss(x, y):
        right = bench_loss.diffmax.diffmax_loss(x, y, 0.5)
        return right * 1.0001 if wrong == "gradient" else right.detach() * 1e-4 + right

    case = {"n": 64, "rows": 8, "alpha": 0.5, "sigma": 1.0, "dtype": "float32", "threads": 1}
    field = {"cross_entropy": torch.nn.functional.cross_entropy, "diffmax_loss": loss}
    rows = {row["contestant"]: row for row in bench_loss.run_case(case, field, rounds=1)}
    assert rows["cross_entropy"]["correct"]
    assert "ulp, allowed 16" in rows["diffmax_loss"]["reason"]
    assert "median_s" not in rows["diffmax_loss"]
    assert "RED" in bench_loss.table(list(rows.values()))


def test_attention_runs_and_who_is_wrong_gets_no_number():
    case = {"length": 130, "kind": "local", "alpha": 0.5, "causal": True, "operation": "both", "threads": 1}
    field = bench_attention.contestants(0.5, True) | {"wrong": lambda q, k, v: torch.softmax(q @ k.mT, -1) @ v}
    rows = {row["contestant"]: row for row in bench_attention.run_case(case, field, rounds=1)}
    assert [name for name, row in rows.items() if not row["correct"]] == ["wrong"]
    assert "the output errs by" in rows["wrong"]["reason"]
    assert all(rows[name]["median_s"] > 0 for name in ("sdpa", "unfused", "cpu", "numba"))
    assert "wrong RED" in bench_attention.table(list(rows.values()))


@pytest.mark.parametrize("busy", [False, True])
def test_attention_on_all_threads_takes_a_models_scores_and_busy_neighbours(busy):
    query, key, value = (torch.randn(1, heads, 200, 64) for heads in (4, 2, 2))
    held = {bench_attention_threads.CAPTURED: [query, key, value]}
    case = next(
        cell for cell in bench_attention_threads.cells(True, held) if cell["scores"] == bench_attention_threads.CAPTURED
    )
    case |= {"length": 200, "heads": 4, "operation": "both", "busy": busy}
    rows = bench_attention_threads.run_case(case, held, rounds=2)
    assert all(row["correct"] and row["median_s"] > 0 and 0 < row["zeros"] < 1 for row in rows)
    assert {"worst_ratio" in row for row in rows} == {busy}
    assert "causal LM" in bench_attention_threads.table(rows)


def test_attention_on_all_threads_gives_no_number_to_who_is_wrong(monkeypatch):
    case = bench_attention_threads.cells(True, {})[0] | {"length": 64}
    monkeypatch.setattr(
        bench_attention_threads.diffmax, "attention", wrong_for_numba(bench_attention_threads.diffmax.attention)
    )
    rows = {row["contestant"]: row for row in bench_attention_threads.run_case(case, {}, rounds=1)}
    assert "errs by" in rows["diffmax"]["reason"]
    assert "median_s" not in rows["diffmax"]
    assert rows["sdpa"]["median_s"] > 0


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="counts the bytes of Linux's loopback interface")
def test_attention_of_sharded_sequences_is_checked_against_the_whole_and_its_bytes_are_counted():
    rows = bench_context_parallel.on_ranks(2, quick=True)
    assert all(row["correct"] and row["median_s"] > 0 and row["peak_bytes"] > 0 for row in rows)
    case = {"operation": "forward", "causal": False}
    sent = {row["contestant"]: row["sent_bytes"] for row in rows if all(row[key] == value for key, value in case.items())}
    keys_and_values = 128 * 8 * 2 * 64 * 4  # of one rank's tokens
    assert keys_and_values < sent["all_gather"] < 1.2 * keys_and_values
    assert keys_and_values < sent["ulysses"] < 1.2 * keys_and_values  # half of them, of queries and of results
    assert "torch's ring" in bench_context_parallel.table(rows)


def wrong_for_numba(attention):
    def wrong(*tensors, backend=None, **options):
        result = attention(*tensors, backend=backend, **options)
        return result if backend == "reference" or isinstance(result, tuple) else result * 1.01

    return wrong


def test_options_of_attention_are_checked_and_compared_with_the_plain_call():
    options = bench_attention_options.OPTIONS | {"wrong": lambda n: {"scale": torch.rand(()).item()}}
    case = {"backend": "numba", "kind": "sharp", "operation": "both", "length": 64, "alpha": 0.5, "threads": 1}
    rows = {row["option"]: row for row in bench_attention_options.run_case(case, 1, options)}
    assert [name for name, row in rows.items() if not row["correct"]] == ["wrong"]
    assert all(rows[name]["ratio_plain"] > 0 for name in bench_attention_options.OPTIONS)
    assert "wrong RED: the output errs by" in bench_attention_options.table(list(rows.values()))


def test_decoding_runs_and_who_is_wrong_gets_no_number():
    case = {"length": 4096, "kind": "needles", "group": 2, "threads": 1}
    field = bench_decode.contestants("needles") | {"wrong": lambda q, k_cache, v_cache, bounds: q}
    rows = {row["contestant"]: row for row in bench_decode.run_case(case, field, rounds=1)}
    assert [name for name, row in rows.items() if not row["correct"]] == ["wrong"]
    assert rows["cpu, bounds"]["pages_read"] < rows["cpu"]["pages"] / 4
    assert all(rows[name]["median_s"] > 0 for name in ("sdpa", "cpu", "cpu, bounds"))
    assert "wrong RED" in bench_decode.table(list(rows.values()))


def test_a_decoder_learns_with_every_attention(tmp_path, capsys):
    path = tmp_path / "e2e.json"
    assert bench_e2e_attention.main(["--quick", "--length", "32", "--output", str(path)]) == 0
    result = json.loads(path.read_text())
    rows = result["rows"]
    assert (result["device"], result["length"]) == ("cpu", 32)
    assert [row["contestant"] for row in rows] == ["sdpa", "diffmax 0.5", "diffmax 0.9"]
    assert all(0 < row["loss"] < 8 and row["median_ms"] > 0 for row in rows)
    assert "x sdpa" in capsys.readouterr().out


def test_products_are_counted_as_the_kernels_visit_tiles():
    live, solver, inference, training = count_products.mean_counts("70 %", 0.5, "bfloat16", 2048, 2)
    assert 0 < live < 0.6
    assert 1 <= solver <= 4
    assert inference < training <= solver + 3 * live + 1e-9
    assert count_products.mean_counts("randn 1", 0.9, "bfloat16", 1024, 1)[0] == 1.0


def test_lists_hold_the_keys_with_a_weight():
    """Planted: for 64 of 128 queries keys 70 and 200, for one of them 71 too; for the others key 300."""
    torch.manual_seed(0)
    x = torch.randn(128, 320, dtype=torch.float64) - 100
    x[:64, 70] = x[5, 71] = x[:64, 200] = x[64:, 300] = 1.0
    kind = count_lists.kind_of_block(x, 0.5)
    assert (kind["tiles"], kind["for 128 queries"]) == (5, 3 / 5)
    assert kind["tiles with a weight"] == pytest.approx(1.5 / 5)
    assert kind["keys with a weight"] == (3 + 1) / 2 / 320
    assert kind["weights per query"] == pytest.approx((2 * 64 + 1 + 64) / 128)
    assert kind["zeros"] == pytest.approx(1 - (2 * 64 + 1 + 64) / (128 * 320))
    dense = count_lists.kind_of_block(torch.randn(128, 320, dtype=torch.float64) / 8, 0.5)
    for each in (kind, dense):
        assert each["in whole tiles, for 128 queries"] >= each["in whole tiles"] >= each["keys that may have one"]
        assert each["keys that may have one"] >= each["keys with a weight"]


def test_lists_cost_what_was_counted():
    costs = {"nothing": 10.0, "bits": 13.0, "keys": 14.0, "gather": 8.0}
    heads = torch.randn(1, 2, 256, 64), torch.randn(1, 1, 256, 64)
    rows = list(count_lists.of_layers({"one": heads}, costs, 2, lengths=(256,)))
    assert [(row["alpha"], row["blocks"]) for row in rows] == [(0.75, 4), (0.5, 4)]
    dear = list(count_lists.of_layers({"one": heads}, costs | {"keys": 1e6, "gather": 1e6}, 2, lengths=(256,)))
    for row, other in zip(rows, dear, strict=True):
        assert row["now"] == other["now"]
        assert (other["keys"] > row["keys"]) == (other["gather"] > row["gather"]) == (row["first further evaluation"] > 0)
    each = {what: 1.0 for note in count_lists.NOTES for what in (note, f"{note}, dead")}
    shown = count_lists.table({"instructions": each | costs, "layers": rows})
    assert "| 256 | 0.5 | 0.35 |" in shown


@pytest.mark.slow
def test_notes_cost_instructions_where_a_tile_is_live():
    found = count_lists.counted()
    assert found["nothing"] < found["bits"] < found["keys"] < found["scan"]
    for note in count_lists.NOTES:
        assert found[f"{note}, dead"] < 0.6 * found["nothing"] <= found[note]
    assert 4 < found["gather"] < 20
