"""diffusers: diffmax as an attention backend, and a swap of the attention of one model.

`register()`, then `set_attention_backend("diffmax")`, for models whose processors use diffusers' dispatcher; or
`replace(model)`, for those too and for models such as UNet2DConditionModel, whose processors call torch's attention.
docs/diffusers.md.
"""

from __future__ import annotations

import ast
import copy
import functools
import inspect
import textwrap
import warnings
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor, nn

from diffmax.integrations.inplace import (
    AttentionWeights,
    InPlace,
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
from diffmax.matched import check_scale, matched_scale, rescaled
from diffmax.nn._alpha import HeadAlpha
from diffmax.operators.attention.api import attention
from diffmax.operators.common.checks import one_minus_alpha

__all__ = ["Replaced", "attention_maps", "register", "replace"]

_registered: dict[str, bool] = {}  # names of ours, and whether models may keep softmax in a part
# processors that make weights by Attention.get_attention_scores, and those that compute the same by torch's attention
_FUSED = {"AttnProcessor": "AttnProcessor2_0", "AttnAddedKVProcessor": "AttnAddedKVProcessor2_0"}


def register(name: str = "diffmax", alpha: float | Tensor = 0.9, *, scale: Scale = 1.0, partial: bool = False) -> None:
    """Make diffmax an attention backend of diffusers, under `name`.

    Afterwards `model.set_attention_backend(name)` and `attention_backend(name)` accept it.

    Args:
        name: The name, in lower case. Several names with different alphas can coexist. Registering a name again replaces it,
            also in models that use it.
        alpha: As for `diffmax.attention`: a float, or a tensor () or (H,), which may require a gradient. All layers of all
            models with this backend share it; for an alpha per layer, or one that is learned, use `replace`.
        scale: Factor of the scores, with all that is added to them: a positive number; or "match", the matched scale of alpha
            (`diffmax.matched_scale`), as a model wants it that was trained with softmax. It follows a tensor alpha.
        partial: Accept models that keep softmax in a part of their attention. Default: `set_attention_backend` refuses them.
    Raises:
        ImportError: diffusers is missing or too old.
        TypeError: name, alpha or scale has the wrong type.
        ValueError: alpha lies outside (0, 1), scale is not positive, or name is a backend of diffusers or not in lower case.

    Masks (boolean and additive; (B, S), or any shape that broadcasts to (B, H, L, S)), is_causal, dropout, scale and grouped
    heads are honoured. `return_lse`, context parallelism, block masks and masks of three dimensions cannot be, and raise a
    ValueError. As for every backend of diffusers, `set_attention_backend` also makes it the one of models that chose none.

    Example:
        >>> register("diffmax-sparser", alpha=0.5)
        >>> from diffusers import FluxTransformer2DModel
        >>> model = FluxTransformer2DModel(
        ...     in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        ...     joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(4, 4, 8),
        ... )
        >>> model.set_attention_backend("diffmax-sparser")
        >>> model.reset_attention_backend()
    """
    dispatch = _import_diffusers()
    if not isinstance(name, str):
        raise TypeError(f"register: name must be a string, got {name!r}\nfor an alpha, write register(alpha={name!r})")
    names, registry = dispatch.AttentionBackendName, dispatch._AttentionBackendRegistry
    taken = name not in _registered and name in {member.value for member in names}
    if taken or name != name.lower() or not name:
        raise ValueError(f"register: name must be in lower case, and none of diffusers' backends, got {name!r}")
    beside = alpha if isinstance(alpha, Tensor) else torch.empty(1)
    one_minus_alpha("register", beside, alpha, beside.ndim)
    check_scale("register", scale)
    factor = scale

    def attend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        return_lse: bool = False,
        _parallel_config: Any = None,
    ) -> Tensor:
        q, k, v, mask = _as_torch(query, key, value, attn_mask, return_lse, _parallel_config)
        q, scale, mask = rescaled(matched_scale(alpha) if isinstance(factor, str) else factor, q, scale, mask)
        out = attention(q, k, v, mask, dropout_p, is_causal, scale, enable_gqa, alpha=alpha)
        return out.transpose(1, 2)

    if name not in _registered:
        _add_member(names, name)
    _registered[name] = partial
    registry.register(names(name))(attend)
    _refuse_other_processors()


