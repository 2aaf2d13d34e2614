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
