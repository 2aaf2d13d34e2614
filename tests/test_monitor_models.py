"""Monitor: what it says of modules, fused attention and transformers models, and that it changes nothing."""

import copy
import pickle
import re

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import diffmax
from diffmax import DiffmaxBisectModule, HillMap, diffmax_bisect
from diffmax.monitor import Monitor
from diffmax.nn import DiffmaxAttention, Elastic, Sink
from tests.ranks import on_ranks


class Kept(list):
    def __call__(self, metrics, *, step):
        self.append((step, metrics))


class Scores(nn.Module):
    """Attention from its parts, with a rows module, and then a fused one from a function."""

    def __init__(self):
        super().__init__()
        self.weights = DiffmaxBisectModule(torch.tensor([[[0.5]], [[0.8]]]))
        self.project = nn.Linear(8, 8)

    def forward(self, x):
        q = self.project(x).unflatten(-1, (2, 4)).transpose(1, 2)
        hidden = (self.weights(3 * q @ q.mT) @ q).contiguous()
        hidden = diffmax.attention(3 * hidden, q, q, is_causal=True, alpha=0.6)
        return hidden.transpose(1, 2).flatten(2)


def model():
    return nn.Sequential(Scores(), DiffmaxAttention(8, 2, alpha=0.9, alpha_map=HillMap(c=0.5)), nn.Linear(8, 8))


def test_says_of_each_module_what_its_calls_did():
    made, kept, x = model(), Kept(), torch.randn(2, 7, 8)
    with Monitor(made, kept) as watch:
        made(x)
        watch.step()
    ((step, metrics),) = kept
    assert step == 0
    q = made[0].project(x).unflatten(-1, (2, 4)).transpose(1, 2)
    weights = made[0].weights(3 * q @ q.mT)
    assert metrics["0.weights/zeros_share"] == pytest.approx((weights == 0).float().mean().item())
    assert metrics["0.weights/support_mean"] == pytest.approx((weights > 0).float().sum(-1).mean().item())
    assert metrics["0.weights/support_max"] == (weights > 0).sum(-1).max()
    assert (metrics["0.weights/alpha/min"], metrics["0.weights/alpha/max"]) == (0.5, pytest.approx(0.8))
    scores = (1.5 * weights @ q @ q.mT).masked_fill(~torch.ones(7, 7).tril().bool(), -torch.inf)
    fused = diffmax_bisect(scores, 0.6)
    assert metrics["0/support_mean"] == pytest.approx((fused > 0).float().sum(-1).mean().item())
    assert metrics["0/zeros_share"] == pytest.approx(1 - (fused > 0).sum().item() / (4 * 28))  # of what causality leaves
    assert metrics["0/alpha/mean"] == pytest.approx(0.6)
    assert metrics["1/alpha/mean"] == pytest.approx(0.9)
    assert 0 <= metrics["1/tile_sparsity"] <= 1
    assert {name.partition("/")[0] for name in metrics} == {"0.weights", "0", "1"}


@pytest.mark.parametrize(
    "make",
    [
        model,
        lambda: nn.Sequential(DiffmaxAttention(8, 2, dropout=0.5, sink="learned"), DiffmaxAttention(8, 2, window_size=(2, 1))),
    ],
)
def test_results_gradients_and_random_numbers_stay_the_same_to_the_bit(make):
    made, x = make(), torch.randn(2, 7, 8)

    def run():
        torch.manual_seed(1)
        made.zero_grad()
        given = x.clone().requires_grad_()
        out = made(given)
        out.square().sum().backward()
        return [out.detach(), given.grad, torch.rand(3), *(p.grad.clone() for p in made.parameters())]

    plain = run()
    kept = Kept()
    watch = Monitor(made, kept)
    watched = run()
    watch.step()
    watch.remove()
    assert kept[0][1]
    for before, during, after in zip(plain, watched, run(), strict=True):
        assert torch.equal(before, during)
        assert torch.equal(before, after)


