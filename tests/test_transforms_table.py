"""The table of docs/transforms.md: it is made from the one below, in which every cell names the test that shows it."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from diffmax import (
    attention,
    attention_varlen,
    attention_with_kvcache,
    diffmax_bisect,
    diffmax_loss,
    lazy_attention,
    threshold_attention,
)

ROOT = Path(__file__).parents[1]
newer_torch = pytest.mark.skipif(not hasattr(torch.library, "register_vmap"), reason="needs torch 2.5: vmap rules of operators")

COLUMNS = ("rows", "attention", "varlen", "decode", "loss")
_T, _A, _C, _J, _E = "test_transforms", "test_attention_transforms", "test_compile", "test_traced", "test_export"
_HERE = "test_transforms_table"
NOTHING = "\u2013"
NO_GRADIENT = ("refused", "test_kvcache::test_no_gradient_is_refused_not_forgotten")
LOSS_REFUSES = ("refused", "test_losses::test_forward_mode_and_torch_func_are_refused_clearly")


def each(text, pattern):
    """The same cell in every column, whose name stands for {}."""
    return tuple((text, pattern.format(column)) for column in COLUMNS)


# Transform, one cell for each column, the torch that it needs. A cell is what it says and its test.
TABLE = [
    (
        "`backward`, `torch.autograd.grad`",
        (
            ("yes", "test_gradients::test_gradcheck_in_x_and_alpha"),
            ("fused", "test_attention_options::test_gradcheck_for_every_input"),
            ("fused", "test_attention::test_packed_gradcheck"),
            NO_GRADIENT,
            ("yes", "test_losses::test_the_gradient_is_p_minus_y"),
        ),
        "2.4.1",
    ),
    (
        "`create_graph=True`, second derivatives",
        (
            ("yes", f"{_T}::test_gradgradcheck_in_every_mode"),
            ("composed", "test_attention::test_second_derivatives_by_finite_differences"),
            ("composed", "test_attention::test_second_derivatives_of_packed_sequences"),
            NO_GRADIENT,
            ("yes", "test_losses::test_gradcheck_and_gradgradcheck_in_x_and_alpha"),
        ),
        "2.4.1",
    ),
    (
        "`torch.func.grad`, `vjp`, `jacrev`",
        (
            ("yes", f"{_T}::test_grad_jacobians_and_products"),
            ("composed", f"{_A}::test_grad_and_vjp_for_every_argument"),
            ("composed", f"{_A}::test_packed_sequences"),
            ("refused", f"{_HERE}::test_torch_func_refuses_decoding"),
            LOSS_REFUSES,
        ),
        "2.4.1",
    ),
    (
        "`jvp`, forward mode",
        (
            ("yes", f"{_T}::test_forward_mode_without_torch_func"),
            ("composed", f"{_A}::test_forward_mode"),
            ("composed", f"{_A}::test_packed_sequences"),
            ("refused", "test_kvcache::test_forward_mode_is_refused_not_lost"),
            LOSS_REFUSES,
        ),
        "2.4.1",
    ),
    (
        "`vmap`",
        (
            ("yes", f"{_T}::test_vmap"),
            ("fused", f"{_A}::test_forwards_in_reverse_mode_and_under_vmap_hold_no_scores"),
            ("one by one", f"{_A}::test_packed_sequences"),
            ("refused", "test_kvcache::test_forward_mode_is_refused_not_lost"),
            ("one by one", f"{_HERE}::test_vmap_of_the_loss"),
        ),
        "2.5",
    ),
    (
        "`hessian`, `jacfwd`, `vmap(grad)`",
        (
            ("yes", f"{_T}::test_hessians_in_every_order"),
            ("composed", f"{_A}::test_second_derivatives_in_either_order"),
            ("composed", f"{_HERE}::test_a_hessian_of_packed_sequences"),
            ("refused", f"{_HERE}::test_torch_func_refuses_decoding"),
            LOSS_REFUSES,
        ),
        "2.5",
    ),
    (
        "`torch.utils.checkpoint`",
        (
            ("yes", "test_ops::test_checkpointing_gives_the_same_gradient"),
            ("yes", "test_attention::test_checkpointing_gives_the_same_gradients_and_a_policy_can_keep_the_result"),
            ("yes", f"{_HERE}::test_checkpointing[varlen]"),
            NO_GRADIENT,
            ("yes", f"{_HERE}::test_checkpointing[loss]"),
        ),
        "2.4.1",
    ),
    (
        "autocast",
        (
            ("its input's dtype", "test_ops::test_autocast_takes_half_in_computes_in_float32_and_gives_half"),
            ("as torch's own", "test_attention::test_autocast_computes_in_its_dtype_and_sums_in_float32"),
            ("as torch's own", f"{_HERE}::test_autocast_of_packed_sequences"),
            ("the caches' dtype", "test_kvcache::test_autocast_converts_new_tokens_to_the_caches_dtype"),
            ("float32", "test_losses::test_under_autocast_the_loss_is_float32_like_cross_entropy_s"),
        ),
        "2.4.1",
    ),
    (
        "FLOP counter",
        (
            ("yes", f"{_T}::test_the_flop_counter_counts_it"),
            ("yes", f"{_A}::test_the_flop_counter_counts_what_it_counts_for_torchs_attention"),
            ("yes", f"{_A}::test_the_flop_counter_counts_each_packed_sequence_and_the_whole_cache"),
            ("yes", f"{_A}::test_the_flop_counter_counts_each_packed_sequence_and_the_whole_cache"),
            ("yes", f"{_HERE}::test_the_flop_counter_counts_losses"),
        ),
        "2.5",
    ),
    (
        "`torch.compile`, default backend",
        (
            ("yes", "test_ops::test_compiles_in_one_graph_forward_and_backward[inductor]"),
            ("yes", f"{_C}::test_the_default_backend[attention]"),
            ("yes", f"{_C}::test_the_default_backend[varlen]"),
            ("yes", f"{_C}::test_the_default_backend[decode, append]"),
            ("yes", "test_losses::test_compiles_in_one_graph_forward_and_backward[inductor]"),
        ),
        "2.5",
    ),
    (
        "`torch.compile(fullgraph=True, dynamic=True)`: one graph for all lengths, gradients too",
        each("yes", f"{_C}::test_one_graph_serves_all_lengths[{{}}]"),
        "2.5",
    ),
    (
        "`torch.compile`, a float argument known at run time",
        tuple(
            ("a graph each", f"{_C}::test_numbers_that_are_arguments_make_a_graph_each_as_with_torchs_attention[{name}]")
            for name in ("alpha of rows", "scale", "scale of varlen", "softmax_scale", "alpha of a loss")
        ),
        "2.5",
    ),
    (
        "`torch.compile`, a float that comes out of a tensor (`.item()`), as torch's own attention",
        tuple(
            ("torch refuses", f"{_C}::test_torch_refuses_numbers_that_come_out_of_a_tensor[{name}]")
            for name in ("alpha of rows", "scale", "scale of varlen", "softmax_scale", "alpha of a loss")
        ),
        NOTHING,
    ),
    (
        "`torch.compile` of `grad`, `vmap(grad)`, `jvp`",
        (
            ("yes", f"{_T}::test_compiled_transforms"),
            ("composed", f"{_A}::test_compiled_transforms"),
            ("composed", f"{_HERE}::test_compiled_gradient_of_packed_sequences"),
            ("refused", f"{_HERE}::test_torch_func_refuses_decoding"),
            LOSS_REFUSES,
        ),
        "2.5",
    ),
    (
        "`torch.export` with a free length, saved and loaded",
        (
            *(
                ("yes", f"{_E}::test_a_free_length_of_a_model_with_parameters[{name}]")
                for name in ("rows, module", "attention, module", "varlen")
            ),
            ("yes", f"{_E}::test_decoding_over_caches_of_any_length[True]"),
            ("yes", f"{_E}::test_a_free_length_of_a_model_with_parameters[loss]"),
        ),
        "2.5",
    ),
    (
        "training what was exported",
        (
            *(("yes", f"{_E}::test_what_is_exported_can_be_trained[{name}]") for name in ("rows", "attention", "varlen")),
            NO_GRADIENT,
            ("yes", f"{_E}::test_what_is_exported_can_be_trained[loss]"),
        ),
        "2.5",
    ),
    (
        "AOTInductor (the package needs diffmax in the process that loads it: the operators are Python)",
        (("yes", f"{_T}::test_aot_inductor"), *((("yes", f"{_E}::test_aot_inductor"),) * 4)),
        "2.6",
    ),
    (
        "`torch.jit.trace`, saved and loaded, run at other sizes",
        each("plain", f"{_J}::test_jit_trace[{{}}]"),
        "2.4.1",
    ),
    (
        "gradients of what was traced so",
        (
            *(("plain", f"{_J}::test_jit_trace[{name}]") for name in ("rows", "attention", "varlen")),
            None,
            ("plain", f"{_J}::test_jit_trace[loss, an alpha]"),
        ),
        "2.4.1",
    ),
    (
        "`torch.jit.trace` of an append to the caches",
        (*((None,) * 3), ("plain", f"{_J}::test_jit_trace_of_decoding_writes_into_the_caches"), None),
        "2.4.1",
    ),
    (
        "`torch.onnx.export(dynamo=False)`, run in onnxruntime",
        each("plain", f"{_J}::test_onnx_by_the_older_exporter[{{}}]"),
        "2.6",
    ),
    (
        "`torch.onnx.export(dynamo=True)`, of models and of exported programs",
        (("plain", f"{_J}::test_onnx_by_the_newer_exporter"), *((("plain", f"{_J}::test_onnx_of_an_exported_program"),) * 4)),
        "2.6",
    ),
    (
        "ONNX of an append to the caches",
        (*((None,) * 3), ("refused", f"{_J}::test_onnx_refuses_to_append_to_a_cache"), None),
        NOTHING,
    ),
    (
        "`torch.fx.symbolic_trace`, of modules too",
        each("one step", f"{_J}::test_fx_sees_one_step[{{}}]"),
        "2.4.1",
    ),
    (
        "`torch.jit.script`",
        each("torch refuses", f"{_HERE}::test_torch_refuses_to_script[{{}}]"),
        NOTHING,
    ),
]

# The same of threshold attention and lazy attention.
THRESHOLD = [
    ("`backward`, `torch.autograd.grad`", "fused", "test_threshold::test_gradients_are_right_to_second_order", "2.4.1"),
    (
        "`create_graph=True`, second derivatives",
        "composed",
        "test_threshold::test_gradients_are_right_to_second_order",
        "2.4.1",
    ),
    ("`torch.func.grad`, `vjp`, `jacrev`", "composed", f"{_HERE}::test_jacobians_of_threshold_attention", "2.4.1"),
    ("`jvp`, forward mode", "composed", "test_threshold::test_transforms", "2.4.1"),
    ("`vmap`", "one by one", "test_threshold::test_transforms", "2.5"),
    ("`hessian`, `jacfwd`, `vmap(grad)`", "composed", f"{_HERE}::test_jacobians_of_threshold_attention", "2.5"),
    ("`torch.utils.checkpoint`", "yes", f"{_HERE}::test_checkpointing[lazy]", "2.4.1"),
    ("autocast", "as torch's own", f"{_HERE}::test_autocast_of_lazy_attention", "2.4.1"),
    ("FLOP counter", "yes", f"{_HERE}::test_the_flop_counter_counts_threshold_attention_as_attention", "2.5"),
    ("`torch.compile`, default backend", "yes", f"{_C}::test_the_default_backend[lazy]", "2.5"),
    (
        "`torch.compile(fullgraph=True, dynamic=True)`: one graph for all lengths, gradients too",
        *("yes", f"{_C}::test_one_graph_serves_all_lengths[lazy]", "2.5"),
    ),
    (
        "`torch.export` with a free length, saved and loaded",
        *("yes", f"{_E}::test_a_free_length_of_a_model_with_parameters[lazy]", "2.5"),
    ),
    ("training what was exported", "yes", f"{_E}::test_what_is_exported_can_be_trained[lazy]", "2.5"),
    ("`torch.jit.trace`, saved and loaded, run at other sizes", "plain", f"{_J}::test_jit_trace[lazy]", "2.4.1"),
    ("gradients of what was traced so", "plain", f"{_J}::test_jit_trace[threshold, window]", "2.4.1"),
    ("`torch.onnx.export(dynamo=False)`, run in onnxruntime", "plain", f"{_J}::test_onnx_by_the_older_exporter[lazy]", "2.6"),
    ("`torch.fx.symbolic_trace`, of modules too", "one step", f"{_J}::test_fx_sees_one_step[lazy]", "2.4.1"),
    ("`torch.jit.script`", "torch refuses", f"{_HERE}::test_torch_refuses_to_script[threshold]", NOTHING),
]
CELLS = [(transform, cell) for transform, cells, _ in TABLE for cell in cells if cell]
CELLS += [(transform, (text, test)) for transform, text, test, _ in THRESHOLD]


def written_of_threshold():
    """The second table as Markdown."""
    lines = ["| transform | `threshold_attention`, `lazy_attention` | from torch |", "|---" * 3 + "|"]
    return "\n".join([*lines, *(f"| {transform} | {text} | {since} |" for transform, text, _, since in THRESHOLD)])


def written():
    """The table as Markdown."""
    lines = ["| transform | " + " | ".join(HEADINGS) + " | from torch |", "|---" * 7 + "|"]
    for transform, cells, since in TABLE:
        assert len(cells) == len(COLUMNS), transform
        lines.append(" | ".join(["| " + transform, *(cell[0] if cell else NOTHING for cell in cells), f"{since} |"]))
    return "\n".join(lines)


HEADINGS = ("`diffmax_bisect`", "`attention`", "`attention_varlen`", "`attention_with_kvcache`", "`diffmax_loss`")


def test_the_tables_of_the_docs_are_these():
    page = (ROOT / "docs/transforms.md").read_text(encoding="utf-8")
    assert written() in page
    assert written_of_threshold() in page


def loaded(name):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cases_of(function):
    """The strings that stand for the values of a test's parameters."""
    marks = [mark for mark in getattr(function, "pytestmark", ()) if mark.name == "parametrize"]
    values = [value for mark in marks for value in mark.args[1]]
    return {str(one) for value in values for one in (value if isinstance(value, tuple) else (value,))}


