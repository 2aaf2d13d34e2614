"""Checks that are the same for every operator."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from diffmax.testing.gate import reordered
from diffmax.testing.rows.checks import _expect, _poisoned_memory, _within


def random_strided(t: Tensor) -> Tensor:
    """Random numbers of a tensor's shape, in whose memory tokens come before heads, as a gradient has them in a model."""
    if t.ndim < 3:
        return torch.randn(t.shape)
    return torch.randn(t.transpose(1, 2).shape).transpose(1, 2)


def repeats(run: Callable[[], Iterable[Tensor]]) -> None:
    """Every run gives the same bits, in fresh memory full of NaN too."""
    results = [[*run()], [*run()]]
    with _poisoned_memory():
        results.append([*run()])
    same = (torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))
    _expect(all(same), "results differ in their bits")


def compiles_like_eager(step: Callable[[Tensor], Tensor], inputs: Iterable[Tensor], terms: int = 1) -> None:
    """torch.compile(step, fullgraph=True, dynamic=True) and its gradient equal eager.

    `terms`: how many numbers a sum has for each token of an input (B, H, L, D).
    """
    torch._dynamo.reset()
    compiled: Callable[[Tensor], Tensor] = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for x in inputs:
        leaves = [x.clone().requires_grad_() for _ in range(2)]
        outs = [function(leaf) for function, leaf in zip((compiled, step), leaves, strict=True)]
        grads = [torch.autograd.grad(out, leaf, torch.ones_like(out))[0] for out, leaf in zip(outs, leaves, strict=True)]
        for what, (ours, theirs) in (("compiled", outs), ("its gradient", grads)):
            _within(ours, theirs.detach().cpu().double(), reordered(x.shape[2] * terms, theirs, x.dtype), what)
