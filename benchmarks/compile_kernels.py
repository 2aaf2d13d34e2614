"""Compile every Triton kernel for every architecture with the Triton that is first on the path, from the real launch code.

    python -m benchmarks.compile_kernels --jobs 2 --output build/compiled.json

`.ci/check_triton.py` runs it for the oldest and the newest Triton that diffmax is for. No GPU is needed: nothing runs. What is
compiled is chosen so that each pair of `PAIRS` occurs, and in particular each kernel on each target.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import importlib
import itertools
import json
import multiprocessing
import os
import pkgutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

TARGETS = ("sm80", "sm86", "sm90", "sm100", "sm120", "gfx90a", "gfx942", "gfx1100")

# Name to features of `diffmax.plugin.FEATURES`
OPTIONS = {
    "plain": (),
    "causal": ("causal",),
    "window, sink": ("window", "sink"),
    "mask": ("mask",),
    "causal, bias, ALiBi": ("causal", "bias", "alibi"),
    "causal, softcap, dropout": ("causal", "softcap", "dropout"),
    "packed, causal, grouped": ("varlen", "causal", "gqa"),
    "all": ("causal", "window", "bias", "alibi", "softcap", "sink", "dropout"),
}
DECODE_OPTIONS = {
    "plain": (),
    "bounds, grouped": ("gqa", "bounds"),
    "pages, causal, bounds, grouped": ("paged", "causal", "gqa", "bounds"),
    "all": ("paged", "window", "softcap", "alibi", "sink", "bounds", "attention_stats"),
}
# Name to features of `diffmax.plugin.FEATURES`
POWER_FEATURES = {"plain": (), "gates, state, grouped": ("gates", "state", "gqa")}
# Name to features of `diffmax.plugin.FEATURES`, "squared", and "mass", whose gradient is asked for
THRESHOLD_OPTIONS = {
    "plain": (),
    "bias, grouped": ("distance_bias", "gqa"),
    "mask, squared": ("mask", "squared", "mass"),
    "packed, bias": ("varlen", "distance_bias", "real_power", "mass"),
}
ALPHAS = {"0.85": 0.15, "0.5": 0.5, "tensor": None}
# What callers may ask for besides; "fixed" is a tensor whose gradient is not wanted
MORE_ALPHAS = {**ALPHAS, "0.9": 0.1, "fixed": None}
MORE_POWER_FEATURES = {**POWER_FEATURES, "gates": ("gates", "gqa")}

Factors = Mapping[str, Sequence[str]]
Pairs = Sequence[tuple[str, str]]

# Architectures with the same matrix instructions, and the same settings
MMA = ("sm80", "sm86", "sm120")

# For each operator: what varies, and what of it is to occur together. vendor, kind, family, unit and bias follow.
FACTORS: dict[str, Factors] = {
    "rows": {
        "target": TARGETS,
        "dtype": ("float16", "bfloat16", "float32", "float64"),
        "length": ("48", "1024", "16384"),
        "alpha": tuple(ALPHAS),
    },
    "long rows": {"target": TARGETS, "dtype": ("bfloat16", "float32", "float64"), "rows": ("1", "300"), "alpha": tuple(ALPHAS)},
    "attention": {
        "target": TARGETS,
        "dtype": ("float16", "bfloat16", "float32"),
        "size": ("64", "128", "256", "80"),
        "options": tuple(OPTIONS),
        "alpha": tuple(ALPHAS),
        "for": ("training", "inference"),
    },
    "decoding": {
        "target": TARGETS,
        "dtype": ("float16", "bfloat16", "float32"),
        "size": ("64", "128", "256", "80"),
        "options": tuple(DECODE_OPTIONS),
        "alpha": tuple(ALPHAS),
    },
    "power": {
        "target": TARGETS,
        "dtype": ("bfloat16", "float16", "float32"),
        "size": ("64", "128", "32"),
        "degree": ("2", "4"),
        "features": tuple(POWER_FEATURES),
    },
    "threshold": {
        "target": TARGETS,
        "dtype": ("bfloat16", "float16", "float32"),
        "size": ("64", "128", "256", "80"),
        "weights": ("softmax", "scores"),
        "options": tuple(THRESHOLD_OPTIONS),
    },
}
PAIRS: dict[str, Pairs] = {
    "rows": (
        ("target", "vendor"), ("family", "dtype"), ("vendor", "length"), ("dtype", "length"), ("dtype", "alpha"),
        ("length", "alpha"),
    ),
    "long rows": (("target", "rows"), ("rows", "dtype"), ("rows", "alpha")),
    "attention": (
        ("family", "dtype"), ("family", "size"), ("target", "bias"), ("target", "for"), ("kind", "options"),
        ("unit", "alpha"), ("dtype", "size"), ("dtype", "options"), ("dtype", "alpha"), ("dtype", "for"), ("family", "options"),
    ),
    "decoding": (
        ("target", "vendor"), ("dtype", "size"), ("dtype", "options"), ("family", "options"), ("options", "alpha"),
        ("unit", "alpha"),
    ),
    "power": (
        ("target", "features"), ("family", "dtype"), ("family", "size"), ("family", "degree"), ("dtype", "size"),
    ),
    "threshold": (
        ("target", "bias"), ("family", "dtype"), ("family", "size"), ("target", "weights"), ("family", "options"),
        ("dtype", "size"),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One call: the operator, and a value of each of its factors."""

    operator: str
    values: tuple[tuple[str, str], ...]

    @property
    def of(self) -> dict[str, str]:
        return dict(self.values)

    @property
    def traits(self) -> dict[str, str]:
        """The factors, and what follows from them."""
        own = self.of
        own["vendor"] = own["target"][:2]
        own["kind"] = own["target"][: 2 if own["vendor"] == "sm" else 4]
        own["family"] = "gfx9" if own["target"].startswith("gfx9") else "mma" if own["target"] in MMA else own["target"]
        own["unit"] = f"{own['family']}, {'narrow' if own['dtype'] in ('float16', 'bfloat16') else own['dtype']}"
        options = {**OPTIONS, **THRESHOLD_OPTIONS}.get(own.get("options", ""), ())
        own["bias"] = str(bool({"bias", "distance_bias"} & {*options}) and own.get("for", "training") == "training")
        return own

    def __str__(self) -> str:
        return ", ".join(value if name in ("dtype", "options", "for") else f"{name} {value}" for name, value in self.values[1:])


