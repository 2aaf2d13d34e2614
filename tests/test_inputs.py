"""What torch.softmax and scaled_dot_product_attention take is taken here too; what is refused, says what to write instead."""

import itertools

import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention as sdpa

import diffmax
from diffmax import (
    DiffmaxBisectModule,
    HillMap,
    attention,
    attention_varlen,
    attention_with_kvcache,
    diffmax_bisect,
    diffmax_loss,
)
from diffmax.compat import adasplash, entmax
from diffmax.nn import DiffmaxAttention

close = torch.testing.assert_close
ONE = torch.tensor(1.0)  # softmax
pytestmark = [
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype"),
    pytest.mark.sampled(7),
]


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def same_as_torch(query, key, value, **options):
    """Result and gradients of our attention at alpha = 1 and of torch's."""
    given = [t.requires_grad_() for t in (query, key, value)]
    expected, got = sdpa(*given, **options), attention(*given, **options, alpha=ONE)
    close(got, expected)
    upstream = torch.randn_like(expected)
    for a, b in zip(*(torch.autograd.grad(out, given, upstream, allow_unused=True) for out in (got, expected)), strict=True):
        close(a, torch.zeros_like(a) if b is None else b)


SHAPES = {
    "2-d": [(5, 8), (7, 8), (7, 8)],
    "3-d": [(4, 5, 8), (4, 7, 8), (4, 7, 6)],
    "5-d": [(2, 3, 4, 5, 8), (2, 3, 4, 7, 8), (2, 3, 4, 7, 6)],
    "6-d": [(2, 1, 3, 2, 5, 8), (2, 2, 3, 2, 7, 8), (1, 2, 1, 2, 7, 8)],
    "keys of one batch": [(2, 4, 5, 8), (1, 4, 7, 8), (1, 4, 7, 8)],
    "values of one batch": [(2, 4, 5, 8), (2, 4, 7, 8), (1, 4, 7, 8)],
    "query of one batch": [(1, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 8)],
    "keys of one head": [(2, 4, 5, 8), (2, 1, 7, 8), (2, 1, 7, 8)],
    "values of one head": [(2, 4, 5, 8), (2, 4, 7, 8), (2, 1, 7, 8)],
    "query of one head": [(2, 1, 5, 8), (2, 4, 7, 8), (2, 4, 7, 8)],
    "3-d keys for 4-d queries": [(2, 4, 5, 8), (4, 7, 8), (4, 7, 8)],
    "2-d keys for 4-d queries": [(2, 4, 5, 8), (7, 8), (7, 8)],
    "4-d keys for 3-d queries": [(4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 8)],
    "one head of 3-d queries": [(1, 5, 8), (4, 7, 8), (4, 7, 8)],
    "head size 0": [(2, 4, 5, 0), (2, 4, 7, 0), (2, 4, 7, 3)],
    "value size 0": [(2, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 0)],
    "no keys": [(2, 4, 5, 8), (2, 4, 0, 8), (2, 4, 0, 8)],
    "no queries": [(2, 4, 0, 8), (2, 4, 7, 8), (2, 4, 7, 8)],
    "no batch": [(0, 4, 5, 8), (0, 4, 7, 8), (0, 4, 7, 8)],
    "no heads": [(2, 0, 5, 8), (2, 0, 7, 8), (2, 0, 7, 8)],
}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_shapes_as_torchs_attention_takes_them(shapes, causal):
    same_as_torch(*(randn(*shape) for shape in shapes), is_causal=causal)


@pytest.mark.parametrize("shapes", [[(3, 4, 5, 8), (1, 2, 7, 8), (3, 2, 7, 8)], [(4, 5, 8), (2, 7, 8), (2, 7, 8)]])
def test_grouped_heads_of_other_shapes(shapes):
    query, key, value = (randn(*shape) for shape in shapes)
    repeated = [t.repeat_interleave(2, -3) for t in (key, value)]
    close(attention(query, key, value, enable_gqa=True, alpha=ONE), sdpa(query, *repeated))


@pytest.mark.skipif(torch.__version__ < "2.5", reason="needs the gradients of jagged tensors: pip install 'torch>=2.13'")
@pytest.mark.parametrize("floating", [False, True])
@pytest.mark.parametrize("lead", [(), (4,), (1,), (2, 1), (2, 4), (1, 4), (3, 2, 4), (3, 1, 1), (1, 2, 1)], ids=str)
@pytest.mark.parametrize("ends", [(5, 7), (1, 7), (5, 1), (1, 1)], ids=str)
def test_a_mask_broadcasts_in_each_dimension(lead, ends, floating):
    batch = (3, 2) if len(lead) == 3 else (2,)
    mask = randn(*lead, *ends) if floating else torch.rand(*lead, *ends) < 0.7
    if not floating and ends[1] > 1:
        mask[..., 0] = True  # torch has NaN where nothing is seen
    if not floating and ends[1] == 1:
        mask.fill_(True)
    same_as_torch(randn(*batch, 4, 5, 8), randn(*batch, 4, 7, 8), randn(*batch, 4, 7, 8), attn_mask=mask)


