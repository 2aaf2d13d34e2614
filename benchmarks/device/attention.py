"""Attention: diffmax beside torch's flash and cuDNN attention, FlexAttention and AdaSplash; and diffmax's options."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import diffmax
from benchmarks.attention_options import OPTIONS, learned
from benchmarks.device import allowed, rivals
from benchmarks.device.contest import Contestant, poisoned
from benchmarks.device.contest import compete as contest
from benchmarks.device.context import Context, WrongError
from benchmarks.device.inputs import tensors

PREPARED = 512  # tokens
BLOCK = 512  # queries of the oracle at a time
SAMPLED = 4  # blocks of queries that are judged; no other has a gradient, so that those of keys and values are theirs
RIVAL_ULP = 64

Attend = Callable[..., Tensor]


def compete(
    context: Context,
    scores: str,
    alpha: float,
    length: int,
    head_dim: int,
    sparsity: float,
    heads: int,
    dtype: str,
    flex: bool,
) -> dict[str, Any]:
    """Forward, backward, both, on one set of tensors."""
    place = context.place
    length = min(length, PREPARED) if context.prepare else length
    query, key, value, causal = tensors(context, scores, length, heads, head_dim, alpha, sparsity, dtype)
    grouped = query.shape[1] != key.shape[1]

    def ours(*given: Tensor, **more: Any) -> Any:
        options = {"is_causal": causal, "enable_gqa": grouped, "alpha": alpha, "backend": place.backend, **more}
        return diffmax.attention(*given, **options)

    def drawn() -> tuple[Tensor, Tensor, Tensor]:
        return tensors(context, scores, length, heads, head_dim, alpha, sparsity, dtype)[:3]

    def of(build: Callable[[], Attend], *, own: bool = False, entmax: bool = False) -> Callable[[], Contestant]:
        def built() -> Contestant:
            attend = build()
            check = (lambda: judged(context, attend, drawn(), alpha, causal)) if own else None
            if check is None:
                check = lambda: resembles(context, attend, (query, key, value), alpha if entmax else None, causal)  # noqa: E731
            return Contestant(passes(attend, query, key, value), check, graph=("forward",))

        return built

    field = {"diffmax": of(lambda: ours, own=True)}
    if not context.prepare:
        wide = key.repeat_interleave(query.shape[1] // key.shape[1], 1) if grouped else key
        wide_value = value.repeat_interleave(query.shape[1] // key.shape[1], 1) if grouped else value
        more = {"is_causal": causal, "enable_gqa": grouped}

        def torch_own(name: str) -> Callable[[], Attend]:
            return lambda: (lambda attend: lambda *given: attend(*given, **more))(rivals.sdpa(name))

        def repeated(build: Callable[[], Attend]) -> Callable[[], Attend]:
            # who knows no groups of heads gets every head's keys: laid out outside the clock
            return lambda: (lambda attend: lambda q, k, v: attend(q, wide, wide_value) if grouped else attend(q, k, v))(build())

        names = ("flash", "cudnn") if place.graphs else ("any",)
        field |= {f"sdpa_{name}" if name != "any" else "sdpa": of(torch_own(name)) for name in names}
        if place.device == "npu":
            field["npu_fusion_attention"] = of(lambda: rivals.fused_npu(heads, length, head_dim))
        if flex:
            field["flex"] = of(repeated(lambda: rivals.flex(length, place.device, causal=causal)))
        if not grouped and place.graphs:
            field["adasplash"] = of(lambda: rivals.adasplash(alpha, causal=causal), entmax=True)
    found = {} if context.prepare else facts(ours, query, key, value)
    return {**found, **contest(context, field)}


def option(
    context: Context,
    option: str,
    scores: str,
    alpha: float,
    length: int,
    head_dim: int,
    sparsity: float,
    heads: int,
    dtype: str,
) -> dict[str, Any]:
    """One option, and the plain call beside it."""
    place = context.place
    length = min(length, PREPARED) if context.prepare else length
    query, key, value, _ = tensors(context, scores, length, heads, head_dim, alpha, sparsity, dtype)

    def of(name: str) -> Callable[[], Contestant]:
        arguments = given(name, length, heads, place.device)

        def attend(*tensors: Tensor, **more: Any) -> Tensor:
            out: Any = diffmax.attention(*tensors, **{"alpha": alpha, "backend": place.backend, **arguments, **more})
            return out[0] if arguments.get("return_stats") else out

        def check() -> dict[str, Any]:
            if arguments.get("dropout_p") or not place.real:
                return {"checked": []}  # smoke has it, with the weights that are dropped known
            return judged(context, attend, (query, key, value), alpha, False, blocks=1, arguments=arguments)

        return lambda: Contestant(passes(attend, query, key, value, learned(arguments)), check)

    names = {"diffmax": option} | ({"plain": "plain"} if option != "plain" and not context.prepare else {})
    return contest(context, {name: of(which) for name, which in names.items()}, 30.0)


def given(name: str, length: int, heads: int, device: str) -> dict[str, Any]:
    """The option's arguments on the device, one number per head where it takes one."""
    arguments: dict[str, Any] = {}
    for key, value in OPTIONS[name](length).items():
        if isinstance(value, Tensor):
            moved = value.detach().to(device)
            moved = moved.expand(heads).contiguous() if moved.shape == (1,) else moved
            value = moved.requires_grad_(value.requires_grad)
        arguments[key] = value
    return arguments