@pytest.mark.parametrize("name", sorted({test.split("::")[0] for _, (_, test) in CELLS}))
def test_every_cell_names_a_test_that_exists(name):
    module = loaded(name)
    for transform, (text, test) in CELLS:
        if test.startswith(f"{name}::"):
            function, _, case = re.fullmatch(r"\w+::(\w+)(\[(.*)\])?", test).groups()
            assert callable(getattr(module, function, None)), (transform, text, test)
            assert case is None or case in cases_of(getattr(module, function)), (transform, text, test)


def test_every_cell_that_refuses_names_a_test_of_a_refusal():
    for transform, (text, test) in CELLS:
        assert ("refuse" in text) == ("refuse" in test), (transform, text, test)


# --- what no other file tests ---------------------------------------------------------------------------------------------


def packed(x):
    ends = torch.tensor([0, 2, 5], dtype=torch.int32)
    return attention_varlen(x, x, x, ends, ends, 3, 3, is_causal=True, alpha=0.7)


def lazy(x):
    x = x.transpose(0, 1).unsqueeze(0)
    return lazy_attention(x, x, x, torch.zeros(x.shape[1], 3), -0.5)


def decode(q):
    cache = torch.ones(2, 1, 9, 2, 4, dtype=q.dtype)
    return attention_with_kvcache(q, *cache, cache_seqlens=3).sum()


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.hessian, torch.func.jacrev])
def test_torch_func_refuses_decoding(transform):
    with pytest.raises(NotImplementedError, match="it has no gradient"):
        transform(decode)(torch.randn(1, 1, 2, 4))


