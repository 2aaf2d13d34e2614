"""What every backend's attention has to get right, as functions: `attention_conformance` and the tests call them.

The truth is `diffmax.reference.attention` in float64 on the CPU, which diffmax's own tests hold to entmax and to finite
differences. The gate is the one of the row operator.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import diffmax
from diffmax import AttentionStats
from diffmax.operators.attention import call as building
from diffmax.operators.attention.operator import BACKWARD, FORWARD
from diffmax.operators.common.numerics import accumulation_dtype
from diffmax.plugin import AttentionCall, Saved, Wanted
from diffmax.reference.dropout import kept
from diffmax.testing.attention.cases import CASES as CASES
from diffmax.testing.attention.cases import Case as Case
from diffmax.testing.common.checks import random_strided, repeats
from diffmax.testing.gate import Gate, gates, reordered
from diffmax.testing.rows import checks
from diffmax.testing.rows.cases import SPECIAL_ALPHAS, inf, nan
from diffmax.testing.rows.checks import _expect, _grad, _near_on_average, _opcheck, _unchanged, _within
from diffmax.testing.rows.nasty import NASTY_ROWS

# what they return depends on return_stats, which is passed among other keywords here
attention: Callable[..., Any] = diffmax.attention
attention_varlen: Callable[..., Any] = diffmax.attention_varlen


def forward_passes_the_gate(backend: str, device: str, case: Case, dtype: torch.dtype) -> None:
    """The output is as near to the truth as the gate asks."""
    inputs = case.inputs(dtype)
    wanted = _gate(case, inputs)
    given = _moved(device, inputs)
    with _unchanged(given.values()):
        ours = _call(backend, case, given)
    _expect(
        ours.dtype == dtype and ours.shape == wanted.exact.shape and ours.is_contiguous(),
        f"got {ours.dtype} {tuple(ours.shape)}",
    )
    _within(ours, *wanted, "output")


def gradients_are_right_on_average(
    backend: str, device: str, case: Case, dtype: torch.dtype, *, alpha_learns: bool = True
) -> None:
    """Forward and backward through autograd, for query, key, value, bias, sink and, where it can and is to be, alpha.

    The gate holds for the mean error, for the reason that `checks.gradients_are_right_on_average` gives; of alpha and the sink,
    for the mean over queries, before they are summed to one number per head. Where the backward is another backend's, its
    scores are not rounded as those that delta belongs to, and neither are the gate's.
    """
    inputs = case.inputs(dtype)
    learns = alpha_learns and gives_alpha_gradient(backend)
    if learns and not isinstance(case.alpha, tuple):
        inputs["alpha"] = torch.full((case.heads,), case.alpha, dtype=torch.float64)
    grad = random_strided(torch.empty(case.batch, case.heads, case.length, inputs["value"].shape[3])).to(dtype)
    given = _of_querys_dtype(inputs)
    whole = checks.provides(backend, "attention_backward")

    def gradients(grad: Tensor, *drawn: Tensor) -> tuple[Tensor, ...]:
        batch = _draws_as_batch(case, inputs, dict(zip(given, drawn, strict=True)))
        with nullcontext() if whole else _ForwardRoundsOtherwise():
            results = _gradients("reference", "cpu", case, batch, grad.flatten(0, 1), learns)
        results = {name: t.unflatten(0, (len(grad), case.batch)) for name, t in results.items()}
        if "attn_mask" in results and given["attn_mask"].shape[0] == 1:
            results["attn_mask"] = results["attn_mask"].sum(1, keepdim=True)
        return tuple(results.values())

    wanted = gates(gradients, grad, *given.values(), average=True, stacked=True, numbers=case.scores)
    ours = _gradients(backend, device, case, inputs, grad, learns)
    for (what, got), gate in zip(ours.items(), wanted, strict=True):
        _near_on_average(got, gate, f"gradient for {what}")


def packed_sequences_are_each_on_their_own(backend: str, device: str, dtype: torch.dtype) -> None:
    """attention_varlen gives what attention gives for each sequence alone, forward and backward; some are empty.

    Plain, causal, and with all that is claimed at once.
    """
    lengths = ((0, 3), (70, 70), (1, 129), (64, 0), (130, 65), (0, 0))
    heads, kv_heads, size = 4, 2, 24
    claimed = _both_ways(backend)
    causal = {"is_causal": True} if "causal" in claimed else {}
    kv_heads = kv_heads if "gqa" in claimed else heads
    value_size = 40 if "value_dim" in claimed else size
    query = (torch.randn(sum(q for q, _ in lengths), heads, size) * 1.5).to(dtype).to(device)
    key, value = ((torch.randn(sum(k for _, k in lengths), kv_heads, n) * 1.5).to(dtype).to(device) for n in (size, value_size))
    ends = [torch.tensor([0, *counts]).cumsum(0).to(torch.int32) for counts in zip(*lengths, strict=True)]
    grad = random_strided(torch.empty(1, heads, len(query), value_size))[0].transpose(0, 1).to(dtype).to(device)
    every = _all_at_once(backend, device, dtype, heads)
    learned = ["sink"] if "sink" in every else []
    learned += ["alpha"] if "alpha" in every and gives_alpha_gradient(backend) else []
    for options in ({}, causal, every) if every else ({}, causal):
        leaves = [t.clone().requires_grad_() for t in (query, key, value)]
        more: dict[str, Any] = {"alpha": 0.6, "enable_gqa": True, "backend": backend, **options}
        own, theirs = ({name: more[name].clone().requires_grad_() for name in learned if options is every} for _ in range(2))
        out = attention_varlen(*leaves, *(e.to(device) for e in ends), 130, 200, **(more | own))
        _expect(isinstance(out, Tensor) and out.is_contiguous(), "the result is not contiguous")
        out.backward(grad)
        alone, more = [t.clone().requires_grad_() for t in (query, key, value)], more | theirs
        pieces = []
        for n in range(len(lengths)):
            spans = [slice(int(e[n]), int(e[n + 1])) for e in (ends[0], ends[1], ends[1])]
            rows = [t[span].transpose(0, 1).unsqueeze(0) for t, span in zip(alone, spans, strict=True)]
            pieces.append(attention(*rows, causal_alignment="lower_right", **more)[0].transpose(0, 1))
        whole = torch.cat(pieces)
        whole.backward(grad)
        _within(out, whole.detach().cpu().double(), reordered(129, whole), "packed output")
        for what, a, b in zip(("query", "key", "value"), leaves, alone, strict=True):
            _within(_grad(a), _grad(b).cpu().double(), reordered(130, _grad(b)), f"packed gradient for {what}")
        for name, leaf in own.items():
            summed = _grad(theirs[name])
            allowed = 4 * reordered(len(query) * value_size, summed, dtype)
            _within(_grad(leaf), summed.cpu().double(), allowed, f"packed gradient for {name}")


def _both_ways(backend: str) -> frozenset[str]:
    """What is claimed for the forward, and for the backward, if it has one."""
    forward = checks.claimed(backend, "attention")
    if not checks.provides(backend, "attention_backward"):
        return forward
    return forward & checks.claimed(backend, "attention_backward")


def _all_at_once(backend: str, device: str, dtype: torch.dtype, heads: int) -> dict[str, Any]:
    """Options for all that is claimed of window, softcap, slopes, sink and an alpha per head."""
    acc = accumulation_dtype(dtype)
    per_head = {
        name: torch.linspace(first, last, heads).to(device=device, dtype=acc)
        for name, first, last in (("alibi_slopes", 0.01, 0.1), ("sink", -1, 1), ("alpha", 0.3, 0.8))
    }
    options: dict[str, tuple[str, Any]] = {
        "window": ("window_size", (60, 30)),
        "softcap": ("softcap", 6.0),
        "alibi": ("alibi_slopes", per_head["alibi_slopes"]),
        "sink": ("sink", per_head["sink"]),
        "tensor_alpha": ("alpha", per_head["alpha"]),
    }
    claimed = _both_ways(backend)
    return {name: given for feature, (name, given) in options.items() if feature in claimed}


def inputs_stay_as_they_are(backend: str, device: str, dtype: torch.dtype) -> None:
    """Of one query of one sequence, where what is given may look like a result, and of many; with all that is claimed."""
    options = _all_at_once(backend, device, dtype, 2)
    for batch, length in ((1, 1), (2, 70)):
        leaves = [torch.randn(batch, 2, n, 16).to(dtype).to(device).requires_grad_() for n in (length, 70, 70)]
        grad = torch.randn(batch, 2, length, 16).to(dtype).to(device)
        with _unchanged((*leaves, grad, *options.values())):
            attention(*leaves, backend=backend, **({"alpha": 0.6} | options)).backward(grad)


def strides_of_every_kind(backend: str, device: str, dtype: torch.dtype) -> None:
    """Tokens before heads, every other entry, expanded heads: what copies of them give, and so do their gradients."""
    base = torch.randn(2, 70, 3, 2, 32).to(dtype).to(device)
    views = {
        "tokens before heads": [base[..., :16][:, :, n].transpose(1, 2) for n in range(3)],
        "every other entry": [base[..., ::2][:, :, n].transpose(1, 2) for n in range(3)],
        "every other token": [base[:, ::2, n, :, :16].transpose(1, 2) for n in range(3)],
        "expanded heads": [base[:, :, n, :1, :16].transpose(1, 2).expand(2, 2, 70, 16) for n in range(3)],
    }
    for name, given in views.items():
        found = []
        for tensors in (given, [t.contiguous() for t in given]):
            leaves = [t.detach().requires_grad_() for t in tensors]
            out = attention(*leaves, alpha=0.6, backend=backend)
            found.append((out, *torch.autograd.grad(out.sin().sum(), leaves)))
        for what, ours, theirs in zip(("output", "query", "key", "value"), *found, strict=True):
            _within(ours, theirs.detach().cpu().double(), 2 * reordered(70, theirs, dtype), f"{name}: {what}")


def empty_calls(backend: str, device: str, dtype: torch.dtype) -> None:
    """No batch, no heads, no queries, no keys, no entries of a value: empty or zero, with gradients of their shapes."""
    sizes = [(0, 2, 5, 5, 8), (1, 0, 5, 5, 8), (1, 2, 0, 5, 8), (1, 2, 5, 0, 8)]
    sizes += [(1, 2, 5, 5, 0)] if "value_dim" in checks.claimed(backend, "attention") else []
    for batch, heads, length, keys, width in sizes:
        shapes = ((batch, heads, length, 8), (batch, heads, keys, 8), (batch, heads, keys, width))
        leaves = [torch.randn(shape).to(dtype).to(device).requires_grad_() for shape in shapes]
        out = attention(*leaves, alpha=0.6, backend=backend)
        _expect(out.shape == (batch, heads, length, width), f"got {tuple(out.shape)} of {shapes}")
        _expect(not bool(out.any()), f"nothing gives something: {shapes}")
        for shape, grad in zip(shapes, torch.autograd.grad(out, leaves, torch.ones_like(out)), strict=True):
            _expect(grad.shape == shape and not bool(grad.any()), f"got a gradient {tuple(grad.shape)} of {shape}")


def masked_and_bad_queries(backend: str, device: str, dtype: torch.dtype) -> None:
    """A query that sees nothing is zero and passes no gradient on; NaN and +inf in a query spoil that query alone."""
    query, key, value = (t.to(device) for t in Case(heads=1, kv_heads=1, batch=1, length=70, keys=70).tensors(dtype))
    query[..., 3, :] = nan
    query[..., 66, 0] = inf
    leaves = [t.clone().requires_grad_() for t in (query, key, value)]
    options: dict[str, Any] = {"alpha": 0.6, "backend": backend}
    out = attention(*leaves, **options).detach().cpu()[0, 0]
    _expect(bool(out[3].isnan().all() and out[66].isnan().all()), "a query of NaN or inf does not give NaN")
    keep = [i for i in range(70) if i not in (3, 66)]
    _expect(bool(out[keep].isfinite().all()), "NaN reached another query")
    if "causal" in checks.claimed(backend, "attention"):
        leaves = [t.clone().requires_grad_() for t in (query[..., :66, :], key[..., :50, :], value[..., :50, :])]
        early = attention(
            *leaves, is_causal=True, causal_alignment="lower_right", **options
        )  # the first 16 come before any key
        grad = torch.randn(early.shape).to(dtype).to(device)
        grad[..., 4, :] = nan
        early.backward(grad)
        _expect(bool((early[0, 0, :16] == 0).all()), "a query that sees nothing is not zero")
        _expect(bool((_grad(leaves[0])[0, 0, :16] == 0).all()), "a query that sees nothing has a gradient")
        _expect(
            all(bool(_grad(leaf).isfinite().all()) for leaf in leaves),
            "what a query that sees nothing holds reached a gradient",
        )
    if "mask" in checks.claimed(backend, "attention"):
        mask = torch.ones(70, 70, dtype=torch.bool, device=device)
        mask[:10], mask[:, 5], mask[66] = False, False, False
        leaves = [t.clone().requires_grad_() for t in (query, key, value)]
        hidden = attention(*leaves, mask, **options)
        grad = torch.randn(hidden.shape).to(dtype).to(device)
        grad[..., 4, :] = nan
        hidden.backward(grad)
        empty = [*range(10), 66]  # the two queries of NaN and inf, and the gradient of NaN, among them
        _expect(bool((hidden[0, 0, empty] == 0).all()), "a query that sees nothing is not zero")
        grads = [_grad(leaf).cpu()[0, 0] for leaf in leaves]
        _expect(bool((grads[0][empty] == 0).all()), "a query that sees nothing has a gradient")
        _expect(bool((grads[1][5] == 0).all() and (grads[2][5] == 0).all()), "a key that nobody sees has a gradient")
        _expect(all(bool(g.isfinite().all()) for g in grads), "what a query that sees nothing holds reached a gradient")


def special_alphas_pass_the_gate(
    backend: str, device: str, dtype: torch.dtype, alphas: Sequence[float] = SPECIAL_ALPHAS
) -> None:
    """`checks.special_alphas_pass_the_gate` of attention."""
    for alpha in alphas:
        case = Case(batch=1, heads=1, kv_heads=1, length=17, keys=33, alpha=alpha)
        try:
            forward_passes_the_gate(backend, device, case, dtype)
            gradients_are_right_on_average(backend, device, case, dtype, alpha_learns=False)
        except AssertionError as error:
            raise AssertionError(f"alpha={alpha!r}: {error}") from None


def nasty_rows_pass_the_gate(backend: str, device: str, dtype: torch.dtype, alpha: float) -> None:
    """Ties, huge offsets, masks: each row of NASTY_ROWS as the scores of one query, exactly, and its weights as the output."""
    for name, row in NASTY_ROWS.items():
        x = torch.tensor(row, dtype=torch.float64).to(dtype)
        if bool((x == inf).any()):  # 1e30 in float16
            continue
        hidden = x == -inf
        if bool(hidden.any()) and "mask" not in checks.claimed(backend, "attention"):
            continue  # such a row needs the feature; the kit asks elsewhere that it is refused
        key = torch.where(hidden, 0.0, x).view(1, 1, -1, 1)
        query, value = torch.ones(1, 1, 1, 1, dtype=dtype), torch.eye(len(row), dtype=dtype).view(1, 1, len(row), -1)
        if "value_dim" not in checks.claimed(backend, "attention"):
            query, key = (torch.nn.functional.pad(t, (0, len(row) - 1)) for t in (query, key))
        mask = None if not bool(hidden.any()) else ~hidden.view(1, 1, 1, -1)
        case = Case(batch=1, heads=1, kv_heads=1, length=1, keys=len(row), alpha=alpha, options={"scale": 1.0})
        inputs = {"query": query, "key": key, "value": value, "attn_mask": mask, "alpha": alpha}
        try:
            _within(_call(backend, case, _moved(device, inputs)), *_gate(case, inputs), "weights")
        except AssertionError as error:
            raise AssertionError(f"row {name!r}: {error}") from None


def dropout_keeps_what_the_contract_says(backend: str, device: str, dtype: torch.dtype) -> None:
    """Bit for bit the weights that `reference_dropout.kept` keeps, forward and backward, drawn from torch's generator."""
    batch, heads, length, keys, share = 2, 3, 70, 90, 0.4
    query = torch.zeros(batch, heads, length, keys, dtype=dtype, device=device)  # all weights are 1 / keys
    key = torch.zeros(batch, heads, keys, keys, dtype=dtype, device=device)
    value = torch.eye(keys, dtype=dtype, device=device).expand(batch, heads, keys, keys).clone().requires_grad_()

    torch.manual_seed(5)
    seed = building.draw_seed(share, query.device)
    torch.manual_seed(5)
    out = attention(query, key, value, dropout_p=share, alpha=0.5, backend=backend)
    call = AttentionCall(scale=1.0, e=0.5, dropout_p=share, seed=seed)
    expected = kept(call, (batch, heads, length, keys), torch.float32).cpu() != 0
    _expect(torch.equal(out.detach().cpu() != 0, expected), "not the weights are dropped that the contract says")
    again = attention(query, key, value, dropout_p=share, alpha=0.5, backend=backend)
    _expect(not torch.equal(again, out), "a second call drops the same weights")
    out.backward(torch.ones_like(out))
    sums = (expected.double() / keys / (1 - share)).sum(2).unsqueeze(3).expand(value.shape)
    allowed = length * torch.finfo(dtype).eps * float(sums.max())  # the weights are equal, and so are their errors: they add up
    _within(_grad(value), sums, allowed, "the value's gradient under the same mask")


