"""The compiled CPU kernel: its digits, code, threads and cache. That it computes the operator, test_conformance shows."""

import concurrent.futures
import ctypes
import functools
import math
import os
import re
import subprocess
import sys
import timeit

import mpmath
import numpy as np
import pytest
import torch
from llvmlite import binding
from numba import cfunc, njit
from numba.core import types
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import diffmax
from diffmax import diffmax_bisect, reference
from diffmax.kernels.numba import functions, gradient, one_row, simd, solver, tables, threads
from diffmax.kernels.numba import rows as numba_rows
from diffmax.kernels.numba.probe import numba_cannot, numba_converts_float16, numba_missing
from diffmax.machine.dispatch import registry
from diffmax.operators.common.fast_path import is_plain
from diffmax.plugin import CallSpec
from diffmax.testing import gates

needs_keys = pytest.mark.skipif(not hasattr(torch._C.DispatchKeySet, "raw_repr"), reason="torch shows no dispatch keys")

needs_half = pytest.mark.skipif(
    not numba_converts_float16(), reason="the processor that Numba compiles for has no instructions that convert float16"
)
DTYPES = [pytest.param(torch.float16, marks=needs_half), torch.bfloat16, torch.float32, torch.float64]


def run(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300, env={**os.environ, **environment}
    ).stdout


# --- digits ---------------------------------------------------------------------------------------------------------------


