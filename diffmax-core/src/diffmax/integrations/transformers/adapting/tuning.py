"""The steps of `suggest_alpha`: alpha and scale of each head are moved by gradients, and the share of zeros stays."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from diffmax.integrations.transformers.adapting.calibration import Table
from diffmax.integrations.transformers.adapting.outputs import Batch, divergence
from diffmax.integrations.transformers.adapting.recording import as_it_was
from diffmax.integrations.transformers.attention import _attention_forward, register_functions
from diffmax.integrations.transformers.heads import Heads

_TUNING = "diffmax-tuning"
# The learning rate of Adam, in places of the grid, and its averages.
RATE, BETAS = 0.15, (0.8, 0.95)
# Of the steps, the last for whose places the mean is taken.
AVERAGED = 0.25
# How far inside of the grid heads stay, in its places.
EDGE = 0.02


class Plane:
    """A grid of alphas and weights, at whose matched scale a head stands, and each head's shares of zeros there.

    A place (2, H) in it is a row, for alpha, and a column, for the weight; what lies between is interpolated.
    """

    def __init__(self, alphas: Sequence[float], weights: Sequence[float], zeros: Tensor) -> None:
        self.alphas = torch.tensor(alphas, dtype=torch.float64)
        self.logs = torch.tensor(weights, dtype=torch.float64).log()
        self.zeros = zeros.double().view(-1, len(alphas), len(weights))

    def places_of(self, chosen: Tensor) -> Tensor:
        """The places of grid points (H,), a little inside of the edges."""
        places = torch.stack([chosen // len(self.logs), chosen % len(self.logs)]).double()
        return self._inside(places)

    def _inside(self, places: Tensor) -> Tensor:
        last = torch.tensor([len(self.alphas) - 1, len(self.logs) - 1], dtype=torch.float64).unsqueeze(1)
        return places.clamp_min(EDGE).minimum(last - EDGE)

    def pairs(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """Alphas and scales (H,)."""
        (row, above), (column, right) = (_between(at, len(t)) for at, t in zip(places, (self.alphas, self.logs), strict=True))
        alpha = self.alphas[row] * (1 - above) + self.alphas[row + 1] * above
        log = self.logs[column] * (1 - right) + self.logs[column + 1] * right
        return alpha, (log * (1 - alpha)).exp()

    def share(self, places: Tensor) -> Tensor:
        """The share of zeros of all heads."""
        (row, above), (column, right) = (_between(at, n) for at, n in zip(places, self.zeros.shape[1:], strict=True))
        head = torch.arange(len(self.zeros))
        rows = [
            self.zeros[head, row + i, column] * (1 - right) + self.zeros[head, row + i, column + 1] * right for i in range(2)
        ]
        return (rows[0] * (1 - above) + rows[1] * above).mean()

    def gradient(self, places: Tensor) -> Tensor:
        """Of the share of zeros."""
        with torch.enable_grad():
            places = places.detach().requires_grad_()
            return torch.autograd.grad(self.share(places), places)[0]

    def with_share(self, places: Tensor, wanted: float) -> Tensor:
        """The places nearby, along the gradient, that have a share of zeros."""
        for _ in range(50):
            places = self._inside(places)
            short = wanted - float(self.share(places))
            if abs(short) < 1e-5:
                break
            along = self.gradient(places)
            places = places + along * (short / float(along.square().sum().clamp_min(1e-30)))
        return self._inside(places)


def _between(at: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The point of the grid below, and how far above it."""
    below = at.detach().floor().clamp(0, count - 2)
    return below.long(), at - below


def tuned(
    name: str,
    model: nn.Module,
    batches: Sequence[Batch],
    table: Table,
    plane: Plane,
    chosen: Tensor,
    steps: int,
    progress: Callable[[int, float], object] | None,
) -> Heads:
    """Alphas and scales that move the model less than those chosen from a table, whose grid is the plane's.

    A head stands at a place between the points of the grid. Each step goes down the gradient of the KL divergence from the
    softmax model's predictions, less its part along the gradient of the share of zeros, and then back to that share. Errors
    name the function `name`.
    """
    places = plane.places_of(chosen).requires_grad_()
    wanted = table.share(chosen)
    optimizer = torch.optim.Adam([places], lr=RATE, betas=BETAS)
    modules = dict(model.named_modules())
    layers = [(modules[layer], heads) for layer, heads in table.layers]
    now: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def pair_of(module: nn.Module) -> tuple[Tensor, Tensor]:
        if module not in now:
            raise ValueError(
                f"{name}: every layer must run in the batches that the choice is made from, got a {type(module).__name__} that "
                "first runs in a later one\nraise calibration"
            )
        return now[module]

    attend = functools.partial(_attention_forward, alpha=lambda m: pair_of(m)[0], scale=lambda m: pair_of(m)[1])
    register_functions(_TUNING, attend, name, partial=None)
    kept: list[Tensor] = []
    with as_it_was(model), _frozen(model), _cleared(now):
        model.eval()
        for step, batch in enumerate(itertools.islice(itertools.cycle(batches), steps)):
            optimizer.param_groups[0]["lr"] = RATE * (1 - step / steps)
            with torch.no_grad():
                teacher = model(**batch)
            with torch.enable_grad():
                alpha, scale = plane.pairs(places)
                of_layers = zip(*(t.float().split([heads for _, heads in layers]) for t in (alpha, scale)), strict=True)
                for (module, _), pair in zip(layers, of_layers, strict=True):
                    device = next(itertools.chain(module.parameters(), model.parameters())).device
                    now[module] = pair[0].to(device), pair[1].to(device)
                with as_it_was(model):
                    model.set_attn_implementation(_TUNING)  # type: ignore[operator]
                    loss = divergence(model(**batch), teacher, batch)
                if not loss.isfinite():
                    raise ValueError(
                        f"{name}: the divergence must be finite, got {loss.item()} in step {step + 1}\n"
                        "do the model and its inputs give finite predictions?"
                    )
                (down,) = torch.autograd.grad(loss, places)
            along = plane.gradient(places)
            places.grad = down.to(places) - (down * along).sum() / along.square().sum().clamp_min(1e-30) * along
            optimizer.step()
            with torch.no_grad():
                places.copy_(plane.with_share(places, wanted))
                if step >= (1 - AVERAGED) * steps - 1:
                    kept.append(places.detach().clone())
            if progress is not None:
                progress(step + 1, float(loss.detach()))
    alpha, scale = plane.pairs(plane.with_share(torch.stack(kept).mean(0), wanted))
    return table.by_layer(list(zip(alpha.tolist(), scale.tolist(), strict=True)))


@contextmanager
def _cleared(pairs: dict[nn.Module, tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Empty in the end: what is registered with transformers holds it, and it would hold the model."""
    try:
        yield
    finally:
        pairs.clear()


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Without gradients for the parameters, whose backward would keep what it does not need."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
