"""Lazy attention: the function's rules, the module, and the published names."""

import pytest
import torch

import diffmax
from diffmax.compat import adasplash
from diffmax.nn import LazyAttention, param_groups


def qkv(length=10, many=None, heads=4, kv_heads=2):
    many = length if many is None else many
    q = torch.randn(2, heads, length, 8).double()
    return q, *(torch.randn(2, kv_heads, many, 8).double() for _ in range(2))


@pytest.mark.slow
def test_gradients_for_bias_and_tau():
    q, k, v = (t[:1, :, :4, :4].clone().requires_grad_() for t in qkv())
    bias, tau = torch.randn(4, 3).double().requires_grad_(), torch.tensor([-0.9, -0.5, -0.2, 0.3]).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda *given: diffmax.lazy_attention(*given, 2), (q, k, v, bias, tau))


def test_a_lone_key_is_kept_unless_as_published():
    q, k, v = qkv()
    bias = torch.zeros(4, 5).double()
    _, mass = diffmax.lazy_attention(q, k, v, bias, -1.0, return_mass=True)
    assert (mass[:, :, 0] == 1).all()
    _, mass = diffmax.lazy_attention(q, k, v, bias, -1.0, first_row="published", return_mass=True)
    assert not mass[:, :, 0].any()


def test_tau_above_zero_does_not_leak():
    q, k, v = qkv()
    bias = torch.randn(4, 5).double()
    before = diffmax.lazy_attention(q, k, v, bias, 2.0)
    v = v.clone()
    v[:, :, 6:] = 100
    assert torch.equal(diffmax.lazy_attention(q, k, v, bias, 2.0)[:, :, :6], before[:, :, :6])


@pytest.mark.parametrize("weights", ["softmax", "diffmax"])
def test_decoding_is_right_aligned(weights):
    q, k, v = qkv()
    bias = torch.randn(4, 5).double()
    whole = diffmax.lazy_attention(q, k, v, bias, -0.5, weights=weights, alpha=0.5 if weights == "diffmax" else None)
    torch.testing.assert_close(
        diffmax.lazy_attention(q[:, :, 7:], k, v, bias, -0.5, weights=weights, alpha=0.5 if weights == "diffmax" else None),
        whole[:, :, 7:],
    )


def test_left_padding_changes_nothing():
    q, k, v = qkv()
    bias, seen = torch.randn(4, 5).double(), torch.ones(2, 1, 1, 10, dtype=torch.bool)
    seen[1, ..., :3] = False
    out = diffmax.lazy_attention(q, k, v, bias, -0.5, attn_mask=seen)
    alone = diffmax.lazy_attention(q[1:, :, 3:], k[1:, :, 3:], v[1:, :, 3:], bias, -0.5)
    torch.testing.assert_close(out[1:, :, 3:], alone)
    assert not out[1, :, :3].any()
    full = diffmax.lazy_attention(q, k, v, bias, -0.5, attn_mask=seen.expand(2, 1, 10, 10))
    torch.testing.assert_close(full, out)


def test_says_what_is_wrong():
    q, k, v = qkv()
    for bias, options, says in (
        (torch.zeros(4, 5), {"window_size": 7}, "bias must have window_size or window_size"),
        (None, {"first_row": "dropped"}, "first_row must be one of kept, published, got 'dropped'"),
        (None, {"weights": "scores"}, "weights must be one of softmax, diffmax, got 'scores'"),
    ):
        with pytest.raises(ValueError, match=says):
            diffmax.lazy_attention(q, k, v, bias, -1.0, **options)
    with pytest.raises(ValueError, match=r"tau must be a float or of shape \(\) or \(4,\), got \(3,\)"):
        diffmax.lazy_attention(q, k, v, None, torch.zeros(3))


def test_the_module_decodes_over_its_past():
    attend, x = LazyAttention(32, 4, 6, num_kv_heads=2), torch.randn(2, 9, 32)
    with torch.no_grad():
        attend.attention_biases.normal_()
    whole, past, parts = attend(x), None, []
    for token in x.split(1, 1):
        out, past = attend(token, past=past, return_past=True)
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, 1), whole)


