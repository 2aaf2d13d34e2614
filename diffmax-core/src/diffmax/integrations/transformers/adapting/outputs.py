"""Shared by the steps of the recipe: batches, the output of a model, and its movement."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

Batch: TypeAlias = "Mapping[str, Any]"
Output: TypeAlias = "Callable[[Any, Batch], Tensor]"
Loss: TypeAlias = "Callable[[Any, Any, Batch], Tensor]"


def each(name: str, batches: Iterable[Batch]) -> Iterator[Batch]:
    """The batches, each of which must be a mapping of inputs."""
    for batch in [batches] if isinstance(batches, (Mapping, Tensor)) else batches:
        if batch is batches or not isinstance(batch, Mapping):
            got = f"{type(batch).__name__} in place of a list of them" if batch is batches else type(batch).__name__
            raise TypeError(
                f"{name}: a batch must be a dictionary of the model's inputs, got {got}\n"
                'for instance batches = [{"input_ids": ids, "attention_mask": mask}]'
            )
        yield batch


def final_output(output: Any, batch: Batch) -> Tensor:
    """A model's logits, or those of starts and ends, or its last hidden state; 0 at padding. Of a pair, the decoder's."""
    final = _final(output)
    mask = batch.get("decoder_attention_mask" if hasattr(output, "encoder_last_hidden_state") else "attention_mask")
    return final if mask is None or mask.shape != final.shape[:-1] else final * mask.unsqueeze(-1).to(final.dtype)


def _final(output: Any) -> Tensor:
    found = [getattr(output, name, None) for name in ("logits", "start_logits", "end_logits", "last_hidden_state")]
    logits, start, end, state = (t if isinstance(t, Tensor) else None for t in found)
    if start is not None and end is not None:  # of answers to questions
        return torch.stack([start, end], -1)
    if logits is None and state is None:
        raise ValueError(
            "the model's output must have logits or a last_hidden_state, got "
            f"{type(output).__name__} with {', '.join(output) if isinstance(output, Mapping) else 'neither'}\n"
            "say what must not move: with output= for calibrate, suggest_alpha without steps, and adapt; with loss= for distil"
        )
    return state if logits is None else logits  # type: ignore[return-value]


def likelihood(output: Any, batch: Batch) -> Tensor:
    """Log-probabilities times the roots of the probabilities, or the last hidden state of a model without logits.

    The square of a small change of them is twice the KL divergence of the predictions.
    """
    final = final_output(output, batch)
    if getattr(output, "logits", None) is None:
        return final
    logs = output.logits.log_softmax(-1)
    weighted: Tensor = logs * (logs / 2).exp().detach()
    return weighted if final is output.logits else weighted * (final != 0).any(-1, keepdim=True)


def relative_error(student: Any, teacher: Any, batch: Batch) -> Tensor:
    """Squared distance between two models' final outputs, relative to the squared norm of the teacher's."""
    wanted = final_output(teacher, batch)
    return (final_output(student, batch) - wanted).square().sum() / wanted.square().sum()


def mask_for(model: nn.Module, part: nn.Module, batch: Batch) -> Tensor | None:
    """The mask of the tokens of a part of the model: the decoder of an encoder-decoder model has its own."""
    of_pair: Any = model if getattr(getattr(model, "config", None), "is_encoder_decoder", False) else None
    in_decoder = of_pair is not None and all(part is not module for module in of_pair.get_encoder().modules())
    return batch.get("decoder_attention_mask" if in_decoder else "attention_mask")


def divergence(student: Any, teacher: Any, batch: Batch) -> Tensor:
    """KL divergence of a student's predictions from its teacher's, in nats per token: a loss for `distil`.

    Args:
        student, teacher: Outputs of the two models for the same inputs, with logits (..., L, V); without logits the result is
            the squared distance of the last hidden states, relative to the teacher's norm.
        batch: The inputs. Tokens where its attention_mask is 0 do not count.
    Returns:
        A scalar, in float32 or better.
    Source: Hinton et al., 2015, Distilling the Knowledge in a Neural Network, at temperature 1.
    """
    if getattr(teacher, "logits", None) is None:
        return relative_error(student, teacher, batch)
    ours, theirs = (output.logits.float().log_softmax(-1) for output in (student, teacher))
    of_each = nn.functional.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1)
    real = (final_output(teacher, batch) != 0).any(-1)
    return of_each[real].mean()