def test_what_comes_with_the_result_has_its_dimensions():
    for lead in ((), (4,), (2, 4), (3, 2, 4)):
        out, stats = attention(randn(*lead, 5, 8), randn(*lead, 7, 8), randn(*lead, 7, 6), alpha=0.5, return_stats=True)
        assert out.shape == (*lead, 5, 6)
        assert stats.tau.shape == stats.support_size.shape == (*lead, 5)
        assert stats.tile_sparsity.shape == lead


def test_an_alpha_per_head_of_three_dimensions():
    query, key, value = randn(3, 4, 5, 8)
    alpha = torch.tensor([0.3, 0.5, 0.7, 0.9])
    out = attention(query, key, value, alpha=alpha)
    for head in range(4):
        close(out[head], attention(query[head], key[head], value[head], alpha=float(alpha[head])))


@pytest.mark.parametrize("p", [1.0, 1])
def test_dropout_of_all_weights(p):
    same_as_torch(randn(2, 4, 5, 8), randn(2, 4, 7, 8), randn(2, 4, 7, 8), dropout_p=p)
    ends = torch.tensor([0, 5], dtype=torch.int32)
    tokens = randn(5, 4, 8).requires_grad_()
    out = attention_varlen(tokens, tokens, tokens, ends, ends, 5, 5, dropout_p=p)
    assert not out.any()
    assert not torch.autograd.grad(out.sum(), tokens)[0].any()


def test_a_module_that_drops_all_weights():
    module, x = DiffmaxAttention(16, 4, dropout=1.0), torch.randn(2, 5, 16)
    out, weights = module(x, x, x)
    assert not weights.any()
    close(out, module.out_proj.bias.expand_as(out))
    assert module.eval()(x, x, x)[1].any()


@pytest.mark.parametrize("scale", [torch.tensor(0.3), torch.tensor(0.3, dtype=torch.float64), torch.tensor(2), 2])
def test_a_scale_of_any_kind(scale):
    same_as_torch(randn(2, 4, 5, 8), randn(2, 4, 7, 8), randn(2, 4, 7, 8), scale=scale)


@pytest.mark.parametrize("wanted", [which for which in itertools.product([True, False], repeat=3) if any(which)], ids=str)
def test_gradients_for_some_of_the_inputs(wanted):
    given = [randn(2, 4, 5, 8).requires_grad_(one) for one in wanted]
    chosen = [t for t, one in zip(given, wanted, strict=True) if one]
    upstream = randn(2, 4, 5, 8)
    got, expected = (torch.autograd.grad(f(*given), chosen, upstream) for f in (lambda *t: attention(*t, alpha=ONE), sdpa))
    for a, b in zip(got, expected, strict=True):
        close(a, b)


# nested tensors

LENGTHS = [3, 1, 6]


def sequences(heads, size, lengths=LENGTHS):
    return [randn(heads, n, size).requires_grad_() for n in lengths]


def nest(parts, layout):
    if layout is torch.strided:
        return torch.nested.as_nested_tensor(parts, layout=layout)
    turned = torch.nested.as_nested_tensor([part.transpose(0, 1) for part in parts], layout=layout)
    return turned.transpose(1, 2)


def nest_all(*several, layout):
    """Those of the same lengths with the same offsets, as a projection makes them."""
    made = [nest(parts, layout) for parts in several]
    if layout is torch.jagged and all([p.shape[1] for p in several[0]] == [p.shape[1] for p in parts] for parts in several):
        offsets = made[0].transpose(1, 2).offsets()
        made = [torch.nested.nested_tensor_from_jagged(t.transpose(1, 2).values(), offsets).transpose(1, 2) for t in made]
    return made


OPTIONS = {
    "plain": {},
    "causal": {"is_causal": True},
    "causal at the lower right": {"is_causal": True, "causal_alignment": "lower_right"},
    "window": {"window_size": (1, 2)},
    "alibi": {"alibi_slopes": torch.rand(4, dtype=torch.float64)},
    "softcap and sink": {"softcap": 2.0, "sink": torch.zeros(4)},
    "per head": {"alpha": torch.tensor([0.3, 0.5, 0.7, 0.9])},
    "no dropout left": {"dropout_p": 1.0},
}


@pytest.mark.skipif(torch.__version__ < "2.5", reason="needs the gradients of jagged tensors: pip install 'torch>=2.13'")
@pytest.mark.parametrize("backend", [None, "cpu", "reference"])
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided], ids=["jagged", "strided"])
@pytest.mark.parametrize("other", [LENGTHS, [4, 2, 5], [7, 1, 1]], ids=["same lengths", "other lengths", "more other lengths"])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_nested_tensors_are_their_sequences(options, kv_heads, other, layout, backend):
    queries, keys, values = sequences(4, 8), sequences(kv_heads, 8, other), sequences(kv_heads, 6, other)
    how = {"alpha": 0.6, "enable_gqa": kv_heads != 4, "backend": backend} | options
    expected = [attention(*(t.unsqueeze(0) for t in one), **how)[0] for one in zip(queries, keys, values, strict=True)]
    key, value = nest_all(keys, values, layout=layout)
    query = nest(queries, layout)
    out = attention(query, key, value, **how)
    assert out.is_nested
    assert out.layout == layout
    parts = out.unbind()
    for part, wanted in zip(parts, expected, strict=True):
        close(part, wanted)
    inputs = (*queries, *keys, *values)
    upstream = [torch.randn_like(wanted) for wanted in expected]
    wanted = torch.autograd.grad(expected, inputs, upstream)
    for a, b in zip(torch.autograd.grad(parts, inputs, upstream), wanted, strict=True):
        close(a, b)


