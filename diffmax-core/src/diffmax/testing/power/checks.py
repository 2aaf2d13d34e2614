"""What every backend's power attention has to get right, as functions: the kit and the tests call them.

The truth is `diffmax.reference.power` in float64 on the CPU, which diffmax's own tests hold to finite differences and to sums
over pairs. The gate is the row operator's. Where a call is in chunks, its yardstick is the reference in one piece or in chunks
through their states, whichever errs more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import diffmax
from diffmax.operators.common.numerics import accumulation_dtype
from diffmax.operators.power.operator import BACKWARD, FORWARD
from diffmax.plugin import PowerCall, PowerResults, PowerWanted
from diffmax.testing.common.checks import compiles_like_eager, random_strided, repeats
from diffmax.testing.gate import Gate, gates, reordered
from diffmax.testing.power.cases import CASES as CASES
from diffmax.testing.power.cases import Case as Case
from diffmax.testing.power.cases import Inputs as Inputs
from diffmax.testing.rows.cases import inf, nan
from diffmax.testing.rows.checks import _expect, _near_on_average, _opcheck, _unchanged, _within

NAMES = ("query", "key", "value", "log_gates", "sums", "norm")


def attend(given: Inputs, case: Case, backend: str | None) -> tuple[Tensor, ...]:
    """The results of `diffmax.power_attention`: one, or with those of the state."""
    query, key, value, log_gates, sums, norm = given
    state = None if sums is None or norm is None else (sums, norm)
    found: Any = diffmax.power_attention(query, key, value, log_gates, state, backend=backend, **case.options())
    return (found[0], *found[1]) if case.final else (found,)


def results_pass_the_gate(backend: str, device: str, case: Case, dtype: torch.dtype) -> None:
    """Result and final state are as near to the truth as the gate asks."""
    given = case.inputs(dtype)
    wanted = _both_ways(lambda *drawn, chunk: _by_reference(Inputs(*drawn), case, chunk), case, *given)
    moved = given.moved(device)
    with _unchanged(moved):
        ours = attend(moved, case, backend)
    for what, got, gate, kind in zip(("output", "sums", "norm"), ours, wanted, _dtypes(dtype), strict=False):
        _expect(got.dtype == kind and got.shape == gate.exact.shape and got.is_contiguous(), f"got {got.dtype} {got.shape}")
        _within(got, *gate, what)


def gradients_are_right_on_average(backend: str, device: str, case: Case, dtype: torch.dtype) -> None:
    """Through autograd, for all that is given; the gate holds for the mean error, as of attention's gradients."""
    given = case.inputs(dtype)
    results = attend(given, case, "reference")
    grads = [random_strided(t).to(kind) for t, kind in zip(results, _dtypes(dtype), strict=False)]
    count = len(grads)

    def gradients(*drawn: Tensor, chunk: int) -> tuple[Tensor, ...]:
        leaves = Inputs(*drawn[count:]).leaves()
        return _gradients(_by_reference(leaves, case, chunk), leaves, list(drawn[:count]))

    wanted = _both_ways(gradients, case, *grads, *given, average=True)
    leaves = given.moved(device).leaves()
    sent = [t.to(device) for t in grads]
    with _unchanged((*leaves, *sent)):
        ours = _gradients(attend(leaves, case, backend), leaves, sent)
    names = [name for name, t in zip(NAMES, given, strict=True) if t is not None]
    for name, got, gate in zip(names, ours, wanted, strict=True):
        if got.numel():
            lost = _through_products(given, wanted) if name == "log_gates" else 0.0
            _near_on_average(got, gate._replace(allowed=max(gate.allowed, lost)), f"gradient for {name}")


def _through_products(given: Inputs, wanted: Sequence[Gate]) -> float:
    """What usual errors of dQ and dK make of a gate's gradient, a difference of sums of q dq and of k dk: 0 after a reset.

    A usual error is a quarter of the largest one allowed, with either sign.
    """
    pairs = zip((given.query, given.key), wanted[:2], strict=True)
    return max(float(torch.linalg.vector_norm(t, dim=-1).mean()) * gate.allowed / 4 for t, gate in pairs)


