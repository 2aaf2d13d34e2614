"""torch.compile: one graph for all lengths and no break in it, numbers that are known at run time, the default backend."""

import math

import pytest
import torch
from torch._dynamo.utils import counters

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
from diffmax.compat import adasplash, entmax
from diffmax.nn import DiffmaxAttention

newer_torch = pytest.mark.skipif(not hasattr(torch.library, "register_vmap"), reason="needs torch 2.5: rules for its tracer")
pytestmark = [
    newer_torch,
    pytest.mark.compiler,
    pytest.mark.sampled(3),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),  # Dynamo's own
]

LENGTHS = (60, 2100, 33)  # of one tile of 64 and of several, of one word of 32 tiles and of two


def learned(*shape):
    return torch.randn(shape, requires_grad=True)


def heads(n):
    return learned(2, 2, n, 4), learned(2, 2, n, 4), learned(2, 2, n, 4)


def packed(n):
    ends = torch.tensor([0, n // 3, n], dtype=torch.int32)
    return learned(n, 2, 4), learned(n, 2, 4), learned(n, 2, 4), ends, ends, n, n


def classes(n):
    return learned(3, n), torch.tensor([1, -100, n - 1])


def cached(n, new=0):
    k, v = torch.randn(2, 2, new, 2, 4) if new else (None, None)
    return (
        torch.randn(2, 1, 4, 4),
        torch.randn(2, n, 2, 4),
        torch.randn(2, n, 2, 4),
        k,
        v,
        torch.tensor([5, 7], dtype=torch.int32),
    )


def decode(q, k_cache, v_cache, k, v, lengths, **options):
    k_cache, v_cache = k_cache.clone(), v_cache.clone()
    out = attention_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=lengths, causal=True, **options)
    return out, k_cache, v_cache


def square(n):
    return (torch.randn(2, 2, n, n, requires_grad=True),)


def per_head(*shape):
    return torch.full(shape, 0.7, requires_grad=True)


MODULE = DiffmaxAttention(8, 2, alpha=0.8, alpha_map=HillMap(0.5), sink="learned", head_gate=True, length_scale=True)
ROWS = DiffmaxBisectModule(per_head(2, 1, 1).detach(), alpha_map=HillMap(0.5))

CALLS = {
    "rows": (lambda x: diffmax_bisect(x, 0.6), lambda n: (learned(3, n),)),
    "rows, an alpha per head": (diffmax_bisect, lambda n: (*square(n % 200), per_head(2, 1, 1))),
    "rows, module": (ROWS, lambda n: square(n % 200)),
    "attention": (lambda q, k, v: attention(q, k, v, is_causal=True), heads),
    "attention, options": (
        lambda q, k, v, alpha, sink, slopes: attention(
            q, k, v, alpha=alpha, sink=sink, alibi_slopes=slopes, softcap=3.0, window_size=(90, 5)
        ),
        lambda n: (*heads(n), per_head(2), learned(2), torch.ones(2)),
    ),
    "attention, slopes of each sequence": (
        lambda q, k, v, slopes: attention(q, k, v, alibi_slopes=slopes),
        lambda n: (*heads(n), torch.rand(2, 2)),
    ),
    "attention, mask": (attention, lambda n: (*heads(n), torch.rand(n, n) < 0.5)),
    "attention, bias": (attention, lambda n: (*heads(n), learned(2, 1, n))),
    "attention, last queries": (
        lambda q, k, v: attention(q[:, :, -4:], k, v, is_causal=True, causal_alignment="lower_right"),
        heads,
    ),
    "attention, stats": (lambda q, k, v: attention(q, k, v, is_causal=True, return_stats=True), heads),
    "attention, module": (lambda x: MODULE(x, is_causal=True), lambda n: (learned(2, n, 8),)),
    "varlen": (lambda *given: attention_varlen(*given, is_causal=True), packed),
    "varlen, stats": (lambda *given: attention_varlen(*given, return_stats=True), packed),
    "lazy": (lazy_attention, lambda n: (*heads(n), learned(2, 40), learned(2))),
    "loss": (lambda x, y: diffmax_loss(x, y, 0.5), classes),
    "loss of probabilities": (lambda x, y: diffmax_loss(x, y, 0.5), lambda n: (learned(3, n), torch.rand(3, n).softmax(1))),
    "decode": (decode, cached),
    "decode, append": (decode, lambda n: cached(n, new=1)),
    "compat, entmax_bisect": (entmax.entmax_bisect, lambda n: (learned(3, n),)),
    "compat, budget_bisect": (entmax.budget_bisect, lambda n: (learned(3, n),)),
    "compat, entmax_bisect_loss": (entmax.entmax_bisect_loss, lambda n: (learned(3, n), torch.tensor([1, 0, 2]))),
    "compat, adasplash": (lambda *given: adasplash.adasplash(*given, is_causal=True), heads),
}


def graphs(function, calls, dynamic, **options):
    """How many graphs the calls make, each checked against the function itself, gradients too."""
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, **options)
    for given in calls:
        results = [with_gradients(run, given) for run in (compiled, function)]
        torch.testing.assert_close(*results, equal_nan=True)
    return counters["stats"]["unique_graphs"]