def applied(function, values):
    """A vector function of functions.py at every value."""

    @njit
    def loop(x, y):
        for i in range(0, x.size, simd.BYTES // x.itemsize):
            simd.store(y, i, function(simd.load(x, i)))

    padded = np.resize(values, -(-len(values) // 16) * 16)
    result = np.empty_like(padded)
    loop(padded, result)
    return result[: len(values)]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    ("name", "exact", "low", "high"),
    [
        ("ln_1p", mpmath.log1p, 2**-0.5 - 1, 2**0.5 - 1),
        ("exp2_m1", lambda f: mpmath.expm1(f * mpmath.log(2)), -0.5, 0.5),
        ("exp2", lambda y: mpmath.power(2, y), -60, 0),
        ("exp_m1", mpmath.expm1, -40, 0),
        ("ln", mpmath.log, 2**-20, 2**20),
    ],
)
def test_elementary_functions_are_right_to_a_few_ulp(name, exact, low, high, dtype):
    values = np.concatenate([np.linspace(low, high, 997), [v for v in (-1e-9, 1e-9, 1 - 1e-6, 1 + 1e-6) if low <= v <= high]])
    values = values.astype(dtype)[np.abs(values) > 0]
    result = applied(getattr(functions, name), values)
    with mpmath.workdps(40):
        truth = [exact(mpmath.mpf(float(v))) for v in values]
        # of 2^y the digits are lost with y's: half an ulp of y, times ln 2
        slack = [4 + (abs(float(v)) if name == "exp2" else 0) for v in values]
        errors = [abs(float((mpmath.mpf(float(r)) - t) / t)) if t else 0.0 for r, t in zip(result, truth, strict=True)]
    assert max(e / s for e, s in zip(errors, slack, strict=True)) <= np.finfo(dtype).eps


@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.85, 0.99])
@pytest.mark.parametrize("by_table", [True, False])
def test_slopes_of_a_call_are_right_to_a_few_ulp(alpha, by_table):
    """Every exponent, many mantissas, and 0; subnormals count as normal."""
    some = [2.0 ** np.linspace(-126, 0, 4001), 1 + np.linspace(-0.6, 0, 501), [0.0, 1.0, 2.0**-149, 3e-42, 1e-38]]
    weights = np.concatenate(some).astype(np.float32)
    table = tables.table_of(alpha, functions.OF_SLOPES) if by_table else None
    at = 0 if table is None else table.ctypes.data

    @njit
    def slopes(p, s, at):
        other, live = np.empty(p.size, np.float32), np.empty(p.size, np.int32)
        if at != 0:
            gradient.slope_sums_by_table(p, p, s, other, live, 0, p.size, at)
        else:
            gradient.slope_sums(p, p, s, other, live, 0, p.size, simd.splat(p, 1 - alpha))

    padded = np.resize(weights, -(-len(weights) // 16) * 16)
    found = np.empty_like(padded)
    slopes(padded, found, at)
    exact = np.where(padded > 0, np.maximum(padded, 2.0**-126), 0.0).astype(np.float64) ** alpha
    allowed = 3.0
    if at == 0:  # alpha and 1 - alpha are then rounded to float32, and count as often as the exponent
        allowed += 2 * math.log(2) / 4 * -np.log2(np.maximum(padded, 2.0**-126))
    assert (np.abs(found - exact) <= allowed * np.finfo(np.float32).eps * exact).all()
    assert (found[padded == 1] == 1).all()


@pytest.mark.parametrize("k", [1.02, 1.7, 3.4, 6.67, 9.9])
def test_powers_by_table_are_right_to_a_few_ulp(k):
    """Of [1 + w]^k: near the threshold, at 0, and on the threshold."""
    table = tables.table_of(k)
    if table is None:
        assert simd.digit_bits() == 0
        return
    u = np.concatenate([2.0 ** np.linspace(-24, 0, 5001), 1 + np.linspace(-0.5, 0, 997), [0.0, 1.0]])
    w = np.concatenate([(u - 1), [-1.5, -2.0]]).astype(np.float32)
    padded = np.resize(w, -(-len(w) // 16) * 16)
    found, other = np.empty_like(padded), np.empty_like(padded)

    @njit
    def powers(z, p, other, at):
        functions.powers_by_table(z, p, other, 0, z.size, 16, simd.splat(z, 0.0), at)

    powers(padded, found, other, table.ctypes.data)
    exact = np.maximum(1 + padded.astype(np.float64), 0) ** k
    least = np.finfo(np.float32).tiny
    assert (np.abs(found - exact) <= 4 * np.finfo(np.float32).eps * exact + least).all()
    assert (found[padded == 0] == 1).all()
    assert (found[padded <= -1] == 0).all()


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("k", [0.02, 0.85, 1.7, 6.67, 10.0])
def test_tables_for_either_processor(bits, k):
    """What `digit_of` looks up, done by hand: two digits of the exponent, and where they do not reach the last place."""
    table = tables.tables_for(bits, (k,), functions.DEGREE)[0]
    exponents = np.arange(-126, 1)
    low, high = (exponents + 127) & ((1 << bits) - 1), ((exponents + 127) >> bits) & ((1 << bits) - 1)
    found = table[low].astype(np.float64) * table[functions.DIGITS + high]
    if bits == 3:
        found[exponents < -63] *= table[functions.FURTHER]
    kept = k * exponents > -126
    assert np.allclose(found[kept], 2.0 ** (k * exponents[kept]), rtol=2e-7, atol=0)
    f = np.linspace(0, 1, 1001)
    polynomial = np.polyval(table[2 * functions.DIGITS : functions.FURTHER].astype(np.float64), f)
    assert np.abs(polynomial / (1 + f) ** k - 1).max() < 2e-7


@pytest.mark.slow
@pytest.mark.parametrize("bits", [0, 3])
def test_digits_on_an_older_processor(bits, tmp_path):
    """The same in a process that compiles without its instructions for look-ups, and the kernels against the gate there."""
    if simd.digit_bits() <= bits:
        pytest.skip(f"the processor that Numba compiles for looks up {simd.digit_bits()} bits: the tests above were of this")
    features = "+avx2,+avx,+fma,+f16c" if bits else ""
    environment = {"NUMBA_CPU_NAME": "znver3", "NUMBA_CPU_FEATURES": features, "NUMBA_CACHE_DIR": str(tmp_path)}
    code = """
import torch
from diffmax import diffmax_bisect, reference
from diffmax.kernels.numba.simd import digit_bits
from diffmax.testing import gates
torch.manual_seed(0)
x, g = torch.randn(2, 40, 200)
p = diffmax_bisect(x.requires_grad_(), 0.85, backend="numba")
p.backward(g)
with torch.no_grad():
    bisect, m = lambda x: reference.bisect(x, 0.15, 1, 200, True)[0], torch.zeros(40, 1)
    of_p = lambda g, p: reference.bisect_backward(g, p, m.to(p), m.to(p), None, 0.15, 1, False)[0]
    for found, wanted in ((p, gates(bisect, x)[0]), (x.grad, gates(of_p, g, p)[0])):
        assert (found.double() - wanted.exact).abs().max() <= wanted.allowed
print(digit_bits())
"""
    assert run(code, **environment).strip() == str(bits)
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "few_ulp or candidates", __file__]
    subprocess.run(tests, check=True, timeout=300, env={**os.environ, **environment})


@needs_half
def test_halves_are_converted_like_torch_does():
    """All 65536 bit patterns of both, and the rounding of numbers between them."""

    @njit
    def widen(x, y):
        for i in range(0, x.size, 16):
            simd.store(y, i, simd.load(x, i))

    for dtype, bits in ((torch.bfloat16, np.uint16), (torch.float16, np.int16)):
        every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
        wide, back = np.empty(2**16, np.float32), np.empty(2**16, bits)
        widen(every.view(torch.int16).numpy().view(bits), wide)
        torch.testing.assert_close(torch.from_numpy(wide), every.float(), rtol=0, atol=0, equal_nan=True)
        numbers = torch.cat(
            [torch.randn(2**15) * 2.0 ** torch.randint(-30, 18, (2**15,)), every.float()[: 2**15] * (1 + 2**-9)]
        )
        widen(numbers.numpy(), back)
        torch.testing.assert_close(
            torch.from_numpy(back.view(np.int16)).view(dtype), numbers.to(dtype), rtol=0, atol=0, equal_nan=True
        )


@pytest.mark.parametrize("alpha", [0.6, 0.8, 0.85, 0.9, 0.95, 0.99, 0.999])
@pytest.mark.parametrize("kind", ["normal", "one peak", "two levels", "sorted", "ties", "half masked"])
def test_long_rows_whose_sample_misleads_pass_the_gate(kind, alpha):
    """The first iterate comes from every fourth vector: here the others are unlike it."""
    x = torch.randn(6, 3000)
    if kind == "one peak":
        x[:, 17] += 30
    elif kind == "two levels":
        x[:, :64] += 20
    elif kind == "sorted":
        x = (3 * x).sort(-1).values
    elif kind == "ties":
        x = x.round()
    elif kind == "half masked":
        x[:, ::2] = -torch.inf
    wanted = gates(lambda x: reference.bisect(x, 1 - alpha, 1, 200, True), x)
    results = torch.ops.diffmax.bisect(x, 1 - alpha, None, 1, 50, True, "numba")
    for result, (exact, allowed) in zip(results, wanted, strict=True):
        assert (result.double() - exact).abs().max() <= allowed
    p, exact = results[0], wanted[0].exact
    assert torch.equal(p == 0, p.double() * exact == 0) or ((p == 0) != (exact == 0)).sum() <= 2  # at the edge


@pytest.mark.parametrize("alpha", [0.5, 0.8])  # 1 / (1 - alpha) an integer or not
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("n", [100, 129, 191, 1000, 1003])
def test_candidates_are_found_wherever_they_lie_and_however_many_they_are(n, dtype, alpha):
    """Lists of a group, rows on their candidates alone, whole rows: each row has another share of candidates, elsewhere."""
    torch.manual_seed(0)
    shares = torch.tensor([1 / n, 3 / n, 0.02, 0.1, 127 / n, 128 / n, 129 / n, 0.3, 0.49, 0.51, 0.69, 0.71, 0.9, 1.0]).clamp(
        max=1
    )
    near = torch.arange(n) < (shares * n).round()[:, None]
    near = torch.cat([near, near.flip(1), torch.stack([row[torch.randperm(n)] for row in near])])
    x = torch.where(near, torch.rand(len(near), n), torch.tensor(-20.0)).to(dtype)
    exact = reference.bisect(x.double(), 1 - alpha, 1, 200, True)[0]
    found = diffmax.diffmax_bisect(x, alpha, backend="numba")
    assert (found.double() - exact).abs().max() <= (2e-6 if dtype == torch.float32 else 1e-13)
    assert torch.equal(found > 0, exact.to(dtype) > 0)


@pytest.mark.parametrize("n", [127, 129, 200, 1000, 4099])
def test_a_list_is_given_up_by_the_number_of_candidates_alone(n):
    """Not by where they lie: sorted scores, or a vocabulary ordered by frequency, have them all in front."""

    @njit
    def listed(x, z, index, share):
        return one_row.listed(x, len(x), np.float32(0), np.float32(0.5), z, index, share)

    z, index = np.empty(n + 16, np.float32), np.empty(n + 16, np.int32)
    rng = np.random.default_rng(0)
    for share in (0.4, 0.5, 0.7):
        most = max(one_row.LISTED, share * n)
        for count in {1, 58, 97, min(128, n), min(129, n), int(most), min(int(most) + 1, n), n}:
            if count > n:
                continue
            front = np.arange(n) < count
            for near in (front, front[::-1], rng.permutation(front)):
                x = np.where(near, -rng.random(n), -9).astype(np.float32)
                assert listed(x, z, index, share) == (count if count <= most else -1)
                if count <= most:
                    assert (index[:count] == near.nonzero()[0]).all()
                    assert (z[:count] == x[near] * np.float32(0.5)).all()


@pytest.mark.parametrize("keys", [300, 2048])
def test_a_nan_among_values_does_not_reach_queries_that_read_the_first_keys_alone(keys):
    torch.manual_seed(0)
    query, key, value = torch.randn(1, 1, 70, 16), torch.randn(1, 1, keys, 16), torch.randn(1, 1, keys, 16)
    seen = torch.where(torch.arange(keys) < 80, 0.0, -50.0).expand(70, keys)
    value[0, 0, keys // 2] = math.nan
    out = diffmax.attention(0.1 * query, key, value, attn_mask=seen, alpha=0.85, backend="numba")
    assert out.isfinite().all()


def test_where_halley_and_newton_would_go_back_and_forth():
    """Rows of few entries at small alpha, where Halley's step leaves the support that it was computed on."""
    for alpha in (0.01, 0.05, 0.1, 0.2):
        x = torch.rand(4000, 5) * torch.tensor([0.1, 1, 1, 1, 2]) + torch.tensor([1.0, 0, 0, 0, 0])
        (wanted,) = gates(lambda x, e=1 - alpha: reference.bisect(x, e, 1, 200, True)[0], x)
        p = diffmax_bisect(x, alpha, backend="numba")
        assert (p.double() - wanted.exact).abs().max() <= wanted.allowed


@pytest.mark.slow
def test_sums_of_very_long_rows_keep_their_digits():
    x = torch.randn(1, 3_000_000)
    p = diffmax_bisect(x, 0.97, backend="numba")
    (wanted,) = gates(lambda x: reference.bisect(x, 0.03, 1, 200, True)[0], x)
    assert (p.double() - wanted.exact).abs().max() <= wanted.allowed
    assert abs(float(p.double().sum()) - 1) < 1e-6


# --- the equations of docs/theory.md, section 16 ---


@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.85, 0.99])
def test_the_start_from_the_mean_is_a_lower_bound(alpha):
    """Eq. 26."""
    e = 1 - alpha
    for sigma in (0.1, 1, 5):
        z = e * torch.randn(50, 200, dtype=torch.float64) * sigma
        z = z - z.amax(1, keepdim=True)
        delta = reference.bisect(z / e, e, 1, 200, True)[2]
        for above in (-1, -0.5, -0.2, -0.05):
            some = z > above
            count = some.sum(1, keepdim=True)
            low = (z * some).sum(1, keepdim=True) / count - torch.expm1(-e * count.log())
            assert (low <= delta + 1e-14).all()
            assert ((z - low + 1).clamp_min(0) ** (1 / e)).sum(1).min() >= 1 - 1e-12
        candidates = (z > -1).sum(1, keepdim=True)
        assert (delta <= 1 - 1 / candidates + 1e-14).all()


@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.85, 0.95])
def test_the_start_from_mean_and_variance(alpha):
    """Eq. 52: nearer to the root than the bound, and seldom beyond it; the kernel's is that, of one row and of a list."""
    e = 1 - alpha
    k = 1 / e

    @njit
    def both(z, e):
        tallies = one_row.tallied(z, z.size, e)
        v = simd.splat(z, 0.0)
        about, low = solver.started((v + tallies[1], v + tallies[2], v + tallies[3]), v + e, v + 1.0 / e, 0.7)
        return tallies[0], simd.maximum(about), simd.maximum(low)

    closer, beyond = 0, 0
    for sigma in (0.1, 1, 3):
        for _ in range(30):
            z = e * sigma * torch.randn(512, dtype=torch.float64)
            z -= z.max()
            delta = float(reference.bisect(z / e, e, 0, 200, True)[2])
            some = z[z > max(-0.7 * e**0.5, -0.28)]
            bound = float(some.mean()) - math.expm1(-e * math.log(len(some)))
            more = 0.7 * k * (k - 1) / 2 * float(some.var(unbiased=False)) * len(some) ** (2 * e)
            start = float(some.mean()) - math.expm1(-e * math.log(len(some) * (1 + more)))
            count, about, low = both(z.numpy(), e)
            assert count == (z > -1).sum()
            assert about == pytest.approx(start, abs=1e-12)
            assert low == pytest.approx(bound, abs=2e-3)
            assert low <= bound
            closer += abs(start - delta) <= abs(bound - delta) + 1e-15
            beyond += start > delta
    assert closer == 90
    assert beyond <= 2


