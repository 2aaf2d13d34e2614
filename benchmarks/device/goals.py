"""The project's goals that a device can judge, as a table: what is measured, in which cells, and what it has to be."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from benchmarks.device import cells_timed
from benchmarks.device.results import Results

FLASH = ("sdpa_flash", "sdpa_cudnn")
SIZES = (1024, 4096, 16384, 32768, 131072)


@dataclass(frozen=True)
class Goal:
    """One goal: `value` is None where its cells were not measured."""

    what: str
    sign: str
    limit: float
    value: Callable[[Results], float | None]

    def judge(self, results: Results) -> dict[str, object]:
        """As the results' file has it."""
        value = self.value(results)
        met = None if value is None else value <= self.limit if self.sign == "<=" else value >= self.limit
        return {"what": self.what, "sign": self.sign, "goal": self.limit, "value": value, "met": met}


def verdict(judged: dict[str, object]) -> str:
    return {None: "not measured", True: "met", False: "missed"}[judged["met"]]  # type: ignore[index]


def _worst(values: Iterable[float | None], pick: Callable[[list[float]], float]) -> float | None:
    known = [value for value in values if value is not None]
    return pick(known) if known else None


def _rows(dtype: str) -> list[str]:
    return [cells_timed.rows(dtype, 0.85, n).id for n in SIZES]


def _copy(dtype: str) -> Callable[[Results], float | None]:
    # the share of the bandwidth that a copy of as many bytes has
    return lambda results: _worst(
        (1 / r if (r := results.ratio(cell, "copy", "forward")) else None for cell in _rows(dtype)), min
    )


def _softmax(dtype: str) -> Callable[[Results], float | None]:
    return lambda results: _worst((results.ratio(cell, "softmax", "forward") for cell in _rows(dtype)), max)


def _attention(passed: str, alpha: float, length: int, size: int, heads: int, sparsity: float = 0.0) -> Goal:
    scores = "band" if sparsity else "randn"
    cell = cells_timed.attention(scores, alpha, length, size, sparsity=sparsity, heads=heads).id
    limits = {("band", "forward"): 0.75, ("band", "both"): 0.35, ("randn", "forward"): 1.35, ("randn", "both"): 0.85}
    where = f"{length >> 10}k, {sparsity:.0%} of tiles empty" if sparsity else f"{length >> 10}k, dense"
    what = f"attention, bfloat16, D {size}, alpha {alpha}, {where}, {passed}: times FlashAttention"
    return Goal(what, "<=", limits[scores, passed], lambda results: results.ratio(cell, FLASH, passed))


def _adasplash(length: int, sparsity: float, limit: float) -> Goal:
    cell = cells_timed.attention("band", 0.5, length, sparsity=sparsity).id
    what = f"attention, alpha 0.5, {length >> 10}k, {sparsity:.0%} of tiles empty, with backward: times FlashAttention"
    return Goal(what, "<=", limit, lambda results: results.ratio(cell, FLASH, "both"))


def _decode(length: int, content: str, limit: float) -> Goal:
    cell = cells_timed.decode(1, length, content).id

    def value(results: Results) -> float | None:
        own = ("diffmax", "diffmax, bounds")
        rivals = ("sdpa", "sdpa, heads repeated")
        found = [results.ratio(cell, [rival], "step", own=name, graph=True) for name in own for rival in rivals]
        # our better call over their better one
        by_own = [[f for f in found[i : i + 2] if f is not None] for i in (0, 2)]
        return _worst((max(values) if values else None for values in by_own), min)

    name = f"{length >> 10}k" if length < 1 << 20 else "1M"
    return Goal(f"decode, {name} tokens, {content}, device time: times dense softmax", "<=", limit, value)


def _host(results: Results) -> float | None:
    lines = list(results.starting("decode "))
    return _worst((line.get("contestants", {}).get("diffmax", {}).get("step", {}).get("host_us") for line in lines), max)


def _first_call(kind: str) -> Callable[[Results], float | None]:
    def value(results: Results) -> float | None:
        return _worst((line.get(kind, {}).get("first_call_s") for line in results.starting("first call ")), max)

    return value


def _memory(results: Results) -> float | None:
    """By how much the peak of a forward grows from 32k to 128k: 4 is linear, 16 quadratic."""
    peaks = []
    for length in (32768, 131072):
        line = results.cells.get(cells_timed.attention("randn", 0.9, length, flex=length <= 32768).id, {})
        peaks.append(line.get("contestants", {}).get("diffmax", {}).get("forward", {}).get("peak_bytes"))
    return peaks[1] / peaks[0] if all(peaks) else None


def _tests(results: Results) -> float | None:
    known = [line["status"] for line in results.starting("kits ")]
    return None if not known else float(sum(status in ("wrong", "error", "timeout") for status in known))


GOALS = (
    *(
        Goal(f"rows, {dtype}, 1k to 128k, worst share of copy bandwidth", ">=", 0.85, _copy(dtype))
        for dtype in ("float32", "bfloat16")
    ),
    *(
        Goal(f"rows, {dtype}, 1k to 128k, worst times softmax", "<=", 1.15, _softmax(dtype))
        for dtype in ("float32", "bfloat16")
    ),
    *(_attention(p, 0.5, 32768, size, heads, 0.70) for size, heads in ((64, 16), (128, 8)) for p in ("forward", "both")),
    *(_attention(p, 0.9, 16384, size, heads) for size, heads in ((64, 16), (128, 8)) for p in ("forward", "both")),
    *(_adasplash(*given) for given in ((4096, 0.51, 0.7), (16384, 0.64, 0.5), (131072, 0.85, 0.25))),
    *(_decode(131072, content, 0.9) for content in ("spread", "needles", "flat")),
    *(_decode(1 << 20, content, 0.4) for content in ("spread", "needles")),
    Goal("decode, host time of a call, us", "<=", 60, _host),
    Goal("attention, growth of the forward's peak memory from 32k to 128k tokens", "<=", 4.5, _memory),
    Goal("first call of a process, nothing compiled, worst operator, s", "<=", 10, _first_call("cold")),
    Goal("first call after warmup, worst operator, s", "<=", 0.5, _first_call("after_warmup")),
    Goal("tests of the conformance kits that fail", "<=", 0, _tests),
)