def with_gradients(function, given):
    out = function(*given)
    first = out[0] if isinstance(out, tuple) else out
    leaves = [t for t in given if isinstance(t, torch.Tensor) and t.requires_grad]
    return out, torch.autograd.grad(first.square().sum(), leaves) if leaves and first.requires_grad else ()


@pytest.mark.sampled(12)
@pytest.mark.parametrize("name", CALLS)
def test_one_graph_serves_all_lengths(name):
    """Attention made one per number of tiles, the row module refused its own alpha, decoding broke into seven."""
    function, arguments = CALLS[name]
    assert graphs(function, [arguments(n) for n in LENGTHS], dynamic=True, backend="aot_eager") == 1


@pytest.mark.parametrize("name", ["attention", "decode, append"])
def test_the_second_length_makes_the_second_graph_and_the_last(name):
    function, arguments = CALLS[name]
    assert graphs(function, [arguments(n) for n in LENGTHS], dynamic=None, backend="aot_eager") == 2


@pytest.mark.parametrize("name", ["rows", "attention"])
@pytest.mark.parametrize("mode", ["no_grad", "autocast"])
def test_one_graph_without_gradients_and_under_autocast(name, mode):
    function, arguments = CALLS[name]

    def inside(*given):
        with torch.no_grad() if mode == "no_grad" else torch.autocast("cpu", torch.bfloat16):
            return function(*given)

    assert graphs(inside, [arguments(n) for n in LENGTHS], dynamic=True, backend="aot_eager") == 1


ENDS = (*torch.tensor([[0, 1, 5]] * 2, dtype=torch.int32), 4, 4)
NUMBERS = {
    "scale": lambda q, k, v, number: attention(q, k, v, scale=number),
    "softcap": lambda q, k, v, number: attention(q, k, v, softcap=number),
    "alpha": lambda q, k, v, number: attention(q, k, v, alpha=number),
    "dropout_p": lambda q, k, v, number: attention(q, k, v, dropout_p=number) * 0,
    "alpha of rows": lambda q, k, v, number: diffmax_bisect(q, number) + 0 * (k + v),
    "scale of varlen": lambda q, k, v, number: attention_varlen(
        *(t[0].transpose(0, 1) for t in (q, k, v)), *ENDS, scale=number
    ),
    "alpha of a loss": lambda q, k, v, number: diffmax_loss(q[0, :, 0] + 0 * (k + v)[0, :, 0], torch.tensor([1, 0]), number),
    "softmax_scale": lambda q, k, v, number: decode(*(t.detach() for t in (q, k, v)), None, None, None, softmax_scale=number)[
        0
    ],
}


def of_torch(q, k, v, number):
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=number)


@pytest.mark.parametrize("name", [*NUMBERS, "torch"])
def test_numbers_that_are_arguments_make_a_graph_each_as_with_torchs_attention(name):
    """A scale that is known at run time alone was refused: Dynamo cannot ask whether it is finite."""
    calls = [(*heads(5), number) for number in (0.5, 0.6)]
    function = of_torch if name == "torch" else NUMBERS[name]
    assert graphs(function, calls, dynamic=None, backend="aot_eager") == 2


@pytest.mark.parametrize("name", [*NUMBERS, "torch"])
def test_torch_refuses_numbers_that_come_out_of_a_tensor(name):
    torch._dynamo.reset()
    function = of_torch if name == "torch" else NUMBERS[name]
    compiled = torch.compile(lambda *given: function(*given[:3], given[3].item()), fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(capture_scalar_outputs=True), pytest.raises(Exception, match="data-dependent expression"):
        compiled(*heads(5), torch.tensor(0.5))


@pytest.mark.parametrize("name", ["scale", "softcap"])
def test_wrong_numbers_are_refused_in_eager_calls(name):
    with pytest.raises(ValueError, match="finite"):
        NUMBERS[name](*heads(3), math.inf)


@pytest.mark.parametrize("name", ["decode", "decode, append", "attention", "varlen", "lazy"])
def test_the_default_backend(name):
    """Inductor failed on decoding: asking for a tangent left an alias in its graph."""
    function, arguments = CALLS[name]
    assert graphs(function, [arguments(n) for n in LENGTHS[:2]], dynamic=True) == 1


def test_looking_for_tangents_leaves_nothing_in_a_traced_graph():
    from torch.fx.experimental.proxy_tensor import make_fx

    graph = make_fx(lambda x: diffmax_bisect(x, 0.5))(torch.randn(3))
    assert [node.target for node in graph.graph.nodes if "alias" in str(node.target)] == []
    assert "bisect" in graph.code