def test_a_jagged_result_has_the_querys_own_lengths():
    query, key, value = nest_all(*(sequences(4, 8) for _ in range(3)), layout=torch.jagged)
    out, stats = attention(query, key, value, alpha=0.5, return_stats=True)
    assert out.shape == query.shape
    assert (query + out).is_nested  # which needs the same symbol
    assert stats.tau.shape == query.shape[:3]
    for part, one in zip(stats.support_size.unbind(), query.unbind(), strict=True):
        assert part.shape == one.shape[:2]
    assert stats.tile_sparsity.shape == (4,)


def test_nested_at_alpha_one_is_torchs():
    query, key, value = nest_all(*(sequences(4, 8) for _ in range(3)), layout=torch.jagged)
    close(attention(query, key, value, alpha=ONE).values(), sdpa(query, key, value).values())


@pytest.mark.skipif(torch.__version__ < "2.5", reason="needs the gradients of jagged tensors: pip install 'torch>=2.13'")
def test_nested_sequences_with_holes_between_them():
    base, starts, lengths = randn(3, 9, 4, 8), torch.tensor([0, 2, 1]), torch.tensor([4, 3, 8])
    nested = torch.nested.narrow(base, 1, starts, lengths, layout=torch.jagged).transpose(1, 2)
    out = attention(nested, nested, nested, is_causal=True)
    for part, rows, start, length in zip(out.unbind(), base, starts.tolist(), lengths.tolist(), strict=True):
        x = rows[start : start + length].transpose(0, 1)
        close(part, attention(x, x, x, is_causal=True))


@pytest.mark.parametrize("layout", [torch.jagged, torch.strided], ids=["jagged", "strided"])
def test_nested_of_one_head(layout):
    parts = [randn(n, 8) for n in LENGTHS]
    nested = torch.nested.as_nested_tensor(parts, layout=layout)
    for part, x in zip(attention(nested, nested, nested, alpha=0.5).unbind(), parts, strict=True):
        close(part, attention(x, x, x, alpha=0.5))


def test_explain_knows_nested_and_broadcast_calls():
    query, key, value = nest_all(*(sequences(4, 8) for _ in range(3)), layout=torch.jagged)
    assert "varlen" in str(diffmax.explain("attention", query, key, value)) or diffmax.explain("attention", query, key, value)
    assert diffmax.explain("attention", randn(5, 8), randn(7, 8), randn(7, 8))


@pytest.mark.skipif(torch.__version__ < "2.5", reason="needs the gradients of jagged tensors: pip install 'torch>=2.13'")
@pytest.mark.parametrize("options", [{}, {"num_kv_heads": 2, "sink": "learned", "window_size": (2, 0)}, {"sink": "null"}])
@pytest.mark.parametrize("causal", [False, True])
def test_the_module_takes_jagged_tokens(options, causal):
    module = DiffmaxAttention(16, 4, alpha=0.6, alpha_map=HillMap(0.9), **options).double()
    parts = [randn(n, 16).requires_grad_() for n in LENGTHS]
    nested = torch.nested.as_nested_tensor(parts, layout=torch.jagged)
    expected = [module(part, is_causal=causal) for part in parts]
    out = module(nested, is_causal=causal)
    close(out.values(), torch.cat(expected))
    close(module(nested, nested, nested, is_causal=causal, need_weights=False)[0].values(), torch.cat(expected))
    inputs = (*parts, *module.parameters())
    sums = out.values().square().sum(), torch.cat(expected).square().sum()
    for a, b in zip(*(torch.autograd.grad(total, inputs) for total in sums), strict=True):
        close(a, b)


@pytest.mark.skipif(torch.__version__ < "2.5", reason="needs the gradients of jagged tensors: pip install 'torch>=2.13'")
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided], ids=["jagged", "strided"])
@pytest.mark.parametrize("dim", [-1, 1, 2, -2])
@pytest.mark.parametrize("alpha", [0.5, torch.tensor(0.5), lambda: 0.5])
def test_rows_of_nested_scores(layout, dim, alpha):
    parts = [randn(n, 4).requires_grad_() for n in LENGTHS]
    nested = torch.nested.as_nested_tensor(parts, layout=layout)
    expected = [diffmax_bisect(part, alpha, dim if dim < 0 else dim - 1) for part in parts]
    got = diffmax_bisect(nested, alpha, dim)
    assert got.layout == layout
    if layout is torch.jagged:
        assert got.shape == nested.shape
    for a, b in zip(got.unbind(), expected, strict=True):
        close(a, b)
    upstream = [torch.randn_like(t) for t in expected]
    wanted = torch.autograd.grad(expected, parts, upstream)
    for a, b in zip(torch.autograd.grad(list(got.unbind()), parts, upstream), wanted, strict=True):
        close(a, b)
    learned = DiffmaxBisectModule(0.5, dim, alpha_map=HillMap(0.9))
    close(
        torch.cat([t.flatten() for t in learned(nested).unbind()]),
        torch.cat([t.flatten() for t in expected]),
        atol=1e-6,
        rtol=1e-5,
    )


