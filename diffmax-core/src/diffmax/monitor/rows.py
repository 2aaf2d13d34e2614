"""`diffmax_bisect_monitored`: the row operator of one call, and its metrics."""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack

from diffmax.machine.dispatch import selected
from diffmax.machine.forked import alone_in_child
from diffmax.monitor.logs import Log, check_step, log_of, read
from diffmax.monitor.metrics import alpha_metrics, convergence_metrics, forward_metrics
from diffmax.operators.common.checks import OR_FUNCTION, as_int, check_scores, one_minus_alpha
from diffmax.operators.common.numerics import accumulation_dtype
from diffmax.operators.rows.api import Alpha, normalize


def diffmax_bisect_monitored(
    X: Tensor,
    alpha: Alpha = 0.9,
    dim: int = -1,
    n_iter: int = 50,
    ensure_sum_one: bool = True,
    *,
    name_prefix: str = "diffmax",
    step: int | None = None,
    every: int = 1,
    log: Log | None = None,
    extra_metadata: Mapping[str, float | Tensor] | None = None,
    backend: str | None = None,
) -> Tensor:
    """`diffmax_bisect`, bit for bit, that logs its metrics to swanlab or to a function.

    A logged call logs one dictionary in forward, and one more when its gradient has been computed. Without a step, or at a step
    that is not logged, this is exactly `diffmax_bisect`: no operator is added to the graph.

    Args:
        X, alpha, dim, n_iter, ensure_sum_one, backend: As for `diffmax_bisect`.
        name_prefix: Prefix of every metric name. Use a different one per layer.
        step: The training step of the metrics. None: nothing is logged.
        every: Log only steps that are a multiple of it.
        log: Called as `log(metrics, step=step)`. None: `swanlab.log`, into the run that `swanlab.init` started.
        extra_metadata: More numbers to log with the metrics, by name, such as a layer index or a loss; a tensor with one entry
            is a number too. `name_prefix` is added to their names as well.
    Returns:
        What `diffmax_bisect` returns.
    Raises:
        ImportError: Something is to be logged, `log` is None and swanlab is not installed.
        TypeError, ValueError: `step`, `every` or an entry of extra_metadata is not a valid number; and as for `diffmax_bisect`.
        RuntimeError: From swanlab, if no run was started.
        NotImplementedError: Something is to be logged under torch.func, or of scores on the device "meta".

    The metrics, over rows that are not fully masked and hold no NaN:

    - `forward/`: `support_mean`, `support_max`, `zeros_share` (of the visible entries), `entropy_mean` (nats),
      `row_max_mean`, `sink_rate` (the share of maps in which a key's mean weight exceeds 0.3, for the key with the largest
      share), `sink_rate_first` (the same for the first key), `rows_masked` and `rows_nan` (excluded rows).
    - `alpha/`: `mean`, `min`, `max`.
    - `convergence/`: `tau_mean`, `residual_mean` and `residual_max` (the sum of the weights minus 1, before any division),
      `iterations_mean` and `iterations_max` (steps of Eq. 2 that change the tau of a row).
    - `backward/`: `grad_weights_norm`, `grad_scores_norm`, and `grad_alpha_norm` if alpha requires a gradient.

    Numerics: A logged call waits for the device once in forward and once in backward, and repeats the solver's steps in plain
        PyTorch to count them. It takes several times as long as a bare call, so log every hundredth step. Under torch.compile
        a logged call breaks the graph.
    Source: The sink rate is that of arXiv:2410.10781. Written for diffmax.
    Example:
        >>> import torch
        >>> scores = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
        >>> def show(metrics, *, step):
        ...     print(step, metrics["encoder/forward/support_mean"], metrics["encoder/forward/zeros_share"])
        >>> diffmax_bisect_monitored(scores, 0.5, name_prefix="encoder", step=7, log=show)
        7 2.0 0.5
        tensor([[0.8307, 0.1693, 0.0000, 0.0000]])
    """
    dim = check_scores("diffmax_bisect_monitored", X, dim, n_iter)
    e, e_tensor = one_minus_alpha("diffmax_bisect_monitored", X, alpha() if callable(alpha) else alpha, dim, OR_FUNCTION)
    check_step("diffmax_bisect_monitored", step, every)
    extra = _checked_metadata(extra_metadata)
    if step is None or step % every != 0:
        return normalize(X, e, e_tensor, dim, n_iter, ensure_sum_one, backend)
    log = log_of("diffmax_bisect_monitored", log)
    run = torch.compiler.disable(_logged) if torch.compiler.is_compiling() else _logged
    return run(X, e, e_tensor, dim, n_iter, ensure_sum_one, backend, name_prefix, step, log, extra)


