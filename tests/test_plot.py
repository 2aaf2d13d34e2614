"""diffmax.plot: what is on the axes, and that nothing of matplotlib's global state is touched."""

import pytest
import torch

from diffmax import diffmax_bisect, plot
from tests import fresh

pytest.importorskip("matplotlib", reason="needs matplotlib: pip install 'diffmax-core[examples]'")


def test_each_heads_alpha_stands_against_its_support():
    alpha, support = torch.tensor([[0.5, 0.9], [0.7, 0.8]]), torch.tensor([[2.0, 9.0], [4.0, 5.0]])
    axis = plot.alpha_and_support(alpha, support, ["a", "b"]).axes[0]
    points = [collection.get_offsets().tolist() for collection in axis.collections]
    expected = torch.stack([alpha, support], -1).tolist()
    assert points == expected
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["a", "b"]


def test_maps_leave_exact_zeros_blank_and_say_how_many():
    weights = diffmax_bisect(3 * torch.randn(5, 6, 6), 0.5)
    figure = plot.attention_maps(weights, tokens=list("abcdef"))
    for axis, of_head in zip(figure.axes, weights, strict=False):
        shown = torch.as_tensor(axis.images[0].get_array().filled(0))
        assert torch.equal(shown > 0, of_head > 0)
        assert axis.get_title().endswith(f" {1000 * (of_head == 0).sum() // 36 / 10:.1f} % zeros")
        assert [tick.get_text() for tick in axis.get_xticklabels()] == list("abcdef")


def test_100_percent_of_zeros_are_all_of_them():
    weights = torch.zeros(3, 20, 20, dtype=torch.float64)
    weights[0, 3, 3] = 1
    weights[1, 3, 3] = 1e-60  # no zero, though it would be one in float32
    titles = [axis.get_title() for axis in plot.attention_maps(weights).axes[:3]]
    assert titles == ["head 1: 99.7 % zeros", "head 2: 99.7 % zeros", "head 3: 100.0 % zeros"]


def test_lists_and_arrays_are_taken_as_tensors_are():
    axis = plot.alpha_and_support([0.5, 0.25], torch.tensor([2.0, 9.0]).numpy()).axes[0]
    assert axis.collections[0].get_offsets().tolist() == [[0.5, 2.0], [0.25, 9.0]]
    assert plot.alpha_curves([[0.5, 0.25], [0.75, 0.5]]).axes[0].lines[0].get_ydata().tolist() == [0.5, 0.75]
    assert plot.attention_maps([[[1.0, 0.0]]]).axes[0].get_title() == "head 1: 50.0 % zeros"


KINDS = {
    "tensor": lambda t: t,
    "bfloat16": lambda t: t.bfloat16(),
    "float16, with a gradient": lambda t: t.half().requires_grad_(),
    "parameter": torch.nn.Parameter,
    "result with a gradient": lambda t: t.requires_grad_() * 1,
    "not contiguous": lambda t: torch.stack([t, t], -1)[..., 0],
    "array": lambda t: t.numpy(),
    "list of tensors": list,
    "list of parameters": lambda t: [torch.nn.Parameter(part) for part in t],
    "parameter list": lambda t: torch.nn.ParameterList([torch.nn.Parameter(part) for part in t]),
    "list of bfloat16": lambda t: [part.bfloat16().requires_grad_() for part in t],
    "list of arrays": lambda t: [part.numpy() for part in t],
    "tuple of lists": lambda t: tuple(t.tolist()),
    "numbers": lambda t: t.tolist(),
    "iterator": iter,
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_numbers_is_taken(kind):
    """A list of tensors was a ValueError of torch's."""
    curves, maps = torch.tensor([[0.5, 0.25], [0.75, 0.5]]), torch.tensor([[[1.0, 0.0], [0.5, 0.5]]])
    as_kind = KINDS[kind]
    lines = plot.alpha_curves(as_kind(curves.clone()), steps=as_kind(torch.tensor([0.0, 100.0]))).axes[0].lines
    assert [line.get_ydata().tolist() for line in lines] == curves.T.tolist()
    assert lines[0].get_xdata().tolist() == [0, 100]
    assert plot.attention_maps(as_kind(maps.clone())).axes[0].get_title() == "head 1: 25.0 % zeros"
    axis = plot.alpha_and_support(as_kind(curves.clone()), as_kind(4 * curves)).axes[0]
    assert axis.collections[1].get_offsets().tolist() == [[0.75, 3.0], [0.5, 2.0]]


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (
            lambda: plot.alpha_curves([torch.ones(2), torch.ones(3)]),
            ValueError,
            r"alphas must hold parts of one shape, got \(2,\), \(3,\)",
        ),
        (lambda: plot.alpha_curves("0.5"), TypeError, "alphas must be a tensor, an array, or a list of such, got str"),
        (lambda: plot.alpha_curves([None]), TypeError, "got NoneType"),
        (
            lambda: plot.attention_maps(torch.ones(1, 2, 2) + 0j),
            TypeError,
            "weights must hold real numbers, got torch.complex64",
        ),
        (lambda: plot.alpha_and_support(torch.ones(2), torch.ones(2, device="meta")), TypeError, "got torch.float32 on meta"),
    ],
)
def test_what_holds_no_numbers_is_refused(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_curves_follow_the_records():
    alphas = torch.rand(3, 2, 4)
    axis = plot.alpha_curves(alphas, steps=[0, 10, 30]).axes[0]
    assert len(axis.lines) == 8
    assert list(axis.lines[5].get_xdata()) == [0, 10, 30]
    assert list(axis.lines[5].get_ydata()) == alphas[:, 1, 1].tolist()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: plot.alpha_and_support(torch.ones(3), torch.ones(2)), r"alpha_and_support: .* got \(3,\) and \(2,\)"),
        (lambda: plot.alpha_and_support(torch.ones(0), torch.ones(0)), r"alpha_and_support: .* got \(0,\) and \(0,\)"),
        (lambda: plot.alpha_and_support(torch.ones(3), torch.ones(3), ["a", "b"]), "labels must be one per layer, got 2 for 1"),
        (lambda: plot.attention_maps(torch.ones(3, 3)), r"attention_maps: .* \(H, L, S\), got \(3, 3\)"),
        (lambda: plot.attention_maps(torch.ones(1, 3, 3), tokens=["a"]), "tokens must name 3 keys, got 1"),
        (lambda: plot.alpha_curves(torch.ones(0, 2)), r"alpha_curves: .* \(records, ...\), got \(0, 2\)"),
        (lambda: plot.alpha_curves(torch.ones(2, 2), steps=[1]), "steps must be one per record, got 1 for 2"),
    ],
)
def test_bad_input(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_without_matplotlib_it_says_what_to_install():
    """And importing the module needs none, nor does drawing touch pyplot."""
    code = (
        "import sys, torch, diffmax.plot as plot; assert 'matplotlib' not in sys.modules\n"
        "plot.alpha_curves(torch.ones(2, 2)); assert 'matplotlib.pyplot' not in sys.modules\n"
        "sys.modules['matplotlib.figure'] = None\n"
        "try: plot.alpha_curves(torch.ones(2, 2))\n"
        "except ImportError as error: assert 'pip install matplotlib' in str(error)\n"
        "else: raise SystemExit(1)"
    )
    fresh.python(code)
