"""Attention inside another library's own code: its forward, with the calls that make weights replaced.

A class computes attention by `scaled_dot_product_attention`, or by `softmax` of scores that it multiplies by the values.
`in_place` compiles the source of such a function again, with these calls directed to an `AttentionWeights`. All else
(projections, norms, rotations, position biases, masks, dropout) stays the library's code. docs/decisions/0101.
"""

from __future__ import annotations
import __future__

import ast
import contextlib
import functools
import inspect
import math
import textwrap
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from diffmax.maps import AlphaMap
from diffmax.matched import check_scale, matched_scale, rescaled
from diffmax.nn._alpha import HeadAlpha
from diffmax.operators.attention.api import attention
from diffmax.operators.common.numerics import accumulation_dtype
from diffmax.operators.rows.api import diffmax_bisect

CHILD = "diffmax"  # the submodule of an attention module that holds its alpha
MAKERS = ("scaled_dot_product_attention", "softmax", "dispatch_attention_fn")  # what makes weights, by name
# makes weights too, and is not replaced: a method of diffusers' modules, and kernels of others
_HIDDEN = (
    "get_attention_scores",
    "flash_attention",
    "memory_efficient_attention",
    "multi_head_attention_forward",
    "_na3d",
    "npu_fusion_attention",
)
Scale: TypeAlias = 'float | Literal["match"]'
LayerAlpha: TypeAlias = "float | Tensor | Callable[[str, nn.Module], float | Tensor | None]"
_LIBRARIES = ("F", "torch", "functional")


def check_model(model: Any) -> None:
    """Check that `replace` got a module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"replace: model must be a torch.nn.Module, got {model!r} of type {type(model).__name__}")


class AttentionWeights(HeadAlpha):
    """The alpha of one attention module of another library, and the weights that it makes there.

    Args:
        heads: H, the number of query heads; None: they are not a dimension of their own, and alpha is one number.
        alpha: As for `diffmax.attention`. A tensor () or (H,) becomes a buffer, an nn.Parameter a parameter.
        alpha_map: With it alpha is learned: a parameter `log_beta`, (H,), which starts at `alpha`.
        scale: Factor of the scores, or "match": the matched scale of the current alpha.
        heads_at: The dimension of queries, keys and scores that has the heads.
        device: Where a tensor alpha and log_beta are.
    Raises:
        TypeError, ValueError: alpha or scale has the wrong type, shape or value.
    """

    def __init__(
        self,
        heads: int | None,
        alpha: float | Tensor,
        alpha_map: AlphaMap | None = None,
        scale: Scale = 1.0,
        *,
        heads_at: int = -3,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        check_scale(type(self).__name__, scale)
        self.heads, self.heads_at, self.scale = heads, heads_at, scale
        self.maps: list[Tensor] | None = None  # where `attention_maps` collects
        self._set_alpha(alpha, alpha_map, heads or 1, device, None)

    def _alpha_for(self, q: Tensor) -> float | Tensor:
        alpha = super()._alpha_for(q)
        return alpha.squeeze() if self.heads is None and isinstance(alpha, Tensor) else alpha

    def _factor(self, alpha: float | Tensor) -> float | Tensor:
        """Of the scores: one number, or one per entry of alpha."""
        return matched_scale(alpha) if isinstance(self.scale, str) else self.scale

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """In place of torch's `scaled_dot_product_attention`, with its arguments; alpha is that of each head."""
        alpha, at = self._alpha_for(query), self.heads_at
        if at != -3:
            query, key, value = (t.movedim(at, -3) for t in (query, key, value))
        query, scale, attn_mask = rescaled(self._factor(alpha), query, scale, attn_mask)
        if self.maps is not None:
            self._keep_map(self.maps, query, key, attn_mask, is_causal, scale)
        out = attention(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, alpha=alpha)
        return out if at == -3 else out.movedim(-3, at)

    def weights(self, scores: Tensor, dim: int = -1) -> Tensor:
        """In place of `softmax`: the weights of scores (..., L, S) along the keys."""
        if dim not in (-1, scores.ndim - 1):
            raise ValueError(f"diffmax: weights are along the last dimension, got dim {dim} of {scores.ndim}")
        alpha = self._alpha_for(scores)
        if isinstance(alpha, Tensor) and alpha.ndim:
            alpha = alpha.view(-1, *[1] * (scores.ndim - 1 - self.heads_at % scores.ndim))
        factor = self._factor(alpha)
        if isinstance(factor, Tensor) or factor != 1:
            scores = (scores * factor).to(scores.dtype)
        weights = diffmax_bisect(scores, alpha)
        if self.maps is not None:
            self.maps.append(weights.detach().to_sparse())
        return weights

    @torch.no_grad()
    def _keep_map(
        self,
        maps: list[Tensor],
        query: Tensor,
        key: Tensor,
        mask: Tensor | None,
        is_causal: bool,
        scale: float | None,
    ) -> None:
        """The weights of a fused call, computed beside it from the scores in memory."""
        acc = accumulation_dtype(query.dtype)
        if key.shape[-3] != query.shape[-3]:
            key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
        scores = query.to(acc) @ key.to(acc).mT * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
        if mask is not None:
            scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
        if is_causal:
            scores = scores.masked_fill(scores.new_ones(scores.shape[-2:], dtype=torch.bool).triu(1), -math.inf)
        alpha = self._alpha_for(query)
        weights = diffmax_bisect(scores, alpha.view(-1, 1, 1) if isinstance(alpha, Tensor) and alpha.ndim else alpha)
        maps.append(weights.movedim(-3, self.heads_at).to_sparse())

    def extra_repr(self) -> str:
        """The settings that repr shows."""
        shown = f"alpha_map={self.alpha_map}" if self.alpha_map is not None else f"alpha={self.alpha}"
        return shown if self.scale == 1 else f"{shown}, scale={self.scale!r}"


