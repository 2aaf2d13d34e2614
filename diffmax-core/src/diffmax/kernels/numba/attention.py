"""Attention for CPUs, compiled: one parallel region for a call, in which each thread does everything for its tiles.

`attention_job` lays the call out as words, `attention_forward` and `attention_backward` are the kernels; rows are solved by the
row operator's parts, products are in `products`, the rules of the scores in `scores`
(docs/decisions/0089-attention-in-one-region.md).
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffmax.kernels.numba.attention_job import Job
from diffmax.kernels.numba.attention_words import Word
from diffmax.machine.forked import alone_in_child
from diffmax.operators.attention.tiles import live_shape
from diffmax.operators.common.numerics import accumulation_dtype
from diffmax.plugin import TILE, AttentionCall, AttentionGradients, AttentionResults, Saved, Wanted

# Shares of the gradients for keys and values: no more than two of them may take more memory than this.
SHARE_BYTES = 1 << 28


@alone_in_child
def attention(query: Tensor, key: Tensor, value: Tensor, call: AttentionCall, keep: bool, stats: bool) -> AttentionResults:
    """Forward kernel; arguments and results as `diffmax.reference.attention.attention`."""
    acc, shape = accumulation_dtype(query.dtype), query.shape[:3]
    make = torch.empty if call.cu_seqlens_q is None else torch.zeros  # rows of packed tensors may belong to no sequence
    out = make(*shape, value.shape[3], dtype=value.dtype)
    u = make(out.shape if keep else (0,), dtype=value.dtype)
    m, delta = torch.empty(shape, dtype=acc), make(shape, dtype=acc)
    if call.cu_seqlens_q is not None:
        m.fill_(-torch.inf)
    live = torch.zeros(live_shape(query, key, call) if keep or stats else (0,), dtype=torch.int32)
    support = make(shape if stats else (0,), dtype=torch.int32)
    job = Job(query, key, value, call)
    for word, t in (
        *((Word.out, out), (Word.m, m), (Word.delta, delta)),
        *((Word.u, u), (Word.live, live), (Word.support, support)),
    ):
        job.add_new(word, t)
    job.scratch_of_forward(keep)
    job.run("forward", job.tasks_of_forward())
    return AttentionResults(out, m, delta, u, live, support)


@alone_in_child
def attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, saved: Saved, call: AttentionCall, wanted: Wanted
) -> AttentionGradients:
    """Backward kernel; arguments and results as `diffmax.reference.attention.attention_backward`."""
    acc = saved.m.dtype
    job = Job(query, key, value, call)
    splits = splits_of(job, query, key, value)
    make = torch.empty if call.cu_seqlens_q is None else torch.zeros
    grad_query = make(query.shape, dtype=query.dtype)
    shares = key.shape[:3] if splits == 1 else (splits, *key.shape[:3])
    grad_key, grad_value = (make(*shares, t.shape[3], dtype=t.dtype if splits == 1 else acc) for t in (key, value))
    grad_e, grad_sink = (torch.zeros(saved.m.shape if needed else (0,), dtype=acc) for needed in (wanted.e, wanted.sink))
    grad_bias = saved.m.new_empty(0)
    chunks = job.chunks()
    if wanted.bias and call.bias is not None:
        broadcasts = any(size > 1 and own == 1 for size, own in zip(query.shape[:3], call.bias.shape[:3], strict=True))
        if broadcasts:  # each chunk of tasks has a share, so that the sums have one order
            chunks = min(job.threads, max(1, job.sequences * key.shape[1] * splits))
        grad_bias = torch.zeros(chunks if broadcasts else 1, *call.bias.shape, dtype=acc)
        job.add_bias_gradient(grad_bias)
    job.add(Word.grad, grad)
    for word, t in (
        *((Word.m, saved.m), (Word.delta, saved.delta), (Word.u, saved.u), (Word.live, saved.live)),
        *((Word.grad_query, grad_query), (Word.grad_key, grad_key), (Word.grad_value, grad_value)),
        *((Word.grad_e, grad_e), (Word.grad_sink, grad_sink)),
    ):
        job.add_whole(word, t)
    job.words[Word.splits], job.words[Word.split_step] = splits, key.shape[:3].numel()
    job.scratch_of_backward()
    job.run("backward", [key.shape[1] * splits] * job.sequences, chunks)
    if splits > 1:
        grad_key, grad_value = grad_key.sum(0).to(key.dtype), grad_value.sum(0).to(value.dtype)
    if grad_bias.ndim == 5:
        grad_bias = grad_bias.sum(0) if len(grad_bias) > 1 else grad_bias[0]
    return AttentionGradients(grad_query, grad_key, grad_value, grad_e, grad_bias, grad_sink)


def splits_of(job: Job, query: Tensor, key: Tensor, value: Tensor) -> int:
    """In how many the tiles of a head's queries are split, of which each has shares of the gradients for keys and values.

    A task of the backward is a head of keys; it is split where those are too few for the threads.
    """
    threads, units, tiles = job.threads, job.sequences * key.shape[1], -(-query.shape[2] // TILE)
    if threads == 1 or units >= 2 * threads:
        return 1
    splits = min(max(1, tiles), -(-2 * threads // max(1, units)))
    return min(splits, max(2, SHARE_BYTES // max(1, (key.numel() + value.numel()) * job.acc.itemsize)))


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
    call = AttentionCall(scale=1.0, e=0.5 if e is None else e)
    out, *saved, _ = attention(query, query, value, call, backward, False)
    if backward:
        attention_backward(out, query, query, value, Saved(*saved), call, Wanted())
