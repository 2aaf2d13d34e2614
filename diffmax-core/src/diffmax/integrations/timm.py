"""timm: diffmax as an attention layer of its VisionTransformer, and a swap of the attention of any of its models.

`register()`, then `attn_layer="diffmax"`; or `replace(model)`. Classes are listed by hand, from timm 1.0.31: what is not listed
and would keep softmax is refused. docs/timm.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import FunctionType
from typing import Any

from packaging.version import Version
from torch import Tensor, nn

from diffmax.integrations.inplace import (
    CHILD,
    AttentionWeights,
    LayerAlpha,
    Replaced,
    Scale,
    attention_maps,
    check_model,
    hidden_makers,
    in_place,
    keeps_softmax,
    library_class,
    refuse_kept,
    replace_all,
    unnamed_softmax,
    weight_makers,
    why_not_rewritten,
)
from diffmax.machine.metadata import PackageNotFoundError, version
from diffmax.maps import AlphaMap
from diffmax.nn._alpha import HeadAlpha
from diffmax.nn.differential import DiffAttention

__all__ = ["Replaced", "attention_maps", "layer", "register", "replace"]

# Classes whose forward makes weights over keys, and the dimension of queries and scores that has the heads; None: alpha is one
# number, because heads are not a dimension of their own.
SERVED: dict[str, int | None] = {
    "timm.layers.attention.Attention": -3,
    "timm.layers.attention.AttentionRope": -3,
    "timm.layers.attention2d.Attention2d": -3,
    "timm.layers.attention2d.MultiQueryAttention2d": None,
    "timm.layers.attention2d.MultiQueryAttentionV2": None,
    "timm.layers.attention_pool.AttentionPoolLatent": -3,
    "timm.layers.attention_pool.AttentionPoolPrr": -3,
    "timm.layers.attention_pool2d.AttentionPool2d": -3,
    "timm.layers.attention_pool2d.RotAttentionPool2d": -3,
    "timm.layers.bottleneck_attn.BottleneckAttn": None,
    "timm.layers.diff_attention.DiffAttention": None,
    "timm.layers.halo_attn.HaloAttn": None,
    "timm.layers.non_local_attn.NonLocalAttn": None,
    "timm.layers.other_pool.SimPool1d": -3,
    "timm.layers.other_pool.SimPool2d": -3,
    "timm.models.beit.Attention": -3,
    "timm.models.cait.ClassAttn": -3,
    "timm.models.convit.MHSA": -3,
    "timm.models.cpubone.ConvAttention": -3,
    "timm.models.crossvit.CrossAttention": -3,
    "timm.models.davit.WindowAttention": -3,
    "timm.models.efficientformer.Attention": -3,
    "timm.models.efficientvit_msra.CascadedGroupAttention": None,
    "timm.models.eva.EvaAttention": -3,
    "timm.models.fastvit.Attention": -3,
    "timm.models.gcvit.WindowAttentionGlobal": -3,
    "timm.models.gemma4_vit.Gemma4Attention": -3,
    "timm.models.hiera.MaskUnitAttention": 1,
    "timm.models.hieradet_sam2.MultiScaleAttention": -3,
    "timm.models.iformer.SHMA": None,
    "timm.models.levit.Attention": -3,
    "timm.models.levit.AttentionDownsample": -3,
    "timm.models.lowformer.ConvAttention": -3,
    "timm.models.maxxvit.Attention2d": -3,
    "timm.models.maxxvit.AttentionCl": -3,
    "timm.models.metaformer.Attention": -3,
    "timm.models.mvitv2.MultiScaleAttention": -3,
    "timm.models.mvitv2.MultiScaleAttentionPoolFirst": -3,
    "timm.models.nest.Attention": 1,
    "timm.models.nextvit.EfficientAttention": -3,
    "timm.models.pvt_v2.Attention": -3,
    "timm.models.shvit.SHSA": None,
    "timm.models.swin_transformer.WindowAttention": -3,
    "timm.models.swin_transformer_v2.WindowAttention": -3,
    "timm.models.swin_transformer_v2_cr.WindowMultiHeadAttention": -3,
    "timm.models.tiny_vit.Attention": -3,
    "timm.models.tnt.Attention": -3,
    "timm.models.twins.GlobalSubSampleAttn": -3,
    "timm.models.twins.LocallyGroupedAttn": -3,
    "timm.models.vision_transformer.DiffParallelScalingBlock": None,
    "timm.models.vision_transformer.ParallelScalingBlock": -3,
    "timm.models.vision_transformer_relpos.RelPosAttention": -3,
    "timm.models.vision_transformer_sam.Attention": -3,
    "timm.models.visformer.Attention": -3,
    "timm.models.volo.Attention": -3,
    "timm.models.volo.ClassAttention": -3,
}

_TALKING = "mixes the weights of its heads after softmax"
_CHANNELS = "attends to channels, not to keys"
_GATES = "makes gates by softmax, not attention weights"
_LINEAR = "is linear attention, which has no weights per query and key"
REFUSED: dict[str, str] = {
    "timm.layers.global_context.GlobalContext": _GATES,
    "timm.layers.lambda_layer.LambdaLayer": _LINEAR,
    "timm.layers.selective_kernel.SelectiveKernelAttn": _GATES,
    "timm.layers.split_attn.RadixSoftmax": _GATES,
    "timm.models.cait.TalkingHeadAttn": _TALKING,
    "timm.models.coat.FactorAttnConvRelPosEnc": _LINEAR,
    "timm.models.convit.GPSA": "adds weights from positions to weights from scores, each with a softmax of its own",
    "timm.models.csatv2.SpatialTransformerBlock": "multiplies queries and keys over the batch",
    "timm.models.davit.ChannelAttention": _CHANNELS,
    "timm.models.davit.ChannelAttentionV2": _CHANNELS,
    "timm.models.edgenext.CrossCovarianceAttn": _CHANNELS,
    "timm.models.efficientformer_v2.Attention2d": _TALKING,
    "timm.models.efficientformer_v2.Attention2dDownsample": _TALKING,
    "timm.models.efficientvim.EfficientViM": _GATES,
    "timm.models.efficientvim.EfficientViMDistilled": _GATES,
    "timm.models.efficientvim.HSMSSD": _LINEAR,
    "timm.models.mobilevit.LinearSelfAttention": _LINEAR,
    "timm.models.volo.OutlookAttention": "reads its weights from one token, without a product of query and key",
    "timm.models.xcit.XCA": _CHANNELS,
}


def replace(
    model: nn.Module,
    alpha: LayerAlpha = 0.9,
    alpha_map: AlphaMap | None = None,
    *,
    scale: Scale = 1.0,
    partial: bool = False,
) -> Replaced:
    """Give a timm model diffmax attention, in place; its weights stay.

    Args:
        model: Any model of timm, or with timm's attention classes in it. One that was replaced before gets the new alpha.
        alpha: As for `diffmax.attention`: a float; a tensor () or (H,), which becomes a buffer of each module; or a function of
            a module's name and the module that returns either, or None to leave that module as it is.
        alpha_map: A `HillMap`, `TanhMap` or `ExpMap`: alpha is learned. Each module gets a parameter
            `diffmax.log_beta`, (H,), or (1,) where heads are not a dimension, which starts at `alpha`. It must get no weight
            decay: use `diffmax.nn.param_groups`.
        scale: Factor of the scores, with all that is added to them: a positive number; or "match", the matched scale of alpha
            (`diffmax.matched_scale`), as a model wants it that was trained with softmax. It follows an alpha that is learned.
        partial: Accept modules that keep softmax, because diffmax cannot stand in its place. Default: refuse such a model.
    Returns:
        The names of the modules that changed, and of those that keep softmax.
    Raises:
        ImportError: timm is missing or too old.
        TypeError, ValueError: alpha or scale has the wrong type, shape or value; the model has no attention, or would keep
            softmax somewhere. The model is then unchanged.

    A module then runs its own forward, with `diffmax.attention` where it calls torch's fused attention, and `diffmax_bisect`
    where it takes a softmax of scores (its eager path, `fused_attn=False`, or the only one). So masks, causality, dropout of
    weights, normed queries and keys, rotations, position biases and windows are what they were. Its class becomes a subclass
    with the same name. A float alpha adds nothing to the state dict; a tensor or a learned alpha adds an entry, which
    checkpoints of softmax models may lack.

    Example:
        >>> import timm, torch
        >>> model = timm.create_model("test_vit", num_classes=3)
        >>> sorted(replace(model, alpha=0.5).changed)[0]
        'blocks.0.attn'
        >>> with attention_maps(model) as maps:
        ...     logits = model(torch.randn(1, 3, 160, 160))
        >>> maps["blocks.0.attn"][0].shape, maps["blocks.0.attn"][0].is_sparse
        (torch.Size([1, 2, 101, 101]), True)
    """
    _import_timm()
    check_model(model)
    modules, kept = {}, {}
    for name, module in _without_holders(model):
        reason = _reason_against(module)
        if reason is not None:
            kept[name] = reason
        elif weight_makers(library_class(type(module))):
            modules[name] = module
    refuse_kept(model, kept, partial)
    return replace_all(model, modules, kept, alpha, lambda module, given: _holder(module, given, alpha_map, scale), _rewrite)


def layer(alpha: float | Tensor = 0.9, alpha_map: AlphaMap | None = None, *, differential: bool = False) -> type[nn.Module]:
    """A class like timm's `Attention`, with diffmax weights: the same constructor, forward and state dict.

    Args:
        alpha, alpha_map: As for `replace`; alpha is no function here.
        differential: Whether it is like timm's `DiffAttention` instead, and makes `diffmax.nn.DiffAttention`; alpha may then
            also be of shape (2,), for the first and the second map of each pair, or (2 H,).
    Returns:
        A class for arguments such as `attn_layer` of `VisionTransformer`: a subclass of `timm.layers.Attention`, or of
        `timm.layers.DiffAttention`, which makes timm pass the layer's depth.
    Raises:
        ImportError: timm is missing or too old.
        TypeError, ValueError: alpha has the wrong type or value. This is checked when a layer is built.
    Example:
        >>> import torch
        >>> layer(alpha=0.5)(dim=32, num_heads=4, qkv_bias=True)(torch.randn(2, 10, 32)).shape
        torch.Size([2, 10, 32])
    """
    _import_timm()
    from timm.layers import attention, diff_attention

    if differential:
        theirs: Any = diff_attention.DiffAttention

        class Differential(theirs):  # type: ignore[misc]
            """Makes diffmax's `DiffAttention` from timm's arguments."""

            def __new__(cls, *args: Any, **kwargs: Any) -> Any:
                return DiffAttention(*args, weights="diffmax", alpha=alpha, alpha_map=alpha_map, **kwargs)

        return Differential

    base: Any = in_place(attention.Attention)

    class DiffmaxAttention(base):  # type: ignore[misc]
        """timm's `Attention` with diffmax weights."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            setattr(self, CHILD, _holder(self, alpha, alpha_map, 1.0))

    return DiffmaxAttention


