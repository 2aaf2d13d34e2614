"""benchmarks/bench_generate.py on a tiny random model: who takes part, what they hold, and who fails its check."""

import pytest
import torch

from benchmarks import bench_generate

pytest.importorskip("transformers", reason="needs transformers: pip install 'diffmax-core[transformers]'")
from transformers import LlamaConfig, LlamaForCausalLM

from diffmax.integrations.transformers import rounded_cache

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 61,
    "initializer_range": 0.3,
}


@pytest.fixture
def texts(monkeypatch):
    def load():
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**SIZES)).eval(), lambda text, return_tensors: {
            "input_ids": torch.tensor([[3 + ord(letter) % 58 for letter in text]])
        }

    monkeypatch.setattr(bench_generate, "load", load)
    monkeypatch.setattr(rounded_cache, "LEAST_TOKENS", 8)
    found = bench_generate.Texts(0.5)
    found.read(40, 2)
    return found


def test_all_contestants_hold_the_same_keys_and_have_times(texts):
    for name in bench_generate.CONTESTANTS:
        for layer, (keys, values) in zip(texts.cache(name).layers, texts.held, strict=True):
            tokens = 1 if name == "no keys" else 40
            assert torch.equal(layer.keys[:, :, :tokens], keys[:, :, :tokens])
            assert torch.equal(layer.values[:, :, :tokens], values[:, :, :tokens])
    rows = bench_generate.timed(texts, rounds=2)
    assert [row["contestant"] for row in rows] == list(bench_generate.CONTESTANTS)
    assert all(row["correct"] and row["median_s"] > 0 for row in rows)
    shown = bench_generate.show({"alpha": 0.5, "threads": 1, "rows": rows})
    assert "40" in shown
    assert "4 bits" in shown


def test_wrong_logits_get_no_time(texts, monkeypatch):
    plain = rounded_cache.attention_kvcache

    def wrong(*given):
        found = plain(*given)
        return found._replace(out=1.01 * found.out)

    monkeypatch.setattr(rounded_cache, "attention_kvcache", wrong)
    rows = {row["contestant"]: row for row in bench_generate.timed(texts, rounds=1)}
    assert "the logits err by" in rows["4 bits"]["reason"]
    assert "median_s" not in rows["4 bits"]
    assert rows["dynamic"]["correct"]