def _checked_metadata(extra: Mapping[str, float | Tensor] | None) -> dict[str, float | Tensor]:
    if extra is not None and not isinstance(extra, Mapping):
        raise TypeError(f"diffmax_bisect_monitored: extra_metadata must be a dictionary, got {type(extra).__name__}")
    for name, number in (extra or {}).items():
        single = isinstance(number, Tensor) and number.numel() == 1 and not number.is_complex()
        if not isinstance(name, str) or not (single or isinstance(number, numbers.Real)):
            raise TypeError(
                f"diffmax_bisect_monitored: extra_metadata must hold numbers by name, got {number!r} for {name!r}\n"
                "a text goes into name_prefix"
            )
    return dict(extra or {})


@alone_in_child
def _logged(
    X: Tensor,
    e: float,
    e_tensor: Tensor | None,
    dim: int,
    n_iter: int,
    ensure_sum_one: bool,
    backend: str | None,
    prefix: str,
    step: int,
    log: Log,
    extra: dict[str, float | Tensor],
) -> Tensor:
    if X.is_meta or peek_interpreter_stack() is not None:
        raise NotImplementedError(
            'diffmax_bisect_monitored: no numbers can be read under torch.func and on the device "meta", got step '
            f"{step} to log\npass step=None there, which logs nothing"
        )
    if X.ndim == 0:
        one_entry = (X.reshape(1), e, e_tensor, 0, n_iter, ensure_sum_one, backend, prefix, step, log, extra)
        return _logged(*one_entry).reshape(())
    gradients: dict[str, Tensor] = {}

    def send_gradients() -> None:
        if gradients:
            _send(gradients, f"{prefix}/backward", step, log)
            gradients.clear()

    def keep_size(grad: Tensor | None) -> None:
        if grad is not None:
            gradients["grad_weights_norm"] = _norm(grad)

    watched = torch.is_grad_enabled() and (X.requires_grad or (e_tensor is not None and e_tensor.requires_grad))
    x, row_e = _Watch.apply(X, e_tensor, gradients, send_gradients) if watched else (X, e_tensor)
    p, m, delta = torch.ops.diffmax.bisect(x, e, row_e, dim, as_int(n_iter), bool(ensure_sum_one), selected(backend))
    if watched:
        p.register_hook(keep_size)
    with torch.no_grad():
        given_e = torch.as_tensor(e, dtype=m.dtype, device=m.device) if e_tensor is None else e_tensor
        rows = (X.detach(), p.detach(), m, delta, given_e.detach(), dim)
        metrics = forward_metrics(*rows) | alpha_metrics(given_e) | convergence_metrics(*rows, n_iter)
        for name, number in extra.items():
            metrics[name] = torch.as_tensor(number, device=m.device).detach().reshape(())
        _send(metrics, prefix, step, log)
    result: Tensor = p
    return result


class _Watch(torch.autograd.Function):
    """The scores and e, unchanged. Backward measures the norms of their gradients from this call only."""

    @staticmethod
    def forward(ctx: Any, X: Tensor, e_tensor: Tensor | None, gradients: dict[str, Tensor], send: Any) -> Any:
        ctx.gradients, ctx.send = gradients, send
        return X.view_as(X), None if e_tensor is None else e_tensor.view_as(e_tensor)

    @staticmethod
    def backward(ctx: Any, grad_x: Tensor | None, grad_e: Tensor | None) -> Any:
        if ctx.needs_input_grad[0] and grad_x is not None:
            ctx.gradients["grad_scores_norm"] = _norm(grad_x)
        if ctx.needs_input_grad[1] and grad_e is not None:
            ctx.gradients["grad_alpha_norm"] = _norm(grad_e)
        ctx.send()
        return grad_x, grad_e, None, None


@alone_in_child
def _norm(gradient: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(gradient.detach(), dtype=accumulation_dtype(gradient.dtype))
    return norm


def _send(metrics: dict[str, Tensor], prefix: str, step: int, log: Log) -> None:
    """Log the metrics, with one read from the device."""
    log({f"{prefix}/{name}": value for name, value in read(metrics).items()}, step=step)
