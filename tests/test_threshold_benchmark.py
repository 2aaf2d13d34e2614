"""The benchmark of threshold attention: who is wrong gets no time, and the page shows the figures of its result."""

import json
import re

import pytest

from benchmarks import bench_threshold
from benchmarks.environment import ROOT

pytest.importorskip("numba", reason="needs Numba: pip install 'diffmax-core[numba]'")

CASE = {"member": "lazy", "operation": "both", "length": 60, "threads": 1}
ROW = {"contestant": "compiled", "member": "lazy", "operation": "forward", "length": 2048, "threads": 2, "correct": True}


@pytest.mark.parametrize("member", bench_threshold.members())
def test_everybody_is_right_and_timed(member):
    rows = bench_threshold.run_case({**CASE, "member": member}, rounds=1)
    assert {row["contestant"] for row in rows} == {"sdpa", "compiled", "portable"}
    assert [row["reason"] for row in rows] == [None] * 3
    assert all(row["ratio_sdpa"] > 0 for row in rows)


def test_who_is_wrong_is_not_timed(monkeypatch):
    right = bench_threshold.contestants

    def with_another(case):
        field = right(case)
        return {**field, "compiled": lambda query, key, value: field["compiled"](query, key, 1.01 * value)}

    monkeypatch.setattr(bench_threshold, "contestants", with_another)
    rows = {row["contestant"]: row for row in bench_threshold.run_case(CASE, rounds=1)}
    assert "errs by" in rows["compiled"]["reason"]
    assert "median_s" not in rows["compiled"]
    assert rows["portable"]["correct"]


def test_shares_of_zeros_are_those_of_visible_weights():
    assert bench_threshold.share_of_zeros("softmax") == 0
    assert bench_threshold.share_of_zeros("rectified") == pytest.approx(0.5, abs=0.02)
    assert bench_threshold.share_of_zeros("lazy") == pytest.approx(0.69, abs=0.02)  # docs/lazy.md, deviation 1


def test_targets_take_the_worst_of_two_threads():
    rows = [{**ROW, "ratio_sdpa": 1.2}, {**ROW, "length": 4096, "ratio_sdpa": 1.8}, {**ROW, "threads": 1, "ratio_sdpa": 9.0}]
    assert [(goal["value"], goal["met"]) for goal in bench_threshold.targets(rows)] == [(1.8, False)]


def test_the_page_shows_the_figures_of_its_result():
    page = (ROOT / "docs" / "lazy.md").read_text()
    (name,) = re.findall(r"benchmarks/results/[\w./-]*-threshold\.json", page)
    assert bench_threshold.document(json.loads((ROOT / name).read_text())["rows"]) in page
