"""What torch expects of every module and function: the device "meta", `to_empty`, state dicts, star imports."""

import builtins
import contextlib
import copy
import importlib

import pytest
import torch
from torch import nn

import diffmax
from diffmax import DiffmaxBisectModule, DiffmaxLoss, HillMap
from diffmax import nn as dnn
from diffmax.compat import adasplash, entmax, flash_attn

H, E = 4, 16


def per_head():
    return torch.tensor([0.3, 0.5, 0.7, 0.9])


MODULES = {
    "attention": lambda: dnn.DiffmaxAttention(E, H),
    "attention, per head": lambda: dnn.DiffmaxAttention(E, H, alpha=per_head()),
    "attention, parameter": lambda: dnn.DiffmaxAttention(E, H, alpha=nn.Parameter(per_head())),
    "attention, learned": lambda: dnn.DiffmaxAttention(E, H, alpha=0.6, alpha_map=HillMap(0.9)),
    "attention, learned per head": lambda: dnn.DiffmaxAttention(E, H, alpha=per_head(), alpha_map=HillMap(0.9)),
    "attention, all": lambda: dnn.DiffmaxAttention(E, H, sink="learned", head_gate=True, length_scale=True),
    "bisect": lambda: DiffmaxBisectModule(per_head().view(H, 1, 1)),
    "bisect, parameter": lambda: DiffmaxBisectModule(nn.Parameter(per_head().view(H, 1, 1))),
    "bisect, learned": lambda: DiffmaxBisectModule(0.6, alpha_map=HillMap(0.9)),
    "bisect, learned per head": lambda: DiffmaxBisectModule(per_head().view(H, 1, 1), alpha_map=HillMap(0.9)),
    "loss": lambda: DiffmaxLoss(torch.tensor(0.5), weight=per_head()),
    "sink": lambda: dnn.Sink(DiffmaxBisectModule(per_head().view(H, 1, 1)), H),
    "length": lambda: dnn.LengthScale(H, start=1.0),
    "adaptive length": lambda: dnn.AdaptiveLengthScale(E, H),
    "asentmax": lambda: dnn.ASEntmax(E, H, alpha=per_head().view(H, 1, 1)),
    "attention, adaptive length": lambda: dnn.DiffmaxAttention(E, H, length_scale="adaptive"),
    "gate": lambda: dnn.HeadGate(E, H),
    "affine": lambda: dnn.AffineScale(E, H),
    "elastic": lambda: dnn.Elastic(DiffmaxBisectModule(0.5), H, start=0.3),
    "position": lambda: dnn.RelativePositionBias(H),
    "entmax": lambda: entmax.EntmaxBisect(1 + per_head().view(H, 1, 1)),
    "normmax": lambda: entmax.NormmaxBisect(1 + per_head().view(H, 1, 1)),
    "budget": lambda: entmax.BudgetBisect(1 + per_head().view(H, 1, 1)),
    "entmax loss": lambda: entmax.EntmaxBisectLoss(torch.tensor(1.5)),
    "normmax loss": lambda: entmax.NormmaxBisectLoss(torch.tensor(1.5)),
}


def everything(module):
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


@pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)
def test_after_to_empty_reset_parameters_begins_anew(make):
    torch.manual_seed(0)
    expected = everything(make())
    module = make().to_empty(device="cpu")
    with torch.no_grad():
        for tensor in everything(module).values():
            tensor.fill_(torch.nan)
    torch.manual_seed(0)
    for child in reversed(list(module.modules())):  # as FSDP does: whatever owns tensors, each on its own
        if list(child.parameters(recurse=False)) or list(child.buffers(recurse=False)):
            child.reset_parameters()
    got = everything(module)
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert not got[name].isnan().any()
        if "proj" not in name or "project" in name:  # those are random
            torch.testing.assert_close(got[name], tensor) if "project" not in name else None


@pytest.mark.parametrize(
    "name", ["attention, learned", "attention, all", "bisect, learned", "length", "gate", "affine", "elastic", "position"]
)
def test_made_on_meta_and_materialized_it_is_whole(name):
    expected = everything(MODULES[name]())
    with torch.device("meta"):
        module = MODULES[name]()
    assert all(tensor.is_meta for tensor in everything(module).values())
    module = module.to_empty(device="cpu")
    for child in reversed(list(module.modules())):
        if list(child.parameters(recurse=False)) or list(child.buffers(recurse=False)):
            child.reset_parameters()
    for what, tensor in everything(module).items():
        if "log_" in what or what in ("sink", "logit", "average"):
            torch.testing.assert_close(tensor, expected[what])
        assert not tensor.isnan().any()


