"""What torch_npu tells of itself on a machine without CANN: its libraries are replaced by stubs, and nothing can compute.

    python .ci/check_npu.py --stubs

1. Each operator in tests/data/torch_npu_operators.txt has a kernel in torch's dispatcher.
2. Shapes, dtypes and devices of the whole backend, forward and backward, by torch_npu's own meta functions.
3. Under autocast the operators get what core's conversions say, and torch_npu's own rules leave the kernels alone.

The folder of torch_npu comes as the only argument; the process starts itself again with the stubs on the loader's path.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MISSING = ("libhccl", "libascendcl", "libacl_op_compiler", "libge_runner", "libgraph", "libacl_tdt_channel")
NAMED = "acl aclrt aclop acltdt aclprof aclmdl rt Hccl hccl"

# What has to answer with something, for torch_npu to believe in one device and in memory
BODIES = r"""
#include <stdlib.h>
#include <string.h>
int aclInit(const char *path) { return 0; }
int aclrtGetDeviceCount(unsigned *count) { *count = 1; return 0; }
int aclrtGetDevice(int *device) { *device = 0; return 0; }
int aclrtSetDevice(int device) { return 0; }
int aclrtCreateStream(void **stream) { *stream = malloc(8); return 0; }
int aclrtCreateStreamWithConfig(void **stream, unsigned priority, unsigned flag) { *stream = malloc(8); return 0; }
int aclrtCreateEvent(void **event) { *event = malloc(8); return 0; }
int aclrtCreateEventWithFlag(void **event, unsigned flag) { *event = malloc(8); return 0; }
int aclrtCreateEventExWithFlag(void **event, unsigned flag) { *event = malloc(8); return 0; }
int aclrtGetCurrentContext(void **context) { *context = (void *)8; return 0; }
int aclrtCreateContext(void **context, int device) { *context = (void *)8; return 0; }
const char *aclrtGetSocName(void) { return "Ascend910B2"; }
int aclrtMalloc(void **memory, size_t size, int policy) { *memory = aligned_alloc(512, (size + 511) / 512 * 512); return 0; }
int aclrtMallocAlign32(void **memory, size_t size, int policy) { return aclrtMalloc(memory, size, policy); }
int aclrtFree(void *memory) { free(memory); return 0; }
int aclrtMallocHost(void **memory, size_t size) { *memory = malloc(size); return 0; }
int aclrtFreeHost(void *memory) { free(memory); return 0; }
int aclrtGetMemInfo(int kind, size_t *unused, size_t *total) { *unused = *total = 1ull << 36; return 0; }
int aclrtMemcpy(void *to, size_t room, const void *from, size_t size, int kind) { memcpy(to, from, size); return 0; }
int aclrtMemcpyAsync(void *to, size_t room, const void *from, size_t size, int kind, void *stream) {
  return aclrtMemcpy(to, room, from, size, kind);
}
const char *aclGetRecentErrMsg(void) { return ""; }
"""


def main(folder: Path) -> int:
    """Make the stubs and start again with them, or check."""
    stubs = folder / "stubs"
    if os.environ.get("NPU_STUBS_READY") == "1":
        return check()
    if not stubs.is_dir():
        lacking = [tool for tool in ("gcc", "nm", "strings") if shutil.which(tool) is None]
        if lacking:
            print(f"  skipped: {', '.join(lacking)} not found")
            return 0
        make_stubs(folder / "torch_npu", stubs)
    libraries = os.pathsep.join([str(stubs), os.environ.get("LD_LIBRARY_PATH", "")])
    environment = {**os.environ, "LD_LIBRARY_PATH": libraries, "NPU_STUBS_READY": "1"}
    return subprocess.run([sys.executable, "-W", "ignore", __file__, str(folder)], env=environment, check=False).returncode


def make_stubs(package: Path, stubs: Path) -> None:
    """Libraries that define every symbol that torch_npu's own lack, each a function that returns 0, or one of BODIES."""
    import re

    import torch

    own = [*package.glob("lib/*.so"), *package.glob("_C*.so")]
    provided = [*own, *Path(torch.__file__).parent.glob("lib/*.so*"), *map(Path, _system_libraries(own[0]))]
    wanted = set().union(*(_symbols(library, "--undefined-only") for library in own))
    known = set().union(*(_symbols(library, "--defined-only") for library in provided))
    prefixes = "|".join(NAMED.split())
    texts = subprocess.run(
        ["strings", "-n", "6", str(package / "lib" / "libtorch_npu.so")], capture_output=True, text=True, check=True
    )
    by_name = {word for word in texts.stdout.split() if re.fullmatch(rf"(?:{prefixes})[A-Z]\w{{3,60}}", word)}
    names = {name for name in (wanted - known) | by_name if not name.startswith(("Py", "_Py", "aclnn"))}
    names -= set(re.findall(r"(\w+)\(", BODIES))
    made = stubs.with_suffix(".partial")
    made.mkdir(exist_ok=True)
    (made / "bodies.c").write_text(BODIES)
    lines = [f".globl {name}\n.type {name},@function\n{name}:\n xor %eax,%eax\n ret" for name in sorted(names)]
    (made / "nothing.s").write_text(".text\n" + "\n".join(lines) + '\n.section .note.GNU-stack,"",@progbits\n')
    (made / "empty.c").write_text("")
    for library in MISSING:
        sources = ["bodies.c", "nothing.s"] if library == "libascendcl" else ["empty.c"]
        command = ["gcc", "-w", "-shared", "-fPIC", "-o", f"{library}.so", *sources]
        subprocess.run(command, cwd=made, check=True)
    made.rename(stubs)


