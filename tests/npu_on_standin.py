"""diffmax-npu on the stand-in device: the whole kit, strict, and what a call costs. test_npu.py runs it in its own process."""

import math
import re
from contextlib import contextmanager
from pathlib import Path

import pytest
import standin_device
import torch
from standin_device import MEMORY, OPERATORS, strict, to_device
from standin_npu import ALLOWED

import diffmax
import diffmax_npu.blocks
import diffmax_npu.rows
from diffmax import attention, attention_varlen, diffmax_bisect
from diffmax.cli import selftest
from diffmax.errors import NoBackendError
from diffmax.kernels.tools import rules
from diffmax.plugin import CallSpec
from diffmax.testing.attention.conformance import AttentionConformance
from diffmax.testing.power.conformance import PowerConformance
from diffmax.testing.rows.conformance import BackendConformance
from diffmax.testing.threshold.conformance import ThresholdConformance
from diffmax_npu import probe
from diffmax_npu.solver import newton_steps


class TestRows(BackendConformance):
    backend = "npu"
    device = "npu"


class TestAttention(AttentionConformance):
    backend = "npu"
    device = "npu"


class TestPower(PowerConformance):
    backend = "npu"
    device = "npu"


class TestThreshold(ThresholdConformance):
    backend = "npu"
    device = "npu"


class Cost:
    """Operators that ran, and the most memory beyond what was there before."""

    launches = peak = 0


@contextmanager
def measured():
    cost = Cost()
    before, launched = MEMORY["now"], sum(OPERATORS.values())
    MEMORY["peak"] = before
    yield cost
    cost.launches, cost.peak = sum(OPERATORS.values()) - launched, MEMORY["peak"] - before


def on_device(*shape, grad=False):
    return to_device(torch.randn(*shape)).requires_grad_(grad)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda x: x.lgamma(), "torch_npu has no kernel of its own for aten::lgamma"),
        (lambda x: x.double(), "aten::copy_ of torch.float64"),
        (lambda x: x.sum().item(), "the host waits for the device"),
        (lambda x: bool((x > 0).any()), "the host waits for the device"),
        (lambda x: x.nonzero(), "no kernel of its own for aten::nonzero"),
        (lambda x: x[x > 0], "by a mask waits for the device"),
        (lambda x: x.cpu(), "a copy between the host and the device"),
        (lambda x: x + torch.ones(3), "is on the CPU, others are on the device"),
    ],
)
def test_the_stand_in_refuses_what_the_device_would_do_on_the_host(wrong, message):
    x = on_device(2, 3)
    with strict(ALLOWED), pytest.raises(RuntimeError, match=re.escape(message)):
        wrong(x)


def test_a_kernel_that_leaves_the_list_fails_its_call(monkeypatch):
    """As the kit would see it: the call that the kernel serves, not some counter."""
    monkeypatch.setattr(diffmax_npu.rows, "per_row", lambda e, shape: torch.ones(1, device="npu").digamma())
    with pytest.raises(RuntimeError, match="no kernel of its own for aten::digamma"):
        diffmax_bisect(on_device(2, 3), 0.5)


def test_the_automatic_choice_is_the_device_s_backend():
    x = on_device(1, 2, 5, 8)
    assert diffmax.explain("diffmax_bisect", x, 0.5).chosen == "npu"
    assert attention(x, x, x).device.type == "npu"


def test_a_whole_training_step_stays_on_the_device():
    """From the public functions to the gradients: what core does around the kernels is held to the list too."""
    x, alpha = on_device(3, 4, 50, grad=True), to_device(torch.full((4, 1), 0.7)).requires_grad_()
    query, key, value = (on_device(2, heads, 70, 16, grad=True) for heads in (4, 2, 2))
    bias, sink = on_device(1, 4, 70, 70, grad=True), on_device(4, grad=True)
    slopes = on_device(4).abs()
    heads_alpha = to_device(torch.tensor([0.2, 0.5, 0.8, 0.99])).requires_grad_()
    options = {
        "is_causal": True,
        "alpha": heads_alpha,
        "enable_gqa": True,
        "sink": sink,
        "softcap": 5.0,
        "alibi_slopes": slopes,
    }
    tokens, ends = on_device(12, 4, 16, grad=True), to_device(torch.tensor([0, 5, 12], dtype=torch.int32))
    with strict(ALLOWED):
        diffmax_bisect(x, alpha).square().sum().backward()
        attention(query, key, value, bias, **options).square().sum().backward()
        attention_varlen(tokens, tokens, tokens, ends, ends, 7, 7, is_causal=True, alpha=heads_alpha).square().sum().backward()
    for leaf in (x, alpha, query, key, value, bias, sink, heads_alpha, tokens):
        assert leaf.grad.cpu().isfinite().all()


