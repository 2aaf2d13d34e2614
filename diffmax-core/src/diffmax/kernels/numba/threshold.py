"""Threshold attention for CPUs, compiled: one parallel region for a call, in which each thread does everything for its tiles.

`threshold_job` lays the call out as words, `threshold_forward` and `threshold_backward` are the kernels, made of
`threshold_rows`; products, rules of visibility and the solver are those of attention (`attention`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffmax.kernels.numba.attention import splits_of
from diffmax.kernels.numba.attention_words import Word
from diffmax.kernels.numba.threshold_job import ThresholdJob
from diffmax.machine.forked import alone_in_child
from diffmax.operators.common.numerics import accumulation_dtype
from diffmax.plugin import ThresholdCall, ThresholdGradients, ThresholdResults, ThresholdSaved, ThresholdWanted


@alone_in_child
def threshold_attention(query: Tensor, key: Tensor, value: Tensor, call: ThresholdCall, keep: bool) -> ThresholdResults:
    """Forward kernel; arguments and results as `diffmax.reference.threshold.threshold_attention`."""
    acc, shape = accumulation_dtype(query.dtype), query.shape[:3]
    make = torch.empty if call.cu_seqlens_q is None else torch.zeros  # rows of packed tensors may belong to no sequence
    out, mass = make(*shape, value.shape[3], dtype=value.dtype), make(shape, dtype=acc)
    statistic = torch.full(shape if keep and call.weights != "scores" else (0,), -torch.inf, dtype=acc)
    job = ThresholdJob(query, key, value, call)
    for word, t in ((Word.out, out), (Word.mass, mass), (Word.m, statistic)):
        job.add_new(word, t)
    job.scratch_of_forward()
    job.run("forward", job.tasks_of_forward())
    return ThresholdResults(out, mass, statistic)


@alone_in_child
def threshold_attention_backward(
    grad: Tensor,
    grad_mass: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    saved: ThresholdSaved,
    call: ThresholdCall,
    wanted: ThresholdWanted,
) -> ThresholdGradients:
    """Backward kernel; arguments and results as `diffmax.reference.threshold.threshold_attention_backward`.

    What the forward saved is not read: weights are computed as there, so that the same ones are 0.
    """
    acc = accumulation_dtype(query.dtype)
    job = ThresholdJob(query, key, value, call)
    splits = splits_of(job, query, key, value)
    make = torch.empty if call.cu_seqlens_q is None else torch.zeros
    grad_query = make(query.shape, dtype=query.dtype)
    shares = key.shape[:3] if splits == 1 else (splits, *key.shape[:3])
    grad_key, grad_value = (make(*shares, t.shape[3], dtype=t.dtype if splits == 1 else acc) for t in (key, value))
    of_theta, of_e = (torch.zeros(query.shape[:3] if needed else (0,), dtype=acc) for needed in (wanted.theta, wanted.e))
    chunks, of_bias = job.chunks(), torch.empty(0, dtype=acc)
    if wanted.bias and call.bias is not None:  # each chunk of tasks has a share, so that the sums have one order
        chunks = min(job.threads, max(1, job.sequences * key.shape[1] * splits))
        of_bias = torch.zeros(chunks, *call.bias.shape, dtype=acc)
        job.words[Word.distances_share] = of_bias.stride(0)
    job.add(Word.grad, grad)
    if grad_mass is not None:
        job.add_whole(Word.grad_mass, grad_mass.to(acc))
    for word, t in (
        *((Word.grad_query, grad_query), (Word.grad_key, grad_key), (Word.grad_value, grad_value)),
        *((Word.grad_theta, of_theta), (Word.grad_e, of_e), (Word.grad_distances, of_bias)),
    ):
        job.add_new(word, t)
    job.words[Word.splits], job.words[Word.split_step] = splits, key.shape[:3].numel()
    job.scratch_of_backward()
    job.run("backward", [key.shape[1] * splits] * job.sequences, chunks)
    if splits > 1:
        grad_key, grad_value = grad_key.sum(0).to(key.dtype), grad_value.sum(0).to(value.dtype)
    if of_bias.ndim == 3:
        of_bias = of_bias.sum(0).flip(1)
    return ThresholdGradients(grad_query, grad_key, grad_value, of_theta, of_bias, of_e)


def warmup(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    value_dim: int,
    e: float | None,
    backward: bool,
    features: frozenset[str],
) -> None:
    """Have the kernels of a dtype compiled, or read from the cache: one serves every length, size and feature."""
    query, value = (torch.zeros(1, 1, 2, size, dtype=dtype) for size in (head_dim, value_dim))
    theta = torch.zeros(1, 1, 2, dtype=accumulation_dtype(dtype))
    call = ThresholdCall(scale=1.0, theta=theta)
    found = threshold_attention(query, query, value, call, backward)
    if backward:
        threshold_attention_backward(found.out, None, query, query, value, found.saved, call, ThresholdWanted())