def replace(
    model: nn.Module,
    alpha: LayerAlpha = 0.9,
    alpha_map: AlphaMap | None = None,
    *,
    scale: Scale = 1.0,
    partial: bool = False,
) -> Replaced:
    """Give a model of diffusers diffmax attention, in place; its weights stay.

    Args:
        model: A transformer or UNet of diffusers: any model whose attention modules have a `processor`. One that was replaced
            before gets the new alpha.
        alpha: As for `diffmax.attention`: a float; a tensor () or (H,), which becomes a buffer of each module; or a function of
            a module's name and the module that returns either, or None to leave that module as it is.
        alpha_map: A `HillMap`, `TanhMap` or `ExpMap`: alpha is learned. Each module gets a parameter `diffmax.log_beta`, (H,),
            which starts at `alpha`. It must get no weight decay: use `diffmax.nn.param_groups`.
        scale: Factor of the scores, with all that is added to them: a positive number; or "match", the matched scale of alpha
            (`diffmax.matched_scale`), as a model wants it that was trained with softmax. It follows an alpha that is learned.
        partial: Accept modules that keep softmax, because diffmax cannot stand in its place. Default: refuse such a model.
    Returns:
        The names of the modules that changed, with the classes of their processors, and of those that keep softmax.
    Raises:
        ImportError: diffusers is missing or too old.
        TypeError, ValueError: alpha or scale has the wrong type, shape or value; the model has no attention, or would keep
            softmax somewhere. The model is then unchanged.

    A processor then runs its own code, with `diffmax.attention` where it calls torch's attention or diffusers' dispatcher; the
    attention backend that is set no longer matters. Processors that take the softmax of a score matrix become the same one on
    torch's attention. Other processors put softmax back, such as those of `set_attn_processor`, `fuse_qkv_projections` and
    `enable_attention_slicing`, and warn: call `replace` again after them. `save_pretrained` writes no fixed alpha: call
    `replace` after `from_pretrained`.

    Example:
        >>> from diffusers import UNet2DModel
        >>> model = UNet2DModel(
        ...     sample_size=8, block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1, attention_head_dim=4,
        ...     down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        ... )
        >>> set(replace(model, alpha=0.5).changed.values())
        {'AttnProcessor2_0'}
    """
    _import_diffusers()
    check_model(model)
    modules, kept = _scan(model)
    reasons = {name: why_not_rewritten(_fused(library_class(type(module.processor)))) for name, module in modules.items()}
    kept |= {name: reason for name, reason in reasons.items() if reason is not None}
    modules = {name: module for name, module in modules.items() if name not in kept}
    refuse_kept(model, kept, partial)
    _warn_of_new_processors()
    return replace_all(model, modules, kept, alpha, lambda module, given: _holder(module, given, alpha_map, scale), _rewrite)


class _Dispatched(AttentionWeights):
    """The weights of a module that may call diffusers' dispatcher."""

    def dispatch(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        attention_kwargs: dict[str, Any] | None = None,
        *,
        backend: Any = None,
        parallel_config: Any = None,
    ) -> Tensor:
        """In place of diffusers' `dispatch_attention_fn`, with its arguments: (B, L, H, D) to (B, L, H, D)."""
        asked = (attention_kwargs or {}).get("return_lse", False)
        q, k, v, mask = _as_torch(query, key, value, attn_mask, asked, parallel_config)
        return self.attend(q, k, v, mask, dropout_p, is_causal, scale, enable_gqa).transpose(1, 2)


def _as_torch(
    query: Tensor, key: Tensor, value: Tensor, mask: Any, return_lse: bool, parallel_config: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(B, L, H, D) as (B, H, L, D), and the mask as torch's attention broadcasts it."""
    if return_lse:
        raise ValueError("diffmax attention: return_lse must be False, got True\ndiffmax weights have no logsumexp")
    if parallel_config is not None:
        raise ValueError(
            "diffmax attention: context parallelism is not implemented, got a parallel_config\n"
            "a threshold over keys on several devices cannot be merged from parts: run without enable_parallelism"
        )
    if mask is not None and not isinstance(mask, Tensor):
        raise ValueError(f"diffmax attention: attn_mask must be a tensor, got {type(mask).__name__}")
    if mask is not None and mask.ndim == 3 and mask.shape[0] != 1:
        raise ValueError(
            "diffmax attention: a mask of 3 dimensions does not say whether its first is batch or heads, got shape "
            f"{tuple(mask.shape)}\ngive it as (B, 1, L, S) or (1, H, L, S)"
        )
    if mask is not None and mask.ndim == 2 and tuple(mask.shape) == (query.shape[0], key.shape[1]):
        mask = mask[:, None, None]  # keys of each sequence, as diffusers' native backend has it
    return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), mask


def _import_diffusers() -> Any:
    try:
        found = version("diffusers")
    except PackageNotFoundError:
        found = "none"
    if found == "none" or Version(found) < Version("0.36.0"):  # the first whose dispatcher passes a parallel config
        raise ImportError(f'diffmax: diffusers 0.36.0 or newer is needed, got {found}\npip install "diffmax-core[diffusers]"')
    from diffusers.models import attention_dispatch

    return attention_dispatch


def _add_member(names: Any, name: str) -> None:
    """One more member of the enumeration of backends, which diffusers reads names from; Python has no public way."""
    member: Any = str.__new__(names, name)
    member._name_, member._value_, member.__objclass__ = name.upper(), name, names
    member._sort_order_ = len(names)
    names._member_names_.append(member._name_)
    names._member_map_[member._name_] = member
    names._value2member_map_[name] = member