@dataclass(frozen=True)
class Row:
    """A kernel's line of the table: registers and bytes spilled are a thread's, shared is a program's."""

    kernel: str
    target: str
    case: str
    warps: int
    registers: int
    spilled: int
    shared: int
    room: int  # of shared memory that the device has
    seconds: float


def cases() -> list[Case]:
    """All of them; few, so that each pair occurs."""
    return [case for operator in FACTORS for case in covering(operator)]


def covering(operator: str) -> Iterator[Case]:
    """Greedily: the case with the most pairs that are missing, until none is."""
    factors = FACTORS[operator]
    every = [Case(operator, tuple(zip(factors, values, strict=True))) for values in itertools.product(*factors.values())]
    held = {case: {(a, traits[a], b, traits[b]) for a, b in PAIRS[operator]} for case in every for traits in [case.traits]}
    missing = set().union(*held.values())
    while missing:
        best = max(every, key=lambda case: len(held[case] & missing))
        missing -= held[best]
        yield best


def compiled(case: Case) -> list[Row]:
    """Make the case's calls for its target."""
    from diffmax.testing.ahead_of_time import TARGETS as LIMITS
    from diffmax.testing.ahead_of_time import recording

    target = case.of["target"]
    start = time.perf_counter()
    with recording(target, *kernels()) as launched:
        CALLS[case.operator](case.of)
    seconds = (time.perf_counter() - start) / max(1, len(launched))
    found = {}
    for one in launched:
        resources = one.resources
        found[id(one.kernel)] = Row(
            one.name, target, str(case), resources["warps"], resources["registers"], resources["spilled"], resources["shared"],
            LIMITS[target].shared, round(seconds, 2),
        )  # fmt: skip
    return list(found.values())


def kernels() -> list[Any]:
    """Every kernel that is launched."""
    from triton.runtime.jit import JITFunction

    import diffmax.kernels.triton

    for folder in pkgutil.iter_modules(diffmax.kernels.triton.__path__):
        importlib.import_module(f"diffmax.kernels.triton.{folder.name}.launch")

    modules = [module for name, module in sys.modules.items() if name.startswith("diffmax.kernels.triton.")]
    found = {name: item for module in modules for name, item in vars(module).items() if isinstance(item, JITFunction)}
    return [item for name, item in sorted(found.items()) if name.endswith("_kernel")]


def table(target: str) -> Any:
    """The tuning table that the vendor's distribution takes on the target."""
    import diffmax_cuda.configs
    import diffmax_rocm.configs

    if target.startswith("gfx"):
        return diffmax_rocm.configs.table(target)
    return diffmax_cuda.configs.table(*divmod(int(target[2:]), 10))


def own_table(target: str) -> Any:
    """The table of the target's own architecture, or None."""
    import diffmax_cuda.configs
    import diffmax_rocm.configs

    if target.startswith("gfx"):
        return diffmax_rocm.configs.tables().get(target)
    return diffmax_cuda.configs.tables().get("{}.{}".format(*divmod(int(target[2:]), 10)))


def call_rows(of: Mapping[str, str]) -> None:
    from diffmax.kernels.triton.rows.launch import RowOperator

    target, dtype = of["target"], getattr(torch, of["dtype"])
    operator = RowOperator(lambda device: table(target), lambda device: 132, ptx=target.startswith("sm"))
    rows, n = int(of.get("rows", "300")), int(of.get("length", "65536"))
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    x, m = torch.zeros(1, n, dtype=dtype).expand(rows, n), torch.zeros(rows, 1, dtype=acc)
    e = MORE_ALPHAS[of["alpha"]]
    given = torch.full((rows, 1), 0.3, dtype=acc) if e is None else e
    operator.bisect(x, given, 1, 50, True)
    operator.bisect_backward(x, x, m, m, x if dtype == torch.float16 else None, given, 1, of["alpha"] == "tensor")


