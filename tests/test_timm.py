"""diffmax.integrations.timm: small random models of many families, the classes it knows, the layer, attention maps."""

import copy
import importlib
import inspect
import io
import pkgutil

import pytest
import torch
from torch import nn

import diffmax
from diffmax import HillMap, diffmax_bisect
from diffmax.integrations import inplace
from diffmax.integrations import timm as integration
from diffmax.integrations.timm import attention_maps, layer, register, replace
from diffmax.nn import AlphaSchedule
from tests.timm_standin import import_timm

try:
    timm = import_timm()
except ImportError:
    pytest.skip("needs timm: pip install 'diffmax-core[timm]'", allow_module_level=True)

SOFTMAX = torch.tensor(1.0)
VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
WINDOWS = {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 12, "depths": (2, 2), "num_heads": (2, 3)}
FAMILIES = {
    "vit": ("vision_transformer.VisionTransformer", VIT | {"qk_norm": True, "class_token": False, "global_pool": "map"}),
    "vit-parallel": (
        "vision_transformer.VisionTransformer",
        VIT | {"block_fn": timm.models.vision_transformer.ParallelScalingBlock},
    ),
    "deit": ("deit.VisionTransformerDistilled", VIT),
    "eva": ("eva.Eva", VIT | {"use_rot_pos_emb": True}),
    "beit": ("beit.Beit", VIT | {"use_rel_pos_bias": True}),
    "relpos": ("vision_transformer_relpos.VisionTransformerRelPos", VIT),
    "swin": ("swin_transformer.SwinTransformer", WINDOWS),
    "swinv2": ("swin_transformer_v2.SwinTransformerV2", WINDOWS),
    "twins": (
        "twins.Twins",
        {"embed_dims": (8, 8, 8, 8), "num_heads": (2, 2, 2, 2), "depths": (2, 2, 1, 1), "wss": (3, 3, 3, 3), "img_size": 32},
    ),
    "maxvit": (
        "maxxvit.MaxxVit",
        {
            "cfg": timm.models.maxxvit.MaxxVitCfg(
                embed_dim=(8, 16),
                depths=(1, 1),
                block_type=("M", "M"),
                stem_width=8,
                transformer_cfg=timm.models.maxxvit.MaxxVitTransformerCfg(dim_head=4, window_size=(4, 4)),
            ),
            "img_size": 32,
        },
    ),
    "crossvit": (
        "crossvit.CrossVit",
        {
            **{"img_size": 48, "patch_size": (8, 8), "img_scale": (1.0, 2 / 3), "embed_dim": (12, 24), "num_heads": (2, 3)},
            "depth": ((1, 1, 0),),
        },
    ),
    "mvitv2": (
        "mvitv2.MultiScaleVit",
        {
            "cfg": timm.models.mvitv2.MultiScaleVitCfg(depths=(1, 1), embed_dim=(8, 16), num_heads=(2, 4)),
            "img_size": (32, 32),
        },
    ),
    "hiera": ("hiera.Hiera", {"img_size": (64, 64), "embed_dim": 12, "num_heads": 2, "stages": (1, 1, 2, 1)}),
    "levit": ("levit.Levit", {"img_size": 64, "embed_dim": (16, 24), "key_dim": 8, "num_heads": (2, 3), "depth": (1, 1)}),
    "nest": (
        "nest.Nest",
        {"img_size": 32, "patch_size": 2, "embed_dims": (8, 8, 8), "num_heads": (2, 2, 2), "depths": (1, 1, 1)},
    ),
}
SIZES = {"crossvit": 48, "hiera": 64, "levit": 64}


def made(name, **options):
    """A model by its class in timm.models."""
    module, _, kind = name.partition(".")
    return getattr(importlib.import_module(f"timm.models.{module}"), kind)(**options)


def build(family):
    name, options = FAMILIES[family]
    model = made(name, num_classes=5, **options).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # scores wide enough for zeros, and biases that are not 0
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def images(family, batch=2):
    size = SIZES.get(family, 32)
    return torch.randn(batch, 3, size, size, dtype=torch.float64)