def residuals_are_exchangeable(backend: str, device: str, dtype: torch.dtype) -> None:
    """Its backward follows the reference's forward, and the reference's backward its forward."""
    case = Case(length=130, keys=200, sigma=3.0, alpha=0.5)
    tensors = case.tensors(dtype)
    grad = torch.randn(2, 2, 130, 16).to(dtype)
    call, needs_e = AttentionCall(scale=0.25, e=0.5), gives_alpha_gradient(backend)

    def run(forward: str, backward: str, grad: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        _, *saved, _ = FORWARD(*tensors, True, False, call, forward)
        m, delta, u, _ = saved
        _expect(m.shape == delta.shape == (2, 2, 130), f"m and delta have shapes {tuple(m.shape)}, {tuple(delta.shape)}")
        _expect(u.shape == (2, 2, 130, 16) and u.dtype == grad.dtype, f"u is {u.dtype} {tuple(u.shape)}")
        given = (grad, *tensors, Saved(*saved), Wanted(needs_e), call, backward)
        results = BACKWARD(*given)
        return tuple(results[: 3 + needs_e])

    def exact(*given: Tensor) -> tuple[Tensor, ...]:
        with _ForwardRoundsOtherwise():
            return run("reference", "reference", *given)

    wanted = gates(exact, grad, *tensors, average=True, numbers=case.scores)
    for forward, backward in ((backend, "reference"), ("reference", backend), (backend, backend)):
        for ours, gate in zip(run(forward, backward, *(t.to(device) for t in (grad, *tensors))), wanted, strict=True):
            _near_on_average(ours, gate, "gradient from exchanged residuals")


def statistics_are_right(backend: str, device: str, dtype: torch.dtype) -> None:
    """tau, support sizes and the share of empty tiles are the reference's, but for scores that lie at the threshold itself."""
    for options in ({}, {"is_causal": True}):
        if options and "causal" not in checks.claimed(backend, "attention"):
            continue  # not claimed: the kit asks elsewhere that it is refused
        case = Case(batch=1, length=200, keys=300, sigma=3.0)
        query, key, value = case.tensors(dtype)
        key[:, :, 64:128] *= 0.01  # a tile that loses
        found = []
        for name, where in ((backend, device), ("reference", "cpu")):
            out = attention(*(t.to(where) for t in (query, key, value)), alpha=0.5, return_stats=True, backend=name, **options)
            found.append(AttentionStats(*(t.cpu() for t in out[1])))
        ours, theirs = found
        _within(ours.tau, theirs.tau.double(), reordered(300, theirs.tau), "tau")
        differing = int((ours.support_size != theirs.support_size).sum())
        _expect(differing <= 2, f"{differing} support sizes differ")
        _expect(bool((ours.tile_sparsity > 0).any()), "the example has no empty tile")
        _within(ours.tile_sparsity, theirs.tile_sparsity.double(), 0.05, "tile sparsity")


def one_tensor_for_all(backend: str, device: str, dtype: torch.dtype) -> None:
    """attention(x, x, x) works, and its gradient is the sum of three."""
    x = torch.randn(1, 2, 70, 16).to(dtype).to(device)
    together = x.clone().requires_grad_()
    apart = [x.clone().requires_grad_() for _ in range(3)]
    attention(together, together, together, alpha=0.6, backend=backend).square().sum().backward()
    attention(*apart, alpha=0.6, backend=backend).square().sum().backward()
    total = sum(_grad(leaf).double() for leaf in apart)
    assert isinstance(total, Tensor)
    _within(_grad(together), total.cpu(), reordered(70, total, dtype), "gradient")


def is_repeatable(backend: str, device: str, dtype: torch.dtype) -> None:
    """The same input gives the same bits, forward and backward, in fresh memory full of NaN too."""
    case = Case(heads=4, kv_heads=4, length=150, keys=170, sigma=3.0)
    tensors = [t.to(device) for t in case.tensors(dtype)]

    def run() -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in tensors]
        out = attention(*leaves, alpha=0.5, backend=backend)
        out.sum().backward()
        return [out.detach(), *map(_grad, leaves)]

    repeats(run)