def _both_ways(compute: Callable[..., Any], case: Case, *inputs: Tensor | None, average: bool = False) -> list[Gate]:
    """Gates by the reference in one piece and, where the call is in chunks, in pieces: the larger of both errors."""
    chunk = case.chunk or case.many
    ways = [0, chunk] if chunk < case.many else [0]
    found = [gates(partial(compute, chunk=way), *inputs, average=average) for way in ways]
    return [Gate(each[0].exact, max(gate.allowed for gate in each)) for each in zip(*found, strict=True)]


def _by_reference(given: Inputs, case: Case, chunk: int) -> tuple[Tensor, ...]:
    """The reference; in chunks, through their states, unless `chunk` is 0."""
    if not chunk:
        return attend(given, case, "reference")
    both, pieces, now = replace(case, final=True, chunk=None), [], given
    before = case.many - given.query.shape[2]
    for first in range(0, case.many, chunk):
        last = min(first + chunk, case.many)
        rows = slice(max(first - before, 0), max(last - before, 0))
        part = _part(now, 0, first, last)._replace(query=now.query[:, :, rows])
        out, sums, norm = attend(part, both, "reference")
        now = now._replace(sums=sums, norm=norm)
        pieces.append(out)
    return (torch.cat(pieces, 2), *((sums, norm) if case.final else ()))


def _gradients(results: tuple[Tensor, ...], leaves: Inputs, grads: list[Tensor]) -> tuple[Tensor, ...]:
    given = [t for t in leaves if t is not None]
    found = torch.autograd.grad(results, given, grads, allow_unused=True)
    return tuple(torch.zeros_like(t) if g is None else g for t, g in zip(given, found, strict=True))


