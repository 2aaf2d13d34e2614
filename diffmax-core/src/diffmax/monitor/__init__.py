"""What is measured while a model is trained: `diffmax_bisect_monitored` of one call, `Monitor` of all calls in a model."""

from __future__ import annotations

import numbers
import threading
import warnings
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch._C._functorch import peek_interpreter_stack

from diffmax.machine.dispatch import selected
from diffmax.monitor.calls import Sums, metrics_of, of_attention, of_rows, together
from diffmax.monitor.metrics import alpha_metrics, convergence_metrics, forward_metrics
from diffmax.operators.common.checks import OR_FUNCTION, as_int, check_scores, one_minus_alpha
from diffmax.operators.common.numerics import accumulation_dtype
from diffmax.operators.common.watch import watchers
from diffmax.operators.rows.api import Alpha, normalize
from diffmax.plugin import AttentionCall

__all__ = ["Log", "diffmax_bisect_monitored"]


class Log(Protocol):
    """Where metrics go: `swanlab.log` and `wandb.log` are of this kind, and so is any function of these two arguments."""

    def __call__(self, metrics: dict[str, float], *, step: int) -> object:
        """Take the metrics of one call."""


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
    """`diffmax_bisect`, with the same result to the bit, and its metrics sent to swanlab or to a function.

    One dictionary goes out per logged call, and one more when its gradient has been computed. Without a step, or at a step that
    `every` leaves out, this is `diffmax_bisect` and nothing else: no operator is added to the graph.

    Args:
        X, alpha, dim, n_iter, ensure_sum_one, backend: As for `diffmax_bisect`.
        name_prefix: Begins every metric's name. One per layer keeps them apart.
        step: The training step that goes with the metrics. None: nothing is logged.
        every: Log only the steps that it divides.
        log: Called as `log(metrics, step=step)`. None: `swanlab.log`, into the run that `swanlab.init` started.
        extra_metadata: More numbers that go out with the call's metrics, by name, such as a layer's or a loss; a tensor of one
            entry is a number too. Their names begin with `name_prefix` as well.
    Returns:
        What `diffmax_bisect` returns.
    Raises:
        ImportError: Something is to be logged, `log` is None and swanlab is not installed.
        TypeError, ValueError: `step`, `every` or an entry of extra_metadata is no such number; and as for `diffmax_bisect`.
        RuntimeError: From swanlab, if no run was started.
        NotImplementedError: Something is to be logged under torch.func, or of scores on the device "meta".

    The metrics, over the rows that see something and hold no NaN:

    - `forward/`: `support_mean`, `support_max`, `zeros_share` (of the visible entries), `entropy_mean` (nats),
      `row_max_mean`, `sink_rate` (the largest share, over keys, of maps whose queries give the key more than 0.3 on average),
      `sink_rate_first` (that of the first key), `rows_masked` and `rows_nan` (rows left out).
    - `alpha/`: `mean`, `min`, `max`.
    - `convergence/`: `tau_mean`, `residual_mean` and `residual_max` (the weights' sum less 1, before any division),
      `iterations_mean` and `iterations_max` (steps of Eq. 2 that move a row's tau).
    - `backward/`: `grad_weights_norm`, `grad_scores_norm`, and `grad_alpha_norm` where alpha requires a gradient.

    Numerics: A logged call waits once for the device in forward and once in backward, and repeats the solver's steps in plain
        PyTorch to count them: several times a bare call's time, so log every hundredth step. Under torch.compile a logged call
        breaks the graph.
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
    _check_step("diffmax_bisect_monitored", step, every)
    extra = _checked_metadata(extra_metadata)
    if step is None or step % every != 0:
        return normalize(X, e, e_tensor, dim, n_iter, ensure_sum_one, backend)
    log = _swanlab_log("diffmax_bisect_monitored") if log is None else log  # not `or`: a log may be an empty list that grows
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


def _check_step(function: str, step: int | None, every: int) -> None:
    for name, number in (("step", step), ("every", every)):
        if number is not None and (not isinstance(number, int) or isinstance(number, bool)):
            raise TypeError(f"{function}: {name} must be an int, got {number!r} of type {type(number).__name__}")
    if every < 1:
        raise ValueError(f"{function}: every must be at least 1, got {every}")


def _swanlab_log(function: str) -> Log:
    try:
        import swanlab
    except ImportError as error:
        raise ImportError(
            f"{function}: swanlab is needed where no log is given, got none\n"
            'pip install "diffmax-core[monitoring]", or pass log=, a function that takes (metrics, step=...)'
        ) from error
    log: Log = swanlab.log
    return log


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
    """The scores and e as they are; in backward the sizes of their gradients from this call alone, whatever else uses them."""

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


def _norm(gradient: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(gradient.detach(), dtype=accumulation_dtype(gradient.dtype))
    return norm


def _send(metrics: dict[str, Tensor], prefix: str, step: int, log: Log) -> None:
    """Hand the metrics over, read from the device all at once."""
    log({f"{prefix}/{name}": value for name, value in read(metrics).items()}, step=step)


def read(metrics: dict[str, Tensor]) -> dict[str, float]:
    """The numbers, read from each device all at once."""
    result = dict.fromkeys(metrics, 0.0)
    for device in dict.fromkeys(metric.device for metric in metrics.values()):
        here = {name: metric for name, metric in metrics.items() if metric.device == device}
        values = torch.stack([metric.to(torch.promote_types(metric.dtype, torch.float32)) for metric in here.values()]).tolist()
        result |= dict(zip(here, values, strict=True))
    return result


class Monitor:
    """Watches every call of rows and attention inside a model, and logs one dictionary for each logged step.

    Modules, fused attention, functions that a user's module calls, and models of transformers are all watched: hooks tell which
    module a call belongs to. Results stay the same to the bit.

    Args:
        model: Any module. One that is compiled is refused: what it runs is no longer these calls. Watch the model that was
            compiled, in a forward pass of its own, such as each hundredth step.
        log: Called as `log(metrics, step=step)`. None: `swanlab.log`, into the run that `swanlab.init` started.
        every: Log only the steps that it divides. At other steps nothing is measured.
        name_prefix: Begins every metric's name.
    Raises:
        TypeError, ValueError: An argument is of another type or out of range, or the model is compiled.
        ImportError: `log` is None and swanlab is not installed.

    The metrics of a module, under its name in the model, over all calls in the step: `support_mean`, `support_max`,
    `zeros_share` (of the entries that are visible), `rows_masked` and `rows_nan` (rows left out of the others), `alpha/mean`,
    `alpha/min`, `alpha/max`, and for attention `tile_sparsity`, as of `AttentionStats`, where the backend knows it.

    A call that gradient checkpointing repeats in backward counts once. Not watched are calls in other threads, under
    torch.func, on the device "meta", inside compiled code, and of `attention_with_kvcache`. With DistributedDataParallel each
    rank sees its own part of the batch: one monitor, on rank 0, is enough. `remove()` takes the hooks away.

    Numerics: A logged step waits for the device once, in `step()`, and runs each attention's forward a second time.
    Example:
        >>> import torch
        >>> from diffmax.nn import DiffmaxAttention
        >>> model = torch.nn.Sequential(DiffmaxAttention(16, 2, alpha=0.5), DiffmaxAttention(16, 2, alpha=0.75))
        >>> def show(metrics, *, step):
        ...     print(step, [name for name in metrics if name.endswith("/zeros_share")], round(metrics["1/alpha/mean"], 2))
        >>> monitor = Monitor(model, show, every=100)
        >>> for _ in range(3):  # steps 0, 1, 2
        ...     out = model(torch.randn(1, 10, 16))
        ...     monitor.step()  # after optimizer.step()
        0 ['0/zeros_share', '1/zeros_share'] 0.75
        >>> monitor.remove()
    """

    def __init__(self, model: nn.Module, log: Log | None = None, *, every: int = 1, name_prefix: str = "") -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"Monitor: model must be a torch.nn.Module, got {type(model).__name__}")
        _check_step("Monitor", None, every)
        compiled = next((name for name, module in model.named_modules() if _is_compiled(module)), None)
        if compiled is not None:
            raise ValueError(
                f"Monitor: model must not be compiled, got a compiled {compiled or 'model'}\n"
                "watch the module that was compiled (its _orig_mod), in a forward pass of its own"
            )
        self.every, self.prefix, self.current_step = every, f"{name_prefix}/" if name_prefix else "", 0
        self._log = _swanlab_log("Monitor") if log is None else log
        self._names = {id(module): name for name, module in model.named_modules()}
        self._modules = list(model.modules())  # so that no other takes the place of one in memory
        self._running: dict[int, list[str]] = {}  # of each thread, the modules that are running, outermost first
        self._sums: dict[str, Sums] = {}
        self._warned = False
        self._hooks = [module.register_forward_pre_hook(self._enter) for module in self._modules]
        self._hooks += [module.register_forward_hook(self._leave, always_call=True) for module in self._modules]
        watchers.append(self)

    def step(self, step: int | None = None) -> None:
        """End the present step, and log it if `every` divides it; go to the next, or to a given one."""
        _check_step("Monitor", step, self.every)
        if self._sums:
            metrics = {
                f"{self.prefix}{name}/{metric}" if name else f"{self.prefix}{metric}": value
                for name, sums in self._sums.items()
                for metric, value in metrics_of(sums).items()
            }
            self._sums = {}
            self._log(read(metrics), step=self.current_step)
        elif step is None and self.current_step % self.every == 0 and not self._warned:
            self._warned = True
            warnings.warn(
                f"Monitor: step {self.current_step} saw no call of diffmax in the model\n"
                "compiled code is not watched: watch the model before torch.compile, in a forward pass of its own",
                RuntimeWarning,
                stacklevel=2,
            )
        self.current_step = self.current_step + 1 if step is None else step

    def remove(self) -> None:
        """Take every hook away. What was measured since the last step is forgotten."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._sums, self._names, self._modules = [], {}, {}, []
        if self in watchers:
            watchers.remove(self)

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def __deepcopy__(self, memo: dict[int, Any]) -> Monitor:
        return self  # with the hooks of a model that is copied, whose modules have no name here

    def _enter(self, module: nn.Module, inputs: Any) -> None:
        if not torch.compiler.is_compiling() and id(module) in self._names:
            self._running.setdefault(threading.get_ident(), []).append(self._names[id(module)])

    def _leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if not torch.compiler.is_compiling() and id(module) in self._names:
            self._running[threading.get_ident()].pop()

    def _counts(self, given: Tensor) -> bool:
        """Whether this call is one of the model's, in a step that is logged, and for the first time."""
        inside = self._running.get(threading.get_ident())
        if self.current_step % self.every != 0 or not inside or given.is_meta or peek_interpreter_stack() is not None:
            return False
        in_backward: bool = torch._C._current_graph_task_id() != -1  # where checkpointing runs a forward again
        return not in_backward

    def _add(self, more: Sums) -> None:
        name = self._running[threading.get_ident()][-1]
        self._sums[name] = together(self._sums[name], more) if name in self._sums else more

    @torch.no_grad()
    def saw_rows(self, X: Tensor, weights: Tensor, e: float | Tensor, dim: int) -> None:
        """Of `diffmax_bisect` and what calls it."""
        if self._counts(X):
            self._add(of_rows(X, weights, e, dim))

    @torch.no_grad()
    def saw_attention(self, query: Tensor, key: Tensor, value: Tensor, call: AttentionCall) -> None:
        """Of `attention` and `attention_varlen`."""
        if self._counts(query):
            self._add(of_attention(query, key, value, call))


def _is_compiled(module: nn.Module) -> bool:
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
