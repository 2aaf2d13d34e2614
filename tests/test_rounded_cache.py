"""The cache for `generate` that keeps keys in 4 bits: the words and scores of DynamicCache, in every way of generating."""

import copy
import pickle
import re

import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers: pip install 'diffmax-core[transformers]'")
import transformers
from transformers import DynamicCache, EncoderDecoderCache

from diffmax.integrations.transformers import RoundedModelCache, register, replace, rounded_cache
from diffmax.integrations.transformers.masks import left_padding

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 61,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "initializer_range": 0.3,
}
FAMILIES = {
    "Llama": {},
    "Mistral": {"sliding_window": 7},
    "Gemma2": {"sliding_window": 7, "head_dim": 8},  # softcap
    "GptOss": {"sliding_window": 7, "head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1},  # sinks, float32 alone
}
IDS = torch.randint(2, 61, (3, 20), generator=torch.Generator().manual_seed(0))
PADDED = torch.ones_like(IDS)
PADDED[0, :6] = 0
PADDED[2, :1] = 0
NEW = 14
register("diffmax-rounded", alpha=0.4)
every_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(autouse=True)
def _few_tokens_are_enough(monkeypatch):
    monkeypatch.setattr(rounded_cache, "LEAST_TOKENS", 4)
    monkeypatch.setattr(rounded_cache, "LEAST_ROOM", 5)
    monkeypatch.setattr(rounded_cache, "MOST_SUPPORT", 1.0)


@pytest.fixture
def decoded(monkeypatch):
    """How many tokens a layer's every call of `decode` read, and whether it appended one."""
    calls = []
    plain = rounded_cache.attention_kvcache

    def watched(query, keys, values, call, *more):
        new = call.k is not None
        calls.append((int(call.cache_seqlens[0]) + new, new))
        return plain(query, keys, values, call, *more)

    monkeypatch.setattr(rounded_cache, "attention_kvcache", watched)
    return calls


def model_of(family="Llama", implementation="diffmax-rounded", **changed):
    torch.manual_seed(1)
    config = getattr(transformers, f"{family}Config")(
        **{**SIZES, **FAMILIES.get(family, {}), **changed}, attn_implementation=implementation
    )
    return (
        getattr(transformers, f"{family}ForCausalLM")(config).to(torch.float32 if family == "GptOss" else torch.float64).eval()
    )


def generated(model, cache, ids=IDS, **options):
    """Words, and the scores of each step."""
    settings = {"max_new_tokens": NEW, "do_sample": False, **options}
    out = model.generate(
        ids,
        past_key_values=cache,
        return_dict_in_generate=True,
        output_scores=not options.get("prompt_lookup_num_tokens"),
        **settings,
    )
    return out.sequences, out.scores


def close(got, wanted):
    exact = wanted[0].dtype == torch.float64
    torch.testing.assert_close(got, wanted, rtol=1e-7 if exact else 1e-4, atol=1e-7 if exact else 1e-4)


def same(model, **options):
    words, scores = generated(model, RoundedModelCache(), **options)
    wanted, wanted_scores = generated(model, DynamicCache(), **options)
    assert torch.equal(words, wanted)
    close(scores, wanted_scores)
    by_config, _ = generated(model, RoundedModelCache(model.config), **options)
    assert torch.equal(by_config, wanted)


WAYS = {
    "plain": {},
    "left padding": {"attention_mask": PADDED},
    "beams": {"attention_mask": PADDED, "num_beams": 3},
    "several beams": {"num_beams": 2, "num_return_sequences": 2},
    "chunked prefill": {"attention_mask": PADDED, "prefill_chunk_size": 7},
}


@every_family
@pytest.mark.parametrize("way", WAYS)
def test_generates_words_and_scores_of_the_dynamic_cache(family, way, decoded):
    same(model_of(family), **WAYS[way])
    assert decoded


@every_family
def test_new_tokens_are_appended_by_the_operator(family, decoded):
    """The bounds are made once, for the prompt; then each step brings them up to date, until the memory is moved."""
    model = model_of(family)
    cache = RoundedModelCache(page_size=4)  # memory of whole pages
    generated(model, cache)
    layers = [layer for layer in cache.layers if isinstance(layer, rounded_cache.RoundedLayer)]
    assert len(decoded) == len(layers) * (NEW - 1)
    made = [tokens for tokens, appended in decoded if not appended]
    assert sorted(set(made)) == [21, 29]  # memory for 28 tokens, in pages of 4: 20, and 5 or more
    assert len(made) == 2 * len(layers)


def test_layers_in_which_many_keys_have_a_weight_read_all(monkeypatch, decoded):
    """They try once, and again when the memory is moved."""
    monkeypatch.setattr(rounded_cache, "MOST_SUPPORT", 0.1)
    register("diffmax-dense", alpha=0.95)
    generated(model_of(implementation="diffmax-dense"), RoundedModelCache(page_size=4))
    assert decoded == [(tokens, False) for tokens in (21, 21, 29, 29)]  # of two layers


def test_assisted_generation_and_prompt_lookup(decoded):
    model, draft = model_of(), model_of(num_hidden_layers=1)
    greedy = model.generate(IDS[:1], max_new_tokens=NEW, do_sample=False)
    for options in ({"assistant_model": draft}, {"prompt_lookup_num_tokens": 3}):
        words = model.generate(IDS[:1], past_key_values=RoundedModelCache(), max_new_tokens=NEW, do_sample=False, **options)
        assert torch.equal(words, greedy)


@torch.no_grad()
def test_a_cache_is_cropped_copied_selected_pickled_and_reset(decoded):
    model = model_of()
    cache, plain = RoundedModelCache(), DynamicCache()

    def both(ids, *caches):
        for one, other in caches or ((cache, plain),):
            got, wanted = (model(ids, past_key_values=c, use_cache=True).logits for c in (one, other))
            close(got, wanted)

    def step(batch, *caches):
        both(torch.full((batch, 1), 7), *caches)

    both(IDS)
    for _ in range(3):
        step(3)
    for c in (cache, plain):
        c.crop(-2)
    for _ in range(9):
        step(3)
    copies = copy.deepcopy(cache), copy.deepcopy(plain)
    loaded = pickle.loads(pickle.dumps(cache)), pickle.loads(pickle.dumps(plain))
    step(3)
    for _ in range(2):
        step(3, copies, loaded)
    for c in (cache, plain):
        c.batch_repeat_interleave(2)
    step(6)
    for c in (cache, plain):
        c.batch_select_indices(torch.tensor([5, 0]))
    for _ in range(2):
        step(2)
    for c in (cache, plain):
        c.reorder_cache(torch.tensor([1, 0]))
    step(2)
    assert cache.get_seq_length() == plain.get_seq_length() == 20 + 3 - 2 + 9 + 1 + 1 + 2 + 1
    assert decoded[-1][1]  # the bounds were reordered with the keys
    cache.reset()
    assert cache.memory == cache.get_seq_length() == 0
    again = cache, DynamicCache()
    both(IDS, again)
    step(3, again)


@torch.no_grad()
def test_tokens_after_a_crop_replace_others_in_bounds_and_codes():
    model = model_of()
    cache, plain = RoundedModelCache(page_size=4), DynamicCache()
    for c in (cache, plain):
        model(IDS, past_key_values=c, use_cache=True)
    for word in range(30):
        for _ in range(2):
            got, wanted = (
                model(torch.full((3, 1), 2 + word), past_key_values=c, use_cache=True).logits for c in (cache, plain)
            )
            close(got, wanted)
        for c in (cache, plain):
            c.crop(-1)


def test_a_cache_filled_in_inference_mode_goes_on_without(decoded):
    model = model_of()
    cache, plain = RoundedModelCache(), DynamicCache()
    with torch.inference_mode():
        for ids in (IDS, IDS[:, :1]):
            model(ids, past_key_values=cache, use_cache=True)
            model(ids, past_key_values=plain, use_cache=True)
    with torch.no_grad():
        for _ in range(2):
            got, wanted = (model(IDS[:, 1:2], past_key_values=c, use_cache=True).logits for c in (cache, plain))
            close(got, wanted)
    assert decoded[-1][1]


@pytest.mark.parametrize("trained", [".*", "q_proj"])
def test_gradients_go_through_the_cache(trained):
    """Also where no key needs one: a backward keeps them all the same."""
    grads = []
    for make in (RoundedModelCache, DynamicCache):
        model, cache = model_of(), make()
        for name, p in model.named_parameters():
            p.requires_grad_(re.search(trained, name) is not None)
        first = model(IDS, past_key_values=cache, use_cache=True).logits.square().sum()
        (first + model(IDS[:, :3], past_key_values=cache, use_cache=True).logits.square().sum()).backward()
        grads.append([p.grad for p in model.parameters()])
        with torch.no_grad():
            model(IDS[:, :1], past_key_values=cache, use_cache=True)
        assert cache.get_seq_length() == 24
    for got, wanted in zip(*grads, strict=True):
        if wanted is not None:
            torch.testing.assert_close(got, wanted)


@torch.no_grad()
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("then", [True, False])
def test_autocast_and_dtypes_that_change(first, then):
    """Keys of rotary models are float32 under autocast, and values bfloat16."""
    model = model_of().float()
    cache, plain, exact = RoundedModelCache(), DynamicCache(), DynamicCache()
    for ids, on in ((IDS, first), (IDS[:, :1], then), (IDS[:, 1:2], then), (IDS[:, 2:3], first)):
        right = model(ids, past_key_values=exact, use_cache=True).logits
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            errors = [(model(ids, past_key_values=c, use_cache=True).logits - right).abs().max() for c in (cache, plain)]
        assert errors[0] <= 2 * errors[1] + 1e-4


@torch.no_grad()
def test_a_model_that_is_converted_goes_on():
    model, (cache, plain) = model_of().float(), (RoundedModelCache(), DynamicCache())
    for ids in (IDS, IDS[:, :1]):
        for c in (cache, plain):
            model(ids, past_key_values=c, use_cache=True)
    model.double()
    for _ in range(2):
        got, wanted = (model(IDS[:, :1], past_key_values=c, use_cache=True).logits for c in (cache, plain))
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)  # what was cached before was computed in float32


