"""Power attention for CPUs, compiled: one parallel region for a call, in which each thread does everything for its heads.

`power_job` lays the call out as words, `power_forward` and `power_backward` are the kernels, made of `power_parts`; few queries
read the state as `power_step` says. Products are those of `simd`, in tiles. One state per thread is in memory, however long the
sequence.

Where two threads or more would share a head of keys, each has a span of its chunks: a first region finds what the spans add to
the state, and sums then have another order than those of a thread alone. All else is the same on any number of threads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffmax.kernels.numba.power_job import Job
from diffmax.kernels.numba.power_words import Word
from diffmax.machine.forked import alone_in_child
from diffmax.operators.common.numerics import accumulation_dtype
from diffmax.plugin import PowerCall, PowerGradients, PowerResults, PowerSaved, PowerWanted
from diffmax.reference.power import state_shapes, suffix_sums


@alone_in_child
def power_attention(query: Tensor, key: Tensor, value: Tensor, call: PowerCall, keep: bool) -> PowerResults:
    """Forward kernel; arguments and results as `diffmax.reference.power.power_attention`."""
    acc = accumulation_dtype(query.dtype)
    rounds = keep and value.dtype != acc
    out = torch.empty(*query.shape[:3], value.shape[3], dtype=acc if rounds else value.dtype)
    total = torch.empty(query.shape[:3] if keep else (0,), dtype=acc)
    sums, norm = _states(key, value, call.degree, call.final, acc)
    job = Job(query, key, value, call)
    for word, t in ((Word.out, out), (Word.total, total), (Word.end_sums, sums), (Word.end_norm, norm)):
        job.add_new(word, t)
    if rounds:
        job.words[Word.out_kind] = 0
    job.step_in_place()
    job.run("forward")
    exact = out if rounds else torch.empty(0, dtype=acc)
    return PowerResults(out.to(value.dtype), total, sums, norm, exact)


@alone_in_child
def power_attention_backward(
    grad: Tensor,
    grad_sums: Tensor | None,
    grad_norm: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    saved: PowerSaved,
    call: PowerCall,
    wanted: PowerWanted,
) -> PowerGradients:
    """Backward kernel; arguments and results as `diffmax.reference.power.power_attention_backward`."""
    acc = saved.total.dtype
    grad_query, grad_key, grad_value = (torch.empty(t.shape, dtype=t.dtype) for t in (query, key, value))
    gates = call.log_gates if wanted.log_gates else None
    grad_gates = torch.empty((0,) if gates is None else gates.shape, dtype=acc)
    of_sums, of_norm = _states(key, value, call.degree, wanted.state and call.sums is not None, acc)
    query_gates = torch.zeros(grad_gates.shape, dtype=acc)
    of_end = torch.zeros(key.shape[:2], dtype=torch.float64)
    job = Job(query, key, value, call)
    job.add(Word.grad, grad)
    for word, given in ((Word.out, saved.out), (Word.total, saved.total)):
        job.add_whole(word, given)
    if grad_sums is not None and grad_norm is not None:
        job.add_whole(Word.end_sums, grad_sums)
        job.add_whole(Word.end_norm, grad_norm)
    for word, t in (
        *((Word.grad_query, grad_query), (Word.grad_key, grad_key), (Word.grad_value, grad_value)),
        *(
            (Word.grad_gates, grad_gates),
            (Word.query_gates, query_gates),
            (Word.of_end, of_end),
            (Word.grad_sums, of_sums),
            (Word.grad_norm, of_norm),
        ),
    ):
        job.add_new(word, t)
    job.run("backward")
    if grad_gates.numel():
        grad_gates = (of_end.unsqueeze(-1) + suffix_sums(query_gates - grad_gates)).to(acc)
    return PowerGradients(grad_query, grad_key, grad_value, grad_gates, of_sums, of_norm)


def warmup(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    value_dim: int,
    e: float | None,
    backward: bool,
    features: frozenset[str],
) -> None:
    """Have the kernels of a dtype compiled, or read from the cache: one serves every length, size and degree."""
    query, value = (torch.zeros(1, 1, 2, size, dtype=dtype) for size in (head_dim, value_dim))
    call = PowerCall(degree=2, scale=1.0)
    found = power_attention(query, query, value, call, backward)
    if backward:
        power_attention_backward(found.out, None, None, query, query, value, found.saved, call, PowerWanted())


def _states(key: Tensor, value: Tensor, degree: int, wanted: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    sums, norm = state_shapes(key, value, degree) if wanted else ((0,), (0,))
    return torch.empty(sums, dtype=dtype), torch.empty(norm, dtype=dtype)