def register(
    name: str = "diffmax", alpha: float | Tensor = 0.9, alpha_map: AlphaMap | None = None, *, differential: bool = False
) -> None:
    """Make diffmax an attention layer of timm's `VisionTransformer` under a name: `create_model(..., attn_layer=name)`.

    Args:
        name: The name. Several names with different alphas can coexist. Of timm's own names only "diff" can be taken, by
            differential attention; models of timm that ask for "diff" then get it.
        alpha, alpha_map, differential: As for `layer`.
    Raises:
        ImportError: timm is missing or too old.
        TypeError: name is not a string.
        ValueError: name is timm's own.
    Example:
        >>> register("diffmax-sparser", alpha=0.5)
        >>> import timm, torch
        >>> model = timm.create_model("test_vit", attn_layer="diffmax-sparser")
        >>> model.blocks[0].attn.diffmax
        AttentionWeights(alpha=0.5)
    """
    _import_timm()
    from timm.models.vision_transformer import ATTN_LAYERS

    if not isinstance(name, str):
        raise TypeError(f"register: name must be a string, got {name!r}\nfor an alpha, write register(alpha={name!r})")
    if name in ("", "attn") or (name == "diff" and not differential):
        raise ValueError(f"register: name must not be one of timm's, got {name!r}\ntake another name")
    ATTN_LAYERS[name] = layer(alpha, alpha_map, differential=differential)