def call_attention(of: Mapping[str, str]) -> None:
    from diffmax.kernels.triton.attention.launch import AttentionOperator, example_calls, example_shapes
    from diffmax.plugin import Wanted

    target, dtype, size = of["target"], getattr(torch, of["dtype"]), int(of["size"])
    operator = AttentionOperator(
        lambda device: target, lambda device: 132, ptx=target.startswith("sm"), table=lambda device: own_table(target)
    )
    training, features = of["for"] == "training", frozenset(OPTIONS[of["options"]])
    batch, length = example_shapes(132, features)[-1]
    call = example_calls(torch.device("cpu"), dtype, length, MORE_ALPHAS[of["alpha"]], features)[-1]
    query, key = (torch.zeros(batch, heads, length, size, dtype=dtype) for heads in (2, 1 if "gqa" in features else 2))
    found = operator.attention(query, key, key, call, training, not training)
    if training:
        wanted = Wanted(of["alpha"] == "tensor", call.bias is not None, call.sink is not None)
        operator.attention_backward(found.out, query, key, key, found.saved, call, wanted)


def call_decoding(of: Mapping[str, str]) -> None:
    from diffmax.kernels.triton.decoding.launch import Decoder

    target, dtype, size = of["target"], getattr(torch, of["dtype"]), int(of["size"])
    decoder = Decoder(lambda device: 132, ptx=target.startswith("sm"), table=lambda device: own_table(target))
    features = frozenset(DECODE_OPTIONS[of["options"]])
    decoder.warmup(
        torch.device("cpu"), dtype, size, size, MORE_ALPHAS[of["alpha"]], False, features - {"bounds"},
        heads=8, room=65536, bounds="bounds" in features,
    )  # fmt: skip


def call_power(of: Mapping[str, str]) -> None:
    from diffmax.kernels.triton.power.launch import PowerOperator

    target, dtype, size = of["target"], getattr(torch, of["dtype"]), int(of["size"])
    operator = PowerOperator(lambda device: target, ptx=target.startswith("sm"))
    features = {*MORE_POWER_FEATURES[of["features"]], *(("high_degree",) if of["degree"] == "4" else ())}
    training = of.get("for") != "inference"
    operator.warmup(torch.device("cpu"), dtype, size, size, None, training, frozenset(features))


def call_threshold(of: Mapping[str, str]) -> None:
    from diffmax.kernels.triton.threshold.launch import LENGTH, ThresholdOperator, example_call
    from diffmax.plugin import ThresholdWanted

    target, dtype, size = of["target"], getattr(torch, of["dtype"]), int(of["size"])
    operator = ThresholdOperator(lambda device: target, ptx=target.startswith("sm"))
    features = frozenset({*THRESHOLD_OPTIONS[of["options"]], f"threshold_{of['weights']}"})
    call = example_call(torch.device("cpu"), features)
    call = replace(call, power=2.0 if "squared" in features else call.power)
    query, key = (torch.zeros(1, heads, LENGTH, size, dtype=dtype) for heads in (2, 1 if "gqa" in features else 2))
    found = operator.threshold_attention(query, key, key, call, True)
    mass, wanted = found.mass if "mass" in features else None, ThresholdWanted(True, call.bias is not None)
    operator.threshold_attention_backward(found.out, mass, query, key, key, found.saved, call, wanted)


CALLS = {
    "rows": call_rows, "long rows": call_rows, "attention": call_attention, "decoding": call_decoding, "power": call_power,
    "threshold": call_threshold,
}  # fmt: skip


def attempt(case: Case) -> tuple[Case, list[Row], str]:
    """The case's rows, or what went wrong."""
    torch.set_num_threads(1)
    try:
        return case, compiled(case), ""
    except Exception as error:  # noqa: BLE001  (whatever a compiler throws is a line of the report)
        return case, [], f"{type(error).__name__}: {error}"


def main(arguments: Sequence[str]) -> int:
    """Compile all, write the lines and the failures; 1 if something failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compile_kernels", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--operators", nargs="+", choices=FACTORS, default=list(FACTORS))
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args(arguments)
    import triton

    wanted = [case for case in cases() if case.operator in options.operators]
    # the longest first, so that no core waits for the other at the end
    wanted.sort(key=lambda case: case.operator != "attention")
    rows, failures, start = [], [], time.perf_counter()
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(options.jobs, mp_context=spawn) as pool:
        for case, found, failure in pool.map(attempt, wanted):  # a compiler that takes its process with it ends this
            rows += found
            if failure:
                failures.append({"case": f"{case.operator}, {case.of['target']}, {case}", "failure": failure})
    rows.sort(key=lambda row: (row.kernel, TARGETS.index(row.target), row.case, row.registers))
    report = {
        "triton": triton.__version__, "cases": len(wanted), "seconds": round(time.perf_counter() - start),
        "core_seconds": round(sum(os.times()[2:4])),
        "rows": [asdict(row) for row in rows], "failures": failures,
    }  # fmt: skip
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(report))
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
