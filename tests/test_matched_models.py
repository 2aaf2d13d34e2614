"""Every place that takes scale="match": it is the same as that factor in the parameters that scores are made of."""

import copy
import math

import pytest
import torch
from torch import nn

from diffmax import HillMap
from diffmax.integrations import inplace
from diffmax.integrations import timm as timm_integration
from diffmax.integrations.transformers import register, replace
from diffmax.nn import AlphaSchedule
from tests.timm_standin import import_timm

transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'diffmax-core[transformers]'")
close = torch.testing.assert_close
IDS = torch.tensor([[1, 5, 9, 4, 7, 7, 3, 12, 30, 8]])
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50}
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, **TOKENS, num_key_value_heads=2, initializer_range=0.5)
    return transformers.LlamaModel(config).double().eval()


def gemma2():
    torch.manual_seed(0)
    config = transformers.Gemma2Config(
        **SIZES,
        **TOKENS,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.5,
        attn_logit_softcapping=3.0,
        sliding_window=4,
    )
    return transformers.Gemma2Model(config).double().eval()


def gpt_oss():
    torch.manual_seed(0)
    config = transformers.GptOssConfig(
        **SIZES, **TOKENS, num_key_value_heads=2, head_dim=8, initializer_range=0.5, num_local_experts=2, num_experts_per_tok=1
    )
    return transformers.GptOssModel(config).eval()  # its product of experts takes no float64


def t5():
    torch.manual_seed(0)
    config = transformers.T5Config(
        d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=50, dropout_rate=0.0, decoder_start_token_id=0
    )
    model = transformers.T5EncoderModel(config).double().eval()
    for name, parameter in model.named_parameters():
        if "relative_attention_bias" in name:
            nn.init.normal_(parameter, std=2.0)
    return model


def output(model, name):
    model.set_attn_implementation(name)
    return model(IDS).last_hidden_state


@torch.no_grad()
def with_scaled_parameters(model, s):
    """The model whose own scores are s times as large."""
    model = copy.deepcopy(model)
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("q_proj.", ".q.weight", "relative_attention_bias", "sinks")):
            parameter *= s
    for module in model.modules():
        if getattr(module, "attn_logit_softcapping", None):
            module.attn_logit_softcapping *= s
    return model


@pytest.mark.parametrize("make", [llama, gemma2, gpt_oss, t5])
def test_the_scale_is_of_all_that_is_in_the_scores(make):
    model = make()
    register("matched-test", 0.75, scale="match")
    register("half-test", 0.75, scale=0.5)
    register("bare-test", 0.75)
    wanted = output(with_scaled_parameters(model, 0.5), "bare-test")
    found = output(model, "matched-test")
    close(found, wanted, **({"rtol": 1e-4, "atol": 1e-4} if make is gpt_oss else {"rtol": 1e-9, "atol": 1e-11}))
    assert torch.equal(found, output(model, "half-test"))
    assert (found - output(model, "bare-test")).abs().max() > 1e-3