@contextlib.contextmanager
def attention_maps(model: nn.Module) -> Iterator[dict[str, list[Tensor]]]:
    """Collect the attention weights of a model's diffmax attention, as exact sparse tensors, while the context lasts.

    Args:
        model: A model after `replace`, or one that was built with diffmax layers.
    Yields:
        A dictionary that fills as the model runs: for each attention module by name, one sparse COO tensor per call, of the
        shape of its scores, (B, H, L, S) in most models; windows and groups are where the model has them. Stored are the keys
        with a weight above 0: `.indices()` are their places, `.values()` the weights before dropout, without a gradient.
    Raises:
        ValueError: The model has no diffmax attention; or another collection runs.
    Numerics: The model's output is unchanged. Weights are computed beside fused attention, in float32 or float64, with the
        scores of one call at a time in memory.
    """
    holders = {name: part for name, part in model.named_modules() if isinstance(part, AttentionWeights)}
    if not holders:
        raise ValueError(f"attention_maps: {type(model).__name__} has no diffmax attention\ncall replace(model) first")
    if any(part.maps is not None for part in holders.values()):
        raise ValueError("attention_maps: these modules collect already\nleave the outer context first")
    maps: dict[str, list[Tensor]] = {}
    try:
        for name, part in holders.items():
            part.maps = maps[name.removesuffix(CHILD).removesuffix(".")] = []
        yield maps
    finally:
        for part in holders.values():
            part.maps = None


class Replaced(NamedTuple):
    """What a `replace` did: modules that changed, with the class that was rewritten, and those that keep softmax, with why."""

    changed: dict[str, str]
    kept: dict[str, str]


def refuse_kept(model: nn.Module, kept: dict[str, str], partial: bool) -> None:
    """Refuse a model that would keep softmax somewhere, unless that is allowed."""
    if kept and not partial:
        raise ValueError(
            f"replace: {type(model).__name__} would keep softmax in {len(kept)} modules\n"
            + "\n".join(f"  {name}: {reason}" for name, reason in kept.items())
            + "\nto have softmax there and diffmax elsewhere, write replace(..., partial=True)"
        )


