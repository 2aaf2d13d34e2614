"""Biases, ALiBi, softcap, sinks and dropout of diffmax.attention, against explicit tensors, torch and transformers."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from benchmarks.memory import peak_bytes
from diffmax import attention, attention_varlen, diffmax_bisect
from diffmax.nn import RelativePositionBias
from diffmax.operators.attention.operator import FORWARD
from diffmax.plugin import AttentionCall
from diffmax.reference.dropout import kept, philox, threshold
from diffmax.testing import gates

pytestmark = pytest.mark.sampled(3)

BACKENDS = ("reference", "cpu", "numba")
every_backend = pytest.mark.parametrize("backend", BACKENDS)
ONE = torch.tensor(1.0, dtype=torch.float64)


def randn(*shape, spread=1.0):
    return torch.randn(shape, dtype=torch.float64) * spread


def draw(seed):
    """What `attention` draws from the generator."""
    torch.manual_seed(seed)
    return torch.randint(2**32, (2,))


def explicit(query, key, value, *, alpha, bias=None, slopes=None, softcap=0.0, sink=None, dropped=0.0, causal=False):
    """One option after the other on tensors that hold everything; the generator's seed is 7."""
    group, (length, keys) = query.shape[1] // key.shape[1], (query.shape[2], key.shape[2])
    scores = query @ key.repeat_interleave(group, 1).mT / math.sqrt(query.shape[3])
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias
    distance = torch.arange(keys) - torch.arange(length).unsqueeze(1)
    if slopes is not None:
        scores = scores - slopes.view(-1, query.shape[1], 1, 1) * distance.abs()
    if causal:
        scores = scores.masked_fill(distance > 0, -torch.inf)
    if sink is not None:
        scores = torch.cat([scores, sink.view(-1, 1, 1).expand(*scores.shape[:3], 1)], 3)
    alpha = alpha.view(-1, 1, 1) if isinstance(alpha, torch.Tensor) else alpha
    weights = diffmax_bisect(scores, alpha, n_iter=200)[..., :keys]
    if dropped:
        call = AttentionCall(scale=1.0, e=0.5, dropout_p=dropped, seed=draw(7))
        weights = weights * (kept(call, weights.shape, weights.dtype) != 0) / (1 - dropped)
    return weights @ value.repeat_interleave(group, 1)


def fused(query, key, value, *, bias=None, slopes=None, dropped=0.0, causal=False, **options):
    torch.manual_seed(7)
    return attention(query, key, value, bias, dropped, causal, enable_gqa=True, alibi_slopes=slopes, **options)


def with_gradients(function, leaves, grad):
    out = function(**leaves)
    wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    return {
        "output": out.detach(),
        **dict(zip(wanted, torch.autograd.grad(out, wanted.values(), grad.to(out.dtype)), strict=True)),
    }


def agree(ours, oracle, leaves, grad):
    """Results and gradients, as near to the oracle's as float64 can be by what float32 errs."""
    drawn = {name: leaf for name, leaf in leaves.items() if name != "alpha"}  # a neighbour of 1 is no alpha

    def results(*numbers):
        given = dict(zip(drawn, numbers, strict=True))
        given = {name: given.get(name, leaf.detach()).to(numbers[0].dtype) for name, leaf in leaves.items()}
        given = {name: t.detach().clone().requires_grad_(leaves[name].requires_grad) for name, t in given.items()}
        return tuple(with_gradients(oracle, given, grad).values())

    wanted = gates(results, *drawn.values())
    for (name, got), (exact, allowed) in zip(with_gradients(ours, leaves, grad).items(), wanted, strict=True):
        error = (got - exact).abs().max().item()
        assert got.shape == exact.shape
        assert error <= allowed, f"{name}: {error:.3g}"


def leaves_of(length, keys, *, heads=4, kv_heads=2, spread=2.0, **more):
    tensors = {"query": randn(2, heads, length, 8, spread=spread), "key": randn(2, kv_heads, keys, 8, spread=spread)}
    tensors |= {"value": randn(2, kv_heads, keys, 6), **more}
    return {name: t if name == "slopes" else t.requires_grad_() for name, t in tensors.items()}


SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625], dtype=torch.float64)
MORE = {
    "bias (B, H, L, S)": lambda: ({"bias": randn(2, 4, 70, 90)}, {}),
    "bias (L, S)": lambda: ({"bias": randn(70, 90)}, {"causal": True}),
    "bias (H, 1, S)": lambda: ({"bias": randn(4, 1, 90)}, {}),
    "bias (B, 1, L, 1)": lambda: ({"bias": randn(2, 1, 70, 1)}, {}),
    "bias (S,)": lambda: ({"bias": randn(90)}, {}),
    "bias of one number": lambda: ({"bias": randn(1, 1)}, {}),
    "bias expanded": lambda: ({"bias": randn(4, 1, 90)}, {"expanded": True}),
    "ALiBi": lambda: ({"slopes": SLOPES}, {"causal": True}),
    "ALiBi of each sequence": lambda: ({"slopes": torch.stack([SLOPES, SLOPES * 3])}, {}),
    "softcap": lambda: ({}, {"softcap": 2.0}),
    "sink": lambda: ({"sink": randn(4)}, {"causal": True}),
    "dropout": lambda: ({}, {"dropped": 0.4}),
    "all": lambda: (
        {"bias": randn(4, 70, 90), "slopes": SLOPES, "sink": randn(4)},
        {"softcap": 3.0, "dropped": 0.3, "causal": True},
    ),
}


@every_backend
@pytest.mark.parametrize("name", MORE)
def test_agrees_with_explicit_tensors_in_every_gradient(backend, name):
    more, options = MORE[name]()
    alpha = torch.tensor([0.0, 0.5, 0.9, 1.0], dtype=torch.float64)  # sparse and softmax heads in one call
    leaves = leaves_of(70, 90, alpha=alpha.clamp(0.01, 0.99) if name == "all" else alpha, **more)
    if name != "all":
        leaves["alpha"].requires_grad_(False)
    expanded = options.pop("expanded", False)

    def ours(**given):
        if expanded:
            given["bias"] = given["bias"].expand(2, 4, 70, 90)
        return fused(**given, **options, backend=backend)

    agree(ours, lambda **given: explicit(**given, **options), leaves, randn(2, 4, 70, 6))


@every_backend
def test_gradcheck_for_every_input(backend):
    query, key, value = randn(1, 2, 4, 3), randn(1, 1, 5, 3), randn(1, 1, 5, 2)
    inputs = (query, key, value, randn(2, 1, 5), randn(2), torch.tensor([0.6, 0.9], dtype=torch.float64))
    inputs = tuple(t.requires_grad_() for t in inputs)
    slopes = SLOPES[:2]

    def call(query, key, value, bias, sink, alpha):
        options = {"softcap": 1.5, "dropped": 0.3, "causal": True, "slopes": slopes, "backend": backend}
        return fused(query, key, value, bias=bias, sink=sink, alpha=alpha, **options)

    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


@every_backend
def test_packed_sequences_have_the_same_options_each(backend):
    """And dropout counts sequences as a batch does."""
    ends = torch.tensor([0, 3, 10, 10], dtype=torch.int32)
    leaves = {name: randn(10, 2, 2) for name in ("query", "key", "value")} | {"sink": randn(2)}
    leaves = {name: t.requires_grad_() for name, t in leaves.items()}
    options = {"alibi_slopes": SLOPES[:2], "softcap": 2.0, "is_causal": True, "alpha": 0.7, "backend": backend}

    def packed(query, key, value, sink):
        torch.manual_seed(7)
        return attention_varlen(query, key, value, ends, ends, 7, 7, sink=sink, dropout_p=0.3, **options)

    def batched(query, key, value, sink):
        tensors = [query.new_zeros(3, 7, 2, 2) for _ in range(3)]
        for padded, given in zip(tensors, (query, key, value), strict=True):
            padded[0, :3], padded[1] = given[:3], given[3:]
        mask = torch.arange(7) < torch.tensor([3, 7, 0]).view(3, 1, 1, 1)
        torch.manual_seed(7)
        out = attention(*(t.transpose(1, 2) for t in tensors), mask, 0.3, sink=sink, **options).transpose(1, 2)
        return torch.cat([out[0, :3], out[1]])

    agree(packed, batched, leaves, randn(10, 2, 2))
    if backend == "numba":
        assert torch.autograd.gradgradcheck(packed, tuple(leaves.values()), fast_mode=True)


# torch and transformers, at alpha = 1


@every_backend
def test_a_floating_mask_is_torchs_own(backend):
    mask = randn(2, 1, 70, 90).masked_fill(torch.rand(2, 1, 70, 90) > 0.8, -torch.inf)
    leaves = leaves_of(70, 90, kv_heads=4, mask=mask)
    agree(
        lambda query, key, value, mask: attention(query, key, value, mask, alpha=ONE, backend=backend),
        lambda query, key, value, mask: scaled_dot_product_attention(query, key, value, mask),
        leaves,
        randn(2, 4, 70, 6),
    )