@torch.no_grad()
def test_another_batch_is_refused():
    model, cache = model_of(), RoundedModelCache()
    model(IDS, past_key_values=cache, use_cache=True)
    for ids in (IDS[:1, :1], IDS.repeat(2, 1)[:, :1]):
        with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
            model(ids, past_key_values=copy.deepcopy(cache), use_cache=True)


@torch.inference_mode()
def copied(cache):
    return copy.deepcopy(cache)


@torch.no_grad()
def test_copies_that_were_made_in_inference_mode(decoded):
    model = model_of()
    cache, plain = RoundedModelCache(), DynamicCache()
    for ids in (IDS, IDS[:, :1]):
        for c in (cache, plain):
            model(ids, past_key_values=c, use_cache=True)
    cache, plain = copied(cache), copied(plain)
    for _ in range(2):
        got, wanted = (model(IDS[:, :1], past_key_values=c, use_cache=True).logits for c in (cache, plain))
        close(got, wanted)
    assert decoded[-1][1]


EDITS = {
    "every second": lambda layer: setattr_both(layer, lambda t: t[:, :, ::2]),
    "without the first": lambda layer: setattr_both(layer, lambda t: t[:, :, 1:]),
    "in place": lambda layer: layer.keys[:, :, 3:6].mul_(3),
    "values in place": lambda layer: layer.values[:, :, 3:6].mul_(3),
    "zeroed": lambda layer: (layer.keys.zero_(), layer.values.zero_()),
}


