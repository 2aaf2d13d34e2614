"""From a pretrained softmax model to a diffmax model: calibrate, replace, refit, distil.

docs/adapting.md says when it is worth it.

Each head of each layer gets an alpha and a scale for its scores. They are kept in `model.config.diffmax`, so `save_pretrained`
writes them, and `replace(model)` reads them again after `from_pretrained`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from diffmax.integrations.transformers import refusals
from diffmax.integrations.transformers.attention import (
    _attention_forward,
    _refuse_what_changes_the_weights,
    register_functions,
)
from diffmax.integrations.transformers.masks import merged_mask, read
from diffmax.integrations.transformers.unfused import masked
from diffmax.nn._precision import PreciseBuffers
from diffmax.operators.common.checks import one_minus_alpha
from diffmax.operators.rows.api import diffmax_bisect

# Of each attention layer, by its name in the model: the alpha of each head, and what its scores are multiplied by.
Heads: TypeAlias = "dict[str, dict[str, list[float]]]"
Batch: TypeAlias = "Mapping[str, Any]"
Output: TypeAlias = "Callable[[Any, Batch], Tensor]"
Loss: TypeAlias = "Callable[[Any, Any, Batch], Tensor]"

NAME = "diffmax-adapted"
_RECORDING = "diffmax-recording"

# What attention layers hand over and the measurement knows what to do with: refuse it, or nothing.
_MEASURED = {
    "cu_seq_lens_k",
    "cu_seq_lens_q",
    "dropout",
    "is_causal",
    "max_length_k",
    "max_length_q",
    "position_bias",
    "s_aux",
    "scaling",
    "sliding_window",
    "softcap",
}

# What calibrate chooses from. A low alpha on flattened scores is where most of the zeros for the least change are found.
ALPHAS = (0.99, 0.97, 0.93, 0.88, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
SCALES = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.6, 0.7, 0.85, 1.0)


_TOO_FEW = "distil: a batch per step is needed, got {} for {} steps\npass more, or fewer steps"


def final_output(output: Any, batch: Batch) -> Tensor:
    """A model's logits, or else its last hidden state; 0 at padding. Of an encoder-decoder model these are the decoder's."""
    final: Tensor = output.logits if getattr(output, "logits", None) is not None else output.last_hidden_state
    mask = batch.get("decoder_attention_mask" if hasattr(output, "encoder_last_hidden_state") else "attention_mask")
    return final if mask is None or mask.shape != final.shape[:-1] else final * mask.unsqueeze(-1).to(final.dtype)


def relative_error(student: Any, teacher: Any, batch: Batch) -> Tensor:
    """Squared distance of two models' final outputs, relative to the teacher's square."""
    wanted = final_output(teacher, batch)
    return (final_output(student, batch) - wanted).square().sum() / wanted.square().sum()


def calibrate(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    zeros: float | None = None,
    alpha: float | None = None,
    output: Output = final_output,
    probes: int = 4,
) -> Heads:
    """Choose alpha and scale for each head of a softmax model, so that its output moves least.

    A head's change is known for each alpha and scale on a grid, and how far the model's output then moves is estimated to first
    order, from gradients of random projections of the output. Heads trade with each other: with `zeros`, each takes the point
    that minimises movement less a price per zero, and the price is the one at which the wanted share of zeros is met. So a head
    that pays with little for many zeros becomes very sparse, and one that cannot stays dense.

    Args:
        model: A transformers model, as loaded. It is put back into the state in which it was.
        batches: A few dictionaries of the model's inputs, such as three of 24 sentences.
        zeros: The share of exact zeros to reach over all layers, in (0, 1), among what queries that are no padding can see.
        alpha: Instead: one alpha for all heads, of which only the scales are then chosen.
        output: From the model's output and its inputs, the tensor that must not move. Default: logits, or last hidden state.
        probes: Random projections per batch. More make a better estimate.
    Returns:
        For `replace`.
    Raises:
        ValueError: `zeros` and `alpha` are both given or both missing, or out of range; there is no batch; no layer calls
            the attention interface of transformers, or one is given what diffmax cannot do; or the share of zeros cannot be
            reached.
    Source: written for diffmax.
    Example:
        >>> from transformers import BertConfig, BertModel
        >>> config = BertConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)
        >>> heads = calibrate(BertModel(config).eval(), [{"input_ids": torch.tensor([[1, 2, 3, 4, 5, 6]])}], alpha=0.5)
        >>> {name: sorted(of_layer) for name, of_layer in heads.items()}
        {'encoder.layer.0.attention.self': ['alpha', 'scale']}
    """
    if (zeros is None) == (alpha is None):
        raise ValueError(f"calibrate: give either zeros or alpha, got zeros {zeros} and alpha {alpha}")
    if zeros is not None and not 0 < zeros < 1:
        raise ValueError(f"calibrate: zeros must lie strictly between 0 and 1, got {zeros}")
    if alpha is not None:
        one_minus_alpha("calibrate", torch.empty(1), alpha, 0)
    table = _measure(model, batches, ALPHAS if alpha is None else (float(alpha),), output, probes)
    chosen = table.cheapest(0.0) if zeros is None else table.with_zeros(zeros)
    return table.heads(chosen)


def replace(model: nn.Module, heads: Heads | None = None, share: float = 1.0) -> nn.Module:
    """Give a transformers model diffmax attention with an alpha and a scale per head, in place.

    Args:
        model: The model.
        heads: What `calibrate` returned. None: what `model.config.diffmax` holds, as it does after `save_pretrained` and
            `from_pretrained` of an adapted model.
        share: How far to go from softmax, 0 < share <= 1: (1 - alpha) and (1 - scale) are multiplied by it. 1 is all the way.
    Returns:
        The model.
    Raises:
        ValueError: `heads` names a layer that the model lacks, or holds other than an alpha in (0, 1) and a positive scale for
            each head; the model holds none; or share is out of range. The model is then as it was.
    Numerics: alphas and scales stay float32 where the model becomes float16 or bfloat16, before or after.
    """
    if not 0 < share <= 1:
        raise ValueError(f"replace: share must satisfy 0 < share <= 1, got {share}")
    config: Any = model.config
    heads = heads if heads is not None else getattr(config, "diffmax", None)
    if not heads:
        raise ValueError(
            "replace: heads must be given for a model that was not adapted before, got none\n"
            "diffmax.integrations.transformers.calibrate finds them"
        )
    modules = {name: _module(model, name) for name in heads}
    for name, of_layer in heads.items():
        _check_heads(name, modules[name], of_layer)
    register_functions(NAME, _attend_adapted, "replace")
    for name, of_layer in heads.items():
        module: Any = modules[name]
        if not hasattr(module, "diffmax_heads"):
            module.diffmax_heads = PreciseBuffers()
        for what, values in of_layer.items():
            # a buffer follows the model to its device; the configuration is where it is saved
            tensor = 1 - share * (1 - torch.tensor(values, dtype=torch.float32, device="cpu"))
            module.diffmax_heads.register_buffer(what, tensor.to(_device(module, model)), persistent=False)
    config.diffmax = heads
    model.set_attn_implementation(NAME)  # type: ignore[operator]
    return model


def distil(
    model: nn.Module,
    teacher: nn.Module,
    batches: Iterable[Batch],
    *,
    steps: int,
    lr: float = 5e-5,
    anneal: float = 0.3,
    loss: Loss = relative_error,
    progress: Callable[[int, float], object] | None = None,
) -> None:
    """Train a model that `replace` changed to give its teacher's output again, while its heads move from softmax to diffmax.

    Args:
        model: The student. The parameters that require a gradient are trained: freeze what is to stay.
        teacher: The softmax model.
        batches: At least `steps` dictionaries of inputs, without labels: any text of the kind that the model will read.
        steps: Steps of Adam; the rate rises for a twentieth of them, and falls to 0 along a cosine.
        lr: The largest rate.
        anneal: The share of the steps in which the heads move from near softmax to where they are. 0: they do not move.
        loss: From the student's output, the teacher's, and the inputs, what is minimised.
        progress: Called with the number of steps done and the loss, which waits for the device.
    Raises:
        ValueError: There are fewer batches than steps, the model was not replaced, or nothing is to be trained. The heads are
            then where they are to be; the parameters stay as the steps so far have left them.
    """
    if isinstance(batches, Sized) and len(batches) < steps:
        raise ValueError(_TOO_FEW.format(len(batches), steps))
    heads = getattr(model.config, "diffmax", None)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not heads or not trained:
        raise ValueError(
            "distil: the model must have diffmax heads and a parameter to train, got none\ncall replace(model, heads)"
        )
    fused = all(parameter.device.type in ("cpu", "cuda") for parameter in trained)
    optimizer = torch.optim.AdamW(trained, lr=lr, betas=(0.9, 0.98), weight_decay=0.0, fused=fused)
    source = iter(batches)
    try:
        for step in range(steps):
            batch = next(source, None)
            if batch is None:
                raise ValueError(_TOO_FEW.format(step, steps))
            if step < anneal * steps:
                replace(model, heads, min(1.0, (step + 1) / max(1.0, anneal * steps)))
            for group in optimizer.param_groups:
                group["lr"] = lr * min(1.0, 20 * (step + 1) / steps) * 0.5 * (1 + math.cos(math.pi * step / steps))
            with torch.no_grad():
                wanted = teacher(**batch)
            value = loss(model(**batch), wanted, batch)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            if progress is not None:
                progress(step + 1, float(value.detach()))
    finally:
        replace(model, heads)


@torch.no_grad()
def refit(model: nn.Module, teacher: nn.Module, batches: Sequence[Batch], linears: Sequence[str], ridge: float = 0.03) -> None:
    """Give linear layers the weights with which they best repeat their teacher's outputs from the inputs that they get now.

    One layer after the other, by least squares, without a gradient. After `replace` this undoes most of what the heads changed
    and leaves less to `distil`. The layers that write into the residual stream are the ones to name: the output projection of
    each attention, and the second layer of each feed-forward network.

    Args:
        model: The student, in place.
        teacher: The softmax model.
        batches: Inputs, read once for the teacher and once per layer: some ten thousand tokens. The teacher's outputs of all
            named layers are held in memory. Padding is left out, by `attention_mask`, or `decoder_attention_mask` for layers of
            an encoder-decoder model's decoder.
        linears: Names of nn.Linear layers, in the order in which the model runs them. Not the keys and values of
            cross-attention, which a decoder computes from the encoder's tokens.
        ridge: Pull towards the present weights, relative to the mean square of the inputs.
    Raises:
        ValueError: A name is no nn.Linear of both models, or a model does not run it.
    """
    modules = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    wanted: dict[str, list[list[Tensor]]] = {name: [] for name in linears}  # of each batch, of each call of the layer
    originals = dict(teacher.named_modules())
    for name in linears:
        if name not in modules or not isinstance(originals.get(name), nn.Linear):
            raise ValueError(f"refit: linears must name nn.Linear layers of both models, got {name!r}")
    hooks = [
        originals[name].register_forward_hook(lambda _, __, output, kept=wanted[name]: kept[-1].append(output))
        for name in linears
    ]
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
    """Least squares for the change of [weight, bias], or of the weight alone, with the normal equations in float64."""
    gram = torch.zeros((), dtype=torch.float64, device=linear.weight.device)
    moment = torch.zeros_like(gram)
    for batch, targets in zip(batches, wanted, strict=True):
        mask = _mask_for(model, linear, batch)
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


def _mask_for(model: nn.Module, part: nn.Module, batch: Batch) -> Tensor | None:
    """The mask of the tokens that a part of the model works on: the decoder of an encoder-decoder model has its own."""
    of_pair: Any = model if getattr(getattr(model, "config", None), "is_encoder_decoder", False) else None
    in_decoder = of_pair is not None and all(part is not module for module in of_pair.get_encoder().modules())
    return batch.get("decoder_attention_mask" if in_decoder else "attention_mask")


class _SeenError(Exception):
    """Stops a forward pass where enough of it has run."""


def _calls_of(model: nn.Module, linear: nn.Linear, batch: Batch, count: int) -> list[tuple[Tensor, Tensor]]:
    """What the layer gets and gives in its calls in the model; what comes after the last of them is not run."""
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


def adapt(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    zeros: float | None = None,
    alpha: float | None = None,
    linears: Sequence[str] = (),
    steps: int = 400,
    calibration: int = 3,
    refitting: int = 60,
    output: Output = final_output,
    loss: Loss = relative_error,
    lr: float = 5e-5,
    progress: Callable[[int, float], object] | None = None,
) -> nn.Module:
    """The whole recipe, in place: `calibrate` on the first batches, `replace`, `refit` on the next, `distil` on the others.

    Args:
        model: A transformers model with softmax attention. The parameters that require a gradient are trained.
        batches: `calibration` + `refitting` (if there are linears) + `steps` dictionaries of inputs.
        zeros, alpha, output: As for `calibrate`.
        linears: As for `refit`. With them the heads start where they end: refit has made the way for them. Without, nothing is
            refitted, and distil anneals them from softmax.
        steps, loss, lr, progress: As for `distil`.
        calibration, refitting: How many batches to calibrate and to refit on.
    Returns:
        The model; `save_pretrained` writes it, and `replace(AutoModel.from_pretrained(path))` loads it.
    """
    needed = calibration + (refitting if linears else 0) + steps
    if isinstance(batches, Sized) and len(batches) < needed:
        raise ValueError(f"adapt: {needed} batches are needed, got {len(batches)}\npass more, or fewer steps")
    source = iter(batches)
    heads = calibrate(model, list(islice(source, calibration)), zeros=zeros, alpha=alpha, output=output)
    teacher = copy.deepcopy(model).eval()
    replace(model, heads)
    if linears:
        refit(model, teacher, list(islice(source, refitting)), linears)
    distil(model, teacher, source, steps=steps, loss=loss, lr=lr, anneal=0.0 if linears else 0.3, progress=progress)
    return model


@dataclass
class _Table:
    """For each head (of all layers, one after the other) and each point of the grid: movement of the output, share of zeros."""

    layers: list[tuple[str, int]]  # name, heads
    grid: list[tuple[float, float]]  # alpha, scale
    movement: Tensor
    zeros: Tensor

    def cheapest(self, price: float) -> Tensor:
        """Per head the point with the least movement less price times zeros."""
        return (self.movement - price * self.zeros).argmin(1)

    def share(self, chosen: Tensor) -> float:
        """The share of zeros over all heads."""
        return float(self.zeros.gather(1, chosen[:, None]).mean())

    def with_zeros(self, wanted: float) -> Tensor:
        """The choice at the lowest price at which the share of zeros is reached, found by bisection on its logarithm."""
        largest = float(self.movement.max())
        if self.share(self.cheapest(math.inf if largest == 0 else 1e12 * largest)) < wanted:
            raise ValueError(
                f"calibrate: no choice has a share of zeros of {wanted}\nask for less, or calibrate on longer inputs"
            )
        low, high = math.log(1e-12 * largest), math.log(1e12 * largest)
        for _ in range(100):
            middle = (low + high) / 2
            low, high = (middle, high) if self.share(self.cheapest(math.exp(middle))) < wanted else (low, middle)
        return self.cheapest(math.exp(high))

    def heads(self, chosen: Tensor) -> Heads:
        """What the choice means, layer by layer."""
        points = iter([self.grid[i] for i in chosen.tolist()])
        result: Heads = {}
        for name, count in self.layers:
            of_layer = [next(points) for _ in range(count)]
            result[name] = {"alpha": [a for a, _ in of_layer], "scale": [s for _, s in of_layer]}
        return result


@dataclass
class _Call:
    """One attention layer's call: masked scores (B, H, L, S), values (B, H, S, D), softmax's output (B, H, L, D)."""

    module: nn.Module
    scores: Tensor
    values: Tensor
    output: Tensor


def _measure(model: nn.Module, batches: Iterable[Batch], alphas: tuple[float, ...], output: Output, probes: int) -> _Table:
    grid = [(alpha, scale) for alpha in alphas for scale in SCALES]
    names = {module: name for name, module in model.named_modules()}
    layers: list[tuple[str, int]] = []
    movement, zeros, entries = torch.zeros(()), torch.zeros(()), torch.zeros(())
    for batch in batches:
        calls, final = _record(model, batch, output)
        outputs = [call.output for call in calls]
        projections = [torch.autograd.grad(final, outputs, torch.randn_like(final), retain_graph=True) for _ in range(probes)]
        of_module: dict[nn.Module, list[tuple[_Call, Tensor]]] = {}
        for call, of_call in zip(calls, zip(*projections, strict=True), strict=True):
            of_module.setdefault(call.module, []).append((call, torch.stack(of_call)))
        layers = [(names[module], module_calls[0][0].scores.shape[1]) for module, module_calls in of_module.items()]
        with torch.no_grad():
            per_layer = [
                _of_layer(module_calls, grid, _mask_for(model, module, batch)) for module, module_calls in of_module.items()
            ]
        moved, zero, visible = (torch.cat(parts).double().cpu() for parts in zip(*per_layer, strict=True))
        movement, zeros, entries = movement + moved, zeros + zero, entries + visible
    if not layers:
        raise ValueError("calibrate: a batch is needed, got none")
    return _Table(layers, grid, movement, zeros / entries[:, None])


def _record(model: nn.Module, batch: Batch, output: Output) -> tuple[list[_Call], Tensor]:
    """Run the model with softmax, and keep what its attention layers did."""
    calls: list[_Call] = []

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        refusals.called()
        _refuse_what_changes_the_weights({name: given for name, given in kwargs.items() if name not in _MEASURED})
        scale = query.shape[-1] ** -0.5 if kwargs.get("scaling") is None else kwargs["scaling"]
        key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], dim=1) for t in (key, value))
        for name in ("softcap", "s_aux", "cu_seq_lens_q", "cu_seq_lens_k"):
            if kwargs.get(name) is not None:
                raise ValueError(f"calibrate: {name} is not implemented, got {type(module).__name__} with one")
        attention_mask, causal = read(module, attention_mask, kwargs.get("is_causal"), query.shape[2], key.shape[2])
        scores = masked(query @ key.mT * scale, merged_mask(attention_mask, kwargs.get("position_bias")), causal)
        # a row that sees nothing would be NaN; it is 0, as it will be with diffmax
        weights = torch.where((scores == -torch.inf).all(-1, keepdim=True), 0.0, scores).softmax(-1)
        weights = weights.masked_fill(scores == -torch.inf, 0.0)
        result = weights @ value
        if not result.requires_grad:
            result.requires_grad_()
        calls.append(_Call(module, scores.detach(), value.detach(), result))
        return result.transpose(1, 2).contiguous(), None

    with _as_it_was(model):
        register_functions(_RECORDING, attend, "calibrate")
        model.eval()
        model.set_attn_implementation(_RECORDING)  # type: ignore[operator]
        with torch.enable_grad():
            final = output(model(**batch), batch)
    return calls, final


def _of_layer(
    calls: list[tuple[_Call, Tensor]], grid: list[tuple[float, float]], mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Movement (H, grid), zeros (H, grid) and visible entries (H,) of a layer, from its calls and their projections.

    Projections are (probes, B, H, L, D). A layer that is called several times, as ALBERT's is, moves the output by the sum.
    """
    moved, zeros = [], []
    visible = [_visible(call, mask) for call, _ in calls]
    for alpha, scale in grid:
        by, zero = torch.zeros(()), torch.zeros(())
        for (call, projections), seen in zip(calls, visible, strict=True):
            weights = diffmax_bisect(call.scores * scale, alpha)
            by = by + (projections * (weights @ call.values - call.output)).sum((-1, -2))
            zero = zero + ((weights == 0) & seen).sum((0, 2, 3))
        moved.append(by.square().mean(0).sum(0))
        zeros.append(zero)
    entries = torch.stack([seen.sum((0, 2, 3)) for seen in visible]).sum(0)
    return torch.stack(moved, 1), torch.stack(zeros, 1), entries