def test_the_rational_bounds():
    """Eq. 28."""
    s = torch.logspace(0, 6, 500, dtype=torch.float64)[1:]
    assert (2 * (s - 1) / (s + 1) <= s.log()).all()
    y = torch.logspace(-3, 2, 500, dtype=torch.float64)
    assert (y / (1 + y) <= -torch.expm1(-y)).all()
    assert (-torch.expm1(-y) <= 2 * y / (2 + y)).all()
    small = y[y < 0.3]
    assert ((2 * small / (2 + small) + torch.expm1(-small)) <= small**3 / 12).all()
    below = torch.linspace(0.01, 1, 500, dtype=torch.float64)
    assert ((below - 1) / below <= below.log()).all()
    y = torch.linspace(-1.79, 0, 500, dtype=torch.float64)
    assert (y - y**2 <= -torch.expm1(-y) + 1e-15).all()


def sums(z, t, k, count):
    u = (z - t).clamp_min(0)
    u = u[u > 0]
    return [float((u ** (k - j)).sum()) for j in range(count)]


@pytest.mark.parametrize("alpha", [0.5, 0.85, 0.95])
def test_halleys_step_is_that_of_the_norm_and_longer_than_newtons(alpha):
    """Eq. 27, against derivatives of N by autograd; and `advance` takes it."""
    e = 1 - alpha
    z = e * torch.randn(100, dtype=torch.float64)
    z -= z.max()
    t = torch.tensor(-0.9, dtype=torch.float64, requires_grad=True)
    norm = ((z - t).clamp_min(0) ** (1 / e)).sum() ** e - 1
    first = torch.autograd.grad(norm, t, create_graph=True)[0]
    second = torch.autograd.grad(first, t)[0]
    expected = float((-norm / first / (1 - norm * second / (2 * first**2))).detach())
    s0, s1, s2 = sums(z, -0.9, 1 / e, 3)
    h = (s0 - s0**alpha) / s1
    ours = h / (1 + 0.5 * (1 / e - 1) * (s1 / s0 - s2 / s1) * h)
    assert ours == pytest.approx(expected, rel=1e-10)
    assert ours > h > 0

    @njit
    def step(like, s0, s1, s2, e):
        v = simd.splat(like, 0.0)
        ahead, low = solver.advance(v + s0, v + s1, v + s2, v + 0.1, v, v + 1.0, v + e, v + 1.0 / e, v > 0.0)
        return simd.maximum(ahead), simd.maximum(low)

    ahead, low = step(np.zeros(8), s0, s1, s2, e)
    assert ahead == pytest.approx(0.1 + ours, abs=0.3 * ours)
    assert 0.1 < low < 0.1 + h
    small = (1.02 * s0 / s0, s1 / s0, s2 / s0, e)  # near the root the rational forms are the step itself, to third order
    h = (small[0] - small[0] ** alpha) / small[1]
    ahead, low = step(np.zeros(8), *small)
    ours = h / (1 + 0.5 * (1 / e - 1) * (small[1] / small[0] - small[2] / small[1]) * h)
    assert ahead == pytest.approx(0.1 + ours, rel=1e-5)
    assert 0.1 + 0.97 * h < low < 0.1 + h


@pytest.mark.parametrize("alpha", [0.85, 0.95, 0.99])
def test_the_step_on_the_logarithm_and_the_shift(alpha):
    """Eq. 29: what the series gives for d and for the weights, against powers."""
    e = 1 - alpha
    k = 1 / e
    z = e * torch.randn(512, dtype=torch.float64)
    z -= z.max()
    root = float(reference.bisect(z / e, e, 0, 200, True)[2]) - 1
    t = root - 0.02 * e
    d, rate = solver.step_on_log(*sums(z, t, k, 5), k)
    assert t + d == pytest.approx(root, abs=1e-7 * e)
    there, slope = sums(z, t + d, k, 2)
    assert rate == pytest.approx(k * slope / there, rel=1e-5)
    u = (z - t).clamp_min(0)
    weights, reciprocals = (u**k).numpy(), (1 / u.clamp_min(1e-9)).numpy()

    @njit
    def shift(z, p, r, ahead, d, k):
        return solver.shift(z, p, r, 512, simd.splat(z, ahead), d, k)

    total = shift(z.numpy(), weights, reciprocals, t + d + 1, d, k)
    exact = (z - t - d).clamp_min(0) ** k
    assert total == pytest.approx(float(exact.sum()), rel=1e-8)
    assert abs(torch.from_numpy(weights) - exact).max() < 1e-9
    assert (weights >= 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("alpha", [0.79, 0.82, 0.85, 0.87, 0.94])
def test_entries_crowded_at_the_threshold(alpha, dtype):
    """Steps on the weights keep some that [z - t] is rounded to nothing for: divided by that, they became as large as 1e9."""
    generator = torch.Generator().manual_seed(5)
    k = 1 / (1 - alpha)
    for _ in range(12):
        x = 2 * torch.randn(4, 1500, generator=generator, dtype=torch.float64)
        for _ in range(3):  # the threshold moves a little with what is put there
            _, m, delta = reference.bisect(x, 1 - alpha, 1, 200, True)
            near = torch.linspace(-3e-7, 3e-7, 500, dtype=torch.float64)
            x[:, 1000:] = m + k * (delta - 1) + k * near
        x = x.to(dtype)
        grad = torch.randn(4, 1500, generator=generator, dtype=dtype)
        wanted = diffmax_bisect(x.double(), alpha, backend="reference")
        found = diffmax_bisect(x, alpha, backend="numba")
        assert (found - wanted).abs().max() < 1e-6
        results = []
        for name, t in (("numba", x), ("reference", x.double())):  # scores as a bias: the output is the weights times values
            value = grad.T.to(t.dtype)[None, None].contiguous()
            zero = torch.zeros(1, 1, 4, 4, dtype=t.dtype)
            key = torch.zeros(1, 1, 1500, 4, dtype=t.dtype)
            bias = t[None, None].clone().requires_grad_()
            out = diffmax.attention(zero, key, value, alpha=alpha, attn_mask=bias, backend=name)
            results.append((out, torch.autograd.grad(out.square().sum(), bias)[0]))
        for one, other in zip(*results, strict=True):
            assert (one - other).abs().max() < 1e-5


@pytest.mark.parametrize("alpha", [0.5, 0.8])
@pytest.mark.parametrize("keys", [1, 8, 100])
def test_queries_that_see_a_sink_alone_beside_those_that_see_keys(keys, alpha):
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, n, 16, requires_grad=True) for n in (200, keys, keys))
    sink, grad = torch.randn(2, requires_grad=True), torch.randn(1, 2, 200, 16)
    options = {"alpha": alpha, "is_causal": True, "causal_alignment": "lower_right", "sink": sink}
    results = []
    for backend in ("numba", "reference"):
        with torch.no_grad():  # nothing is kept for a backward pass
            alone = diffmax.attention(query, key, value, backend=backend, **options)
        out = diffmax.attention(query, key, value, backend=backend, **options)
        results.append([alone, out, *torch.autograd.grad(out, (query, key, value, sink), grad)])
    for found, exact in zip(*results, strict=True):
        assert torch.allclose(found, exact, atol=1e-5, rtol=1e-4)
    assert (results[0][0][:, :, : 200 - keys] == 0).all()


