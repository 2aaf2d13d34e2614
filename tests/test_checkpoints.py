"""From a checkpoint of softmax: strict loading works, and asks for everything but alpha."""

import copy

import pytest
import torch
from torch import nn

from diffmax import DiffmaxBisectModule, HillMap
from diffmax.nn import DiffmaxAttention


class Attend(nn.Module):
    """One head; what turns scores into weights is given."""

    def __init__(self, weights):
        super().__init__()
        self.project, self.weights = nn.Linear(8, 8), weights

    def forward(self, x):
        q = self.project(x)
        return self.weights(q @ q.mT) @ q


ROWS = {
    "float": lambda: DiffmaxBisectModule(0.9),
    "buffer": lambda: DiffmaxBisectModule(torch.tensor(0.9)),
    "parameter": lambda: DiffmaxBisectModule(nn.Parameter(torch.tensor(0.9))),
    "map": lambda: DiffmaxBisectModule(torch.full((3, 1), 0.9), alpha_map=HillMap(c=0.5)),
}


def own(module):
    return {
        name: tensor.clone() for name, tensor in module.state_dict().items() if name.split(".")[-1] in ("alpha", "log_beta")
    }


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("rows", ROWS)
def test_a_checkpoint_of_softmax_loads_strictly(rows, assign):
    softmax, model = Attend(nn.Softmax(-1)), Attend(ROWS[rows]())
    before = own(model)
    assert str(model.load_state_dict(copy.deepcopy(softmax.state_dict()), assign=assign)) == "<All keys matched successfully>"
    torch.testing.assert_close(own(model), before)
    assert torch.equal(model.project.weight, softmax.project.weight)
    assert all(parameter.requires_grad for parameter in model.parameters())
    model(torch.randn(2, 3, 8)).sum().backward()


@pytest.mark.parametrize(
    "options",
    [
        {"alpha": 0.9},
        {"alpha": torch.full((2,), 0.9)},
        {"alpha_map": HillMap(c=0.5)},
        {"alpha": nn.Parameter(torch.tensor(0.9))},
    ],
)
def test_attention_of_softmax_with_our_names_loads_strictly(options):
    model = nn.Sequential(DiffmaxAttention(8, 2, **options))
    wanted = {name: torch.randn_like(t) for name, t in nn.Sequential(DiffmaxAttention(8, 2)).state_dict().items()}
    before = own(model)
    model.load_state_dict(wanted)
    torch.testing.assert_close(own(model), before)
    torch.testing.assert_close({n: t for n, t in model.state_dict().items() if n not in before}, wanted)


def test_all_else_is_still_asked_for():
    model = Attend(ROWS["map"]())
    with pytest.raises(RuntimeError, match=r"Missing key.*project.bias"):
        model.load_state_dict({"project.weight": torch.zeros(8, 8)})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*weights.other"):
        model.load_state_dict(Attend(nn.Softmax(-1)).state_dict() | {"weights.other": torch.zeros(())})
    with pytest.raises(RuntimeError, match=r"Missing key.*log_beta.*\n.*Unexpected key.*alpha"):  # another kind of alpha
        model.load_state_dict(Attend(ROWS["buffer"]()).state_dict())
    with pytest.raises(RuntimeError, match=r"Missing key.*sink"):
        DiffmaxAttention(8, 2, sink="learned").load_state_dict(DiffmaxAttention(8, 2).state_dict())


def test_its_own_checkpoint_is_read():
    saved = Attend(ROWS["map"]())
    with torch.no_grad():
        saved.weights.log_beta.fill_(-1.5)
    model = Attend(ROWS["map"]())
    model.load_state_dict(saved.state_dict())
    assert torch.equal(model.weights.log_beta, saved.weights.log_beta)


def test_an_alpha_without_numbers_is_missing():
    with torch.device("meta"):
        model = Attend(ROWS["map"]())
    with pytest.raises(RuntimeError, match=r"Missing key.*log_beta"):
        model.load_state_dict(Attend(nn.Softmax(-1)).state_dict(), assign=True)


LEARNED = {
    "rows": lambda: DiffmaxBisectModule(0.85, alpha_map=HillMap(c=0.5)),
    "rows of a tensor": lambda: DiffmaxBisectModule(torch.tensor([[[0.6]], [[0.9]]], device="cpu"), alpha_map=HillMap(c=0.5)),
    "attention": lambda: DiffmaxAttention(8, 2, alpha=0.85, alpha_map=HillMap(c=0.5)),
    "attention of a tensor": lambda: DiffmaxAttention(
        8, 2, alpha=torch.tensor([0.6, 0.9], device="cpu"), alpha_map=HillMap(c=0.5)
    ),
}


@pytest.mark.parametrize("case", LEARNED)
def test_from_the_device_meta_alpha_comes_back_by_reset_parameters(case):
    """On the way it was what was in memory; FullyShardedDataParallel and others call reset_parameters after to_empty."""
    expected = LEARNED[case]()
    with torch.device("meta"):
        module = LEARNED[case]()
    module.to_empty(device="cpu")
    with torch.no_grad():
        module.log_beta.fill_(1e30)
    module.reset_parameters()
    assert torch.equal(module.log_beta, expected.log_beta)
    fixed = DiffmaxBisectModule(torch.tensor(0.5))
    fixed.reset_parameters()
    assert fixed.alpha == 0.5


def test_an_alpha_that_was_never_a_number_cannot_be_reset():
    with torch.device("meta"):
        module = DiffmaxBisectModule(torch.full((3, 1), 0.9), alpha_map=HillMap(c=0.5)).to_empty(device="cpu")
    with pytest.raises(ValueError, match=r"DiffmaxBisectModule: alpha must hold numbers to start from, got .* \"meta\""):
        module.reset_parameters()


def test_a_model_of_transformers_starts_from_a_checkpoint_of_softmax(tmp_path):
    """Without `_init_weights` the alphas of such a model are what is in memory."""
    transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'diffmax-core[transformers]'")

    class Config(transformers.PretrainedConfig):
        model_type = "diffmax-test"

    class Model(transformers.PreTrainedModel):
        config_class = Config

        def __init__(self, config, learned=True):
            super().__init__(config)
            self.project = nn.Linear(4, 4)
            self.rows = LEARNED["rows of a tensor"]() if learned else nn.Softmax(-1)
            self.post_init()

        def _init_weights(self, module):
            if isinstance(module, DiffmaxBisectModule):
                module.reset_parameters()

    Model(Config(), learned=False).save_pretrained(tmp_path)
    loaded = Model.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded.rows.current_alpha.detach().flatten(), torch.tensor([0.6, 0.9]))