@every_backend
def test_dropout_has_the_mean_and_variance_of_torchs_own(backend):
    """20 000 draws of one row: the mean is the row without dropout, the spread is that of torch's."""
    query, key, value = randn(1, 1, 1, 8), randn(1, 1, 12, 8), randn(1, 1, 12, 1)
    many = (t.expand(20_000, -1, -1, -1) for t in (query, key, value))
    query, key, value = many
    exact = scaled_dot_product_attention(query[:1], key[:1], value[:1])
    ours = attention(query, key, value, None, 0.3, alpha=ONE, backend=backend).flatten()
    theirs = scaled_dot_product_attention(query, key, value, None, 0.3).flatten()
    deviation = theirs.std().item()
    assert abs(ours.mean() - exact.item()) < 5 * deviation / math.sqrt(20_000)
    kurtosis = ((theirs - theirs.mean()) / deviation).pow(4).mean().item()
    assert abs(ours.var() / theirs.var() - 1) < 5 * math.sqrt(2 * kurtosis / 20_000)


LEFT_OUT = "transformers is not installed: the comparison with its models is left out"


def test_softcap_is_gemmas():
    eager = pytest.importorskip("transformers.models.gemma2.modeling_gemma2", reason=LEFT_OUT).eager_attention_forward
    module = SimpleNamespace(num_key_value_groups=2, training=False)
    leaves = {name: t.detach() for name, t in leaves_of(20, 30).items()}
    options = {"scale": 0.7, "softcap": 5.0, "enable_gqa": True, "alpha": ONE}
    ((exact, allowed),) = gates(lambda *given: attention(*given, **options), *(t.float() for t in leaves.values()))
    theirs = eager(module, *leaves.values(), None, scaling=0.7, softcap=5.0)[0].transpose(1, 2)  # its softmax is in float32
    assert (theirs - exact).abs().max() <= allowed


def test_a_sink_is_gpt_oss():
    eager = pytest.importorskip("transformers.models.gpt_oss.modeling_gpt_oss", reason=LEFT_OUT).eager_attention_forward

    def theirs(query, key, value, sink):
        module = SimpleNamespace(num_key_value_groups=2, training=False, sinks=sink)
        return eager(module, query, key, value, None, scaling=0.7)[0].transpose(1, 2)

    agree(
        lambda query, key, value, sink: attention(query, key, value, scale=0.7, sink=sink, enable_gqa=True, alpha=ONE),
        theirs,
        leaves_of(20, 30, sink=randn(4)),
        randn(2, 4, 20, 6),
    )


def test_alibi_is_blooms_for_every_alpha():
    """Bloom adds slope * j: under causality a constant of the row more, which no weight depends on."""
    bloom = pytest.importorskip("transformers.models.bloom.modeling_bloom", reason=LEFT_OUT)
    biases = bloom.build_alibi_tensor(torch.ones(1, 40), 4, torch.float64).view(1, 4, 1, 40)
    slopes = biases[0, :, 0, 1]
    agree(
        lambda query, key, value: attention(query, key, value, is_causal=True, alibi_slopes=slopes, alpha=0.6),
        lambda query, key, value: attention(query, key, value, biases.to(query.dtype), is_causal=True, alpha=0.6),
        leaves_of(40, 40, kv_heads=4),
        randn(2, 4, 40, 6),
    )


@pytest.mark.parametrize("decoder", [False, True])
@pytest.mark.parametrize(("buckets", "farthest"), [(32, 128), (8, 20), (64, 1000)])
def test_relative_positions_are_t5s(decoder, buckets, farthest):
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5", reason=LEFT_OUT)
    options = {"relative_attention_num_buckets": buckets, "relative_attention_max_distance": farthest, "is_decoder": decoder}
    theirs = t5.T5Attention(t5.T5Config(num_heads=4, **options), has_relative_attention_bias=True, layer_idx=0)
    ours = RelativePositionBias(4, buckets, farthest, bidirectional=not decoder)
    ours.load_state_dict(theirs.relative_attention_bias.state_dict())
    assert torch.equal(ours(300, 400), theirs.compute_bias(300, 400))
    assert torch.equal(ours(3, 400, first=297), ours(300, 400)[:, :, 297:])


