"""`suggest_alpha`: what to replace softmax by for a share of zeros, without training."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import nn

from diffmax.integrations.transformers.adapting.calibration import check_share, measure
from diffmax.integrations.transformers.adapting.outputs import Batch, Output, each, likelihood
from diffmax.integrations.transformers.adapting.tuning import Plane, tuned
from diffmax.integrations.transformers.heads import Heads
from diffmax.matched import matched_scale
from diffmax.operators.common.checks import is_whole

ALPHAS = (0.97, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.5, 0.4, 0.3)
WEIGHTS = (1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 64)  # where the slopes of softmax and diffmax may agree
_NAME = "suggest_alpha"


def suggest_alpha(
    model: nn.Module,
    batches: Iterable[Batch],
    zeros: float = 0.9,
    *,
    per_head: bool = True,
    output: Output = likelihood,
    probes: int = 4,
    queries: int = 256,
    steps: int = 0,
    calibration: int | None = None,
    progress: Callable[[int, float], object] | None = None,
) -> Heads:
    """Choose the alpha of a softmax model for a share of zeros, at matched scales, and without training its weights.

    As `calibrate`, with fewer pairs of alpha and scale to choose from, all at or near the matched scale (Eq. 35), and from a
    sample of the queries: it takes inputs of thousands of tokens. The share of zeros grows with length, so give inputs as long
    as those that the model is for.

    Args:
        model: A transformers model that was trained with softmax. It is measured with softmax, whatever attn_implementation it
            has, which is restored.
        batches: A few dictionaries of the model's inputs; one of a thousand tokens is enough to begin with.
        zeros: The share of exact zeros to reach, in (0, 1), among the keys that queries without padding see. Where scores are
            so sharp that more cost nothing, there are more.
        per_head: Whether each head gets its own alpha and scale. False: one pair for the whole model.
        output: A function of the model's output and inputs that returns the tensor that must not move. Default: what the
            KL divergence of its predictions depends on, or the last hidden state of a model without logits.
        probes, queries: As for `calibrate`. The projections are random: torch.manual_seed repeats them.
        steps: Then so many steps of gradient descent on alpha and scale of each head, on a batch each, over and over: down the
            KL divergence from the predictions with softmax, at the same share of zeros. The choice looks at each head alone;
            the steps see what all of them do together. Each takes the time of a training step.
        calibration: The choice is made from so many of the batches, the first ones; None: all. The steps go over all of them.
        progress: Called with the number of finished steps and the divergence.
    Returns:
        Per layer, the alphas and scales of its heads: for `diffmax.integrations.transformers.replace(model, heads)`.
    Raises:
        ImportError: transformers is missing or too old.
        TypeError: The model is not one of transformers, or steps is no int.
        ValueError: zeros, queries, steps or calibration is out of range; there is no batch; the model computes attention by
            itself, uses an option that cannot be measured, or was adapted before; the share of zeros cannot be reached;
            per_head=False with steps.
    Source: docs/choosing.md. Written for diffmax.
    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> config = LlamaConfig(**sizes, vocab_size=9, initializer_range=1.0)
        >>> model = LlamaForCausalLM(config).eval()
        >>> heads = suggest_alpha(model, [{"input_ids": torch.randint(9, (2, 64))}], zeros=0.1, per_head=False)
        >>> len(set(heads["model.layers.0.self_attn"]["alpha"]))
        1
    """
    if not hasattr(model, "set_attn_implementation"):
        hint = 'for timm and diffusers, try alphas with replace(model, alpha, scale="match")'
        raise TypeError(
            f"{_NAME}: the model must be one of transformers, got {model!r:.60} of type {type(model).__name__}\n"
            f"{'load it with from_pretrained' if isinstance(model, str) else hint}"
        )
    check_share(_NAME, zeros)
    if not is_whole(steps):
        raise TypeError(f"{_NAME}: steps must be an int, got {steps!r} of type {type(steps).__name__}")
    if steps < 0:
        raise ValueError(f"{_NAME}: steps must be at least 0, got {steps}")
    if steps and not per_head:
        raise ValueError(f"{_NAME}: steps tune each head, so there are none with per_head=False, got {steps}")
    if calibration is not None and (not is_whole(calibration) or calibration < 1):
        raise ValueError(f"{_NAME}: calibration must be None or an int of at least 1, got {calibration!r}")
    batches = list(each(_NAME, batches))
    if calibration is not None and calibration > len(batches):
        raise ValueError(f"{_NAME}: calibration must be at most the number of batches, {len(batches)}, got {calibration}")
    grid = [(alpha, matched_scale(alpha, weight)) for alpha in ALPHAS for weight in WEIGHTS]
    table = measure(_NAME, model, batches[:calibration], grid, output, probes, queries)
    chosen = table.with_zeros(_NAME, zeros) if per_head else table.one_for_all(_NAME, zeros)
    if not steps:
        return table.heads(chosen)
    return tuned(_NAME, model, batches, table, Plane(ALPHAS, WEIGHTS, table.zeros), chosen, int(steps), progress)
