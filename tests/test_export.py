"""torch.export with a length that is free, of models with parameters: saved, loaded, trained, compiled ahead of time."""

import shutil

import pytest
import torch
from torch import nn
from torch.export import Dim, export

from diffmax import (
    DiffmaxBisectModule,
    HillMap,
    attention,
    attention_varlen,
    attention_with_kvcache,
    diffmax_bisect,
    diffmax_loss,
    lazy_attention,
)
from diffmax.nn import DiffmaxAttention

newer_torch = pytest.mark.skipif(not hasattr(torch.library, "register_vmap"), reason="needs torch 2.5: rules for its tracer")
pytestmark = [
    newer_torch,
    pytest.mark.compiler,
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning"),  # torch's own
]

FREE = {1: Dim("length", min=2, max=4096)}
LENGTHS = (33, 65, 2100)  # one tile of 64, two, and more than one word of 32 tiles


class Projected(nn.Module):
    """What is called with tokens (B, N, 8) that a linear layer has projected."""

    def __init__(self, function):
        super().__init__()
        self.project, self.function = nn.Linear(8, 8), function

    def forward(self, x):
        return self.function(self.project(x))


def heads(x):
    return x.unflatten(2, (2, 4)).transpose(1, 2)


def packed(x):
    tokens, length = x[0].unflatten(1, (2, 4)), x.shape[1]
    ends = (torch.arange(3) * length // 2).int()
    return attention_varlen(tokens, tokens, tokens, ends, ends, length, length, is_causal=True)


MODULE = DiffmaxAttention(8, 2, alpha=0.8, alpha_map=HillMap(0.5), sink="learned", head_gate=True, length_scale=True)
ROWS = DiffmaxBisectModule(0.8, alpha_map=HillMap(0.5))

MODELS = {
    "rows": lambda x: diffmax_bisect(x @ x.transpose(1, 2), 0.6),
    "rows, module": ROWS,
    "attention": lambda x: attention(heads(x), heads(x), heads(x), is_causal=True),
    "attention, module": MODULE,
    "varlen": packed,
    "lazy": lambda x: lazy_attention(heads(x), heads(x), heads(x), torch.zeros(2, 4), -0.5),
    "loss": lambda x: diffmax_loss(x.transpose(1, 2), x.detach().argmax(2), 0.5),
}


def exported(name, strict=False):
    model = Projected(MODELS[name])
    return model, export(model, (torch.randn(1, 5, 8),), dynamic_shapes={"x": FREE}, strict=strict)


@pytest.mark.parametrize("name", MODELS)
def test_a_free_length_of_a_model_with_parameters(name, tmp_path):
    """The length of attention was bound to one tile of 64 where a parameter required a gradient."""
    model, program = exported(name)
    assert "torch.ops.diffmax." in program.graph_module.code
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    for length in LENGTHS:
        x = torch.randn(1, length, 8)
        torch.testing.assert_close(loaded(x), model(x))


def test_a_free_length_through_dynamo():
    model, program = exported("attention, module", strict=True)
    for length in LENGTHS:
        x = torch.randn(1, length, 8)
        torch.testing.assert_close(program.module()(x), model(x))


@pytest.mark.parametrize("name", MODELS)
def test_what_is_exported_can_be_trained(name):
    model, program = exported(name)
    trained = program.module()
    for length in LENGTHS[:2]:
        x = torch.randn(1, length, 8)
        ours, exact = (torch.autograd.grad(m(x).square().sum(), m.project.weight)[0] for m in (trained, model))
        torch.testing.assert_close(ours, exact)


class Decode(nn.Module):
    def forward(self, q, k_cache, v_cache, lengths, k=None):
        return attention_with_kvcache(q, k_cache, v_cache, k, k, cache_seqlens=lengths)


@pytest.mark.parametrize("new", [False, True])
def test_decoding_over_caches_of_any_length(new):
    def arguments(size):
        last = (torch.randn(1, 1, 2, 4),) if new else ()
        return torch.randn(1, 1, 2, 4), *torch.randn(2, 1, size, 2, 4), torch.tensor([3], dtype=torch.int32), *last

    shapes = (None, FREE, FREE, None, *((None,) if new else ()))
    program = export(Decode(), arguments(9), dynamic_shapes=shapes).module()
    for size in LENGTHS:
        given = arguments(size)
        ours, exact = ([t.clone() for t in given] for _ in range(2))
        torch.testing.assert_close(program(*ours), Decode()(*exact))
        assert torch.equal(ours[1], exact[1])
        assert torch.equal(ours[1], given[1]) is not new


def appended(x):
    cache = x.unflatten(2, (2, 4))
    one, lengths = cache[:, :1], torch.ones(1, dtype=torch.int32)
    return attention_with_kvcache(one, cache.clone(), cache.clone(), one, one, cache_seqlens=lengths)


def everything(x):
    functions = [*(MODELS[name] for name in ("attention, module", "varlen", "loss")), appended]
    return torch.cat([function(x).flatten() for function in functions])


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs a C++ compiler: g++")
@pytest.mark.skipif(not hasattr(torch._inductor, "aoti_compile_and_package"), reason="needs torch 2.6")
def test_aot_inductor(tmp_path):
    model = Projected(everything).eval()
    with torch.no_grad():
        program = export(model, (torch.randn(1, 5, 8),), dynamic_shapes={"x": FREE})
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
        run = torch._inductor.aoti_load_package(package)
        for length in LENGTHS[:2]:
            x = torch.randn(1, length, 8)
            torch.testing.assert_close(run(x), model(x))