def _symbols(library: Path, which: str) -> set[str]:
    listed = subprocess.run(["nm", "-D", which, str(library)], capture_output=True, text=True, check=False).stdout
    fields = [line.split() for line in listed.splitlines()]
    return {field[-1].partition("@")[0] for field in fields if field and field[-2] not in ("w", "v")}


def _system_libraries(library: Path) -> list[str]:
    listed = subprocess.run(["ldd", str(library)], capture_output=True, text=True, check=False).stdout
    paths = [line.split("=> ")[1].split()[0] for line in listed.splitlines() if "=> /" in line]
    return paths + [line.split()[0] for line in listed.splitlines() if line.strip().startswith("/")]


def check() -> int:
    """The three checks, in a process that has the stubs."""
    import torch
    import torch_npu
    from torch._subclasses import FakeTensorMode

    from diffmax import attention, diffmax_bisect, explain, register_backend
    from diffmax.machine.dispatch import registry
    from diffmax_npu._plugin import plugin

    torch_npu.npu._lazy_init = lambda: None
    if "npu" not in {backend.name for backend in registry.backends()}:
        for backend in plugin.diffmax_backends():
            register_backend(backend)
    registry.probes.update({"npu": ("", ""), "npu-triton": ("unavailable", "not here")})

    listing = (ROOT / "tests" / "data" / "torch_npu_operators.txt").read_text(encoding="utf-8").splitlines()[1:]
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    defined = [name for name in listing if _defined(f"aten::{name}")]
    absent = [name for name in defined if not has(f"aten::{name}", "PrivateUse1")]
    print(
        f"  {len(defined) - len(absent)} of {len(defined)} listed operators have a kernel in the dispatcher; absent: {absent}"
    )

    with FakeTensorMode():
        x = torch.empty(4, 50, device="npu", dtype=torch.bfloat16, requires_grad=True)
        alpha = torch.empty(4, 1, device="npu", requires_grad=True)
        assert explain("diffmax_bisect", x, 0.5).chosen == "npu"
        _kernels(torch)
        diffmax_bisect(x, alpha).sum().backward()
        assert (x.grad.device.type, x.grad.dtype, alpha.grad.shape) == ("npu", torch.bfloat16, alpha.shape)
        print("  rows: forward and backward have shapes, dtypes and device, by torch_npu's meta functions")
        query = torch.empty(1, 4, 70, 16, device="npu", requires_grad=True)
        with torch.autocast("npu", dtype=torch.bfloat16):
            out = attention(query, query, query, is_causal=True, alpha=0.5)
            scores = query @ query.mT
            weights = diffmax_bisect(scores, 0.5)
        assert {out.dtype, scores.dtype, weights.dtype} == {torch.bfloat16}
        out.sum().backward()
        assert query.grad.dtype == torch.float32
        print("  attention: under autocast, bfloat16 out and float32 gradients")
    return 1 if len(absent) > 0.02 * len(defined) else 0


def _defined(name: str) -> bool:
    import torch

    try:
        torch._C._dispatch_has_kernel(name)
        return bool(torch._C._dispatch_has_kernel(name))
    except RuntimeError:
        return False


def _kernels(torch: object) -> None:
    """Run the kernels themselves on tensors without values: every operator that they call has a meta function."""
    import torch as t

    from diffmax.plugin import AttentionCall, Saved, Wanted
    from diffmax_npu import attention, rows

    del torch
    x = t.empty(4, 50, device="npu", dtype=t.float16)
    e = t.empty(4, 1, device="npu")
    p, m, delta = rows.bisect(x, e, 1, 50, True)
    grad_x, grad_e = rows.bisect_backward(x, p, m, delta, x, e, 1, True)
    assert (p.dtype, m.dtype, grad_x.dtype, grad_e.shape) == (t.float16, t.float32, t.float16, e.shape)
    q, kv = t.empty(2, 4, 70, 16, device="npu", dtype=t.bfloat16), t.empty(2, 2, 90, 16, device="npu", dtype=t.bfloat16)
    call = AttentionCall(scale=0.25, e=0.5, right=0, softcap=3.0, sink=t.empty(4, device="npu"))
    out, *saved, support = attention.attention(q, kv, kv, call, True, True)
    assert (out.shape, out.device.type, saved[0].dtype) == (q.shape, "npu", t.float32)
    grads = attention.attention_backward(out, q, kv, kv, Saved(*saved), call, Wanted(e=True, sink=True))
    assert [g.shape for g in grads[:3]] == [q.shape, kv.shape, kv.shape]
    assert support.dtype == t.int32


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
