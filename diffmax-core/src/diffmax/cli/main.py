"""`python -m diffmax`: installed versions, devices and backends. Subcommands: explain, selftest, bench, new-backend, report."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from diffmax.cli import bench, new_backend, published, report, selftest
from diffmax.errors import DiffmaxError
from diffmax.machine.inspection import explain_question
from diffmax.operators.common.numerics import FLOAT_DTYPES
from diffmax.operators.common.spec import Question, public_functions, spec_of

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOAT_DTYPES}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status: 0, 1 for a failure, 2 for wrong arguments."""
    options = _parser().parse_args(arguments)
    try:
        status: int = options.run(options)
    except (DiffmaxError, ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return status


def _report_all(options: argparse.Namespace) -> int:
    found = report.collect()
    print(json.dumps(found.as_json(), indent=1) if options.json else found.text(options.verbose))
    return 1 if found.problems else 0


def _explain(options: argparse.Namespace) -> int:
    function = public_functions()[options.operator]
    spec, operator = spec_of(function.operator), function.operator
    if options.features and not spec.has_heads:
        raise ValueError(f"explain: --features are attention's, got {options.features[0]} for {options.operator}")
    if f"{operator}_backward" not in spec.kernels and (options.backward or options.alpha_gradient):
        raise ValueError(f"explain: {options.operator} has no backward: leave --backward and --alpha-gradient out")
    has = spec.kernels[operator].features
    unknown = sorted(set(options.features) - has)
    if unknown:
        raise ValueError(f"explain: {options.operator} has no feature {unknown[0]!r}, it has: {', '.join(sorted(has))}")
    for flag, number in (("--head-dim", options.head_dim), ("--value-dim", options.value_dim)):
        if number is not None and number < 1:
            raise ValueError(f"explain: {flag} must be at least 1, got {number}")
    size = options.head_dim if spec.has_heads else 0
    asked = Question(
        operator,
        _device_type(options.device),
        _DTYPES[options.dtype],
        tensor_alpha=options.alpha_tensor or options.alpha_gradient,
        alpha_gradient=options.alpha_gradient,
        backward=options.backward or options.alpha_gradient,
        backend=options.backend,
        features=frozenset(options.features) | function.implies,
        head_dim=size,
        value_dim=(options.value_dim or size) if spec.has_heads else 0,
    )
    print(explain_question(asked))
    return 0


def _run_selftest(options: argparse.Namespace) -> int:
    _check_device("selftest", options.device)
    outcomes = []
    for outcome in selftest.run(options.backend, options.device):
        outcomes.append(outcome)
        print(outcome, flush=True)
    line, status = selftest.summary(outcomes)
    print(line)
    return status


def _run_bench(options: argparse.Namespace) -> int:
    _check_device("bench", options.device)
    print(
        f"float32, {options.device}, torch {torch.__version__}, {torch.get_num_threads()} CPU threads; median times", flush=True
    )
    warnings = [bench.busy(by_load=True)]
    for table in bench.run(options.device, options.backend, options.operator):
        print(table, flush=True)
    warnings.append(bench.busy(by_load=False))
    for words in list(filter(None, warnings))[:1]:
        print(words)
    return 0


def _write_new_backend(options: argparse.Namespace) -> int:
    folder = new_backend.write(options.name, options.to, options.operator)
    print(
        f"wrote {folder}\nnext:\n"
        f'  python -m pip install --editable "{folder}[testing]"\n'
        f"  python -m diffmax selftest --backend {options.name}\n"
        f'  python -m pytest "{folder}"\n'
        "on a CPU the last two take minutes, and less with the environment variable OMP_NUM_THREADS=1"
    )
    return 0


def _publish(options: argparse.Namespace) -> int:
    page = published.page(options.files)
    if options.to is None:
        print(page, end="")
    else:
        Path(options.to).write_text(page, encoding="utf-8")
        print(f"wrote {options.to}")
    return 0


def _device_type(device: str) -> str:
    kind = device.partition(":")[0]
    if kind == "npu":  # torch accepts the name only after torch_npu has been imported
        return kind
    try:
        return torch.device(device).type
    except RuntimeError:
        raise ValueError(f"explain: device must be one that torch knows, such as cpu, cuda or npu, got {device!r}") from None


def _check_device(command: str, device: str | None) -> None:
    seen = [known.device for known in report.visible_devices()]
    if device is not None and device not in {name for full in seen for name in (full, full.partition(":")[0])}:
        raise ValueError(f"{command}: device must be one that torch sees, got {device!r}\n  seen: {', '.join(seen)}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m diffmax",
        description="Versions, devices and backends, and what to install. Exit status 1: DIFFMAX_BACKEND fails.",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--verbose", action="store_true", help="list every kernel of every backend, with its dtypes")
    parser.set_defaults(run=_report_all)
    commands = parser.add_subparsers(title="commands", metavar="")

    explain = commands.add_parser("explain", help="say which backend would run a call, and why; the device need not exist")
    explain.add_argument("--operator", choices=sorted(public_functions()), default="diffmax_bisect")
    explain.add_argument("--device", default="cpu", help="torch device type")
    explain.add_argument("--dtype", choices=sorted(_DTYPES), default="float32")
    explain.add_argument("--alpha-tensor", action="store_true", help="alpha is a tensor")
    explain.add_argument("--alpha-gradient", action="store_true", help="alpha is a tensor that requires a gradient")
    explain.add_argument("--backward", action="store_true", help="the scores require a gradient")
    explain.add_argument(
        "--features", nargs="+", default=[], metavar="NAME", help="features of attention, such as causal gqa mask"
    )
    explain.add_argument("--head-dim", type=int, default=64, help="head dimension of queries and keys")
    explain.add_argument("--value-dim", type=int, help="head dimension of values, if different")
    explain.add_argument("--backend", help="the call's backend argument")
    explain.set_defaults(run=_explain)

    check = commands.add_parser("selftest", help="check every operator on this machine; exit status 1: failed, or nothing run")
    check.add_argument("--backend", help="only this one, which must be available")
    check.add_argument("--device", help="torch device; default: one that each backend supports")
    check.set_defaults(run=_run_selftest)

    timing = commands.add_parser("bench", help="time each operator against torch's softmax or attention, about a minute in all")
    timing.add_argument("--operator", choices=sorted(bench.timed()), help="only this one")
    timing.add_argument("--device", default="cpu", help="torch device")
    timing.add_argument("--backend", help="the backend argument of the timed calls")
    timing.set_defaults(run=_run_bench)

    new = commands.add_parser("new-backend", help="write an installable plugin to start from")
    new.add_argument("name", help="name of the backend: letters, digits, '_'")
    new.add_argument("--to", metavar="DIR", help="folder to create; default: diffmax-NAME")
    kinds = new.add_mutually_exclusive_group()
    for flag, operator in (("attention", "attention"), ("power", "power_attention")):
        kinds.add_argument(
            f"--{flag}", dest="operator", action="store_const", const=operator, help=f"kernels of {operator}, not of rows"
        )
    new.set_defaults(run=_write_new_backend, operator="bisect")

    reports = commands.add_parser("report", help="make a page of reports of the conformance kit")
    reports.add_argument("files", nargs="+", metavar="FILE", help="JSON that pytest's --diffmax-report wrote")
    reports.add_argument("--to", metavar="PAGE", help="Markdown file to write; default: standard output")
    reports.set_defaults(run=_publish)
    return parser