# --- independence ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [5, 16, 40, 129, 200, 256, 300, 1500])
def test_a_row_does_not_depend_on_its_neighbours(n, dtype):
    """Short rows are solved sixteen at a time: bit for bit what each gives alone."""
    x = (torch.randn(37, n) * torch.linspace(0.1, 8, 37)[:, None]).to(dtype)
    for alpha in (0.15, 0.5, 0.75, 0.85):
        together = diffmax_bisect(x, alpha, backend="numba")
        alone = torch.cat([diffmax_bisect(row[None], alpha, backend="numba") for row in x])
        assert torch.equal(together, alone)


@pytest.mark.parametrize("n", [129, 192, 256, 257])
def test_rows_that_are_collected_are_added_up_as_exactly_as_others(n):
    """A vector's place that adds up 256 weights one by one rounds each sum the same way where they are equal."""
    for alpha in (0.5, 0.75, 0.9):
        for nearness in (0.9, 0.95, 0.98, 0.999):
            x = torch.full((16, n), -nearness / (1 - alpha))
            x[:, 0] = 0
            found = diffmax_bisect(x, alpha, ensure_sum_one=False, backend="numba").double()
            exact = diffmax_bisect(x.double(), alpha, ensure_sum_one=False, backend="reference")
            assert (found - exact).abs().max() < 3e-6


@pytest.mark.parametrize("on_torchs", [True, False])
@pytest.mark.parametrize(("rows", "n"), [(1000, 300), (5, 40000)])
def test_threads_change_no_bit_and_are_as_many_as_torchs(rows, n, on_torchs, monkeypatch):
    x = torch.randn(rows, n, requires_grad=True)
    alpha = torch.full((rows, 1), 0.7, requires_grad=True)
    if not on_torchs:
        monkeypatch.setattr(threads, "torchs_threads", lambda: None)
    counts = []

    def spy(kernel, address, job, count):
        counts.append(count)
        run_on_threads(kernel, address, job, count)

    run_on_threads = threads.run_on_threads
    monkeypatch.setattr(threads, "run_on_threads", spy)
    results = {}
    before = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            p = diffmax_bisect(x, alpha, backend="numba")
            results[count] = (p, *torch.autograd.grad(p.square().sum(), (x, alpha)))
    finally:
        torch.set_num_threads(before)
    assert counts == [2, 2, 3, 3]  # forward and backward
    for count in (2, 3):
        assert all(torch.equal(a, b) for a, b in zip(results[1], results[count], strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [129, 200, 256])
def test_threads_change_no_bit_of_rows_that_are_collected(n, dtype):
    """A thread may end with a few that it has not solved yet."""
    before = torch.get_num_threads()
    try:
        for rows in (255, 300, 1000, 1024, 2001):
            x = (torch.randn(rows, n) * torch.rand(rows, 1) * 4).to(dtype)
            for alpha in (0.5, 0.75, 0.9):
                found = []
                for count in (1, 2, 3):
                    torch.set_num_threads(count)
                    found.append(diffmax_bisect(x, alpha, backend="numba"))
                assert torch.equal(found[0], found[1])
                assert torch.equal(found[0], found[2])
    finally:
        torch.set_num_threads(before)


@cfunc(types.int64(types.intp))
def enter(job):
    """Counts who enters in the first word, and waits until as many are there as the second word says."""
    words = simd.array_at(job, 2, np.int64)
    simd.fetch_add(words, 0, 1)
    while simd.fetch_add(words, 0, 0) < words[1]:
        pass
    return 0


@pytest.mark.parametrize("on_torchs", [True, False])
def test_a_job_is_given_to_as_many_threads_at_once(on_torchs, monkeypatch):
    if not on_torchs:
        monkeypatch.setattr(threads, "torchs_threads", lambda: None)
    job = np.array([0, 3])
    threads.run_on_threads(enter.ctypes, enter.address, job.ctypes.data, 3)
    assert job[0] == 3


@pytest.mark.skipif(sys.platform != "linux", reason="the entry into torch's OpenMP library is looked for on Linux")
def test_the_threads_are_torchs():
    """No thread is started where torch has started as many."""
    code = """
import os, torch, diffmax
diffmax.diffmax_bisect(torch.randn(4), 0.5, backend="numba")  # imports libraries that have threads of their own
torch.set_num_threads(3)
x = torch.randn(500, 4000)
torch.softmax(x, -1)
before = set(os.listdir("/proc/self/task"))
p = diffmax.diffmax_bisect(x, 0.5, backend="numba")
print(before == set(os.listdir("/proc/self/task")))
"""
    assert run(code).strip() == "True"


@pytest.mark.skipif(sys.platform != "linux", reason="the entry into torch's OpenMP library is looked for on Linux")
def test_a_call_inside_a_parallel_region_stays_on_its_thread():
    """Each of OpenMP's threads enters Python in turn and makes a call that is large enough to be shared out."""
    x = torch.randn(500, 400)
    expected = diffmax_bisect(x, 0.5, backend="numba")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    results = []
    region = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda _: results.append(diffmax_bisect(x, 0.5, backend="numba")))
    try:
        threads.torchs_threads()(ctypes.cast(region, ctypes.c_void_p).value, 0, 2, 0)
    finally:
        torch.set_num_threads(before)
    assert len(results) == 2
    assert all(torch.equal(result, expected) for result in results)


def test_without_torchs_openmp_there_are_threads_all_the_same(monkeypatch):
    for owner, name, value in (
        (sys, "platform", "darwin"),
        (torch.backends.openmp, "is_available", lambda: False),
        (torch, "__file__", "/nowhere/__init__.py"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, value)
            threads._openmp_entry.cache_clear()
            assert threads.torchs_threads() is None
    threads._openmp_entry.cache_clear()


def test_a_thread_without_memory_is_an_error_and_no_silent_result(monkeypatch):
    monkeypatch.setattr(numba_rows, "_kernel", lambda name, dtype: (lambda job: 0, 0))
    monkeypatch.setattr(numba_rows, "_small_plan", lambda *call: (lambda job: 0, 1, 0, None))
    monkeypatch.setattr(threads, "run_on_threads", lambda *job: None)
    for count in (1, 1000):
        for x in (torch.randn(count, 400), torch.randn(400, count).T):
            with pytest.raises(MemoryError, match="no memory to solve rows of 400 entries"):
                diffmax_bisect(x, 0.5, backend="numba")


@pytest.mark.parametrize(("alpha", "w"), [(0.1, 3e-5), (0.01, 3e-6), (0.7, 1e-4), (0.85, 1e-3)])
def test_one_entry_far_above_a_crowd_beside_the_threshold(alpha, w):
    """Of whose [z - t] a rounded threshold leaves few digits: for small alpha they weigh much together."""
    x = torch.full((1, 5000), 1.7 - (1 - w) / (1 - alpha))
    x[:, 0] = 1.7
    p = diffmax_bisect(x, alpha, backend="numba").double()
    assert (p - reference.bisect(x.double(), 1 - alpha, 1, 200, True)[0]).abs().sum() < 1e-3


def test_uniform_rows_take_few_evaluations():
    """The bound of the last step may be below what a threshold can hold; the steps would then all be taken."""

    def seconds(alpha):
        x = torch.rand(4, 5000)
        calls = (timeit.timeit(lambda: diffmax_bisect(x, alpha, backend="numba"), number=3) for _ in range(9))
        return min(calls)

    seconds(0.1)  # the first call compiles
    assert seconds(0.1) < 5 * seconds(0.7)


@pytest.mark.parametrize("n", [16, 128, 200, 1024, 5000])
def test_rows_of_like_entries_sum_to_one(n):
    """The roundings of their sum all go one way; softmax leaves 1e-6."""
    x = torch.randn(64, n) * 5
    x[:, n // 2 :] = x[:, :1] - torch.rand(64, n - n // 2) * 1e-3
    for alpha in (0.3, 0.7, 0.85, 0.9, 0.95):
        for scores in (x, torch.zeros(64, n), torch.randn(64, n) * 1e-3):
            total = diffmax_bisect(scores, alpha, backend="numba").double().sum(-1)
            assert (total - 1).abs().max() <= (1e-6 if n > one_row.GROUPED else 5e-7)


def test_calls_from_many_python_threads():
    """Numba's own thread layers abort the process here, or in a forked child."""
    xs = [torch.randn(200, 400) for _ in range(16)]
    expected = [diffmax_bisect(x, 0.7, backend="numba") for x in xs]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda x: diffmax_bisect(x, 0.7, backend="numba"), xs * 3))
    assert all(torch.equal(a, b) for a, b in zip(results, expected * 3, strict=True))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_forked_child_starts_threads_of_its_own():
    """OpenMP's threads stay in the parent, and OpenMP does not notice: torch's own operators would wait for them for ever."""
    code = """
import os, torch, diffmax
torch.set_num_threads(2)
x = torch.randn(500, 400)
expected = diffmax.diffmax_bisect(x, 0.5, backend="numba")
from diffmax.kernels.numba import threads
assert threads._pool is None or threads.torchs_threads() is None
child = os.fork()
if child == 0:
    assert threads._pool is None and threads.torchs_threads() is None
    result = diffmax.diffmax_bisect(x, 0.5, backend="numba")
    same = (result.numpy() == expected.numpy()).all()
    os._exit(0 if same and threads._pool is not None else 1)
print(os.waitpid(child, 0)[1])
"""
    assert run(code).strip() == "0"