@pytest.mark.skipif(torch.__version__ < "2.5", reason="needs the gradients of jagged tensors: pip install 'torch>=2.13'")
def test_rows_of_nested_scores_with_heads_and_a_transposed_ragged_dimension():
    parts = [randn(n, 4, 5) for n in LENGTHS]
    nested = torch.nested.as_nested_tensor(parts, layout=torch.jagged).transpose(1, 2)  # (B, 4, j, 5)
    alpha = torch.tensor([0.3, 0.5, 0.7, 0.9]).view(4, 1, 1)
    for dim in (-1, 2):
        for got, part in zip(diffmax_bisect(nested, 0.5, dim).unbind(), parts, strict=True):
            close(got, diffmax_bisect(part.transpose(0, 1), 0.5, dim - 1 if dim > 0 else dim))
    close(diffmax_bisect(nested, alpha).unbind()[0], diffmax_bisect(parts[0].transpose(0, 1), alpha))


# what is refused

Q = torch.randn(2, 4, 5, 8)
ROWS = torch.randn(3, 4)
ENDS = torch.tensor([0, 2], dtype=torch.int32)
KINDS = {
    "sparse": (lambda t: t.to_sparse(), "must be a strided tensor, got layout torch.sparse_coo\nconvert it first, with"),
    "csr": (lambda t: t.flatten(1).to_sparse_csr(), "must be a strided tensor, got layout torch.sparse_csr\nconvert"),
    "bsr": (lambda t: t.flatten(1)[:2].to_sparse_bsr((1, 1)), "must be a strided tensor, got layout torch.sparse_bsr\nconvert"),
    "mkldnn": (lambda t: t.to_mkldnn(), "must be a strided tensor, got layout torch._mkldnn\nconvert it first, with"),
    "quantized": (lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8), "got qint8\n.*dequantize"),
    "complex": (lambda t: t.cfloat(), "got complex64\n.*.real"),
    "int": (lambda t: t.int(), r"got int32\n.*\.float\(\)"),
    "bool": (lambda t: t.bool(), r"got bool\n.*\.float\(\)"),
    "float8": (lambda t: t.to(torch.float8_e4m3fn), r"got float8_e4m3fn\n.*\.float\(\)"),
}
REFUSING = {
    "diffmax_bisect": lambda make: diffmax_bisect(make(ROWS)),
    "monitored": lambda make: diffmax.diffmax_bisect_monitored(make(ROWS), step=1, log=print),
    "module": lambda make: DiffmaxBisectModule(0.5, alpha_map=HillMap(0.9))(make(ROWS)),
    "loss": lambda make: diffmax_loss(make(ROWS), torch.tensor([0, 1, 2])),
    "entmax_bisect": lambda make: entmax.entmax_bisect(make(ROWS)),
    "entmax15_loss": lambda make: entmax.entmax15_loss(make(ROWS), torch.tensor([0, 1, 2])),
    "triton_entmax": lambda make: adasplash.triton_entmax(make(ROWS)),
    "adasplash": lambda make: adasplash.adasplash(make(Q), make(Q), make(Q)),
    "query": lambda make: attention(make(Q), make(Q), make(Q)),
    "key": lambda make: attention(Q, make(Q), Q),
    "value": lambda make: attention(Q, Q, make(Q)),
    "varlen": lambda make: attention_varlen(make(Q[0]), Q[0], Q[0], ENDS, ENDS, 2, 2),
    "varlen, value": lambda make: attention_varlen(Q[0], Q[0], make(Q[0]), ENDS, ENDS, 2, 2),
    "cache, q": lambda make: attention_with_kvcache(make(Q), Q, Q),
    "cache, k_cache": lambda make: attention_with_kvcache(Q, make(Q), Q),
    "cache, v_cache": lambda make: attention_with_kvcache(Q, Q, make(Q)),
    "page_bounds": lambda make: diffmax.page_bounds(make(Q), 2),
}


