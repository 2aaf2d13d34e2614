"""diffmax.plot: what is on the axes, and that nothing of matplotlib's global state is touched."""

import subprocess
import sys

import pytest
import torch

from diffmax import diffmax_bisect, plot

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
    subprocess.run([sys.executable, "-c", code], check=True)
