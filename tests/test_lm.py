"""examples/lm.py: its parts, and a run on a tiny random model."""

import copy
import json
import math
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers: pip install 'diffmax-core[examples]'")
pytest.importorskip("matplotlib", reason="needs matplotlib: pip install 'diffmax-core[examples]'")
pytest.importorskip("tqdm", reason="needs tqdm: pip install 'diffmax-core[examples]'")
import transformers

import diffmax
from diffmax.integrations.transformers import register
from examples import lm

ROOT = Path(__file__).parents[1]


def lm_points():
    return json.loads((ROOT / "examples" / "results" / "lm.json").read_text())["points"]


def test_the_page_about_choosing_quotes_what_was_measured():
    points, page = lm_points(), (ROOT / "docs" / "choosing.md").read_text(encoding="utf-8")
    settings = [key.removeprefix("1024/") for key in points if key.startswith("1024/") and key != "1024/softmax"]
    assert len(settings) >= 15
    for setting in settings:
        cells = []
        for length in (1024, 2048):
            point, base = points[f"{length}/{setting}"], points[f"{length}/softmax"]["nats"]
            tiles, support = f"{100 * point['empty_tiles']:.1f}", f"{point['support']:.0f}"
            cells.append(f"{point['nats'] - base:.3f} | {100 * point['zeros']:.1f} | {tiles} | {support}")
        assert f" | {' | '.join(cells)} |" in page


def test_the_page_about_choosing_quotes_what_was_measured_at_8192_tokens():
    points = json.loads((ROOT / "examples" / "results" / "lm_8k.json").read_text())["points"]
    page = (ROOT / "docs" / "choosing.md").read_text(encoding="utf-8")
    for length in ("2048", "8192"):
        base, point = points[f"{length}/softmax"]["nats"], points[f"{length}/0.75/matched"]
        cost, shares = point["nats"] - base, [f"{100 * point[name]:.1f}" for name in ("zeros", "empty_tiles")]
        cells = (length, f"{base:.3f}", f"{point['nats']:.3f} (+{cost:.3f})", *shares, f"{point['support']:.0f}")
        assert f"| {' | '.join(cells)} |" in page


@pytest.mark.parametrize("asked", ["0.902"])
def test_the_page_about_choosing_quotes_what_tuning_gave(asked):
    points = json.loads((ROOT / "examples" / "results" / "lm_tuned.json").read_text())["points"]
    page = (ROOT / "docs" / "choosing.md").read_text(encoding="utf-8")
    for place in ("1024", "2048"):
        before, chosen, tuned = (points[f"{place}/{name}"] for name in ("softmax", f"calibrated {asked}", f"tuned {asked}"))
        costs = ["{:+.3f} ± {:.3f}".format(*lm.cost_of(point, before)) for point in (chosen, tuned)]
        words = [f"{100 * point['words_right']:.1f}" for point in (before, chosen, tuned)]
        shares = [f"{100 * tuned[name]:.1f}" for name in ("zeros", "empty_tiles")]
        steps = str(points[f"tuning/{asked}"]["steps"])
        row = " | ".join([asked, steps, place, *costs, *words, *shares, f"{tuned['support']:.0f}"])
        assert f"| {row} |" in page
    assert points[f"1024/tuned {asked}"]["zeros"] >= 0.9
    assert lm.cost_of(points[f"1024/tuned {asked}"], points["1024/softmax"])[0] <= 0.05  # the goal of calibration alone


def test_the_page_about_choosing_quotes_what_distilling_gave():
    points = json.loads((ROOT / "examples" / "results" / "lm_adapted.json").read_text())["points"]
    page = (ROOT / "docs" / "choosing.md").read_text(encoding="utf-8")
    for asked in ("0.95", "0.98"):
        for place in ("1024", "2048", "6144", lm.OTHER):
            names = ("softmax", f"calibrated {asked}", f"distilled {asked}")
            before, calibrated, distilled = (points[f"{place}/{name}"] for name in names)
            costs = [f"{point['nats'] - before['nats']:+.3f}" for point in (calibrated, distilled)]
            words = [f"{100 * point['words_right']:.1f}" for point in (before, calibrated, distilled)]
            shares = [f"{100 * distilled[name]:.1f}" for name in ("zeros", "empty_tiles")]
            row = " | ".join([asked, place, *costs, *words, *shares, f"{distilled['support']:.0f}"])
            assert f"| {row} |" in page
        assert f"{distilled['steps']} steps" in page


