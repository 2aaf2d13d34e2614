"""diffmax.suggest_alpha, and the two additions to `calibrate` that it is made of, on tiny random models."""

import copy

import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers: pip install 'diffmax-core[transformers]'")
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from diffmax import matched_scale, suggest_alpha
from diffmax.integrations.transformers import calibrate, register, replace
from diffmax.integrations.transformers.adapting import likelihood
from diffmax.integrations.transformers.adapting.calibration import measure
from diffmax.integrations.transformers.adapting.suggestion import ALPHAS, WEIGHTS
from diffmax.integrations.transformers.adapting.tuning import Plane

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50}
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.3}


def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, **TOKENS, num_key_value_heads=2)).eval()


def batches(length=48):
    return [{"input_ids": torch.randint(3, 50, (4, length))}]


@torch.no_grad()
def zeros_of(model, data):
    weights = torch.stack(model(**data[0], output_attentions=True).attentions)
    seen = torch.ones_like(weights).bool().tril()
    return ((weights == 0) & seen).sum().item() / seen.sum().item()


@torch.no_grad()
def divergence(model, teacher, data):
    ours, theirs = (m(**data[0]).logits.log_softmax(-1) for m in (model, teacher))
    return (theirs.exp() * (theirs - ours)).sum(-1).mean().item()


def test_the_share_of_zeros_is_met_and_costs_less_than_a_bare_swap_and_one_pair_for_all():
    model, data = llama(), batches()
    before = copy.deepcopy(model.state_dict())
    heads, one = (suggest_alpha(model, data, 0.6, per_head=per_head) for per_head in (True, False))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert model.config._attn_implementation == llama().config._attn_implementation
    per_head, uniform = (replace(copy.deepcopy(model), h) for h in (heads, one))
    found = zeros_of(per_head, data)
    assert 0.55 < found < 0.7
    assert zeros_of(uniform, data) > 0.55
    low, high = 0.01, 0.99
    for _ in range(12):
        alpha = (low + high) / 2
        register("diffmax-bare-test", alpha)
        bare = copy.deepcopy(model)
        bare.set_attn_implementation("diffmax-bare-test")
        low, high = (alpha, high) if zeros_of(bare, data) > found else (low, alpha)
    cost = divergence(per_head, model, data)
    assert cost < 0.7 * divergence(bare, model, data)
    assert cost < divergence(uniform, model, data)


def test_steps_cost_less_at_the_same_share_of_zeros_and_leave_the_model_as_it_was():
    model = llama()
    model.model.embed_tokens.weight.requires_grad_(False)
    data = [{**batches()[0], "attention_mask": torch.ones(4, 48, dtype=torch.long)} for _ in range(3)]
    data[2]["attention_mask"][0, :9] = 0
    before = {name: (p.clone(), p.requires_grad) for name, p in model.named_parameters()}
    divergences = []
    torch.manual_seed(1)
    chosen = suggest_alpha(model, data[:1], 0.6)
    torch.manual_seed(1)
    tuned = suggest_alpha(
        model, data, 0.6, steps=24, calibration=1, progress=lambda step, value: divergences.append((step, value))
    )
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name][0])
        assert p.requires_grad == before[name][1]
        assert p.grad is None
    assert model.config._attn_implementation == llama().config._attn_implementation
    assert not model.training
    assert [step for step, _ in divergences] == list(range(1, 25))
    first, last = (sum(value for _, value in divergences[part]) for part in (slice(3), slice(-3, None)))
    assert last < 0.8 * first
    models = [replace(copy.deepcopy(model), heads) for heads in (chosen, tuned)]
    assert abs(zeros_of(models[1], data[:1]) - zeros_of(models[0], data[:1])) < 0.03
    other = batches()
    assert divergence(models[1], model, other) < 0.9 * divergence(models[0], model, other)


