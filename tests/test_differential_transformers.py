"""DiffLlama of transformers with diffmax weights: both calls of a layer, its cache, and the same layer as diffmax.nn has it."""

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'diffmax-core[transformers]'")

from diffmax.integrations.transformers import register  # noqa: E402
from diffmax.nn import DiffAttention, convert_diff_attention  # noqa: E402

B, N = 2, 9
SIZES = {
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "vocab_size": 31,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "initializer_range": 0.3,
}
HEADS = {"no groups": (4, 4), "groups": (8, 4)}


def close(got, wanted):
    """DiffLlama takes softmax, lambda and rotary angles in float32, whatever the model is."""
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4)


@pytest.fixture(autouse=True)
def _registered():
    register("diffmax-one", alpha=torch.ones(()))
    register("diffmax-half", alpha=0.5)


def model_of(name, heads=(4, 4)):
    torch.manual_seed(1)
    config = transformers.DiffLlamaConfig(
        **SIZES, num_attention_heads=heads[0], num_key_value_heads=heads[1], head_dim=6, attn_implementation=name
    )
    return transformers.DiffLlamaForCausalLM(config).eval()  # in float64 the eager one is NaN at padding


def words(length=N):
    return torch.randint(2, SIZES["vocab_size"], (B, length))


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("padded", [False, True])
def test_at_alpha_1_outputs_and_gradients_are_those_of_eager(heads, padded):
    ids = words()
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :3] = 0
    found = []
    for name in ("eager", "diffmax-one"):
        model = model_of(name, heads)
        logits = model(ids, attention_mask=mask).logits[mask > 0]
        found.append((logits, torch.autograd.grad(logits.square().mean(), [*model.parameters()])))
    close(found[1][0], found[0][0])
    for got, wanted in zip(found[1][1], found[0][1], strict=True):
        close(got, wanted)


def test_a_layer_is_diff_attention_with_the_alphas_of_its_maps():
    """DiffLlama's head i pairs with i + H, and its alphas with it; a position of 0 everywhere rotates nothing."""
    register("diffmax-heads", alpha=torch.linspace(0.3, 0.9, 8))
    model = model_of("diffmax-heads", (8, 4))
    layer = model.model.layers[1].self_attn
    x, seen = torch.randn(B, N, 48), torch.ones(N, N, dtype=torch.bool).tril()
    positions = torch.ones(1, N, 6), torch.zeros(1, N, 6)
    got = layer(x, positions, seen.expand(B, 1, N, N))[0]
    state = convert_diff_attention(layer.state_dict(), "diffllama", "timm", num_heads=4, num_kv_heads=2)
    alphas = torch.linspace(0.3, 0.9, 8).view(2, 4).T.flatten()
    same = DiffAttention(48, 4, proj_bias=False, depth=1, weights="diffmax", alpha=alphas)
    same.sub_norm.eps = model.config.rms_norm_eps
    same.load_state_dict({**state, "alpha": alphas})
    close(got, same(x, is_causal=True))


def test_maps_have_zeros_and_are_those_before_the_difference():
    out = model_of("diffmax-half")(words(), output_attentions=True)
    for maps in out.attentions:
        assert maps.shape == (B, 4, N, N)
        torch.testing.assert_close(maps.sum(3), torch.ones(B, 4, N, dtype=maps.dtype))
        assert (maps.tril() == maps).all()
        assert (maps[:, :, torch.ones(N, N).tril() > 0] == 0).float().mean() > 0.2


@torch.no_grad()
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
def test_generates_with_a_cache_as_without_and_as_eager(heads):
    ids = words(5)
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    written = {}
    for name in ("eager", "diffmax-one", "diffmax-half"):
        model = model_of(name, heads)
        written[name] = model.generate(ids, **options)
        assert torch.equal(model.generate(ids, use_cache=False, **options), written[name])
        whole = model(written[name]).logits
        cached = model(written[name][:, :-1], use_cache=True)
        step = model(written[name][:, -1:], past_key_values=cached.past_key_values).logits
        close(step[:, 0], whole[:, -1])
    assert torch.equal(written["eager"], written["diffmax-one"])


def test_it_trains():
    model, ids = model_of("diffmax-half").train(), words()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(8):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
