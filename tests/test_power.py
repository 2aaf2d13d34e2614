"""Power attention against sums written out here, its derivatives, transforms, errors and memory."""

import inspect
import math
import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import diffmax
from diffmax import PowerState, power_attention
from diffmax.operators.power import symmetric

BACKENDS = ("reference", "cpu", "numba")
every_backend = pytest.mark.parametrize("backend", BACKENDS)


def tensor_power(x, degree):
    """All products of `degree` entries, one after the other: the full power, which knows no symmetry."""
    found = x
    for _ in range(degree - 1):
        found = (found.unsqueeze(-1) * x.unsqueeze(-2)).flatten(-2)
    return found


def recurrent(query, key, value, log_gates, degree, scale):
    """Token after token, with the full tensor power as the state, in float64."""
    query, key, value = query.double(), key.double(), value.double()
    group = query.shape[1] // key.shape[1]
    key, value, log_gates = (t.repeat_interleave(group, 1) for t in (key, value, log_gates.double()))
    state = norm = 0.0
    pieces = []
    for t in range(key.shape[2]):
        phi, gate = tensor_power(key[:, :, t], degree), log_gates[:, :, t].exp()
        state = state * gate[..., None, None] + phi.unsqueeze(-1) * value[:, :, t].unsqueeze(-2)
        norm = norm * gate[..., None] + phi
        asked = tensor_power(query[:, :, t] * scale, degree)
        pieces.append((asked.unsqueeze(-2) @ state).squeeze(-2) / (asked * norm).sum(-1, keepdim=True))
    return torch.stack(pieces, 2)


def drawn(*shape, heads=4, kv_heads=2, tokens=40, size=6, dtype=torch.float64):
    query = torch.randn(2, heads, tokens, size, dtype=dtype)
    key, value = torch.randn(2, 2, kv_heads, tokens, size, dtype=dtype).unbind()
    log_gates = torch.nn.functional.logsigmoid(torch.randn(2, kv_heads, tokens, dtype=dtype) + 1)
    return query, key, value, log_gates


@every_backend
@pytest.mark.parametrize(
    ("degree", "size"), [(2, 6), (4, 5), *(pytest.param(*each, marks=pytest.mark.slow) for each in ((6, 3), (8, 2)))]
)
def test_it_is_the_recurrence_of_full_tensor_powers(degree, size, backend):
    query, key, value, log_gates = drawn(size=size)
    wanted = recurrent(query, key, value, log_gates, degree, 0.3)
    for chunk in (None, 7, 16, 40):
        out = power_attention(query, key, value, log_gates, degree=degree, scale=0.3, chunk_size=chunk, backend=backend)
        torch.testing.assert_close(out, wanted, rtol=1e-9, atol=1e-9)


def test_monomials_are_in_lexicographic_order_and_their_products_are_powers():
    for size, degree in ((1, 2), (5, 2), (4, 4), (3, 6)):
        which = symmetric.indices(size, degree)
        assert which.shape == (degree, math.comb(size + degree - 1, degree))
        columns = which.T.tolist()
        assert columns == sorted(columns)
        assert all(column == sorted(column) for column in columns)
        x, y = torch.randn(2, 3, size, dtype=torch.float64)
        assert torch.equal(symmetric.monomials(x, degree), x[:, which].prod(1)) or torch.allclose(
            symmetric.monomials(x, degree), x[:, which].prod(1), rtol=1e-14
        )
        products = (symmetric.monomials(x, degree) * symmetric.monomials(y, degree)) @ symmetric.multiplicities(size, degree)
        torch.testing.assert_close(products, (x * y).sum(-1) ** degree)


@pytest.mark.sampled(12)
@every_backend
@pytest.mark.parametrize("degree", [2, 4])
def test_gradients_of_everything_by_finite_differences(backend, degree):
    query, key, value, log_gates = (t[:1, :, :7, :3] if t.ndim == 4 else t[:1, :, :7] for t in drawn(heads=2, kv_heads=1))
    rows = symmetric.expanded_dim(3, degree)
    before = symmetric.monomials(torch.randn(1, 1, 4, 3, dtype=torch.float64), degree)
    sums, norm = before.mT @ torch.randn(1, 1, 4, 3, dtype=torch.float64), before.sum(2)
    assert norm.shape == (1, 1, rows)
    leaves = [t.clone().requires_grad_() for t in (query, key, value, log_gates, sums, norm)]

    def call(query, key, value, log_gates, sums, norm):
        out, state = power_attention(
            query, key, value, log_gates, (sums, norm), degree=degree, chunk_size=3, return_final_state=True, backend=backend
        )
        return out, *state

    assert torch.autograd.gradcheck(call, leaves)
    if backend == "reference":
        assert torch.autograd.gradgradcheck(call, leaves)
        assert torch.autograd.gradcheck(call, leaves, check_forward_ad=True, check_backward_ad=False)