def results(model, x):
    model.zero_grad()
    for module in model.modules():
        if hasattr(module, "attention_bias_cache"):  # levit keeps its biases, with their graph, in evaluation
            module.attention_bias_cache.clear()
    out = model(x)
    out.square().sum().backward()
    return out.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("family", FAMILIES)
def test_alpha_1_is_the_model_as_it_was_and_half_is_not(family):
    model, x = build(family), images(family)
    out, gradients = results(model, x)
    keys = set(model.state_dict())
    assert not replace(model, SOFTMAX).kept
    same, same_gradients = results(model, x)
    torch.testing.assert_close(same, out, rtol=1e-10, atol=1e-10)
    assert same_gradients.keys() == gradients.keys()
    scale = max(gradient.abs().max() for gradient in gradients.values())
    for name, gradient in gradients.items():
        torch.testing.assert_close(same_gradients[name], gradient, rtol=1e-9, atol=1e-10 * scale.item(), msg=name)
    replace(model, 0.5)
    sparse, sparse_gradients = results(model, x)
    assert (sparse - out).abs().max() > 1e-6 * out.abs().max()
    assert all(gradient.isfinite().all() for gradient in sparse_gradients.values())
    assert set(model.state_dict()) == keys


@pytest.mark.parametrize("family", ["vit", "swin", "hiera", "levit", "nest"])
def test_an_alpha_per_head_is_that_heads_in_fused_and_eager_attention(family):
    model, x = build(family), images(family)

    def rising(name, module):
        return torch.linspace(0.2, 0.9, getattr(module, "num_heads", getattr(module, "heads", None)), dtype=torch.float64)

    def set_fused(fused):
        for module in model.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = fused

    changed = replace(model, rising).changed
    set_fused(True)
    with attention_maps(model) as fused:
        out = model(x)
    set_fused(False)
    with attention_maps(model) as eager:
        torch.testing.assert_close(model(x), out, rtol=1e-10, atol=1e-10)
    assert fused.keys() == eager.keys() == changed.keys()
    for name in changed:
        torch.testing.assert_close(fused[name][0].to_dense(), eager[name][0].to_dense(), rtol=1e-9, atol=1e-10)
    moved = model(x)
    replace(model, lambda name, module: rising(name, module).flip(0))
    assert (model(x) - moved).abs().max() > 1e-6


def test_maps_are_sparse_sum_to_one_and_give_the_output():
    model, x = build("vit"), images("vit")
    replace(model, 0.3)
    attn, tokens = model.blocks[0].attn, torch.randn(2, 16, 24, dtype=torch.float64)
    plain = attn(tokens)
    with attention_maps(attn) as maps:
        assert torch.equal(attn(tokens), plain)
        attn(tokens[:1])
    assert [tuple(m.shape) for m in maps[""]] == [(2, 2, 16, 16), (1, 2, 16, 16)]
    kept = maps[""][0]
    assert kept.is_sparse
    assert (kept.values() > 0).all()
    assert kept.values().numel() < 2 * 2 * 16 * 16
    weights = kept.to_dense()
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 16, dtype=torch.float64))
    v = attn.qkv(tokens).view(2, 16, 3, 2, 12).permute(2, 0, 3, 1, 4)[2]
    torch.testing.assert_close(attn.proj((weights @ v).transpose(1, 2).reshape(2, 16, 24)), plain)
    attn(tokens)
    assert len(maps[""]) == 2  # nothing is collected outside
    with attention_maps(model) as maps:
        model.forward_features(x)
    assert list(maps) == ["blocks.0.attn", "blocks.1.attn", "attn_pool"]
    with attention_maps(model), pytest.raises(ValueError, match="collect already"), attention_maps(model):
        pass
    with pytest.raises(ValueError, match="no diffmax attention"), attention_maps(nn.Linear(2, 2)):
        pass


def test_masks_causality_and_scale_reach_the_maps_too():
    attn = layer(alpha=0.4)(16, num_heads=2, qkv_bias=True).double()
    x, additive = torch.randn(3, 7, 16).double(), torch.randn(3, 2, 7, 7).double()
    additive[0, :, 2] = -torch.inf  # a row that sees nothing
    visible = torch.rand(3, 1, 7, 7) > 0.4
    for given in ({"attn_mask": additive}, {"attn_mask": visible}, {"is_causal": True}, {}):
        attn.fused_attn = True
        with attention_maps(attn) as fused:
            out = attn(x, **given)
        attn.fused_attn = False
        with attention_maps(attn) as eager:
            torch.testing.assert_close(attn(x, **given), out)
        torch.testing.assert_close(fused[""][0].to_dense(), eager[""][0].to_dense())


