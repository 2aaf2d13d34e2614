"""`AttentionReport`: what was recorded of a model's attention, as tables, numbers, a picture, a page and rollout."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffmax.inspecting.page import framed, page
from diffmax.operators.attention.weights import SparseWeights
from diffmax.operators.common.checks import as_int, is_whole


class Layer(NamedTuple):
    """One call of attention.

    Attributes:
        name: The module that made it; a second call of the same module has " (2)" behind it.
        weights: Of shape (B, H, L, S), or (1, H, T, T) for packed sequences.
        visible: int64 (B, H, L): how many keys each query may see.
    """

    name: str
    weights: SparseWeights
    visible: Tensor


class Read(NamedTuple):
    """One nonzero weight: the query reads the key. `text` names the key; `head` counts from 0."""

    layer: str
    head: int
    query: int
    key: int
    text: str
    weight: float


class Reads(list[Read]):
    """A list of `Read` that prints as a table."""

    def __str__(self) -> str:
        """One line each, below a line of names."""
        rows = [Read._fields, *((*map(str, read[:5]), _shown(read.weight)) for read in self)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(Read._fields))]
        return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def _shown(weight: float) -> str:
    """Four digits after the point, but never 0 for a weight that is not."""
    return f"{weight:.4f}" if weight == 0 or weight >= 5e-5 else f"{weight:.0e}"


@dataclass(frozen=True)
class AttentionReport:
    """What each token of a forward pass reads, by layer and head: exact weights, of which all others are exactly 0.

    Layers are given by their number or their name; heads, tokens and batch entries by their number. In a notebook a report
    shows itself as a page.

    Attributes:
        layers: In the order in which they ran.
        tokens: The text of each token of each batch entry, if a tokenizer was given.
        real: Boolean (B, T), False at padding; None: no token is padding.
        unseen: Attention that ran and is not in `layers`, since its weights cannot be recorded: names, with their kind.
    Example:
        >>> import torch, diffmax
        >>> model = diffmax.nn.DiffmaxAttention(16, 2, alpha=0.5)
        >>> report = diffmax.inspect_attention(model, torch.randn(1, 6, 16).mul(4))
        >>> reads = report.table(5)
        >>> reads[0]._fields
        ('layer', 'head', 'query', 'key', 'text', 'weight')
        >>> bool((report.rollout().to_dense().sum(-1) - 1).abs().max() < 1e-5)
        True
    """

    layers: tuple[Layer, ...]
    tokens: tuple[tuple[str, ...], ...] | None = None
    real: Tensor | None = None
    unseen: tuple[str, ...] = ()

    def __repr__(self) -> str:
        """A line for each layer, not its numbers."""
        lines = [f"AttentionReport of {len(self.layers)} layers: zeros by head; more by .table(token), .zeros(), .to_html()"]
        shares = self.zeros()
        for number, layer in enumerate(self.layers):
            zeros = " ".join(f"{share:.0%}" for share in shares[layer.name].tolist())
            lines.append(f"  {number} {layer.name or 'attention'} {tuple(layer.weights.shape)}: {zeros}")
        lines += [f"  not recorded: {name}" for name in self.unseen]
        return "\n".join(lines)

    def reads(self, layer: int | str, head: int, batch: int = 0) -> Reads:
        """Every nonzero weight of a head, query by query, the largest first."""
        for what, number in (("head", head), ("batch", batch)):
            if not is_whole(number):
                raise TypeError(f"AttentionReport.reads: {what} must be an int, got {number!r} of type {type(number).__name__}")
        found, head, batch = self._layer("reads", layer), as_int(head), as_int(batch)
        self._check("reads", found, batch, head)
        return self._sorted(found, batch, head % found.weights.shape[1], range(found.weights.shape[2]), None)

    def table(self, token: int, batch: int = 0, layer: int | str | None = None, top: int = 10) -> Reads:
        """What one token reads: of each layer, or of one, and each head, the `top` largest weights."""
        for what, number in (("token", token), ("batch", batch), ("top", top)):
            if not is_whole(number):
                raise TypeError(f"AttentionReport.table: {what} must be an int, got {number!r} of type {type(number).__name__}")
        if top < 1:
            raise ValueError(f"AttentionReport.table: top must be at least 1, got {top}")
        given = self.layers if layer is None else (self._layer("table", layer),)
        rows = Reads()
        for found in given:
            for head in range(found.weights.shape[1]):
                self._check("table", found, batch, head, token)
                rows += self._sorted(found, batch, head, [token % found.weights.shape[2]], top)
        return rows

    def supports(self) -> dict[str, Tensor]:
        """Of each layer, the number of keys that each query reads: int64 (B, H, L)."""
        return {layer.name: layer.weights.supports() for layer in self.layers}

    def zeros(self) -> dict[str, Tensor]:
        """Of each layer, per head (H,), the share of visible keys with weight 0, over the queries that are no padding."""
        found = {}
        for layer in self.layers:
            counts = layer.visible > 0
            if self.real is not None and self.real.shape == (layer.weights.shape[0], layer.weights.shape[2]):
                counts = counts & self.real.unsqueeze(1)
            seen, read = (torch.where(counts, t, 0).sum((0, 2)) for t in (layer.visible, layer.weights.supports()))
            found[layer.name] = 1 - read / seen
        return found

    def rollout(self, batch: int = 0, residual: float = 0.5) -> Tensor:
        """Attention rollout: how much of each input token reaches each token of the last layer, through all layers.

        A_l = residual I + (1 - residual) mean_h P_h, each row divided by its sum, multiplied over the layers.

        Args:
            batch: The batch entry.
            residual: The share of the residual connection, from 0 to 1; the paper's is 0.5.
        Returns:
            A sparse CSR matrix (L, L). Products of sparse layers stay sparse for some layers: with many it fills up.
        Raises:
            ValueError: A layer is not from L tokens to the same L tokens, residual is out of range, or there is attention
                that was not recorded.
        Source: Abnar and Zuidema, Quantifying Attention Flow in Transformers, ACL 2020, arXiv:2005.00928.
        """
        if not 0 <= residual <= 1:
            raise ValueError(f"AttentionReport.rollout: residual must lie in [0, 1], got {residual}")
        if self.unseen:
            raise ValueError(
                f"AttentionReport.rollout: every attention must be recorded, got {', '.join(self.unseen)} beside\n"
                "dataclasses.replace(report, unseen=()) leaves it out"
            )
        sizes = {layer.weights.shape[2:] for layer in self.layers}
        if len(sizes) != 1 or len({*next(iter(sizes))}) != 1:
            raise ValueError(f"AttentionReport.rollout: all layers must have one number of tokens, got (L, S) {sorted(sizes)}")
        (length, _), result = next(iter(sizes)), None
        for layer in self.layers:
            self._check("rollout", layer, batch, 0)
            step = _step(layer.weights, batch, length, residual)
            result = step if result is None else _product(step, result)
        if result is None:
            raise ValueError("AttentionReport.rollout: there must be a layer, got none")
        counts = torch.bincount(result.indices()[0], minlength=length)
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        return SparseWeights(offsets, result.indices()[1].int(), result.values(), None, (length, length)).to_sparse_csr()

    def show(self, token: int | None = None, layer: int | str | None = None, batch: int = 0) -> Any:
        """Draw heads by tokens: how many keys each token reads; or of one token, the weight on each, exact zeros blank.

        Args:
            token: None, or the token whose weights are drawn.
            layer: One layer. Default: all that have as many queries and keys as the first.
            batch: The batch entry.
        Returns:
            A matplotlib Figure, which is neither shown nor saved.
        Raises:
            ImportError: matplotlib is missing.
            ValueError, IndexError: A layer, token or batch entry does not exist.
        """
        from diffmax.plot import heads_by_tokens

        size = self.layers[0].weights.shape[2:]
        chosen = [one for one in self.layers if one.weights.shape[2:] == size]
        chosen = chosen if layer is None else [self._layer("show", layer)]
        rows, names = [], []
        for one in chosen:
            for head in range(one.weights.shape[1]):
                self._check("show", one, batch, head, token or 0)
                found = one.weights.head(batch, head)
                rows.append(found.supports().double() if token is None else _dense_row(found, token))
                names.append(f"{one.name}, head {head}")
        labels = self._labels(batch, rows[0].shape[0])
        return heads_by_tokens(torch.stack(rows), names, labels, "keys read" if token is None else "weight (blank: exactly 0)")

    def to_html(self, path: str | Path | None = None, batch: int = 0) -> str:
        """A page that shows what each token reads, by layer and head, with the mouse or arrow keys; it needs no network.

        Its size is bounded: of long inputs and many layers it has the first tokens and the largest weights, and says so.

        Args:
            path: Where to write it. None: nowhere.
            batch: The batch entry.
        Returns:
            The page.
        """
        for layer in self.layers:
            self._check("to_html", layer, batch, 0)
        longest = {size for layer in self.layers for size in layer.weights.shape[2:]}
        made = page([(layer.name, layer.weights) for layer in self.layers], batch, {n: self._labels(batch, n) for n in longest})
        if path is not None:
            Path(path).write_text(made, encoding="utf-8")
        return made

    def _repr_html_(self) -> str:
        return framed(self.to_html())

    def _labels(self, batch: int, count: int) -> list[str]:
        """The tokens' names, or their numbers if they have none or another number is asked for."""
        if self.tokens is None or len(self.tokens[batch]) != count:
            return [str(i) for i in range(count)]
        return list(self.tokens[batch])

    def _layer(self, method: str, given: int | str) -> Layer:
        names = [layer.name for layer in self.layers]
        if given in names:
            return self.layers[names.index(given)]
        if isinstance(given, int) and -len(names) <= given < len(names):
            return self.layers[given]
        raise ValueError(
            f"AttentionReport.{method}: layer must be below {len(names)} or one of {', '.join(names)}, got {given!r}"
        )

    def _check(self, method: str, layer: Layer, *place: int) -> None:
        for what, at, size in zip(("batch", "head", "token"), place, layer.weights.shape, strict=False):
            if not -size <= at < size:
                raise IndexError(f"AttentionReport.{method}: {what} must lie in [-{size}, {size}), got {at}")

    def _sorted(self, layer: Layer, batch: int, head: int, queries: Any, top: int | None) -> Reads:
        labels, rows = self._labels(batch, layer.weights.shape[3]), Reads()
        found = layer.weights.head(batch, head)
        for query in queries:
            keys, weights = found.query(query)
            order = weights.argsort(descending=True, stable=True)[:top]
            for key, weight in zip(keys[order].tolist(), weights[order].tolist(), strict=True):
                rows.append(Read(layer.name, head, query, key, labels[key], weight))
        return rows