def test_second_derivatives_are_those_of_the_reference_on_any_backend():
    given = [t.requires_grad_() for t in drawn(tokens=9)]

    def second(backend):
        out = power_attention(*given, chunk_size=4, backend=backend)
        first = torch.autograd.grad(out.sin().sum(), given, create_graph=True)
        return torch.autograd.grad(sum(t.square().sum() for t in first), given)

    for ours, theirs in zip(second("cpu"), second("reference"), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.slow
def test_functional_transforms():
    query, key, value, log_gates = drawn(tokens=9)

    def loss(query, key, value, log_gates):
        return power_attention(query, key, value, log_gates, chunk_size=4).square().sum()

    leaves = [t.clone().requires_grad_() for t in (query, key, value, log_gates)]
    wanted = torch.autograd.grad(loss(*leaves), leaves)
    for ours, theirs in zip(torch.func.grad(loss, (0, 1, 2, 3))(query, key, value, log_gates), wanted, strict=True):
        torch.testing.assert_close(ours, theirs)
    stacked = [torch.stack([t, t * 0.5]) for t in (query, key, value, log_gates)]
    both = torch.vmap(power_attention)(*stacked)
    for n in range(2):
        torch.testing.assert_close(both[n], power_attention(*(t[n] for t in stacked)))
    shared = torch.vmap(power_attention, in_dims=(0, None, None, None))(stacked[0], key, value, log_gates)
    torch.testing.assert_close(shared[1], power_attention(stacked[0][1], key, value, log_gates))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated:DeprecationWarning")
def test_it_is_traced_and_exported():
    query, key, value, log_gates = drawn(tokens=9, dtype=torch.float32)
    traced = torch.jit.trace(lambda *given: power_attention(*given), (query, key, value, log_gates))
    torch.testing.assert_close(traced(query, key, value, log_gates), power_attention(query, key, value, log_gates))
    assert "diffmax::" not in str(traced.graph)

    class Model(torch.nn.Module):
        def forward(self, query, key, value, log_gates):
            return power_attention(query, key, value, log_gates)

    tokens = torch.export.Dim("tokens", min=2, max=4096)
    shapes = {name: {2: tokens} for name in ("query", "key", "value", "log_gates")}
    program = torch.export.export(Model(), (query, key, value, log_gates), dynamic_shapes=shapes).module()
    longer = drawn(tokens=23, dtype=torch.float32)
    torch.testing.assert_close(program(*longer), power_attention(*longer))


def test_autocast_computes_in_the_dtype_that_torch_would():
    query, key, value, log_gates = drawn(tokens=9, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out, state = power_attention(query, key, value, log_gates, return_final_state=True)
    assert out.dtype == torch.bfloat16
    assert state.sums.dtype == state.norm.dtype == torch.float32


@every_backend
def test_the_scale_cancels_and_the_state_goes_on_anywhere(backend):
    query, key, value, log_gates = drawn()
    whole, end = power_attention(query, key, value, log_gates, return_final_state=True, backend=backend)
    torch.testing.assert_close(whole, power_attention(query, key, value, log_gates, scale=0.01, backend=backend))
    state, pieces = None, []
    for first, last in ((0, 13), (13, 14), (14, 40)):
        part = (t[:, :, first:last] for t in (query, key, value, log_gates))
        out, state = power_attention(*part, state, return_final_state=True, backend=backend)
        assert isinstance(state, PowerState)
        pieces.append(out)
    torch.testing.assert_close(torch.cat(pieces, 2), whole)
    torch.testing.assert_close(tuple(state), tuple(end))


@every_backend
def test_a_gate_of_zero_forgets_and_gates_near_one_and_zero_are_exact(backend):
    query, key, value, _ = drawn(tokens=30)
    closed = torch.zeros(2, 2, 30, dtype=torch.float64)
    closed[:, :, 11] = -torch.inf
    out = power_attention(query, key, value, closed, chunk_size=8, backend=backend)
    late = power_attention(*(t[:, :, 11:] for t in (query, key, value)), backend=backend)
    torch.testing.assert_close(out[:, :, 11:], late)
    for gate in (-1e-9, -1e-3, -30.0):
        log_gates = torch.full((2, 2, 30), gate, dtype=torch.float64)
        wanted = recurrent(query, key, value, log_gates, 2, 1.0)
        out = power_attention(query, key, value, log_gates, chunk_size=8, backend=backend)
        torch.testing.assert_close(out, wanted, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("chunk", [16, 63, 64, 100, 4096])
def test_chunks_agree_to_a_hundred_thousandth_in_float32(chunk):
    query, key, value = torch.randn(3, 1, 2, 600, 32).unbind()
    log_gates = torch.nn.functional.logsigmoid(torch.randn(1, 2, 600) + 5)
    out = power_attention(query, key, value, log_gates, chunk_size=chunk)
    wanted = power_attention(query, key, value, log_gates, chunk_size=600)
    assert (out - wanted).abs().max() < 1e-5


LONG = """
import resource, sys, torch, diffmax
torch.manual_seed(0)
tokens = 1 << 20
query, key, value = torch.randn(3, 1, 1, tokens, 16).unbind()
power = lambda *given: diffmax.power_attention(*given, backend=sys.argv[1])
power(*(t[:, :, :5000] for t in (query, key, value)))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
out = power(query, key, value)
grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
assert out.isfinite().all()
last = power(query[:, :, -3:], key, value)
torch.testing.assert_close(out[:, :, -3:], last, rtol=2e-3, atol=2e-3)
print(grown)
"""


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["cpu", "numba"])
def test_a_million_tokens_take_the_memory_of_their_result(backend):
    run = subprocess.run([sys.executable, "-c", LONG, backend], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    result = (1 << 20) * 16 * 4 / 2**20
    assert float(run.stdout) < result + 48, run.stdout  # MiB


def test_flops_are_those_of_the_cheaper_form():
    import diffmax.integrations.flop_counter  # noqa: F401

    def counted(tokens):
        query, key, value = torch.randn(3, 1, 2, tokens, 32, device="meta").unbind()
        with FlopCounterMode(display=False) as counter:
            power_attention(query, key, value)
        return counter.get_total_flops()

    assert counted(128) == 2 * 2 * (128 * 129 // 2) * 64
    assert counted(1 << 16) < 2 * 2 * 2 * (1 << 16) * (528 * 33 * 2 + 1024 * 64)
    assert 1.9 < counted(1 << 17) / counted(1 << 16) < 2.1


@every_backend
@pytest.mark.parametrize(("degree", "size"), [(2, 1.5e9), (4, 3e4), (6, 800.0)])
def test_a_sum_of_weights_that_overflows_is_nan_and_never_zero(degree, size, backend):
    """Each weight is finite, and so was zero over infinity."""
    query, key, value, _ = drawn(size=16, dtype=torch.float32)
    wanted = power_attention(*(t.double() for t in (query * size, key * size, value)), degree=degree, backend="reference")
    for chunk in (None, 8):
        out = power_attention(query * size, key * size, value, degree=degree, chunk_size=chunk, backend=backend)
        fine = out.isfinite().all(3)
        assert not fine.all()
        torch.testing.assert_close(out[fine].double(), wanted[fine], rtol=1e-2, atol=1e-2)


@every_backend
@pytest.mark.parametrize("chunk", [None, 8, 60])
def test_gates_above_one_are_right_or_nan(chunk, backend):
    """A growth that overflows was taken as the largest finite one: results were finite and wrong."""
    query, key, value, _ = (t[:1, :1] for t in drawn(heads=1, kv_heads=1, tokens=60, dtype=torch.float32))
    key, log_gates = key * 1e-9, torch.full((1, 1, 60), 2.0)
    leaves = [t.clone().requires_grad_() for t in (query, key, value, log_gates)]
    exact = [t.double().detach().requires_grad_() for t in leaves]
    wanted = power_attention(*exact, backend="reference")
    out = power_attention(*leaves, chunk_size=chunk, backend=backend)
    fine = out.isfinite().all(3)
    assert fine[:, :, :40].all()
    torch.testing.assert_close(out[fine].double(), wanted[fine], rtol=1e-2, atol=1e-2)
    ours = torch.autograd.grad(out.sum(), leaves)
    theirs = torch.autograd.grad(wanted.sum(), exact)
    for a, b in zip(ours, theirs, strict=True):
        known = a.isfinite()
        torch.testing.assert_close(a[known].double(), b[known], rtol=1e-2, atol=1e-2 * b.abs().max().item())


@every_backend
@pytest.mark.parametrize(("dtype", "growth"), [(torch.float32, 60.0), (torch.float64, 700.0)])
def test_a_gate_of_zero_forgets_whatever_grows_after_it(dtype, growth, backend):
    """Such a gate was a finite number, which later gates above 1 outweighed."""
    query, key, value, log_gates = drawn(dtype=dtype)
    key[:, :, :10] *= 1e10
    key[:, :, 10:20] = 0.0
    log_gates[:, :, 10], log_gates[:, :, 20] = -torch.inf, growth
    late = power_attention(*(t[:, :, 20:] for t in (query, key, value, log_gates)), backend=backend)
    for chunk in (1, 8, 40):
        whole = power_attention(query, key, value, log_gates, chunk_size=chunk, backend=backend)
        torch.testing.assert_close(whole[:, :, 20:], late)


@every_backend
def test_no_scale_leaves_the_range_of_powers(backend):
    query, key, value, _ = drawn(dtype=torch.float32)
    wanted = power_attention(query, key, value, backend=backend)
    for scale in (1e-30, -2.0, 1e20):
        assert torch.equal(power_attention(query, key, value, scale=scale, backend=backend), wanted)


@every_backend
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("bad", [1e20, torch.inf, torch.nan])
def test_a_key_that_overflows_spoils_nothing_before_it(bad, gated, backend):
    query, key, value, log_gates = drawn(dtype=torch.float32)
    key[:, :, 25] = bad
    gates = log_gates if gated else None
    wanted = power_attention(query[:, :, :25], key[:, :, :25], value[:, :, :25], None if gates is None else gates[..., :25])
    out = power_attention(query, key, value, gates, backend=backend)
    torch.testing.assert_close(out[:, :, :25], wanted)


@pytest.mark.parametrize("backend", ["cpu", "numba"])
@pytest.mark.parametrize(("size", "degree"), [(64, 6), (128, 4), (5, 60)])
def test_a_quadratic_form_makes_no_table_of_a_state(size, degree, backend):
    """Whose rows, up to 76 million, would fill the memory."""
    query, key, value = (torch.rand(1, 1, 20, size, dtype=torch.float64).requires_grad_() for _ in range(3))
    found = power_attention(query, key, value, degree=degree, backend=backend)
    wanted = power_attention(query, key, value, degree=degree, backend="reference")
    torch.testing.assert_close(found, wanted)
    for a, b in zip(*(torch.autograd.grad(out.sum(), (query, key, value)) for out in (found, wanted)), strict=True):
        torch.testing.assert_close(a, b)


@every_backend
def test_heads_of_no_entries_and_chunks_of_any_length(backend):
    x = torch.randn(1, 2, 5, 0, requires_grad=True)
    value = torch.randn(1, 2, 5, 3)
    assert torch.equal(power_attention(x, x, value, backend=backend), torch.zeros(1, 2, 5, 3))
    query, key, value, _ = drawn()
    wanted = power_attention(query, key, value, chunk_size=40, backend=backend)
    assert torch.equal(power_attention(query, key, value, chunk_size=10**30, backend=backend), wanted)


def test_its_parts_are_an_attribute_of_the_package():
    code = "import diffmax; assert diffmax.power.attention; assert 'power' in dir(diffmax)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_explain_names_a_backend_and_refuses_with_reasons():
    query, key, value, log_gates = drawn(dtype=torch.float32)
    explained = diffmax.explain("power_attention", query, key, value, log_gates, degree=4)
    assert [chosen for _, chosen, _, _ in explained.calls] == ["numba"]
    assert "high_degree" in str(explained) or "degree" in str(explained)


WIDE = torch.zeros(2, 2, 36, 6)
WRONG = [
    (TypeError, "degree must be an int, got 2.0", {"degree": 2.0}),
    (TypeError, "degree must be an int, got True", {"degree": True}),
    (ValueError, "degree must be even and at least 2.*got 3", {"degree": 3}),
    (ValueError, "degree must be even and at least 2.*got 0", {"degree": 0}),
    (ValueError, "chunk_size must be at least 1.*got 0", {"chunk_size": 0}),
    (TypeError, "chunk_size must be an int or None, got '8'", {"chunk_size": "8"}),
    (TypeError, "return_final_state must be True or False, got 1", {"return_final_state": 1}),
    (ValueError, "scale must be finite, got nan", {"scale": math.nan}),
    (ValueError, "scale must not be 0, got 0.0\nit cancels: leave it out", {"scale": 0.0}),
    (TypeError, "log_gates must be a floating tensor, got float", {"log_gates": -0.1}),
    (ValueError, r"pass log_gates.transpose\(1, 2\)", {"log_gates": torch.zeros(2, 40, 2)}),
    (ValueError, r"log_gates must have a number for each key.*got \(2, 4, 40\)", {"log_gates": torch.zeros(2, 4, 40)}),
    (TypeError, "initial_state must be a PowerState or a pair", {"initial_state": torch.zeros(2)}),
    (ValueError, "(?s)initial_state.sums must have shape.*from_tiled", {"initial_state": (WIDE, torch.zeros(2, 2, 21))}),
    (ValueError, "initial_state.norm must have shape", {"initial_state": (WIDE[:, :, :21], WIDE[..., 0])}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "message", "options"), WRONG, ids=[message[:30] for _, message, _ in WRONG])
def test_bad_input_is_refused_with_what_to_do(kind, message, options):
    query, key, value, _ = drawn(dtype=torch.float32)
    with pytest.raises(kind, match=message):
        power_attention(query, key, value, **options)


def test_tensors_that_do_not_fit_are_refused():
    query, key, value, _ = drawn(dtype=torch.float32)
    with pytest.raises(TypeError, match="must have one dtype"):
        power_attention(query, key.double(), value)
    with pytest.raises(ValueError, match="multiple of the key heads, got 3 and 2"):
        power_attention(query[:, :3], key, value)
    with pytest.raises(ValueError, match="at least as many keys as queries, or none, got 20 keys and 40 queries"):
        power_attention(query, key[:, :, :20], value[:, :, :20])
    with pytest.raises(TypeError, match="sparse"):
        power_attention(query, key.to_sparse(), value)


def test_the_signature_is_documented_and_annotated():
    signature = inspect.signature(power_attention)
    for name in signature.parameters:
        assert f"{name}" in power_attention.__doc__, name


@pytest.mark.parametrize("options", [{}, {"chunk_size": 8}, {"degree": 4}], ids=str)
def test_gradients_of_a_compiled_call_are_those_of_the_call(options):
    q, k, v = (t.requires_grad_() for t in torch.randn(3, 1, 2, 20, 4, dtype=torch.float64).unbind())
    wanted = torch.autograd.grad(diffmax.power_attention(q, k, v, **options).square().sum(), (q, k, v))
    compiled = torch.compile(lambda *given: diffmax.power_attention(*given, **options), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(torch.autograd.grad(compiled(q, k, v).square().sum(), (q, k, v)), wanted)
    plain = torch.ops.diffmax.power_attention(q, k, v, True, 2, 0.5)[0]  # all that has a default is left out
    wanted = torch.autograd.grad(diffmax.power_attention(q, k, v, scale=0.5).square().sum(), (q, k, v))
    torch.testing.assert_close(torch.autograd.grad(plain.square().sum(), (q, k, v)), wanted)


@pytest.mark.parametrize("degree", [2, 4])
def test_a_call_with_a_state_is_compiled_for_any_head_size(degree):
    """The number of monomials was computed by math.comb, which cannot be traced with a symbol."""

    def call(query, key, value, *state):
        out, end = power_attention(query, key, value, None, state, degree=degree, return_final_state=True)
        return out, *end

    torch.compiler.reset()
    compiled = torch.compile(call, backend="aot_eager", dynamic=True, fullgraph=True)
    for size in (5, 3):
        query, key, value = torch.randn(3, 1, 2, 10, size, dtype=torch.float64).unbind()
        state = power_attention(query, key, value, degree=degree, return_final_state=True)[1]
        torch.testing.assert_close(compiled(query, key, value, *state), call(query, key, value, *state))