def test_float64_is_refused_with_a_remedy():
    x = to_device(torch.randn(2, 3, dtype=torch.float64))
    with pytest.raises(NoBackendError, match=r"npu: takes float16, bfloat16, float32, not float64; .* pass float32"):
        diffmax_bisect(x, 0.5, backend="npu")


@pytest.mark.parametrize("size", [1, 7, 40, 513])
def test_no_size_of_a_head_is_refused(size):
    query = on_device(1, 1, 3, size)
    assert attention(query, query, query, backend="npu").shape == (1, 1, 3, size)
    assert probe.unsupported(CallSpec("attention", "npu", "cann", torch.float16, frozenset(), size, size)) == []


@pytest.mark.parametrize("alpha", [0.85, 0.5, 0.0])
def test_launches_of_the_row_operator_do_not_grow_with_the_rows(alpha):
    """A block costs one start, a fixed number of steps, and an end."""
    n, e = 128, 1 - alpha
    steps = newton_steps(50, n, e)
    per_step = {0.85: 18, 0.5: 14, 0.0: 18}[alpha]
    for rows in (2, 64):
        x = on_device(rows, n)
        given = to_device(torch.full((1, 1), alpha)) if alpha == 0 else alpha
        with measured() as cost:
            diffmax_bisect(x, given)
        assert cost.launches <= steps * per_step + 40, (cost.launches, steps)


def test_memory_of_the_row_operator_is_its_results_and_a_few_blocks():
    rows, n = 256, 512
    x = on_device(rows, n, grad=True)
    block = 4 * diffmax_npu.rows.BLOCK_ELEMENTS
    with measured() as cost:
        p = diffmax_bisect(x, 0.6)
    result = p.numel() * 4
    assert cost.peak <= result + 4 * block, cost.peak / result


def test_memory_of_attention_grows_with_the_length_and_not_its_square():
    size, peaks = 8, []
    for length in (512, 1024):
        tensors = [on_device(1, 2, length, size, grad=True) for _ in range(3)]
        with measured() as cost:
            attention(*tensors, is_causal=True, alpha=0.6).square().sum().backward()
        results = 12 * 4 * tensors[0].numel()  # out, U, their gradients, those of the inputs, and two in float32
        room = max(diffmax_npu.blocks.BLOCK_ELEMENTS, 64 * length)
        assert cost.peak <= results + 5 * 4 * room, cost.peak
        peaks.append(cost.peak)
    assert peaks[1] <= 2.1 * peaks[0]
    assert peaks[1] < 4 * 2 * 1024 * 1024 / 4, "a quarter of the score matrix"


def test_launches_of_attention_are_those_of_its_blocks():
    query = on_device(1, 4, 200, 16)
    call = diffmax.plugin.AttentionCall(scale=0.25, e=0.4)
    blocks = len(list(diffmax_npu.blocks.blocks(query, query, call, False)))
    steps = newton_steps(200, 200, 0.4)
    with measured() as cost:
        attention(query, query, query, alpha=0.6)
    assert blocks > 1
    assert cost.launches <= blocks * (18 * steps + 50) + 20, (cost.launches, blocks)


def test_launches_are_those_that_the_documentation_names(monkeypatch):
    text = (Path(__file__).parents[1] / "docs" / "npu.md").read_text(encoding="utf-8")
    monkeypatch.setattr(diffmax_npu.rows, "BLOCK_ELEMENTS", 1 << 23)
    monkeypatch.setattr(diffmax_npu.blocks, "BLOCK_ELEMENTS", 1 << 23)
    x, query = on_device(8, 1024, grad=True), on_device(1, 2, 64, 16, grad=True)
    key, value = (on_device(1, 2, 1024, 16, grad=True) for _ in range(2))
    for what, call in (
        ("row operator", lambda: diffmax_bisect(x, 0.85)),
        ("attention", lambda: attention(query, key, value, alpha=0.85)),
    ):
        with measured() as forward:
            result = call()
        with measured() as backward:
            result.backward(result.detach())
        assert re.search(rf"^\| {what}, forward.* \| {forward.launches}: ", text, re.MULTILINE), (what, forward.launches)
        assert re.search(rf"^\| {what}, backward \| {backward.launches} \|", text, re.MULTILINE), (
            what,
            backward.launches,
        )