def passes_opcheck(backend: str, device: str, dtype: torch.dtype) -> None:
    """torch.library.opcheck: schema, gradients, shapes for tracing."""
    query, key, value = (t.to(device).requires_grad_() for t in Case(batch=1, length=5, keys=7).tensors(dtype))
    arguments = FORWARD.flatten(query, key, value, False, False, AttentionCall(scale=0.25, e=0.5), backend)
    _opcheck("attention", device, arguments)


def compiles_in_one_graph(backend: str, device: str, dtype: torch.dtype) -> None:
    """torch.compile(fullgraph=True, dynamic=True), forward and backward, equals eager; a new length compiles nothing anew.

    Before torch 2.5 it does.
    """
    torch._dynamo.reset()
    graphs, counts = [], []

    def attend(x: Tensor, alpha: Tensor) -> Tensor:
        out: Tensor = attention(x * 2, x, x, alpha=alpha, backend=backend)
        return out * x

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        compiled: Callable[..., Any] = torch._dynamo.lookup_backend("aot_eager")(graph, inputs)
        return compiled

    compiled: Callable[[Tensor, Tensor], Tensor] = torch.compile(attend, fullgraph=True, dynamic=True, backend=count)
    for length in (70, 100, 200):
        x = torch.randn(2, 3, length, 16).to(dtype).to(device)
        results = []
        for function in (compiled, attend):
            leaves = (x.clone().requires_grad_(), torch.full((3,), 0.6, device=device).requires_grad_())
            function(leaves[0], leaves[1] if gives_alpha_gradient(backend) else leaves[1].detach()).sum().backward()
            results.append(_grad(leaves[0]))
        _within(results[0], results[1].cpu().double(), reordered(length, results[1]), "compiled gradient")
        counts.append(len(graphs))
    grows = not hasattr(torch.library, "register_vmap")  # torch 2.4
    _expect(grows or counts[0] == counts[-1], f"the number of graphs grew with the lengths: {counts}")


