"""The compiled power attention: what it computes, regions, threads, memory, steps of decoding."""

import contextlib
import os

import pytest
import torch
from torch.nn.functional import logsigmoid

import diffmax
from diffmax.operators.power.symmetric import expanded_dim, monomials
from diffmax.reference import power as reference
from diffmax.testing.gate import gates, reordered
from tests import fresh

pytest.importorskip("numba", reason="needs Numba: pip install 'diffmax-core[numba]'")

power_job = pytest.importorskip("diffmax.kernels.numba.power_job")
numba_threads = pytest.importorskip("diffmax.kernels.numba.threads", reason="needs Numba: pip install 'diffmax-core[numba]'")
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.fixture
def _two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def made(dtype, batch, heads, kv_heads, length, many, size, value_size, degree, gated, has_state):
    """Inputs; a state is that of some keys."""
    query = torch.randn(batch, heads, length, size, dtype=dtype)
    key, value = (torch.randn(batch, kv_heads, many, n, dtype=dtype) for n in (size, value_size))
    acc = torch.promote_types(dtype, torch.float32)
    log_gates = logsigmoid(torch.randn(batch, kv_heads, many, dtype=acc) + 1) if gated else None
    state = (None, None)
    if has_state:
        m = monomials(torch.randn(batch, kv_heads, 9, size, dtype=acc), degree)
        state = (m.mT @ torch.randn(batch, kv_heads, 9, value_size, dtype=acc), m.sum(2))
    return query, key, value, log_gates, *state


