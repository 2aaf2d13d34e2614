"""Weights of attention as sparse lists: equal to dense ones in float64 and to entmax's, and never in memory as a map."""

import pickle
from itertools import pairwise

import pytest
import torch
from entmax import entmax_bisect
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

import diffmax
from benchmarks import bench_weights
from benchmarks.memory import peak_bytes
from diffmax import attention, attention_varlen
from diffmax.nn._multihead import only_weights
from diffmax.operators.attention.call import Options, build_call
from diffmax.testing.attention.cases import CASES
from diffmax.testing.gate import gates, reordered

inf, nan = torch.inf, torch.nan
DEFAULTS = Options(0.0, False, None, True, 0.9, None, None, 0.0, None)
BACKENDS = ["reference", "cpu", "numba"]


def dense(query, key, value, attn_mask=None, causal_alignment="upper_left", **options):
    """The weights as one tensor, unfused, the sink's behind the keys'; in float64 the truth."""
    if attn_mask is not None and attn_mask.is_floating_point():
        attn_mask = attn_mask.to(query.dtype)
    q, k, _, call = build_call(query, key, value, attn_mask, DEFAULTS._replace(**options), causal_alignment)
    return only_weights(q, k, call, "reference")


def whole(weights):
    full = weights.to_dense()
    return full if weights.sink is None else torch.cat([full, weights.sink.unsqueeze(-1)], -1)


def check_form(weights):
    assert weights.offsets[0] == 0
    assert weights.offsets[-1] == len(weights.indices) == len(weights.values)
    assert (weights.offsets.diff() >= 0).all()
    assert (weights.values != 0).all()
    same_query = weights.rows().diff() == 0
    assert (weights.indices.diff()[same_query] > 0).all()
    assert len(weights.offsets) == 1 + torch.Size(weights.shape[:-1]).numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.sampled(12)
