"""`Monitor`: metrics of all calls in a model."""

from __future__ import annotations

import threading
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import peek_interpreter_stack

from diffmax.machine.forked import alone_in_child
from diffmax.monitor.calls import Sums, metrics_of, of_attention, of_rows, together
from diffmax.monitor.logs import Log, check_step, log_of, read
from diffmax.operators.common.watch import watchers
from diffmax.plugin import AttentionCall


class Monitor:
    """Watches every call of rows and attention inside a model, and logs one dictionary for each logged step.

    It covers modules, fused attention, functions called by a user's module, and models of transformers: hooks record the module
    that makes a call. Results are unchanged bit for bit.

    Args:
        model: Any module. A compiled one is refused, because it runs other code. Watch the original model instead, in a
            separate forward pass, for example at every hundredth step.
        log: Called as `log(metrics, step=step)`. None: `swanlab.log`, into the run that `swanlab.init` started.
        every: Log only steps that are a multiple of it. At other steps nothing is measured.
        name_prefix: Prefix of every metric name.
    Raises:
        TypeError, ValueError: An argument has the wrong type or is out of range, or the model is compiled.
        ImportError: `log` is None and swanlab is not installed.

    The metrics of a module, under its name in the model, over all calls in the step: `support_mean`, `support_max`,
    `zeros_share` (of visible entries), `rows_masked` and `rows_nan` (rows excluded from the others), `alpha/mean`,
    `alpha/min`, `alpha/max`, and for attention `tile_sparsity`, as in `AttentionStats`, if the backend computes it.

    A call that gradient checkpointing repeats in backward counts once. Calls in other threads, under torch.func, on the device
    "meta", inside compiled code, calls of `attention_with_kvcache`, and threshold attention (`nn.LazyAttention`) are not
    watched. With DistributedDataParallel each
    rank sees its part of the batch: one monitor, on rank 0, is enough. `remove()` removes the hooks.

    Numerics: A logged step waits for the device once, in `step()`, and runs the forward of each attention a second time.
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
        check_step("Monitor", None, every)
        compiled = next((name for name, module in model.named_modules() if _is_compiled(module)), None)
        if compiled is not None:
            raise ValueError(
                f"Monitor: model must not be compiled, got a compiled {compiled or 'model'}\n"
                "watch the module that was compiled (its _orig_mod), in a forward pass of its own"
            )
        self.every, self.prefix, self.current_step = every, f"{name_prefix}/" if name_prefix else "", 0
        self._log = log_of("Monitor", log)
        self._names = {id(module): name for name, module in model.named_modules()}
        self._modules = list(model.modules())  # keeps the modules alive, so that no id is reused
        self._running: dict[int, list[str]] = {}  # per thread, the running modules, outermost first
        self._sums: dict[str, Sums] = {}
        self._warned = False
        self._hooks = [module.register_forward_pre_hook(self._enter) for module in self._modules]
        self._hooks += [module.register_forward_hook(self._leave, always_call=True) for module in self._modules]
        watchers.append(self)

    def step(self, step: int | None = None) -> None:
        """End the current step, and log it if it is a multiple of `every`; go to the next step, or to a given one."""
        check_step("Monitor", step, self.every)
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
                "compiled code is not watched: watch the model before torch.compile, in a forward pass of its own; nor is "
                "threshold attention, such as nn.LazyAttention",
                RuntimeWarning,
                stacklevel=2,
            )
        self.current_step = self.current_step + 1 if step is None else step

    def remove(self) -> None:
        """Remove all hooks, and discard what was measured since the last step."""
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
        return self  # a copy of the model has the hooks too, but its modules have no name here

    def _enter(self, module: nn.Module, inputs: Any) -> None:
        if not torch.compiler.is_compiling() and id(module) in self._names:
            self._running.setdefault(threading.get_ident(), []).append(self._names[id(module)])

    def _leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if not torch.compiler.is_compiling() and id(module) in self._names:
            self._running[threading.get_ident()].pop()

    def _counts(self, given: Tensor) -> bool:
        """Whether to count this call: it is made by the model, in a logged step, and is no repetition."""
        inside = self._running.get(threading.get_ident())
        if self.current_step % self.every != 0 or not inside or given.is_meta or peek_interpreter_stack() is not None:
            return False
        in_backward: bool = torch._C._current_graph_task_id() != -1  # checkpointing runs the forward again in backward
        return not in_backward

    def _add(self, more: Sums) -> None:
        name = self._running[threading.get_ident()][-1]
        self._sums[name] = together(self._sums[name], more) if name in self._sums else more

    @alone_in_child
    @torch.no_grad()
    def saw_rows(self, X: Tensor, weights: Tensor, e: float | Tensor, dim: int) -> None:
        """Count a call of `diffmax_bisect`."""
        if self._counts(X):
            self._add(of_rows(X, weights, e, dim))

    @alone_in_child
    @torch.no_grad()
    def saw_attention(self, query: Tensor, key: Tensor, value: Tensor, call: AttentionCall, delta: Tensor) -> None:
        """Count a call of `attention` or `attention_varlen`."""
        if self._counts(query):
            self._add(of_attention(query, key, value, call))


def _is_compiled(module: nn.Module) -> bool:
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