def passes(
    attend: Attend, query: Tensor, key: Tensor, value: Tensor, more: Sequence[Tensor] = ()
) -> dict[str, Callable[[], object]]:
    """What is timed; the graph that a backward needs is made at its first call."""
    leaves = [t.detach().requires_grad_() for t in (query, key, value)]
    wanted = [*leaves, *more]
    kept: list[Tensor] = []
    grad = torch.randn((*query.shape[:3], value.shape[3]), device=query.device).to(query.dtype)

    def backward() -> object:
        if not kept:
            kept.append(attend(*leaves))
        return torch.autograd.grad(kept[0], wanted, grad, retain_graph=True, allow_unused=True)

    return {
        "forward": torch.no_grad()(lambda: attend(query, key, value)),
        "backward": backward,
        "both": lambda: torch.autograd.grad(attend(*leaves), wanted, grad, allow_unused=True),
    }


def facts(ours: Attend, query: Tensor, key: Tensor, value: Tensor) -> dict[str, Any]:
    """Shares of empty tiles and of weights that are 0; nothing where even that fails, as the contest says why."""
    try:
        _, stats = ours(query, key, value, return_stats=True)
        seen = query.shape[2] * key.shape[2]
        return {
            "empty_tiles": float(stats.tile_sparsity.float().mean()),
            "support": float(stats.support_size.float().mean()),
            "scores_of_a_head": seen,
        }
    except Exception as error:  # noqa: BLE001  (the contest meets it again and says so in diffmax's own line)
        return {"facts_reason": f"{type(error).__name__}: {error}"}


