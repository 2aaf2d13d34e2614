"""What every backend's decoding has to get right, as functions: `kvcache_conformance` and the tests call them.

The truth is `diffmax.reference.decoding` in float64 on the CPU, which diffmax's own tests hold to entmax. The gate is the row
operator's. Entries after the end of a sequence are NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

import diffmax
from diffmax import KVCacheStats, PageBounds
from diffmax.operators.decoding.operator import SCHEMA
from diffmax.plugin import KVCacheCall
from diffmax.testing.attention.checks import attention
from diffmax.testing.gate import Gate, gates
from diffmax.testing.rows.cases import SPECIAL_ALPHAS, inf, nan
from diffmax.testing.rows.checks import _expect, _opcheck, _poisoned_memory, _within

# what it returns depends on return_stats, which is passed among other keywords here
attend: Callable[..., Any] = diffmax.attention_with_kvcache


@dataclass(frozen=True)
class Case:
    """Sizes and features of one decoding call.

    Attributes:
        lengths: Tokens of each sequence, the new ones among them.
        new: How many of them the call appends.
        room: Tokens that a sequence can have.
        page_size: Of a cache in pages; 0: not in pages.
        bounds: Page size of the bounds that are passed for a cache not in pages; for one in pages any number but 0. 0: none.
        bits: 4: the bounds hold the keys in 4 bits too.
        rows: Whether the sequences lie in other rows of a larger cache.
        leftpad: Where each sequence starts; empty: at 0.
        sigma: Spread of queries and keys.
    """

    lengths: tuple[int, ...] = (129, 65, 1)
    new: int = 0
    room: int = 150
    page_size: int = 0
    bounds: int = 0
    bits: int | None = None
    rows: bool = False
    leftpad: tuple[int, ...] = ()
    length: int = 1
    heads: int = 2
    kv_heads: int = 2
    head_dim: int = 16
    value_dim: int = 0
    sigma: float = 1.5
    alpha: float | tuple[float, ...] = 0.7
    slopes: bool = False
    sink: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def features(self) -> set[str]:
        """Those of `diffmax.plugin.FEATURES` that the call needs."""
        causal, window = self.options.get("causal"), self.options.get("window_size", (-1, -1))
        needs = {
            "kv_cache": True,
            "paged": self.page_size > 0,
            "causal": causal or window[1] == 0,
            "window": window[0] >= 0 or (window[1] > 0 and not causal),
            "gqa": self.heads != self.kv_heads,
            "value_dim": self.value_dim not in (0, self.head_dim),
            "tensor_alpha": isinstance(self.alpha, tuple),
            "softcap": "softcap" in self.options,
            "alibi": self.slopes,
            "sink": self.sink,
            "leftpad": bool(self.leftpad),
            "rounded_keys": self.bits is not None,
        }
        return {name for name, needed in needs.items() if needed}


@dataclass
class Inputs:
    """A call's tensors; the caches and the bounds are changed by it."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    k: Tensor | None
    v: Tensor | None
    bounds: PageBounds | None
    keywords: dict[str, Any]

    def to(self, device: str, dtype: torch.dtype) -> Inputs:
        """A copy elsewhere, or in another dtype."""

        def moved(t: Any) -> Any:
            if not isinstance(t, Tensor):
                return t
            wide = t.dtype == torch.float64 and torch.device(device).type not in ("cpu", "cuda")
            return t.to(device=device, dtype=torch.float32 if wide else t.dtype, copy=True)

        fields = (self.q, self.k_cache, self.v_cache, self.k, self.v)
        tensors = [t if t is None else t.to(device=device, dtype=dtype, copy=True) for t in fields]
        q, k_cache, v_cache, k, v = tensors
        assert q is not None
        assert k_cache is not None
        assert v_cache is not None
        bounds = self.bounds
        if bounds is not None:
            ends = (t.to(device=device, dtype=dtype, copy=True) for t in (bounds.low, bounds.high))
            codes = None if bounds.codes is None else bounds.codes.to(device=device, copy=True)
            bounds = PageBounds(next(ends), next(ends), bounds.page_size, codes)
        return Inputs(q, k_cache, v_cache, k, v, bounds, {name: moved(t) for name, t in self.keywords.items()})

    def run(self, backend: str, **more: Any) -> Any:
        """Call."""
        keywords = {**self.keywords, "page_bounds": self.bounds, "backend": backend, **more}
        return attend(self.q, self.k_cache, self.v_cache, self.k, self.v, **keywords)