@pytest.mark.parametrize("learned", [{}, {"alpha_map": HillMap(0.9)}])
def test_values_that_were_never_there_are_asked_for(learned):
    with torch.device("meta"):
        module = dnn.DiffmaxAttention(E, H, alpha=per_head(), **learned)
    message = r'DiffmaxAttention: alpha must hold numbers to start from, got .* "meta"\nmake alpha with device="cpu", or load'
    with pytest.raises(ValueError, match=message):
        module.to_empty(device="cpu").reset_parameters()


@pytest.mark.parametrize("name", [name for name in MODULES if "per head" in name or name in ("bisect", "loss", "entmax")])
def test_a_reset_undoes_training(name):
    module = MODULES[name]()
    before = {key: tensor.clone() for key, tensor in everything(module).items() if "proj" not in key}
    with torch.no_grad():
        for tensor in everything(module).values():
            tensor.add_(0.01)
    module.reset_parameters()
    for key, tensor in before.items():
        torch.testing.assert_close(everything(module)[key], tensor)


GIVEN = {
    "attention": lambda alpha: dnn.DiffmaxAttention(E, H, alpha=alpha),
    "bisect": lambda alpha: DiffmaxBisectModule(
        alpha.view(H, 1, 1) if isinstance(alpha, nn.Parameter) else alpha[:, None, None]
    ),
    "loss": lambda alpha: DiffmaxLoss(0.5, weight=alpha),
    "learned": lambda alpha: dnn.DiffmaxAttention(E, H, alpha=alpha, alpha_map=HillMap(0.9)),
}


@pytest.mark.parametrize("make", GIVEN.values(), ids=GIVEN)
@pytest.mark.parametrize("kind", ["expanded", "shared", "part of another", "every other"])
def test_an_alpha_in_shared_memory_goes_through_state_dicts_and_safetensors(make, kind, tmp_path):
    """Into an expanded buffer no state dict could be loaded, and safetensors refused to save tensors that overlap."""
    safetensors = pytest.importorskip("safetensors.torch", reason="needs safetensors: pip install safetensors")
    base = torch.linspace(0.5, 0.8, 2 * H)
    alpha = {
        "expanded": torch.tensor(0.6).expand(H),
        "shared": base[:H],
        "part of another": base[H:],
        "every other": base[::2],
    }[kind]
    model = nn.ModuleList([make(alpha), make(alpha)])
    safetensors.save_file(model.state_dict(), tmp_path / "model.safetensors")
    safetensors.save_model(model, str(tmp_path / "again.safetensors"))
    changed = {name: tensor * 0.9 for name, tensor in model.state_dict().items()}
    model.load_state_dict(changed)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, changed[name])
    assert not torch.equal(alpha, alpha * 0.9)
    model.load_state_dict(safetensors.load_file(tmp_path / "model.safetensors"))


def test_an_expanded_parameter_can_be_loaded_and_stepped():
    alpha = nn.Parameter(torch.tensor(0.6).expand(H))
    module = dnn.DiffmaxAttention(E, H, alpha=alpha)
    assert module.alpha is alpha
    module.load_state_dict(module.state_dict() | {"alpha": per_head()})
    module(torch.randn(2, 5, E)).square().sum().backward()
    torch.optim.SGD([alpha], lr=0.01).step()
    assert len(set(alpha.tolist())) == H


def test_a_parameter_that_two_modules_have_stays_one():
    alpha = nn.Parameter(per_head())
    model = nn.ModuleList([dnn.DiffmaxAttention(E, H, alpha=alpha) for _ in range(2)])
    assert model[0].alpha is model[1].alpha is alpha
    assert copy.deepcopy(model)[0].alpha is not alpha


