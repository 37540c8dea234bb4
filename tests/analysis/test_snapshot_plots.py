"""Plots of what was measured over training."""

from __future__ import annotations

import pytest

from lightning_calibft.analysis import plot_snapshots
from lightning_calibft.analysis.accuracy_gain import GroupAccuracies
from lightning_calibft.analysis.history import Evaluation, Snapshot
from lightning_calibft.analysis.logit_levels import GroupLevels, LogitLevels
from lightning_calibft.analysis.weights import MeanSimilarity, RowNorms
from lightning_calibft.plotting import COLORS

STEPS = [0, 5, 9]


def snapshots(**measured):
    """One for each step; a function is called with the number of the step."""
    return [
        Snapshot(i, step, **{name: value(i) if callable(value) else value for name, value in measured.items()})
        for i, step in enumerate(STEPS)
    ]


def heights(ax):
    return [list(line.get_ydata()) for line in ax.lines]


def labels(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def test_row_norms():
    figure, ax = plot_snapshots(snapshots(norms=lambda i: RowNorms(1.0 + i, 0.5, 2.0, 0.1)), "row_norms")
    assert figure is ax.figure
    assert heights(ax) == [[1, 2, 3], [2, 2, 2]]
    assert [line.get_color() for line in ax.lines] == [COLORS["seen"], COLORS["absent"]]
    assert ax.lines[0].get_marker() != ax.lines[1].get_marker()
    low_and_high = ax.collections[0].get_paths()[0].vertices
    assert low_and_high[:, 1].min() == 0.5
    assert low_and_high[:, 1].max() == 3.5
    assert plot_snapshots(snapshots(norms=RowNorms(1.0, 0.5, 2.0, 0.1)), "row_norms", ax=ax) == (None, ax)


def test_updates():
    _, ax = plot_snapshots(snapshots(updates=MeanSimilarity(0.1, 0.2, -0.3)), "updates")
    assert [line.get_ydata()[0] for line in ax.lines[1:]] == [0.1, 0.2, -0.3]


@pytest.mark.parametrize(("quantity", "shift"), [("absent_logits", 0), ("seen_logits", 10)])
def test_logits(quantity, shift):
    def levels(i):
        # The last validation had no seen samples, and the second one no samples at all.
        seen, absent = GroupLevels(10.0 + i, 12.0, 13.0, 5 * (i < 1)), GroupLevels(float(i), 2.0, 3.0, 5)
        return None if i == 1 else LogitLevels(seen, absent)

    _, ax = plot_snapshots(snapshots(levels=levels), quantity)
    steps = [0, 9] if quantity == "absent_logits" else [0]
    assert list(ax.lines[0].get_xdata()) == steps
    assert heights(ax) == [[shift, 2][: len(steps)], [shift + 2] * len(steps), [shift + 3] * len(steps)]
    assert labels(ax) == ["true class", "largest other seen class", "largest other absent class"]
    assert ax.lines[0].get_color() == COLORS[quantity.removesuffix("_logits")]


def test_accuracies():
    evaluation = Evaluation(0.1, GroupAccuracies(0.2, 0.3, 0.4, 0.5), 0.6, 3.0, 0.7, 0.8, 0.9)
    _, ax = plot_snapshots(snapshots(evaluation=evaluation), "accuracies")
    drawn = dict(zip(labels(ax), (values[0] for values in heights(ax)), strict=True))
    expected = {"Acc_S/Y": 0.2, "Acc_U/Y": 0.3, "Acc_U/U": 0.5, "Acc_Y/Y": 0.1, "AUSUC": 0.6}
    assert drawn == {**expected, "Acc_Y/Y with the best gamma": 0.7}
    looks = [(line.get_color(), line.get_linestyle()) for line in ax.lines]
    assert len(set(looks)) == len(looks)


def test_errors():
    with pytest.raises(ValueError, match="to hold 'row_norms' of at least one step, but got none"):
        plot_snapshots([Snapshot(0, 0)], "row_norms")
    with pytest.raises(ValueError, match="`quantity` to be one of 'accuracies'"):
        plot_snapshots([Snapshot(0, 0)], "norms")