def replace_all(
    model: nn.Module,
    modules: dict[str, nn.Module],
    kept: dict[str, str],
    alpha: LayerAlpha,
    holder: Callable[[nn.Module, float | Tensor], AttentionWeights],
    rewrite: Callable[[nn.Module], str],
) -> Replaced:
    """Give each module a holder of its alpha and rewritten code; nothing changes if one of the alphas does not fit.

    `holder` makes a module's `AttentionWeights`; `rewrite` changes a module's code and returns the name of the class.
    """
    if isinstance(alpha, AlphaMap):
        raise TypeError(f"replace: alpha must be a float, a tensor or a function, got {alpha!r}\npass it as alpha_map")
    holders, kept = {}, dict(kept)
    for name, module in modules.items():
        given = alpha(name, module) if callable(alpha) and not isinstance(alpha, Tensor) else alpha
        if given is None:
            kept[name] = "the given alpha is None"
            continue
        try:
            holders[name] = holder(module, given)
        except (TypeError, ValueError) as error:
            raise type(error)(f"replace: {name}: {error}") from None
    if modules and not holders:
        raise ValueError(f"replace: alpha must be a number or a tensor for one layer at least, got None for all {len(modules)}")
    if not holders:
        raise ValueError(f"replace: {type(model).__name__} must have attention that can be replaced, got none")
    changed = {}
    for name, given_holder in holders.items():
        changed[name] = rewrite(modules[name])
        setattr(modules[name], CHILD, given_holder)
    return Replaced(changed, kept)


class InPlace:
    """A class of another library with its methods rewritten. Instances are pickled and copied by the class they had."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        how, (_, *args), *state = reduced
        return _new, (library_class(type(self)), how, *args), *state


def _new(kind: type, how: Callable[..., Any], *args: Any) -> Any:
    return how(in_place(kind), *args)


@functools.cache
def in_place(kind: type) -> type:
    """The subclass of a class whose methods ask a module's `diffmax` for weights: of self, or of a processor's argument."""
    methods = {
        name: _rewritten(function, function.__code__.co_varnames[name == "__call__"])
        for name, function in weight_makers(kind).items()
    }
    return type(kind.__name__, (InPlace, kind), methods | {"__module__": kind.__module__})


def library_class(kind: type) -> type:
    """The class before `in_place`."""
    return next(base for base in kind.__mro__ if not issubclass(base, InPlace))


@functools.cache
def weight_makers(kind: type) -> dict[str, FunctionType]:
    """The methods of a class that make weights, by name."""
    return {name: method for name, method in _methods(kind) if _names_a_maker(method.__code__)}


def _methods(kind: type) -> Iterator[tuple[str, FunctionType]]:
    """The methods of a class that are not torch's, without their decorators."""
    for name in dir(kind):
        method = getattr(kind, name, None)
        if name != "__init__" and isinstance(method, FunctionType):
            method = inspect.unwrap(method)
            if isinstance(method, FunctionType) and not _is_torchs(method):
                yield name, method


@functools.cache
def hidden_makers(kind: type) -> str | None:
    """The name of what makes weights for a class outside its own methods, if there is something."""
    for name, method in _methods(kind):
        for called in sorted(set(method.__code__.co_names) - set(MAKERS)):
            if called in _HIDDEN:
                return called
            function = method.__globals__.get(called)
            if getattr(function, "__name__", None) in MAKERS:  # imported under another name
                return called
            if isinstance(function, FunctionType) and not _is_torchs(function) and _names_a_maker(function.__code__):
                return called
        if {"super", name} & set(method.__code__.co_names):  # it may call what it overrides
            for base in kind.__mro__:
                overridden = vars(base).get(name)
                overridden = inspect.unwrap(overridden) if isinstance(overridden, FunctionType) else method
                if overridden is not method and _names_a_maker(overridden.__code__):
                    return f"{base.__name__}.{name}"
    return None


def why_not_rewritten(kind: type) -> str | None:
    """Why `in_place` cannot make its subclass of a class, or None."""
    try:
        in_place(kind)
    except ValueError as error:
        return str(error).removeprefix("diffmax: ")
    return None


