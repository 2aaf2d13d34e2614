"""The compiled kernels where there is no place to keep them: users without a home, images that cannot be written to."""

import os
import shutil
import subprocess
import sys

import pytest

CALLS = """
import warnings, torch, diffmax
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    x = torch.randn(3, 40, requires_grad=True)
    diffmax.diffmax_bisect(x, 0.7).sum().backward()
    diffmax.diffmax_bisect(x.detach().double(), 0.7)
told = [str(warning.message) for warning in caught if "diffmax" in str(warning.message)]
assert len(told) == 1, told
assert "set NUMBA_CACHE_DIR to a folder that this user can write to" in told[0], told
print(told[0])
assert diffmax.explain("diffmax_bisect", x.detach()).chosen == "numba"
torch.testing.assert_close(diffmax.diffmax_bisect(x, 0.7), diffmax.diffmax_bisect(x, 0.7, backend="reference"))
"""
NO_PLACE = "from numba.core import caching\ncaching.CacheImpl._locator_classes = []\n"
FULL = """
from numba.core import caching
def save(*_):
    raise OSError(28, "No space left on device")
caching.IndexDataCacheFile.save = save
"""
EMPTY = {name: value for name, value in os.environ.items() if name not in ("HOME", "XDG_CACHE_HOME", "NUMBA_CACHE_DIR")}


def run(code, **options):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, **options)


@pytest.mark.slow
def test_where_numba_has_no_place_for_its_cache_kernels_are_compiled_in_memory():
    """Every call raised "cannot cache function: no locator available", while `explain` said that numba could run it."""
    done = run(NO_PLACE + CALLS, env={**os.environ, "NUMBA_CACHE_DIR": "/no/such"})
    assert done.returncode == 0, done.stderr
    assert "cannot write to NUMBA_CACHE_DIR, /no/such\n" in done.stdout
    assert "locals" not in done.stdout  # of the names of functions


def as_nobody(code):
    """Run code as a user without a home, or skip where that cannot be done."""
    change = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    if shutil.which("setpriv") is None or subprocess.run([*change, "true"], capture_output=True, check=False).returncode:
        pytest.skip("a process cannot be started as another user here: it takes root and setpriv")
    return subprocess.run([*change, sys.executable, "-c", code], capture_output=True, text=True, check=False, env=EMPTY)


@pytest.mark.slow
def test_a_user_without_a_home_and_without_a_folder_to_write_to_gets_the_compiled_kernels():
    done = as_nobody(CALLS)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_disk_that_is_full_is_no_reason_to_fail(tmp_path):
    done = run(FULL + CALLS, env={**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    assert "writing what is compiled failed: [Errno 28]" in done.stdout


def test_another_error_of_the_compiler_is_not_taken_for_a_missing_folder():
    from diffmax.kernels.numba.cache import compile_cached

    def decorator(**options):
        raise RuntimeError("the compiler failed")

    with pytest.raises(RuntimeError, match="the compiler failed"):
        compile_cached(decorator, function=lambda: None)


@pytest.mark.slow
def test_a_compilation_says_that_it_is_one_after_two_seconds():
    """The first call took eleven seconds, in silence."""
    done = run(
        NO_PLACE
        + CALLS.replace("import warnings", "import diffmax.kernels.numba.cache as c; c.PATIENCE = 0.05\nimport warnings")
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("diffmax compiles its kernels for this processor") == 1
    assert "diffmax.warmup()" in done.stderr