def test_a_table_of_relative_positions_learns_through_attention():
    place = RelativePositionBias(4, 8, 20).double()
    leaves = leaves_of(30, 40) | {"table": place.weight}

    def ours(query, key, value, table):
        bias = torch.func.functional_call(place, {"weight": table}, (30, 40))
        return attention(query, key, value, bias, enable_gqa=True, alpha=0.6)

    def oracle(query, key, value, table):
        rows = place.buckets(torch.arange(40) - torch.arange(30).unsqueeze(1))
        return explicit(query, key, value, alpha=0.6, bias=table[rows].permute(2, 0, 1))

    agree(ours, oracle, leaves, randn(2, 4, 30, 6))


def test_a_table_of_relative_positions_is_made_from_one_that_is_given():
    """What torch.nn.Embedding has for this raised an error about an argument that nobody gave."""
    theirs = RelativePositionBias(4, 8, 20, bidirectional=False)
    ours = RelativePositionBias.from_pretrained(theirs.weight, max_distance=20, bidirectional=False)
    assert torch.equal(ours(30, 40), theirs(30, 40))
    assert not ours.weight.requires_grad
    assert RelativePositionBias.from_pretrained(theirs.weight.detach(), freeze=False).weight.requires_grad


def test_a_table_of_relative_positions_says_what_is_wrong():
    assert repr(RelativePositionBias(4)) == (
        "RelativePositionBias(num_heads=4, num_buckets=32, max_distance=128, bidirectional=True)"
    )
    with pytest.raises(ValueError, match="num_buckets must be at least 4, got 3"):
        RelativePositionBias(4, 3)
    with pytest.raises(ValueError, match="max_distance must be larger than 8, got 8\n  of 32 buckets"):
        RelativePositionBias(4, 32, 8)


@every_backend
def test_a_null_slot_is_a_key_of_zeros_whose_value_is_zero(backend):
    def with_a_slot(query, key, value):
        key, value = (torch.nn.functional.pad(t, (0, 0, 0, 1)) for t in (key, value))
        return explicit(query, key, value, alpha=0.6)

    agree(
        lambda query, key, value: fused(query, key, value, sink=torch.zeros(4), alpha=0.6, backend=backend),
        with_a_slot,
        leaves_of(70, 90, spread=0.7),
        randn(2, 4, 70, 6),
    )


# sinks where there are no keys


@every_backend
@pytest.mark.parametrize("keys", [0, 5])
def test_a_query_that_sees_a_sink_alone_is_zero_with_zero_gradients(backend, keys):
    leaves = leaves_of(6, keys, sink=randn(4))
    mask = torch.zeros(6, keys, dtype=torch.bool)
    results = attention(
        leaves["query"],
        leaves["key"],
        leaves["value"],
        mask,
        enable_gqa=True,
        sink=leaves["sink"],
        return_stats=True,
        backend=backend,
    )
    out, stats = results
    assert (out == 0).all()
    assert (stats.support_size == 0).all()
    assert (stats.tau < leaves["sink"].view(1, 4, 1)).all()
    assert all((g == 0).all() for g in torch.autograd.grad(out.sum(), leaves.values()))


@every_backend
def test_a_sink_of_packed_sequences_without_keys(backend):
    query, nothing = randn(3, 2, 4), randn(0, 2, 4)
    ends = [torch.tensor([0, count], dtype=torch.int32) for count in (3, 0)]
    sink = torch.tensor([0.5, torch.nan], dtype=torch.float64)
    out, stats = attention_varlen(query, nothing, nothing, *ends, 3, 0, sink=sink, return_stats=True, backend=backend)
    assert (out[:, 0] == 0).all()
    assert (stats.tau[:, 0] < 0.5).all()


@every_backend
def test_a_bad_sink_spoils_its_head_alone(backend):
    leaves = leaves_of(70, 90)
    sink = torch.tensor([0.0, torch.nan, -torch.inf, torch.inf])
    out = fused(**leaves, sink=sink, alpha=0.5, backend=backend)
    assert out[:, [1, 3]].isnan().all()
    assert out[:, 0].isfinite().all()
    ((exact, allowed),) = gates(lambda *given: explicit(**dict(zip(leaves, given, strict=True)), alpha=0.5), *leaves.values())
    assert (out - exact)[:, 2].abs().max() <= allowed


# dropout


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0,) * 4, (0,) * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_gives_the_words_that_its_authors_publish(counter, key, words):
    tensors = [tuple(torch.tensor([word]) for word in given) for given in (counter, key)]
    assert " ".join(f"{int(word):08x}" for word in philox(*tensors)) == words
    assert " ".join(f"{word:08x}" for word in philox(counter, key)) == words