def results(backend, given, degree, final, grads, chunk=None):
    """Results and gradients for everything that is given."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in given]
    query, key, value, log_gates, sums, norm = leaves
    state = None if sums is None else (sums, norm)
    found = diffmax.power_attention(
        query, key, value, log_gates, state, degree=degree, chunk_size=chunk, return_final_state=final, backend=backend
    )
    outs = [found[0], *found[1]] if final else [found]
    there = [t for t in leaves if t is not None]
    of = torch.autograd.grad(outs, there, [g.to(o.dtype) for g, o in zip(grads, outs, strict=False)], allow_unused=True)
    return tuple(t.detach() for t in outs), tuple(of)


# batch, heads, kv_heads, length, many, size, value_size, degree, gated, has_state, final, chunk
CASES = {
    "plain": (2, 2, 2, 40, 40, 8, 8, 2, False, False, False, 16),
    "gates-state-final": (1, 4, 2, 70, 70, 5, 3, 2, True, True, True, 16),
    "two-blocks-in-a-chunk": (1, 1, 1, 300, 300, 6, 18, 2, True, True, True, 160),
    "quadratic": (1, 2, 1, 150, 200, 7, 20, 2, True, False, True, 1000),
    "degree-4": (1, 2, 2, 50, 60, 5, 16, 4, True, True, True, 13),
    "degree-6": (1, 1, 1, 30, 30, 3, 4, 6, False, True, True, 8),
    "state-alone": (1, 4, 2, 7, 0, 5, 16, 2, False, True, False, None),
    "step": (2, 4, 2, 1, 1, 9, 16, 2, True, True, True, None),
    "tail-and-state": (1, 4, 1, 1, 70, 9, 32, 4, True, True, False, None),
    "one-entry": (1, 1, 1, 20, 20, 1, 1, 4, True, True, True, 8),
}


@pytest.mark.sampled(9)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_results_and_gradients_are_as_near_to_the_truth_as_the_references(case, dtype):
    *shape, final, chunk = case
    degree = shape[7]
    given = made(dtype, *shape)
    there = [t is not None for t in given]
    with torch.no_grad():
        outs = results_of_shape(given, degree, final)
    grads = [torch.randn(o.shape, dtype=o.dtype) for o in outs]

    def computed(backend, chunk, *tensors):
        rest = iter(tensors)
        whole = [next(rest) if is_there else None for is_there in there]
        outs, of = results(backend, whole, degree, final, grads, chunk)
        return (*outs, *of)

    def plain(*tensors):
        """The chunks of the plain kernel, in float32 at least: what they cost in digits is allowed too."""
        dtype, acc = tensors[0].dtype, torch.promote_types(tensors[0].dtype, torch.float32)
        found = computed("cpu", chunk, *(t.to(acc) for t in tensors))
        rounded = {0, *range(len(outs), len(outs) + 3)}
        return tuple(t.to(dtype) if place in rounded else t for place, t in enumerate(found))

    tensors = [t for t in given if t is not None]
    allowed = gates(lambda *t: computed("reference", None, *t), *tensors), gates(plain, *tensors)
    found = computed("numba", chunk, *tensors)
    for place, (ours, gate, of_chunks) in enumerate(zip(found, *allowed, strict=True)):
        error = (ours.double() - gate.exact.double()).abs().max() if ours.numel() else 0.0
        assert error <= max(gate.allowed, of_chunks.allowed), place


def results_of_shape(given, degree, final):
    query, key, value, log_gates, sums, norm = given
    state = None if sums is None else (sums, norm)
    found = diffmax.power_attention(
        query, key, value, log_gates, state, degree=degree, return_final_state=final, backend="reference"
    )
    return [found[0], *found[1]] if final else [found]


@pytest.mark.parametrize(("size", "degree"), [(32, 2), (16, 4)])
def test_chunks_of_any_size_agree(size, degree):
    given = made(torch.float32, 1, 2, 1, 700, 700, size, 16, degree, True, False)
    with torch.no_grad():
        whole, *others = (
            diffmax.power_attention(*given[:4], degree=degree, chunk_size=chunk, backend="numba")
            for chunk in (700, 16, 100, 128, 300, None)
        )
    for other in others:
        assert (whole - other).abs().max() <= 1e-5


def spied(monkeypatch):
    """The calls that open parallel regions."""
    opened, run_on_threads = [], numba_threads.run_on_threads

    def counted(*arguments):
        opened.append(arguments)
        return run_on_threads(*arguments)

    monkeypatch.setattr(numba_threads, "run_on_threads", counted)
    return opened


@pytest.mark.usefixtures("_two_threads")
@pytest.mark.parametrize(("heads", "regions"), [(2, 1), (1, 2)])
@pytest.mark.parametrize("operation", ["forward", "backward"])
def test_a_call_opens_one_parallel_region_and_two_where_threads_share_a_head(operation, heads, regions, monkeypatch):
    opened = spied(monkeypatch)
    query, key, value = (torch.randn(1, heads, 4096, 32, requires_grad=True) for _ in range(3))
    out = diffmax.power_attention(query, key, value, backend="numba")
    if operation == "backward":
        opened.clear()
        out.sum().backward()
    assert len(opened) == regions


def test_a_small_call_wakes_no_thread(monkeypatch):
    monkeypatch.delattr(numba_threads, "run_on_threads")
    query = torch.randn(1, 2, 16, 16)
    diffmax.power_attention(query, query, query, backend="numba")


@pytest.mark.parametrize(
    ("heads", "length", "chunk"), [((2, 2), 1024, 128), ((3, 3), 1024, 128), ((4, 2), 1024, 128), ((1, 1), 600, 600)]
)
def test_one_thread_and_two_give_the_same_bits(heads, length, chunk, monkeypatch):
    opened = spied(monkeypatch)
    given = made(torch.float32, 1, *heads, length, length, 32, 32, 2, True, True)
    state = reference.state_shapes(given[1], given[2], 2)
    grads = [torch.randn(1, heads[0], length, 32), *(torch.randn(shape) for shape in state)]
    before, found = torch.get_num_threads(), {}
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            outs, of = results("numba", given, 2, True, grads, chunk)
            assert all(torch.equal(a, b) for a, b in zip(found.setdefault("first", (*outs, *of)), (*outs, *of), strict=True))
    finally:
        torch.set_num_threads(before)
    assert len(opened) == 4


@pytest.mark.parametrize("many", [2000, 2048])
def test_threads_that_share_a_head_agree_with_one_and_with_themselves(many, monkeypatch):
    """Spans of chunks: the state before each is a sum in another order."""
    opened = spied(monkeypatch)
    given = made(torch.float64, 1, 2, 1, many - 30, many, 16, 16, 2, True, True)
    shapes = [(1, 2, many - 30, 16), *reference.state_shapes(given[1], given[2], 2)]
    grads = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3, 3):
            torch.set_num_threads(threads)
            found.append([*(pair := results("numba", given, 2, True, grads, 64))[0], *pair[1]])
    finally:
        torch.set_num_threads(before)
    assert len(opened) == 8
    alone, together, again = found
    assert all(torch.equal(a, b) for a, b in zip(together, again, strict=True))
    for a, b in zip(alone, together, strict=True):
        assert (a - b).abs().max() <= reordered(many * expanded_dim(16, 2), a)


def test_what_is_not_a_number_stays_in_its_head():
    clean = made(torch.float32, 2, 4, 4, 300, 300, 8, 8, 2, True, False)[:4]
    dirty = [t.clone() for t in clean]
    dirty[0][0, 1, 5], dirty[1][1, 2, 200], dirty[2][0, 3, 7] = torch.nan, torch.inf, torch.nan
    spoilt = torch.zeros(2, 4, dtype=torch.bool)
    spoilt[0, 1] = spoilt[1, 2] = spoilt[0, 3] = True
    for leaves in (clean, dirty):
        for t in leaves:
            t.requires_grad_()
    found = []
    for leaves in (clean, dirty):
        out = diffmax.power_attention(*leaves, chunk_size=64, backend="numba")
        found.append((out.detach(), *torch.autograd.grad(out.sum(), leaves)))
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours[~spoilt], theirs[~spoilt])
    assert found[1][0][0, 1, 5].isnan().all()
    assert found[1][0][0, 1, 6:].isfinite().all()


def test_strides_change_no_bit():
    query, key, value, log_gates, *_ = made(torch.float32, 2, 4, 2, 200, 200, 12, 10, 2, True, False)
    plain = diffmax.power_attention(query, key, value, log_gates, chunk_size=64, backend="numba")
    by_token = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (query, key, value)]
    by_entry = [t.mT.contiguous().mT for t in (query, key, value)]
    negated = [torch._neg_view(-t) for t in (query, key, value)]
    gates_by_token = log_gates.mT.contiguous().mT
    for given in (by_token, by_entry, negated):
        assert torch.equal(plain, diffmax.power_attention(*given, gates_by_token, chunk_size=64, backend="numba"))


@pytest.mark.parametrize("chunk", [16, 100])
def test_a_gate_of_zero_starts_anew(chunk):
    query, key, value, log_gates, *_ = made(torch.float32, 1, 1, 1, 100, 100, 4, 4, 2, True, False)
    log_gates[..., 40] = -torch.inf
    key[..., :40, :] *= 1e15
    whole = diffmax.power_attention(query, key, value, log_gates, chunk_size=chunk, backend="numba")
    behind = [t[:, :, 40:] for t in (query, key, value, log_gates)]
    alone = diffmax.power_attention(*behind, chunk_size=chunk, backend="numba")
    assert (whole[:, :, 40:] - alone).abs().max() <= reordered(100 * 10, alone)


def test_gates_above_one_and_many_small_ones_keep_their_digits():
    """Weights are the decays alone: products of equal vectors."""
    query, value = torch.ones(1, 1, 400, 4), torch.rand(1, 1, 400, 4)
    key, log_gates = query.clone(), torch.randn(1, 1, 400) * 2
    gate = gates(reference_out, query, key, value, log_gates)[0]
    for chunk in (64, 400):
        out = diffmax.power_attention(query, key, value, log_gates, chunk_size=chunk, backend="numba")
        assert (out.double() - gate.exact).abs().max() <= gate.allowed


def reference_out(query, key, value, log_gates):
    return diffmax.power_attention(query, key, value, log_gates, backend="reference")


@contextlib.contextmanager
def everything_new_is_nan():
    """Have torch.empty give NaN, and the largest integers."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    "shape", [(0, 2, 2, 5, 5, 8), (2, 0, 0, 5, 5, 8), (2, 2, 2, 0, 200, 8), (2, 4, 2, 5, 5, 0), (1, 1, 1, 0, 0, 8)], ids=str
)
def test_empty_sizes_are_those_of_the_reference(shape):
    batch, heads, kv_heads, length, many, value_size = shape
    given = made(torch.float64, batch, heads, kv_heads, length, many, 8, value_size, 2, True, True)
    state = reference.state_shapes(given[1], given[2], 2)
    grads = [torch.randn(size, dtype=torch.float64) for size in ((batch, heads, length, value_size), *state)]
    theirs = results("reference", given, 2, True, grads)
    with everything_new_is_nan():  # scratch memory that was read before it was written has spoilt a gradient
        ours = results("numba", given, 2, True, grads)
    for a, b in zip((*ours[0], *ours[1]), (*theirs[0], *theirs[1]), strict=True):
        assert a.shape == b.shape
        assert a.numel() == 0 or (a - b).abs().max() <= reordered(many * 36, b)