def test_a_gradient_reaches_a_tensor_that_is_no_parameter():
    alpha = per_head().requires_grad_()
    with pytest.warns(UserWarning, match="no parameter of the module"):
        attend = dnn.DiffmaxAttention(E, H, alpha=alpha)
    attend(torch.randn(2, 5, E)).square().sum().backward()
    assert (alpha.grad != 0).all()


def numbers(*shape):
    return torch.randn(shape, device="cpu", generator=torch.Generator("cpu").manual_seed(1))


def indices(*values):
    return torch.tensor(values, dtype=torch.int32, device="cpu")


def cached(**how):
    caches = numbers(2, 2, 12, 2, 8).unbind()
    new = numbers(2, 2, 1, 2, 8).unbind()
    return diffmax.attention_with_kvcache(numbers(2, 1, 4, 8), *caches, *new, cache_seqlens=indices(5, 7), causal=True, **how)


def attended(**how):
    return diffmax.attention(*numbers(3, 2, H, 5, 8), **how)


def varlen(**how):
    tokens, ends = numbers(7, H, 8), indices(0, 3, 7)
    return diffmax.attention_varlen(tokens, tokens, tokens, ends, ends, 4, 4, **how)


def some_alpha(*shape):
    return torch.full(shape, 0.5, device="cpu")


CALLS = {
    "diffmax_bisect": lambda: diffmax.diffmax_bisect(numbers(3, 5), 0.5),
    "diffmax_bisect, tensor": lambda: diffmax.diffmax_bisect(numbers(3, 5), some_alpha(3, 1)),
    "diffmax_bisect, 0-d": lambda: diffmax.diffmax_bisect(numbers(), 0.5),
    "monitored": lambda: diffmax.diffmax_bisect_monitored(numbers(3, 5), 0.5, step=1, log=lambda metrics, *, step: None),
    "loss": lambda: diffmax.diffmax_loss(numbers(3, 5), torch.tensor([0, 1, -100], device="cpu"), 0.5),
    "loss, probabilities": lambda: diffmax.diffmax_loss(numbers(3, 5), numbers(3, 5).softmax(1), 0.5, weight=some_alpha(5)),
    "attention": attended,
    "attention, causal": lambda: attended(is_causal=True, alpha=some_alpha(H), window_size=(2, 0), return_stats=True)[1].tau,
    "attention, sparsity": lambda: attended(is_causal=True, return_stats=True)[1].tile_sparsity,
    "attention, options": lambda: attended(alibi_slopes=some_alpha(H), softcap=3.0, sink=some_alpha(H), dropout_p=0.5),
    "varlen": varlen,
    "varlen, stats": lambda: varlen(return_stats=True, is_causal=True)[1].tile_sparsity,
    "kvcache": cached,
    "kvcache, stats": lambda: cached(return_stats=True, alpha=some_alpha(4))[1].tau,
    "page_bounds": lambda: diffmax.page_bounds(numbers(2, 12, 2, 8), 7).low,
    "page_bounds, lengths": lambda: diffmax.page_bounds(numbers(2, 12, 2, 8), indices(3, 7)).high,
    "HillMap": lambda: HillMap(0.9)(numbers(3).abs()),
    "HillMap, float": lambda: torch.tensor(HillMap(0.9).inverse(HillMap(0.9)(2.0)), device="cpu"),
    "adasplash": lambda: adasplash.adasplash(*numbers(3, 2, H, 5, 8), varlen=indices(3, 5)),
    "entmax_attention": lambda: adasplash.attention.entmax_attention(*numbers(3, 2, H, 5, 8), alibi_slopes=some_alpha(H)),
    "flash_attn_func": lambda: flash_attn.flash_attn_func(*numbers(3, 2, 5, H, 8), causal=True, return_attn_probs=True)[1],
    "flash_attn_varlen_func": lambda: flash_attn.flash_attn_varlen_func(
        *(numbers(7, H, 8), numbers(6, 2, H, 8), numbers(6, 2, H, 8), indices(0, 3, 7), indices(0, 4, 7), 4, 4),
        alibi_slopes=some_alpha(2, H),
        block_table=indices([5, 0], [1, 3]),
        return_attn_probs=True,
    )[1],
    "cache_leftpad": lambda: cached(cache_leftpad=indices(2, 0)),
    "adasplash, sparsemax": lambda: adasplash.adasplash(*numbers(3, 2, H, 5, 8), alpha=2.0),
    "triton_entmax": lambda: adasplash.triton_entmax(numbers(3, 5)),
    "triton_sparsemax": lambda: adasplash.triton_sparsemax(numbers(3, 5)),
    "sparsemax": lambda: entmax.sparsemax(numbers(3, 5)),
    "entmax15": lambda: entmax.entmax15(numbers(3, 5)),
    **{
        f"entmax_bisect {alpha}": lambda alpha=alpha: entmax.entmax_bisect(numbers(3, 5), alpha)
        for alpha in (0.5, 1, 1.5, 2, 3.0)
    },
    "entmax_bisect, tensor": lambda: entmax.entmax_bisect(numbers(3, 5), 1 + some_alpha(3, 1)),
    "normmax_bisect": lambda: entmax.normmax_bisect(numbers(3, 5), 3),
    "budget_bisect": lambda: entmax.budget_bisect(numbers(3, 5), 2),
    **{
        name: lambda name=name: getattr(entmax, name)(numbers(3, 5), torch.tensor([0, 1, 4], device="cpu"))
        for name in ("sparsemax_loss", "entmax15_loss", "sparsemax_bisect_loss", "entmax_bisect_loss", "normmax_bisect_loss")
    },
}