def test_dropout_of_weights_is_that_of_the_module_and_only_in_training():
    attn = layer(alpha=0.4)(16, num_heads=2, attn_drop=0.5)
    x = torch.randn(2, 9, 16)
    for fused in (True, False):
        attn.fused_attn = fused
        assert not torch.equal(attn.train()(x), attn(x))
        assert torch.equal(attn.eval()(x), attn(x))
    with torch.no_grad():
        mean = attn.train()(x[:1].expand(4000, -1, -1)).mean(0)
    torch.testing.assert_close(mean, attn.eval()(x)[0], rtol=0, atol=0.05)


def test_a_new_image_size_at_run_time():
    model = timm.create_model("vit_tiny_patch16_224", num_classes=5, dynamic_img_size=True, **VIT).double().eval()
    x = torch.randn(1, 3, 48, 40, dtype=torch.float64)
    out = model(x)
    replace(model, SOFTMAX)
    torch.testing.assert_close(model(x), out, rtol=1e-10, atol=1e-10)


def test_learned_alphas_get_gradients_and_load_softmax_checkpoints():
    model, x = build("vit"), images("vit")
    softmax = model.state_dict()
    replace(model, 0.8, HillMap(c=0.5))
    names = [name for name, _ in model.named_parameters() if "log_beta" in name]
    assert names == ["blocks.0.attn.diffmax.log_beta", "blocks.1.attn.diffmax.log_beta", "attn_pool.diffmax.log_beta"]
    torch.testing.assert_close(model.blocks[0].attn.diffmax.current_alpha, torch.full((2,), 0.8))
    _, gradients = results(model, x)
    assert all(gradients[name].abs().sum() > 0 for name in names)
    model.load_state_dict(softmax)
    model.load_state_dict(model.state_dict())
    undecayed = [
        p for group in diffmax.nn.param_groups(model, lr=1e-3) if not group.get("weight_decay") for p in group["params"]
    ]
    assert sum(p is q for p in undecayed for q in (model.get_parameter(name) for name in names)) == 3


def test_a_tensor_alpha_may_be_one_that_gets_a_gradient():
    model, x = build("vit"), images("vit")
    alpha = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    with pytest.warns(UserWarning, match="no parameter of the module"):
        replace(model, alpha)
    model(x).square().sum().backward()
    assert alpha.grad.isfinite()
    assert alpha.grad != 0


def test_replaced_models_are_copied_and_pickled():
    model, x = build("eva"), images("eva")
    replace(model, 0.5)
    out = model(x)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert torch.equal(other(x), out)
        assert type(other.blocks[0].attn).__name__ == "EvaAttention"
        assert isinstance(other.blocks[0].attn, timm.models.eva.EvaAttention)
    theirs = inspect.signature(timm.models.eva.EvaAttention.forward).parameters
    assert ["self", *inspect.signature(model.blocks[0].attn.forward).parameters] == list(theirs)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_torch_compile_keeps_one_graph():
    model, x = build("swin").float(), images("swin").float()
    replace(model, 0.5)
    out = model(x)
    torch.testing.assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(x), out)


def test_half_precision():
    model, x = build("vit").bfloat16(), images("vit").bfloat16()
    out = model(x)
    replace(model, SOFTMAX)
    torch.testing.assert_close(model(x), out, rtol=0.1, atol=0.1)


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("cait.Cait", {"embed_dim": 24, "num_heads": 2, "depth": 1}, "TalkingHeadAttn mixes the weights of its heads"),
        ("xcit.Xcit", {"embed_dim": 24, "num_heads": 2, "depth": 1}, "XCA attends to channels"),
        (
            "volo.VOLO",
            {"layers": (1, 1, 1, 1), "embed_dims": (24, 24, 24, 24), "num_heads": (2, 2, 2, 2), "post_layers": ("ca",)},
            "OutlookAttention reads its weights from one token",
        ),
    ],
)
def test_what_cannot_be_served_is_refused_and_nothing_changes(name, options, reason):
    model = made(name, num_classes=5, **options)
    classes = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=f"would keep softmax in .* modules\n(.|\n)*{reason}(.|\n)*partial=True"):
        replace(model, 0.5)
    assert [type(module) for module in model.modules()] == classes
    done = replace(model, 0.5, partial=True)
    assert done.changed
    assert any(reason in why for why in done.kept.values())