# Every feature alone, and the pairs that interact.
CASES: dict[str, Case] = {
    "plain": Case(),
    "new token": Case(new=1, options={"causal": True}),
    "chunk": Case(lengths=(129, 65, 40), new=5, length=5, options={"causal": True}),
    "chunk over several pages": Case(lengths=(129, 90), new=70, length=70, bounds=16, options={"causal": True}),
    "chunk that sees all": Case(lengths=(129, 65), new=3, length=3),
    "more queries than keys": Case(lengths=(129, 3, 0), length=9, options={"causal": True}),
    "empty and full": Case(lengths=(150, 0)),
    "pages": Case(page_size=16),
    "pages, new token": Case(lengths=(129, 65, 1, 16, 17), new=1, page_size=16, bounds=1, options={"causal": True}),
    "pages of 5, chunk": Case(lengths=(129, 65, 14), new=7, length=7, page_size=5, bounds=1, options={"causal": True}),
    "long pages, chunk, window": Case(
        lengths=(300, 129), new=3, length=3, room=384, page_size=128, bounds=1, options={"causal": True, "window_size": (90, 0)}
    ),
    "bounds": Case(lengths=(400, 222), room=400, bounds=32, sigma=3.0, alpha=0.5),
    "bounds, softcap, slopes, sink": Case(
        lengths=(300, 222), room=310, bounds=16, sigma=2.0, alpha=0.5, slopes=True, sink=True, options={"softcap": 9.0}
    ),
    "bounds, negative scale": Case(lengths=(300, 222), room=300, bounds=16, sigma=2.0, options={"softmax_scale": -0.3}),
    "rows of a larger cache": Case(lengths=(129, 65), new=1, rows=True, bounds=64),
    "grouped heads": Case(heads=8, kv_heads=2, new=1, options={"causal": True}),
    "one key head, chunk": Case(lengths=(140, 70), heads=5, kv_heads=1, new=15, length=15, options={"causal": True}),
    "alpha per head": Case(heads=4, kv_heads=2, alpha=(0.2, 0.5, 0.9, 0.99), new=1),
    "sparsemax and softmax heads": Case(alpha=(0.0, 1.0), bounds=16),
    "alpha 0.01": Case(alpha=0.01),
    "alpha 0.5": Case(alpha=0.5),
    "alpha 0.999": Case(alpha=0.999),
    "dense": Case(lengths=(700,), room=700, sigma=0.3, alpha=0.95, bounds=64),
    "sparse": Case(lengths=(700,), room=700, sigma=4.0, alpha=0.3, bounds=64),
    "head size 40": Case(head_dim=40),
    "head size 128, value size 24": Case(head_dim=128, value_dim=24, sigma=0.8, bounds=32),
    "window": Case(lengths=(129, 65), length=3, options={"window_size": (20, 5)}, bounds=16),
    "window of the own key": Case(new=1, options={"window_size": (0, 0)}),
    "softcap": Case(options={"softcap": 4.0}),
    "slopes": Case(slopes=True, length=4, lengths=(129, 65)),
    "sink": Case(sink=True, lengths=(129, 0)),
    "late start": Case(leftpad=(70, 0, 1), length=3, options={"causal": True}),
    "late start, pages, bounds, window, new token": Case(
        lengths=(129, 65, 40), leftpad=(100, 3, 39), new=1, page_size=16, bounds=1, options={"window_size": (60, 0)}
    ),
    "late start, other rows, grouped heads": Case(
        lengths=(129, 65, 40), leftpad=(100, 3, 39), rows=True, heads=6, kv_heads=2, options={"causal": True}
    ),
    "rounded keys": Case(lengths=(400, 222, 0), room=400, bounds=64, bits=4, sigma=2.0, alpha=0.5),
    "rounded keys, dense": Case(lengths=(700,), room=700, bounds=64, bits=4, sigma=0.3, alpha=0.95),
    "rounded keys, new token, pages": Case(
        lengths=(129, 65, 1, 16, 17), new=1, page_size=16, bounds=1, bits=4, sigma=2.0, options={"causal": True}
    ),
    "rounded keys, chunk, pages of 5, head size 7": Case(
        lengths=(129, 65, 14), new=7, length=7, page_size=5, bounds=1, bits=4, head_dim=7, options={"causal": True}
    ),
    "rounded keys, grouped heads, window, late start": Case(
        *((300, 229, 135), 70, 310),
        bounds=32,
        bits=4,
        leftpad=(40, 0, 3),
        length=3,
        heads=6,
        kv_heads=2,
        value_dim=24,
        sigma=2.0,
        options={"window_size": (200, 0)},
    ),
    "rounded keys, softcap, slopes, sink, rows": Case(
        lengths=(300, 222),
        room=310,
        bounds=16,
        bits=4,
        rows=True,
        sigma=2.0,
        alpha=0.5,
        slopes=True,
        sink=True,
        options={"softcap": 9.0},
    ),
    "rounded keys, alpha per head, negative scale": Case(
        lengths=(300, 222),
        room=300,
        bounds=128,
        bits=4,
        heads=4,
        kv_heads=1,
        alpha=(0.0, 0.3, 0.9, 1.0),
        options={"softmax_scale": -0.3},
    ),
}