def _step(weights: SparseWeights, batch: int, length: int, residual: float) -> Tensor:
    """One layer of rollout, sparse COO."""
    heads = [weights.head(batch, head) for head in range(weights.shape[1])]
    every = torch.arange(length)
    places = [torch.stack([head.rows(), head.indices.long()]) for head in heads] + [torch.stack([every, every])]
    values = [head.values.double() * ((1 - residual) / len(heads)) for head in heads]
    values.append(torch.full((length,), residual, dtype=torch.float64))
    mixed = torch.sparse_coo_tensor(
        torch.cat(places, 1), torch.cat(values), (length, length), check_invariants=False
    ).coalesce()  # before the division: a row's sum is over all heads
    rows = mixed.indices()[0]
    total = torch.zeros(length, dtype=torch.float64).index_add_(0, rows, mixed.values())
    shares = mixed.values() / total[rows].clamp_min(torch.finfo(torch.float64).tiny)
    return torch.sparse_coo_tensor(mixed.indices(), shares, (length, length), is_coalesced=True, check_invariants=False)


def _product(a: Tensor, b: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        product: Tensor = torch.sparse.mm(a, b)
    return product.coalesce()


def _dense_row(weights: SparseWeights, query: int) -> Tensor:
    keys, values = weights.query(query)
    return torch.zeros(weights.shape[-1], dtype=torch.float64).index_put_((keys.long(),), values.double())