def test_none_leaves_a_module_as_it_is_and_says_so():
    model = build("vit")
    done = replace(model, lambda name, module: None if name == "attn_pool" else 0.5)
    assert list(done.changed) == ["blocks.0.attn", "blocks.1.attn"]
    assert done.kept == {"attn_pool": "the given alpha is None"}
    assert type(model.attn_pool) is timm.layers.AttentionPoolLatent


class Own(nn.Module):
    def forward(self, x):
        return (x @ x.mT).softmax(-1) @ x


class Twice(timm.layers.Attention):
    """A class of a user's, with timm's forward."""


def by_a_function(x):
    return torch.softmax(x, -1)


class Elsewhere(nn.Module):
    def forward(self, x):
        return by_a_function(x)


def test_classes_of_others():
    model = nn.Sequential(Twice(16, 2), Own())
    with pytest.raises(ValueError, match="1: Own is not known, and takes a softmax in forward"):
        replace(model)
    with pytest.raises(ValueError, match="1: Elsewhere is not known, and takes a softmax in by_a_function"):
        replace(nn.Sequential(Twice(16, 2), Elsewhere()))
    with pytest.raises(ValueError, match=r"1: MultiheadAttention is torch's own: .*from_torch"):
        replace(nn.Sequential(Twice(16, 2), nn.MultiheadAttention(8, 2)))
    assert replace(model[0], 0.5).changed == {"": "Twice"}
    with pytest.raises(ValueError, match="Linear must have attention that can be replaced, got none"):
        replace(nn.Linear(2, 2))


class CallsSuper(timm.layers.Attention):
    def forward(self, x, **options):
        return 2 * super().forward(x, **options)


class CallsBase(timm.layers.Attention):
    def forward(self, x, **options):
        return 2 * timm.layers.Attention.forward(self, x, **options)


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.normalize = nn.Softmax(dim=-1)

    def forward(self, x):
        return self.normalize(x @ x.mT) @ x


another_name, fused_name = torch.softmax, nn.functional.scaled_dot_product_attention


class Aliased(nn.Module):
    def forward(self, x):
        return another_name(x @ x.mT, -1) @ x


class FusedAliased(nn.Module):
    def forward(self, x):
        return fused_name(x, x, x)


class Decorated(nn.Module):
    @torch.no_grad()
    def forward(self, x):
        return (x @ x.mT).softmax(-1) @ x


HIDDEN = {
    CallsSuper: "Attention.forward",
    CallsBase: "Attention.forward",
    Named: "normalize",
    Aliased: "another_name",
    FusedAliased: "fused_name",
    Decorated: "forward",
}


@pytest.mark.parametrize("kind", HIDDEN, ids=lambda kind: kind.__name__)
def test_a_softmax_that_is_out_of_sight_is_refused(kind):
    """Each was left as it was, and was not among those kept."""
    module = kind(16, 2) if issubclass(kind, timm.layers.Attention) else kind()
    model = nn.ModuleDict({"served": timm.layers.Attention(16, 2), "own": module})
    reason = f"{kind.__name__} is not known, and takes a softmax in {HIDDEN[kind]}"
    with pytest.raises(ValueError, match=f"own: {reason}"):
        replace(model, 0.5)
    assert not any(isinstance(part, inplace.InPlace) for part in model.modules())
    done = replace(model, 0.5, partial=True)
    assert (list(done.changed), done.kept) == (["served"], {"own": reason})


def test_a_classifier_with_probabilities_is_no_attention():
    model = nn.Sequential(timm.layers.Attention(16, 2), nn.Sequential(nn.Linear(16, 3), nn.Softmax(-1)))
    assert replace(model, 0.5) == ({"0": "Attention"}, {})