def inputs(case: Case, dtype: torch.dtype) -> Inputs:
    """Random tensors on the CPU, from torch's global generator."""
    batch, value_dim = len(case.lengths), case.value_dim or case.head_dim
    before = torch.tensor([max(n - case.new, 0) for n in case.lengths], dtype=torch.int32)
    q = torch.randn(batch, case.length, case.heads, case.head_dim).mul(case.sigma).to(dtype)
    held = torch.randn(batch, case.room, case.kv_heads, case.head_dim).mul(case.sigma).to(dtype)
    values = torch.randn(batch, case.room, case.kv_heads, value_dim).to(dtype)
    k = torch.randn(batch, case.new, case.kv_heads, case.head_dim).mul(case.sigma).to(dtype) if case.new else None
    v = torch.randn(batch, case.new, case.kv_heads, value_dim).to(dtype) if case.new else None
    behind = torch.arange(case.room) >= before.unsqueeze(1)
    before_start = torch.arange(case.room) < torch.tensor(case.leftpad or (0,) * batch).unsqueeze(1)
    hidden = behind | before_start
    held[hidden], values[hidden] = nan, nan
    keywords: dict[str, Any] = {"cache_seqlens": before, "alpha": case.alpha, **case.options}
    if isinstance(case.alpha, tuple):
        keywords["alpha"] = torch.tensor(case.alpha, dtype=torch.float64)
    if case.slopes:
        keywords["alibi_slopes"] = torch.rand(batch, case.heads) * 0.2
    if case.leftpad:
        keywords["cache_leftpad"] = torch.tensor(case.leftpad, dtype=torch.int32)
    if case.sink:
        keywords["sink"] = torch.randn(case.heads, dtype=torch.float64).to(torch.float32)
    if case.page_size:
        held, values, table = _in_pages(case, before, held, values)
        keywords["block_table"] = table
        bounds = diffmax.page_bounds(held, before, table, bits=case.bits) if case.bounds else None
        return Inputs(q, held, values, k, v, bounds, keywords)
    if case.rows:
        rows = torch.tensor([3, 1, 6, 2, 0][:batch], dtype=torch.int32)
        keywords["cache_batch_idx"] = rows
        lengths = torch.zeros(7, dtype=torch.int32).index_put((rows.long(),), before)
        held, values = (torch.full((7, *t.shape[1:]), nan, dtype=dtype).index_put((rows.long(),), t) for t in (held, values))
    else:
        lengths = before
    bounds = diffmax.page_bounds(held, lengths, page_size=case.bounds, bits=case.bits) if case.bounds else None
    return Inputs(q, held, values, k, v, bounds, keywords)