def test_the_plane_between_the_points_of_the_grid():
    zeros = torch.rand(5, len(ALPHAS) * len(WEIGHTS))
    plane = Plane(ALPHAS, WEIGHTS, zeros)
    alphas, weights = torch.tensor(ALPHAS), torch.tensor(WEIGHTS)
    for row, column in ((1, 1), (3, 2), (len(ALPHAS) - 2, len(WEIGHTS) - 2)):
        chosen = torch.full((5,), row * len(WEIGHTS) + column)
        places = plane.places_of(chosen)
        alpha, scale = plane.pairs(places)
        torch.testing.assert_close(alpha.float(), alphas[row].expand(5))
        torch.testing.assert_close(scale.float(), (weights[column] ** (1 - alphas[row])).expand(5))
        torch.testing.assert_close(plane.share(places), zeros[:, chosen[0]].double().mean())
    places = torch.stack([torch.rand(5).double() * (len(ALPHAS) - 1), torch.rand(5).double() * (len(WEIGHTS) - 1)])
    torch.autograd.gradcheck(plane.share, places.clone().requires_grad_())
    torch.testing.assert_close(plane.gradient(places), torch.autograd.functional.jacobian(plane.share, places))
    wanted = float(plane.share(places)) + 0.01
    moved = plane.with_share(places, wanted)
    assert float(plane.share(moved)) == pytest.approx(wanted, abs=1e-5)
    last = torch.tensor([[len(ALPHAS) - 1.0], [len(WEIGHTS) - 1.0]])
    assert ((moved > 0) & (moved < last)).all()


@pytest.mark.parametrize("kind", ["encoder", "classifier"])
def test_steps_for_models_whose_output_is_not_a_row_of_words(kind):
    config = BertConfig(**SIZES, initializer_range=0.3, attn_implementation="eager", num_labels=3)
    torch.manual_seed(0)
    model = (BertModel if kind == "encoder" else BertForSequenceClassification)(config).eval()
    values = []
    heads = suggest_alpha(model, batches(), 0.5, steps=16, progress=lambda _, value: values.append(value))
    assert values[-1] < values[0]
    replace(model, heads)


def test_one_pair_for_all_is_of_the_grid_and_every_head_has_it():
    heads = suggest_alpha(llama(), batches(), 0.5, per_head=False)
    pairs = {pair for of_layer in heads.values() for pair in zip(of_layer["alpha"], of_layer["scale"], strict=True)}
    assert len(heads) == 2
    assert len(pairs) == 1
    assert pairs < {(a, matched_scale(a, w)) for a in ALPHAS for w in WEIGHTS}


def test_an_encoder_without_logits_has_its_last_state_for_an_output():
    torch.manual_seed(0)
    model = BertModel(BertConfig(**SIZES, initializer_range=0.3)).eval()
    heads = suggest_alpha(model, batches(), 0.3)
    assert sorted(heads) == [f"encoder.layer.{i}.attention.self" for i in range(2)]


def test_the_square_of_a_small_change_of_the_likelihood_is_twice_the_divergence():
    logits = torch.randn(1, 5, 40, dtype=torch.float64)
    moved = logits + 1e-4 * torch.randn_like(logits)
    logs, other = logits.log_softmax(-1), moved.log_softmax(-1)

    class Output:
        def __init__(self, logits):
            self.logits = logits

    p = logs.exp()
    change = (other - logs) * p.sqrt()  # likelihood's, with the weights that it does not differentiate
    torch.testing.assert_close(likelihood(Output(logits), {}), logs * p.sqrt(), rtol=1e-12, atol=1e-14)
    assert change.square().sum().item() == pytest.approx(2 * (p * (logs - other)).sum().item(), rel=1e-3)
    mask = torch.tensor([[1, 1, 1, 0, 0]])
    masked = likelihood(Output(logits), {"attention_mask": mask})
    assert (masked[0, 3:] == 0).all()
    assert torch.equal(masked[0, :3], likelihood(Output(logits), {})[0, :3])