def test_names_of_parameters_and_precision():
    attend = LazyAttention(32, 4, 6).to(torch.bfloat16)
    names = {"attention_biases", "tau", *(f"{name}_proj.weight" for name in "qkvo")}
    assert set(attend.state_dict()) == names
    assert attend.attention_biases.dtype == attend.tau.dtype == torch.float32
    assert attend.attention_biases.shape == (4, 7)
    assert (attend.tau == -1).all()
    with torch.no_grad():
        attend.tau.fill_(-0.3333333)
    assert (attend.half().tau == torch.tensor(-0.3333333)).all()
    out = attend(torch.randn(1, 5, 32).half())
    assert out.dtype == torch.float16
    out.sum().backward()
    assert attend.tau.grad.dtype == torch.float32


def test_masks_of_every_shape():
    attend, x = LazyAttention(32, 4, 6), torch.randn(2, 5, 32)
    seen = torch.ones(2, 5, 5, dtype=torch.bool)
    seen[1, :, 3:] = False
    wanted = attend(x, seen[:, None])
    torch.testing.assert_close(attend(x, seen), wanted)
    torch.testing.assert_close(attend(x, seen[:, 0]), wanted)
    torch.testing.assert_close(attend(x, seen[:1]), attend(x))
    assert not attend(x, torch.zeros(2, 5, 5, dtype=torch.int64)).any()
    square, padding = torch.randn(5, 5, 32), torch.ones(5, 5)  # as many sequences as tokens: still one row for each sequence
    padding[2, 3:] = 0
    torch.testing.assert_close(attend(square, padding)[2, :3], attend(square[2:3, :3])[0])
    with pytest.raises(ValueError, match=r"of two dimensions must be \(B, S\) = \(2, 5\), got \(5, 5\)\nfor one of queries"):
        attend(x, seen[0])
    with pytest.raises(TypeError, match="mask must be a tensor, got list"):
        attend(x, [1])


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"dim": 30}, ValueError, "dim must be a multiple of num_heads, got 30 and 4\ntake another number of heads$"),
        ({"weights": "hard"}, ValueError, "weights must be one of softmax, diffmax, got 'hard'"),
        ({"first_row": "no"}, ValueError, "first_row must be one of kept, published, got 'no'"),
        ({"alpha": 2.0, "weights": "diffmax"}, ValueError, "alpha must lie strictly between 0 and 1, got 2.0"),
        ({"alpha": torch.full((4,), 0.5)}, ValueError, "weights must be \"diffmax\" with an alpha, got 'softmax' and a tensor"),
        ({"alpha": 0.9}, ValueError, "weights must be \"diffmax\" with an alpha, got 'softmax' and 0.9"),
        ({"alpha_map": diffmax.HillMap(c=0.6)}, ValueError, "weights must be \"diffmax\" with alpha_map, got 'softmax'"),
        ({"window_size": -1}, ValueError, "window_size must be an int that is not negative, got -1"),
    ],
)
def test_construction_says_what_is_wrong(options, kind, message):
    with pytest.raises(kind, match=f"^LazyAttention: {message}"):
        LazyAttention(**{"dim": 32, "num_heads": 4, **options})


@pytest.mark.parametrize("learned", ["parameter", "map"])
def test_a_learned_alpha_per_head(learned):
    torch.manual_seed(3)
    alphas, x = torch.tensor([0.5, 0.6, 0.7, 0.8]), torch.randn(2, 9, 32)
    given = {"alpha": torch.nn.Parameter(alphas.clone())} if learned == "parameter" else {"alpha": alphas}
    given |= {"alpha_map": diffmax.HillMap(c=0.6)} if learned == "map" else {}
    attend = LazyAttention(32, 4, 6, weights="diffmax", **given)
    torch.testing.assert_close(attend.current_alpha, alphas)
    with torch.no_grad():
        attend.tau.fill_(-0.2)
    name = "alpha" if learned == "parameter" else "log_beta"
    attend(x).square().sum().backward()
    assert getattr(attend, name).grad.abs().min() > 0
    fixed = LazyAttention(32, 4, 6, weights="diffmax", alpha=alphas)
    fixed.load_state_dict({**attend.state_dict(), "alpha": alphas}, strict=learned == "parameter")
    torch.testing.assert_close(fixed(x), attend(x))
    groups = {group["name"]: group for group in diffmax.nn.param_groups(attend, 0.1, weight_decay=0.1)}
    assert [id(p) for p in groups["alpha"]["params"]] == [id(getattr(attend, name))]
    before = getattr(attend, name).detach().clone()
    with torch.no_grad():
        getattr(attend, name).zero_()
    attend.reset_parameters()
    assert torch.equal(getattr(attend, name), before)
    assert attend.bfloat16()(x.bfloat16()).isfinite().all()