def test_torch_func_refuses_decoding_under_compile():
    with pytest.raises(Exception, match="it has no gradient"):
        torch.compile(torch.func.grad(decode), backend="aot_eager")(torch.randn(1, 1, 2, 4))


@newer_torch
def test_a_hessian_of_packed_sequences():
    x = torch.randn(5, 1, 2, dtype=torch.float64)
    ours = torch.func.hessian(lambda x: packed(x).square().sum())(x)
    torch.testing.assert_close(ours, torch.autograd.functional.hessian(lambda x: packed(x).square().sum(), x))


@newer_torch
def test_compiled_gradient_of_packed_sequences():
    x = torch.randn(5, 1, 2, dtype=torch.float64)
    gradient = torch.func.grad(lambda x: packed(x).square().sum())
    torch.testing.assert_close(torch.compile(gradient, backend="aot_eager", fullgraph=True)(x), gradient(x))


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_vmap_of_the_loss():
    x, y = torch.randn(3, 4, 5), torch.tensor([0, 1, 2, 4])
    expected = torch.stack([diffmax_loss(one, y, 0.5) for one in x])
    torch.testing.assert_close(torch.vmap(lambda x: diffmax_loss(x, y, 0.5))(x), expected)


@pytest.mark.parametrize("name", ["varlen", "loss", "lazy"])
def test_checkpointing(name):
    function = {
        "varlen": packed,
        "loss": lambda x: diffmax_loss(x[:, 0], torch.tensor([0, 1, 2, 3, 0]), 0.5),
        "lazy": lazy,
    }[name]
    x = torch.randn(5, 2, 4, requires_grad=True)
    ours, exact = (
        torch.autograd.grad(out.square().sum(), x)[0] for out in (checkpoint(function, x, use_reentrant=False), function(x))
    )
    assert torch.equal(ours, exact)