# --- the short way past the dispatcher ---


class Seen(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names = [*getattr(self, "names", []), str(function)]
        return function(*args, **(kwargs or {}))


class SeenAsFunction(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.names = [*getattr(self, "names", []), str(function)]
        return function(*args, **(kwargs or {}))


@needs_keys
@pytest.mark.parametrize("shape", [(8,), (3, 1, 40), (2, 300, 5), (0, 4), (2, 3000)])
@pytest.mark.parametrize("dim", [0, -1])
def test_the_short_way_gives_the_same_bits(shape, dim):
    x = torch.randn(shape)
    e, dim = 1.0 - 0.7, dim % len(shape)
    assert is_plain(x)
    p = diffmax_bisect(x, 0.7, dim, backend="numba")
    expected = torch.ops.diffmax.bisect(x, e, None, dim, 50, True, "numba")[0]
    assert torch.equal(p, expected)
    assert (p.stride(), p.dtype) == (expected.stride(), expected.dtype)
    with torch.inference_mode():
        assert torch.equal(diffmax_bisect(x, 0.7, dim, backend="numba"), expected)
        assert is_plain(torch.ones(2))


@needs_keys
def test_whoever_has_a_part_in_operators_still_gets_it(monkeypatch):
    x = torch.randn(3, 8)
    taken = []
    monkeypatch.setattr(registry, "kernels", {})  # which remembers what was offered before
    monkeypatch.setattr(numba_rows.bisect, "weights", lambda *arguments: taken.append(arguments) or torch.empty_like(x))
    with Seen() as mode:
        diffmax_bisect(x, 0.7)
    assert "diffmax.bisect.default" in mode.names
    with SeenAsFunction() as mode:
        diffmax_bisect(x, 0.7)
    assert "diffmax.bisect" in mode.names
    with torch.profiler.profile() as profile:
        diffmax_bisect(x, 0.7)
    assert "diffmax::bisect" in [event.name for event in profile.events()]
    torch.vmap(lambda x: diffmax_bisect(x, 0.7))(x)
    diffmax_bisect(torch.nn.Parameter(x), 0.7)
    diffmax_bisect(torch.randn(3, 8, requires_grad=True), 0.7).square().sum().backward()
    imaginary = torch.randn(8, dtype=torch.complex64).conj().imag
    assert imaginary.is_neg()
    p = diffmax_bisect(imaginary, 0.7)
    assert not taken
    assert torch.equal(p, torch.ops.diffmax.bisect(imaginary.resolve_neg(), 1 - 0.7, None, 0, 50, True, "numba")[0])
    diffmax_bisect(x, 0.7)
    assert len(taken) == 1


# --- code -----------------------------------------------------------------------------------------------------------------


def loops(assembly):
    """The innermost loops: each a list of instructions."""
    lines = assembly.splitlines()
    labels = {m[1]: i for i, line in enumerate(lines) if (m := re.match(r"(\.L\w+):", line))}
    for i, line in enumerate(lines):
        jump = re.match(r"\s+j\w+\s+(\.L\w+)", line)
        if jump and labels.get(jump[1], i) < i:
            body = lines[labels[jump[1]] + 1 : i + 1]
            if not any(re.match(r"\.L\w+:", inner) for inner in body):
                yield [inner.strip() for inner in body if inner.startswith("\t") and not inner.startswith("\t.")]


@pytest.mark.slow
@pytest.mark.skipif("x86" not in os.uname().machine, reason="reads x86 assembly")
@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])  # what narrower numbers are computed in, and what is converted
def test_hot_loops_are_packed(dtype, monkeypatch, tmp_path):
    """In the loops that take powers, every floating-point instruction works on a whole vector, and none calls a function."""
    code = f"""
import torch, diffmax
x = torch.randn(4, 300).to(torch.{dtype}).requires_grad_()
a = torch.full((4, 1), 0.7, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32, requires_grad=True)
diffmax.diffmax_bisect(x, a, backend="numba").sum().backward()
from diffmax.kernels.numba.jobs import compiled
for name in ("forward", "backward"):
    print(compiled(name, x.dtype)._library.get_asm_str())
"""
    assembly = run(code, NUMBA_CACHE_DIR=str(tmp_path))  # a cache of its own: code that is read from one cannot be inspected
    suffix = "pd" if dtype == "float64" else "ps"
    writes = re.compile(r"v?mov\S+\s+%[xyz]mm\d+, \S*\((?!%rsp|%rbp)")  # a vector, and not into the stack
    hot = [
        loop for loop in loops(assembly) if sum("fmadd" in i or "mulp" in i for i in loop) >= 8 and any(map(writes.match, loop))
    ]
    assert len(hot) >= 5
    for loop in hot:
        scalar = [i for i in loop if re.match(r"v?(add|sub|mul|div|fn?m(add|sub)\d+|sqrt|max|min)s[sd]\b", i)]
        assert not scalar
        assert not [i for i in loop if i.startswith("call")]
        packed = [i for i in loop if re.match(rf"v?(add|mul|fn?m(add|sub)\d+){suffix}\b", i)]
        assert len(packed) >= 8


@pytest.mark.slow
def test_the_kernels_are_kept_on_disk_and_shared_between_processes(tmp_path):
    code = """
import torch, diffmax
x = torch.randn(20, 30, requires_grad=True)
diffmax.diffmax_bisect(x, 0.7, backend="numba").square().sum().backward()
from diffmax.kernels.numba.jobs import compiled
print([compiled(name, x.dtype).cache_hits for name in ("forward", "backward")])
"""
    assert run(code, NUMBA_CACHE_DIR=str(tmp_path)).strip() == "[0, 0]"
    assert run(code, NUMBA_CACHE_DIR=str(tmp_path)).strip() == "[1, 1]"
    assert list(tmp_path.rglob("*.nbc"))


# --- without numba --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["raise ImportError('Numba needs NumPy 2.2 or less. Got NumPy 9.9.')", "1 / 0"])
def test_a_numba_that_cannot_be_imported_leaves_the_plain_kernels(fault, tmp_path):
    (tmp_path / "numba").mkdir()
    (tmp_path / "numba" / "__init__.py").write_text(fault)
    code = """
import torch, diffmax
print(diffmax.diffmax_bisect(torch.tensor([3.0, 0.0]), 0.5).tolist())
print([(r.status, r.reason) for r in diffmax.backends() if r.backend == "numba"][0])
print([r.status for r in diffmax.backends() if r.backend == "cpu"][0])
"""
    values, numba, cpu = run(code, PYTHONPATH=os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])).splitlines()
    assert values == "[1.0, 0.0]"
    assert "'unavailable'" in numba
    assert ("Numba needs NumPy 2.2 or less" in numba) or ("division by zero" in numba)
    assert "pip install" in numba
    assert cpu == "active"


@pytest.mark.skipif("x86" not in os.uname().machine, reason="names x86 processors")
def test_float16_needs_the_conversions_of_the_processor_that_numba_compiles_for(monkeypatch):
    """The features of the processor it runs on were asked for: with NUMBA_CPU_NAME=generic float16 ended the process."""
    from numba.core import config

    assert numba_missing() is None
    spec = CallSpec("bisect", "cpu", "cpu", torch.float16)
    for name, features, can in (
        ("generic", "", False),
        ("sandybridge", "", False),
        ("sandybridge", "+f16c", True),
        ("ivybridge", "", True),
        ("znver3", "", True),
    ):
        monkeypatch.setattr(config, "CPU_NAME", name)
        monkeypatch.setattr(config, "CPU_FEATURES", features)
        assert numba_cannot(CallSpec("bisect", "cpu", "cpu", torch.float32)) == []
        assert ["F16C" in reason for reason in numba_cannot(spec)] == ([] if can else [True])


