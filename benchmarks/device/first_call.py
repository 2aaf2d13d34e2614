"""The first call of a process: nothing compiled before; with the compiler's cache on disk; after `diffmax.warmup`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from typing import Any

from benchmarks.device.context import Context
from benchmarks.device.crew import ROOT

CODE = """
import json, sys, time
import torch
from benchmarks.device.place import here
place = here({kind!r})
import diffmax
operator, device, backend = {operator!r}, place.device, place.backend
kind = torch.bfloat16 if place.real else torch.float32
n = 1024 if place.real else 16
torch.zeros(1, device=device).add_(1)
place.wait()

def warm():
    started = time.perf_counter()
    kinds = dict(dtypes=[kind], alphas=[0.5], device=device, backend=backend)
    if operator == "rows":
        diffmax.warmup([n], **kinds)
    else:
        import inspect
        if "head_dims" not in inspect.signature(diffmax.warmup).parameters:
            return None  # it prepares rows alone
        features = ["causal"] if operator == "attention" else []
        diffmax.warmup(head_dims=[64], features=features, decoding=operator == "decode", **kinds)
    place.wait()
    return time.perf_counter() - started

def call():
    if operator == "rows":
        x = torch.randn(4, n, device=device).to(kind).requires_grad_()
        diffmax.diffmax_bisect(x, 0.5, backend=backend).sum().backward()
    elif operator == "attention":
        q = torch.randn(1, 2, n, 64 if place.real else 16, device=device).to(kind).requires_grad_()
        diffmax.attention(q, q, q, alpha=0.5, is_causal=True, backend=backend).sum().backward()
    else:
        q = torch.randn(1, 1, 2, 64, device=device).to(kind)
        cache = torch.randn(1, n, 2, 64, device=device).to(kind)
        diffmax.attention_with_kvcache(q, cache, cache, alpha=0.5, backend=backend)
    place.wait()

found = {{}}
if {warmup!r}:
    found["warmup_s"] = warm()
started = time.perf_counter()
call()
found["first_call_s"] = time.perf_counter() - started
started = time.perf_counter()
call()
found["second_call_s"] = time.perf_counter() - started
print("FOUND " + json.dumps(found))
"""


def measure(context: Context, operator: str) -> dict[str, Any]:
    """Forward with backward, of one operator, in processes of their own with an empty cache first."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=context.work) as cache:
        found["cold"] = _process(context, operator, cache, warmup=False)
        if context.place.real:
            found["cached"] = _process(context, operator, cache, warmup=False)
            found["after_warmup"] = _process(context, operator, cache, warmup=True)
    return found


def _process(context: Context, operator: str, cache: str, *, warmup: bool) -> dict[str, Any]:
    code = CODE.format(kind=context.place.kind, operator=operator, warmup=warmup)
    environment = {**os.environ, "TRITON_CACHE_DIR": cache}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment, cwd=ROOT, timeout=140
    )
    line = next((line for line in done.stdout.splitlines() if line.startswith("FOUND ")), None)
    if done.returncode or line is None:
        raise ChildProcessError(f"the first call failed with status {done.returncode}: {done.stderr[-800:]}")
    result: dict[str, Any] = json.loads(line.removeprefix("FOUND "))
    return result