def gives_alpha_gradient(backend: str) -> bool:
    """Whether alpha's gradient arrives when the backend is named: it claims it, or leaves the backward to others."""
    if "tensor_alpha" not in checks.claimed(backend, "attention"):
        return False
    return "alpha_gradient" in checks.claimed(backend, "attention_backward") or not checks.provides(
        backend, "attention_backward"
    )


def _gate(case: Case, inputs: dict[str, Any]) -> Gate:
    given = _of_querys_dtype(inputs)

    def output(*drawn: Tensor) -> Tensor:
        batch = _draws_as_batch(case, inputs, dict(zip(given, drawn, strict=True)))
        together: Tensor = _call("reference", case, batch).unflatten(0, (len(drawn[0]), case.batch))
        return together

    return gates(output, *given.values(), stacked=True, numbers=case.scores)[0]


def _draws_as_batch(case: Case, inputs: dict[str, Any], drawn: dict[str, Tensor]) -> dict[str, Any]:
    """The inputs of one call that computes all draws, each of which fills a batch."""
    draws = len(drawn["query"])
    batch = {name: t.expand(draws, case.batch, *t.shape[2:]).flatten(0, 1) for name, t in drawn.items()}
    repeated = {
        name: t.repeat(draws, *[1] * (t.ndim - 1))
        for name, t in inputs.items()
        if isinstance(t, Tensor) and t.ndim > 1 and len(t) > 1
    }
    return inputs | repeated | batch