def test_is_chosen_when_it_is_there():
    assert diffmax.explain("diffmax_bisect", torch.zeros(3)).chosen == "numba"


# --- attention ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operation", ["forward", "backward"])
def test_attention_opens_one_parallel_region(operation, monkeypatch):
    opened = []

    def counted(*arguments):
        opened.append(arguments)
        return run_on_threads(*arguments)

    run_on_threads = threads.run_on_threads
    monkeypatch.setattr(threads, "run_on_threads", counted)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        query, key, value = (torch.randn(1, 4, 512, 64, requires_grad=True) for _ in range(3))
        out = diffmax.attention(query, key, value, is_causal=True, softcap=5.0, backend="numba")
        if operation == "backward":
            opened.clear()
            out.sum().backward()
    finally:
        torch.set_num_threads(before)
    assert len(opened) == 1


def test_attention_of_the_size_of_one_tile_wakes_no_thread(monkeypatch):
    monkeypatch.delattr(threads, "run_on_threads")
    query = torch.randn(1, 1, 16, 64)
    diffmax.attention(query, query, query, backend="numba")


@functools.cache
def compiled_products():
    """The three products as calls of arrays, compiled once for each dtype."""
    from diffmax.kernels.numba import products

    @njit
    def by_panels(a, k, panels, pack_rows, c, rows, count, depth, padded):
        products.pack(k.ctypes.data, 0, depth, count, depth, panels, pack_rows, padded)
        width = products.panel_width(panels)
        stop = (count + width - 1) // width * width
        products.multiply_panels(a, np.arange(rows) * depth, rows, panels, depth, 0, stop, c, np.arange(rows) * 512)

    @njit
    def directly(a, k, c, rows, count, padded):
        places = np.arange(rows)
        products.multiply_directly(a, places * padded, rows, k, padded, count, padded, c, places * 512, 0)

    @njit
    def by_rows(p, v, c, rows, count, padded):
        products.multiply_rows(
            p, np.arange(rows) * count, 1, rows, v, 0, padded, count, c, np.arange(rows) * padded, padded, False
        )

    return by_panels, directly, by_rows, products.ROWS


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_products_equal_torchs(dtype):
    by_panels, directly, by_rows, at_once = compiled_products()
    computing, rows = np.dtype(dtype).type, at_once * 2
    generator = np.random.default_rng(0)
    for depth, count in ((1, 1), (3, 5), (64, 64), (65, 31), (130, 300)):
        padded = -(-depth // 16) * 16
        a, k = (generator.standard_normal((n, depth)).astype(computing) for n in (rows, count))
        wanted, bound = a.astype(np.float64) @ k.astype(np.float64).T, 8 * np.finfo(computing).eps * np.sqrt(depth)
        panels, pack_rows = np.zeros(512 * depth, computing), np.zeros(64 * padded, computing)
        scores = np.zeros((rows, 512), computing)
        by_panels(a.ravel(), k.ravel(), panels, pack_rows, scores.ravel(), rows, count, depth, padded)
        assert np.abs(scores[:, :count] - wanted).max() <= bound * 4
        p = generator.random((rows, count)).astype(computing)
        v, whole = (np.zeros((n, padded), computing) for n in (count, rows))
        v[:, :depth], whole[:, :depth] = k, a
        again = np.zeros((rows, 512), computing)
        directly(whole.ravel(), v.ravel(), again.ravel(), rows, count, padded)
        assert np.abs(again[:, :count] - wanted).max() <= bound * 4
        assert (again[:, count:] == 0).all()
        sums = np.zeros((rows, padded), computing)
        by_rows(p.ravel(), v.ravel(), sums.ravel(), rows, count, padded)
        assert np.abs(sums[:, :depth] - p.astype(np.float64) @ k.astype(np.float64)).max() <= bound * 8 * np.sqrt(count)


@pytest.mark.parametrize(
    ("triple", "cpu", "tile", "fused", "spilled"),
    [
        ("aarch64-unknown-linux-gnu", "neoverse-n1", (4, 1), r"fmla\s+v\d+\.4s", r"[lst][dt][rp]\s+q\d+.*\[sp"),
        ("x86_64-unknown-linux-gnu", "haswell", (4, 1), r"vfmadd\d+ps\s.*%ymm", r"\sv\w+\s.*\(%[er]sp\)"),
        ("x86_64-unknown-linux-gnu", "skylake-avx512", (8, 2), r"vfmadd\d+ps\s.*%zmm", r"\sv\w+\s.*\(%[er]sp\)"),
    ],
)
def test_products_keep_their_sums_in_registers(triple, cpu, tile, fused, spilled):
    """Compiled for other processors than this one: the loop is fused multiply-adds of vectors, none of which is spilled."""
    product = simd.product_of(*tile)

    @njit(error_model="numpy", _nrt=False)
    def multiply(a, rows, b, depth, c):
        product(a, rows, 1, b, 0, 64, depth, c, rows, 0, 0, False)

    floats, places = types.Array(types.float32, 1, "C"), types.Array(types.int64, 1, "C")
    signature = (floats, places, floats, types.int64, floats)
    multiply.compile(signature)
    code = re.sub(r'target datalayout = "[^"]*"', "", multiply.inspect_llvm(signature))
    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()
    module = binding.parse_assembly(re.sub(r'target triple = "[^"]*"', f'target triple = "{triple}"', code))
    assembly = binding.Target.from_triple(triple).create_target_machine(cpu=cpu, opt=3).emit_assembly(module)
    blocks = re.split(r"^\.LBB\w+:", assembly, flags=re.M)
    hot = max(blocks, key=lambda block: len(re.findall(fused, block)))
    assert len(re.findall(fused, hot)) >= tile[0] * tile[1] * (1 if "zmm" in fused else 2)
    assert not re.search(spilled, hot)


def test_decoding_has_kernels_of_its_own(monkeypatch):
    """Or, with bounds, theirs; not many queries on a long sequence whose products torch's threads share."""
    from diffmax.kernels.numba import decoding

    k_cache, v_cache = torch.randn(2, 1, 300, 2, 8).unbind()
    apart = k_cache.transpose(1, 3).contiguous().transpose(1, 3)  # not side by side: it is not copied
    kinds = {
        "token": (1, {}, k_cache),
        "chunk": (20, {}, k_cache),
        "pages": (1, {"block_table": torch.zeros(1, 1, dtype=torch.int32)}, k_cache),
        "apart": (1, {}, apart),
        "bounds": (1, {"page_bounds": diffmax.page_bounds(k_cache, 300)}, k_cache),
    }
    other, went = decoding.decoding.attention_kvcache, []
    monkeypatch.setattr(decoding.decoding, "attention_kvcache", lambda *given: went.append(True) or other(*given))

    def own():
        found = []
        for name, (length, more, keys) in kinds.items():
            went.clear()
            q = torch.randn(1, length, 4, 8)
            out = diffmax.attention_with_kvcache(q, keys, v_cache, alpha=0.6, backend="numba", **more)
            expected = diffmax.attention_with_kvcache(q, k_cache, v_cache, alpha=0.6, backend="reference")
            assert torch.allclose(out, expected, atol=1e-6)
            found += [] if went else [name]
        return found

    assert own() == ["token", "chunk", "pages", "bounds"]
    monkeypatch.setattr(decoding, "KEYS_TO_SHARE", 64)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert own() == ["token", "chunk", "pages", "bounds"]  # a key head for each thread
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert own() == ["token", "pages", "bounds"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("page_size", "length", "head_dim", "value_dim"), [(16, 1, 64, 64), (5, 3, 40, 24), (1, 70, 8, 9), (300, 33, 16, 16)]
)
def test_pages_of_a_cache_give_what_one_piece_gives(dtype, page_size, length, head_dim, value_dim):
    """Bit for bit, wherever a page begins or ends, whatever stands where no token is and behind the last page of a sequence."""
    generator = torch.Generator().manual_seed(page_size)
    lengths = torch.tensor([230, 71 + length, length, 0], dtype=torch.int32)
    pages = -(-(230 + length) // page_size)
    table = torch.randperm(4 * pages + 3, generator=generator)[: 4 * pages].view(4, pages)
    pools = [torch.randn(4 * pages + 3, page_size, 2, size, generator=generator) for size in (head_dim, value_dim)]
    query = torch.randn(4, length, 6, head_dim, generator=generator)
    new = [torch.randn(4, 2, 2, size, generator=generator) for size in (head_dim, value_dim)]
    sink, slopes = torch.randn(6, generator=generator), torch.rand(6, generator=generator)
    variants = {
        "plain": {},
        "masked": {"window_size": (40, 0), "cache_leftpad": torch.tensor([17, 3, 0, 0], dtype=torch.int32)},
        "rules": {"softcap": 3.0, "alibi_slopes": slopes, "sink": sink, "alpha": torch.linspace(0.2, 0.9, 6)},
        "appending": {"k": new[0].to(dtype), "v": new[1].to(dtype), "causal": True},
    }
    place = torch.arange(pages * page_size).view(pages, page_size)
    for name, more in variants.items():
        whole = [pool[table].flatten(1, 2).to(dtype) for pool in pools]
        has_page = place[:, 0] < (lengths + 2 * ("k" in more))[:, None]
        apart = [
            torch.full((2, *pool.shape), torch.nan, dtype=dtype)[0].transpose(1, 2).contiguous().transpose(1, 2)
            for pool in pools
        ]
        for own, pool, row in zip(apart * 4, pools * 4, sorted([*range(4)] * 2), strict=True):
            held = place < lengths[row]
            own[table[row]] = torch.where(held[..., None, None], pool[table[row]].to(dtype), torch.nan)
        options = {"alpha": 0.6, "cache_seqlens": lengths, "backend": "numba", "return_stats": True} | more
        expected, stats = diffmax.attention_with_kvcache(query.to(dtype), *whole, **options)
        wide = torch.full((4, 2 * pages), -1)  # of which the table is every second column
        wide[:, ::2] = table.masked_fill(~has_page, -1)
        out, found = diffmax.attention_with_kvcache(query.to(dtype), *apart, block_table=wide.int()[:, ::2], **options)
        assert torch.equal(out, expected), name
        assert torch.equal(found.support_size, stats.support_size), name
        assert torch.isfinite(out).all()
        if "k" in more:
            for own, contiguous, row in zip(apart * 4, whole * 4, sorted([*range(4)] * 2), strict=True):
                end = lengths[row] + 2
                assert torch.equal(own[table[row]].flatten(0, 1)[:end], contiguous[row, :end])


@pytest.mark.parametrize("alpha", [0.01, 0.3, 0.5, 0.55, 0.74, 0.76, 0.85, 0.9])
def test_attentions_gradients_hold_near_the_threshold(alpha):
    """Among many rows some weights lie next to the threshold, where their slopes are steep: U took them from the weights."""
    generator = torch.Generator().manual_seed(3)
    sizes = (4000, 4), (60, 4), (60, 4), (4000, 4)
    query, key, value, grad = (torch.randn(1, 1, *size, generator=generator) for size in sizes)
    found = {}
    for dtype, backend in ((torch.float32, "numba"), (torch.float64, "reference")):
        leaves = [t.to(dtype).requires_grad_() for t in (query * 1.5, key, value)]
        out = diffmax.attention(*leaves, alpha=alpha, backend=backend)
        found[backend] = torch.autograd.grad(out, leaves[:1], grad.to(dtype))[0]
    assert (found["numba"] - found["reference"]).abs().max() <= 2e-5


def test_sequences_that_are_not_there_are_refused_where_the_checks_cannot_look():
    packed = torch.compile(
        lambda q, starts, longest: diffmax.attention_varlen(q, q, q, starts, starts, longest, longest, backend="numba"),
        backend="eager",
    )
    query = torch.randn(200, 2, 16)
    for starts, longest in (([0, 100, 100_000], 100_000), ([0, 10_000_000, 200], 200), ([0, 200], 1), ([-5, 200], 300)):
        with pytest.raises(ValueError, match="must ascend from 0 to the number of tokens, 200"):
            packed(query, torch.tensor(starts, dtype=torch.int32), longest)


def test_a_softcap_that_float32_does_not_hold_is_refused():
    """It would be 0 to the kernels, which is none, where the reference bounds all scores by next to nothing."""
    x = torch.randn(1, 1, 3, 4)
    least = torch.finfo(torch.float32).tiny
    found, wanted = (diffmax.attention(x, x, x, softcap=least, backend=name) for name in ("numba", "reference"))
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(found, x.mean(2, keepdim=True).expand_as(x))
    with pytest.raises(ValueError, match=r"softcap must be at least 1\.18e-38, .* got 1e-50"):
        diffmax.attention(x, x, x, softcap=1e-50)
    with pytest.raises(ValueError, match="softcap must be at least"):
        diffmax.attention_with_kvcache(x, x, x, softcap=1e-39)


def test_a_softcap_of_negative_zero_is_none():
    query, key, value = (torch.randn(1, 1, 40, 16, requires_grad=True) for _ in range(3))
    wanted, got = (
        torch.autograd.grad(diffmax.attention(query, key, value, softcap=cap, backend="numba").sum(), (query, key, value))
        for cap in (0.0, -0.0)
    )
    assert all(map(torch.equal, wanted, got))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_a_query_without_keys_gets_for_a_gradient_reaches_neither_alpha_nor_sink(bad):
    query, key = torch.randn(1, 1, 3, 4, dtype=torch.float64), torch.randn(1, 1, 1, 4, dtype=torch.float64)
    alpha, sink = (torch.tensor([number], dtype=torch.float64, requires_grad=True) for number in (0.5, 0.0))
    out = diffmax.attention(
        query, key, key, is_causal=True, causal_alignment="lower_right", alpha=alpha, sink=sink, backend="numba"
    )
    grad = torch.ones_like(out)
    grad[0, 0, 0, 0] = bad  # of a query that sees the sink alone
    assert all(bool(t.isfinite().all()) for t in torch.autograd.grad(out, (alpha, sink), grad))


def test_a_bias_of_no_keys_has_a_gradient_of_its_shape():
    from diffmax.kernels.numba.attention import attention, attention_backward
    from diffmax.plugin import AttentionCall, Wanted

    query, key = torch.randn(1, 1, 64, 2), torch.randn(1, 1, 0, 2)
    call = AttentionCall(scale=1.0, e=0.5, bias=torch.zeros(1, 1, 64, 0))
    saved = attention(query, key, key, call, True, False).saved
    assert attention_backward(query, query, key, key, saved, call, Wanted(bias=True)).bias.shape == call.bias.shape


def test_scratch_memory_has_a_limit(monkeypatch):
    from diffmax.kernels.numba import attention_job

    monkeypatch.setattr(threads, "run_on_threads", lambda *_: pytest.fail("two threads"))
    monkeypatch.setattr(attention_job, "LEAST_BYTES", 0)
    query, key = torch.randn(1, 1, 4096, 64), torch.randn(1, 1, 64, 64)
    wanted = diffmax.attention(query, key, key, backend="reference")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        torch.testing.assert_close(diffmax.attention(query, key, key, backend="numba"), wanted, atol=1e-5, rtol=1e-5)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("alpha", [0.98, 0.995, 0.9995])
def test_weights_that_underflow_stay_out_of_the_last_steps(alpha):
    """Of a sharp row near softmax most candidates weigh less than float32 holds; the series made NaN of one row in forty."""
    for n in (129, 300, 1000):
        for sigma in (20.0, 50.0, 100.0):
            x = sigma * torch.randn(500, n)
            x[:, 1] = x.amax(1)
            for scores in (x, x.to(torch.bfloat16)):
                exact = reference.bisect(scores.double(), 1 - alpha, 1, 200, True)[0]
                p = diffmax_bisect(scores, alpha, backend="numba")
                assert (p.double() - exact).abs().max() <= (1e-6 if scores.dtype == torch.float32 else 4e-3)
                assert (p.double().sum(1) - 1).abs().max() <= (1e-6 if scores.dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("keys", [1, 61, 700])
def test_what_an_earlier_call_left_in_scratch_memory_does_not_matter(dtype, keys):
    """It is all NaN here, as whole numbers too; once more with what the same call has left there."""
    few, many, key, value = (torch.randn(1, 4, n, size, dtype=dtype) for n, size in ((1, 20), (70, 20), (keys, 20), (keys, 12)))
    lengths = torch.tensor([keys], dtype=torch.int32)

    def of_attention(query, **options):
        given = [t.detach().requires_grad_() for t in (query, key, value)]
        out = diffmax.attention(*given, alpha=0.6, backend="numba", **options)
        return [out, *torch.autograd.grad(out.sum(), given)]

    def of_threshold(query, weights):
        return [diffmax.threshold_attention(query, key, value, -0.1, weights=weights, is_causal=False, backend="numba")]

    def of_cache(**options):
        rows = [t.transpose(1, 2) for t in (few, key, value)]
        return [diffmax.attention_with_kvcache(*rows, cache_seqlens=lengths, alpha=0.6, backend="numba", **options)]

    bounds = diffmax.page_bounds(key.transpose(1, 2).contiguous(), lengths, bits=4)
    with torch.no_grad():
        calls = [of_cache, lambda: of_cache(page_bounds=bounds), lambda: of_threshold(few, "scores")]
        calls.append(lambda: of_threshold(many, "softmax"))
        found = [call() for call in calls]
        for call, wanted in zip(calls, found, strict=True):
            for filling in (255, 0, None):
                _fill_scratch(filling)
                assert all(map(torch.equal, call(), wanted))
    for query in (few, many):
        for options in ({}, {"softcap": 5.0, "window_size": (40, 30)}, {"sink": torch.zeros(4)}):
            wanted = of_attention(query, **options)
            for filling in (255, 0, None):
                _fill_scratch(filling)
                assert all(map(torch.equal, of_attention(query, **options), wanted))


def _fill_scratch(byte):
    """Leave memory full of a byte for the next call, which must be short enough to take it."""
    if byte is not None:
        threads._left[:] = [torch.full((threads.LEFT_BYTES,), byte, dtype=torch.uint8)]


def test_scratch_memory_that_is_left_is_of_one_call_at_a_time():
    threads._left.clear()
    first = threads.take(100)
    threads.leave(first)
    assert threads.take(50) is first  # what is larger serves too
    second = threads.take(50)
    assert second is not first
    threads.leave(second)
    threads.leave(first)  # there is room for one
    assert threads.take(threads.LEFT_BYTES + 1) is not second  # and that one stays for a shorter call
    assert threads._left[0] is second
    assert len(threads.take(60)) == 60
    threads.leave(torch.empty(threads.LEFT_BYTES + 1, dtype=torch.uint8))
    assert not threads._left


def test_a_cache_that_grows_by_a_token_finds_its_form_again():
    from diffmax.kernels.numba import attention_job

    query, cache = torch.randn(1, 4, 1, 20), torch.randn(1, 4, 600, 20)

    def run(tokens):
        diffmax.attention(query, cache[:, :, :tokens].contiguous(), cache[:, :, :tokens], backend="numba")
        rows = cache.transpose(1, 2)
        diffmax.attention_with_kvcache(query.transpose(1, 2), rows, rows, cache_seqlens=tokens, backend="numba")

    run(257)
    before = attention_job._form.cache_info().misses
    for tokens in (258, 300, 511, 512):
        run(tokens)
    assert attention_job._form.cache_info().misses == before
    run(513)
    assert attention_job._form.cache_info().misses > before


@pytest.mark.parametrize("count", [1, 63, 64, 200])
def test_many_sequences_give_what_few_give(count):
    from diffmax.kernels.numba import attention_job

    assert 63 < attention_job.MANY <= 200
    given = [torch.randn(count, 2, 3, 8, requires_grad=True) for _ in range(3)]
    out = diffmax.attention(*given, alpha=0.6, backend="numba")
    found = [out, *torch.autograd.grad(out.sum(), given)]
    parts = [[t[b : b + 1].detach().requires_grad_() for t in given] for b in range(count)]
    for b, part in enumerate(parts):
        one = diffmax.attention(*part, alpha=0.6, backend="numba")
        assert all(map(torch.equal, [t[b : b + 1] for t in found], [one, *torch.autograd.grad(one.sum(), part)]))

    rows = [t.detach().transpose(1, 2) for t in given]
    ends = torch.randint(1, 4, (count,), dtype=torch.int32)
    whole = diffmax.attention_with_kvcache(*rows, cache_seqlens=ends, alpha=0.6, backend="numba")
    for b in range(count):
        one = diffmax.attention_with_kvcache(
            *(t[b : b + 1] for t in rows), cache_seqlens=ends[b : b + 1], alpha=0.6, backend="numba"
        )
        assert torch.equal(whole[b : b + 1], one)


@pytest.mark.parametrize("alpha", [0.5, 0.85, 0.61])
@pytest.mark.parametrize("needed", [False, True])
def test_an_alpha_for_each_head_has_the_powers_of_its_float(alpha, needed):
    """Bit for bit, beside heads of others: products where 1 / (1 - alpha) is whole, tables elsewhere."""
    query, key, value = torch.randn(3, 2, 3, 200, 16)
    query.requires_grad_(needed)
    grad = torch.randn_like(query)
    found = []
    for given in (float(torch.tensor(alpha)), torch.tensor([0.9, alpha, 0.7])):
        out = diffmax.attention(query, key, value, alpha=given, backend="numba")
        results = [out, *(torch.autograd.grad(out, query, grad) if needed else ())]
        found.append([result[:, 1] for result in results])
    assert all(map(torch.equal, *found))


def test_watchers_and_other_rows_change_no_bit_of_a_tensor_alphas_weights():
    """Whether it is read as a float, kept as a tensor, or stands beside others; and whatever else is in the batch."""
    x, query = torch.randn(900, 100) * 3, torch.randn(2, 2, 300, 16) * 2
    for value in (0.75, 0.85, 0.3):
        alpha = torch.tensor(value, requires_grad=True)
        learned = diffmax_bisect(x, alpha).detach()
        assert torch.equal(diffmax_bisect(x, alpha.detach()), learned)
        assert torch.equal(diffmax_bisect(x[:20], alpha).detach(), learned[:20])
        with torch.profiler.profile():
            assert torch.equal(diffmax_bisect(x, alpha.detach()), learned)

        heads = torch.tensor([0.6, value], requires_grad=True)
        out = diffmax.attention(query, query, query, alpha=heads).detach()
        assert torch.equal(diffmax.attention(query, query, query, alpha=alpha.detach())[:, 1], out[:, 1])
        assert torch.equal(diffmax.attention(query, query, query, alpha=alpha).detach()[:, 1], out[:, 1])
        assert torch.equal(diffmax.attention(*[query[:1]] * 3, alpha=heads.detach()), out[:1])


@pytest.mark.parametrize("value", [math.nan, 1.5, -0.5, 0.0, 1.0])
def test_one_exponent_that_is_none_spoils_no_other_head(value):
    from diffmax.kernels.numba.attention import attention
    from diffmax.plugin import AttentionCall

    query, key, values = torch.randn(3, 1, 3, 200, 16)
    exponents = torch.tensor([0.15, value, 0.4])
    for call in (AttentionCall(scale=1.0, e=exponents), AttentionCall(scale=1.0, e=0.4)):
        found = attention(query, key, values, call, False, False).out
        assert torch.isfinite(found[:, [0, 2]]).all()
    assert torch.equal(
        attention(query, key, values, AttentionCall(scale=1.0, e=exponents), False, False).out[:, 2], found[:, 2]
    )


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
@pytest.mark.parametrize("tokens", [3, 40, 700, 9000])
@pytest.mark.parametrize("sinks", [False, True])
def test_heads_that_share_keys_have_alphas_and_sinks_of_their_own(kv_heads, tokens, sinks):
    query, alpha = torch.randn(2, 1, 6, 16) * 2, torch.tensor([0.2, 0.5, 0.6, 0.75, 0.85, 1.0])
    caches = [torch.randn(2, tokens, kv_heads, 16) for _ in range(2)]
    options = {
        "alpha": alpha,
        "sink": torch.tensor([-3.0, 0.0, 1.0, 2.0, 3.0, 9.0]) if sinks else None,
        "cache_seqlens": torch.tensor([tokens, tokens // 2], dtype=torch.int32),
        "window_size": (tokens // 3, 0),
        "return_stats": True,
    }
    out, stats = diffmax.attention_with_kvcache(query, *caches, **options, backend="numba")
    doubles = [t.double() for t in (query, *caches)]
    exact, exact_stats = diffmax.attention_with_kvcache(*doubles, **options, backend="reference")
    assert torch.allclose(out.double(), exact, atol=2e-6)
    assert (stats.support_size[:, :5] - exact_stats.support_size[:, :5]).abs().max() <= 1
    assert torch.allclose(stats.tau[:, :5].double(), exact_stats.tau[:, :5], atol=1e-5)
