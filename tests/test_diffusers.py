"""diffmax.integrations.diffusers: small random transformers and UNets, as a backend and replaced, alone and in pipelines."""

import copy
import importlib
import inspect
import pkgutil

import pytest
import torch
from torch import nn

from diffmax import HillMap, attention
from diffmax.integrations import diffusers as integration
from diffmax.integrations import inplace
from diffmax.integrations.diffusers import attention_maps, register, replace
from diffmax.nn import DiffAttention

pytest.importorskip("diffusers", reason="needs diffusers: pip install 'diffmax-core[diffusers]'")
import diffusers
from diffusers.models import attention_dispatch, attention_processor
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
SOFTMAX = torch.tensor(1.0)


def flux():
    model = diffusers.FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=(4, 4, 8),
    )
    inputs = {
        "hidden_states": torch.randn(2, 9, 4),
        "encoder_hidden_states": torch.randn(2, 5, 8),
        "pooled_projections": torch.randn(2, 8),
        "timestep": torch.rand(2),
        "img_ids": torch.rand(9, 3),
        "txt_ids": torch.zeros(5, 3),
    }
    return model, inputs


def qwen_image():  # a mask of its text
    model = diffusers.QwenImageTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=8,
        axes_dims_rope=(4, 4, 8),
        patch_size=1,
    )
    inputs = {
        "hidden_states": torch.randn(2, 9, 4),
        "encoder_hidden_states": torch.randn(2, 5, 8),
        "encoder_hidden_states_mask": torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]),
        "timestep": torch.rand(2),
        "img_shapes": [(1, 3, 3)] * 2,
    }
    return model, inputs


def dit():
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        sample_size=8,
        num_embeds_ada_norm=1000,
    )
    return model, {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor([1, 2]),
        "class_labels": torch.tensor([1, 2]),
    }


def unet():
    model = diffusers.UNet2DConditionModel(
        sample_size=4,
        block_out_channels=(8,),
        norm_num_groups=4,
        layers_per_block=1,
        attention_head_dim=4,
        cross_attention_dim=8,
        down_block_types=("CrossAttnDownBlock2D",),
        mid_block_type=None,
        up_block_types=("CrossAttnUpBlock2D",),
    )
    return model, {
        "sample": torch.randn(2, 4, 4, 4),
        "timestep": 1,
        "encoder_hidden_states": torch.randn(2, 5, 8),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]),
    }


DISPATCHED, MODELS = (flux, qwen_image), (flux, qwen_image, dit, unet)


def double(build):
    model, inputs = build()
    return model.double().eval(), {
        name: t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for name, t in inputs.items()
    }


def results(model, inputs):
    model.zero_grad()
    out = model(**inputs).sample
    out.square().sum().backward()
    return out.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(results_, others):
    torch.testing.assert_close(results_[0], others[0], rtol=1e-10, atol=1e-10)
    assert results_[1].keys() == others[1].keys()
    scale = max(gradient.abs().max().item() for gradient in others[1].values())
    for name, gradient in others[1].items():
        torch.testing.assert_close(results_[1][name], gradient, rtol=1e-9, atol=1e-10 * scale, msg=name)


def set_native():
    """`reset_attention_backend` leaves the default that `set_attention_backend` chose for all models."""
    attention_dispatch._AttentionBackendRegistry._active_backend = attention_dispatch.AttentionBackendName.NATIVE


@pytest.fixture(autouse=True)
def _native():
    set_native()
    yield
    set_native()


@pytest.mark.parametrize("build", DISPATCHED)
def test_as_a_backend_alpha_1_is_the_native_one_and_half_is_not(build):
    model, inputs = double(build)
    native = results(model, inputs)
    register(alpha=SOFTMAX)
    model.set_attention_backend("diffmax")
    assert_same(results(model, inputs), native)
    register(alpha=0.5)
    sparse = results(model, inputs)
    assert (sparse[0] - native[0]).abs().max() > 1e-6 * native[0].abs().max()
    assert all(gradient.isfinite().all() for gradient in sparse[1].values())
    model.reset_attention_backend()
    set_native()
    assert_same(results(model, inputs), native)
    register("diffmax-softmax", alpha=SOFTMAX)
    with diffusers.attention_backend("diffmax"):
        assert torch.equal(model(**inputs).sample, sparse[0])
        with diffusers.attention_backend("diffmax-softmax"):
            torch.testing.assert_close(model(**inputs).sample, native[0], rtol=1e-10, atol=1e-10)
    assert_same(results(model, inputs), native)


