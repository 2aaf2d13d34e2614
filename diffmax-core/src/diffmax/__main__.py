"""`python -m diffmax`: what is installed and what runs where. Subcommands: explain, selftest, bench, new-backend."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

import torch

from diffmax import _bench, _new_backend, _report, _selftest
from diffmax._inspect import OPERATORS, explain_call
from diffmax._numerics import FLOAT_DTYPES
from diffmax.errors import DiffmaxError

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
    report = _report.collect()
    print(json.dumps(report.as_json(), indent=1) if options.json else report)
    return 1 if report.problems else 0


def _explain(options: argparse.Namespace) -> int:
    print(
        explain_call(
            OPERATORS[options.operator],
            _device_type(options.device),
            _DTYPES[options.dtype],
            tensor_alpha=options.alpha_tensor or options.alpha_gradient,
            alpha_gradient=options.alpha_gradient,
            backward=options.backward or options.alpha_gradient,
            backend=options.backend,
        )
    )
    return 0


def _run_selftest(options: argparse.Namespace) -> int:
    _check_device("selftest", options.device)
    failures = 0
    for outcome in _selftest.run(options.backend, options.device):
        failures += bool(outcome.failure)
        print(outcome, flush=True)
    print(f"{failures} failed" if failures else "all passed")
    return 1 if failures else 0


def _run_bench(options: argparse.Namespace) -> int:
    _check_device("bench", options.device)
    print(
        f"float32 scores N(0, 1), {options.device}, torch {torch.__version__}, {torch.get_num_threads()} CPU threads; "
        "median times, as multiples of torch.softmax's"
    )
    print(_bench.run(options.device, options.backend))
    return 0


def _write_new_backend(options: argparse.Namespace) -> int:
    folder = _new_backend.write(options.name, options.to)
    print(f"wrote {folder}\nnext: pip install --editable {folder} && pytest {folder}/tests")
    return 0


def _device_type(device: str) -> str:
    kind = device.partition(":")[0]
    if kind == "npu":  # torch knows the name only once torch_npu has been imported
        return kind
    try:
        return torch.device(device).type
    except RuntimeError:
        raise ValueError(f"explain: device must be one that torch knows, such as cpu, cuda or npu, got {device!r}") from None


def _check_device(command: str, device: str | None) -> None:
    seen = [known.device for known in _report.visible_devices()]
    if device is not None and device not in {name for full in seen for name in (full, full.partition(":")[0])}:
        raise ValueError(f"{command}: device must be one that torch sees, got {device!r}\n  seen: {', '.join(seen)}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m diffmax",
        description="Versions, devices and backends, and what to install. Exit status 1: DIFFMAX_BACKEND fails.",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=_report_all)
    commands = parser.add_subparsers(title="commands", metavar="")

    explain = commands.add_parser("explain", help="say which backend a call would go to, and why; the device need not be there")
    explain.add_argument("--operator", choices=sorted(OPERATORS), default="diffmax_bisect")
    explain.add_argument("--device", default="cpu", help="torch device type")
    explain.add_argument("--dtype", choices=sorted(_DTYPES), default="float32")
    explain.add_argument("--alpha-tensor", action="store_true", help="alpha is a tensor")
    explain.add_argument("--alpha-gradient", action="store_true", help="alpha is a tensor that requires a gradient")
    explain.add_argument("--backward", action="store_true", help="the scores require a gradient")
    explain.add_argument("--backend", help="the call's backend argument")
    explain.set_defaults(run=_explain)

    selftest = commands.add_parser("selftest", help="check the kernels on this machine in a few seconds; exit status 1: failed")
    selftest.add_argument("--backend", help="only this one, which then has to be available")
    selftest.add_argument("--device", help="torch device; default: where each backend runs")
    selftest.set_defaults(run=_run_selftest)

    bench = commands.add_parser("bench", help="time diffmax against torch.softmax in less than half a minute")
    bench.add_argument("--device", default="cpu", help="torch device")
    bench.add_argument("--backend", help="the backend argument of the timed calls")
    bench.set_defaults(run=_run_bench)

    new_backend = commands.add_parser("new-backend", help="write an installable plugin to start from")
    new_backend.add_argument("name", help="of the backend: letters, digits, '_'")
    new_backend.add_argument("--to", metavar="DIR", help="folder to create; default: diffmax-NAME")
    new_backend.set_defaults(run=_write_new_backend)
    return parser


if __name__ == "__main__":
    sys.exit(main())