def test_one_look_at_the_device_per_log(monkeypatch):
    made, kept, looks = model(), Kept(), []
    with Monitor(made, kept, every=2) as watch:
        monkeypatch.setattr("diffmax.monitor.model.read", lambda metrics: looks.append(len(metrics)) or metrics)
        for _ in range(5):
            made(torch.randn(1, 4, 8))
            made(torch.randn(1, 4, 8))  # gradients may be accumulated
            watch.step()
    assert len(looks) == 3
    assert [step for step, _ in kept] == [0, 2, 4]


def test_nothing_is_measured_at_other_steps_and_after_it_is_removed(monkeypatch):
    made, x = model(), torch.randn(1, 4, 8)
    calls = []
    monkeypatch.setattr("diffmax.monitor.model.of_attention", lambda *_: calls.append("attention") or {})
    monkeypatch.setattr("diffmax.monitor.model.of_rows", lambda *_: calls.append("rows") or {})
    watch = Monitor(made, Kept(), every=10)
    watch.step(3)
    made(x)
    assert not calls
    watch.step(10)
    made(x)
    assert calls == ["rows", "attention", "attention"]
    watch.remove()
    watch.remove()
    made(x)
    assert len(calls) == 3
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in made.modules())


def test_calls_of_one_step_are_taken_together():
    made, kept = DiffmaxBisectModule(0.5), Kept()
    a, b = 3 * torch.randn(4, 9), 3 * torch.randn(2, 9)
    with Monitor(made, kept, name_prefix="train") as watch:
        made(a)
        made(b)
        watch.step()
        made(a)
        watch.step()
    both = diffmax_bisect(torch.cat([a, b]), 0.5)
    assert kept[0][1]["train/zeros_share"] == pytest.approx((both == 0).float().mean().item())
    assert kept[0][1]["train/support_mean"] == pytest.approx((both > 0).sum(-1).float().mean().item())
    assert kept[1][1]["train/zeros_share"] == pytest.approx((diffmax_bisect(a, 0.5) == 0).float().mean().item())


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_does_not_count_twice(use_reentrant):
    made, kept = DiffmaxAttention(8, 2, alpha=0.5), Kept()
    x = torch.randn(1, 5, 8, requires_grad=True)
    with Monitor(made, kept) as watch:
        made(x)
        watch.step()
        checkpoint(made, x, use_reentrant=use_reentrant).sum().backward()
        assert watch._sums[""]["calls"] == 1
        watch.step()
    assert kept[0][1] == kept[1][1]


def masks():
    padding = torch.ones(2, 1, 1, 6, dtype=torch.bool)
    padding[1, ..., 4:] = False
    bias = torch.randn(1, 2, 5, 6).masked_fill(torch.rand(1, 2, 5, 6) < 0.4, -torch.inf)
    return {
        "all": {},
        "causal": {"is_causal": True},
        "lower right": {"is_causal": True, "causal_alignment": "lower_right"},
        "window": {"window_size": (1, 2)},
        "padding": {"attn_mask": padding},
        "padding and window": {"attn_mask": padding, "window_size": (2, 0)},
        "bias": {"attn_mask": bias, "is_causal": True},
        "nothing": {"attn_mask": torch.zeros(5, 6, dtype=torch.bool)},
        "sink": {"sink": torch.zeros(2), "attn_mask": padding},
    }