def test_steps_of_decoding_give_what_the_whole_sequence_gives():
    query, key, value, log_gates, *_ = made(torch.float64, 1, 4, 2, 60, 60, 8, 16, 2, True, False)
    whole, last = diffmax.power_attention(query, key, value, log_gates, return_final_state=True, backend="numba")
    _, state = diffmax.power_attention(
        query[:, :, :20], key[:, :, :20], value[:, :, :20], log_gates[..., :20], return_final_state=True, backend="numba"
    )
    for t in range(20, 60):
        own = slice(t, t + 1)
        out, state = diffmax.power_attention(
            query[:, :, own],
            key[:, :, own],
            value[:, :, own],
            log_gates[..., own],
            state,
            return_final_state=True,
            backend="numba",
        )
        assert (out - whole[:, :, own]).abs().max() <= reordered(60 * 36, whole)
    for a, b in zip(state, last, strict=True):
        assert (a - b).abs().max() <= reordered(60, b)


LONG = """
import resource, torch, diffmax
torch.set_num_threads(1)
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
small = [torch.randn(1, 1, 600, 32, requires_grad=True) for _ in range(3)]
diffmax.power_attention(*small, backend="numba").sum().backward()
length = 1 << 20
leaves = [torch.randn(1, 1, length, 32).requires_grad_() for _ in range(3)]
grad = torch.ones(1, 1, length, 32)
before = peak()
out = diffmax.power_attention(*leaves, backend="numba")
forward = peak()
out.backward(grad)
print(before, forward, peak())
assert all(t.grad.isfinite().all() for t in leaves)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs the peak of a process of its own, by getrusage")
@pytest.mark.slow
def test_a_million_tokens_take_the_memory_of_their_results():
    """Results and gradients, and the sum of each query's weights."""
    before, forward, backward = map(int, fresh.python(LONG).stdout.split())
    tokens = (1 << 20) * 4
    # what does not grow, as the stacks of autograd's threads: an eighth of what a list of the chunks' states would take
    constant = (1 << 20) // 128 * expanded_dim(32, 2) * 33 * 4 // 8
    assert forward - before <= tokens * (32 + 1) + constant
    assert backward - forward <= tokens * 3 * 32 + constant


FORK = """
import os, torch, diffmax
torch.set_num_threads(2)
leaves = [torch.randn(1, 4, 1024, 32).requires_grad_() for _ in range(3)]
def found():
    out = diffmax.power_attention(*leaves, backend="numba")
    return (out.detach(), *torch.autograd.grad(out.sum(), leaves))
expected = found()
child = os.fork()
if child == 0:
    with torch.no_grad():
        out = diffmax.power_attention(*leaves, backend="numba")
        os._exit(0 if (out.numpy() == expected[0].numpy()).all() else 1)
print(os.waitpid(child, 0)[1])
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_forked_child_does_not_wait_for_threads_of_its_parent():
    assert fresh.python(FORK).stdout.strip() == "0"
