"""The benchmark of power attention runs, gives no number to who is wrong, and draws what it measured. No times are asserted."""

import json

import pytest

from benchmarks import bench_power

CASE = {"size": 16, "degree": 2, "length": 400, "threads": 1}


@pytest.mark.parametrize("operation", ["decode", *(pytest.param(name, marks=pytest.mark.slow) for name in ("forward", "both"))])
def test_contestants_are_right_and_who_is_wrong_gets_no_number(monkeypatch, operation):
    kind = "decoders" if operation == "decode" else "attentions"
    own = getattr(bench_power, kind)

    def with_another(case):
        field = own(case)
        right = field["diffmax"]
        if operation == "decode":
            return {**field, "diffmax": lambda tokens: [out * 1.01 for out in right(tokens)]}
        return {**field, "diffmax": lambda *tensors: right(*tensors) * 1.01}

    def timed():
        rows = bench_power.run_case({**CASE, "operation": operation}, rounds=1)
        return {row["contestant"]: row for row in rows}

    rows = timed()
    for name in ("sdpa", "diffmax"):
        assert rows[name]["correct"], rows[name]
        assert rows[name]["token_s"] > 0
    assert rows["retention"]["correct"] or "No module named 'retention'" in rows["retention"]["reason"]
    monkeypatch.setattr(bench_power, kind, with_another)
    rows = timed()
    assert "the output errs by" in rows["diffmax"]["reason"]
    assert "token_s" not in rows["diffmax"]
    assert "diffmax RED" in bench_power.table(list(rows.values()))


@pytest.mark.slow
def test_a_quick_run_writes_a_result_and_a_plot_of_it(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench_power, "SHAPES", ((16, 2), (4, 4)))
    result, plot = tmp_path / "result.json", tmp_path / "plot.svg"
    bench_power.main(["--quick", "--output", str(result), "--plot", str(plot)])
    assert "faster than sdpa from" in capsys.readouterr().out
    found = json.loads(result.read_text())
    assert {"environment", "retention", "crossovers", "targets", "rows"} == set(found)
    assert {row["operation"] for row in found["rows"]} == {"forward", "both", "decode"}
    drawn = plot.read_bytes()
    assert b"</svg>" in drawn
    bench_power.main(["--draw", str(result), "--plot", str(plot)])
    assert plot.read_bytes() == drawn


def test_goals_and_crossovers_are_read_off_the_rows():
    cell = {"operation": "forward", "size": 32, "degree": 2, "contestant": "diffmax", "correct": True}
    ratios = {1024: 0.9, 4096: 1.5, 8192: 0.8, 16384: 0.5}
    rows = [{**cell, "length": n, "ratio_sdpa": r, "ratio_retention": r / 4} for n, r in ratios.items()]
    assert bench_power.crossovers(rows) == [{"operation": "forward", "size": 32, "degree": 2, "faster_from": 8192}]
    assert [(goal["value"], goal["met"]) for goal in bench_power.targets(rows)] == [(5.0, True), (0.5, True)]
    rows[-1]["ratio_sdpa"] = 1.2
    assert bench_power.crossovers(rows)[0]["faster_from"] is None
    assert [goal["met"] for goal in bench_power.targets(rows)] == [True, False]
