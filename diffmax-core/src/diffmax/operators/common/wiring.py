"""How an operator of torch.library is entered, and what is the same for operators of query, key, value and a call.

`power` and `threshold` are such operators; an `autograd.Function` of their own says which gradients there are, and what is
between it and the kernel is here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffmax.machine.dispatch import kernel
from diffmax.operators.common import portable
from diffmax.operators.common.autograd import differentiates, has_tangent, is_transformed
from diffmax.operators.common.results import RETURNED, Returned
from diffmax.operators.common.schema import LIBRARY, Schema
from diffmax.operators.common.sharding import register_rules


def enter(
    schema: Schema[Any],
    *,
    run: Callable[..., Any],
    autograd: Callable[..., Any],
    fake: Callable[..., Any],
    vmap: Callable[..., Any] | None = None,
    returned: Callable[..., Sequence[Tensor]] | None = None,
    optional: Collection[str] = (),
) -> None:
    """Define an operator, and enter its implementations.

    Args:
        schema: Its schema.
        run: Calls a kernel, on any device.
        autograd: What the Autograd key calls.
        fake: Gives results of the right shapes, without data. DTensor comes here just before it looks for its rule.
        vmap: As `torch.library.register_vmap` takes it; None: torch.func.vmap is refused.
        returned: As `fake`, of the arguments of a kernel; None: the operator has no kernels of its own.
        optional: Results that a kernel may leave out.
    """
    schema.define()
    if returned is not None:
        RETURNED[schema.name] = Returned(schema.results._fields, returned, optional)  # type: ignore[attr-defined]
    name = f"diffmax::{schema.name}"
    LIBRARY.impl(schema.name, run, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    LIBRARY.impl(schema.name, autograd, "Autograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(name, _with_rules(fake), lib=LIBRARY)
    if vmap is not None and hasattr(torch.library, "register_vmap"):  # torch 2.5
        torch.library.register_vmap(name, vmap, lib=LIBRARY)


def _with_rules(fake: Callable[..., Any]) -> Callable[..., Any]:
    def of_shapes(*flat: Any) -> Any:
        register_rules()
        return fake(*flat)

    return of_shapes


def one_by_one(operator: Any, size: int, in_dims: Sequence[int | None], flat: Sequence[Any]) -> tuple[Any, Any]:
    """vmap by one call after the other."""
    each = [
        operator(*(given if dim is None else given.select(dim, n) for given, dim in zip(flat, in_dims, strict=True)))
        for n in range(size)
    ]
    results = tuple(torch.stack(entries) for entries in zip(*each, strict=True))
    return results, (0,) * len(results)


def beside_the_batch(operator: Any, size: int, in_dims: Sequence[int | None], flat: Sequence[Any]) -> tuple[Any, Any]:
    """vmap by one call, in which the mapped dimension of every tensor lies beside its first."""
    wide = list(flat)
    for place, (given, dim) in enumerate(zip(flat, in_dims, strict=True)):
        if isinstance(given, Tensor):
            t = given.expand(size, *given.shape) if dim is None else given.movedim(dim, 0)
            wide[place] = t.flatten(0, 1) if t.ndim > 2 else t[0]  # of what is not there, (0,)
    results = operator(*wide)
    there = [t.ndim > 1 for t in results]
    unfolded = (
        t.unflatten(0, (size, t.shape[0] // size)) if is_there else t for t, is_there in zip(results, there, strict=True)
    )
    return tuple(unfolded), tuple(0 if is_there else None for is_there in there)


@dataclass(frozen=True, eq=False)
class Wiring:
    """An operator of (query, key, value, keep, call, backend), and its backward.

    The backward is one of gradients, of which some may be None, and (query, key, value, saved, wanted, call, backend).

    Attributes:
        forward, backward: Their schemas.
        features: Of (query, key, value, call): those of `diffmax.plugin.FEATURES` that the call needs.
        learned: The arguments of torch's that may have a gradient, besides query, key and value.
        reference, reference_backward: Differentiable, with the signatures of kernels.
        gradient: The autograd.Function.
        vmap: `one_by_one` or `beside_the_batch`.
    """

    forward: Schema[Any]
    backward: Schema[Any]
    features: Callable[[Tensor, Tensor, Tensor, Any], frozenset[str]]
    learned: tuple[str, ...]
    reference: Callable[..., Any]
    reference_backward: Callable[..., Any]
    gradient: type[torch.autograd.Function]
    vmap: Callable[..., tuple[Any, Any]]

    def enter(self, fake: Callable[..., Any], backward_fake: Callable[..., Any]) -> None:
        """Enter both operators."""

        def returned(query: Tensor, key: Tensor, value: Tensor, call: Any, keep: bool) -> Sequence[Tensor]:
            like: Sequence[Tensor] = fake(*self.forward.flatten(query, key, value, keep, call, ""))
            return like

        def backward_returned(*arguments: Any) -> Sequence[Tensor]:
            *tensors, call, wanted = arguments
            like: Sequence[Tensor] = backward_fake(*self.backward.flatten(*tensors, wanted, call, ""))
            return like

        enter(self.forward, run=self._run, autograd=self._autograd, fake=fake, vmap=self._vmap, returned=returned)
        enter(
            self.backward,
            run=self._run_backward,
            autograd=self._backward_autograd,
            fake=backward_fake,
            vmap=self._backward_vmap,
            returned=backward_returned,
        )

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, call: Any, backend: str) -> Any:
        """The operator's results, on the way there that differentiates and transforms what has to be."""
        if not torch.compiler.is_compiling():
            if portable.is_tracing():
                return self.reference(query, key, value, call, False)
            flat = self.forward.flatten(query, key, value, True, call, backend)
            if not is_transformed() and differentiates(*self._may_learn(flat)):
                return self.forward.results(*self.gradient.apply(*flat))  # type: ignore[no-untyped-call]
        return self.forward.results(*self.forward(query, key, value, False, call, backend))

    # for the autograd.Function

    def save(self, ctx: Any, flat: Sequence[Any], constant: Sequence[str]) -> Any:
        """The operator's results; `ctx` keeps what the backward needs. `constant`: the results that have no gradient."""
        results = self.forward.results(*self._below_autograd(*flat))
        ctx.mark_non_differentiable(*(getattr(results, name) for name in constant))
        ctx.set_materialize_grads(False)
        ctx.places = [place for place, given in enumerate(flat) if isinstance(given, Tensor)]
        ctx.save_for_backward(*(flat[place] for place in ctx.places), *results.saved)  # type: ignore[attr-defined]
        ctx.flat = [None if isinstance(given, Tensor) else given for given in flat]
        return results

    def saved(self, ctx: Any) -> tuple[Any, tuple[Tensor, ...]]:
        """The operator's arguments, and what its forward left."""
        flat, tensors = list(ctx.flat), ctx.saved_tensors  # checkpointing lets them be read once
        for place, t in zip(ctx.places, tensors, strict=False):
            flat[place] = t
        return self.forward.rebuild(flat), tensors[len(ctx.places) :]

    def needs(self, ctx: Any) -> dict[str, bool]:
        """Which of `learned` need a gradient."""
        needed, place = ctx.needs_input_grad, self.forward.place
        return {name: place[name] < len(needed) and needed[place[name]] for name in self.learned}

    def in_place(self, ctx: Any, of: Mapping[str, Tensor | None]) -> tuple[Tensor | None, ...]:
        """What a backward returns: each needed gradient at its argument's place."""
        found: list[Tensor | None] = [None] * len(ctx.flat)
        for name, t in of.items():
            place = self.forward.place[name]
            if place < len(found) and ctx.needs_input_grad[place]:
                found[place] = t
        return tuple(found)

    # what torch calls

    def _run(self, *flat: Any) -> Any:
        query, key, value, keep, call, backend = self.forward.rebuild(flat)
        run = self._kernel(self.forward.name, query, key, value, call, backend)
        with torch._C._DisableAutocast():  # a kernel's products are of the dtypes that it chose
            return self.forward.results(*run(query, key, value, call, keep))

    def _run_backward(self, *flat: Any) -> Any:
        *grads, query, key, value, saved, wanted, call, backend = self.backward.rebuild(flat)
        run = self._kernel(self.backward.name, query, key, value, call, backend, alpha_gradient=getattr(wanted, "e", False))
        with torch._C._DisableAutocast():
            return self.backward.results(*run(*grads, query, key, value, saved, call, wanted))

    def _kernel(
        self, name: str, query: Tensor, key: Tensor, value: Tensor, call: Any, backend: str, alpha_gradient: bool = False
    ) -> Callable[..., Any]:
        return kernel(
            name,
            query,
            backend,
            tensor_alpha=isinstance(getattr(call, "e", None), Tensor),
            alpha_gradient=alpha_gradient,
            features=self.features(query, key, value, call),
            head_dims=(query.shape[3], value.shape[3]),
        )

    def _may_learn(self, flat: Sequence[Any]) -> tuple[Tensor | None, ...]:
        places = (self.forward.place[name] for name in self.learned)
        return (*flat[:3], *(flat[place] if place < len(flat) else None for place in places))

    def _below_autograd(self, *flat: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return getattr(torch.ops.diffmax, self.forward.name)(*flat)

    def _autograd(self, *flat: Any) -> Any:
        tensors = self._may_learn(flat)
        forward_mode = has_tangent(*tensors)
        if not portable.exports_onnx() and not forward_mode and not differentiates(*tensors):
            return self._below_autograd(*flat)
        if portable.exports_onnx() or forward_mode or torch._C._functorch.peek_interpreter_stack() is not None:
            query, key, value, _, call, _ = self.forward.rebuild(flat)
            return self.reference(query, key, value, call, True)  # differentiable operators
        return self.gradient.apply(*flat[:3], True, *flat[4:])  # type: ignore[no-untyped-call]

    def _backward_autograd(self, *flat: Any) -> Any:
        *grads, query, key, value, saved, wanted, call, _ = self.backward.rebuild(flat)
        tensors = (*grads, *self._may_learn(self.forward.flatten(query, key, value, True, call)))
        if has_tangent(*tensors) or differentiates(*tensors):
            return self.reference_backward(*grads, query, key, value, saved, call, wanted)
        with torch._C._AutoDispatchBelowAutograd():
            return getattr(torch.ops.diffmax, self.backward.name)(*flat)

    def _vmap(self, info: Any, in_dims: tuple[Any, ...], *flat: Any) -> Any:
        return self.vmap(getattr(torch.ops.diffmax, self.forward.name), info.batch_size, in_dims, flat)

    def _backward_vmap(self, info: Any, in_dims: tuple[Any, ...], *flat: Any) -> Any:
        return self.vmap(getattr(torch.ops.diffmax, self.backward.name), info.batch_size, in_dims, flat)