def test_all_queries_one_by_one_have_the_zeros_of_all_and_a_sample_is_near():
    model, data = llama(), batches()
    grid = [(0.5, 1.0), (0.5, 0.25)]
    together, apart, sample = (measure("test", model, data, grid, likelihood, 2, n) for n in (None, 48, 16))
    assert torch.equal(together.zeros, apart.zeros)
    assert (sample.zeros - apart.zeros).abs().max() < 0.1
    assert (apart.movement[:, 1] < apart.movement[:, 0]).all()


def test_calibrate_chooses_from_the_given_grid():
    grid = [(0.6, 0.4), (0.3, 0.2)]
    heads = calibrate(llama(), batches(), zeros=0.3, grid=grid, queries=20)
    chosen = {pair for of_layer in heads.values() for pair in zip(of_layer["alpha"], of_layer["scale"], strict=True)}
    assert chosen <= set(grid)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"zeros": 0.5, "grid": [(1.0, 0.5)]}, r"calibrate: grid must hold pairs .*, got \(1\.0, 0\.5\)"),
        ({"zeros": 0.5, "grid": []}, "calibrate: grid must hold pairs .*, got none"),
        ({"alpha": 0.5, "grid": [(0.5, 0.5)]}, "calibrate: give either alpha or grid, got alpha 0.5 and a grid of 1"),
        ({"zeros": 0.5, "queries": 0}, "calibrate: queries must be a positive int or None, got 0"),
    ],
)
def test_wrong_options_of_calibrate_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        calibrate(llama(), batches(), **options)


def test_what_it_cannot_do_is_said():
    with pytest.raises(
        TypeError, match=r"suggest_alpha: the model must be one of transformers, got .* of type Linear\nfor timm and"
    ):
        suggest_alpha(torch.nn.Linear(2, 2), batches())
    with pytest.raises(ValueError, match="suggest_alpha: zeros must lie strictly between 0 and 1, got 90"):
        suggest_alpha(llama(), batches(), 90)
    with pytest.raises(ValueError, match="suggest_alpha: a batch is needed, got none"):
        suggest_alpha(llama(), [])
    with pytest.raises(TypeError, match=r"suggest_alpha: steps must be an int, got 0\.5 of type float"):
        suggest_alpha(llama(), batches(), steps=0.5)
    with pytest.raises(ValueError, match="suggest_alpha: steps must be at least 0, got -1"):
        suggest_alpha(llama(), batches(), steps=-1)
    with pytest.raises(ValueError, match="suggest_alpha: steps tune each head, so there are none with per_head=False, got 2"):
        suggest_alpha(llama(), batches(), steps=2, per_head=False)
    for calibration, message in ((0, "None or an int of at least 1, got 0"), (2, "at most the number of batches, 1, got 2")):
        with pytest.raises(ValueError, match=f"suggest_alpha: calibration must be {message}"):
            suggest_alpha(llama(), batches(), calibration=calibration)
    for per_head in (True, False):
        with pytest.raises(
            ValueError, match=r"suggest_alpha: no choice has a share of zeros of 0\.999, the most is 0\.\d+\nask for less"
        ):
            suggest_alpha(llama(), batches(6), 0.999, per_head=per_head)
    capped = Gemma2ForCausalLM(Gemma2Config(**SIZES, **TOKENS, num_key_value_heads=2, head_dim=8)).eval()
    with pytest.raises(ValueError, match=r"^suggest_alpha: softcap is not implemented"):
        suggest_alpha(capped, batches())


IDS = torch.zeros(1, 4, dtype=torch.long)


@pytest.mark.parametrize(
    "given", [[IDS], {"input_ids": IDS}, IDS, [[1, 2]]], ids=["tensors", "a dictionary", "a tensor", "lists"]
)
def test_batches_that_are_no_dictionaries_are_refused_in_a_line(given):
    model = llama()
    with pytest.raises(TypeError, match=r"suggest_alpha: a batch must be a dictionary of the model's inputs, got \w+") as error:
        suggest_alpha(model, given)
    assert len(str(error.value)) < 200