def setattr_both(layer, change):
    layer.keys, layer.values = change(layer.keys), change(layer.values)


@torch.no_grad()
@pytest.mark.parametrize("edit", EDITS)
def test_keys_that_somebody_else_changes(edit):
    model = model_of()
    cache, plain = RoundedModelCache(), DynamicCache()
    for ids in (IDS, IDS[:, :1], IDS[:, 1:2]):
        for c in (cache, plain):
            model(ids, past_key_values=c, use_cache=True)
    for c in (cache, plain):
        for layer in c.layers:
            EDITS[edit](layer)
    for _ in range(3):
        got, wanted = (model(IDS[:, :1], past_key_values=c, use_cache=True).logits for c in (cache, plain))
        close(got, wanted)


@torch.no_grad()
def test_a_mask_that_does_not_fit_is_no_padding():
    model = model_of()
    for c in (RoundedModelCache(), DynamicCache()):
        model(IDS, past_key_values=c, use_cache=True)
        hidden = torch.ones(1, 1, 1, 21, dtype=torch.bool)
        hidden[..., :4] = False
        one = model(IDS[:, :1], attention_mask=hidden, past_key_values=copy.deepcopy(c), use_cache=True).logits
        each = model(IDS[:, :1], attention_mask=hidden.expand(3, -1, -1, -1), past_key_values=copy.deepcopy(c), use_cache=True)
        close(one, each.logits)
        for keys in (15, 40):
            with pytest.raises((ValueError, RuntimeError), match=r"mask|broadcast|size"):
                model(IDS[:, :1], attention_mask=torch.ones(3, 1, 1, keys).bool(), past_key_values=copy.deepcopy(c))