@pytest.mark.filterwarnings("ignore:Sparse (CSR|BSR) tensor support is in beta")
@pytest.mark.filterwarnings("ignore:.*quantiz.*")
@pytest.mark.parametrize(("make", "message"), KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("call", REFUSING.values(), ids=REFUSING)
def test_scores_that_no_kernel_can_read(call, make, message):
    with pytest.raises(TypeError, match=message):
        call(make)


BESIDES = {
    "alpha": lambda make: diffmax_bisect(ROWS, make(torch.full((3, 1), 0.5))),
    "loss, alpha": lambda make: diffmax_loss(ROWS, torch.tensor([0, 1, 2]), make(torch.full((3, 1), 0.5))),
    "loss, target": lambda make: diffmax_loss(ROWS, make(ROWS.softmax(1))),
    "loss, weight": lambda make: diffmax_loss(ROWS, torch.tensor([0, 1, 2]), weight=make(torch.rand(4))),
    "attention, alpha": lambda make: attention(Q, Q, Q, alpha=make(torch.full((4,), 0.5))),
    "attention, attn_mask": lambda make: attention(Q, Q, Q, make(torch.zeros(5, 5))),
    "attention, sink": lambda make: attention(Q, Q, Q, sink=make(torch.zeros(4))),
    "attention, slopes": lambda make: attention(Q, Q, Q, alibi_slopes=make(torch.ones(4))),
    "varlen, cu_seqlens": lambda make: attention_varlen(Q[0], Q[0], Q[0], make(ENDS), ENDS, 2, 2),
    "cache, cache_seqlens": lambda make: attention_with_kvcache(
        Q, Q, Q, cache_seqlens=make(torch.tensor([1, 2], dtype=torch.int32))
    ),
}


@pytest.mark.parametrize("call", BESIDES.values(), ids=BESIDES)
def test_sparse_arguments_besides_the_scores(call):
    with pytest.raises(
        TypeError, match=r"must be a strided tensor, got layout torch.sparse_coo\nconvert it first, with \w+.to_dense"
    ):
        call(lambda t: t.to_sparse())


JAGGED = torch.nested.nested_tensor([torch.randn(3, 4), torch.randn(5, 4)], layout=torch.jagged)
JAGGED_HEADS = torch.nested.nested_tensor([torch.randn(3, 4, 8), torch.randn(5, 4, 8)], layout=torch.jagged)
OTHER_HEADS = torch.nested.nested_tensor([torch.randn(4, 4, 8), torch.randn(5, 4, 8)], layout=torch.jagged)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: diffmax_loss(JAGGED, torch.tensor([0, 1])), r"X must not be nested.*\npass X.values\(\)"),
        (lambda: diffmax_loss(ROWS, JAGGED), r"target must not be nested"),
        (lambda: diffmax.diffmax_bisect_monitored(JAGGED, step=1, log=print), "X must not be nested"),
        (lambda: diffmax_bisect(ROWS, JAGGED), "alpha must not be nested"),
        (
            lambda: diffmax_bisect(JAGGED, 0.5, 0),
            "dim must lie in .1, 2. for a nested X of 3 dimensions, the first its batch, got 0",
        ),
        (lambda: diffmax_bisect(JAGGED, 0.5, 3), "dim must lie in .1, 2."),
        (lambda: diffmax_bisect(JAGGED, 0.5, "1"), "dim must lie in .1, 2."),
        (lambda: attention_with_kvcache(JAGGED, Q, Q), "q must not be nested"),
        (lambda: attention_varlen(JAGGED, Q[0], Q[0], ENDS, ENDS, 2, 2), "query must not be nested"),
        (
            lambda: attention(JAGGED_HEADS.transpose(1, 2), Q, Q),
            "must all be nested, .*got\n  query nested torch.jagged   key torch.str",
        ),
        (lambda: attention(Q, JAGGED_HEADS, Q), "must all be nested"),
        (
            lambda: attention(JAGGED_HEADS, JAGGED_HEADS, JAGGED_HEADS),
            r"sequences at dimension -2, .*\npass query.transpose\(1, 2\)",
        ),
        (
            lambda: attention(*(JAGGED_HEADS.transpose(1, 2),) * 3, attn_mask=torch.ones(5, 5).bool()),
            r"attn_mask must be None for nested tensors, got \(5, 5\)\nis_causal",
        ),
        (
            lambda: attention(*(JAGGED_HEADS.transpose(1, 2),) * 2, OTHER_HEADS.transpose(1, 2)),
            r"must have sequences of the same lengths, got \[3, 5\] and \[4, 5\]",
        ),
        (
            lambda: DiffmaxAttention(4, 2)(JAGGED, attn_mask=torch.ones(5, 5).bool()),
            "a nested query supports no masks.*got attn_mask",
        ),
        (lambda: DiffmaxAttention(4, 2)(JAGGED, JAGGED, JAGGED), "got need_weights"),
        (lambda: DiffmaxAttention(4, 2, head_gate=True)(JAGGED), "got head_gate"),
    ],
)
def test_where_nested_tensors_do_not_go(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call()


def wide(*shape, **how):
    return torch.ones(*shape, **how)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (wide(2, 7).bool(), r"for a mask of padding \(B, S\), pass attn_mask.view\(2, 1, 1, 7\)"),
        (wide(2, 7), r"for a mask of padding \(B, S\), pass attn_mask.view\(2, 1, 1, 7\)"),
        (wide(2, 5, 7).bool(), r"\(B, L, S\), pass attn_mask.unsqueeze\(1\)"),
        (wide(2, 1, 7).bool(), r"\(B, L, S\), pass attn_mask.unsqueeze\(1\)"),
        (wide(6, 5, 7).bool(), r"\(B \* H, L, S\), pass attn_mask.view\(2, 3, 5, 7\)"),
        (wide(7, 5).bool(), r"attn_mask must broadcast to \(2, 3, 5, 7\)$"),
        (wide(1, 2, 3, 5, 7).bool(), r"attn_mask must broadcast to"),
        (wide(5, 7).int(), r"got int32\n.*\n.*1 where seen and 0 elsewhere pass attn_mask.bool\(\)"),
        (wide(2, 7).long(), r"got int64\n.*\n.*pass attn_mask.bool\(\)"),
        (wide(5, 7, dtype=torch.uint8), r"got uint8\n.*\n.*pass attn_mask.bool\(\)"),
        (wide(5, 7).double(), r"got float64\n.*\n.*added to the scores: pass attn_mask.to\(torch.float32\)"),
        (wide(5, 7).bfloat16(), r"got bfloat16\n.*\n.*pass attn_mask.to\(torch.float32\)"),
        ([[True] * 7] * 5, "attn_mask must be a boolean or floating tensor or a CausalBias, got list"),
    ],
)
def test_masks_that_do_not_fit_say_what_does(mask, message):
    query, key = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 7, 8)
    with pytest.raises((TypeError, ValueError), match=message):
        attention(query, key, key, mask)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([(2, 4, 5, 8), (3, 4, 5, 8), (3, 4, 5, 8)], "must have one batch size"),
        (
            [(2, 4, 5, 8), (2, 3, 5, 8), (2, 3, 5, 8)],
            "same number of heads, got 4 and 3\nfor grouped query heads, pass enable_gqa",
        ),
        ([(2, 4, 5, 8), (2, 4, 5, 8), (2, 4, 6, 8)], "the same length, got 5 and 6"),
        ([(5, 8), (7, 9), (7, 9)], "the same head size, got 8 and 9"),
        ([(8,), (7, 8), (7, 8)], r"at least 2 dimensions \(L, D\)"),
        ([(3, 2, 4, 5, 8), (2, 2, 4, 5, 8), (2, 2, 4, 5, 8)], "must have one batch size"),
    ],
)
def test_shapes_that_do_not_fit(shapes, message):
    with pytest.raises(ValueError, match=message):
        attention(*(torch.randn(*shape) for shape in shapes))


