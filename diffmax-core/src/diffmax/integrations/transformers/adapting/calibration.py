"""`calibrate`: an alpha and a scale per head, from the movement of the output and the share of zeros."""

from __future__ import annotations

import itertools
import math
import numbers
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffmax.integrations.transformers.adapting.outputs import Batch, Output, each, final_output, mask_for
from diffmax.integrations.transformers.adapting.recording import Call, Scored, record
from diffmax.integrations.transformers.heads import Heads, heads_of
from diffmax.operators.common.checks import one_minus_alpha
from diffmax.operators.common.numerics import accumulation_dtype, hides
from diffmax.operators.rows.api import diffmax_bisect

# The grid of calibrate. A low alpha with a small scale usually gives the most zeros for the least change.
ALPHAS = (0.99, 0.97, 0.93, 0.88, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
SCALES = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.6, 0.7, 0.85, 1.0)
_NAME = "calibrate"


def calibrate(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    zeros: float | None = None,
    alpha: float | None = None,
    output: Output = final_output,
    probes: int = 4,
    grid: Sequence[tuple[float, float]] | None = None,
    queries: int | None = None,
) -> Heads:
    """Choose alpha and scale for each head of a softmax model, so that its output moves least.

    The change of a head's output is computed for each alpha and scale on a grid. The movement of the model's output is then
    estimated to first order, from gradients of random projections of the output. With `zeros`, all heads share one price per
    zero: each head takes the grid point that minimizes its movement minus the price of its zeros. The price is the lowest that
    reaches the requested share of zeros. So heads that can be sparsified cheaply become very sparse; others stay dense.

    It needs the memory of a training step of the model on one batch, and that of the scores of one layer a few times.

    Args:
        model: A transformers model, as loaded. Its state is restored.
        batches: A few dictionaries of the model's inputs, such as three of 24 sentences.
        zeros: The share of exact zeros to reach over all layers, in (0, 1), among the keys visible to queries without padding.
        alpha: Instead of `zeros`: one alpha for all heads; then only the scales are chosen.
        output: A function of the model's output and inputs that returns the tensor that must not move. Default: logits, or
            those of starts and ends, or the last hidden state.
        probes: Random projections per batch. More give a better estimate. torch.manual_seed repeats them.
        grid: The pairs (alpha, scale) to choose from. Default: `ALPHAS` and `SCALES` of `adapting`. On long inputs, where each
            pair takes seconds, pass fewer, near the matched scale: `[(a, diffmax.matched_scale(a, w)) for a ... for w ...]`.
        queries: At most so many queries of a sequence, evenly spaced, stand for all, and each moves the output by itself: less
            work, and less noise from few projections. Default: all, together.
    Returns:
        The alphas and scales, for `replace`.
    Raises:
        ValueError: `zeros` and `alpha` are both given or both missing, or out of range; there is no batch; no layer calls
            the attention interface of transformers, or a layer uses an option that diffmax does not support; the model was
            adapted before; its output has no such tensor; or the share of zeros cannot be reached.
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
    if zeros is not None:
        check_share(_NAME, zeros)
    if alpha is not None:
        one_minus_alpha("calibrate", torch.empty(1), alpha, 0)
    table = measure(_NAME, model, batches, _grid(alpha, grid), output, probes, queries)
    chosen = table.cheapest(0.0) if zeros is None else table.with_zeros(_NAME, zeros)
    return table.heads(chosen)


def _grid(alpha: float | None, grid: Sequence[tuple[float, float]] | None) -> list[tuple[float, float]]:
    """The pairs to choose from: those given, or all of the default alphas, or the given one, and scales."""
    if grid is None:
        return list(itertools.product(ALPHAS if alpha is None else (float(alpha),), SCALES))
    if alpha is not None:
        raise ValueError(f"calibrate: give either alpha or grid, got alpha {alpha} and a grid of {len(grid)}")
    wrong = [pair for pair in grid if not (0 < pair[0] < 1 and 0 < pair[1] < math.inf)]
    if wrong or not grid:
        raise ValueError(
            f"calibrate: grid must hold pairs of an alpha in (0, 1) and a positive scale, got {wrong[0] if wrong else 'none'}"
        )
    return list(grid)


def check_share(name: str, zeros: float) -> None:
    """A share of zeros that can be asked for."""
    if not isinstance(zeros, numbers.Real):
        raise TypeError(f"{name}: zeros must be a float, got {zeros!r} of type {type(zeros).__name__}")
    if not 0 < zeros < 1:
        raise ValueError(f"{name}: zeros must lie strictly between 0 and 1, got {zeros}")


@dataclass
class Table:
    """For each head of all layers, concatenated, and each grid point: movement of the output, share of zeros."""

    layers: list[tuple[str, int]]  # name, heads
    grid: list[tuple[float, float]]  # alpha, scale
    movement: Tensor
    zeros: Tensor

    def cheapest(self, price: float) -> Tensor:
        """Per head, the grid point that minimizes movement minus price times zeros."""
        return (self.movement - price * self.zeros).argmin(1)

    def share(self, chosen: Tensor) -> float:
        """The share of zeros over all heads."""
        return float(self.zeros.gather(1, chosen[:, None]).mean())

    def with_zeros(self, name: str, wanted: float) -> Tensor:
        """The choice at the lowest price that reaches the share of zeros, by bisection on the logarithm of the price."""
        largest = float(self.movement.max())
        if largest == 0:
            raise ValueError(f"{name}: the output must depend on the attention, got one that no layer moves")
        most = self.share(self.cheapest(1e12 * largest))
        if most < wanted:
            raise _cannot_reach(name, wanted, most)
        low, high = math.log(1e-12 * largest), math.log(1e12 * largest)
        for _ in range(100):
            middle = (low + high) / 2
            low, high = (middle, high) if self.share(self.cheapest(math.exp(middle))) < wanted else (low, middle)
        return self.cheapest(math.exp(high))

    def one_for_all(self, name: str, wanted: float) -> Tensor:
        """The grid point that moves the output least of those with the share of zeros, the same for every head."""
        reached = self.zeros.mean(0) >= wanted
        if not reached.any():
            raise _cannot_reach(name, wanted, float(self.zeros.mean(0).max()))
        best = self.movement.sum(0).masked_fill(~reached, math.inf).argmin()
        return best.expand(len(self.movement))

    def heads(self, chosen: Tensor) -> Heads:
        """The chosen alphas and scales by layer."""
        return self.by_layer([self.grid[i] for i in chosen.tolist()])

    def by_layer(self, pairs: Sequence[tuple[float, float]]) -> Heads:
        """Alpha and scale of each head, by layer."""
        points = iter(pairs)
        result: Heads = {}
        for name, count in self.layers:
            of_layer = [next(points) for _ in range(count)]
            result[name] = {"alpha": [a for a, _ in of_layer], "scale": [s for _, s in of_layer]}
        return result


def _cannot_reach(name: str, wanted: float, most: float) -> ValueError:
    return ValueError(
        f"{name}: no choice has a share of zeros of {wanted}, the most is {most:.3f}\n"
        "ask for less, or calibrate on longer inputs; scores of a model that is not trained may be too flat for any"
    )


def measure(
    name: str,
    model: nn.Module,
    batches: Iterable[Batch],
    grid: list[tuple[float, float]],
    output: Output,
    probes: int,
    queries: int | None = None,
) -> Table:
    """The movement and the zeros of each head at each grid point, for the public function `name`."""
    if queries is not None and (not isinstance(queries, int) or isinstance(queries, bool) or queries < 1):
        raise ValueError(f"{name}: queries must be a positive int or None, got {queries!r}")
    if not isinstance(probes, int) or isinstance(probes, bool) or probes < 1:
        raise ValueError(f"{name}: probes must be a positive int, got {probes!r}")
    if heads_of(getattr(model, "config", None)):
        raise ValueError(
            f"{name}: the model must be one with softmax, got a {type(model).__name__} that was adapted: its configuration has "
            "heads\ntake the model from before `replace`; or, if no weight was trained since, set model.config.diffmax to None"
        )
    names = {module: name for name, module in model.named_modules()}
    layers: list[tuple[str, int]] = []
    movement, zeros, entries = torch.zeros(()), torch.zeros(()), torch.zeros(())
    for batch in each(name, batches):
        calls, final = record(name, model, batch, output)
        outputs = [call.output for call in calls]
        projections = [_gradients(final, outputs) for _ in range(probes)]
        of_module: dict[nn.Module, list[tuple[Call, Tensor]]] = {}
        for call, of_call in zip(calls, zip(*projections, strict=True), strict=True):
            of_module.setdefault(call.module, []).append((call, torch.stack(of_call)))
        layers = [(names[module], module_calls[0][0].query.shape[1]) for module, module_calls in of_module.items()]
        with torch.no_grad():
            per_layer = [
                _of_layer(module_calls, grid, mask_for(model, module, batch), queries)
                for module, module_calls in of_module.items()
            ]
        moved, zero, visible = (torch.cat(parts).double().cpu() for parts in zip(*per_layer, strict=True))
        if not moved.isfinite().all():
            raise ValueError(
                f"{name}: the movement of the output must be finite, got {'NaN' if moved.isnan().any() else 'infinity'}\n"
                f"do the model and its inputs give finite outputs? gradients of {final.dtype} may overflow: call model.float()"
            )
        movement, zeros, entries = movement + moved, zeros + zero, entries + visible
    if not layers:
        raise ValueError(f"{name}: a batch is needed, got none")
    return Table(layers, grid, movement, zeros / entries[:, None])


def _gradients(final: Tensor, outputs: list[Tensor]) -> list[Tensor]:
    """Of a random projection of the model's output, for each layer's, in float32 or better; 0 where nothing reads a layer."""
    found = torch.autograd.grad(final, outputs, torch.randn_like(final), retain_graph=True, allow_unused=True)
    of_each = (torch.zeros_like(out) if g is None else g for g, out in zip(found, outputs, strict=True))
    return [g.to(accumulation_dtype(g.dtype)) for g in of_each]


def _of_layer(
    calls: list[tuple[Call, Tensor]], grid: list[tuple[float, float]], mask: Tensor | None, queries: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Movement (H, grid), zeros (H, grid) and visible entries (H,) of a layer, from its calls and their projections.

    Projections are (probes, B, H, L, D). A layer that is called several times, such as ALBERT's, moves the output by the sum.
    """
    moved, zeros = [], []
    steps = [1 if queries is None else -(-call.query.shape[2] // queries) for call, _ in calls]
    scored = [call.scored(step) for (call, _), step in zip(calls, steps, strict=True)]
    visible = [_visible(some, mask, call, step) for some, (call, _), step in zip(scored, calls, steps, strict=True)]
    of_queries = [projections[..., ::step, :] for (_, projections), step in zip(calls, steps, strict=True)]
    for alpha, scale in grid:
        by, apart, zero = torch.zeros(()), torch.zeros(()), torch.zeros(())
        for call, projections, seen in zip(scored, of_queries, visible, strict=True):
            weights = diffmax_bisect(call.scores * scale, alpha)
            of_query = (projections * (weights @ call.values - call.output)).sum(-1)
            by = by + of_query.sum(-1)
            apart = apart + of_query.square().sum(-1)
            zero = zero + ((weights == 0) & seen).sum((0, 2, 3))
        moved.append((by.square() if queries is None else apart).mean(0).sum(0))
        zeros.append(zero)
    entries = torch.stack([seen.sum((0, 2, 3)) for seen in visible]).sum(0)
    return torch.stack(moved, 1), torch.stack(zeros, 1), entries


def _visible(scored: Scored, mask: Tensor | None, call: Call, step: int) -> Tensor:
    """Boolean, True where a query, each step-th, that is not padding sees a key."""
    visible = ~hides(scored.scores)
    if mask is None or mask.shape != (call.query.shape[0], call.query.shape[2]):
        return visible
    return visible & mask[:, ::step].bool()[:, None, :, None]