def test_a_checkpoint_of_softmax_weights_starts_alpha():
    softmax, ours = LazyAttention(32, 4, 6), LazyAttention(32, 4, 6, weights="diffmax", alpha_map=diffmax.HillMap(c=0.6))
    ours.load_state_dict(softmax.state_dict())
    torch.testing.assert_close(ours.current_alpha, torch.full((4,), 0.9))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize(
    ("weights", "causal", "first_row"), [("softmax", True, "kept"), ("diffmax", True, "published"), ("softmax", False, "kept")]
)
def test_packed_sequences_are_sequences(weights, causal, first_row, backend):
    """Empty ones, one of a query, and ones of fewer queries than keys among them; gradients too."""
    starts_q, starts_k = [0, 4, 4, 5, 11], [0, 6, 7, 8, 14]
    tensors = [torch.randn(11, 4, 8), torch.randn(14, 2, 8), torch.randn(14, 2, 5), torch.randn(4, 3), torch.rand(4) - 0.8]
    ours, theirs = ([t.double().requires_grad_() for t in tensors] for _ in range(2))
    alpha = torch.tensor([0.5, 0.6, 0.7, 0.8]).double() if weights == "diffmax" else None
    options = {"weights": weights, "alpha": alpha, "is_causal": causal, "first_row": first_row, "return_mass": True}
    ends = (torch.tensor(starts).int() for starts in (starts_q, starts_k))
    packed = diffmax.lazy_attention_varlen(*ours, *ends, 6, 6, 3, backend=backend, **options)
    q, k, v, *learned = theirs
    pieces = []
    for n in range(4):
        spans = [slice(starts[n], starts[n + 1]) for starts in (starts_q, starts_k, starts_k)]
        rows = [t[span].transpose(0, 1).unsqueeze(0) for t, span in zip((q, k, v), spans, strict=True)]
        pieces.append(
            [t[0].transpose(0, 1) for t in diffmax.lazy_attention(*rows, *learned, 3, backend="reference", **options)]
        )
    alone = tuple(torch.cat(each) for each in zip(*pieces, strict=True))
    torch.testing.assert_close(packed, alone)
    for a, b in zip(*(torch.autograd.grad([t.square().sum() for t in r], g) for r, g in ((packed, ours), (alone, theirs))),
                    strict=True):  # fmt: skip
        torch.testing.assert_close(a, b)