def _import_timm() -> None:
    try:
        found = version("timm")
    except PackageNotFoundError:
        found = "none"
    if found == "none" or Version(found) < Version("1.0.23"):  # the first with ATTN_LAYERS
        raise ImportError(f'diffmax: timm 1.0.23 or newer is needed, got {found}\npip install "diffmax-core[timm]"')


def _without_holders(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((name, module) for name, module in model.named_modules() if not isinstance(module, AttentionWeights))


def _reason_against(module: nn.Module) -> str | None:
    """Why a module would keep softmax, or None."""
    if isinstance(module, HeadAlpha):
        return keeps_softmax(module)
    kind = library_class(type(module))
    if isinstance(module, nn.MultiheadAttention):
        return "MultiheadAttention is torch's own: put diffmax.nn.DiffmaxAttention.from_torch(module) in its place"
    for function in weight_makers(kind).values():
        if _owner(function) not in SERVED:
            return (
                f"{kind.__name__} {REFUSED.get(_owner(function), f'is not known, and takes a softmax in {function.__name__}')}"
            )
    hidden = hidden_makers(kind) or unnamed_softmax(module)
    if hidden is not None:
        return f"{kind.__name__} is not known, and takes a softmax in {hidden}"
    return why_not_rewritten(kind)


def _holder(module: Any, alpha: float | Tensor, alpha_map: AlphaMap | None, scale: Scale) -> AttentionWeights:
    function = next(iter(weight_makers(library_class(type(module))).values()))
    at = SERVED[_owner(function)]
    heads = None if at is None else next(getattr(module, n) for n in ("num_heads", "heads") if hasattr(module, n))
    device = next((parameter.device for parameter in module.parameters()), None)
    return AttentionWeights(heads, alpha, alpha_map, scale, heads_at=-3 if at is None else at, device=device)


def _rewrite(module: nn.Module) -> str:
    kind = library_class(type(module))
    module.__class__ = in_place(kind)
    return kind.__name__


def _owner(function: FunctionType) -> str:
    """The full name of the class whose method a function is."""
    return f"{function.__module__}.{function.__qualname__}".rpartition(".")[0]
