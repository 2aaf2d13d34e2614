"""`inspect_attention`: one forward pass, in which every attention of a model is recorded as sparse lists."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffmax.inspecting.report import AttentionReport, Layer
from diffmax.integrations.inplace import CHILD, AttentionWeights
from diffmax.monitor.calls import visible_keys
from diffmax.operators.attention.weights import SparseWeights, sparse_weights
from diffmax.operators.common.watch import watchers
from diffmax.plugin import AttentionCall


@torch.no_grad()
def inspect_attention(model: nn.Module, inputs: Any, tokenizer: Any = None, *, rows: Sequence[str] = ()) -> AttentionReport:
    """Run a model once, and report what each token reads in each of its diffmax attentions.

    Args:
        model: Any module with diffmax attention: a model of transformers with a registered implementation, one of timm or
            diffusers after `replace`, or with `diffmax.nn` modules in it. It runs in evaluation mode, and is left as it was.
        inputs: What the model is called with: a mapping of its arguments by name, a tensor, or a tuple of tensors. With a
            tokenizer also a text, or a list of texts, which are padded to one length.
        tokenizer: A tokenizer of transformers. It names the tokens of the `input_ids`; without it they are numbered.
        rows: Names of modules, as in `named_modules`, in which every call of `diffmax_bisect` is attention, queries by keys.
            Elsewhere it is if it normalizes the last of four dimensions or more, (B, H, L, S), or if its module had its softmax
            replaced; class scores (B, C) or (B, L, C) are none.
    Returns:
        An `AttentionReport`, on the CPU. Its `unseen` names the modules whose weights are not recorded: lazy and power
            attention, and differential attention with softmax weights. With a two-dimensional `attention_mask` among the
            inputs, what is 0 there is padding.
    Raises:
        TypeError: The model is no module, a text comes without a tokenizer, or `rows` is a string.
        ValueError: The model is compiled, or called no attention of diffmax: it has none, none of which the weights can be
            recorded, or a single token was decoded; or
            `rows` has a name that is no module's.
    Numerics: The output of the model is not changed. The scores of each attention are computed a second time, block by block:
        memory is that of the forward pass, and of the weights that are not 0. Weights of modules that have all weights in
        memory themselves are taken from there, with one more key if they have a sink.
    Source: docs/inspecting.md. Written for diffmax.
    Example:
        >>> import torch, diffmax
        >>> model = torch.nn.Sequential(diffmax.nn.DiffmaxAttention(16, 2, alpha=0.5), torch.nn.Linear(16, 3))
        >>> report = diffmax.inspect_attention(model, torch.randn(1, 10, 16).mul(4))
        >>> [layer.name for layer in report.layers], report.layers[0].weights.shape
        (['0'], (1, 2, 10, 10))
        >>> keys, weights = report.layers[0].weights.query(0, 1, 9)  # what the last token reads, by head 1
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"inspect_attention: model must be a torch.nn.Module, got {type(model).__name__}")
    if any(hasattr(part, "_orig_mod") or getattr(part, "_compiled_call_impl", None) is not None for part in model.modules()):
        raise ValueError("inspect_attention: model must not be compiled, got a compiled one\npass the module that was compiled")
    if isinstance(rows, str):
        raise TypeError(f"inspect_attention: rows must be a sequence of names, got {rows!r}\npass [{rows!r}]")
    unknown = [name for name in rows if name not in dict(model.named_modules(remove_duplicate=False))]
    if unknown:
        raise ValueError(
            f"inspect_attention: rows must name modules of the model, got {unknown[0]!r}\nmodel.named_modules() lists them"
        )
    arguments, options = _arguments(model, inputs, tokenizer)
    recorder = _Recorder(model, frozenset(rows))
    modes = [(part, part.training) for part in model.modules()]
    model.eval()
    try:
        with recorder:
            model(*arguments, **options)
    finally:
        for part, mode in modes:
            part.training = mode
    unseen = recorder.unseen()
    if not recorder.layers:
        if unseen:
            raise ValueError(
                f"inspect_attention: the weights of {', '.join(unseen)} cannot be recorded, and there are no others"
            )
        raise ValueError(
            f"inspect_attention: {type(model).__name__} called no attention of diffmax\n"
            'replace its attention first, such as with attn_implementation="diffmax"; one token alone is decoded and not seen\n'
            "name in rows= the modules that call diffmax_bisect on scores of two or three dimensions"
        )
    ids, mask = options.get("input_ids"), options.get("attention_mask")
    names = None
    if tokenizer is not None and isinstance(ids, Tensor) and ids.ndim == 2:
        names = tuple(tuple(tokenizer.decode([number]) for number in row) for row in ids.tolist())
    real = mask.bool().cpu() if isinstance(mask, Tensor) and mask.ndim == 2 else None
    return AttentionReport(tuple(recorder.layers), names, real, unseen)


