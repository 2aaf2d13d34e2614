"""Functions that kernels call become parts of them: compiled once, in the kernel, by each version of Numba that is known."""

import gc

import pytest

numba = pytest.importorskip("numba", reason="needs Numba: pip install 'diffmax-core[numba]'")

import numpy as np  # noqa: E402
from numba import cfunc, types  # noqa: E402
from numba.core.runtime.context import NRTContext  # noqa: E402

from diffmax.kernels.numba import parts  # noqa: E402
from diffmax.kernels.numba.cache import compile_cached  # noqa: E402
from diffmax.kernels.numba.simd import array_at  # noqa: E402

KERNEL = types.int64(types.int64)


def kernel():
    """A function that calls another by way of a third, the parts made anew."""

    @parts.jitable
    def twice(x):
        return 2 * x

    @parts.jitable
    def twice_and_one(x):
        return twice(x) + 1

    def call(x):
        return twice_and_one(x) + twice(x)

    return call


def compiled_libraries(monkeypatch):
    """The names of what is turned into machine code from now on."""
    names = []
    finalize = numba.core.codegen.JITCodeLibrary._finalize_specific
    monkeypatch.setattr(
        numba.core.codegen.JITCodeLibrary,
        "_finalize_specific",
        lambda library: (names.append(library.name), finalize(library)),
    )
    return names


def test_a_kernel_alone_is_turned_into_machine_code(monkeypatch):
    names = compiled_libraries(monkeypatch)
    assert cfunc(KERNEL)(kernel()).ctypes(5) == 21
    assert [name for name in names if "twice" in name] == []
    assert any("call" in name for name in names)


def test_a_version_of_numba_that_is_not_known_compiles_as_numba_does(monkeypatch):
    monkeypatch.setattr(numba, "__version__", "99.1.0")
    names = compiled_libraries(monkeypatch)
    assert cfunc(KERNEL)(kernel()).ctypes(5) == 21
    assert sum("twice" in name for name in names) >= 2


@pytest.mark.parametrize("known", [True, False])
def test_parts_of_versions_that_are_known_count_no_references(monkeypatch, known):
    if not known:
        monkeypatch.setattr(numba, "__version__", "99.1.0")
    names, count_one = [], NRTContext._call_incref_decref

    def counted(context, builder, *given):
        names.append(builder.function.name)
        count_one(context, builder, *given)

    monkeypatch.setattr(NRTContext, "_call_incref_decref", counted)

    @parts.jitable
    def numbers(address, count):
        return array_at(address, count, np.int64)

    @parts.jitable
    def length(address, count):
        pair = numbers(address, count), numbers(address, 1)
        return len(pair[0] if count > 9 else pair[1])

    assert cfunc(KERNEL)(lambda address: length(address, 20)).ctypes(0) == 20
    assert any("length" in name for name in names) != known  # the kernel itself counts, where it holds an array


def test_the_installed_version_of_numba_is_known():
    """Where this fails: run the tests of Numba's kernels with the new version, then raise parts.KNOWN and measure."""
    assert "pipeline_class" in parts._options(), f"parts.KNOWN ends before {numba.__version__}"


@pytest.mark.parametrize("enabled", [True, False])
def test_garbage_is_collected_after_a_compilation_as_before_even_if_it_fails(enabled):
    def fails(cache):
        def decorate(function):
            assert not gc.isenabled()
            raise RuntimeError("the compiler failed")

        return decorate

    before = gc.isenabled()
    (gc.enable if enabled else gc.disable)()
    try:
        with pytest.raises(RuntimeError, match="the compiler failed"):
            compile_cached(fails, function=lambda: None)
        assert gc.isenabled() is enabled
    finally:
        (gc.enable if before else gc.disable)()
