"""Plotting: sparse attention and learned alphas. Needs matplotlib, which is imported on use; nothing is shown or saved."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

# A tensor of any dtype and device, an array, a number, or a nested list of these.
Numbers: TypeAlias = "Tensor | Iterable[Any]"


def alpha_and_support(alpha: Numbers, support: Numbers, labels: Sequence[str] | None = None) -> Any:
    """Plot the alpha of each head against its support size, with one colour per layer.

    Args:
        alpha: One per head, shape (H,) or (layers, H).
        support: The mean number of nonzero weights, of the same shape.
        labels: A name per layer.
    Returns:
        A matplotlib Figure.
    Raises:
        ImportError: matplotlib is missing.
        ValueError: The shapes differ, there is no head, or the labels are not one per layer.
    Example:
        >>> figure = alpha_and_support(torch.tensor([0.5, 0.9]), torch.tensor([3.0, 11.5]))
        >>> figure.axes[0].get_xlabel()
        'alpha'
    """
    alpha, support = _tensor("alpha_and_support", "alpha", alpha), _tensor("alpha_and_support", "support", support)
    if alpha.shape != support.shape or alpha.ndim not in (1, 2) or alpha.numel() == 0:
        raise ValueError(
            "alpha_and_support: alpha and support must have one shape, (H,) or (layers, H), got "
            f"{tuple(alpha.shape)} and {tuple(support.shape)}"
        )
    rows, columns = (t.reshape(-1, alpha.shape[-1]) for t in (alpha, support))
    names = _labels("alpha_and_support", labels, len(rows), "layer")
    figure = _figure()(figsize=(5, 4), layout="constrained")
    axis = figure.subplots()
    for name, x, y in zip(names, rows, columns, strict=True):
        axis.scatter(x.tolist(), y.tolist(), label=name)
    axis.set(xlabel="alpha", ylabel="support", yscale="log")
    if len(names) > 1:
        axis.legend()
    return figure


def attention_maps(weights: Numbers, tokens: Sequence[str] | None = None, labels: Sequence[str] | None = None) -> Any:
    """Plot attention weights as one image per head, on a logarithmic scale; exact zeros are blank.

    Args:
        weights: Shape (H, L, S): rows are queries, columns are keys.
        tokens: The names of the keys, and of the queries if L = S.
        labels: A title per head.
    Returns:
        A matplotlib Figure.
    Raises:
        ImportError: matplotlib is missing.
        ValueError: The shape, or the number of tokens or labels, is wrong.
    Example:
        >>> figure = attention_maps(torch.eye(3).expand(2, 3, 3), tokens=["a", "b", "c"])
        >>> [axis.get_title() for axis in figure.axes[:2]]
        ['head 1: 66.6 % zeros', 'head 2: 66.6 % zeros']
    """
    weights = _tensor("attention_maps", "weights", weights)
    if weights.ndim != 3 or 0 in weights.shape:
        raise ValueError(f"attention_maps: weights must have shape (H, L, S), got {tuple(weights.shape)}")
    heads, length, keys = weights.shape
    if tokens is not None and len(tokens) != keys:
        raise ValueError(f"attention_maps: tokens must name {keys} keys, got {len(tokens)} names")
    names = _labels("attention_maps", labels, heads, "head")
    columns = min(heads, 4)
    rows = math.ceil(heads / columns)
    figure = _figure()(figsize=(3 * columns + 1, 3 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    from matplotlib.colors import LogNorm

    for axis, name, head in zip(axes, names, weights, strict=False):
        shown = torch.where(head > 0, head.clamp_min(1e-4), torch.nan).float().numpy()
        image = axis.imshow(shown, norm=LogNorm(vmin=1e-4, vmax=1), cmap="viridis")
        tenths = 1000 * int((head == 0).sum()) // head.numel()  # rounded down: 100 % only if all are zero
        axis.set_title(f"{name}: {tenths / 10} % zeros", fontsize=9)
        if tokens is not None:
            axis.set_xticks(range(keys), tokens, rotation=90, fontsize=7)
            if length == keys:
                axis.set_yticks(range(length), tokens, fontsize=7)
    for axis in axes[heads:]:
        axis.set_axis_off()
    figure.colorbar(image, ax=list(axes), label="weight (blank: exactly 0)", shrink=0.8)
    return figure


def heads_by_tokens(values: Numbers, heads: Sequence[str], tokens: Sequence[str], label: str) -> Any:
    """Draw a number of each head and token as an image, on a logarithmic scale; zeros are blank.

    Args:
        values: Shape (heads, tokens).
        heads: A name per row.
        tokens: A name per column.
        label: What the numbers are.
    Returns:
        A matplotlib Figure.
    Raises:
        ImportError: matplotlib is missing.
        ValueError: The shape, or the number of names, is wrong.
    Example:
        >>> figure = heads_by_tokens(torch.eye(2), ["head 0", "head 1"], ["a", "b"], "weight")
        >>> [tick.get_text() for tick in figure.axes[0].get_yticklabels()]
        ['head 0', 'head 1']
    """
    values = _tensor("heads_by_tokens", "values", values)
    if values.ndim != 2 or 0 in values.shape:
        raise ValueError(f"heads_by_tokens: values must have shape (heads, tokens), got {tuple(values.shape)}")
    names = _labels("heads_by_tokens", heads, len(values), "head")
    columns = _labels("heads_by_tokens", tokens, values.shape[1], "token")
    size = min(2 + 0.25 * len(columns), 24), min(1.2 + 0.18 * len(names), 24)
    figure = _figure()(figsize=size, layout="constrained")
    axis = figure.subplots()
    from matplotlib.colors import LogNorm

    shown = torch.where(values > 0, values, torch.nan)
    top = max(1.0, float(values.nan_to_num().max()))
    norm = LogNorm(vmin=1e-4 if top == 1 else 0.9, vmax=top, clip=True)  # of weights, or of counts
    image = axis.imshow(shown.numpy(), norm=norm, cmap="viridis", aspect="auto", interpolation="nearest")
    if len(names) <= 200:
        axis.set_yticks(range(len(names)), names, fontsize=6)
    if len(columns) <= 120:
        axis.set_xticks(range(len(columns)), [text.strip() or repr(text) for text in columns], rotation=90, fontsize=7)
    figure.colorbar(image, ax=axis, label=label, shrink=0.8)
    return figure


def alpha_curves(alphas: Numbers, steps: Numbers | None = None, labels: Sequence[str] | None = None) -> Any:
    """Plot alphas over training.

    Args:
        alphas: Shape (records, ...): one record per step, each with the alphas of all heads in any shape.
        steps: The training step of each record. None counts them.
        labels: A name per alpha.
    Returns:
        A matplotlib Figure.
    Raises:
        ImportError: matplotlib is missing.
        ValueError: There is no record, or the number of steps or labels is wrong.
    Example:
        >>> figure = alpha_curves(torch.tensor([[0.85, 0.85], [0.8, 0.9]]), steps=[0, 100])
        >>> len(figure.axes[0].lines)
        2
    """
    alphas = _tensor("alpha_curves", "alphas", alphas)
    steps = None if steps is None else _tensor("alpha_curves", "steps", steps).tolist()
    if alphas.ndim < 1 or alphas.numel() == 0:
        raise ValueError(f"alpha_curves: alphas must have shape (records, ...), got {tuple(alphas.shape)}")
    if steps is not None and len(steps) != len(alphas):
        raise ValueError(f"alpha_curves: steps must be one per record, got {len(steps)} for {len(alphas)}")
    curves = alphas.reshape(len(alphas), -1).T
    names = _labels("alpha_curves", labels, len(curves), "head")
    figure = _figure()(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    for name, curve in zip(names, curves, strict=True):
        axis.plot(range(len(alphas)) if steps is None else steps, curve.tolist(), label=name)
    axis.set(xlabel="step", ylabel="alpha")
    if 1 < len(names) <= 12:
        axis.legend(fontsize=8)
    return figure


def _tensor(function: str, name: str, given: Any) -> Tensor:
    """The numbers as a detached float64 tensor on the CPU."""
    if isinstance(given, Tensor):
        if given.is_complex() or given.is_meta:
            raise TypeError(f"{function}: {name} must hold real numbers, got {given.dtype} on {given.device}")
        return given.detach().to("cpu", torch.float64)
    if isinstance(given, numbers.Real):
        return torch.tensor(float(given), dtype=torch.float64, device="cpu")
    if hasattr(given, "__array__"):
        return _tensor(function, name, torch.as_tensor(given.__array__()))
    if not isinstance(given, Iterable) or isinstance(given, (str, bytes)):
        raise TypeError(f"{function}: {name} must be a tensor, an array, or a list of such, got {type(given).__name__}")
    parts = [_tensor(function, name, part) for part in given]
    shapes = [tuple(part.shape) for part in parts]
    if len(set(shapes)) > 1:
        got = ", ".join(map(str, dict.fromkeys(shapes)))
        raise ValueError(f"{function}: {name} must hold parts of one shape, got {got}")
    return torch.stack(parts) if parts else torch.empty(0, dtype=torch.float64, device="cpu")


def _labels(function: str, labels: Sequence[str] | None, wanted: int, what: str) -> Sequence[str]:
    if labels is None:
        return [f"{what} {i + 1}" for i in range(wanted)]
    if len(labels) != wanted:
        raise ValueError(f"{function}: labels must be one per {what}, got {len(labels)} for {wanted}")
    return labels


def _figure() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("diffmax.plot: matplotlib is needed, got none\npip install matplotlib") from error
    return Figure