def _of_querys_dtype(inputs: dict[str, Any]) -> dict[str, Tensor]:
    # alpha is converted by `attention`, slopes and sink hold the same numbers in every dtype
    given = {name: inputs.get(name) for name in ("query", "key", "value", "attn_mask")}
    return {name: t for name, t in given.items() if isinstance(t, Tensor) and t.is_floating_point()}


def _moved(device: str, inputs: dict[str, Any]) -> dict[str, Any]:
    # numbers per head in float64 where the device has it, so that 0.999 is 0.999; tensors in the dtype that is asked for
    wide = torch.device(device).type in ("cpu", "cuda")

    def move(name: str, given: Any) -> Any:
        if not isinstance(given, Tensor):
            return given
        exact = wide or given.dtype != torch.float64 or name in ("query", "key", "value", "attn_mask")
        return given.to(device) if exact else given.float().to(device)

    return {name: move(name, given) for name, given in inputs.items()}


def _same_dropout(dropout_p: float, device: torch.device) -> Tensor | None:
    # generators of different devices draw different numbers
    return torch.tensor([123456789, 987654321], device=device) if dropout_p > 0 else None


def _call(backend: str, case: Case, inputs: dict[str, Any]) -> Tensor:
    with mock.patch.object(building, "draw_seed", _same_dropout):
        out: Tensor = attention(**inputs, enable_gqa=True, backend=backend, **case.options)
    return out