def test_a_mask_of_five_dimensions_that_does_not_fit():
    x = torch.randn(3, 2, 4, 5, 8)
    with pytest.raises(
        ValueError, match=r"attn_mask must broadcast to \(..., H, L, S\) = \(3, 2, 4, 5, 5\), got shape \(2, 2, 4, 5, 5\)"
    ):
        attention(x, x, x, torch.ones(2, 2, 4, 5, 5).bool())


def test_a_scale_that_should_learn():
    with pytest.raises(TypeError, match=r"got a tensor that requires a gradient\nfor a scale that learns, multiply the query"):
        attention(Q, Q, Q, scale=torch.tensor(0.3, requires_grad=True))


# alpha at its ends and beyond, in every function that takes one

WITH_ALPHA = {
    "diffmax_bisect": lambda alpha: diffmax_bisect(ROWS, alpha),
    "monitored": lambda alpha: diffmax.diffmax_bisect_monitored(ROWS, alpha),
    "module": lambda alpha: DiffmaxBisectModule(alpha)(ROWS),
    "loss": lambda alpha: diffmax_loss(ROWS, torch.tensor([0, 1, 2]), alpha),
    "attention": lambda alpha: attention(Q, Q, Q, alpha=alpha),
    "varlen": lambda alpha: attention_varlen(Q[0, :2], Q[0, :2], Q[0, :2], ENDS, ENDS, 2, 2, alpha=alpha),
    "kvcache": lambda alpha: attention_with_kvcache(Q, Q, Q, alpha=alpha),
    "DiffmaxAttention": lambda alpha: DiffmaxAttention(16, 4, alpha=alpha)(torch.randn(2, 3, 16)),
}