@pytest.mark.parametrize("case", masks())
def test_zeros_are_counted_among_the_keys_that_a_query_sees(case):
    options = masks()[case]
    q, k = 3 * torch.randn(2, 2, 5, 4), torch.randn(2, 2, 6, 4)

    class Attend(nn.Module):
        def forward(self, query):
            return diffmax.attention(query, k, k, alpha=0.5, **options)

    made, kept = Attend(), Kept()
    with Monitor(made, kept) as watch:
        made(q)
        watch.step()
    row, key = torch.arange(5)[:, None] + (options.get("causal_alignment") == "lower_right"), torch.arange(6)
    left, right = options.get("window_size", (99, 99))
    seen = (key <= row + (0 if options.get("is_causal") else right)) & (key >= row - left)
    mask = options.get("attn_mask", torch.ones(1, dtype=torch.bool))
    seen = (seen & (mask if mask.dtype == torch.bool else mask != -torch.inf)).expand(2, 2, 5, 6)
    metrics = kept[0][1]
    live = seen.any(-1)
    assert metrics["rows_masked"] == (~live).sum()
    support = diffmax.attention(q, k, k, alpha=0.5, return_stats=True, **options)[1].support_size
    if not live.any():
        assert metrics["support_mean"] != metrics["support_mean"]
        return
    assert metrics["support_mean"] == pytest.approx(support[live].float().mean().item())
    assert metrics["zeros_share"] == pytest.approx(1 - support[live].sum().item() / seen.sum().item())


@pytest.mark.parametrize("is_causal", [False, True])
def test_packed_sequences_are_counted_each_on_its_own(is_causal):
    lengths, keys = [3, 0, 5], [4, 2, 5]
    q, k = 3 * torch.randn(sum(lengths), 2, 4), torch.randn(sum(keys), 2, 4)
    ends = [torch.tensor([0, *t]).cumsum(0, dtype=torch.int32) for t in (lengths, keys)]

    class Attend(nn.Module):
        def forward(self, query):
            return diffmax.attention_varlen(query, k, k, *ends, 5, 5, alpha=0.5, is_causal=is_causal)

    made, kept = Attend(), Kept()
    with Monitor(made, kept) as watch:
        made(q)
        watch.step()
    seen = sum(min(n, i + 1 + n - m) if is_causal else n for m, n in zip(lengths, keys, strict=True) for i in range(m))
    stats = diffmax.attention_varlen(q, k, k, *ends, 5, 5, alpha=0.5, is_causal=is_causal, return_stats=True)[1]
    assert kept[0][1]["zeros_share"] == pytest.approx(1 - stats.support_size.sum().item() / (2 * seen))


def test_nan_and_masked_rows_are_left_out():
    scores = torch.tensor([[3.0, 2.0, 0.0], [-torch.inf] * 3, [1.0, torch.nan, 0.0], [0.0, 0.0, -torch.inf]])
    made, kept = DiffmaxBisectModule(0.5), Kept()
    with Monitor(made, kept) as watch:
        made(scores)
        watch.step()
    metrics = kept[0][1]
    assert (metrics["rows_masked"], metrics["rows_nan"]) == (1, 1)
    assert (metrics["support_mean"], metrics["zeros_share"]) == (2, pytest.approx(0.2))


def test_wrappers_around_rows_and_other_models_do_not_mix():
    made, other, kept = Elastic(Sink(DiffmaxBisectModule(0.5), 2), 2), DiffmaxBisectModule(0.9), Kept()
    with Monitor(made, kept) as watch:
        made(torch.randn(1, 2, 3, 3))
        other(torch.randn(3, 3))
        diffmax_bisect(torch.randn(3, 3))
        watch.step()
    assert {name.rpartition("/")[0] for name in kept[0][1]} == {"normalize.normalize", "normalize.normalize/alpha"}
    assert kept[0][1]["normalize.normalize/alpha/max"] == pytest.approx(0.5)


def test_a_forward_that_raises_leaves_no_trace():
    class Raises(nn.Module):
        def forward(self, x):
            raise KeyError("x")

    made, kept = nn.ModuleList([Raises(), DiffmaxBisectModule(0.5)]), Kept()
    with Monitor(made, kept) as watch:
        with pytest.raises(KeyError):
            made[0](torch.zeros(3))
        assert not any(watch._running.values())
        made[1](torch.randn(3, 3))
        watch.step()
    assert set(kept[0][1]) >= {"1/zeros_share"}


