"""The fused path of diffmax.integrations.transformers equals the unfused one, in tiny random models of many kinds."""

import functools

import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers: pip install 'diffmax-core[transformers]'")
import transformers

from diffmax.integrations.transformers import attention as integration
from diffmax.integrations.transformers import calibrate, register

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 61,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "initializer_range": 0.4,  # scores wide enough for zeros
}
GROUPED = {"num_key_value_heads": 2, "head_dim": 8}
# family: (class, changes of the configuration)
FAMILIES = {
    "Bert": ("BertModel", {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}),
    "Llama": ("LlamaModel", GROUPED),
    "Mistral": ("MistralModel", {**GROUPED, "sliding_window": 4}),
    "Gemma2": ("Gemma2Model", {**GROUPED, "sliding_window": 4, "attn_logit_softcapping": 1.5, "query_pre_attn_scalar": 8}),
    "GptOss": ("GptOssModel", {**GROUPED, "sliding_window": 4, "num_local_experts": 2, "num_experts_per_tok": 1}),
}
close = functools.partial(torch.testing.assert_close, rtol=1e-6, atol=1e-8)
nearly = functools.partial(torch.testing.assert_close, rtol=1e-3, atol=1e-4)  # in float32


@pytest.fixture(autouse=True)
def _registered():
    register("diffmax-fused", alpha=0.5)


def model_of(family, **more):
    name, changes = FAMILIES[family]
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **changes, **more}, attn_implementation="diffmax-fused")
    torch.manual_seed(1)
    model = getattr(transformers, name)(config).eval()
    # the experts of gpt-oss are multiplied by a kernel that has no float64
    model = model if family == "GptOss" else model.double()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("sinks"):
                parameter.normal_()
    return model


def tokens(batch=2, length=10):
    return torch.randint(2, SIZES["vocab_size"], (batch, length))


def padded():
    ids = tokens()
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return {"input_ids": ids, "attention_mask": mask}


def both_ways(model, **inputs):
    """The fused output, the unfused one, and the weights; and it is checked that each went its way."""
    seen = []
    original = integration.attend_with_weights

    def watched(*args, **kwargs):
        seen.append(1)
        return original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(integration, "attend_with_weights", watched)
        fused = model(**inputs)
        assert not seen
        assert not fused.get("attentions")
        unfused = model(**inputs, output_attentions=True)
        assert len(seen) == len(unfused.attentions) == 2
    return fused.last_hidden_state, unfused.last_hidden_state, unfused.attentions


@pytest.mark.parametrize("family", FAMILIES)
def test_fused_equals_unfused_with_and_without_padding(family):
    model = model_of(family)
    for inputs in (padded(), {"input_ids": tokens()}):
        fused, unfused, weights = both_ways(model, **inputs)
        compare = close if fused.dtype == torch.float64 else nearly
        compare(fused, unfused)
        assert all((w == 0).any() for w in weights)
        gradients, upstream = [], torch.randn_like(fused)  # not the squares: the last norm makes their sum constant
        for out in (fused, unfused):
            gradients.append(torch.autograd.grad(out, list(model.parameters()), upstream, allow_unused=True))
        for got, wanted in zip(*gradients, strict=True):
            assert (got is None) == (wanted is None)
            if got is not None and got.dtype == torch.float64:
                close(got, wanted)
            elif got is not None:  # single entries cancel, the whole does not
                assert (got - wanted).norm() <= 1e-4 * wanted.norm()


@pytest.mark.parametrize("family", ["Gemma2", "GptOss"])
@torch.no_grad()
def test_softcaps_and_sinks_are_the_eager_models_at_alpha_one(family):
    model, inputs = model_of(family), {"input_ids": tokens()}
    register("diffmax-fused", alpha=torch.ones(()))
    ours = model(**inputs).last_hidden_state
    model.set_attn_implementation("eager")
    nearly(ours, model(**inputs).last_hidden_state)


@pytest.mark.parametrize("family", ["Llama", "Mistral", "GptOss"])
@torch.no_grad()
def test_packed_sequences_equal_each_alone_however_they_are_announced(family):
    """position_ids make a mask; with a cache there is none, and only cu_seq_lens separate the sequences."""
    model, ids = model_of(family), tokens(1, 13)
    alone = torch.cat([model(ids[:, :6]).last_hidden_state, model(ids[:, 6:]).last_hidden_state], 1)
    position_ids = torch.cat([torch.arange(6), torch.arange(7)])[None]
    ends = torch.tensor([0, 6, 13], dtype=torch.int32)
    flash = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 7, "max_length_k": 7}
    ways = [{"use_cache": False}, {"use_cache": False, **flash}, {"use_cache": True, **flash}]
    if family == "GptOss":
        ways = ways[1:]  # it makes its masks without looking at position_ids, with eager attention too
    for how in ways:
        for asked in (False, True):
            packed = model(ids, position_ids=position_ids, output_attentions=asked, **how).last_hidden_state
            nearly(packed, alone)