def test_wrong_alphas_change_nothing():
    model = build("vit")
    for wrong, error, message in (
        (1.0, ValueError, "replace: blocks.0.attn: .*strictly between 0 and 1"),
        ("0.5", TypeError, "blocks.0.attn: .*must be a float or a tensor"),
        (torch.full((3,), 0.5), ValueError, r"shape \(\) or \(2,\), got \(3,\)\nthe module has 2 query heads"),
        (torch.tensor(1.5), ValueError, "blocks.0.attn: .*alpha must lie between 0 and 1, got 1.5"),
        (torch.tensor([0.5, torch.nan]), ValueError, "blocks.0.attn: .*alpha must lie between 0 and 1"),
        (torch.tensor(1), TypeError, "blocks.0.attn: .*alpha must be of a floating dtype, got int64"),
        (lambda name, module: 0.5 if "0" in name else 2.0, ValueError, "blocks.1.attn: .*got 2.0"),
    ):
        with pytest.raises(error, match=message):
            replace(model, wrong)
    with pytest.raises(TypeError, match="alpha_map must be"):
        replace(model, 0.5, alpha_map=0.5)
    with pytest.raises(ValueError, match="must be a number or a tensor for one layer at least, got None for all"):
        replace(model, None)
    with pytest.raises(TypeError, match=r"alpha must be a float, a tensor or a function, got HillMap.*\npass it as alpha_map"):
        replace(model, HillMap(c=0.5))
    with pytest.raises(TypeError, match=r"replace: model must be a torch.nn.Module, got 'vit' of type str"):
        replace("vit")
    assert not any(isinstance(module, inplace.InPlace | inplace.AttentionWeights) for module in model.modules())
    halo = timm.layers.halo_attn.HaloAttn(16, block_size=2, halo_size=1, num_heads=2)
    with pytest.raises(ValueError, match=r"shape \(\) or \(1,\), got \(2,\)"):
        replace(halo, torch.full((2,), 0.5))


@pytest.mark.filterwarnings("ignore:Importing from timm:FutureWarning")
def test_every_class_of_timm_that_takes_a_softmax_is_served_or_refused():
    packages = (timm.layers, timm.models)
    modules = [importlib.import_module(f"{p.__name__}.{m.name}") for p in packages for m in pkgutil.iter_modules(p.__path__)]
    found = set()
    for module in modules:
        for kind in vars(module).values():
            if inspect.isclass(kind) and issubclass(kind, nn.Module) and kind.__module__ == module.__name__:
                found |= {integration._owner(function) for function in inplace.weight_makers(kind).values()}
                assert inplace.hidden_makers(kind) is None, kind
    assert not found - integration.SERVED.keys() - integration.REFUSED.keys()
    assert not integration.SERVED.keys() & integration.REFUSED.keys()
    if timm.__version__ == "1.0.31":  # the version that the tables are from
        assert found == integration.SERVED.keys() | integration.REFUSED.keys()
    for name in found & integration.SERVED.keys():
        module, _, kind = name.rpartition(".")
        inplace.in_place(getattr(importlib.import_module(module), kind))


def test_the_layer_is_timms_attention_with_other_weights():
    options = {"qkv_bias": True, "qk_norm": True, "scale_norm": True, "gated": True, "norm_layer": nn.LayerNorm}
    theirs = timm.layers.Attention(24, 3, **options).double()
    ours = layer(SOFTMAX)(24, 3, **options).double()
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict({name: t for name, t in ours.state_dict().items() if "diffmax" not in name})
    x = torch.randn(2, 9, 24, dtype=torch.float64)
    torch.testing.assert_close(ours(x, is_causal=True), theirs(x, is_causal=True))
    assert set(layer(0.5)(24, 3, **options).state_dict()) == set(theirs.state_dict())
    q, k, v = ours.qkv(x).view(2, 9, 3, 3, 8).permute(2, 0, 3, 1, 4).unbind()
    sparse = layer(0.5)(24, 3, qkv_bias=True).double()
    sparse.load_state_dict(ours.state_dict(), strict=False)
    weights = diffmax_bisect(q @ k.mT / 8**0.5, 0.5)
    torch.testing.assert_close(sparse(x), sparse.proj((weights @ v).transpose(1, 2).reshape(2, 9, 24)))
    assert layer(0.5)(24, 3, device="meta", dtype=torch.float64).qkv.weight.is_meta
    with pytest.raises(ValueError, match="strictly between 0 and 1"):
        layer(2.0)(24, 3)