def test_a_model_that_is_watched_can_be_copied_and_pickled():
    made, kept = model(), Kept()
    with Monitor(made, kept) as watch:
        for twin in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):  # an average of weights, say
            twin(torch.randn(1, 3, 8))
            assert not watch._sums
        made(torch.randn(1, 3, 8))
        assert watch._sums


def test_compiled_models_are_refused_and_compiled_code_is_said_not_to_be_watched():
    rows = nn.Sequential(DiffmaxBisectModule(0.5))
    with pytest.raises(ValueError, match=r"Monitor: model must not be compiled, got a compiled model\n.*_orig_mod"):
        Monitor(torch.compile(rows, backend="eager"), Kept())
    inner = nn.Sequential(DiffmaxBisectModule(0.5))
    inner[0].compile(backend="eager")
    with pytest.raises(ValueError, match="got a compiled 0"):
        Monitor(inner, Kept())
    x = torch.randn(3, 5)
    with Monitor(rows, Kept()) as watch:
        assert torch.equal(torch.compile(rows, backend="eager", fullgraph=True)(x), rows(x))
        watch.step()
        torch.compile(rows, backend="eager")(x)
        with pytest.warns(RuntimeWarning, match=r"Monitor: step 1 saw no call of diffmax in the model\ncompiled code"):
            watch.step()
        watch.step()  # once


def test_watches_a_model_of_transformers():
    transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'diffmax-core[transformers]'")
    from diffmax.integrations.transformers import register

    register("diffmax-watched", 0.5)
    config = transformers.LlamaConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, vocab_size=19
    )
    made, kept, ids = transformers.LlamaForCausalLM(config).eval(), Kept(), torch.randint(19, (2, 9))
    made.set_attn_implementation("diffmax-watched")
    plain = made(ids).logits
    with Monitor(made, kept) as watch:
        assert torch.equal(made(ids).logits, plain)
        watch.step()
        made(ids, attention_mask=torch.tensor([[1] * 9, [0] * 4 + [1] * 5]))
        watch.step()
        made.train()
        getattr(made, "activation_checkpointing_enable", made.gradient_checkpointing_enable)()  # two names, by version
        made(ids, labels=ids).loss.backward()
        assert watch._sums["model.layers.0.self_attn"]["calls"] == 1
        watch.step()
    layers = {f"model.layers.{i}.self_attn" for i in (0, 1)}
    for _, metrics in kept:
        assert {name.partition("/")[0] for name in metrics} == layers
    assert kept[0][1]["model.layers.1.self_attn/support_mean"] <= 5  # on average a query sees five
    assert kept[1][1]["model.layers.1.self_attn/rows_masked"] == 2 * 4  # two heads, four places of padding


@on_ranks(1)
def test_in_a_run_on_several_processes_one_rank_may_watch():
    """DistributedDataParallel of one process: names are those of the model that was watched."""
    made, kept = model(), Kept()
    wrapped = nn.parallel.DistributedDataParallel(made)
    with Monitor(made, kept) as watch:
        wrapped(torch.randn(2, 4, 8)).sum().backward()
        watch.step()
    assert {name.partition("/")[0] for name in kept[0][1]} == {"0.weights", "0", "1"}


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: Monitor("model"), TypeError, "model must be a torch.nn.Module, got str"),
        (lambda: Monitor(model(), Kept(), every=0), ValueError, "every must be at least 1, got 0"),
        (lambda: Monitor(model(), Kept(), every=1.0), TypeError, "every must be an int, got 1.0 of type float"),
    ],
)
def test_bad_input(call, error, words):
    with pytest.raises(error, match=re.escape(words)) as raised:
        call()
    assert str(raised.value).startswith("Monitor: ")
    assert not diffmax.operators.common.watch.watchers