def test_packed_sequences_without_a_mask_go_to_attention_varlen(monkeypatch):
    calls = []
    original = integration.attention_varlen
    monkeypatch.setattr(
        integration, "attention_varlen", lambda *args, **kwargs: (calls.append(1), original(*args, **kwargs))[1]
    )
    model, ids, ends = model_of("Llama"), tokens(1, 9), torch.tensor([0, 4, 9], dtype=torch.int32)
    position_ids = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    with torch.no_grad():
        model(ids, position_ids=position_ids, cu_seq_lens_q=ends, cu_seq_lens_k=ends)
    assert len(calls) == 2


def call(**kwargs):
    module = torch.nn.Module().eval()
    generator = torch.Generator().manual_seed(3)
    query, key, value = (torch.randn(2, h, 5, 8, dtype=torch.float64, generator=generator) for h in (4, 2, 2))
    return transformers.AttentionInterface()["diffmax-fused"](module, query, key, value, kwargs.pop("mask", None), **kwargs)


@pytest.mark.parametrize("mask", ["none", "boolean", "most negative number"])
@pytest.mark.parametrize("causal", [False, True])
def test_a_position_bias_is_added_and_learns(mask, causal):
    """As T5 hands it over, beside a mask of either kind."""
    visible = torch.rand(2, 1, 5, 5) < 0.7
    given = {
        "none": None,
        "boolean": visible,
        "most negative number": torch.zeros(visible.shape).double().masked_fill(~visible, torch.finfo(torch.float64).min),
    }[mask]
    bias = torch.randn(1, 4, 5, 5, dtype=torch.float64, requires_grad=True)
    results = [
        call(mask=given, position_bias=bias, is_causal=causal, output_attentions=asked, softcap=2.0, s_aux=torch.ones(4))
        for asked in (False, True)
    ]
    close(results[0][0], results[1][0])
    fused, unfused = (torch.autograd.grad(out.square().sum(), bias)[0] for out, _ in results)
    close(fused, unfused)
    assert (fused != 0).any()
    weights = results[1][1]
    if mask != "none":
        assert (weights.masked_select(~visible.expand_as(weights)) == 0).all()
    elif causal:
        assert (weights.triu(1) == 0).all()


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("padding", [0, 2])
@pytest.mark.parametrize("family", ["Llama", "Mistral", "Gemma2", "GptOss"])
@torch.no_grad()
def test_generate_gives_the_tokens_of_the_unfused_path(family, padding, cache, monkeypatch):
    """A step goes to the operator for caches unless its mask hides more than the first keys: a static cache's empty end."""
    name = FAMILIES[family][0]
    model = model_of(family, use_cache=True)
    causal = getattr(transformers, name.replace("Model", "ForCausalLM"))(model.config).eval()
    causal = causal if family == "GptOss" else causal.double()
    ids = tokens(2, 6)
    ids[0, :padding] = 0
    steps = []
    original = integration.attention_with_kvcache
    monkeypatch.setattr(integration, "attention_with_kvcache", lambda *a, **k: (steps.append(1), original(*a, **k))[1])
    settings = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": cache, "disable_compile": True}
    fused, unfused = (
        causal.generate(
            ids,
            attention_mask=(ids != 0).long(),
            output_attentions=asked,
            output_logits=True,
            return_dict_in_generate=True,
            **settings,
        )
        for asked in (False, True)
    )
    assert torch.equal(fused.sequences, unfused.sequences)
    nearly(torch.stack(fused.logits), torch.stack(unfused.logits))
    most = 5 * model.config.num_hidden_layers  # the first of the six words comes from the prompt
    # a static cache is full in its last step, and earlier in layers whose window is shorter, which are all of Mistral's
    assert 0 < len(steps) < most if cache == "static" and family != "Mistral" else len(steps) == most


@torch.no_grad()
def test_the_configuration_asks_for_weights_too():
    model, ids = model_of("Llama"), tokens()
    assert not model(ids).get("attentions")
    model.set_attn_implementation("eager")  # the configuration refuses the next line under any other name
    model.config.output_attentions = True
    model.set_attn_implementation("diffmax-fused")
    assert len(model(ids).attentions) == 2
    assert not model(ids, output_attentions=False).get("attentions")


def test_gradient_checkpointing_gives_the_same_gradients_on_both_ways():
    model, inputs = model_of("Llama").train(), padded()
    expected = torch.autograd.grad(model(**inputs).last_hidden_state[..., 0].sum(), list(model.parameters()))
    model.activation_checkpointing_enable()
    for asked in (False, True):
        out = model(**inputs, use_cache=False, output_attentions=asked).last_hidden_state
        for got, wanted in zip(torch.autograd.grad(out[..., 0].sum(), list(model.parameters())), expected, strict=True):
            close(got, wanted)


def test_dropout_in_training_follows_torchs_generator():
    model = model_of("Llama", attention_dropout=0.5).train()
    ids = tokens()

    def output(seed):
        torch.manual_seed(seed)
        return model(ids).last_hidden_state

    assert torch.equal(output(1), output(1))
    assert not torch.equal(output(1), output(2))
    assert torch.equal(model.eval()(ids).last_hidden_state, model(ids).last_hidden_state)


@pytest.mark.parametrize(("family", "what"), [("Gemma2", "softcap"), ("GptOss", "s_aux")])
def test_calibrate_refuses_what_it_does_not_measure(family, what):
    with pytest.raises(ValueError, match=f"calibrate: {what} is not implemented, got {family}Attention"):
        calibrate(model_of(family), [padded()], alpha=0.5)