@pytest.mark.parametrize("build", MODELS)
def test_replaced_alpha_1_is_the_model_as_it_was_and_half_is_not(build):
    model, inputs = double(build)
    native, keys = results(model, inputs), set(model.state_dict())
    assert not replace(model, SOFTMAX).kept
    assert_same(results(model, inputs), native)
    changed = replace(model, 0.5).changed
    sparse = results(model, inputs)
    assert (sparse[0] - native[0]).abs().max() > 1e-6 * native[0].abs().max()
    assert all(gradient.isfinite().all() for gradient in sparse[1].values())
    assert set(model.state_dict()) == keys
    with attention_maps(model) as maps:
        assert torch.equal(model(**inputs).sample, sparse[0])
    assert maps.keys() == changed.keys()
    for collected in maps.values():
        weights = collected[0].to_dense()
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1], dtype=torch.float64))
    assert torch.equal(copy.deepcopy(model)(**inputs).sample, sparse[0])


def test_learned_alphas_per_head():
    model, inputs = double(dit)
    softmax = model.state_dict()
    replace(model, 0.8, HillMap(c=0.5))
    names = [name for name, _ in model.named_parameters() if name.endswith("diffmax.log_beta")]
    assert len(names) == 2
    _, gradients = results(model, inputs)
    assert all(gradients[name].shape == (model.get_submodule(name.partition(".diffmax")[0]).heads,) for name in names)
    assert all(gradients[name].abs().sum() > 0 for name in names)
    model.load_state_dict(softmax)


def test_modules_that_share_a_processor_are_not_confused():
    model, inputs = double(dit)
    shared = attention_processor.AttnProcessor2_0()
    for block in model.transformer_blocks:
        block.attn1.set_processor(shared)
    done = replace(model, lambda name, module: None if "blocks.1" in name else 0.5)
    assert list(done.changed) == ["transformer_blocks.0.attn1"]
    assert done.kept == {"transformer_blocks.1.attn1": "the given alpha is None"}
    assert type(model.transformer_blocks[1].attn1.processor) is attention_processor.AttnProcessor2_0
    results(model, inputs)


@pytest.mark.parametrize("slow_one", ["AttnProcessor", "AttnAddedKVProcessor"])
def test_processors_with_a_score_matrix_become_those_on_torchs_attention(slow_one):
    added = {"added_kv_proj_dim": 8} if "Added" in slow_one else {"cross_attention_dim": 8}
    attend = attention_processor.Attention(
        query_dim=8, heads=2, dim_head=4, norm_num_groups=2, residual_connection=True, **added
    )
    attend.set_processor(getattr(attention_processor, slow_one)())
    x, context = torch.randn(2, 6, 8), torch.randn(2, 5, 8)
    given = (x.mT.reshape(2, 8, 2, 3), context) if "Added" in slow_one else (x, context)
    mask = None if "Added" in slow_one else torch.zeros(2, 1, 5).index_fill_(2, torch.tensor([3]), -torch.inf)
    out = attend(*given, attention_mask=mask)
    parent = nn.ModuleDict({"attn": attend})
    assert replace(parent, SOFTMAX).changed == {"attn": f"{slow_one}2_0"}
    torch.testing.assert_close(attend(*given, attention_mask=mask), out)