def _gradients(
    backend: str, device: str, case: Case, inputs: dict[str, Any], grad: Tensor, learns_alpha: bool
) -> dict[str, Tensor]:
    inputs, grad = _moved(device, inputs), grad.to(device)
    wanted = [name for name in ("query", "key", "value", "attn_mask", "sink", "alpha") if isinstance(inputs.get(name), Tensor)]
    wanted = [name for name in wanted if inputs[name].is_floating_point() and (learns_alpha or name != "alpha")]
    leaves = {name: inputs[name].clone().requires_grad_() for name in wanted}
    with _unchanged((*inputs.values(), grad, *leaves.values())):
        out = _call(backend, case, inputs | leaves)
        with _Recorder() as recorder:
            out.backward(grad)
    gradients = {name: _grad(leaf).detach() for name, leaf in leaves.items()}
    for name, sign, per_query in (("alpha", -1, recorder.grad_e), ("sink", 1, recorder.grad_sink)):
        if name in leaves:
            total, summed = sign * per_query.sum((0, 2)).double(), gradients[name].double()
            allowed = reordered(case.batch * case.length, per_query.abs().sum((0, 2)))
            _within(summed, total.cpu(), allowed, f"{name}'s gradient against its sum over the queries")
            gradients[name] = sign * per_query
    return gradients


class _ForwardRoundsOtherwise(TorchDispatchMode):
    """Attention's forward sums each score in the opposite order: two backends' roundings, by one backend."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is torch.ops.diffmax.attention.default:
            query, key, *others = args
            args = (query.flip(-1), key.flip(-1), *others)
        return func(*args, **(kwargs or {}))


class _Recorder(TorchDispatchMode):
    """Notes the gradients for e and the sink that attention's backward computed for every query."""

    grad_e: Tensor
    grad_sink: Tensor

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        if func is torch.ops.diffmax.attention_backward.default:
            self.grad_e, self.grad_sink = results[3], results[5]
        return results