def test_blocks_cover_every_visible_score_once():
    """Whatever is windowed, grouped or batched: each visible (head, query, key) lies in one block."""
    cases = [
        ((2, 6, 130, 3), (2, 2, 70, 3), {"right": 0}),
        ((1, 4, 70, 3), (1, 4, 300, 3), {"left": 20, "right": 5, "lower_right": True}),
        ((3, 1, 65, 3), (3, 1, 65, 3), {"left": 0, "right": 0}),
        ((1, 64, 5, 3), (1, 1, 2000, 3), {}),
    ]
    for query_shape, key_shape, options in cases:
        query, key = torch.empty(query_shape), torch.empty(key_shape)
        call = diffmax.plugin.AttentionCall(scale=1.0, e=0.5, **options)
        kv_heads = key_shape[1]
        seen = torch.zeros(
            query_shape[0], kv_heads, query_shape[1] // kv_heads, query_shape[2], key_shape[2], dtype=torch.int32
        )
        for block in diffmax_npu.blocks.blocks(query, key, call, False):
            seen[block.batch, block.kv_heads, block.group, block.rows, block.keys] += 1
            assert block.rows.start % 64 == block.keys.start % 64 == 0
        scores = torch.zeros(1, 1, query_shape[2], key_shape[2])
        visible = rules.apply(scores, call, diffmax.reference.attention.Whole.of(query, key, call)) == 0
        assert (seen <= 1).all()
        assert (seen.bool() | ~visible).all()


def test_newton_s_number_of_steps_is_certified():
    """Decision 0060: rows made to be slow are solved, in float64, to what the bound promises."""
    for n, e in ((64, 1.0), (64, 0.5), (1024, 0.9), (1024, 0.15), (4096, 0.01)):
        rows = torch.stack([-torch.logspace(low, high, n, dtype=torch.float64) for low in (-9, -4, -1) for high in (0.1, 1, 3)])
        rows = torch.cat([rows, torch.zeros(1, n).double(), torch.randn(3, n).double() * 0.1]) / e
        z = e * (rows - rows.amax(1, keepdim=True))
        t = torch.full((len(z), 1), -1.0, dtype=torch.float64)
        for n_iter in (4, 10, 26):
            t.fill_(-1.0)
            for _ in range(newton_steps(n_iter, n, e)):
                base = (z - t).clamp_min(0)
                total, slope = (
                    base.pow(1 / e).sum(1, keepdim=True),
                    torch.where(base > 0, base.pow(1 / e - 1), 0.0).sum(1, keepdim=True),
                )
                t = t + (total - total.pow(1 - e)) / slope
            norm = (z - t).clamp_min(0).pow(1 / e).sum(1).pow(e) - 1
            assert (norm <= (n**e - 1) * n**-e * 2.0**-n_iter + 1e-13).all(), (n, e, n_iter)
            assert newton_steps(n_iter, n, e) <= math.ceil(n_iter / 2 + e * math.log2(n))


def test_the_sink_of_a_single_query_is_not_written_to():
    """The results began as a view of it."""
    sink = torch.randn(4).to("npu")
    before = sink.clone()
    query, key, value = (torch.randn(1, 4, n, 16).to("npu") for n in (1, 9, 9))
    attention(query, key, value, sink=sink, backend="npu")
    assert torch.equal(sink, before)


def test_the_selftest_passes():
    """What `python -m diffmax selftest --backend npu` runs."""
    outcomes = list(selftest.run("npu"))
    assert {outcome.dtype for outcome in outcomes} == {"", "float16", "bfloat16", "float32"}
    assert [outcome.operator for outcome in outcomes if outcome.not_run] == ["attention_kvcache"]
    assert not [str(outcome) for outcome in outcomes if outcome.failure]


def test_the_counter_counts():
    """A stand-in that counted nothing would pass every test above."""
    x = on_device(4, 4)
    with measured() as cost:
        y = x.exp() + 1
    assert (cost.launches, cost.peak) == (2, 128)
    assert standin_device.to_cpu(y).isfinite().all()