@pytest.mark.parametrize(
    ("alpha", "message"),
    [
        (1.0, r"got 1\.0\nthe limit alpha -> 1 is torch.softmax: if that is meant, pass torch.tensor\(1\.0\)"),
        (
            1,
            r"got 1(\.0)?\n.*the limit alpha -> 1 is torch.softmax: if that is meant, pass torch.tensor\(1\.0\)",
        ),
        (0.0, r"got 0\.0\nthe limit alpha -> 0 is sparsemax: if that is meant, pass torch.tensor\(0\.0\)"),
        (
            0,
            r"got 0(\.0)?\n.*the limit alpha -> 0 is sparsemax: if that is meant, pass torch.tensor\(0\.0\)",
        ),
        (1.5, r"got 1\.5\nif that is entmax's alpha, pass 2 - 1\.5 = 0\.5 here"),
        (
            2,
            r"got 2(\.0)?\n.*if that is entmax's alpha, the limit is 0 here, sparsemax: pass torch.tensor\(0\.0\)",
        ),
        (2.0, r"got 2\.0\nif that is entmax's alpha, the limit is 0 here, sparsemax"),
        (-0.5, r"between 0 and 1, got -0\.5$"),
        (3.0, r"between 0 and 1, got 3\.0$"),
        (float("nan"), "between 0 and 1, got nan$"),
    ],
)
@pytest.mark.parametrize("call", WITH_ALPHA.values(), ids=WITH_ALPHA)
def test_a_float_at_the_ends_or_beyond(call, alpha, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        call(alpha)


FLAGS = {
    "ensure_sum_one": lambda flag: diffmax_bisect(Q, 0.5, ensure_sum_one=flag),
    "ensure_sum_one of the module": lambda flag: diffmax.DiffmaxBisectModule(ensure_sum_one=flag),
    "is_causal": lambda flag: attention(Q, Q, Q, is_causal=flag),
    "return_stats": lambda flag: attention(Q, Q, Q, return_stats=flag),
    "return_stats of decoding": lambda flag: diffmax.attention_with_kvcache(Q, Q, Q, return_stats=flag),
    "return_softmax_lse": lambda flag: diffmax.attention_with_kvcache(Q, Q, Q, return_softmax_lse=flag),
    "causal": lambda flag: diffmax.attention_with_kvcache(Q, Q, Q, causal=flag),
    "normalize": lambda flag: diffmax.threshold_attention(Q, Q, Q, 0.0, normalize=flag),
    "return_mass": lambda flag: diffmax.threshold_attention(Q, Q, Q, 0.0, return_mass=flag),
    "return_final_state": lambda flag: diffmax.power_attention(Q, Q, Q, return_final_state=flag),
    "is_causal of lazy attention": lambda flag: diffmax.nn.LazyAttention(8, 2, 4, is_causal=flag),
}


@pytest.mark.parametrize("call", FLAGS.values(), ids=FLAGS)
@pytest.mark.parametrize("flag", ["no", None, 2])
def test_what_only_happens_to_be_true_or_false(call, flag):
    with pytest.raises(TypeError, match=r"must be True or False, got "):
        call(flag)


@pytest.mark.parametrize("call", WITH_ALPHA.values(), ids=WITH_ALPHA)
@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_the_ends_as_tensors_are_served(call, alpha):
    assert not torch.as_tensor(call(torch.tensor(alpha))).isnan().any()


@pytest.mark.parametrize("dim", [-1, 0, 1, 2])
def test_a_dimension_in_alphas_place(dim):
    """Only where torch.softmax has its dimension: elsewhere an int is no dimension."""
    for call in (diffmax_bisect, diffmax.diffmax_bisect_monitored):
        with pytest.raises(ValueError, match=f"got {dim}\nfor a dimension, write dim: the second argument is alpha"):
            call(torch.randn(2, 3, 4), dim)
    with pytest.raises(ValueError, match="between 0 and 1") as error:
        attention(Q, Q, Q, alpha=dim)
    assert "dimension" not in str(error.value)


# without values

ABSTRACT = {
    "diffmax_bisect": lambda x: diffmax_bisect(x, 0.5),
    "tensor alpha": lambda x: diffmax_bisect(x, x.new_full((4, 1, 1), 0.5)),
    "loss": lambda x: diffmax_loss(x, torch.zeros(2, 5, 8, dtype=torch.int64, device=x.device), reduction="none"),
    "attention": lambda x: attention(x, x, x, is_causal=True),
    "attention, options": lambda x: attention(x, x, x, x.new_ones(5, 5), softcap=2.0, sink=x.new_zeros(4), dropout_p=0.5),
    "attention, 3-d": lambda x: attention(x[0], x[0], x[0]),
    "attention, broadcast": lambda x: attention(x, x[:1, :1], x[:1, :1]),
    "attention, all dropped": lambda x: attention(x, x, x, dropout_p=1.0),
    "attention, head size 0": lambda x: attention(x[..., :0], x[..., :0], x),
    "kvcache": lambda x: attention_with_kvcache(x, x, x),
    "varlen": lambda x: attention_varlen(
        x[0], x[0], x[0], *[torch.arange(0, 5, 4, dtype=torch.int32, device=x.device)] * 2, 4, 4
    ),
    "module": lambda x: DiffmaxAttention(8, 2, device=x.device)(x[0]),
    "module as torch's": lambda x: DiffmaxAttention(8, 2, device=x.device)(x[0], x[0], x[0])[1],
    "entmax_bisect": lambda x: entmax.entmax_bisect(x, 1.5),
    "adasplash": lambda x: adasplash.adasplash(x, x, x),
}


@pytest.mark.parametrize("call", ABSTRACT.values(), ids=ABSTRACT)
def test_tensors_without_values_have_the_result_s_shape(call):
    expected = call(torch.randn(2, 4, 5, 8))
    on_meta = call(torch.randn(2, 4, 5, 8, device="meta"))
    assert on_meta.is_meta
    with FakeTensorMode():
        fake = call(torch.randn(2, 4, 5, 8))
    for got in (on_meta, fake):
        assert (got.shape, got.dtype) == (expected.shape, expected.dtype)


@pytest.mark.slow
def test_other_shapes_compile_in_one_graph():
    for shapes in ([(4, 5, 8), (4, 7, 8)], [(2, 4, 5, 8), (1, 1, 7, 8)], [(2, 3, 4, 5, 8), (2, 3, 4, 7, 8)]):
        query, key = (torch.randn(*shape) for shape in shapes)
        compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)
        close(compiled(query, key, key, alpha=0.5), attention(query, key, key, alpha=0.5))