def keeps_softmax(module: HeadAlpha) -> str | None:
    """Why one of diffmax's own modules would keep softmax, or None."""
    if getattr(module, "weights", None) != "softmax":
        return None
    return f'{type(module).__name__} was made with softmax weights: make it with weights="diffmax"'


def unnamed_softmax(module: nn.Module) -> str | None:
    """The name of a torch.nn.Softmax that a module calls by another name than softmax, or None; containers do not call."""
    if type(module).__module__.partition(".")[0] == "torch":
        return None
    return next((n for n, part in module.named_children() if isinstance(part, nn.Softmax) and n not in MAKERS), None)


def _is_torchs(function: FunctionType) -> bool:
    return function.__module__.partition(".")[0] in ("torch", "torchvision")


def _names_a_maker(code: CodeType) -> bool:
    return any(name in MAKERS for name in code.co_names) or any(
        _names_a_maker(inner) for inner in code.co_consts if isinstance(inner, CodeType)
    )


@functools.cache
def _rewritten(function: FunctionType, owner: str) -> FunctionType:
    """A function with every call that makes weights directed to `owner.diffmax`; owner is the name of an argument.

    Raises:
        ValueError: Its source is not available, needs names from around it, or makes weights in a way that is not known.
    """
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError) as error:
        raise ValueError(f"diffmax: the source of {function.__qualname__} must be available") from error
    left = _Rewriting(owner).visit(tree)
    if function.__code__.co_freevars:
        raise ValueError(f"diffmax: {function.__qualname__} must not use super() or names of a function around it")
    if _makes_weights(left):
        raise ValueError(f"diffmax: {function.__qualname__} makes weights in a way that is not known, and would keep softmax")
    ast.increment_lineno(left, function.__code__.co_firstlineno - 1)
    defined: dict[str, Any] = {}
    flags = __future__.annotations.compiler_flag  # annotations stay words: they may name what only the class body knows
    code = compile(ast.fix_missing_locations(left), inspect.getfile(function), "exec", flags, dont_inherit=True)
    try:
        exec(code, function.__globals__, defined)  # noqa: S102 - the library's own source, in its own module
    except NameError as error:
        raise ValueError(f"diffmax: decorators and defaults of {function.__qualname__} must be names of its module") from error
    new: FunctionType = defined[function.__name__]
    new.__qualname__, new.__module__ = function.__qualname__, function.__module__
    return new


def _makes_weights(tree: ast.AST) -> bool:
    """Whether code names something that makes attention weights, other than a method of `owner.diffmax`."""
    return any(
        (isinstance(node, ast.Attribute) and node.attr in MAKERS) or (isinstance(node, ast.Name) and node.id in MAKERS)
        for node in ast.walk(tree)
    )


class _Rewriting(ast.NodeTransformer):
    """Makes F.scaled_dot_product_attention(...) owner.diffmax.attend(...), and x.softmax(-1) owner.diffmax.weights(x, -1)."""

    def __init__(self, owner: str) -> None:
        self.owner = owner

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        function = node.func
        name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", None)
        if name == "scaled_dot_product_attention":
            return self._call("attend", node.args, node.keywords)
        if name == "dispatch_attention_fn":
            return self._call("dispatch", node.args, node.keywords)
        if name != "softmax" or not isinstance(function, ast.Attribute):
            return node
        of = function.value
        of_name = of.attr if isinstance(of, ast.Attribute) else getattr(of, "id", None)
        # functional.softmax(x), or a submodule self.softmax(x); else the method of a tensor
        given = [] if of_name in _LIBRARIES or of_name == self.owner else [of]
        return self._call("weights", [*given, *node.args], node.keywords)

    def _call(self, method: str, args: list[ast.expr], keywords: list[ast.keyword]) -> ast.Call:
        holder = ast.Attribute(ast.Name(self.owner, ast.Load()), CHILD, ast.Load())
        return ast.Call(ast.Attribute(holder, method, ast.Load()), args, keywords)