def _in_pages(case: Case, before: Tensor, held: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The caches cut into pages that lie in any order, three of them nobody's; table entries that are not in use are wild."""
    batch, size = len(case.lengths), case.page_size
    count = -(-case.room // size)
    order = torch.randperm(batch * count + 3)[: batch * count].view(batch, count)
    caches = []
    for t in (held, values):
        t = torch.nn.functional.pad(t, (0, 0, 0, 0, 0, count * size - case.room), value=nan)
        pages = torch.full((batch * count + 3, size, *t.shape[2:]), nan, dtype=t.dtype)
        caches.append(pages.index_put((order,), t.view(batch, count, size, *t.shape[2:])))
    ends = (before + case.new).unsqueeze(1)
    table = torch.where(torch.arange(count) * size < ends, order, torch.tensor([-1, 1 << 30])[torch.arange(count) % 2])
    return caches[0], caches[1], table.to(torch.int32)


def decoding_passes_the_gate(backend: str, device: str, case: Case, dtype: torch.dtype) -> None:
    """The output is as near to the truth as the gate asks; caches and bounds hold the new tokens, exactly, and nothing else."""
    given = inputs(case, dtype)
    yardstick, ours = given.to("cpu", dtype), given.to(device, dtype)
    gate = _gate(given)
    yardstick.run("reference")
    out = ours.run(backend)
    _expect(out.dtype == dtype and out.shape == gate.exact.shape and out.is_contiguous(), f"got {out.dtype} {tuple(out.shape)}")
    _within(out, *gate, "output")
    _expect(bool(out.isfinite().all()), "the output is not finite")
    for what, got, wanted in (("k_cache", ours.k_cache, yardstick.k_cache), ("v_cache", ours.v_cache, yardstick.v_cache)):
        _expect(_same(got, wanted), f"{what} differs after the call")
    if ours.bounds is not None and yardstick.bounds is not None:
        for what, got, wanted in zip(("low", "high"), ours.bounds[:2], yardstick.bounds[:2], strict=True):
            _expect(_same(got, wanted), f"the bounds' {what} differs after the call")
        if ours.bounds.codes is not None:
            _rounds_its_keys(ours.to("cpu", torch.float64))


def _rounds_its_keys(ours: Inputs) -> None:
    """Every key that the cache holds after a call is nearest to what its code stands for. Where bounds are NaN none need be."""
    assert ours.bounds is not None
    assert ours.bounds.codes is not None
    size, table = ours.bounds.page_size, ours.keywords.get("block_table")
    ends = (ours.keywords["cache_seqlens"] + (0 if ours.k is None else ours.k.shape[1])).tolist()
    starts = ours.keywords.get("cache_leftpad", torch.zeros(len(ends), dtype=torch.int32)).tolist()
    rows = ours.keywords.get("cache_batch_idx", torch.arange(len(ends))).tolist()
    for b, (start, end) in enumerate(zip(starts, ends, strict=True)):
        for page in range(start // size, -(-end // size)):
            where = (int(table[b, page]),) if table is not None else (rows[b], page)
            first = max(start - page * size, 0)
            last = min(end - page * size, size)
            span = slice(first, last) if table is not None else slice(page * size + first, page * size + last)
            keys, codes = ours.k_cache[where[0], span], ours.bounds.codes[where]
            low, high = ours.bounds.low[where], ours.bounds.high[where]
            steps = (high - low) / 15
            halves = torch.cat([codes & 15, codes >> 4], 1)[:, : keys.shape[2], first:last].movedim(2, 0)
            off = (low + steps * halves - keys).abs()
            allowed = steps / 2 + 1e-4 * steps + 1e-15 * (low.abs() + high.abs())
            _expect(not bool((off > allowed).any()), f"keys of page {page} of sequence {b} are not near their codes")


def special_alphas_pass_the_gate(
    backend: str, device: str, dtype: torch.dtype, alphas: Sequence[float] = SPECIAL_ALPHAS[2::3]
) -> None:
    """`checks.special_alphas_pass_the_gate` of decoding."""
    for alpha in alphas:
        case = Case(lengths=(33,), room=40, heads=1, kv_heads=1, length=3, alpha=alpha)
        try:
            decoding_passes_the_gate(backend, device, case, dtype)
        except AssertionError as error:
            raise AssertionError(f"alpha={alpha!r}: {error}") from None


def _gate(given: Inputs) -> Gate:
    """For the output; without bounds, which are not those of its neighbours."""

    def run(q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor | None, v: Tensor | None) -> Tensor:
        out: Tensor = Inputs(q, k_cache.clone(), v_cache.clone(), k, v, None, given.keywords).run("reference")
        return out

    return gates(run, given.q, given.k_cache, given.v_cache, given.k, given.v)[0]


def decoding_goes_on(backend: str, device: str, dtype: torch.dtype, rounded: bool = False) -> None:
    """Token after token, over the ends of pages, equals attention over all of them at once."""
    total, size = 40, 8
    q, k, v = torch.randn(3, 1, total, 2, 16).mul(1.5).to(dtype).to(device).unbind()
    k_cache, v_cache = torch.full((2, 6, size, 2, 16), nan, dtype=dtype, device=device).unbind()
    table = torch.tensor([[4, 0, 5, 1, 3]], dtype=torch.int32, device=device)
    bounds = diffmax.page_bounds(k_cache, 0, table, bits=4 if rounded else None)
    pieces, done = [], 0
    for chunk in (7, 1, 1, 1, 13, 1, 16):
        part = slice(done, done + chunk)
        keywords = {"cache_seqlens": done, "block_table": table, "causal": True, "alpha": 0.6, "page_bounds": bounds}
        pieces.append(attend(q[:, part], k_cache, v_cache, k[:, part], v[:, part], **keywords, backend=backend))
        done += chunk
    rows = [t.transpose(1, 2).cpu() for t in (q, k, v)]
    (wanted,) = gates(lambda *rows: attention(*rows, is_causal=True, alpha=0.6, backend="reference"), *rows)
    _within(torch.cat(pieces, 1).transpose(1, 2), *wanted, "output")


def pages_that_cannot_matter_are_not_read(backend: str, device: str, dtype: torch.dtype) -> None:
    """Where bounds prove pages dead they are left out: the count says so, and NaN in such pages does not reach the output."""
    case = Case(lengths=(1024,), room=1024, heads=4, kv_heads=2, alpha=0.5, bounds=32, sigma=1.0)
    given = inputs(case, dtype)
    given.q[:] = given.q[:, :, ::2].repeat_interleave(2, 2)
    # each key head's query finds its like in two pages, and little elsewhere
    given.k_cache.mul_(0.05)
    poisoned = [7, 12, 19, 27]
    given.k_cache.view(1, 32, 32, 2, 16)[:, poisoned] *= 0.01  # the least of all: a kernel may begin with some of the others
    for page in (0, 20):
        given.k_cache[:, page * 32 + 5] = 4 * given.q[:, 0, ::2]
    bounds = diffmax.page_bounds(given.k_cache, 1024, page_size=32)
    given = replace(given, bounds=bounds)
    wanted = _gate(given)
    ours = given.to(device, dtype)
    ours.k_cache.view(1, 32, 32, 2, 16)[:, poisoned] = nan
    out, stats = ours.run(backend, return_stats=True)
    _within(out, *wanted, "output")
    read = stats.pages_read.cpu()
    _expect(bool((read >= 2).all() and (read <= 16).all()), f"of 32 pages, 2 matter; read were {read.tolist()}")
    blind = replace(ours, bounds=None, k_cache=given.k_cache.to(device))
    _expect(bool((blind.run(backend, return_stats=True)[1].pages_read == 16).all()), "without bounds all is read")


def keys_that_cannot_matter_are_not_read(backend: str, device: str, dtype: torch.dtype) -> None:
    """With keys in 4 bits single keys are left out: NaN in them, and in their values, does not reach the output."""
    case = Case(lengths=(1024,), room=1024, heads=4, kv_heads=2, head_dim=32, alpha=0.5, bounds=64, bits=4, sigma=2.0)
    given = inputs(case, dtype)
    wanted = _gate(given)
    assert given.bounds is not None
    queries = given.q[0, 0].double().view(2, 2, 32) / 32**0.5
    scores = torch.einsum("hgd,nhd->hgn", queries, given.k_cache[0].double())
    extent = (given.bounds.high - given.bounds.low)[0].double()
    error = torch.einsum("hgd,phd->hgp", queries.abs(), extent).amax(2, keepdim=True) / 30
    # a weight takes a score less than 2 below the largest, and both may be taken for others that are an error away
    below = (scores < scores.amax(2, keepdim=True) - 2 - 2.1 * error).all(1).mT
    _expect(int(below.sum()) > 1024, f"{int(below.sum())} of 2048 keys can be left out, which are too few for the test")
    ours = given.to(device, dtype)
    for cache in (ours.k_cache, ours.v_cache):
        cache[0].masked_fill_(below.unsqueeze(2).to(device), nan)
    out, stats = ours.run(backend, return_stats=True)
    _within(out, *wanted, "output")
    read = stats.pages_read.cpu()
    _expect(bool((read >= 1).all() and (read <= 16).all()), f"of 16 pages were read {read.tolist()}")


# The cases that `statistics_are_right` is asked of
STATISTICS_OF = (
    *("plain", "bounds", "bounds, softcap, slopes, sink", "pages of 5, chunk"),
    *("rounded keys", "rounded keys, softcap, slopes, sink, rows"),
)


def statistics_are_right(backend: str, device: str, case: Case, dtype: torch.dtype) -> None:
    """tau and support sizes are the reference's, but for scores that lie at the threshold itself."""
    given = inputs(case, dtype)
    ours: KVCacheStats = given.to(device, dtype).run(backend, return_stats=True)[1]
    theirs: KVCacheStats = given.to("cpu", dtype).run("reference", return_stats=True)[1]
    scale = float(theirs.tau.nan_to_num(neginf=0.0).abs().max())
    _within(
        ours.tau.clamp_min(-1e30), theirs.tau.clamp_min(-1e30).double(), 64 * torch.finfo(ours.tau.dtype).eps * scale, "tau"
    )
    differing = int((ours.support_size.cpu() != theirs.support_size).sum())
    _expect(differing <= 2, f"{differing} support sizes differ")


def bad_keys_and_queries(backend: str, device: str, dtype: torch.dtype, rounded: bool = False) -> None:
    """NaN and inf in a query spoil that query alone; NaN in a key that is seen spoils the head's queries, with bounds too."""
    given = inputs(Case(lengths=(129, 129), length=3, bounds=16, bits=4 if rounded else None), dtype)
    for bounds in (None, given.bounds):
        ours = replace(given, bounds=bounds).to(device, dtype)
        ours.q[0, 1, 0, 2], ours.q[1, 2, 1, 3] = nan, inf
        out = ours.run(backend).isnan().cpu()
        wanted = torch.zeros_like(out)
        wanted[0, 1, 0], wanted[1, 2, 1] = True, True
        _expect(torch.equal(out, wanted), f"NaN at {out.any(3).nonzero().tolist()}")
    ours = given.to(device, dtype)
    ours.k_cache[1, 70, 0, 5] = nan
    ours.bounds = diffmax.page_bounds(ours.k_cache, 129, page_size=16, bits=4 if rounded else None)
    out = ours.run(backend).isnan().all(3).cpu()
    _expect(bool(out[1, :, 0].all()) and int(out.sum()) == 3, f"NaN in a key gave NaN at {out.nonzero().tolist()}")


def is_repeatable(backend: str, device: str, dtype: torch.dtype, rounded: bool = False) -> None:
    """The same input gives the same bits, in fresh memory full of NaN too."""
    bits = 4 if rounded else None
    given = inputs(Case(lengths=(700, 400), room=700, new=1, bounds=64, bits=bits, sigma=2.0, alpha=0.5), dtype)
    results = [given.to(device, dtype).run(backend) for _ in range(2)]
    with _poisoned_memory():
        results.append(given.to(device, dtype).run(backend))
    _expect(all(torch.equal(results[0], result) for result in results[1:]), "results differ in their bits")


def strided_caches(backend: str, device: str, dtype: torch.dtype, rounded: bool = False) -> None:
    """Caches that are slices of one tensor, heads before tokens, as models hold them."""
    case = Case(lengths=(129, 90), new=1, bounds=16, bits=4 if rounded else None)
    given = inputs(case, dtype)
    ours, theirs = given.to(device, dtype), given.to("cpu", dtype)
    both = torch.stack([ours.k_cache, ours.v_cache]).permute(1, 3, 2, 0, 4).contiguous()
    ours.k_cache, ours.v_cache = (both[:, :, :, which].transpose(1, 2) for which in (0, 1))
    assert ours.k is not None
    ours.k = torch.stack([ours.k, ours.k], 4)[..., 0]
    ours.q = torch.stack([ours.q, ours.q], 4)[..., 0]
    wanted = _gate(given)
    theirs.run("reference")
    _within(ours.run(backend), *wanted, "output")
    _expect(_same(ours.k_cache, theirs.k_cache) and _same(ours.v_cache, theirs.v_cache), "the caches differ after the call")


def passes_opcheck(backend: str, device: str, dtype: torch.dtype, rounded: bool = False) -> None:
    """torch.library.opcheck: schema with what is changed in place, shapes for tracing."""
    for case in (Case(new=1, bounds=16, bits=4),) if rounded else (Case(new=1, bounds=16), Case()):
        t = inputs(case, dtype).to(device, dtype)
        for cache in (t.k_cache, t.v_cache):
            cache.nan_to_num_()  # opcheck compares with ==
        low, high, _, codes = t.bounds or (None,) * 4
        options = {"cache_seqlens": t.keywords["cache_seqlens"], "low": low, "high": high, "page_size": 16, "codes": codes}
        call = KVCacheCall(scale=0.25, e=0.5, k=t.k, v=t.v, **options)
        arguments = SCHEMA.flatten(t.q, t.k_cache, t.v_cache, False, call, backend)
        _opcheck("attention_kvcache", device, arguments)


def compiles_in_one_graph(backend: str, device: str, dtype: torch.dtype) -> None:
    """torch.compile(fullgraph=True) of an appending call equals eager, caches included."""
    torch._dynamo.reset()
    keywords: dict[str, Any] = {"alpha": 0.6, "backend": backend}

    def step(q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
        out: Tensor = attend(q * 2, k_cache, v_cache, k, v, cache_seqlens=lengths, **keywords)
        return out + 1

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    given = inputs(Case(new=1), dtype)
    ours, theirs = given.to(device, dtype), given.to(device, dtype)
    results = []
    with torch.no_grad():
        for function, t in ((compiled, ours), (step, theirs)):
            assert t.k is not None
            assert t.v is not None
            results.append(function(t.q, t.k_cache, t.v_cache, t.k, t.v, t.keywords["cache_seqlens"]))
    _within(
        results[0], results[1].cpu().double(), 4 * torch.finfo(dtype).eps * float(results[1].abs().max()), "compiled output"
    )
    _expect(
        _same(ours.k_cache, theirs.k_cache) and _same(ours.v_cache, theirs.v_cache), "the caches differ after compiled code"
    )


def _same(ours: Tensor, theirs: Tensor) -> bool:
    return torch.equal(ours.cpu().nan_to_num(nan=7.25), theirs.cpu().nan_to_num(nan=7.25))