@pytest.mark.parametrize("share", [0.01, 0.3, 0.9])
def test_as_many_weights_are_dropped_as_asked_for_independently_of_each_other(share):
    call = AttentionCall(scale=1.0, e=0.5, dropout_p=share, seed=draw(1))
    dropped = (kept(call, (2, 3, 400, 400), torch.float32) == 0).double()
    spread = math.sqrt(share * (1 - share) / dropped.numel())
    assert abs(dropped.mean() - share) < 5 * spread
    for axis in range(4):  # a weight and the next one along every axis
        a, b = dropped.narrow(axis, 0, dropped.shape[axis] - 1), dropped.narrow(axis, 1, dropped.shape[axis] - 1)
        both = (a - share) * (b - share)
        assert abs(both.mean()) < 5 * share * (1 - share) / math.sqrt(both.numel())


def test_thresholds_at_the_ends():
    assert threshold(1e-12) == 0
    assert threshold(0.5) == 2**31
    assert threshold(1 - 1e-12) == 2**32 - 1


def test_checkpointing_drops_the_same_weights_again():
    leaves = [t.requires_grad_() for t in (randn(1, 2, 70, 8), randn(1, 2, 70, 8), randn(1, 2, 70, 8))]

    def loss(run):
        torch.manual_seed(3)
        return run(lambda *qkv: attention(*qkv, None, 0.5, alpha=0.5)).square().sum()

    plain = torch.autograd.grad(loss(lambda f: f(*leaves)), leaves)
    again = torch.autograd.grad(loss(lambda f: checkpoint(f, *leaves, use_reentrant=False)), leaves)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


# inside torch


def test_all_options_compile_in_one_graph():
    leaves = leaves_of(20, 30, bias=randn(20, 30), sink=randn(4))

    def call(query, key, value, bias, sink):
        options = {"alpha": 0.6, "softcap": 3.0, "sink": sink, "alibi_slopes": SLOPES, "enable_gqa": True}
        return attention(query, key, value, bias, 0.3, **options).sum()

    results = []
    for run in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(7)
        results.append(torch.autograd.grad(run(**leaves), leaves.values()))
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)


def test_opcheck_with_all_options():
    leaves = leaves_of(5, 7, bias=randn(1, 4, 5, 7), sink=randn(4))
    options = {"bias": leaves["bias"], "alibi": SLOPES, "softcap": 3.0, "sink": leaves["sink"]}
    call = AttentionCall(scale=0.3, e=0.5, lower_right=True, right=0, dropout_p=0.3, seed=draw(7), **options)
    tensors = (leaves["query"], leaves["key"], leaves["value"])
    torch.library.opcheck(torch.ops.diffmax.attention.default, FORWARD.flatten(*tensors, False, False, call))


def test_a_bias_under_autocast_stays_in_float32():
    query, key, value = (torch.randn(1, 2, 20, 8) for _ in range(3))
    bias = torch.randn(20, 20, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(query, key, value, bias, alpha=0.6)
    low = [t.bfloat16() for t in (query, key, value)]
    assert torch.equal(out, attention(*low, bias, alpha=0.6))
    assert torch.autograd.grad(out.sum(), bias)[0].dtype == torch.float32


@pytest.mark.parametrize("backend", ["cpu", "numba"])
def test_no_score_matrix_is_held_with_any_option(backend):
    query, key, value = (torch.randn(1, 1, 4096, 16).requires_grad_() for _ in range(3))
    sink = torch.zeros(1, requires_grad=True)
    bias = torch.randn(1, 4096, requires_grad=True)

    def step():
        more = {"sink": sink, "softcap": 9.0, "alibi_slopes": torch.ones(1) / 8, "backend": backend}
        out = attention(query * 3, key, value, bias, 0.1, alpha=0.5, is_causal=True, **more)
        return torch.autograd.grad(out.sum(), (query, key, value, bias, sink))

    assert peak_bytes(step) < 5e7  # the scores alone would be 6.7e7


@pytest.mark.parametrize("backend", ["cpu", "numba"])
def test_a_broadcast_cache_is_not_copied(backend):
    """One key head expanded to 64 heads and 4 sequences is 2 MB, and would be 512."""
    query = torch.randn(4, 64, 1, 64)
    key, value = (torch.randn(1, 1, 8192, 64).expand(4, 64, -1, -1) for _ in range(2))
    with torch.no_grad():
        expected = attention(query.view(4, 64, 1, 64), key[:, :1], value[:, :1], enable_gqa=True, alpha=0.5, backend=backend)
        found = []
        peak = peak_bytes(lambda: found.append(attention(query, key, value, alpha=0.5, backend=backend)))
    assert peak < 64e6
    assert (found[0] - expected).abs().max() < 1e-5
