"""The numeric tier: the kits of rows, attention and decoding on the CPU as other processors would run them.

torch takes its vector code from ATEN_CPU_CAPABILITY, Numba its target from NUMBA_CPU_NAME. The name alone changes little: Numba
adds the features of the processor that it runs on, unless NUMBA_CPU_FEATURES is set, empty for those of the name. Each setting
has a cache of its own and another seed, so that the inputs differ too.

Of the kits it runs what is compared with the gate, on the backends that compute on a CPU: rows at four alphas, some cases of
attention and decoding. What this processor cannot execute is skipped, with the reason.

    python .ci/processors.py      # all settings
    python .ci/processors.py 7    # one of them, by turns: as the numbers of days go on, each has its day
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
CACHES = ROOT / "build" / "processors"


class Setting(NamedTuple):
    """What torch and Numba are told."""

    torch: str
    numba: str
    seed: int


SETTINGS = (
    Setting("default", "generic", 1),
    Setting("avx2", "znver3", 2),
    Setting("avx2", "haswell", 2),
    Setting("avx512", "skylake-avx512", 3),
)
# what a target needs of this processor
HASWELL = ("avx2", "fma", "f16c", "bmi", "bmi2", "lzcnt", "movbe")
NEEDS = {
    "haswell": HASWELL,
    "znver3": (*HASWELL, "adx", "sha", "sse4a", "vaes", "vpclmulqdq"),
    "skylake-avx512": (*HASWELL, "adx", "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"),
}
BACKENDS = "(TestNumba or TestCpu or TestReference or TestPartial)"
ALPHAS = "0.1- or 0.85 or 0.99"
SOME = "plain or one-query or sparse or sink or everything or chunk"
ROWS = f"{BACKENDS} and (exchangeable or alpha_tensors or (random_rows or nasty or gradients) and ({ALPHAS}))"
OTHERS = f"{BACKENDS} and (nasty or exchangeable or (test_forward or gradients or test_decoding) and ({SOME}))"
JOBS = {
    "rows": ("tests/test_conformance.py", "-k", ROWS),
    "attention and decoding": ("tests/test_attention_conformance.py", "tests/test_kvcache_conformance.py", "-k", OTHERS),
}
PROBE = "import torch; print(torch.backends.cpu.get_cpu_capability())"
CODE = "from diffmax.kernels.numba.probe import numba_converts_float16 as f; print(f())"


def main(arguments: Sequence[str]) -> int:
    """Run every setting that this processor can execute, or the one whose turn it is; 1 if a test failed."""
    able = {setting.seed: setting for setting in reversed(SETTINGS) if not skipped(setting)}  # one of the two with avx2
    if arguments:
        seed = sorted(able)[int(arguments[0]) % len(able)]
        for other in sorted(able.keys() - {seed}):
            print(f"torch {able[other].torch}, Numba {able[other].numba}: left to another turn", flush=True)
        able = {seed: able[seed]}
    jobs = [(setting, name) for setting in able.values() for name in JOBS]
    with ThreadPoolExecutor(2) as pool:  # as many processes of tests as `make test` has
        return max(pool.map(lambda job: run(*job), jobs), default=0)


def skipped(setting: Setting) -> bool:
    """Whether torch falls back to less than it is told, or Numba's code could not be executed; says so."""
    from llvmlite import binding

    has = binding.get_host_cpu_features()
    capability = ask(setting, PROBE)
    reasons = [f"torch runs {capability} where {setting.torch} is asked for"] * (capability.lower() != setting.torch)
    reasons += [f"this processor lacks {lacking}" for lacking in NEEDS.get(setting.numba, ()) if not has.get(lacking, False)]
    print(
        f"torch {setting.torch}, Numba {setting.numba}: {'skipped, ' + '; '.join(reasons) if reasons else 'runs'}", flush=True
    )
    return bool(reasons)


def run(setting: Setting, name: str) -> int:
    """One part of the tier under one setting, in a process of its own."""
    *files, _, selection = JOBS[name]
    if ask(setting, CODE) == "False":
        print(f"{setting.numba}: Numba's float16 is left out, its target has no instructions that convert it", flush=True)
        selection = f"({selection}) and not (TestNumba and float16)"
    started = time.monotonic()
    options = ["-q", "-p", "no:cacheprovider", "-p", "diffmax.testing.report", f"--diffmax-seed={setting.seed}"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *files, "-k", selection],
        cwd=ROOT,
        env=environment(setting),
        capture_output=True,
        text=True,
        check=False,
    )
    shown = done.stdout.strip().splitlines()[-1:] if done.returncode == 0 else [done.stdout, done.stderr]
    took = time.monotonic() - started
    print(f"torch {setting.torch}, Numba {setting.numba}, {name}, {took:.0f} s: {' '.join(shown)}", flush=True)
    return int(done.returncode != 0)


def ask(setting: Setting, code: str) -> str:
    """What a process says that runs under the setting."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment(setting), capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def environment(setting: Setting) -> dict[str, str]:
    """A process's variables under the setting."""
    return {
        **os.environ,
        "ATEN_CPU_CAPABILITY": setting.torch,
        "NUMBA_CPU_NAME": setting.numba,
        "NUMBA_CPU_FEATURES": "",
        "NUMBA_CACHE_DIR": str(CACHES / setting.numba),
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "passive",
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
