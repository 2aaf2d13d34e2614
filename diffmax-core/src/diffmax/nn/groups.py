"""Parameter groups for an optimizer: no weight decay where it would harm, and a learning rate of its own for alpha."""

from __future__ import annotations

import math
import numbers
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from diffmax.nn._checkpoint import ALPHAS
from diffmax.nn.adaptive import AdaptiveLengthScale
from diffmax.nn.affine import AffineScale
from diffmax.nn.attention import DiffmaxAttention
from diffmax.nn.differential import DiffAttention
from diffmax.nn.elastic import Elastic
from diffmax.nn.gate import HeadGate
from diffmax.nn.lazy import LazyAttention
from diffmax.nn.length import LengthScale
from diffmax.nn.position import RelativePositionBias
from diffmax.nn.sink import Sink

# Parameters of our modules that decay would pull to a meaningful value: an open gate, a sink at 0, no position bias, no
# baseline, the first lambda.
_NOT_DECAYED: tuple[tuple[type[nn.Module], str], ...] = (
    (AdaptiveLengthScale, "project."),
    (AffineScale, "project."),
    (DiffAttention, "lambda_"),
    (DiffmaxAttention, "sink"),
    (Elastic, "logit"),
    (HeadGate, "project."),
    (LazyAttention, "attention_biases"),
    (LazyAttention, "tau"),
    (LengthScale, "log_decay"),
    (RelativePositionBias, "weight"),
    (Sink, "sink"),
)


def param_groups(
    model: nn.Module,
    lr: float,
    *,
    weight_decay: float = 0.01,
    alpha_lr: float = 0.03,
    alphas: nn.Module | nn.Parameter | Iterable[nn.Module | nn.Parameter] = (),
    decay_biases_and_norms: bool = False,
) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer that give a learned alpha no weight decay and a learning rate of its own.

    Decay pulls `log_beta` to 0, and so alpha to the middle of the range of its map, whatever the loss. And with the learning
    rate of a large model an alpha hardly moves, because Adam moves every number by about the learning rate per step.

    Args:
        model: Any model; also after torch.compile, DistributedDataParallel, `fully_shard`, or FullyShardedDataParallel with
            `use_orig_params=True`. Frozen parameters are omitted, and shared ones appear once.
        lr: The learning rate of everything but alpha.
        weight_decay: The weight decay of the weights.
        alpha_lr: The learning rate of alpha. A torch scheduler scales it like `lr`.
        alphas: Other parameters from which an alpha is computed, or modules with such parameters; they need not belong to the
            model. Parameters named `alpha` or `log_beta` are found in any module; so are the parameters of a module that is
            passed as an alpha function, and a tensor passed to `diffmax.integrations.transformers.register`.
        decay_biases_and_norms: Whether weight decay acts on biases, norms, and other parameters with fewer than two dimensions.
            It never acts on alphas, nor on parameters of `diffmax.nn` modules other than projections: sinks, gates, scales,
            thresholds, position biases.
    Returns:
        Up to three dictionaries with the keys "params", "lr", "weight_decay" and "name": "weights", "not decayed", "alpha".
    Raises:
        TypeError: A learning rate or weight_decay is not a number, or model or an entry of alphas has the wrong type.
        ValueError: A learning rate or weight_decay is out of range, no parameter requires a gradient, or FSDP flattened them.
    Example:
        >>> import torch
        >>> from diffmax import HillMap
        >>> from diffmax.nn import DiffmaxAttention
        >>> model = DiffmaxAttention(32, 4, alpha_map=HillMap(c=0.5))
        >>> groups = param_groups(model, lr=3e-4, weight_decay=0.1)
        >>> [(group["name"], len(group["params"]), group["lr"], group["weight_decay"]) for group in groups]
        [('weights', 4, 0.0003, 0.1), ('not decayed', 4, 0.0003, 0.0), ('alpha', 1, 0.03, 0.0)]
        >>> optimizer = torch.optim.AdamW(groups)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"param_groups: model must be a torch.nn.Module, got {type(model).__name__}")
    for name, number in (("lr", lr), ("weight_decay", weight_decay), ("alpha_lr", alpha_lr)):
        _check_number(name, number)
    of_alpha = {id(parameter): parameter for parameter in (*_alphas_of(model), *_given(alphas)) if parameter.requires_grad}
    kept = _not_decayed(model, decay_biases_and_norms)
    weights: list[nn.Parameter] = []
    not_decayed: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad and id(parameter) not in of_alpha:
            (not_decayed if id(parameter) in kept else weights).append(parameter)
    groups = [
        {"params": weights, "lr": lr, "weight_decay": weight_decay, "name": "weights"},
        {"params": not_decayed, "lr": lr, "weight_decay": 0.0, "name": "not decayed"},
        {"params": list(of_alpha.values()), "lr": alpha_lr, "weight_decay": 0.0, "name": "alpha"},
    ]
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise ValueError(
            f"param_groups: model must have a parameter that requires a gradient, got {type(model).__name__} with none"
        )
    return groups


