"""`refit`: fit linear layers to the teacher's outputs by least squares."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from diffmax.integrations.transformers.adapting.outputs import Batch, each, mask_for


@torch.no_grad()
def refit(model: nn.Module, teacher: nn.Module, batches: Sequence[Batch], linears: Sequence[str], ridge: float = 0.03) -> None:
    """Fit linear layers by least squares: from their current inputs they should reproduce the teacher's outputs.

    Layers are fitted one after the other, without a gradient. After `replace` this corrects most of the change of the heads,
    and leaves less to `distil`. Name the layers that write into the residual stream: the output projection of each attention,
    and the second layer of each feed-forward network.

    Args:
        model: The student, modified in place.
        teacher: The softmax model.
        batches: Inputs, about ten thousand tokens, run once for the teacher and once per layer. The teacher's outputs of all
            named layers are held in memory. Padding is excluded, by `attention_mask`, or by `decoder_attention_mask` for
            layers in the decoder of an encoder-decoder model.
        linears: Names of nn.Linear layers, in the order in which the model runs them. Not the keys and values of
            cross-attention, which a decoder computes from the encoder's tokens.
        ridge: Strength of the pull towards the current weights, relative to the mean square of the inputs.
    Raises:
        ValueError: A name is not an nn.Linear in both models, or a model does not run it.
    """
    modules = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    wanted: dict[str, list[list[Tensor]]] = {name: [] for name in linears}  # per batch, per call of the layer
    originals = dict(teacher.named_modules())
    for name in linears:
        if name not in modules or not isinstance(originals.get(name), nn.Linear):
            raise ValueError(f"refit: linears must name nn.Linear layers of both models, got {name!r}")
    hooks = [
        originals[name].register_forward_hook(lambda _, __, output, kept=wanted[name]: kept[-1].append(output))
        for name in linears
    ]
    batches = list(each("refit", batches))
    for batch in batches:
        for kept in wanted.values():
            kept.append([])
        teacher(**batch)
    for hook in hooks:
        hook.remove()
    for name in linears:
        if not all(wanted[name]):
            raise ValueError(f"refit: linears must name layers that the models run, got {name!r}")
        _refit_one(model, modules[name], batches, wanted.pop(name), ridge)


def _refit_one(model: nn.Module, linear: nn.Linear, batches: Sequence[Batch], wanted: list[list[Tensor]], ridge: float) -> None:
    """Least squares for the change of [weight, bias], or of the weight only, by the normal equations in float64."""
    gram = torch.zeros((), dtype=torch.float64, device=linear.weight.device)
    moment = torch.zeros_like(gram)
    for batch, targets in zip(batches, wanted, strict=True):
        mask = mask_for(model, linear, batch)
        for (inputs, present), target in zip(_calls_of(model, linear, batch, len(targets)), targets, strict=True):
            every = torch.ones_like(inputs[..., 0]).bool()
            real = every if mask is None or mask.shape != every.shape else mask.bool()
            x = inputs[real].double()
            if linear.bias is not None:
                x = torch.cat([x, torch.ones_like(x[:, :1])], 1)
            gram = gram + x.T @ x
            moment = moment + x.T @ (target - present)[real].double()
    of_inputs = gram.diagonal()[: linear.in_features]
    pull = ridge * of_inputs.mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    change = torch.linalg.solve(gram + pull, moment).T
    linear.weight.add_(change[:, : linear.in_features].to(linear.weight.dtype))
    if linear.bias is not None:
        linear.bias.add_(change[:, -1].to(linear.bias.dtype))


class _SeenError(Exception):
    """Stops a forward pass when its remaining part is not needed."""


def _calls_of(model: nn.Module, linear: nn.Linear, batch: Batch, count: int) -> list[tuple[Tensor, Tensor]]:
    """Inputs and outputs of the layer in its calls in the model; the forward pass stops after the last call."""
    seen: list[tuple[Tensor, Tensor]] = []

    def keep(_: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        seen.append((inputs[0], output))
        if len(seen) == count:
            raise _SeenError

    hook = linear.register_forward_hook(keep)
    try:
        model(**batch)
    except _SeenError:
        pass
    finally:
        hook.remove()
    return seen
