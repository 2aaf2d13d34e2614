"""Parameter groups: decay leaves alone what it would harm, alpha has its own rate, and nothing is lost or there twice."""

import copy
import re

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import fsdp
from torch.nn.utils.parametrize import register_parametrization

import diffmax
from diffmax import DiffmaxBisectModule, DiffmaxLoss, ExpMap, HillMap, TanhMap
from diffmax.compat.entmax import EntmaxBisect
from diffmax.nn import (
    AdaptiveLengthScale,
    AffineScale,
    ASEntmax,
    DiffmaxAttention,
    Elastic,
    HeadGate,
    LengthScale,
    RelativePositionBias,
    Sink,
    param_groups,
)
from tests.ranks import on_ranks


class Own(nn.Module):
    """A user's attention with an alpha of its own."""

    def __init__(self):
        super().__init__()
        self.project, self.alpha = nn.Linear(16, 16), nn.Parameter(torch.full((2,), 0.8))

    def forward(self, x):
        q = self.project(x).unflatten(-1, (2, 8)).transpose(1, 2)
        return diffmax.attention(q, q, q, alpha=self.alpha).transpose(1, 2).flatten(2)


class OfTokens(nn.Module):
    """A function that gives alpha, and has parameters."""

    def __init__(self):
        super().__init__()
        self.raw = nn.Parameter(torch.zeros(3, 3))

    def forward(self):
        return self.raw.sigmoid().mean()