def _check_number(name: str, number: Any) -> None:
    if isinstance(number, Tensor) and number.ndim == 0:  # a learning rate that a CUDA graph may change
        return
    if not isinstance(number, numbers.Real) or isinstance(number, bool):
        raise TypeError(f"param_groups: {name} must be a number, got {number!r} of type {type(number).__name__}")
    if not 0 <= float(number) < math.inf:
        raise ValueError(f"param_groups: {name} must be finite and not negative, got {number}")


def _given(alphas: nn.Module | nn.Parameter | Iterable[nn.Module | nn.Parameter]) -> Iterator[nn.Parameter]:
    if not isinstance(alphas, (Tensor, nn.Module, Iterable)):
        raise TypeError(f"param_groups: alphas must hold parameters or modules, got {alphas!r}")
    for given in (alphas,) if isinstance(alphas, (Tensor, nn.Module)) else alphas:
        if isinstance(given, nn.Module):
            yield from given.parameters()
        elif isinstance(given, Tensor) and given.is_leaf:
            yield given  # type: ignore[misc]  # a leaf that requires a gradient is as good as a Parameter
        else:
            raise TypeError(f"param_groups: alphas must hold parameters or modules, got {type(given).__name__}")


def _owned(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """Every parameter with its owner and its name; a parametrized one has the name of the original tensor."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if getattr(parameter, "_is_flat_param", False):
                raise ValueError(
                    "param_groups: parameters must be the module's own, got one that holds many, of FullyShardedDataParallel\n"
                    "wrap the model with use_orig_params=True"
                )
            yield module, name, parameter
        for name, originals in getattr(module, "parametrizations", {}).items():
            for parameter in originals.parameters():
                yield module, name, parameter


def _alphas_of(model: nn.Module) -> Iterator[nn.Parameter]:
    for _, name, parameter in _owned(model):
        if name in ALPHAS:
            yield parameter
    for module in model.modules():
        tensor = module._buffers.get("alpha")
        if tensor is not None and tensor.requires_grad:  # as good as a Parameter
            if not tensor.is_leaf:
                raise ValueError(
                    f"param_groups: alpha of {type(module).__name__} must be a leaf, got a tensor that was computed, or "
                    "converted with the module\npass nn.Parameter(alpha) to the module"
                )
            yield tensor  # type: ignore[misc]
        function = module._modules.get("alpha")
        if function is not None:  # a module that is used as an alpha function
            yield from function.parameters()
    yield from _registered(model)


def _registered(model: nn.Module) -> Iterator[nn.Parameter]:
    """The learned alphas that were registered for the attention of a transformers model."""
    if "transformers" not in sys.modules:
        return
    from diffmax.integrations.transformers.registered import alphas_of

    for alpha in alphas_of(model):
        if isinstance(alpha, nn.Module):
            yield from alpha.parameters()
        elif isinstance(alpha, Tensor) and alpha.is_leaf:
            yield alpha  # type: ignore[misc]


def _not_decayed(model: nn.Module, decay_biases_and_norms: bool) -> set[int]:
    result = set()
    for module in model.modules():
        for owner, start in _NOT_DECAYED:
            if isinstance(module, owner):
                result |= {id(parameter) for name, parameter in module.named_parameters() if name.startswith(start)}
    if not decay_biases_and_norms:
        # FullyShardedDataParallel flattens its shard of a matrix to one dimension
        flat = any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules())
        for module, name, parameter in _owned(model):
            is_small = parameter.ndim < 2 and not flat
            if is_small or name.endswith("bias") or "norm" in type(module).__name__.lower():
                result.add(id(parameter))
    return result
