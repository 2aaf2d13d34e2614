"""The kits of the operators find kernels with one bug each: those that vendors' kernels have had, or could."""

import dataclasses
import sys
import types

import pytest
import torch

import diffmax
from diffmax.kernels.cpu import attention, decoding, power, rows, threshold
from diffmax.plugin import Backend, Kernel
from diffmax.testing.attention import checks as of_attention
from diffmax.testing.decoding import checks as of_decoding
from diffmax.testing.power import checks as of_power
from diffmax.testing.rows import checks as of_rows
from diffmax.testing.threshold import checks as of_threshold

CPU = next(backend for backend in diffmax.machine.dispatch.registry.backends() if backend.name == "cpu")
NAME = "one-bug"


def as_contiguous(t):
    """The memory of a tensor read as if it were contiguous."""
    return torch.as_strided(t, t.shape, torch.empty(t.shape).stride()) if t.numel() and not t.is_contiguous() else t


def as_dense(t):
    """The last dimension read as if it lay side by side."""
    return torch.as_strided(t, t.shape, (*t.stride()[:-1], 1)) if t.numel() else t


def grads_as_contiguous(run):
    return lambda grad, *rest: run(as_contiguous(grad), *rest)


def with_call(run, place, change):
    """A kernel whose call, its argument at that place, is another."""
    return lambda *args: run(*args[:place], change(args), *args[place + 1 :])


def without_rules(args):
    call = next(a for a in args if dataclasses.is_dataclass(a))
    if call.cu_seqlens_q is None:
        return call
    return dataclasses.replace(call, left=-1, right=min(call.right, 0), alibi=None, softcap=0.0)


def default_scale(args):
    call = next(a for a in args if dataclasses.is_dataclass(a))
    return dataclasses.replace(call, scale=16**-0.5)


def first_state(args):
    call = next(a for a in args if dataclasses.is_dataclass(a))
    if call.sums is None:
        return call
    return dataclasses.replace(call, sums=call.sums[:1].expand_as(call.sums), norm=call.norm[:1].expand_as(call.norm))


def ends_of_queries(args):
    call = next(a for a in args if dataclasses.is_dataclass(a))
    if call.cu_seqlens_q is None:
        return call
    return dataclasses.replace(call, cu_seqlens_k=call.cu_seqlens_q, max_seqlen_k=call.max_seqlen_q)


def no_padding_in_rows(args):
    call = next(a for a in args if dataclasses.is_dataclass(a))
    return call if call.cache_batch_idx is None else dataclasses.replace(call, leftpad=None)


def first_block(grad, p, m, delta, x, e, dim, needs_e):
    found, of_e = rows.bisect_backward(grad, p, m, delta, x, e, dim, needs_e)
    found.narrow(dim, 1024, max(p.shape[dim] - 1024, 0)).zero_() if p.shape[dim] > 1024 else None
    return found, of_e


def first_alpha(grad, p, m, delta, x, e, dim, needs_e):
    e = e.flatten()[:1].expand_as(e) if isinstance(e, torch.Tensor) else e
    return rows.bisect_backward(grad, p, m, delta, x, e, dim, needs_e)


def no_empty_grid(*args):
    if any(isinstance(t, torch.Tensor) and t.numel() == 0 for t in args[:3]):
        raise AssertionError("invalid configuration argument")
    return attention.attention(*args)


def into_the_sink(query, key, value, call, keep, stats):
    found = attention.attention(query, key, value, call, keep, stats)
    if query.shape[0] == query.shape[2] == 1 and call.sink is not None:
        call.sink.copy_(found.m.view(-1))
    return found