def test_models_that_would_keep_softmax_are_refused():
    model, inputs = double(unet)
    out = model(**inputs).sample
    register(alpha=0.5)
    with pytest.raises(
        ValueError, match=r"UNet2DConditionModel would keep softmax in 6 modules(.|\n)*AttnProcessor2_0(.|\n)*replace"
    ):
        model.set_attention_backend("diffmax")
    assert torch.equal(model(**inputs).sample, out)
    register(alpha=0.5, partial=True)
    model.set_attention_backend("diffmax")
    model.set_attn_processor(attention_processor.SlicedAttnProcessor(1))
    with pytest.raises(ValueError, match="SlicedAttnProcessor takes a softmax in get_attention_scores"):
        replace(model)
    own = nn.ModuleDict({"a": attention_processor.Attention(8), "b": nn.MultiheadAttention(8, 2)})
    with pytest.raises(ValueError, match="b: MultiheadAttention has no processor, and takes a softmax in torch"):
        replace(own)
    assert replace(own, 0.5, partial=True).changed == {"a": "AttnProcessor2_0"}
    with pytest.raises(ValueError, match="Linear must have attention that can be replaced"):
        replace(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"a: .*got \(3,\)\nthe module has 8 query heads"):
        replace(own, torch.full((3,), 0.5), partial=True)


def test_a_processor_that_puts_softmax_back_warns():
    model, inputs = double(unet)
    softmax = model(**inputs).sample
    for change in (
        lambda: model.set_attn_processor(attention_processor.AttnProcessor2_0()),
        lambda: model.set_attention_slice("auto"),
        model.fuse_qkv_projections,
    ):
        replace(model, 0.3, partial=True)
        with pytest.warns(
            UserWarning, match=r"Attention.set_processor: with \w+ this module has softmax again\ncall .*replace"
        ):
            change()
        torch.testing.assert_close(model(**inputs).sample, softmax)
        model.set_attn_processor(attention_processor.AttnProcessor2_0())


class CallsSuper(attention_processor.AttnProcessor2_0):
    def __call__(self, *args, **options):
        return super().__call__(*args, **options)


class Decorated(attention_processor.AttnProcessor2_0):
    @torch.no_grad()
    def __call__(self, attn, hidden_states, **options):
        heads = attn.to_q(hidden_states).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
        return nn.functional.scaled_dot_product_attention(heads, heads, heads).transpose(1, 2).flatten(2)


def around():
    scale = 0.5

    class Around(attention_processor.AttnProcessor2_0):
        def __call__(self, attn, hidden_states, **options):
            heads = attn.to_q(hidden_states).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            out = nn.functional.scaled_dot_product_attention(heads, heads, heads, scale=scale)
            return out.transpose(1, 2).flatten(2)

    return Around()


class NamesABackend:
    _attention_backend = None
    _parallel_config = None

    def __call__(self, attn, hidden_states, **options):
        heads = attn.to_q(hidden_states).unflatten(-1, (attn.heads, -1))
        return attention_dispatch.dispatch_attention_fn(heads, heads, heads, backend="native").flatten(2)


class NamesABackendToo(NamesABackend):
    def __call__(self, attn, hidden_states, **options):
        heads = attn.to_q(hidden_states).unflatten(-1, (attn.heads, -1))
        return dispatch_attention_fn(heads, heads, heads, backend=AttentionBackendName.NATIVE).flatten(2)


def two_modules(processor):
    own = attention_processor.Attention(8, heads=2, dim_head=4, processor=processor)
    return nn.ModuleDict({"served": attention_processor.Attention(8, heads=2, dim_head=4), "own": own})


@pytest.mark.parametrize(
    ("processor", "reason"),
    [
        (CallsSuper(), "CallsSuper takes a softmax in AttnProcessor2_0.__call__"),
        (around(), r".*Around.__call__ must not use super\(\) or names of a function around it"),
    ],
)
def test_processors_that_cannot_be_rewritten_are_refused_and_nothing_changes(processor, reason):
    """The first was left as it was, and was not among those kept; the second failed when it was called."""
    model = two_modules(processor)
    with pytest.raises(ValueError, match=f"would keep softmax in 1 modules\n  own: {reason}"):
        replace(model, 0.5)
    assert not any(isinstance(part.processor, inplace.InPlace) for part in model.values())
    done = replace(model, 0.5, partial=True)
    assert (list(done.changed), list(done.kept)) == (["served"], ["own"])
    model["own"](torch.randn(1, 3, 8))