def test_packed_sequences_say_what_is_wrong():
    x, ends = torch.randn(5, 2, 4), torch.tensor([0, 2, 5], dtype=torch.int32)
    for given, options, says in (
        ((ends, ends, 3, 3), {"weights": "scores"}, "weights must be one of softmax, diffmax, got 'scores'"),
        ((ends, ends, 3, 3), {"first_row": "no"}, "first_row must be one of kept, published, got 'no'"),
        ((ends, ends[:2], 3, 3), {}, "cu_seqlens_k must ascend from 0 to the number of tokens, 5, got"),
        ((ends, ends, 2, 3), {}, "max_seqlen_q must be at least the longest length, 3, got 2"),
        ((ends, ends, 3, 3), {"tau": torch.zeros(3)}, r"tau must be a float or of shape \(\) or \(2,\), got \(3,\)"),
    ):
        with pytest.raises(ValueError, match=f"^diffmax.lazy_attention_varlen: {says}"):
            diffmax.lazy_attention_varlen(x, x, x, None, options.pop("tau", -0.5), *given, **options)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            {"bias": torch.zeros(3, 9)},
            r"bias must have a number per head and distance, shape \(H, W\) with H = 2, got \(3, 9\)",
        ),
        ({"bias": None, "weights": "diffmax", "alpha": 2.0}, "alpha must lie strictly between 0 and 1, got 2.0"),
        ({"bias": None, "scale": "wide"}, "scale must be a float, got 'wide' of type str"),
        ({"bias": None, "return_mass": 1}, "return_mass must be True or False, got 1 of type int"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_errors_name_the_function_that_was_called(packed, options, says):
    bias, rest = options["bias"], {name: value for name, value in options.items() if name != "bias"}
    x, ends = torch.randn(5, 2, 4), torch.tensor([0, 2, 5], dtype=torch.int32)
    name, given = ("lazy_attention_varlen", (ends, ends, 3, 3)) if packed else ("lazy_attention", ())
    x = x if packed else x.transpose(0, 1).unsqueeze(0)
    with pytest.raises((TypeError, ValueError), match=f"^diffmax.{name}: {says}"):
        getattr(diffmax, name)(x, x, x, bias, -0.5, *given, **rest)


@pytest.mark.skipif(torch.__version__ < "2.5", reason="needs a Dynamo that knows replace(): pip install 'torch>=2.13'")
def test_packed_sequences_compile():
    x, ends = torch.randn(10, 2, 8), torch.tensor([0, 4, 10], dtype=torch.int32)

    def run(x, ends):
        return diffmax.lazy_attention_varlen(x, x, x, torch.zeros(2, 4), -0.5, ends, ends, 6, 6)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, ends), run(x, ends))


@pytest.mark.skipif(torch.__version__ < "2.5", reason="needs a Dynamo that knows replace(): pip install 'torch>=2.13'")
def test_exports_with_a_free_length():
    class Model(torch.nn.Module):
        def forward(self, q, k, v):
            return diffmax.lazy_attention(q, k, v, torch.zeros(4, 3).double(), -0.5)

    length = torch.export.Dim("length", min=2, max=4096)
    exported = torch.export.export(Model(), qkv(10), dynamic_shapes=({2: length},) * 3).module()
    given = qkv(14)
    torch.testing.assert_close(exported(*given), Model()(*given))


def test_published_names():
    q, k, v = (t.float() for t in qkv(kv_heads=4))
    bias, tau = torch.randn(4, 7), torch.full((4,), -0.5)
    lengths = torch.tensor([10, 6], dtype=torch.int32)
    spoilt = k.clone()
    spoilt[1, :, 6:] = torch.nan
    out = adasplash.lazy_attention_triton(q, spoilt, v, bias, tau, 6, lengths)
    assert not out[1, :, 6:].any()
    alone = adasplash.lazy_attention_triton(q[1:, :, :6], k[1:, :, :6], v[1:, :, :6], bias, tau, 6)
    torch.testing.assert_close(out[1:, :, :6], alone)
    theirs, ours = adasplash.LazyAttention(32, 4, 6), LazyAttention(32, 4, 6, first_row="published")
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 5, 32)
    assert torch.equal(ours(x), theirs(x))


@pytest.mark.parametrize(
    ("mask", "kind", "says"),
    [
        (torch.zeros(6, 6), TypeError, r"lazy_attention: attn_mask must be a boolean tensor.*\n.*attn_mask == 0"),
        (torch.ones(6, 6, dtype=torch.int32), TypeError, "pass attn_mask.bool()"),
        ([[True]], TypeError, "attn_mask must be a boolean tensor, True where a key is seen, got list"),
    ],
    ids=("added", "of ints", "a list"),
)
@pytest.mark.parametrize("causal", [True, False])
def test_a_mask_that_is_not_boolean_is_refused(mask, kind, says, causal):
    q, k, v = torch.randn(3, 1, 2, 6, 4).unbind()
    with pytest.raises(kind, match=says):
        diffmax.lazy_attention(q, k, v, None, -0.5, attn_mask=mask, is_causal=causal)