def test_weights_that_are_asked_for_have_the_scale_too():
    model = llama()
    register("matched-test", 0.75, scale="match")
    model.set_attn_implementation("matched-test")
    asked = model(IDS, output_attentions=True)
    close(asked.last_hidden_state, model(IDS).last_hidden_state, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("make", [llama, t5])
def test_a_tensor_has_a_scale_per_head_and_passes_a_gradient(make):
    model = make()
    alpha = torch.full((4,), 0.75, dtype=torch.float64, requires_grad=True)
    register("matched-test", 0.75, scale="match")
    register("learned-test", alpha, scale="match")
    found = output(model, "learned-test")
    close(found, output(model, "matched-test"), rtol=1e-9, atol=1e-11)
    direction = torch.randn(found.shape, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((found * direction).sum(), alpha)
    step = 1e-3  # norms of these models are in float32
    for head in (0, 3):
        ends = []
        for sign in (-1, 1):
            register("near-test", (alpha + sign * step * nn.functional.one_hot(torch.tensor(head), 4)).detach(), scale="match")
            ends.append((output(model, "near-test") * direction).sum())
        close(gradient[head], (ends[1] - ends[0]) / (2 * step), rtol=1e-2, atol=1e-2)


def test_a_scale_per_layer_and_head():
    model = llama()
    scales = {0: torch.tensor([1.0, 0.5, 0.25, 2.0], dtype=torch.float64), 1: 0.5}
    register("per-layer-test", 0.75, scale=lambda module: scales[module.layer_idx])
    register("bare-test", 0.75)
    scaled = copy.deepcopy(model)
    with torch.no_grad():
        scaled.layers[0].self_attn.q_proj.weight.view(4, 8, 32).mul_(scales[0].view(4, 1, 1))
        scaled.layers[1].self_attn.q_proj.weight.mul_(0.5)
    close(output(model, "per-layer-test"), output(scaled, "bare-test"), rtol=1e-9, atol=1e-11)


def test_it_follows_a_schedule_that_starts_at_softmax():
    model = llama()
    schedule = AlphaSchedule(0.75, steps=2)
    register("scheduled-test", schedule, scale="match")
    register("matched-test", 0.75, scale="match")
    close(output(model, "scheduled-test"), output(model, "eager"), rtol=1e-5, atol=1e-5)
    schedule.step(2)
    close(output(model, "scheduled-test"), output(model, "matched-test"), rtol=1e-6, atol=1e-7)


def test_a_replaced_model_scales_its_position_biases_as_calibrate_measured():
    """`replace` had scaled only the queries, while `calibrate` measures with all of the scores scaled."""
    model = t5()
    heads = {f"encoder.block.{i}.layer.0.SelfAttention": {"alpha": [0.75] * 4, "scale": [0.5] * 4} for i in range(2)}
    register("half-test", 0.75, scale=0.5)
    wanted = output(model, "half-test")
    close(replace(copy.deepcopy(model), heads)(IDS).last_hidden_state, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("scale", "kind", "message"),
    [
        (
            "matched",
            TypeError,
            'register: scale must be "match" or a positive number, a tensor, or a function of the attention',
        ),
        (True, TypeError, "got True"),
        (0.0, ValueError, "register: scale must be positive and finite, got 0.0"),
        (torch.tensor([1]), TypeError, "register: scale must be of a floating dtype, got torch.int64"),
    ],
)
def test_wrong_scales_are_named(scale, kind, message):
    with pytest.raises(kind, match=message):
        register("wrong-test", 0.75, scale=scale)


def test_scales_that_do_not_fit_the_layer_are_named():
    register("wrong-test", 0.75, scale=torch.ones(3))
    with pytest.raises(ValueError, match=r"a tensor scale must have shape \(\) or \(4,\), got \(3,\)"):
        output(llama(), "wrong-test")
    register("wrong-test", torch.full((4,), 0.75), scale="match")
    with pytest.raises(ValueError, match=r"\(softcap\), so the scale must be one number, got a tensor of shape \(4,\)"):
        output(gemma2(), "wrong-test")


# --- timm and diffusers ---


def timm_or_skip():
    try:
        return import_timm()
    except ImportError:
        pytest.skip("needs timm: pip install 'diffmax-core[timm]'")


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("alpha_map", [None, HillMap(c=0.9)])
def test_timms_scores_are_scaled_in_both_of_its_paths(fused, alpha_map):
    timm = timm_or_skip()
    torch.manual_seed(0)
    model = timm.models.vision_transformer.VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2)
    model = model.double().eval()
    for block in model.blocks:
        block.attn.fused_attn = fused
        nn.init.normal_(block.attn.qkv.weight, std=0.5)
    wanted = copy.deepcopy(model)
    with torch.no_grad():
        for block in wanted.blocks:
            block.attn.qkv.weight[:24] *= 0.5
    timm_integration.replace(wanted, alpha=0.75)
    timm_integration.replace(model, 0.75, alpha_map, scale="match")
    image = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    close(model(image), wanted(image), rtol=1e-5, atol=1e-6)
    with timm_integration.attention_maps(model) as maps, timm_integration.attention_maps(wanted) as expected:
        model(image), wanted(image)
    for name in maps:
        close(maps[name][0].to_dense(), expected[name][0].to_dense(), rtol=1e-4, atol=1e-6)
    assert "scale='match'" in repr(model.blocks[0].attn.diffmax)
    if alpha_map is not None:  # half of the scale is gone where alpha is learned to 0.5
        with torch.no_grad():
            for block in model.blocks:
                block.attn.diffmax.log_beta.fill_(math.log(alpha_map.inverse(0.5)))
            for block in wanted.blocks:
                block.attn.qkv.weight[:24] *= 0.5
        timm_integration.replace(wanted, alpha=0.5)
        close(model(image), wanted(image), rtol=1e-5, atol=1e-6)


def test_a_floating_mask_of_timm_is_scaled_with_the_scores():
    holder, bare = inplace.AttentionWeights(2, 0.75, scale="match"), inplace.AttentionWeights(2, 0.75)
    q, k, v = torch.randn(3, 1, 2, 9, 4, dtype=torch.float64)
    mask = torch.randn(9, 9, dtype=torch.float64).masked_fill(torch.rand(9, 9) < 0.2, -math.inf)
    close(holder.attend(q, k, v, mask), bare.attend(q / 2, k, v, mask / 2), rtol=1e-12, atol=1e-14)
    hidden = mask == -math.inf
    close(holder.attend(q, k, v, ~hidden), bare.attend(q / 2, k, v, ~hidden), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("alpha", [0.75, torch.tensor([0.75, 0.75])])
def test_diffusers_has_it_in_replace_and_in_its_backend(alpha):
    pytest.importorskip("diffusers", reason="needs diffusers: pip install 'diffmax-core[diffusers]'")
    from diffmax.integrations import diffusers as integration
    from tests.test_diffusers import flux

    torch.manual_seed(0)
    model, given = flux()
    model.eval()
    replaced, wanted = copy.deepcopy(model), copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in wanted.named_parameters():
            if any(part in name for part in ("norm_q.weight", "norm_added_q.weight")):
                parameter *= 0.5
    integration.replace(wanted, alpha)
    integration.replace(replaced, alpha, scale="match")
    integration.register("matched-test", alpha, scale="match")
    model.set_attention_backend("matched-test")
    try:
        for found in (replaced, model):
            close(found(**given).sample, wanted(**given).sample, rtol=1e-4, atol=1e-5)
    finally:
        model.reset_attention_backend()
    bare = copy.deepcopy(replaced)
    integration.replace(bare, alpha)
    assert (bare(**given).sample - wanted(**given).sample).abs().max() > 1e-4


def test_the_scale_of_a_replace_is_checked():
    with pytest.raises(TypeError, match="AttentionWeights: scale must be \"match\" or a positive number, got 'matched'"):
        inplace.AttentionWeights(2, 0.75, scale="matched")
    with pytest.raises(TypeError, match=r"scale must be .*, got tensor\(2\.\)"):
        inplace.AttentionWeights(2, 0.75, scale=torch.tensor(2.0))
    with pytest.raises(ValueError, match=r"scale must be positive and finite, got -1\.0"):
        inplace.AttentionWeights(2, 0.75, scale=-1.0)