def judged(
    context: Context,
    attend: Attend,
    given_tensors: tuple[Tensor, Tensor, Tensor],
    alpha: float,
    causal: bool,
    blocks: int = 0,
    arguments: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Output and gradients in poisoned memory, of one group of heads, against the reference in float64 by blocks of queries.

    Queries outside those blocks get no gradient, so that the gradients for keys and values are theirs alone, and all judged.
    """
    query, key, value = given_tensors
    length, group = query.shape[2], query.shape[1] // key.shape[1]
    starts = sampled(length, blocks or SAMPLED)
    rows = torch.cat([torch.arange(a, min(a + BLOCK, length)) for a in starts]).to(query.device)
    grad = torch.zeros((*query.shape[:3], value.shape[3]), dtype=query.dtype, device=query.device)
    grad[:, :, rows] = context.randn(*query.shape[:2], len(rows), value.shape[3]).to(query.dtype)
    leaves = [t.detach().requires_grad_() for t in given_tensors]
    with poisoned():
        out = attend(*leaves)
        grads = torch.autograd.grad(out, leaves, grad)
    head = context.seed % key.shape[1]
    own = slice(head * group, (head + 1) * group)
    if arguments and set(arguments) - {"is_causal", "alpha", "return_stats"}:
        return _finite(out, grads)  # its small cases are smoke's; here it is looked at for NaN alone
    causal = causal or bool(arguments and arguments.get("is_causal"))
    parts = [t[:, own if t.shape[1] == query.shape[1] else slice(head, head + 1)].detach() for t in (query, key, value)]
    kinds = (torch.float64, torch.float32 if query.dtype == torch.float64 else query.dtype)
    truth, yardstick = (_by_blocks(context, parts, grad[:, own], alpha, causal, starts, kind) for kind in kinds)
    found = {"out": out[:, own, rows], "dq": grads[0][:, own, rows]}
    found |= {"dk": grads[1][:, head : head + 1], "dv": grads[2][:, head : head + 1]}
    figures: dict[str, Any] = {"checked": sorted(found), "blocks": len(starts)}
    for what, got in found.items():
        exact, same = truth[what], yardstick[what]
        difference = (got.detach().double().to(exact.device) - exact).abs()
        if what == "out":
            error, limit = float(difference.max()), allowed.largest(exact, same)
        else:
            error, limit = float(difference.mean()), allowed.average(exact, same, query.dtype)
        figures |= {f"{what}_error": error, f"{what}_allowed": limit}
        if not error <= limit:
            raise WrongError(f"{what}: error {error:.3g}, allowed {limit:.3g}", error=error, allowed=limit, **figures)
    return figures


def sampled(length: int, count: int) -> list[int]:
    """Where the blocks of queries begin that are judged: the first, the last, and some between."""
    starts = list(range(0, length, BLOCK))
    if len(starts) <= count:
        return starts
    return [starts[round(i * (len(starts) - 1) / max(1, count - 1))] for i in range(count)]


def _by_blocks(
    context: Context,
    parts: Sequence[Tensor],
    grad: Tensor,
    alpha: float,
    causal: bool,
    starts: Sequence[int],
    kind: torch.dtype,
) -> dict[str, Tensor]:
    """The reference's output and gradients in a dtype, for blocks of queries and the keys that they see."""
    device = context.place.float64()
    query, key, value = (t.to(device, kind) for t in parts)
    grad = grad.to(device, kind)
    length, keys, group = query.shape[2], key.shape[2], query.shape[1]
    sums = [torch.zeros(t.shape, dtype=torch.float64, device=device) for t in (key, value)]
    outs, queries = [], []
    for start in starts:
        end = min(start + BLOCK, length)
        seen = end if causal else keys  # L and S are the same where it is causal
        leaves = [t.detach().requires_grad_() for t in (query[:, :, start:end], key[:, :, :seen], value[:, :, :seen])]
        out = diffmax.attention(
            *leaves, is_causal=causal, causal_alignment="lower_right", enable_gqa=group > 1, alpha=alpha, backend="reference"
        )
        grads = torch.autograd.grad(out, leaves, grad[:, :, start:end])
        outs.append(out.detach())
        queries.append(grads[0])
        for total, part in zip(sums, grads[1:], strict=True):
            total[:, :, :seen] += part
    dk, dv = (total.to(kind) for total in sums)
    return {"out": torch.cat(outs, 2), "dq": torch.cat(queries, 2), "dk": dk, "dv": dv}


def _finite(out: Tensor, grads: Sequence[Tensor]) -> dict[str, Any]:
    for what, t in zip(("out", "dq", "dk", "dv"), (out, *grads), strict=False):
        if not bool(t.isfinite().all()):
            raise WrongError(f"{what} is not finite", error=float("nan"), allowed=0.0)
    return {"checked": ["finite"]}


def resembles(
    context: Context, attend: Attend, given_tensors: tuple[Tensor, Tensor, Tensor], alpha: float | None, causal: bool
) -> dict[str, Any]:
    """A rival has only to show that it computes what its name says: on the last block of queries, within 64 ulp."""
    query, key, value = given_tensors
    with torch.no_grad():
        out = attend(query, key, value)
    group = query.shape[1] // key.shape[1]
    device = context.place.float64()
    start = max(0, query.shape[2] - BLOCK // 4)
    q, k, v = (t.to(device, torch.float64) for t in (query[:, :group, start:], key[:, :1], value[:, :1]))
    if alpha is not None:
        options = {"is_causal": causal, "causal_alignment": "lower_right", "enable_gqa": group > 1, "backend": "reference"}
        exact = diffmax.attention(q, k, v, alpha=alpha, **options)
    else:
        s = q @ k.mT * q.shape[3] ** -0.5
        if causal:
            hidden = torch.ones(s.shape[2:], dtype=torch.bool, device=device).triu(1 + s.shape[3] - s.shape[2])
            s = s.masked_fill(hidden, -torch.inf)
        exact = torch.softmax(s, -1) @ v
    error = float((out[:, :group, start:].double().to(device) - exact).abs().max())
    limit = RIVAL_ULP * torch.finfo(query.dtype).eps * max(0.1, float(exact.abs().max()))
    if not error <= limit:
        raise WrongError(f"the output errs by {error:.3g}, allowed {limit:.3g}", error=error, allowed=limit)
    return {"error": error}