def test_every_rule_of_the_scores_against_float64(name, dtype):
    case = CASES[name]
    given = case.inputs(dtype) | {k: v for k, v in case.options.items() if k != "dropout_p"}
    out, weights = attention(**given, enable_gqa=True, return_weights="sparse")
    tensors = [given.pop(tensor) for tensor in ("query", "key", "value")]
    assert torch.equal(out, attention(*tensors, **given, enable_gqa=True))
    check_form(weights)
    (gate,) = gates(lambda q, k, v: dense(q, k, v, **given), *tensors)
    found = whole(weights).double()
    assert (found - gate.exact).abs().max() <= gate.allowed
    keys, value = found.shape[-1] - case.sink, tensors[2].repeat_interleave(case.heads // case.kv_heads, 1)
    sums, seen = found.sum(-1), gate.exact.sum(-1) > 0.5
    assert (sums[~seen] == 0).all()
    assert (sums[seen] - 1).abs().max() <= reordered(case.keys, sums, weights.values.dtype)
    (of_out,) = gates(lambda v: gate.exact.to(v.dtype)[..., :keys] @ v, value)
    size = value.double().abs().max()
    assert (found[..., :keys] @ value.double() - out.double()).abs().max() <= of_out.allowed + 2 * gate.allowed * keys * size


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.9])
def test_against_entmax(backend, alpha):
    query, key, value = torch.randn(3, 2, 2, 30, 8, dtype=torch.float64).mul(2).unbind()
    _, weights = attention(query, key, value, alpha=alpha, return_weights="sparse", backend=backend)
    scores = query @ key.mT / 8**0.5
    wanted = entmax_bisect(scores, alpha=2 - alpha, n_iter=100)
    assert (weights.to_dense() - wanted).abs().max() < 1e-12
    assert torch.equal(weights.supports(), (weights.to_dense() != 0).sum(-1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_backends_agree_where_scores_are_large(backend):
    query, key, value = torch.randn(3, 1, 2, 70, 32).mul(20).unbind()
    _, weights = attention(query, key, value, alpha=0.5, return_weights="sparse", backend=backend)
    (gate,) = gates(lambda q, k, v: dense(q, k, v, alpha=0.5), query, key, value)
    assert (weights.to_dense() - gate.exact).abs().max() <= gate.allowed


def test_softmax_lists_every_key_that_is_seen():
    query, key, value = torch.randn(3, 1, 2, 40, 8).unbind()
    alpha = torch.tensor([1.0, 0.0])  # softmax, and sparsemax
    _, weights = attention(query, key, value, is_causal=True, alpha=alpha, return_weights="sparse")
    softmax = (query @ key.mT / 8**0.5).masked_fill(torch.ones(40, 40).triu(1).bool(), -inf).softmax(-1)
    assert torch.equal(weights.supports()[0, 0], torch.arange(1, 41))
    assert torch.allclose(weights.to_dense()[0, 0], softmax[0, 0], atol=1e-6)
    assert weights.supports()[0, 1].double().mean() < 10


def with_inf(query, key):
    query[0, 0].abs_()
    key[0, 0, 2] = inf


NASTY = {
    "a key of NaN": lambda q, k: k[1, :, 3, :].fill_(nan),
    "a query of NaN": lambda q, k: q[..., 5, :].fill_(nan),
    "a score of inf": with_inf,
    "tied": lambda q, k: k.fill_(1.0),
    "huge": lambda q, k: q.mul_(1e18),
    "tiny": lambda q, k: q.mul_(1e-30),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("spoil", NASTY.values(), ids=NASTY)
def test_nasty_scores(spoil, backend):
    query, key, value = torch.randn(3, 2, 2, 20, 8).unbind()
    key, query = key.contiguous(), query.contiguous()
    spoil(query, key)
    mask = torch.rand(20, 20) < 0.7
    mask[4] = False
    out, weights = attention(query, key, value, mask, alpha=0.5, return_weights="sparse", backend=backend)
    check_form(weights)
    broken, full = out.isnan().any(-1), weights.to_dense()
    assert torch.equal(broken, full.isnan().any(-1))
    seen = mask.expand_as(full)
    assert torch.equal(full[broken].isnan(), seen[broken])
    assert (full[~seen] == 0).all()
    sums = full.sum(-1)[~broken & mask.any(-1)]
    assert len(sums)
    assert (sums - 1).abs().max() < 1e-6


@pytest.mark.parametrize("shape", [(0, 2, 3, 5), (2, 0, 3, 5), (2, 2, 0, 5), (2, 2, 3, 0), (1, 1, 1, 1)])
def test_nothing_to_see(shape):
    batch, heads, length, keys = shape
    query, key = torch.randn(batch, heads, length, 4), torch.randn(batch, heads, keys, 4)
    out, weights = attention(query, key, key, return_weights="sparse", sink=torch.zeros(heads))
    check_form(weights)
    assert weights.to_dense().shape == shape
    assert out.shape == query.shape
    assert weights.sink.shape == shape[:-1]
    assert torch.allclose(weights.to_dense().sum(-1) + weights.sink, torch.ones(shape[:-1]))
    assert len(list(weights.heads())) == batch * heads


@pytest.mark.parametrize("leading", [(), (2,), (2, 1, 3)])
def test_other_numbers_of_dimensions(leading):
    query, key = torch.randn(*leading, 6, 8), torch.randn(*leading, 9, 8)
    out, weights = attention(
        query, key, key, alpha=0.5, sink=torch.zeros(leading[-1] if leading else 1), return_weights="sparse"
    )
    assert weights.shape == (*leading, 6, 9)
    assert weights.sink.shape == (*leading, 6)
    assert torch.allclose(weights.to_dense() @ key, out, atol=1e-5)


@pytest.mark.parametrize("bias", [causal_lower_right, causal_upper_left])
def test_a_causal_bias_of_torch(bias):
    query, key = torch.randn(1, 2, 6, 8), torch.randn(1, 2, 9, 8)
    out, weights = attention(query, key, key, bias(6, 9), alpha=0.5, return_weights="sparse")
    assert torch.allclose(weights.to_dense() @ key, out, atol=1e-5)
    assert (weights.to_dense().triu(4 if bias is causal_lower_right else 1) == 0).all()


def test_under_autocast():
    query, key, value = torch.randn(3, 1, 2, 30, 8).unbind()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, weights = attention(query, key, value, alpha=0.5, return_weights="sparse")
    _, wanted = attention(*(t.bfloat16() for t in (query, key, value)), alpha=0.5, return_weights="sparse")
    assert out.dtype == torch.bfloat16
    assert torch.equal(weights.to_dense(), wanted.to_dense())


def test_the_benchmark_checks_and_measures():
    rows = bench_weights.run_case(bench_weights.cells(quick=True)[1], 1)
    assert [(row["weights"], row["correct"]) for row in rows] == [("without", True), ("with", True)]
    assert rows[1]["lists_bytes"] < rows[1]["map_bytes"]
    assert "| 256 | 1.0 | 0.5 |" in bench_weights.table(rows)


def test_views_of_the_lists():
    query, key, value = torch.randn(3, 2, 3, 30, 8).mul(2).unbind()
    _, weights = attention(query, key, value, alpha=0.5, sink=torch.zeros(3), return_weights="sparse")
    full = weights.to_dense()
    assert torch.equal(weights.to_sparse_csr().to_dense(), full.flatten(0, 2))
    for place, head in weights.heads():
        assert torch.equal(head.to_dense(), full[place])
        assert torch.equal(head.sink, weights.sink[place])
        assert torch.equal(head.to_sparse_csr().to_dense(), full[place])
    assert [place for place, _ in weights.heads()] == [(b, h) for b in range(2) for h in range(3)]
    keys, values = weights.query(1, -1, 7)
    assert torch.equal(keys.long(), full[1, 2, 7].nonzero().squeeze(1))
    assert torch.equal(values, full[1, 2, 7, keys])
    assert torch.equal(pickle.loads(pickle.dumps(weights)).to("cpu").to_dense(), full)
    for place in ((0, 0), (0, 3, 0), (0, 0, 0, 0)):
        with pytest.raises(IndexError, match=r"the place must be an index into \(2, 3, 30\), got"):
            weights.query(*place)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
def test_packed_sequences(heads):
    query, (ends_q, ends_k) = torch.randn(12, heads[0], 8), ([0, 5, 5, 12], [0, 4, 10, 10])
    key, value = torch.randn(2, 10, heads[1], 8).unbind()
    ends = [torch.tensor(of, dtype=torch.int32) for of in (ends_q, ends_k)]
    options = {"alpha": 0.5, "is_causal": True, "sink": torch.zeros(heads[0]), "enable_gqa": True}
    out, weights = attention_varlen(query, key, value, *ends, 7, 6, **options, return_weights="sparse")
    check_form(weights)
    assert weights.shape == (heads[0], 12, 10)
    assert weights.sink.shape == (heads[0], 12)
    full = weights.to_dense()
    wide = value.repeat_interleave(heads[0] // heads[1], 1).transpose(0, 1)
    assert torch.allclose((full @ wide).transpose(0, 1), out, atol=1e-5)
    assert torch.allclose(full.sum(-1) + weights.sink, torch.ones(heads[0], 12))
    for (start, stop), (first, last) in zip(pairwise(ends_q), pairwise(ends_k), strict=True):
        one = [t.transpose(0, 1) for t in (query[start:stop], key[first:last], value[first:last])]
        _, alone = attention(*one, **options, causal_alignment="lower_right", return_weights="sparse")
        assert torch.allclose(full[:, start:stop, first:last], alone.to_dense(), atol=1e-6)
        assert full[:, start:stop].count_nonzero() == alone.to_dense().count_nonzero()


def test_memory_is_a_block_and_the_lists():
    """The map of 4 heads has 64 MB; with twice the length, four times that."""
    for length in (2048, 4096):
        query, key, value = torch.randn(3, 1, 4, length, 16).mul(3).unbind()
        call = {"alpha": 0.5}

        def with_weights(q=query, k=key, v=value, call=call):
            return attention(q, k, v, **call, return_weights="sparse")

        weights = with_weights()[1]
        lists = sum(t.numel() * t.element_size() for t in weights[:3])
        fused = peak_bytes(lambda q=query, k=key, v=value, call=call: attention(q, k, v, **call))
        assert peak_bytes(with_weights) <= fused + 4 * lists + (24 << 20) < 4 * length**2 * 4


def test_a_long_window_takes_no_memory_of_its_keys():
    query, key, value = torch.randn(3, 1, 1, 20_000, 8).unbind()
    _, weights = attention(query, key, value, alpha=0.5, window_size=(50, 0), return_weights="sparse")
    rows = weights.rows()
    assert ((rows - weights.indices >= 0) & (rows - weights.indices <= 50)).all()
    assert (weights.supports() > 0).all()


def test_the_output_has_a_gradient_and_the_weights_have_none():
    query, key, value = (t.requires_grad_() for t in torch.randn(3, 1, 2, 30, 8).unbind())
    out, weights = attention(query, key, value, alpha=torch.full((2,), 0.5, requires_grad=True), return_weights="sparse")
    assert out.requires_grad
    assert not weights.values.requires_grad
    out.sum().backward()
    again = [t.detach().clone().requires_grad_() for t in (query, key, value)]
    attention(*again, alpha=0.5).sum().backward()
    assert all(
        torch.allclose(ours.grad, theirs.grad, atol=1e-6) for ours, theirs in zip((query, key, value), again, strict=True)
    )


@pytest.mark.skipif(torch.__version__ < "2.5", reason="needs a Dynamo that breaks the graph here: pip install 'torch>=2.13'")
def test_under_torch_compile_the_graph_breaks():
    query, key, value = torch.randn(3, 1, 2, 30, 8).unbind()

    def called(q):
        out, weights = attention(2 * q, key, value, alpha=0.5, return_weights="sparse")
        return out + 1, weights

    out, weights = torch.compile(called, backend="eager")(query)
    wanted, wanted_weights = called(query)
    assert torch.allclose(out, wanted, atol=1e-6)
    assert torch.equal(weights.indices, wanted_weights.indices)
    torch._dynamo.reset()  # it keeps that attention broke a graph, and would not make a whole one of it in a later test


X = torch.randn(1, 2, 5, 8)
ENDS = torch.tensor([0, 5], dtype=torch.int32)
REFUSED = {
    "another word": (lambda: attention(X, X, X, return_weights=True), ValueError, '"sparse" or None, got True'),
    "stats": (lambda: attention(X, X, X, return_stats=True, return_weights="sparse"), ValueError, r"got both\n.*\.supports"),
    "dropout": (lambda: attention(X, X, X, dropout_p=0.1, return_weights="sparse"), ValueError, "got dropout_p 0.1\npass"),
    "all dropped": (lambda: attention(X, X, X, dropout_p=1.0, return_weights="sparse"), ValueError, "got dropout_p 1.0"),
    "vmap": (
        lambda: torch.func.vmap(lambda q: attention(q, q, q, return_weights="sparse")[0])(X),
        NotImplementedError,
        r"torch\.func transforms.*\n.*outside",
    ),
    "trace": (
        lambda: torch.jit.trace(lambda q: attention(q, q, q, return_weights="sparse")[0], (X,)),
        NotImplementedError,
        "in a traced graph",
    ),
    "meta": (lambda: attention(*[X.to("meta")] * 3, return_weights="sparse"), NotImplementedError, "got device meta"),
    "nested": (
        lambda: attention(*[torch.nested.nested_tensor([X[0]], layout=torch.jagged)] * 3, return_weights="sparse"),
        NotImplementedError,
        "got a nested tensor\nfor nested tensors call attention_varlen",
    ),
    "slopes of sequences": (
        lambda: attention_varlen(
            *[X[0].transpose(0, 1)] * 3, ENDS, ENDS, 5, 5, alibi_slopes=torch.ones(1, 2), return_weights="sparse"
        ),
        NotImplementedError,
        r"shape \(H,\), got \(1, 2\)\ncall attention for each",
    ),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name):
    call, error, words = REFUSED[name]
    with pytest.raises(error, match=words):
        call()


def test_explain_takes_the_argument():
    assert "numba" in str(diffmax.explain("attention", X, X, X, return_weights="sparse"))