def test_the_page_about_choosing_quotes_what_training_with_labels_gave():
    points = json.loads((ROOT / "examples" / "results" / "lm_control.json").read_text())["points"]
    page = (ROOT / "docs" / "choosing.md").read_text(encoding="utf-8")
    for place in ("1024", "2048", lm.OTHER):
        before, control = (points[f"{place}/{name}"] for name in ("softmax", "labels, softmax"))
        gained = "{:.3f} ± {:.3f}".format(*(abs(number) for number in lm.cost_of(control, before)))
        assert gained in page
        assert all(f"{100 * point['words_right']:.1f}" in page for point in (before, control))
        for asked in ("0.8", "0.9", "0.95", "0.98"):
            names = (f"calibrated {asked}", f"distilled {asked}", f"labels, {asked}")
            calibrated, distilled, labels = (points[f"{place}/{name}"] for name in names)
            pairs = ((calibrated, before), (distilled, before), (labels, control))
            costs = ["{:+.3f} ± {:.3f}".format(*lm.cost_of(*pair)) for pair in pairs]
            shares = [f"{100 * share:.1f}" for share in (distilled["words_right"], labels["words_right"], labels["zeros"])]
            assert f"| {' | '.join([asked, place, *costs, *shares])} |" in page
            assert control["minutes"] < 1.3 * min(distilled["minutes"], labels["minutes"])


def test_the_jobs_are_those_of_the_scales_that_are_asked_for():
    arguments = lm.parser().parse_args(["--length", "64", "--alphas", "0.75", "0.5", "--scales", "matched", "--zeros", "0.8"])
    keys = [key for key, _, _ in lm.jobs(arguments)]
    assert keys == ["64/softmax", "64/0.75/matched", "64/0.5/matched", "calibration/0.8", "64/calibrated 0.8"]


def test_the_fitted_scale_is_the_vertex_where_there_is_one_and_not_beyond_what_was_tried():
    place = math.log(0.45)
    found = lm.fitted_scale(0.75, lambda scale: 3 + (math.log(scale) - place) ** 2)
    assert found == pytest.approx(0.45, rel=1e-9)
    middle = diffmax.matched_scale(0.75)
    assert lm.fitted_scale(0.75, lambda scale: scale) == pytest.approx(middle * lm.FACTORS[0])  # the less, the better
    assert lm.fitted_scale(0.75, lambda scale: -((math.log(scale) - place) ** 2)) == pytest.approx(middle * lm.FACTORS[2])


def tiny_model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_key_value_heads=2, initializer_range=0.5)).eval()


@torch.no_grad()
def test_the_measured_attention_is_the_registered_one_and_its_zeros_those_of_the_weights():
    model, ids, swap = tiny_model(), torch.randint(3, 50, (1, 96)), lm.Swap()
    register("diffmax-lm-test", 0.75, scale="match")
    model.set_attn_implementation("diffmax-lm-test")
    wanted = lm.nats(model, ids, 96)[0].item()
    weights = torch.stack(model(ids, output_attentions=True).attentions)[:, 0]  # (layers, heads, L, L)
    per_head = diffmax.matched_scale(torch.full((2, 4), 0.75))
    for setting in (lm.Setting(0.75, 0.5), lm.Setting(torch.full((2, 4), 0.75), per_head)):
        model.set_attn_implementation(lm.NAME)
        swap.setting = setting
        assert lm.nats(model, ids, 96)[0].item() == pytest.approx(wanted, rel=1e-5)
        found = swap.statistics()
        zeros = 1 - (weights > 0).double().sum((2, 3)) / (96 * 97 / 2)
        torch.testing.assert_close(torch.tensor(found["zeros_by_head"]).double(), zeros, rtol=0, atol=2e-3)
        assert found["zeros"] == pytest.approx(zeros.mean().item(), abs=1e-3)
        assert found["support"] == pytest.approx((weights > 0).sum(3).double().median().item(), abs=1)
        tiles = torch.nn.functional.pad(weights, (0, 32, 0, 32)).unflatten(3, (2, 64)).unflatten(2, (2, 64)).amax((3, 5))
        empty = 1 - (tiles > 0).double().sum((2, 3)) / 3
        torch.testing.assert_close(torch.tensor(found["empty_tiles_by_head"]).double(), empty, rtol=0, atol=1e-3)


class Tokenizer:
    """One of 50 words for each word of a text."""

    def __call__(self, text, return_tensors):
        return {"input_ids": torch.tensor([[3 + len(word) % 47 for word in text.split()]])}

    def convert_ids_to_tokens(self, ids):
        return [f"\u0120{chr(97 + i // 26)}{chr(97 + i % 26)}" for i in ids]