def test_registered_layers_by_name(monkeypatch):
    from timm.models import vision_transformer

    monkeypatch.setattr(vision_transformer, "ATTN_LAYERS", dict(vision_transformer.ATTN_LAYERS))
    register(alpha=0.6)
    register("diffmax-learned", alpha=0.6, alpha_map=HillMap(c=0.5))
    fixed, learned = (
        timm.create_model("vit_tiny_patch16_224", attn_layer=name, num_classes=5, **VIT)
        for name in ("diffmax", "diffmax-learned")
    )
    missing = learned.load_state_dict(fixed.state_dict())
    assert not missing.missing_keys
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(learned.eval()(x), fixed.eval()(x))
    assert fixed.blocks[1].attn.diffmax.alpha == 0.6
    assert replace(learned, 0.5).changed == {"blocks.0.attn": "Attention", "blocks.1.attn": "Attention"}
    for name in ("diff", "attn"):
        with pytest.raises(ValueError, match=f"must not be one of timm's, got '{name}'"):
            register(name)
    for wrong in (0.5, None):
        with pytest.raises(TypeError, match=f"name must be a string, got {wrong}\nfor an alpha, write register.alpha="):
            register(wrong)


def test_modules_of_diffmax_in_a_model_are_not_taken_for_softmax():
    """Its differential attention was refused, whatever its weights."""
    own = diffmax.nn.DiffAttention(16, 2, weights="diffmax", alpha=0.3)
    model = nn.ModuleList([timm.layers.Attention(16, 2), own, diffmax.nn.DiffmaxAttention(16, 2)])
    assert replace(model, 0.5) == ({"0": "Attention"}, {})
    assert own.alpha == 0.3
    model.append(diffmax.nn.DiffAttentionV2(16, 2))
    with pytest.raises(ValueError, match='3: DiffAttentionV2 was made with softmax weights: make it with weights="diffmax"'):
        replace(model, 0.5)


def test_differential_layers_get_their_depth(monkeypatch):
    from timm.models import vision_transformer

    monkeypatch.setattr(vision_transformer, "ATTN_LAYERS", dict(vision_transformer.ATTN_LAYERS))
    theirs = timm.create_model("vit_tiny_patch16_224", attn_layer="diff", num_classes=5, **VIT).double().eval()
    register("diff", SOFTMAX, differential=True)
    ours = timm.create_model("vit_tiny_patch16_224", attn_layer="diff", num_classes=5, **VIT).double().eval()
    assert [type(block.attn) for block in ours.blocks] == [diffmax.nn.DiffAttention] * 2
    assert not ours.load_state_dict(theirs.state_dict()).missing_keys
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    out = theirs(x)
    torch.testing.assert_close(ours(x), out)
    register("diff", 0.5, differential=True)
    sparse = timm.create_model("vit_tiny_patch16_224", attn_layer="diff", num_classes=5, **VIT).double().eval()
    sparse.load_state_dict(theirs.state_dict())
    assert replace(theirs, 0.5).changed == {"blocks.0.attn": "DiffAttention", "blocks.1.attn": "DiffAttention"}
    torch.testing.assert_close(sparse(x), theirs(x))
    assert (sparse(x) - out).abs().max() > 1e-6


@pytest.mark.parametrize("found", [None, "1.0.22"])
def test_says_which_timm_it_needs(monkeypatch, found):
    def version(name):
        if found is None:
            raise integration.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(integration, "version", version)
    with pytest.raises(ImportError, match=f"timm 1.0.23 or newer is needed, got {found or 'none'}\n.*diffmax-core.timm"):
        replace(nn.Linear(2, 2))


def test_an_alpha_that_descends_takes_a_replaced_model_from_softmax():
    model, image = build("vit"), images("vit")
    softmax = model(image)
    replace(model, 0.5)
    arrived = model(image)
    schedule = AlphaSchedule(model, steps=2)
    torch.testing.assert_close(model(image), softmax)
    schedule.step(2)
    torch.testing.assert_close(model(image), arrived)