def _visible(call: _Call, mask: Tensor | None) -> Tensor:
    """Where a query that is no padding sees a key."""
    visible = call.scores != -torch.inf
    if mask is None or mask.shape != (visible.shape[0], visible.shape[2]):
        return visible
    return visible & mask.bool()[:, None, :, None]


def _attend_adapted(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Attention of a module that `replace` gave alphas and scales of shape (H,)."""
    heads = getattr(module, "diffmax_heads", None)
    if heads is None:
        raise ValueError(
            f"diffmax attention: {type(module).__name__} has no heads yet\n"
            "call diffmax.integrations.transformers.replace(model) after from_pretrained"
        )
    # on another device only where the layer's parameters come to theirs for the call, as accelerate lets them
    alpha, scale = (t.to(query.device) for t in (heads.alpha, heads.scale))
    query = query * scale.to(query.dtype).view(-1, 1, 1)
    return _attention_forward(module, query, key, value, attention_mask, alpha=alpha, **kwargs)


@contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """Undo what is done to the modes and attention implementations of the model and its parts."""
    modes = [(module, module.training) for module in model.modules()]
    configs = [config for module in model.modules() for config in _configs(getattr(module, "config", None))]
    implementations = [(config, config._attn_implementation) for config in configs]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for config, implementation in implementations:
            # not by the property without "_internal", which writes to the configurations inside too
            config._attn_implementation_internal = implementation


def _configs(config: Any) -> Iterator[Any]:
    """A transformers configuration, and those inside it."""
    if hasattr(config, "_attn_implementation"):
        yield config
        for name in config.sub_configs:
            yield from _configs(getattr(config, name, None))


def _check_heads(name: str, module: nn.Module, of_layer: Mapping[str, Sequence[float]]) -> None:
    """An alpha and a scale for each head of the layer."""
    if not isinstance(of_layer, Mapping) or set(of_layer) != {"alpha", "scale"}:
        got = sorted(map(str, of_layer)) if isinstance(of_layer, Mapping) else type(of_layer).__name__
        raise ValueError(f"replace: the heads of {name} must be a dictionary of alpha and scale, got {got}")
    for what, rule, largest in (("alpha", "lie strictly between 0 and 1", 1.0), ("scale", "be positive", math.inf)):
        wrong = [number for number in of_layer[what] if not 0 < number < largest]
        if wrong:
            raise ValueError(f"replace: each {what} of {name} must {rule}, got {wrong[0]}")
    given = len(of_layer["alpha"]), len(of_layer["scale"])
    heads = _head_count(module)
    if given != (given[0] if heads is None else heads,) * 2:
        raise ValueError(
            f"replace: {name} must have an alpha and a scale per head, got {given[0]} and {given[1]}"
            f"{'' if heads is None else f' for {heads} heads'}"
        )


def _head_count(module: nn.Module) -> int | None:
    """How many query heads an attention layer says that it has."""
    config = getattr(module, "config", None)
    said = [getattr(module, name, None) for name in ("num_heads", "num_attention_heads", "n_heads")]
    return next((n for n in (*said, getattr(config, "num_attention_heads", None)) if isinstance(n, int)), None)


def _device(module: nn.Module, model: nn.Module) -> torch.device:
    """Where the layer is; where its parameters are elsewhere between calls, on the device "meta", where the model begins."""
    places = (parameter.device for part in (module, model) for parameter in part.parameters())
    return next((place for place in places if place.type != "meta"), torch.device("cpu"))


def _module(model: nn.Module, name: str) -> nn.Module:
    """The attention layer of that name, also where the model was saved with more or less around it (a head, a wrapper)."""
    found = [m for n, m in model.named_modules() if n == name or n.endswith(f".{name}") or (n and name.endswith(f".{n}"))]
    if len(found) != 1:
        raise ValueError(f"replace: {type(model).__name__} must have one layer {name}, got {len(found)}\nis it another model?")
    module: nn.Module = found[0]
    return module