@pytest.mark.slow
def test_a_run_goes_on_where_it_was_stopped_and_writes_what_it_draws(monkeypatch, tmp_path):
    model = tiny_model()
    monkeypatch.setattr(lm, "load", lambda: (model, Tokenizer()))
    monkeypatch.setattr(lm, "FITTING", 1024)
    monkeypatch.setattr(lm, "DISTILLED", 64)
    monkeypatch.setattr(lm, "other_text", lambda: "a text of a few words of its own " * 16)
    sizes = ["--length", "64", "128", "--tokens", "128"]
    trains = ["--zeros", "0.5", "--steps", "3", "--minutes", "0.02", "--labels"]
    options = [*sizes, "--alphas", "0.75", *trains, "--output", str(tmp_path / "lm")]
    monkeypatch.setattr(sys, "argv", ["lm", *options])
    lm.main()
    first = json.loads((tmp_path / "lm.json").read_text())
    expected = {key for key, _, _ in lm.jobs(lm.parser().parse_args(options))}
    trained = ("distilled 0.5", "labels, 0.5", "labels, softmax")
    assert set(first["points"]) == expected | {f"{place}/{name}" for place in (128, lm.OTHER) for name in trained}
    assert "zeros" not in first["points"]["128/labels, softmax"]
    assert first["points"]["128/labels, 0.5"]["zeros"] > 0.2
    assert first["points"]["64/distilled 0.5"]["steps"] >= 1
    assert first["points"]["64/softmax"]["words"] == 2 * 63
    assert 0.4 < first["points"]["64/calibrated 0.5"]["zeros"] < 0.65
    assert (tmp_path / "lm.svg").stat().st_size > 5_000
    first["points"]["64/0.75/1"]["nats"] = 123.0  # is not measured again
    first["points"]["64/labels, softmax"]["nats"] = 124.0
    del first["points"]["128/0.75/matched"], first["points"]["128/distilled 0.5"]
    (tmp_path / "lm.json").write_text(json.dumps(first))
    lm.main()
    second = json.loads((tmp_path / "lm.json").read_text())["points"]
    assert second["64/0.75/1"]["nats"] == 123.0
    assert second["64/labels, softmax"]["nats"] == 124.0
    assert second["128/distilled 0.5"]["steps"] >= 1
    assert second["128/0.75/matched"]["zeros"] > 0
    for refused in ([*options[:4], "64", *options[5:]], [*options, "--minutes", "3"], ["--labels"]):
        monkeypatch.setattr(sys, "argv", ["lm", *refused])
        with pytest.raises(SystemExit):
            lm.main()


def test_no_paragraph_that_is_measured_is_fitted_or_trained_on():
    measured, fitted = ("\n\n".join(lm.topics[name] for name in names) for names in (lm.MEASURED, lm.FITTED))
    paragraphs = [text for text in measured.split("\n\n") if len(text) > 100]
    assert len(paragraphs) > 50
    trained = "\n\n".join(lm.training_text())
    assert len(trained) > 1_000_000
    assert not [text for text in paragraphs if text in fitted or text in trained]


def test_passages_hold_the_text_once():
    texts = ["one " * 1500, "three " * 1500]
    found = torch.cat([batch["input_ids"][0] for batch in lm.passages(texts, Tokenizer())])
    assert len(found) == 2 * lm.DISTILLED
    assert sorted(found.tolist()) == [6] * 1500 + [8] * (2 * lm.DISTILLED - 1500)


def test_a_word_is_right_if_all_of_its_tokens_are():
    class Pieces:
        def convert_ids_to_tokens(self, ids):
            return [("\u0120the", "\u0120sp", "arse", ",", "\u01201", "\u0120map", "s", "(")[i] for i in ids]

    ids = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 5]])  # two passages, whose first words have nothing before them
    hits = torch.tensor([[1, 0, 1, 1, 1], [1, 1, 1, 1, 0]]).flatten().bool()
    assert lm.words(hits, ids, 6, Pieces()) == [False, True, True, True, False]  # sparse, map; the, sparse, map
    assert lm.words(~hits, ids, 6, Pieces()) == [False, False, False, False, True]


def test_a_text_that_is_too_short_is_said():
    with pytest.raises(ValueError, match="the text has 3 tokens, fewer than 4"):
        lm.text_of(lm.MEASURED, lambda *_, **__: {"input_ids": torch.ones(1, 3)}, 4)


@pytest.mark.slow
def test_distilling_moves_the_predictions_to_those_of_the_model():
    model = tiny_model()
    batches = [{"input_ids": part, "use_cache": False} for part in torch.randint(3, 50, (2, 512)).split(1)]
    ids = torch.cat([batch["input_ids"] for batch in batches])
    heads = {f"model.layers.{i}.self_attn": {"alpha": [0.3] * 4, "scale": [1.0] * 4} for i in range(2)}
    before = copy.deepcopy(model.state_dict())
    student, spent = lm.distilled(model, heads, batches, 0.1)
    assert spent["steps"] > 10
    assert spent["divergence"][-1] < 0.9 * spent["divergence"][0]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    bare = lm.replace(copy.deepcopy(model), heads)
    with torch.no_grad():
        wanted, moved, unmoved = (m(ids, use_cache=False) for m in (model, student, bare))
    assert lm.divergence(moved, wanted, {}) < 0.95 * lm.divergence(unmoved, wanted, {})
    assert lm.divergence(wanted, wanted, {}).abs() < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("zeros", [False, True])
def test_training_with_labels_learns_a_text_and_leaves_the_model(zeros):
    model = tiny_model()
    batches = [{"input_ids": torch.randint(3, 9, (1, 128)), "use_cache": False}]
    heads = {f"model.layers.{i}.self_attn": {"alpha": [0.3] * 4, "scale": [1.0] * 4} for i in range(2)} if zeros else None
    before = copy.deepcopy(model.state_dict())
    student, spent = lm.with_labels(model, heads, batches, 0.1)
    assert spent["loss"][-1] < 0.8 * spent["loss"][0]
    assert (getattr(student.config, "diffmax", None) is not None) == zeros
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
