"""diffmax.nn.DiffmaxAttention called as torch.nn.MultiheadAttention is, alone and inside of torch's own layers."""

import copy
import warnings

import pytest
import torch
from torch import nn

from diffmax import HillMap
from diffmax.nn import DiffmaxAttention

B, L, S, E, H = 2, 5, 7, 16, 4
close = torch.testing.assert_close


def tokens(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def torchs(**settings):
    module = nn.MultiheadAttention(E, H, **settings).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_().mul_(0.5)
    return module


def same(theirs, **options):
    """Our module with its weights, equal to softmax."""
    return DiffmaxAttention.from_torch(theirs, alpha=torch.ones(H), **options)


def hidden(*shape):
    """A boolean mask, True where hidden, that leaves every query something: torch has NaN for those that see nothing."""
    mask = torch.rand(*shape) < 0.4
    mask[..., 0] = False
    return mask


def added(*shape):
    return torch.randn(*shape, dtype=torch.float64).masked_fill(hidden(*shape), -torch.inf)


def padding(batch=B):
    mask = torch.zeros(batch, S, dtype=torch.bool)
    mask[0, -3:] = True
    return mask


def compare(theirs, ours, call, inputs):
    """Results, weights and gradients of one call of both."""
    expected, got = call(theirs), call(ours)
    for a, b in zip(got, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            assert a.shape == b.shape
            assert a.dtype == b.dtype
            close(a, b)
    upstream = torch.randn_like(expected[0])
    wanted = torch.autograd.grad(expected[0], (*inputs, theirs.out_proj.weight), upstream)
    for a, b in zip(torch.autograd.grad(got[0], (*inputs, ours.out_proj.weight), upstream), wanted, strict=True):
        close(a, b)


MASKS = {
    "none": dict,
    "boolean (L, S)": lambda: {"attn_mask": hidden(L, S)},
    "boolean (B * H, L, S)": lambda: {"attn_mask": hidden(B * H, L, S)},
    "floating (L, S)": lambda: {"attn_mask": added(L, S)},
    "floating (B * H, L, S)": lambda: {"attn_mask": added(B * H, L, S)},
    "padding": lambda: {"key_padding_mask": padding()},
    "floating padding": lambda: {"key_padding_mask": added(B, S)},
    "boolean and padding": lambda: {"attn_mask": hidden(L, S), "key_padding_mask": padding()},
    "floating and padding": lambda: {"attn_mask": added(B * H, L, S), "key_padding_mask": added(B, S)},
    "causal": lambda: {"attn_mask": torch.ones(L, S).triu(1).bool(), "is_causal": True},
    "causal and padding": lambda: {
        "attn_mask": torch.ones(L, S).triu(1).bool(),
        "is_causal": True,
        "key_padding_mask": padding(),
    },
}
SETTINGS = {
    "plain": {},
    "batch first": {"batch_first": True},
    "sizes": {"kdim": 6, "vdim": 10, "batch_first": True},
    "no bias": {"bias": False},
    "zero slot": {"add_zero_attn": True, "batch_first": True},
}
WEIGHTS = {
    "averaged": {},
    "per head": {"average_attn_weights": False},
    "no weights": {"need_weights": False},
}


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_at_alpha_one_it_answers_as_torchs_module(settings, masks, weights):
    theirs = torchs(**settings)
    lay = (lambda n: (B, n)) if theirs.batch_first else (lambda n: (n, B))
    inputs = tokens(*lay(L), E), tokens(*lay(S), theirs.kdim), tokens(*lay(S), theirs.vdim)
    given = masks() | weights
    # with add_zero_attn the word that a mask is causal makes torch's module hide the slot, against its own mask
    plain = {name: option for name, option in given.items() if name != "is_causal"}
    compare(
        theirs,
        same(theirs),
        lambda module: module(*inputs, **(plain if theirs.add_zero_attn and module is theirs else given)),
        inputs,
    )


@pytest.mark.parametrize("masks", ["none", "boolean (L, S)", "padding", "folded"])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
def test_one_sequence_without_a_batch(batch_first, masks, weights):
    theirs = torchs(batch_first=batch_first)
    inputs = tokens(L, E), tokens(S, E), tokens(S, E)
    given = {
        "none": {},
        "boolean (L, S)": {"attn_mask": hidden(L, S)},
        "padding": {"key_padding_mask": padding()[0]},
        "folded": {"attn_mask": hidden(H, L, S)},
    }[masks]
    ours = same(theirs)
    compare(theirs, ours, lambda module: module(*inputs, **given, **weights), inputs)
    assert ours(inputs[0]).shape == (L, E)


def test_arguments_have_torchs_order():
    theirs, x = torchs(batch_first=True), tokens(B, S, E)
    call = (x, x, x, padding(), True, hidden(S, S), False)
    compare(theirs, same(theirs), lambda module: module(*call), [x])


def test_the_pair_unpacks_whatever_the_batch():
    """`out, _ = attend(x, x, x)` unpacked a batch of two, and [0] took its first sequence."""
    x = torch.randn(2, L, E)
    out, weights = DiffmaxAttention(E, H)(x, x, x)
    assert out.shape == x.shape
    assert weights.shape == (2, L, L)
    assert isinstance(DiffmaxAttention(E, H)(x), torch.Tensor)


@pytest.mark.parametrize("weights", [True, False])
def test_is_causal_needs_no_mask(weights):
    """torch's module raises there."""
    x, module = torch.randn(B, L, E), DiffmaxAttention(E, H, alpha=0.5)
    out, got = module(x, x, x, is_causal=True, need_weights=weights)
    close(out, module(x, is_causal=True))
    assert got is None or not got.triu(1).any()
    close(module(x, x, x, attn_mask=torch.ones(L, L).triu(1).bool(), need_weights=weights)[0], out)


def test_a_gradient_reaches_a_floating_mask():
    theirs, x, mask = torchs(batch_first=True), tokens(B, S, E), tokens(B * H, S, S)
    compare(theirs, same(theirs), lambda module: module(x, x, x, attn_mask=mask, need_weights=False), [x, mask])


def test_weights_are_those_of_diffmax_and_alpha_learns_from_them():
    x = torch.randn(B, L, E)
    module = DiffmaxAttention(E, H, num_kv_heads=2, alpha=0.5, alpha_map=HillMap(0.9))
    out, weights = module(x * 5, x * 5, x * 5, average_attn_weights=False)
    assert (weights == 0).any()
    close(weights.sum(-1), torch.ones(B, H, L))
    close(out, module(x * 5))
    weights.square().sum().backward()
    assert (module.log_beta.grad != 0).all()


def test_weights_after_dropout_as_torchs_module_returns_them():
    x, module = torch.randn(B, L, E), DiffmaxAttention(E, H, dropout=0.5)
    torch.manual_seed(3)
    out, weights = module(x, x, x, average_attn_weights=False)
    torch.manual_seed(3)
    close(module(x, x, x, need_weights=False)[0], out)
    value = module.v_proj(x).unflatten(2, (H, -1)).transpose(1, 2)
    close(module.out_proj((weights @ value).transpose(1, 2).flatten(2)), out)


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype")
@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("settings", [{"batch_first": True}, {}, {"norm_first": True}, {"bias": False, "batch_first": True}])
def test_inside_torchs_encoder(settings, train, gradients):
    layer = nn.TransformerEncoderLayer(E, H, 32, dropout=0.0, **settings).double()
    ours = copy.deepcopy(layer)
    ours.self_attn = same(layer.self_attn)
    both = [nn.TransformerEncoder(one, 2).train(train) for one in (layer, ours)]
    pads = padding()
    x = tokens(*((B, S) if settings.get("batch_first") else (S, B)), E)
    causal = nn.Transformer.generate_square_subsequent_mask(S, dtype=torch.float64)
    for masks in (
        {},
        {"src_key_padding_mask": pads},
        {"mask": causal},
        {"mask": causal, "src_key_padding_mask": pads, "is_causal": True},
        {"mask": torch.ones(S, S).triu(1).bool()},
    ):
        with torch.set_grad_enabled(gradients):
            expected, got = (encoder(x, **masks) for encoder in both)
        if "src_key_padding_mask" in masks:  # there torch's own way with nested tensors has zeros
            real = ~pads if settings.get("batch_first") else ~pads.T
            expected, got = expected[real], got[real]
        close(got, expected)
        if gradients:
            close(*(torch.autograd.grad(out.square().sum(), x)[0] for out in (got, expected)))


def test_an_encoder_whose_layers_are_exchanged_later_does_not_compute_past_them():
    """It was made with torch's modules, and would go on with nested tensors and their packed weights."""
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(E, H, 32, dropout=0.0, batch_first=True), 2).double().eval()
    pads, x = padding(), tokens(B, S, E).detach()
    expected = encoder.train()(x, src_key_padding_mask=pads)[~pads]
    calls = []
    for layer in encoder.eval().layers:
        layer.self_attn = same(layer.self_attn)
        layer.self_attn.out_proj.register_forward_hook(lambda *_: calls.append(1))
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            close(encoder(x, src_key_padding_mask=pads)[~pads], expected)
    assert len(calls) == 4


def test_with_alpha_below_one_evaluation_is_as_training():
    layer = nn.TransformerEncoderLayer(E, H, 32, dropout=0.0, batch_first=True)
    layer.self_attn = DiffmaxAttention(E, H, alpha=0.5)
    encoder, x = nn.TransformerEncoder(layer, 2), torch.randn(B, S, E) * 3
    trained = encoder(x)
    with torch.no_grad():
        assert torch.equal(encoder.eval()(x), trained)
    softmax = nn.TransformerEncoderLayer(E, H, 32, dropout=0.0, batch_first=True)
    softmax.load_state_dict({**layer.state_dict(), **softmax.state_dict()}, strict=False)
    assert not torch.allclose(nn.TransformerEncoder(softmax, 2).eval()(x), trained)


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype")
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_inside_torchs_whole_transformer(batch_first, train):
    theirs = nn.Transformer(E, H, 2, 2, 32, dropout=0.0, batch_first=batch_first).double().train(train)
    ours = copy.deepcopy(theirs)
    for layer in (*ours.encoder.layers, *ours.decoder.layers):
        for name in ("self_attn", "multihead_attn"):
            if hasattr(layer, name):
                setattr(layer, name, same(getattr(layer, name)))
    source, target = (tokens(*((B, n) if batch_first else (n, B)), E) for n in (S, L))
    masks = {
        "tgt_mask": theirs.generate_square_subsequent_mask(L, dtype=torch.float64),
        "memory_mask": added(L, S),
        "src_key_padding_mask": padding(),
        "memory_key_padding_mask": padding(),
        "tgt_is_causal": True,
    }
    expected, got = (model(source, target, **masks) for model in (theirs, ours))
    close(got, expected)
    for a, b in zip(*(torch.autograd.grad(out.square().sum(), (source, target)) for out in (got, expected)), strict=True):
        close(a, b)


@pytest.mark.slow
def test_torchs_layers_compile_in_one_graph():
    layer = nn.TransformerEncoderLayer(E, H, 32, dropout=0.0, batch_first=True)
    layer.self_attn = DiffmaxAttention(E, H, alpha=0.5)
    x = torch.randn(B, S, E)
    for train in (True, False):
        layer.train(train)
        close(
            torch.compile(layer, backend="aot_eager", fullgraph=True)(x, src_key_padding_mask=padding()),
            layer(x, None, padding()),
        )


@pytest.mark.parametrize("settings", [*SETTINGS.values(), {"dropout": 0.25}])
def test_there_and_back_again(settings):
    theirs = torchs(**settings).eval()
    again = same(theirs).to_torch()
    assert not again.training
    for name in ("kdim", "vdim", "batch_first", "add_zero_attn", "dropout", "embed_dim", "num_heads"):
        assert getattr(again, name) == getattr(theirs, name)
    assert again.state_dict().keys() == theirs.state_dict().keys()
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)


