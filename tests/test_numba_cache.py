"""What is kept of compiled kernels belongs to the sources that they were compiled from."""

import gc
import os
import shutil
from pathlib import Path

import pytest

import diffmax
from diffmax.kernels.numba import cache
from tests import fresh

GRADIENT = """
import torch
from diffmax.kernels.numba.jobs import compiled
from diffmax.kernels.numba.rows import bisect_backward
p = torch.zeros(1, 16)
p[0, 0] = 1.0
grad, _ = bisect_backward(torch.zeros(1, 16), p, torch.zeros(1, 1), torch.zeros(1, 1), None, 0.37, 1, False)
print(float(grad[0, 0]), compiled("backward", torch.float32).cache_hits)
"""


@pytest.mark.slow
def test_an_edited_module_never_meets_the_code_of_before(tmp_path):
    """Numba looks at the file of the cached function alone: after a change of simd.py the old machine code ran on."""
    package = tmp_path / "diffmax"
    shutil.copytree(Path(diffmax.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))

    def run():
        value, hits = fresh.python(GRADIENT, tmp_path, NUMBA_CACHE_DIR=str(tmp_path / "cache")).stdout.split()
        return float(value), int(hits)

    assert run() == (0.0, 0)
    sibling = package / "kernels" / "numba" / "gradient.py"
    before = sibling.read_text()
    line = "store(grad_x, i, load(s, i) * (load(g, i) - mean))"
    assert before.count(line) == 1
    sibling.write_text(before.replace(line, line.replace("- mean", "- mean + 1.0")))
    assert run() == (1.0, 0)
    sibling.write_text(before)
    assert run() == (0.0, 1)  # kept, and found again: two versions that share a folder do not overwrite each other


@pytest.mark.slow
def test_numbers_from_other_folders_are_part_of_what_is_kept(tmp_path):
    """After a change of diffmax.plugin.TILE alone the machine code of the old one ran on the new tiles, and did not end."""
    package = tmp_path / "diffmax"
    shutil.copytree(Path(diffmax.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))

    def sources():
        return fresh.python("from diffmax.kernels.numba.cache import sources; print(sources())", tmp_path).stdout

    before = sources()
    plugin, numerics = package / "plugin.py", package / "operators" / "common" / "numerics.py"
    for file, old, new in (
        (plugin, "\nTILE = 64", "\nTILE = 32"),
        (numerics, "\nMIN_E = ", "\nMIN_E = 2 * "),
        (package / "operators" / "power" / "symmetric.py", "    return ", "    return 0 + "),
    ):
        text = file.read_text()
        assert old in text
        file.write_text(text.replace(old, new))
        assert sources() != before
        file.write_text(text + "\n# nothing that a kernel takes\n")
        assert sources() == before
        file.write_text(text)


@pytest.mark.slow
def test_a_file_that_was_cut_off_is_compiled_anew_once(tmp_path):
    kept = tmp_path / "cache"

    def run():
        done = fresh.python(f"import warnings; warnings.simplefilter('always'){GRADIENT}", NUMBA_CACHE_DIR=str(kept))
        return [float(word) for word in done.stdout.split()], "cannot be read, and is compiled anew" in done.stderr

    assert run() == ([0.0, 0.0], False)
    for index in kept.rglob("*.nbi"):
        index.write_bytes(index.read_bytes()[:-20])
    assert run() == ([0.0, 0.0], True)
    assert run() == ([0.0, 1.0], True)
    for index in kept.rglob("*.nbi"):
        index.write_bytes(b"")
    assert run() == ([0.0, 0.0], True)


@pytest.mark.slow
def test_a_file_whose_bytes_changed_is_compiled_anew(tmp_path):
    """LLVM's error about its bitcode ended the call."""
    kept = tmp_path / "cache"

    def run():
        done = fresh.python(f"import warnings; warnings.simplefilter('always'){GRADIENT}", NUMBA_CACHE_DIR=str(kept))
        return [float(word) for word in done.stdout.split()], "cannot be read, and is compiled anew" in done.stderr

    assert run() == ([0.0, 0.0], False)
    for data in kept.rglob("*.nbc"):
        text = bytearray(data.read_bytes())
        start = text.find(b"BC\xc0\xde") + 40  # of LLVM's bitcode
        text[start : start + 20] = bytes(255 - byte for byte in text[start : start + 20])
        data.write_bytes(text)
    assert run() == ([0.0, 0.0], True)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a system that forks processes, such as Linux")
def test_a_process_forked_while_another_thread_compiles_collects_garbage():
    with cache._without_collecting():
        with cache._without_collecting():
            assert not gc.isenabled()
            child = os.fork()
            if not child:
                os._exit(0 if gc.isenabled() and not cache._compiling else 1)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert not gc.isenabled()
    assert gc.isenabled()
    gc.disable()
    try:
        with cache._without_collecting():
            pass
        assert not gc.isenabled()  # whoever turned it off finds it off
    finally:
        gc.enable()


def test_a_numba_that_compiles_nothing_leaves_the_other_kernels(tmp_path):
    code = """
import torch, diffmax
print(diffmax.explain("diffmax_bisect", torch.zeros(3)).chosen)
print(float(diffmax.diffmax_bisect(torch.randn(3, 5), 0.5).sum()))
print(*(record.reason for record in diffmax.backends() if record.backend == "numba"))
"""
    chosen, total, *why = fresh.python(code, tmp_path, NUMBA_DISABLE_JIT="1").stdout.splitlines()
    assert chosen != "numba"
    assert abs(float(total) - 3) < 1e-5
    assert "NUMBA_DISABLE_JIT is set" in why[0]
