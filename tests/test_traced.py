"""Graphs that leave Python: torch.jit.trace, ONNX by either exporter, torch.fx. They run at other sizes than those traced."""

import io
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn

import diffmax
from diffmax import (
    DiffmaxBisectModule,
    DiffmaxLoss,
    HillMap,
    attention,
    attention_varlen,
    attention_with_kvcache,
    diffmax_bisect,
    diffmax_loss,
    lazy_attention,
    threshold_attention,
)
from diffmax.compat import adasplash, entmax
from diffmax.nn import (
    AdaptiveLengthScale,
    AffineScale,
    ASEntmax,
    DiffAttention,
    DiffAttentionV2,
    DiffmaxAttention,
    Elastic,
    HeadGate,
    LazyAttention,
    LengthScale,
    PowerAttention,
    RelativePositionBias,
    Sink,
)
from diffmax.operators.common import portable

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated:DeprecationWarning"),
]

SLOPES, SINK, ALPHAS = torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.zeros(4), torch.tensor([0.3, 0.5, 0.9, 1.0])
LAZY_BIAS = torch.randn(4, 5, generator=torch.Generator().manual_seed(5))


def learned(*shape):
    return torch.randn(shape, requires_grad=True)


def masked_rows(b, n):
    """Rows with hidden scores, among them one that is all hidden."""
    x = 3 * torch.randn(b, 4, n)
    x[:, 1, ::2], x[:, 2] = -torch.inf, -torch.inf
    return (x.requires_grad_(),)


def heads(b, n):
    return learned(b, 4, n, 8), learned(b, 2, n, 8), learned(b, 2, n, 8)