def _refuse_other_processors() -> None:
    """From now on `set_attention_backend` refuses models whose processors do not ask for the backend."""
    from diffusers import ModelMixin

    kind: Any = ModelMixin
    if hasattr(kind.set_attention_backend, "_diffmax_checked"):
        return
    change = kind.set_attention_backend

    @functools.wraps(change)
    def change_checked(self: Any, backend: str) -> Any:
        if isinstance(backend, str) and backend.lower() in _registered:
            modules, kept = _scan(self)
            for name, module in modules.items():
                kind: Any = type(module.processor)
                if not hasattr(module.processor, "_attention_backend"):
                    kept[name] = f"{kind.__name__} does not ask for an attention backend"
                elif (own := _own_backend(kind)) is not None:
                    kept[name] = f"{kind.__name__} asks for the attention backend {own}, whatever is set"
            if kept and not _registered[backend.lower()]:
                raise ValueError(
                    f'set_attention_backend("{backend}"): {type(self).__name__} would keep softmax in {len(kept)} modules\n'
                    + "\n".join(f"  {name}: {reason}" for name, reason in kept.items())
                    + "\ncall diffmax.integrations.diffusers.replace(model), or register(..., partial=True)"
                )
        return change(self, backend)

    change_checked._diffmax_checked = True  # type: ignore[attr-defined]
    kind.set_attention_backend = change_checked


def _warn_of_new_processors() -> None:
    """From now on a module with diffmax attention warns if it gets a processor of diffusers, and with it softmax again."""
    from diffusers.models import attention as mixin
    from diffusers.models import attention_processor

    kinds: tuple[Any, ...] = (attention_processor.Attention, getattr(mixin, "AttentionModuleMixin", None))
    for kind in kinds:
        change = getattr(kind, "set_processor", None)
        if change is None or hasattr(change, "_diffmax_checked"):
            continue

        @functools.wraps(change)
        def change_checked(self: Any, processor: Any, change: Any = change) -> None:
            if isinstance(getattr(self, "processor", None), InPlace) and not isinstance(processor, InPlace):
                warnings.warn(
                    f"{type(self).__name__}.set_processor: with {type(processor).__name__} this module has softmax again\n"
                    "call diffmax.integrations.diffusers.replace(model) after the processors are set",
                    stacklevel=2,
                )
            change(self, processor)

        change_checked._diffmax_checked = True  # type: ignore[attr-defined]
        kind.set_processor = change_checked


def _scan(model: nn.Module) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The modules whose processors can be rewritten, and those that keep softmax, with the reason."""
    modules: dict[str, nn.Module] = {}
    kept: dict[str, str] = {}
    processors = {id(getattr(module, "processor", None)) for module in model.modules()}
    for name, module in model.named_modules():
        processor: Any = getattr(module, "processor", None)
        if isinstance(module, AttentionWeights) or id(module) in processors:
            continue
        unnamed = unnamed_softmax(module)
        if isinstance(module, HeadAlpha):
            reason = keeps_softmax(module)
        elif unnamed is not None:
            reason = f"{type(module).__name__} takes a softmax in {unnamed}"
        elif processor is None:
            reason = _reason_against(library_class(type(module)))
        else:
            kind = _fused(library_class(type(processor)))
            hidden = hidden_makers(kind)
            reason = None if hidden is None else f"{kind.__name__} takes a softmax in {hidden}"
            if reason is None and weight_makers(kind):
                modules[name] = module
        if reason is not None:
            kept[name] = reason
    return modules, kept


@functools.cache
def _own_backend(kind: type) -> str | None:
    """The backend that a processor names in a call of the dispatcher, in place of the one that is set, or None."""
    for method in weight_makers(kind).values():
        for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(method)))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("dispatch_attention_fn"):
                for backend in (keyword.value for keyword in node.keywords if keyword.arg == "backend"):
                    asked = ast.unparse(backend)
                    if asked.startswith("'") or "AttentionBackendName." in asked:
                        return asked.strip("'")
    return None


def _reason_against(kind: type) -> str | None:
    """Why a module without a processor would keep softmax, or None."""
    makers = [method.__qualname__ for method in weight_makers(kind).values()]
    if issubclass(kind, nn.MultiheadAttention):
        makers = ["torch"]
    found = makers[0] if makers else hidden_makers(kind)
    return None if found is None else f"{kind.__name__} has no processor, and takes a softmax in {found}"


def _fused(kind: type) -> type:
    """The processor that computes the same by torch's attention."""
    from diffusers.models import attention_processor

    fused: type = getattr(attention_processor, _FUSED[kind.__name__]) if kind.__name__ in _FUSED else kind
    return fused


def _holder(module: Any, alpha: float | Tensor, alpha_map: AlphaMap | None, scale: Scale) -> AttentionWeights:
    device = next((parameter.device for parameter in module.parameters()), None)
    heads = next((getattr(module, name) for name in ("heads", "num_heads") if hasattr(module, name)), None)
    return _Dispatched(heads, alpha, alpha_map, scale, device=device)


def _rewrite(module: Any) -> str:
    """Give a module a processor of its own that asks it for weights; returns the name of the processor's class."""
    processor = module.processor
    kind = library_class(type(processor))
    if _fused(kind) is not kind:
        processor = _fused(kind)()
    elif not isinstance(processor, nn.Module):
        processor = copy.copy(processor)  # it may be shared with modules that are left as they are
    processor.__class__ = in_place(_fused(kind))
    module.processor = processor
    return _fused(kind).__name__