def test_modules_of_diffmax_in_a_model_are_not_taken_for_softmax():
    model = two_modules(attention_processor.AttnProcessor2_0())
    model["diff"] = DiffAttention(8, 2, weights="diffmax")
    assert list(replace(model, 0.5).changed) == ["served", "own"]
    model["softmax"] = DiffAttention(8, 2)
    with pytest.raises(ValueError, match="softmax: DiffAttention was made with softmax weights"):
        replace(model, 0.5)


def test_a_processor_with_a_decorator_is_rewritten():
    """It was left as it was, and was not among those kept."""
    model, x = two_modules(Decorated()), torch.randn(1, 3, 8)
    assert list(replace(model, 0.5).changed) == ["served", "own"]
    heads = model["own"].to_q(x).unflatten(-1, (2, 4)).transpose(1, 2)
    out = model["own"](x)
    assert not out.requires_grad
    torch.testing.assert_close(out, attention(heads, heads, heads, alpha=0.5).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("kind", [NamesABackend, NamesABackendToo])
def test_set_attention_backend_refuses_a_processor_that_names_another(kind):
    """Its attention kept softmax in silence."""
    register(alpha=0.5)
    model, _ = flux()
    model.transformer_blocks[0].attn.processor = kind()
    with pytest.raises(
        ValueError,
        match=rf"transformer_blocks.0.attn: {kind.__name__} asks for the attention backend (?i:.*native), whatever is set",
    ):
        model.set_attention_backend("diffmax")
    attend, x = two_modules(kind()), torch.randn(1, 3, 8)
    softmax = attend["own"](x)
    replace(attend, 0.5)
    assert (attend["own"](x) - softmax).abs().max() > 0


@pytest.mark.filterwarnings("ignore")
def test_every_processor_of_diffusers_is_rewritten_or_refused():
    """But for those without weights per query and key, known by name."""
    without = set()
    for module in pkgutil.walk_packages(diffusers.models.__path__, "diffusers.models."):
        for kind in vars(importlib.import_module(module.name)).values():
            if inspect.isclass(kind) and kind.__module__ == module.name and "Processor" in kind.__name__:
                if inplace.weight_makers(kind):
                    inplace.in_place(kind)
                elif inplace.hidden_makers(kind) is None and "__call__" in vars(kind):
                    without.add(kind.__name__)
    assert all("Linear" in name or "SanaMultiscale" in name for name in without), without


def dispatch(*given, **options):
    return attention_dispatch.dispatch_attention_fn(*given, backend="diffmax", **options)


def test_arguments_of_the_dispatcher():
    register(alpha=0.5)
    q, k, v = (torch.randn(2, n, h, 8) for n, h in ((5, 4), (7, 2), (7, 2)))
    transposed = [t.transpose(1, 2) for t in (q, k, v)]
    keys = torch.rand(2, 7) > 0.3
    keys[0] = False
    additive = torch.randn(2, 1, 5, 7)
    for options, same in (
        ({}, {}),
        ({"attn_mask": keys}, {"attn_mask": keys[:, None, None]}),
        ({"attn_mask": additive}, {"attn_mask": additive}),
        ({"attn_mask": additive[0]}, {"attn_mask": additive[0]}),
        ({"is_causal": True, "scale": 0.7}, {"is_causal": True, "scale": 0.7}),
    ):
        out = dispatch(q, k, v, enable_gqa=True, **options)
        torch.testing.assert_close(out, attention(*transposed, enable_gqa=True, alpha=0.5, **same).transpose(1, 2))
    torch.manual_seed(1)
    dropped = dispatch(q, k, v, enable_gqa=True, dropout_p=0.5)
    torch.manual_seed(1)
    torch.testing.assert_close(dropped, attention(*transposed, None, 0.5, enable_gqa=True, alpha=0.5).transpose(1, 2))
    assert (dispatch(q, k, v, attn_mask=keys, enable_gqa=True)[0] == 0).all()
    for options, message in (
        ({"attn_mask": torch.zeros(2, 5, 7)}, r"3 dimensions does not say .* got shape \(2, 5, 7\)\ngive it as"),
        ({"attn_mask": "block"}, "attn_mask must be a tensor, got str"),
        ({"attention_kwargs": {"return_lse": True}}, "return_lse must be False"),
        ({"parallel_config": object()}, "context parallelism is not implemented"),
    ):
        with pytest.raises(ValueError, match=message):
            dispatch(q, k, v, enable_gqa=True, **options)
    with pytest.raises(ValueError, match="heads"):
        dispatch(q, k, v)


def test_wrong_names_and_alphas():
    for name in ("native", "Diffmax", ""):
        with pytest.raises(ValueError, match="must be in lower case, and none of diffusers' backends"):
            register(name)
    with pytest.raises(TypeError, match=r"name must be a string, got 0.5\nfor an alpha, write register\(alpha=0.5\)"):
        register(0.5)
    with pytest.raises(ValueError, match="strictly between 0 and 1"):
        register(alpha=1.5)
    with pytest.raises(ValueError, match=r"register: alpha must lie between 0 and 1, got values from 0.5 to 1.5"):
        register("diffmax-two", alpha=torch.tensor([0.5, 1.5]))
    with pytest.raises(TypeError, match=r"register: alpha must be of a floating dtype, got int64"):
        register("diffmax-two", alpha=torch.tensor(1))
    register("diffmax-two")
    names = attention_dispatch.AttentionBackendName
    assert names("diffmax-two") is names.__members__["DIFFMAX-TWO"]
    assert [member.value for member in names].count("diffmax-two") == 1
    assert names("diffmax-two") == "diffmax-two"
    assert copy.deepcopy(names("diffmax-two")) is names("diffmax-two")


@pytest.mark.parametrize("found", [None, "0.35.2"])
def test_says_which_diffusers_it_needs(monkeypatch, found):
    def version(name):
        if found is None:
            raise integration.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(integration, "version", version)
    with pytest.raises(
        ImportError, match=f"diffusers 0.36.0 or newer is needed, got {found or 'none'}\n.*diffmax-core.diffusers"
    ):
        register()


def small_vae():
    return diffusers.AutoencoderKL(
        block_out_channels=(8,),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        latent_channels=4,
        shift_factor=0.0,
    ).eval()


def dit_pipeline():
    pipeline = diffusers.DiTPipeline(dit()[0].eval(), small_vae(), diffusers.DDIMScheduler())
    return pipeline, pipeline.transformer, {"class_labels": [1, 2]}


def unet_pipeline():
    model = diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        layers_per_block=1,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    pipeline = diffusers.DDIMPipeline(model.eval(), diffusers.DDIMScheduler())
    return pipeline, pipeline.unet, {"batch_size": 2}


def flux_pipeline():
    model = diffusers.FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=(4, 4, 8),
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    pipeline = diffusers.FluxPipeline(scheduler, small_vae(), None, None, None, None, model.eval())
    torch.manual_seed(1)
    embedded = {"prompt_embeds": torch.randn(1, 5, 8), "pooled_prompt_embeds": torch.randn(1, 8)}
    return pipeline, pipeline.transformer, embedded | {"height": 8, "width": 8, "max_sequence_length": 5}


@pytest.mark.parametrize("build", [dit_pipeline, unet_pipeline, flux_pipeline])
def test_pipelines_run_two_steps(build):
    pipeline, model, options = build()
    pipeline.set_progress_bar_config(disable=True)

    def images():
        generator = torch.Generator().manual_seed(0)
        return torch.from_numpy(pipeline(**options, num_inference_steps=2, output_type="np", generator=generator).images)

    native = images()
    replace(model, SOFTMAX)
    torch.testing.assert_close(images(), native, rtol=1e-4, atol=1e-4)
    replace(model, 0.3)
    sparse = images()
    assert sparse.isfinite().all()
    assert (sparse - native).abs().max() > 1e-6


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", ["backend", "replaced"])
def test_torch_compile_keeps_one_graph(how):
    model, inputs = double(flux)
    if how == "backend":
        register(alpha=0.5)
        model.set_attention_backend("diffmax")
    else:
        replace(model, 0.5)
    out = model(**inputs).sample
    torch.testing.assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(**inputs).sample, out)