@pytest.mark.parametrize(
    ("window", "kind", "says"), [("x", TypeError, "must be an int or None"), (-7, ValueError, "must not be negative, got -7")]
)
def test_a_window_is_checked_without_a_bias_too(window, kind, says):
    q, k, v = torch.randn(3, 1, 2, 6, 4).unbind()
    with pytest.raises(kind, match=says):
        diffmax.lazy_attention(q, k, v, None, -0.5, window)


def test_the_module_refuses_a_mask_that_is_added_and_a_past_of_others():
    module, x = LazyAttention(32, 4, window_size=8), torch.randn(2, 6, 32)
    added = torch.zeros(1, 1, 6, 6).masked_fill(torch.ones(6, 6).triu(1).bool(), -torch.inf)
    with pytest.raises(TypeError, match=r"mask must be boolean, or of ints, .* got torch.float32\nof one that is added"):
        module(x, added)
    with pytest.raises(ValueError, match="1 or True where a key is seen and 0 or False elsewhere"):
        module(x, torch.full((2, 6), -1e9))
    torch.testing.assert_close(module(x, torch.ones(2, 6)), module(x))
    for past in (torch.randn(2, 4, 3, 8), (torch.randn(2, 4, 3, 8),), (torch.randn(1, 4, 3, 8),) * 2, 3):
        with pytest.raises(ValueError, match=r"past must be keys and values of shape \(B, H_kv, P, D\) = \(2, 4, P, 8\), got"):
            module(x, past=past)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_past_of_any_length_is_traced_exported_and_compiled():
    module, x = LazyAttention(16, 4, window_size=8).eval(), torch.randn(2, 5, 16)

    class Step(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.attend = module

        def forward(self, x, keys, values):
            return self.attend(x, past=(keys, values))

    with torch.no_grad():
        _, short = module(x[:, :2], return_past=True)
        _, past = module(x[:, :3], return_past=True)
        wanted = module(x[:, 2:4], past=short)
        length = torch.export.Dim("P", min=1, max=100)
        exported = torch.export.export(Step(), (x[:, 3:], *past), dynamic_shapes=({}, {2: length}, {2: length})).module()
        traced = torch.jit.trace(Step(), (x[:, 3:], *past), check_trace=False)
        compiled = torch.compile(Step(), dynamic=True, fullgraph=True, backend="eager")
        for run in (exported, traced, compiled):
            torch.testing.assert_close(run(x[:, 2:4], *short), wanted)


def test_a_window_without_a_bias_is_refused_since_it_would_hide_nothing():
    q, k, v = torch.randn(3, 1, 2, 6, 4).unbind()
    with pytest.raises(ValueError, match=r"how many distances bias has, got 16 and no bias\nto hide keys, pass attn_mask"):
        diffmax.lazy_attention(q, k, v, None, -0.5, 16)


def test_decay_leaves_the_biases_and_the_baseline_alone():
    attend = LazyAttention(32, 4, 6, weights="diffmax", alpha_map=diffmax.HillMap(c=0.6))
    names = {id(parameter): name for name, parameter in attend.named_parameters()}
    groups = {
        group["name"]: {names[id(p)] for p in group["params"]} for group in param_groups(attend, lr=1e-3, weight_decay=0.1)
    }
    assert groups["not decayed"] == {"attention_biases", "tau"}
    assert groups["weights"] == {f"{letter}_proj.weight" for letter in "qkvo"}
    assert groups["alpha"] == {"log_beta"}


def test_what_is_printed_tells_the_weights():
    assert "weights='softmax'" in repr(LazyAttention(32, 4, 6))
    assert "weights='diffmax', alpha=0.5" in repr(LazyAttention(32, 4, 6, weights="diffmax", alpha=0.5))


def test_explain_says_what_to_ask_of_members_of_threshold_attention():
    x = torch.randn(1, 2, 4, 8)
    with pytest.raises(ValueError, match=r"it calls threshold_attention: ask for that$"):
        diffmax.explain(diffmax.lazy_attention, x, x, x, None, -0.5)