def test_autocast_of_packed_sequences():
    x = torch.randn(5, 2, 4)
    with torch.autocast("cpu", torch.bfloat16):
        out = packed(x)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, packed(x.bfloat16()))


@newer_torch
def test_the_flop_counter_counts_losses():
    from torch.utils.flop_counter import FlopCounterMode

    import diffmax.integrations.flop_counter  # noqa: F401
    from diffmax.operators.rows.spec import FORWARD_FLOPS

    x = torch.randn(4, 100, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        loss = diffmax_loss(x, torch.tensor([0, 1, 2, 3]), 0.5)
    assert counter.get_total_flops() == (FORWARD_FLOPS + 2) * 400
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    assert counter.get_total_flops() == 2 * 400


def test_autocast_of_lazy_attention():
    x = torch.randn(5, 2, 4)
    with torch.autocast("cpu", torch.bfloat16):
        out = lazy(x)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, lazy(x.bfloat16()))


@newer_torch
def test_the_flop_counter_counts_threshold_attention_as_attention():
    from torch.utils.flop_counter import FlopCounterMode

    import diffmax.integrations.flop_counter  # noqa: F401

    x = torch.randn(2, 3, 10, 8, requires_grad=True)
    counts = []
    for function in (lambda: threshold_attention(x, x, x, 0.1), lambda: attention(x, x, x, is_causal=True)):
        with FlopCounterMode(display=False) as forward:
            out = function()
        with FlopCounterMode(display=False) as backward:
            out.sum().backward()
        counts.append((forward.get_total_flops(), backward.get_total_flops()))
    assert counts[0] == counts[1] == (2 * 2 * 3 * 100 * 16, 2 * 2 * 3 * 100 * 40)


@newer_torch
def test_jacobians_of_threshold_attention():
    q, k, v = torch.randn(3, 1, 1, 3, 2, dtype=torch.float64)

    def score(q):
        return threshold_attention(q, k, v, 0.05, weights="softmax", power=3.0).square().sum()

    torch.testing.assert_close(torch.func.grad(score)(q), torch.autograd.functional.jacobian(score, q))
    torch.testing.assert_close(torch.func.jacrev(score)(q), torch.func.jacfwd(score)(q))
    torch.testing.assert_close(torch.func.hessian(score)(q), torch.autograd.functional.hessian(score, q))


FUNCTIONS = dict(zip(COLUMNS, (diffmax_bisect, attention, attention_varlen, attention_with_kvcache, diffmax_loss), strict=True))
FUNCTIONS["threshold"] = threshold_attention


@pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", FUNCTIONS)
def test_torch_refuses_to_script(name):
    with pytest.raises(torch.jit.frontend.NotSupportedError, match="keyword-only arguments"):
        torch.jit.script(FUNCTIONS[name])