def _dtypes(dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    acc = accumulation_dtype(dtype)
    return dtype, acc, acc


def zero_keys_and_gates(backend: str, device: str, dtype: torch.dtype, features: frozenset[str]) -> None:
    """A key of zeros adds nothing; a query without weights gives 0 and no gradient; a gate of 0 forgets the past."""
    case = Case(many=40, chunk=16)
    given = case.inputs(dtype).moved(device)
    query, key, value = (t.clone() for t in given[:3])
    key[:, :, 10:13] = 0
    kept = [t for t in range(40) if not 10 <= t < 13]
    whole = attend(Inputs(query, key, value, None, None, None), case, backend)[0]
    some = attend(Inputs(query[:, :, kept], key[:, :, kept], value[:, :, kept], None, None, None), case, backend)[0]
    allowed = reordered(40 * 16, some, dtype)
    _within(whole[:, :, kept], some.cpu().double(), allowed, "with keys of zeros")
    leaves = Inputs(query, torch.zeros_like(key), value, None, None, None).leaves()
    out = attend(leaves, case, backend)[0]
    _expect(bool((out == 0).all()), "queries without weights do not give 0")
    for name, t in zip(NAMES, _gradients((out,), leaves, [torch.ones_like(out)]), strict=False):
        _expect(bool((t == 0).all()), f"the gradient for {name} is not 0 without weights")
    if "gates" in features:
        gate = torch.zeros(1, 2, 40, device=device)
        gate[:, :, 20] = -inf
        out = attend(Inputs(query, key, value, gate, None, None), case, backend)[0]
        late = attend(Inputs(query[:, :, 20:], key[:, :, 20:], value[:, :, 20:], None, None, None), case, backend)[0]
        _within(out[:, :, 20:], late.cpu().double(), reordered(40 * 16, late, dtype), "behind a gate of 0")


def bad_numbers_stay_where_they_belong(backend: str, device: str, dtype: torch.dtype) -> None:
    """NaN in a query spoils that query; in a key or value, the queries of its head from there on."""
    case = Case(many=40, chunk=16)
    given = case.inputs(dtype).moved(device)
    query = given.query.clone()
    query[0, 0, 5, 3] = nan
    found = attend(given._replace(query=query), case, backend)[0].isnan().cpu()
    wanted = torch.zeros_like(found)
    wanted[0, 0, 5] = True
    _expect(torch.equal(found, wanted), f"a NaN in a query gives NaN at {found.any(3).nonzero().tolist()[:5]}")
    key = given.key.clone()
    key[0, 1, 20, 2] = nan
    found = attend(given._replace(key=key), case, backend)[0].isnan().all(3).cpu()
    _expect(bool(found[0, 1, 20:].all()), "a NaN in a key is lost")
    _expect(not bool(found[0, 0].any() | found[0, 1, :16].any()), "a NaN in a key spoils other heads, or chunks before it")


def residuals_are_exchangeable(backend: str, device: str, dtype: torch.dtype) -> None:
    """Its forward with the reference's backward, and the other way round."""
    case = Case(many=40, chunk=16, degree=2)
    given = case.inputs(dtype).moved(device)
    call = PowerCall(degree=2, scale=0.25, chunk=16)
    grad = torch.randn(given.query.shape).to(dtype).to(device)
    found = []
    for forward, backward in ((backend, "reference"), ("reference", backend), (backend, backend)):
        saved = PowerResults(*FORWARD(*given[:3], True, call, forward)).saved
        found.append(BACKWARD(grad, None, None, *given[:3], saved, PowerWanted(), call, backward)[:3])
    for what, ours, other, own in zip(NAMES, *found, strict=False):
        allowed = reordered(40 * 16, own, dtype) * 4
        _within(ours, own.cpu().double(), allowed, f"gradient for {what} by the reference's backward")
        _within(other, own.cpu().double(), allowed, f"gradient for {what} from the reference's forward")


def chunks_change_rounding_alone(backend: str, device: str, dtype: torch.dtype) -> None:
    """Chunks of any size, and none, give the same result: in float32 to 1e-5."""
    base = Case(many=150, head_dim=16, gates=3.0)
    given = base.inputs(dtype).moved(device)
    results = [attend(given, replace(base, chunk=chunk), backend)[0] for chunk in (1000, 150, 64, 33, 16)]
    for result in results[1:]:
        allowed = 1e-5 if dtype == torch.float32 else reordered(150 * 16, results[0], dtype)
        _within(result, results[0].cpu().double(), allowed, "by other chunks")


def decoding_goes_on(backend: str, device: str, dtype: torch.dtype) -> None:
    """Token after token through the state, and with a tail, equals all at once."""
    case = Case(batch=2, many=24, heads=4, kv_heads=2, gates=2.0)
    given = case.inputs(dtype).moved(device)
    whole = attend(given, replace(case, chunk=24), backend)[0]
    allowed = reordered(24 * 16 * 16, whole, dtype)
    step, now, pieces = replace(case, final=True), given, []
    for t in range(24):
        out, *state = attend(_part(now, t, t, t + 1), step, backend)
        now = now._replace(sums=state[0], norm=state[1])
        pieces.append(out)
    _within(torch.cat(pieces, 2), whole.cpu().double(), allowed, "token after token")
    _, *state = attend(_part(given, 0, 0, 9), step, backend)
    now = given._replace(sums=state[0], norm=state[1])
    pieces = [attend(_part(now, t, 9, t + 1), case, backend)[0] for t in range(9, 24)]
    _within(torch.cat(pieces, 2), whole[:, :, 9:].cpu().double(), allowed, "tail and state")


def _part(given: Inputs, query: int, first: int, last: int) -> Inputs:
    """Queries from `query`, keys from `first`, both up to `last`."""
    log_gates = None if given.log_gates is None else given.log_gates[:, :, first:last]
    tokens = (given.query[:, :, query:last], given.key[:, :, first:last], given.value[:, :, first:last])
    return Inputs(*tokens, log_gates, given.sums, given.norm)


def strided_inputs(backend: str, device: str, dtype: torch.dtype) -> None:
    """Slices of one tensor, tokens before heads, give what copies of them give."""
    case = Case(many=40, chunk=16)
    packed = torch.randn(1, 40, 3, 2, 16).to(dtype).to(device)
    query, key, value = (packed[:, :, which].transpose(1, 2) for which in range(3))
    found = attend(Inputs(query, key, value, None, None, None), case, backend)[0]
    copies = Inputs(query.contiguous(), key.contiguous(), value.contiguous(), None, None, None)
    wanted = attend(copies, case, backend)[0]
    _within(found, wanted.cpu().double(), reordered(40 * 16, wanted, dtype), "strided")


def empty_calls(backend: str, device: str, dtype: torch.dtype, features: frozenset[str]) -> None:
    """No batch, no tokens, no value entries."""
    for shape, width in (((0, 2, 5, 8), 8), ((1, 2, 0, 8), 8), ((1, 2, 5, 8), 0), ((1, 0, 5, 8), 8)):
        if width != shape[3] and "value_dim" not in features:
            continue
        x = torch.randn(shape, device=device).to(dtype)
        value = torch.randn(*shape[:3], width, device=device).to(dtype).requires_grad_()
        out = diffmax.power_attention(x, x, value, backend=backend)
        _expect(out.shape == value.shape, f"got {tuple(out.shape)}")
        (grad,) = torch.autograd.grad(out, value, torch.ones_like(out))
        _expect(grad.shape == value.shape, f"got a gradient {tuple(grad.shape)}")


def is_repeatable(backend: str, device: str, dtype: torch.dtype) -> None:
    """The same input gives the same bits, forward and backward, in fresh memory full of NaN too."""
    case = Case(many=130, chunk=32)
    given = case.inputs(dtype).moved(device)

    def run() -> tuple[Tensor, ...]:
        leaves = given.leaves()
        results = attend(leaves, case, backend)
        return (*results, *_gradients(results, leaves, [torch.ones_like(results[0])]))

    repeats(run)


def passes_opcheck(backend: str, device: str, dtype: torch.dtype, features: frozenset[str]) -> None:
    """torch.library.opcheck, forward and backward."""
    plain = Case(many=12)
    rich = Case(many=12, gates=1.0, state=True, final=True)
    for case in (plain, rich) if {"gates", "state"} <= features else (plain,):
        given = case.inputs(dtype).moved(device).leaves()
        query, key, value, log_gates, sums, norm = given
        call = PowerCall(degree=2, scale=0.25, final=case.final, log_gates=log_gates, sums=sums, norm=norm)
        arguments = FORWARD.flatten(query, key, value, True, call, backend)
        _opcheck("power_attention", device, arguments)
        with torch.no_grad():
            found = PowerResults(*FORWARD(query, key, value, True, call, backend))
            ends = (torch.ones_like(found.sums), torch.ones_like(found.norm)) if case.final else (None, None)
            wanted = PowerWanted(case.gates is not None, case.state)
            state = [t if t is None else t.detach() for t in given[3:]]
            plain_call = PowerCall(degree=2, scale=0.25, final=case.final, log_gates=state[0], sums=state[1], norm=state[2])
            flat = BACKWARD.flatten(
                torch.ones_like(found.out), *ends, query.detach(), key.detach(), value.detach(), found.saved, wanted,
                plain_call, backend,
            )  # fmt: skip
        _opcheck("power_attention_backward", device, flat)


def compiles_in_one_graph(backend: str, device: str, dtype: torch.dtype) -> None:
    """torch.compile(fullgraph=True), forward and backward, for several lengths, equals eager."""

    def step(x: Tensor) -> Tensor:
        out: Tensor = diffmax.power_attention(x * 2, x, x, backend=backend)
        return out.sin()

    compiles_like_eager(step, (torch.randn(1, 2, length, 16).to(dtype).to(device) for length in (20, 33)), terms=16)