ATTENTION = {"attention": attention.attention, "attention_backward": attention.attention_backward}
POWER = {"power_attention": power.power_attention, "power_attention_backward": power.power_attention_backward}
THRESHOLD = {
    "threshold_attention": threshold.threshold_attention,
    "threshold_attention_backward": threshold.threshold_attention_backward,
}
ROWS = {"bisect": rows.bisect, "bisect_backward": rows.bisect_backward}
DECODING = {"attention_kvcache": decoding.attention_kvcache}
F32 = torch.float32
# the right kernels, what is wrong in their place, and what finds it
BUGS = {
    "attention: gradients as contiguous": (
        ATTENTION,
        {"attention_backward": grads_as_contiguous(attention.attention_backward)},
        lambda: of_attention.gradients_are_right_on_average(NAME, "cpu", of_attention.Case(length=40, keys=50), F32),
    ),
    "attention: packed calls without rules": (
        ATTENTION,
        {"attention": with_call(attention.attention, 3, without_rules)},
        lambda: of_attention.packed_sequences_are_each_on_their_own(NAME, "cpu", F32),
    ),
    "attention: entries side by side": (
        ATTENTION,
        {"attention": lambda q, k, v, *rest: attention.attention(as_dense(q), as_dense(k), as_dense(v), *rest)},
        lambda: of_attention.strides_of_every_kind(NAME, "cpu", F32),
    ),
    "attention: results in the sink": (
        ATTENTION,
        {"attention": into_the_sink},
        lambda: of_attention.inputs_stay_as_they_are(NAME, "cpu", F32),
    ),
    "attention: no empty grid": (ATTENTION, {"attention": no_empty_grid}, lambda: of_attention.empty_calls(NAME, "cpu", F32)),
    "power: gradients as contiguous": (
        POWER,
        {"power_attention_backward": grads_as_contiguous(power.power_attention_backward)},
        lambda: of_power.gradients_are_right_on_average(NAME, "cpu", of_power.CASES["plain"], F32),
    ),
    "power: one state for all": (
        POWER,
        {"power_attention": with_call(power.power_attention, 3, first_state)},
        lambda: of_power.results_pass_the_gate(NAME, "cpu", of_power.CASES["state in, state out"], F32),
    ),
    "threshold: gradients as contiguous": (
        THRESHOLD,
        {"threshold_attention_backward": grads_as_contiguous(threshold.threshold_attention_backward)},
        lambda: of_threshold.gradients_are_right_on_average(NAME, "cpu", of_threshold.CASES["rectified scores"], F32),
    ),
    "threshold: the default scale": (
        THRESHOLD,
        {"threshold_attention": with_call(threshold.threshold_attention, 3, default_scale)},
        lambda: of_threshold.results_pass_the_gate(NAME, "cpu", of_threshold.CASES["scale"], F32),
    ),
    "threshold: ends of queries for keys": (
        THRESHOLD,
        {"threshold_attention": with_call(threshold.threshold_attention, 3, ends_of_queries)},
        lambda: of_threshold.results_pass_the_gate(NAME, "cpu", of_threshold.CASES["packed, more keys, grouped heads"], F32),
    ),
    "rows: gradients of the first block": (
        ROWS,
        {"bisect_backward": first_block},
        lambda: of_rows.backward_passes_the_gate(NAME, "cpu", of_rows.random_scores((2, 5000), F32), 0.5),
    ),
    "rows: one alpha in the backward": (
        ROWS,
        {"bisect_backward": first_alpha},
        lambda: of_rows.gradients_of_alpha_tensors(NAME, "cpu", F32),
    ),
    "decoding: no padding in other rows": (
        DECODING,
        {"attention_kvcache": with_call(decoding.attention_kvcache, 3, no_padding_in_rows)},
        lambda: of_decoding.decoding_passes_the_gate(
            NAME, "cpu", of_decoding.CASES["late start, other rows, grouped heads"], F32
        ),
    ),
}


@pytest.fixture
def backend(monkeypatch):
    """Registers kernels under `NAME`, with what the CPU's claim."""
    module = types.ModuleType("kernels_with_one_bug")
    monkeypatch.setitem(sys.modules, module.__name__, module)

    def register(kernels):
        described = {}
        for operator, function in kernels.items():
            setattr(module, operator, function)
            described[operator] = Kernel(f"{module.__name__}:{operator}", (F32,), CPU.provided[operator].features)
        diffmax.register_backend(Backend(name=NAME, device_types=("cpu",), kernels=described, automatic=False))

    yield register
    diffmax.unregister_backend(NAME)


@pytest.mark.parametrize("bug", BUGS)
def test_a_kernel_with_one_bug_is_found_and_a_right_one_is_not(backend, bug):
    right, wrong, check = BUGS[bug]
    backend(right | wrong)
    with pytest.raises(AssertionError):
        check()
    diffmax.unregister_backend(NAME)
    backend(right)
    check()


def test_strides_and_empty_calls_of_power_attention_are_asked_without_another_feature():
    from diffmax.testing.power.conformance import PowerConformance

    asked = []

    class Kit(PowerConformance):
        backend = "cpu"

        def claims(self, dtype, *features, backward=True):
            asked.append(features)
            return False

    Kit().test_strided_and_empty(F32)
    assert asked == [()]
