"""The benchmark of differential attention: who is wrong gets no time, and a small run goes through."""

import json
import re

import pytest

from benchmarks import bench_differential
from benchmarks.environment import ROOT

CASE = {"weights": "diffmax", "size": 16, "operation": "both", "length": 33, "threads": 1}


@pytest.mark.parametrize("weights", ["diffmax", "softmax"])
def test_everybody_is_right_and_timed(weights):
    rows = bench_differential.run_case({**CASE, "weights": weights}, rounds=1)
    assert {row["contestant"] for row in rows} == {"fused", "two calls", "one map"}
    assert all(row["correct"] and row["ratio_one map"] > 0 for row in rows)


def test_who_is_wrong_is_not_timed(monkeypatch):
    right = bench_differential.contestants

    def with_another(case):
        field = right(case)
        return {**field, "fused": lambda query, key, value: field["fused"](query, key, 1.01 * value)}

    monkeypatch.setattr(bench_differential, "contestants", with_another)
    rows = {row["contestant"]: row for row in bench_differential.run_case(CASE, rounds=1)}
    assert "errs by" in rows["fused"]["reason"]
    assert "median_s" not in rows["fused"]
    assert rows["two calls"]["correct"]
    assert "fused RED" in bench_differential.table(list(rows.values()))


@pytest.mark.slow
def test_a_quick_run(tmp_path, capsys):
    result = tmp_path / "result.json"
    bench_differential.main(["--quick", "--output", str(result)])
    rows = json.loads(result.read_text())["rows"]
    assert len(rows) == 24
    assert all(row["correct"] for row in rows)
    assert "none judged" in capsys.readouterr().out


def test_targets_take_the_worst():
    row = {"contestant": "fused", "weights": "diffmax", "correct": True, "operation": "both", "size": 32, "length": 1024}
    rows = [{**row, "ratio_two calls": ratio, "ratio_one map": 2 * ratio} for ratio in (0.9, 1.2)]
    found = bench_differential.targets([*rows, {**rows[0], "length": 256, "ratio_two calls": 9.0, "ratio_one map": 9.0}])
    assert [(goal["value"], goal["met"]) for goal in found] == [(1.2, False), (2.4, False)]


def test_the_page_shows_the_figures_of_its_result():
    page = (ROOT / "docs" / "differential.md").read_text(encoding="utf-8")
    (name,) = re.findall(r"benchmarks/results/[\w./-]*-differential\.json", page)
    rows = json.loads((ROOT / name).read_text())["rows"]
    assert bench_differential.document(rows) in page
    for goal in bench_differential.targets(rows):
        assert goal["met"]


def test_the_page_shows_twice_the_instructions_of_a_map():
    page = (ROOT / "docs" / "differential.md").read_text(encoding="utf-8")
    counted = json.loads((ROOT / "benchmarks" / "instructions.json").read_text())["lines"]
    key = {"triton": "3.6", "target": "sm90", "dtype": "bfloat16", "size": 64, "alpha": "0.5"}
    of_map = {line["part"]: line["instructions"] for line in counted if key.items() <= line.items()}
    shown = re.findall(r"^\| ([\w, ]+) \| ([\d.]+) \| ([\d.]+) \|$", page, re.MULTILINE)
    assert len(shown) == 6
    for part, one, pair in shown:
        assert (one, pair) == (f"{of_map[part]:.1f}", f"{2 * of_map[part]:.1f}")