def _arguments(model: nn.Module, inputs: Any, tokenizer: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What to call the model with."""
    is_text = isinstance(inputs, str) or (
        isinstance(inputs, Sequence) and len(inputs) > 0 and all(isinstance(t, str) for t in inputs)
    )
    if is_text:
        if tokenizer is None:
            raise TypeError("inspect_attention: a text needs a tokenizer, got None\npass tokenizer=, or the model's own inputs")
        inputs = tokenizer(inputs, return_tensors="pt", padding=not isinstance(inputs, str))
        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        inputs = {name: t.to(device) for name, t in inputs.items()}
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, (tuple, list)) and any(isinstance(each, Mapping) for each in inputs):
        raise TypeError(
            f"inspect_attention: inputs must be those of one call, got a {type(inputs).__name__} of {len(inputs)} with a "
            "mapping\npass the mapping itself; for several batches, call inspect_attention for each"
        )
    return (tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)), {}


class _Recorder:
    """A watcher of the calls that a model makes in one thread."""

    def __init__(self, model: nn.Module, rows: frozenset[str]) -> None:
        self.layers: list[Layer] = []
        self._model, self._running, self._thread, self._hooks = model, list[str](), threading.get_ident(), list[Any]()
        self._rows, self._ran = rows, set[str]()

    def __enter__(self) -> _Recorder:
        for name, module in self._model.named_modules():
            self._hooks += [
                module.register_forward_pre_hook(lambda *_, name=name: self._enter(name)),
                module.register_forward_hook(lambda *_: self._running.pop() and None, always_call=True),
            ]
        watchers.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        watchers.remove(self)
        for hook in self._hooks:
            hook.remove()

    def unseen(self) -> tuple[str, ...]:
        """The modules of diffmax.nn that ran and mix tokens with weights which no watcher is told of, with their kind."""
        from diffmax.nn import DiffAttention, DiffAttentionV2, LazyAttention, PowerAttention

        seen = {layer.name.split(" ")[0] for layer in self.layers}
        return tuple(
            f"{name or 'the model'} ({type(module).__name__})"
            for name, module in self._model.named_modules()
            if isinstance(module, (DiffAttention, DiffAttentionV2, LazyAttention, PowerAttention))
            and name in self._ran
            and not any(layer == name or layer.startswith(f"{name}.") for layer in seen)
        )

    def _enter(self, name: str) -> None:
        self._running.append(name)
        self._ran.add(name)

    def saw_rows(self, X: Tensor, weights: Tensor, e: float | Tensor, dim: int) -> None:
        """Record a call of `diffmax_bisect` that is attention; its weights lie in memory."""
        if self._counts() and X.ndim >= 2 and ((X.ndim >= 4 and dim == X.ndim - 1) or self._are_attention()):
            self._add(_of_dense(weights.movedim(dim, -1)), _four(~X.isneginf().movedim(dim, -1)).sum(-1))

    def saw_attention(self, query: Tensor, key: Tensor, value: Tensor, call: AttentionCall, delta: Tensor) -> None:
        """Record a call of `attention` or `attention_varlen`."""
        if self._counts():
            self._add(sparse_weights(query, key, call, delta), visible_keys(query, key, call))

    def _are_attention(self) -> bool:
        """Whether the rows of the module that runs are attention, whatever their shape."""
        module = self._model.get_submodule(self._running[-1])
        return isinstance(getattr(module, CHILD, None), AttentionWeights) or not self._rows.isdisjoint(self._running)

    def _counts(self) -> bool:
        return bool(self._running) and threading.get_ident() == self._thread

    def _add(self, weights: SparseWeights, visible: Tensor) -> None:
        name = self._running[-1].removesuffix(".diffmax")  # a holder of alpha in a module
        again = sum(layer.name.split(" ")[0] == name for layer in self.layers)
        name = f"{name} ({again + 1})" if again else name
        self.layers.append(Layer(name, weights.to("cpu"), visible.expand(weights.shape[:-1]).cpu()))


def _four(t: Tensor) -> Tensor:
    """(B, H, L, S): without heads H is 1; dimensions between batch and queries are heads."""
    if t.ndim == 2:
        return t[None, None]
    return t.unsqueeze(1) if t.ndim == 3 else t.flatten(1, -3)


def _of_dense(weights: Tensor) -> SparseWeights:
    weights = _four(weights.detach())
    place = weights.nonzero()
    counts = (weights != 0).sum(-1).flatten()
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    values = weights[tuple(place.unbind(1))]
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    return SparseWeights(offsets, place[:, 3].int(), values, None, tuple(weights.shape))