def packed(b, n):
    ends = torch.tensor([0, n // 3, n], dtype=torch.int32)
    return learned(n, 4, 8), learned(n, 2, 8), learned(n, 2, 8), ends


def cached(b, n):
    return torch.randn(b, 1, 4, 8), torch.randn(b, n, 2, 8), torch.randn(b, n, 2, 8), torch.arange(1, b + 1, dtype=torch.int32)


def attend(*given, **options):
    return attention(*given, enable_gqa=True, **options)


MODULE = DiffmaxAttention(16, 4, 2, alpha=0.8, alpha_map=HillMap(0.5), sink="learned", head_gate=True, length_scale=True).eval()

CALLS = {
    "rows": (lambda x: diffmax_bisect(x, 0.5), masked_rows),
    "rows, dim 1": (lambda x: diffmax_bisect(x, 0.9, 1), lambda b, n: (learned(b, 5, n),)),
    "rows, softmax": (lambda x, alpha: diffmax_bisect(x, alpha), lambda b, n: (*masked_rows(b, n), torch.tensor(1.0))),
    "rows, an alpha per head": (
        lambda x, alpha: diffmax_bisect(x, alpha),
        lambda b, n: (*masked_rows(b, n), ALPHAS.view(4, 1).clone().requires_grad_()),
    ),
    "rows, float64": (lambda x: diffmax_bisect(x, 0.7), lambda b, n: (learned(b, n).detach().double().requires_grad_(),)),
    "rows, bfloat16": (lambda x: diffmax_bisect(x, 0.7), lambda b, n: (torch.randn(b, n).bfloat16(),)),
    "rows, float16": (lambda x: diffmax_bisect(x, 0.7), lambda b, n: (torch.randn(b, n).half(),)),
    "rows, module": (DiffmaxBisectModule(torch.full((4, 1), 0.8), alpha_map=HillMap(0.5)), masked_rows),
    "attention": (lambda *qkv: attend(*qkv, is_causal=True), heads),
    "attention, last queries": (
        lambda q, k, v: attend(q[:, :, -3:], k, v, is_causal=True, causal_alignment="lower_right", window_size=(5, 0)),
        heads,
    ),
    "attention, options": (
        lambda *qkv: attend(*qkv, window_size=(3, 2), softcap=2.0, alibi_slopes=SLOPES, sink=SINK, alpha=ALPHAS),
        heads,
    ),
    "attention, mask": (attend, lambda b, n: (*heads(b, n), torch.rand(b, 1, n, n) < 0.5)),
    "attention, bias": (attend, lambda b, n: (*heads(b, n), learned(n, n))),
    "attention, float16": (attend, lambda b, n: tuple(t.detach().half() for t in heads(b, n))),
    "attention, module": (MODULE, lambda b, n: (learned(b, n, 16),)),
    "varlen": (
        lambda q, k, v, ends: attention_varlen(
            q, k, v, ends, ends, 30, 30, enable_gqa=True, is_causal=True, alibi_slopes=SLOPES, window_size=(5, 0)
        ),
        packed,
    ),
    "lazy": (lambda *qkv: lazy_attention(*qkv, LAZY_BIAS, -0.5), heads),
    "lazy, diffmax, padding": (
        lambda q, k, v, mask: lazy_attention(q, k, v, LAZY_BIAS, -0.5, attn_mask=mask, weights="diffmax", alpha=ALPHAS),
        lambda b, n: (*heads(b, n), torch.rand(b, 1, 1, n) < 0.8),
    ),
    "threshold, window": (lambda *qkv: threshold_attention(*qkv, 0.02, weights="softmax", window_size=(4, 0)), heads),
    "loss": (lambda x, y: diffmax_loss(x, y, 0.5), lambda b, n: (learned(n, 9), torch.randint(9, (n,)))),
    "loss, an alpha": (
        lambda x, y, alpha: diffmax_loss(x, y, alpha, ignore_index=3),
        lambda b, n: (learned(n, 9), torch.randint(9, (n,)), torch.tensor(0.6, requires_grad=True)),
    ),
    "loss of probabilities": (
        DiffmaxLoss(0.5, reduction="none"),
        lambda b, n: (learned(n, 9), torch.randn(n, 9).softmax(1)),
    ),
    "decode": (
        lambda q, k, v, lengths: attention_with_kvcache(q, k, v, cache_seqlens=lengths, causal=True, window_size=(4, 0)),
        cached,
    ),
    "decode, full cache": (attention_with_kvcache, lambda b, n: cached(b, n)[:3]),
}
DTYPES_OF_JIT_ALONE = {"rows, bfloat16"}  # onnxruntime takes no NumPy array of it


class Model(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *given):
        return self.function(*given)


def copies(given):
    return [t.detach().clone().requires_grad_(t.requires_grad) for t in given]


def close(result, expected):
    """As near as two orders of summation."""
    eps = torch.finfo(expected.dtype).eps
    torch.testing.assert_close(result, expected, rtol=32 * eps, atol=32 * eps)


# --- torch.jit.trace ------------------------------------------------------------------------------------------------------


def saved_and_loaded(function, given):
    traced = torch.jit.trace(function, tuple(copies(given)))
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    return torch.jit.load(file)


@pytest.mark.sampled(9)
@pytest.mark.parametrize("name", CALLS)
def test_jit_trace(name):
    """It held a Python function where a gradient was required, and could not be saved."""
    function, arguments = CALLS[name]
    loaded = saved_and_loaded(function, arguments(2, 9))
    assert "diffmax::" not in str(loaded.inlined_graph)
    ours, exact = copies(given := arguments(3, 23)), copies(given)
    result, expected = loaded(*ours), function(*exact)
    close(result, expected)
    leaves = [[t for t in some if t.requires_grad] for some in (ours, exact)]
    if leaves[0]:
        g = torch.randn_like(expected)
        gradients = [torch.autograd.grad(t, some, g) for t, some in zip((result, expected), leaves, strict=True)]
        for of_ours, of_exact in zip(*gradients, strict=True):
            close(of_ours, of_exact)


def test_jit_trace_of_what_requires_no_gradient_has_gradients_all_the_same():
    with torch.no_grad():
        loaded = saved_and_loaded(lambda x: diffmax_bisect(x, 0.6), (torch.randn(2, 5),))
    x, g = torch.randn(4, 40, requires_grad=True), torch.randn(4, 40)
    close(torch.autograd.grad(loaded(x), x, g)[0], torch.autograd.grad(diffmax_bisect(x, 0.6), x, g)[0])


def test_second_derivatives_of_a_traced_graph():
    loaded = saved_and_loaded(lambda x: diffmax_bisect(x, 0.6), (torch.randn(5).double(),))
    x = torch.randn(7, dtype=torch.float64)
    hessians = [
        torch.autograd.functional.hessian(lambda x, f=f: f(x).square().sum(), x)
        for f in (loaded, lambda x: diffmax_bisect(x, 0.6))
    ]
    torch.testing.assert_close(*hessians)


@pytest.mark.slow
def test_a_traced_graph_runs_where_diffmax_is_not(tmp_path):
    torch.jit.save(torch.jit.trace(MODULE, (torch.randn(1, 5, 16),)), tmp_path / "m.pt")
    code = "import sys, torch; torch.jit.load(sys.argv[1])(torch.randn(2, 9, 16)); print('diffmax' in sys.modules)"
    command = [sys.executable, "-W", "ignore", "-c", code, tmp_path / "m.pt"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "False\n"


def test_jit_trace_of_decoding_writes_into_the_caches():
    def append(q, k_cache, v_cache, lengths, k):
        return attention_with_kvcache(q, k_cache, v_cache, k, k, cache_seqlens=lengths, causal=True)

    loaded = saved_and_loaded(append, (*cached(2, 9), torch.randn(2, 1, 2, 8)))
    ours, exact = copies(given := (*cached(3, 23), torch.randn(3, 1, 2, 8))), copies(given)
    close(loaded(*ours), append(*exact))
    assert torch.equal(ours[1], exact[1])
    assert not torch.equal(ours[1], given[1])


def test_traced_rows_that_hold_nan_or_infinity_are_nan():
    loaded = saved_and_loaded(lambda x: diffmax_bisect(x, 0.6), (torch.randn(2, 5),))
    rows = loaded(torch.tensor([[1.0, torch.nan, 0.0], [torch.inf, 0.0, 0.0], [1.0, 0.0, -torch.inf]]))
    assert rows.isnan().all(1).tolist() == [True, True, False]


def test_long_rows_are_solved_by_the_steps_of_a_traced_graph():
    """The number of steps is the graph's, so it is that of the longest row, not of the row that was traced."""
    loaded = saved_and_loaded(lambda x, alpha: diffmax_bisect(x, alpha), (torch.randn(2, 5), torch.tensor(0.01)))
    x = torch.rand(2, 100_000) * 1e-3
    close(loaded(x, torch.tensor(0.01)), diffmax_bisect(x, torch.tensor(0.01)))


def test_errors_say_numbers_while_tracing():
    with pytest.raises(ValueError, match=r"got 4 and 3\n.*query \(1, 2, 3, 4\)"):
        torch.jit.trace(lambda q, k: attention(q, k, k), (torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3, 3)))


def test_dropout_of_packed_sequences_is_refused_while_tracing():
    with pytest.raises(NotImplementedError, match=r"dropout_p must be 0 .*\n.*eval"):
        torch.jit.trace(
            lambda q, k, v, ends: attention_varlen(q, k, v, ends, ends, 9, 9, dropout_p=0.5, enable_gqa=True), packed(1, 9)
        )


def test_statistics_are_refused_while_tracing():
    q = torch.randn(1, 2, 5, 4)
    with pytest.raises(NotImplementedError, match=r"return_stats must be False .*\nask"):
        torch.jit.trace(lambda q: attention(q, q, q, return_stats=True)[0], (q,))


def test_statistics_of_decoding_are_traced():
    def attend_and_count(q, k_cache, v_cache, lengths):
        out, stats = attention_with_kvcache(q, k_cache, v_cache, cache_seqlens=lengths, return_stats=True)
        return out, stats.tau, stats.support_size, stats.pages_read

    loaded, others = saved_and_loaded(attend_and_count, cached(2, 9)), cached(3, 150)
    *ours, pages = loaded(*others)
    for result, expected in zip(ours, attend_and_count(*others), strict=False):
        torch.testing.assert_close(result, expected)
    assert pages.tolist() == [[3, 3]] * 3  # the graph reads the whole cache


def test_dropout_while_tracing_drops_anew_in_every_call():
    few = tuple(t.detach() for t in heads(1, 5))
    loaded = torch.jit.trace(lambda *qkv: attend(*qkv, dropout_p=0.5), few, check_trace=False)
    given = [t.detach() for t in heads(2, 40)]
    assert not torch.equal(loaded(*given), loaded(*given))


# --- ONNX -----------------------------------------------------------------------------------------------------------------


def onnx(model, given, **options):
    """The file that torch.onnx.export makes. Of its warnings those count that say that a traced number is a constant."""
    pytest.importorskip("onnxscript", reason="needs onnx and onnxscript")
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", torch.jit.TracerWarning)
        torch.onnx.export(model, tuple(given), file, **options)
    return file.getvalue()


def in_onnxruntime(model, others):
    """What onnxruntime makes of `others`."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnxruntime")
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    inputs = zip(session.get_inputs(), others, strict=True)
    return torch.from_numpy(session.run(None, {put.name: t.detach().numpy() for put, t in inputs})[0])


def changing(given, others):
    """The dimensions that differ, by argument."""
    pairs = [zip(a.shape, b.shape, strict=True) for a, b in zip(given, others, strict=True)]
    return [{place: f"n{a}" for place, (a, b) in enumerate(pair) if a != b} for pair in pairs]


@pytest.mark.sampled(9)
@pytest.mark.parametrize("name", sorted(set(CALLS) - DTYPES_OF_JIT_ALONE))
def test_onnx_by_the_older_exporter(name):
    """There was no translation of our operators."""
    function, arguments = CALLS[name]
    given, others = arguments(2, 9), arguments(3, 23)
    names = [f"x{n}" for n in range(len(given))]
    axes = dict(zip(names, changing(given, others), strict=True))
    model = onnx(Model(function).eval(), given, dynamo=False, input_names=names, dynamic_axes=axes)
    close(in_onnxruntime(model, others), function(*others))


newer_exporter = pytest.mark.skipif(not hasattr(torch.library, "infer_schema"), reason="needs torch 2.5: its exporter")


def together(*given):
    """One graph of everything, as each export takes seconds."""
    results, given = [], list(given)
    for name in TOGETHER:
        function, count = CALLS[name][0], len(CALLS[name][1](2, 9))
        results.append(function(*given[:count]).flatten())
        del given[:count]
    return torch.cat(results)


TOGETHER = ("attention, options", "varlen", "loss", "decode")


@pytest.fixture
def few_steps(monkeypatch):
    """Enough for short rows; the newer exporter takes its time for every operator."""
    monkeypatch.setattr(portable, "newton_steps", lambda *_: 6)


def dynamic(given, others):
    sizes = {}
    return tuple(
        {place: sizes.setdefault(size, torch.export.Dim(size, min=2, max=4096)) for place, size in axes.items()}
        for axes in changing(given, others)
    )


@pytest.mark.slow
@newer_exporter
@pytest.mark.usefixtures("few_steps")
def test_onnx_by_the_newer_exporter():
    function, arguments = CALLS["rows"]
    given, others = arguments(2, 9), arguments(3, 23)
    model = onnx(Model(function).eval(), given, dynamo=True, dynamic_shapes=(dynamic(given, others),), verbose=False)
    close(in_onnxruntime(model, others), function(*others))


@newer_exporter
@pytest.mark.usefixtures("few_steps")
@pytest.mark.slow
def test_onnx_of_an_exported_program():
    """Its operators are taken apart where the exporter decomposes the graph."""
    given, others = ([t for name in TOGETHER for t in CALLS[name][1](*sizes)] for sizes in ((2, 9), (3, 23)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = torch.export.export(Model(together).eval(), tuple(given), dynamic_shapes=(dynamic(given, others),))
    for name in ("attention", "attention_kvcache", "loss"):
        assert f"torch.ops.diffmax.{name}.default" in exported.graph_module.code
    close(in_onnxruntime(onnx(exported, (), dynamo=True, verbose=False), others), together(*others))


def test_onnx_refuses_to_append_to_a_cache():
    model = Model(
        lambda q, k_cache, v_cache, lengths, k: attention_with_kvcache(q, k_cache, v_cache, k, k, cache_seqlens=lengths)
    )
    with pytest.raises(NotImplementedError, match="an ONNX graph cannot change the caches"):
        onnx(model, (*cached(2, 9), torch.randn(2, 1, 2, 8)), dynamo=False)


# --- torch.fx -------------------------------------------------------------------------------------------------------------


class Holder1(nn.Module):
    def __init__(self, part):
        super().__init__()
        self.part = part

    def forward(self, a):
        return self.part(a)


class Holder2(Holder1):
    def forward(self, a, b):
        return self.part(a, b)


class Holder3(Holder1):
    def forward(self, a, b, c):
        return self.part(a, b, c)


def named(function, count):
    """The function with so many named arguments, which torch.fx wants."""
    return [
        None,
        lambda a: function(a),
        lambda a, b: function(a, b),
        lambda a, b, c: function(a, b, c),
        lambda a, b, c, d: function(a, b, c, d),
    ][count]


@pytest.mark.parametrize("name", [name for name, (function, _) in CALLS.items() if not isinstance(function, nn.Module)])
def test_fx_sees_one_step(name):
    """Our checks asked a proxy whether it was a tensor."""
    function, arguments = CALLS[name]
    given = arguments(3, 23)
    graph = torch.fx.symbolic_trace(named(function, len(given)))
    targets = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    assert len([target for target in targets if target.__module__.startswith("diffmax")]) == 1
    assert torch.equal(graph(*given), function(*given))


def scores(b, n):
    return (torch.randn(b, n),)


def labelled(b, n):
    return torch.randn(b, n), torch.arange(b)


ACTIVATIONS = ("sparsemax", "entmax15", "entmax_bisect", "sparsemax_bisect", "normmax_bisect", "budget_bisect")
LOSSES = ("sparsemax_loss", "entmax15_loss", "entmax_bisect_loss", "sparsemax_bisect_loss", "normmax_bisect_loss")
LOSS_MODULES = ("SparsemaxLoss", "Entmax15Loss", "EntmaxBisectLoss", "SparsemaxBisectLoss", "NormmaxBisectLoss")
COMPAT = {
    **{name: (getattr(entmax, name), scores) for name in ACTIVATIONS},
    **{name: (getattr(entmax, name), labelled) for name in LOSSES},
    **{name: (getattr(entmax, name)(), labelled) for name in LOSS_MODULES},
    "EntmaxBisect": (entmax.EntmaxBisect(nn.Parameter(torch.tensor(1.3))), scores),
    "adasplash": (adasplash.adasplash, lambda b, n: tuple(torch.randn(3, b, 2, n, 4))),
    "triton_entmax": (adasplash.triton_entmax, scores),
}


@pytest.mark.parametrize("name", COMPAT)
def test_fx_sees_one_step_of_other_packages_names(name):
    function, arguments = COMPAT[name]
    given = arguments(3, 23)
    graph = torch.fx.symbolic_trace(function if isinstance(function, nn.Module) else named(function, len(given)))
    assert len([node for node in graph.graph.nodes if node.op == "call_function"]) == 1
    assert torch.equal(graph(*given), function(*given))


@pytest.mark.parametrize("name", ["entmax_bisect", "entmax15_loss", "EntmaxBisect", "adasplash"])
def test_jit_trace_of_other_packages_names(name):
    function, arguments = COMPAT[name]
    loaded, others = saved_and_loaded(function, arguments(2, 9)), arguments(3, 23)
    close(loaded(*others), function(*others))


def test_jit_trace_takes_flags_that_come_of_sizes():
    """There sizes are tensors, and so is what they are compared to; each flag stays as it was when traced."""

    def function(q, k):
        options = {"enable_gqa": q.shape[1] != k.shape[1], "is_causal": q.shape[2] > 1}
        return attention(q, k, k, **options), diffmax.threshold_attention(q, q, q, 0.0, is_causal=q.shape[2] > 1)

    def given(tokens):
        return torch.randn(2, 4, tokens, 8), torch.randn(2, 2, tokens, 8)

    loaded, others = saved_and_loaded(function, given(9)), given(23)
    for found, wanted in zip(loaded(*others), function(*others), strict=True):
        close(found, wanted)


def test_fx_unpacks_what_has_two_results():
    def both(q):
        out, stats = attention(q, q, q, return_stats=True)
        return out, stats.tau

    x = torch.randn(1, 2, 5, 4)
    assert all(map(torch.equal, torch.fx.symbolic_trace(both)(x), both(x)))


MODULES = {
    "DiffmaxBisectModule": (DiffmaxBisectModule(torch.full((4, 1), 0.8), alpha_map=HillMap(0.5)), (torch.randn(2, 4, 5),)),
    "DiffmaxAttention": (MODULE, (torch.randn(2, 5, 16),)),
    "DiffmaxLoss": (DiffmaxLoss(0.5), (torch.randn(3, 5), torch.tensor([1, 2, 3]))),
    "DiffAttention": (DiffAttention(16, 4), (torch.randn(2, 5, 16),)),
    "DiffAttentionV2": (DiffAttentionV2(16, 4, weights="diffmax"), (torch.randn(2, 5, 16),)),
    "ASEntmax": (ASEntmax(16, 4), (torch.randn(2, 4, 5, 5), torch.randn(2, 5, 16))),
    "AdaptiveLengthScale": (AdaptiveLengthScale(16, 4), (torch.randn(2, 4, 5, 5), torch.randn(2, 5, 16), 5)),
    "AffineScale": (AffineScale(16, 4).eval(), (*torch.randn(2, 2, 4, 5, 5), torch.randn(2, 5, 16))),
    "Elastic": (Elastic(DiffmaxBisectModule(0.5), 4), (torch.randn(2, 4, 5, 5),)),
    "HeadGate": (HeadGate(16, 4), (torch.randn(2, 4, 5, 5), torch.randn(2, 5, 16))),
    "LengthScale": (LengthScale(4), (torch.randn(2, 4, 5, 5), 5)),
    "LazyAttention": (LazyAttention(16, 4, window_size=3), (torch.randn(2, 5, 16),)),
    "PowerAttention": (PowerAttention(16, 4), (torch.randn(2, 5, 16),)),
    "RelativePositionBias": (RelativePositionBias(4), (5, 7)),
    "Sink": (Sink(DiffmaxBisectModule(0.5), 4), (torch.randn(2, 4, 5, 5),)),
}


def test_every_module_is_traced_by_fx():
    public = [getattr(diffmax.nn, name) for name in diffmax.nn.__all__]
    modules = {kind for kind in public if isinstance(kind, type) and issubclass(kind, torch.nn.Module)} | {DiffmaxLoss}
    assert {type(module) for module, _ in MODULES.values()} == modules


@pytest.mark.parametrize("name", MODULES)
def test_fx_of_a_model_that_holds_a_module(name):
    module, given = MODULES[name]
    graph = torch.fx.symbolic_trace((Holder1, Holder2, Holder3)[len(given) - 1](module))
    assert [node.target for node in graph.graph.nodes if node.op == "call_module"] == ["part"]
    assert torch.equal(graph(*given), module(*given))


@pytest.mark.parametrize("name", MODULES)
def test_fx_of_a_module_itself(name):
    module, given = MODULES[name]
    graph = torch.fx.symbolic_trace(module)
    assert torch.equal(graph(*given), module(*given))
    assert graph.state_dict().keys() == module.state_dict().keys()
    parameters = [p for p in graph.parameters() if graph(*given).requires_grad]
    if parameters:
        assert all(g is not None for g in torch.autograd.grad(graph(*given).sum(), parameters))