def test_a_model_that_makes_its_keys_anew_from_the_cache():
    """DeepSeek's attention caches what its keys are made of; in transformers 5.0, the keys."""
    sizes = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6, "v_head_dim": 5}
    experts = {"n_routed_experts": 2, "num_experts_per_tok": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 2}
    same(model_of("DeepseekV3", **sizes, **experts))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_other_attention_functions_read_all_keys(implementation, decoded):
    same(model_of(implementation=implementation))
    assert not decoded


def test_an_adapted_model(decoded):
    model = model_of("Llama", "eager")
    layers = [name for name, part in model.named_modules() if name.endswith("self_attn")]
    heads = {name: {"alpha": [0.3, 0.4, 0.5, 0.6], "scale": [0.7] * 4} for name in layers}
    replace(model, heads)
    same(model, attention_mask=PADDED)
    assert decoded


def test_an_encoder_and_a_decoder(decoded):
    torch.manual_seed(1)
    config = transformers.BartConfig(
        vocab_size=61, d_model=32, encoder_layers=1, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=48, decoder_ffn_dim=48, init_std=0.3, attn_implementation="diffmax-rounded",
        forced_eos_token_id=None, eos_token_id=None, pad_token_id=0, decoder_start_token_id=1,
    )  # fmt: skip
    model = transformers.BartForConditionalGeneration(config).double().eval()
    words = [
        model.generate(IDS, attention_mask=PADDED, past_key_values=cache, max_new_tokens=NEW, do_sample=False)
        for cache in (EncoderDecoderCache(kind(), kind()) for kind in (RoundedModelCache, DynamicCache))
    ]
    assert torch.equal(*words)
    assert decoded


def test_memory_is_what_the_docs_say():
    cache = RoundedModelCache(page_size=16)
    model = model_of().float()
    with torch.no_grad():
        model(IDS.repeat(1, 8), past_key_values=cache, use_cache=True)
        keys = sum(layer.keys.nbytes for layer in cache.layers)
        before = cache.memory
        assert 2 * keys * 1.2 < before < 2 * keys * 1.4
        model(IDS[:, :1], past_key_values=cache, use_cache=True)
    assert keys / 8 < cache.memory - before < keys / 3  # room, and two bounds for each page of 16


def test_a_call_that_fails_spoils_nothing(monkeypatch):
    model = model_of()
    cache, plain = RoundedModelCache(), DynamicCache()
    with torch.no_grad():
        for c in (cache, plain):
            model(IDS, past_key_values=c, use_cache=True)
            model(IDS[:, :1], past_key_values=c, use_cache=True)
        with monkeypatch.context() as patch:
            patch.setattr(rounded_cache, "attention_kvcache", lambda *_, **__: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                model(IDS[:, 1:2], past_key_values=cache, use_cache=True)
        for c in (cache, plain):
            excess = c.layers[0].get_seq_length() - 21
            if excess:
                c.layers[0].crop(-excess)
        for _ in range(2):
            got, wanted = (model(IDS[:, 2:3], past_key_values=c, use_cache=True).logits for c in (cache, plain))
            close(got, wanted)


@pytest.mark.parametrize(
    ("visible", "padding"),
    [
        ([[1, 1, 1], [0, 1, 1]], [0, 1]),
        ([[0, 0, 1]], [2]),
        ([[1, 0, 1]], None),
        ([[0, 1, 1], [1, 1, 0]], None),
        ([[0, 0, 0]], None),  # nothing is visible: zeros, and no decoding
    ],
)
def test_left_padding_of_a_mask(visible, padding):
    mask = torch.tensor(visible, dtype=torch.bool)[:, None, None]
    found = left_padding(mask, len(mask), 3)
    assert (found if found is None else found.tolist()) == padding
    assert found is None or found.dtype == torch.int32
    for other in (mask.float(), mask.expand(-1, 2, -1, -1), mask.expand(-1, -1, 2, -1), mask[:, 0]):
        assert left_padding(other, len(mask), 3) is None
    for batch, keys in ((len(mask) + 1, 3), (len(mask), 4), (len(mask), 2)):
        assert left_padding(mask, batch, keys) is None


@pytest.mark.parametrize(
    ("page_size", "error", "message"),
    [(0, ValueError, "page_size must be at least 1, got 0"), (0.5, TypeError, "page_size must be an int, got 0.5")],
)
def test_wrong_page_size(page_size, error, message):
    with pytest.raises(error, match=f"RoundedModelCache: {message}"):
        RoundedModelCache(page_size=page_size)


def test_a_configuration_that_is_none():
    with pytest.raises(TypeError, match=r"config must be a model's configuration or None, got 64\npass model.config"):
        RoundedModelCache(64)