@pytest.mark.parametrize("backend", ["best", "reference", "cpu"])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_tensors_on_the_cpu_inside_of_the_device_meta(call, backend):
    """`with torch.device("meta")` is where models are made, and some of them call functions on the way."""
    with contextlib.nullcontext() if backend == "best" else diffmax.use_backend(backend):
        torch.manual_seed(0)
        expected = call()
        torch.manual_seed(0)
        with torch.device("meta"):
            got = call()
    assert got.device.type == "cpu"
    torch.testing.assert_close(got, expected)


LEARNING = {
    "diffmax_bisect": lambda x: diffmax.diffmax_bisect(x, some_alpha(5, 1)),
    "attention": lambda x: diffmax.attention(*x.view(1, 1, 5, 7).expand(3, 1, 2, 5, 7), is_causal=True),
    "loss": lambda x: diffmax.diffmax_loss(x, torch.tensor([0, 1, 2, 3, 4], device="cpu"), 0.5),
    "adasplash": lambda x: adasplash.adasplash(*x.view(1, 1, 5, 7).expand(3, 1, 2, 5, 7), varlen=indices(3)),
    "entmax_bisect": lambda x: entmax.entmax_bisect(x, 1.5),
    "normmax_bisect": lambda x: entmax.normmax_bisect(x, 3),
    "budget_bisect": lambda x: entmax.budget_bisect(x, 2),
}


@pytest.mark.parametrize("call", LEARNING.values(), ids=LEARNING)
def test_gradients_on_the_cpu_inside_of_the_device_meta(call):
    def gradient():
        x = numbers(5, 7).requires_grad_()
        return torch.autograd.grad(call(x).square().sum(), x)[0]

    expected = gradient()
    with torch.device("meta"):
        got = gradient()
    assert got.device.type == "cpu"
    torch.testing.assert_close(got, expected)


PUBLIC = [
    "diffmax",
    "diffmax.nn",
    "diffmax.losses",
    "diffmax.maps",
    "diffmax.functional",
    "diffmax.monitor",
    "diffmax.compat.entmax",
    "diffmax.compat.entmax.activations",
    "diffmax.compat.entmax.losses",
    "diffmax.compat.entmax.root_finding",
    "diffmax.compat.adasplash",
    "diffmax.compat.adasplash.triton_entmax",
    "diffmax.compat.flash_attn",
    "diffmax.distributed",
    "diffmax.testing",
]


@pytest.mark.parametrize("name", PUBLIC)
def test_a_star_import_shadows_nothing(name):
    """`from diffmax import *` replaced torch.nn, where it was imported as nn, and the caller's own __version__."""
    module = importlib.import_module(name)
    brought: dict[str, object] = {}
    exec(f"from {name} import *", brought)
    brought.pop("__builtins__")
    usual = {"torch", "nn", "F", "np", "math", "os", "Tensor", "annotations", "__version__", "functional", "optim", "Callable"}
    assert not set(brought) & (usual | set(dir(builtins)))
    assert set(module.__all__) <= set(dir(module))