def test_settings_are_torchs_names():
    module = DiffmaxAttention(E, H, batch_first=False, add_zero_attn=True, device="meta", dtype=torch.bfloat16)
    assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
    assert all(p.is_meta for p in module.parameters())
    assert module.null_sink
    assert not module.batch_first


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, x: m(x.to_sparse()), r"query must be a strided tensor, .*\nconvert it first, with query.to_dense\(\)"),
        (lambda m, x: m(x, x, x.long()), r"value must be float16, .* got int64"),
        (lambda m, x: m(x.tolist()), "query must be a torch.Tensor, got list"),
        (lambda m, x: m(x, x.tolist(), x), "key must be a torch.Tensor, got list"),
        (lambda m, x: m(x, value=x), "value must come with key, got value alone"),
        (lambda m, x: m(x, average_attn_weights=False), "belong to a call with query, key and value"),
        (
            lambda m, x: m(x, x, x, attn_mask=torch.ones(B, 1, L, L).bool()),
            r"\(L, S\) = \(5, 5\) or \(B \* H, L, S\) = \(8, 5, 5\), as in nn.Multi.* got \(2, 1, 5, 5\)\n"
            r"if it is True where a key is seen, pass ~mask; give it the shape with .expand\(2, 4, 5, 5\).flatten\(0, 1\)",
        ),
        (lambda m, x: m(x, x, x, attn_mask=torch.randn(1, L)), r"\ngive it the shape with .expand\(2, 4, 5, 5\)"),
        (
            lambda m, x: m(x, x, x, attn_mask=torch.randn(B, B)),
            r"got \(2, 2\)\ntokens come batch first, unless .*batch_first=False",
        ),
        (lambda m, x: m(x, x, x, key_padding_mask=torch.ones(L, B).bool()), "got .*\ntokens come batch first, unless"),
        (
            lambda m, x: m(x, x, x, key_padding_mask=torch.ones(B, L).long()),
            "boolean, True at padding, or floating, got torch.int64",
        ),
        (lambda m, x: m(x, x, x, attn_mask=torch.ones(L, L).int()), "boolean or floating, got torch.int32\n.* is hidden"),
        (lambda m, x: m(x, attn_mask=torch.ones(L, L).int()), "boolean or floating, got torch.int32\n.* is seen"),
        (lambda m, x: m(x, x[0], x), r"key must have shape .* got \(5, 16\)"),
        (lambda m, x: DiffmaxAttention(E, H, add_bias_kv=True), 'add_bias_kv must be False, got True\n.*sink="learned"'),
        (lambda m, x: DiffmaxAttention(E, H, add_zero_attn=True, sink="learned"), "exclude each other, got both"),
        (lambda m, x: DiffmaxAttention.from_torch(nn.MultiheadAttention(E, H, add_bias_kv=True)), "add_bias_kv must be False"),
        (lambda m, x: DiffmaxAttention(E, H, 2, head_gate=True).to_torch(), "got one with num_kv_heads, head_gate"),
        (lambda m, x: nn.init.zeros_(m.in_proj_weight), "there is no in_proj_weight.*\n.*apart, in q_proj"),
        (lambda m, x: torch.add(m.in_proj_bias, 1), "there is no in_proj_weight or in_proj_bias, got a call of add"),
    ],
)
def test_what_is_refused(call, message):
    with pytest.raises((ValueError, TypeError, AttributeError), match=message):
        call(DiffmaxAttention(E, H), torch.randn(B, L, E))


def test_making_an_encoder_warns_of_nothing():
    layer = nn.TransformerEncoderLayer(E, H, 32, batch_first=True)
    layer.self_attn = DiffmaxAttention(E, H)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder = nn.TransformerEncoder(layer, 2)
    assert encoder.layers[0].self_attn is not encoder.layers[1].self_attn