@pytest.mark.slow
def test_nested_tensors_compile_in_one_graph():
    parts = ([part.detach() for part in sequences(4, 8)] for _ in range(3))
    query, key, value = nest_all(*parts, layout=torch.jagged)
    compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)
    expected = attention(query, key, value, alpha=0.5, is_causal=True)
    close(compiled(query, key, value, alpha=0.5, is_causal=True).values(), expected.values())
    rows = torch.compile(diffmax_bisect, backend="aot_eager", fullgraph=True)
    close(rows(query, 0.5).values(), diffmax_bisect(query, 0.5).values())
    module = DiffmaxAttention(8, 2).double()
    tokens = torch.nested.as_nested_tensor([randn(n, 8) for n in LENGTHS], layout=torch.jagged)
    close(torch.compile(module, backend="aot_eager", fullgraph=True)(tokens).values(), module(tokens).values())


def test_nested_sequences_of_no_tokens():
    for layout in (torch.jagged, torch.strided):
        parts = sequences(4, 8, [0, 5, 0])
        nested = nest(parts, layout)
        for got, x in zip(attention(nested, nested, nested, is_causal=True).unbind(), parts, strict=True):
            close(got, attention(x, x, x, is_causal=True))


def test_under_autocast_weights_are_those_of_a_module_of_half_precision():
    module, x = DiffmaxAttention(16, 4, alpha=0.5), torch.randn(2, 5, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, weights = module(x, x, x, need_weights=True, average_attn_weights=False)
        close(out, module(x, x, x, need_weights=False)[0], atol=1e-2, rtol=1e-2)
    assert weights.dtype == out.dtype == torch.bfloat16
    half = DiffmaxAttention(16, 4, alpha=0.5).bfloat16()
    half.load_state_dict(module.state_dict())
    close(weights, half(*[x.bfloat16()] * 3, average_attn_weights=False)[1], atol=0, rtol=0)


def cache_of(**how):
    new, cache = torch.ones(2, 1, 4, 8), torch.ones(2, 6, 2, 8)
    return attention_with_kvcache(new, cache, cache, **how)


@pytest.mark.parametrize("kind", [np.int64, np.int32, torch.tensor], ids=["int64", "int32", "tensor"])
def test_whole_numbers_of_any_kind(kind):
    """torch takes NumPy's, and tensors of one entry, wherever it takes an int."""
    x, tokens, target = torch.randn(3, 5), torch.randn(2, 4, 8), torch.tensor([0, 1, 2])
    pairs = [
        (lambda n: diffmax_bisect(x, 0.5, n(0)), lambda: diffmax_bisect(x, 0.5, 0)),
        (lambda n: diffmax_bisect(x, 0.5, n_iter=n(30)), lambda: diffmax_bisect(x, 0.5, n_iter=30)),
        (lambda n: diffmax_loss(x, target, n_iter=n(30)), lambda: diffmax_loss(x, target, n_iter=30)),
        (lambda n: diffmax_loss(x, target, ignore_index=n(1)), lambda: diffmax_loss(x, target, ignore_index=1)),
        (lambda n: attention(Q, Q, Q, window_size=(n(1), n(0))), lambda: attention(Q, Q, Q, window_size=(1, 0))),
        (
            lambda n: attention_varlen(*[tokens] * 3, ENDS, ENDS, n(2), n(2)),
            lambda: attention_varlen(*[tokens] * 3, ENDS, ENDS, 2, 2),
        ),
        (
            lambda n: diffmax.page_bounds(torch.ones(2, 6, 2, 8), 3, page_size=n(2)).low,
            lambda: diffmax.page_bounds(torch.ones(2, 6, 2, 8), 3, page_size=2).low,
        ),
        (lambda n: cache_of(window_size=(n(1), n(-1))), lambda: cache_of(window_size=(1, -1))),
    ]
    for ours, plain in pairs:
        assert torch.equal(ours(kind), plain())
    assert torch.equal(cache_of(cache_seqlens=np.int64(3)), cache_of(cache_seqlens=3))


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_numbers_of_any_kind(kind):
    half = kind(0.5)
    for option in ("scale", "softcap", "alpha"):
        assert torch.equal(attention(Q, Q, Q, **{option: half}), attention(Q, Q, Q, **{option: 0.5}))
    torch.manual_seed(0)
    dropped = attention(Q, Q, Q, dropout_p=half)
    torch.manual_seed(0)
    assert torch.equal(dropped, attention(Q, Q, Q, dropout_p=0.5))
    assert torch.equal(diffmax_bisect(ROWS, half), diffmax_bisect(ROWS, 0.5))