def names_in(model, **options):
    """The groups, as names of the model's parameters."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = param_groups(model, 1e-3, weight_decay=0.1, **options)
    return {group["name"]: {names[id(p)] for p in group["params"]} for group in groups}


LEARNED = {
    "rows": lambda: (DiffmaxBisectModule(torch.full((4, 1, 1), 0.85), alpha_map=HillMap(c=0.3)), {"log_beta"}),
    "a parameter": lambda: (DiffmaxBisectModule(nn.Parameter(torch.tensor(0.5))), {"alpha"}),
    "a module": lambda: (DiffmaxBisectModule(OfTokens()), {"alpha.raw"}),
    "attention": lambda: (DiffmaxAttention(16, 4, alpha_map=TanhMap(c=0.5)), {"log_beta"}),
    "attention's parameter": lambda: (DiffmaxAttention(16, 4, alpha=nn.Parameter(torch.full((4,), 0.5))), {"alpha"}),
    "a loss": lambda: (DiffmaxLoss(nn.Parameter(torch.tensor(0.5))), {"alpha"}),
    "entmax": lambda: (EntmaxBisect(nn.Parameter(torch.full((4, 1, 1), 1.5))), {"alpha"}),
    "a user's own": lambda: (Own(), {"alpha"}),
    "inside": lambda: (
        Elastic(Sink(DiffmaxBisectModule(0.9, alpha_map=ExpMap(c=0.5)), 4), 4),
        {"normalize.normalize.log_beta"},
    ),
}


@pytest.mark.parametrize("case", LEARNED)
def test_every_learned_alpha_has_its_rate_and_no_decay(case):
    model, wanted = LEARNED[case]()
    groups = {group["name"]: group for group in param_groups(model, 1e-3, weight_decay=0.1, alpha_lr=0.02)}
    assert names_in(model)["alpha"] == wanted
    assert (groups["alpha"]["lr"], groups["alpha"]["weight_decay"]) == (0.02, 0.0)


@pytest.mark.parametrize(
    ("make", "kept"),
    [
        (lambda: Elastic(nn.Softmax(-1), 4), {"logit"}),
        (lambda: Sink(nn.Softmax(-1), 4), {"sink"}),
        (lambda: LengthScale(4), {"log_decay"}),
        (lambda: AdaptiveLengthScale(16, 4), {"project.weight"}),
        (lambda: ASEntmax(16, 4), {"scale.project.weight"}),
        (lambda: HeadGate(16, 4), {"project.weight", "project.bias"}),
        (lambda: AffineScale(16, 4), {"project.weight", "project.bias"}),
        (lambda: RelativePositionBias(4), {"weight"}),
        (
            lambda: DiffmaxAttention(16, 4, bias=False, sink="learned", head_gate=True, length_scale=True),
            {"sink", "gate.project.weight", "gate.project.bias", "length_scale.log_decay"},
        ),
    ],
)
@pytest.mark.parametrize("decay_biases_and_norms", [False, True])
def test_what_our_modules_own_is_not_decayed(make, kept, decay_biases_and_norms):
    assert names_in(make(), decay_biases_and_norms=decay_biases_and_norms)["not decayed"] == kept


def test_biases_and_norms_are_decayed_only_where_asked():
    class RMSNorm2d(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.ones(3, 3))

    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), RMSNorm2d(), nn.Embedding(5, 3))
    small = {"0.bias", "1.weight", "1.bias", "2.gain"}
    assert names_in(model) == {"weights": {"0.weight", "3.weight"}, "not decayed": small}
    assert names_in(model, decay_biases_and_norms=True) == {"weights": {"0.weight", "3.weight"} | small}


def test_shared_parameters_are_there_once_and_frozen_ones_are_not():
    learned = DiffmaxBisectModule(0.9, alpha_map=HillMap(c=0.5))
    other = DiffmaxBisectModule(0.9, alpha_map=HillMap(c=0.5))
    other.log_beta = learned.log_beta
    model = nn.Sequential(learned, other, nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[3].weight = model[2].weight
    model[4].requires_grad_(False)
    found = [p for group in param_groups(model, 1e-3) for p in group["params"]]
    assert len(found) == len({id(p) for p in found})
    assert {id(p) for p in found} == {id(p) for p in model.parameters() if p.requires_grad}
    learned.log_beta.requires_grad_(False)
    assert "alpha" not in names_in(model)


def test_a_parameter_that_is_an_alpha_somewhere_is_an_alpha():
    model = nn.Module()
    model.raw = nn.Parameter(torch.tensor(0.5))
    model.rows = DiffmaxBisectModule(model.raw)
    assert names_in(model) == {"alpha": {"raw"}}


def test_a_parametrized_alpha_and_a_parametrized_weight():
    attend = DiffmaxAttention(8, 2, bias=False, alpha=nn.Parameter(torch.full((2,), 0.4)))
    register_parametrization(attend, "alpha", nn.Sigmoid(), unsafe=True)
    register_parametrization(attend.q_proj, "weight", nn.Identity())
    groups = names_in(attend)
    assert groups["alpha"] == {"parametrizations.alpha.original"}
    assert "q_proj.parametrizations.weight.original" in groups["weights"]


def test_further_alphas_need_not_belong_to_the_model():
    outside, inside = nn.ParameterList([torch.zeros(2), torch.zeros(2)]), nn.Linear(4, 1)
    model = nn.Sequential(inside, nn.Linear(4, 4))
    groups = {group["name"]: group["params"] for group in param_groups(model, 1e-3, alphas=[*outside, inside])}
    assert {id(p) for p in groups["alpha"]} == {id(p) for p in (*outside, *inside.parameters())}
    for one in (outside, outside[0], inside):  # one need not be in a list
        assert "alpha" in {group["name"] for group in param_groups(model, 1e-3, alphas=one)}


def test_groups_survive_wrappers():
    model = nn.Sequential(DiffmaxAttention(16, 4, alpha_map=HillMap(c=0.5)), nn.LayerNorm(16))
    groups = param_groups(model, 1e-3)
    for wrapped in (
        torch.compile(model, backend="eager"),
        torch.optim.swa_utils.AveragedModel(model).module,
        nn.DataParallel(model),
    ):
        found = param_groups(wrapped, 1e-3)
        assert [(g["name"], [p.shape for p in g["params"]]) for g in found] == [
            (g["name"], [p.shape for p in g["params"]]) for g in groups
        ]


def survives(wrap):
    """The groups of a model that `wrap` sharded are those of the model, and train it."""
    model = nn.Sequential(DiffmaxAttention(16, 4, alpha_map=HillMap(c=0.5), sink="learned"), nn.LayerNorm(16))
    expected = [(group["name"], len(group["params"])) for group in param_groups(model, 1e-3)]
    model = wrap(model)
    groups = param_groups(model, 1e-3)
    assert [(group["name"], len(group["params"])) for group in groups] == expected
    optimizer = torch.optim.AdamW(groups)
    model(torch.randn(2, 5, 16)).square().sum().backward()
    optimizer.step()


@on_ranks(1)
def test_groups_survive_ddp():
    survives(nn.parallel.DistributedDataParallel)


@on_ranks(1)
def test_groups_survive_fsdp_with_the_original_parameters_alone():
    def wrap(model):
        flat = fsdp.FullyShardedDataParallel(copy.deepcopy(model), device_id=torch.device("cpu"))
        with pytest.raises(ValueError, match=r"param_groups: parameters must be the module's own(.|\n)*use_orig_params=True"):
            param_groups(flat, 1e-3)
        return fsdp.FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))

    survives(wrap)


@on_ranks(1, marks=[pytest.mark.skipif(not hasattr(fsdp, "fully_shard"), reason="fully_shard came with torch 2.6")])
def test_groups_survive_fully_shard():
    def wrap(model):
        for part in (model[0], model):
            fsdp.fully_shard(part, mesh=dist.init_device_mesh("cpu", (1,)))
        return model

    survives(wrap)


def test_weight_decay_does_not_move_alpha_and_its_own_rate_does():
    """AdamW on `parameters()` pulled a learned alpha from 0.95 to 0.58 in 1000 steps, without any gradient from the loss."""

    def after(groups_of):
        rows = DiffmaxBisectModule(0.95, alpha_map=HillMap(c=1.0))
        optimizer = torch.optim.AdamW(groups_of(rows))
        for _ in range(200):
            rows.log_beta.grad = torch.zeros_like(rows.log_beta)
            optimizer.step()
        return rows.current_alpha.item()

    assert after(lambda rows: [{"params": rows.parameters(), "lr": 1e-2, "weight_decay": 0.1}]) < 0.94
    assert after(lambda rows: param_groups(rows, 1e-2, weight_decay=0.1)) == pytest.approx(0.95, abs=1e-6)


def test_optimizers_and_schedulers_take_the_groups():
    model = DiffmaxAttention(16, 4, alpha_map=HillMap(c=0.5))
    for optimizer in (torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad):
        made = optimizer(param_groups(model, 1e-3, alpha_lr=0.02))
        torch.optim.lr_scheduler.LambdaLR(made, lambda step: 0.5)
        assert {group["name"]: group["lr"] for group in made.param_groups} == {
            "weights": 5e-4,
            "not decayed": 5e-4,
            "alpha": 0.01,
        }
    again = torch.optim.AdamW(param_groups(model, 1e-3))
    again.load_state_dict(torch.optim.AdamW(param_groups(model, 2e-3)).state_dict())
    assert again.param_groups[0]["lr"] == 2e-3


def test_finds_the_alpha_of_a_models_registered_attention():
    transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'diffmax-core[transformers]'")
    from diffmax.integrations.transformers import register

    alpha, scale = torch.full((2,), 0.8, requires_grad=True), OfTokens()
    config = transformers.BertConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=9
    )
    model = transformers.BertModel(config)
    for given, wanted in ((alpha, [alpha]), (scale, [scale.raw]), (0.5, []), (lambda module: alpha, [])):
        register("diffmax-groups", given)
        model.set_attn_implementation("diffmax-groups")
        found = [p for group in param_groups(model, 1e-3) if group["name"] == "alpha" for p in group["params"]]
        assert [id(p) for p in found] == [id(p) for p in wanted]
    model.set_attn_implementation("eager")
    assert "alpha" not in names_in(model)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: param_groups([nn.Parameter(torch.zeros(1))], 1e-3), TypeError, "model must be a torch.nn.Module, got list"),
        (lambda: param_groups(nn.Linear(2, 2), "1e-3"), TypeError, "lr must be a number, got '1e-3' of type str"),
        (lambda: param_groups(nn.Linear(2, 2), True), TypeError, "lr must be a number, got True of type bool"),
        (lambda: param_groups(nn.Linear(2, 2), -1.0), ValueError, "lr must be finite and not negative, got -1.0"),
        (lambda: param_groups(nn.Linear(2, 2), 1e-3, weight_decay=float("nan")), ValueError, "weight_decay must be finite"),
        (lambda: param_groups(nn.Linear(2, 2), 1e-3, alpha_lr=None), TypeError, "alpha_lr must be a number, got None"),
        (lambda: param_groups(nn.Linear(2, 2), 1e-3, alphas=["alpha"]), TypeError, "alphas must hold parameters or modules"),
        (lambda: param_groups(nn.Linear(2, 2).requires_grad_(False), 1e-3), ValueError, "got Linear with none"),
        (lambda: param_groups(nn.Softmax(-1), 1e-3), ValueError, "must have a parameter that requires a gradient"),
    ],
)
def test_bad_input(call, error, words):
    with pytest.raises(error, match=re.escape(words)) as raised:
        call()
    assert str(raised.value).startswith("param_groups: ")


def test_alphas_that_hold_nothing_are_refused():
    with pytest.raises(TypeError, match="param_groups: alphas must hold parameters or modules, got None"):
        param_groups(torch.nn.Linear(2, 2), 1e-3, alphas=None)
