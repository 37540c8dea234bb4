"""The look of all pictures: colors for every eye, one for each role, and legends beside the data."""

from __future__ import annotations

import itertools

import pytest
import torch
from matplotlib import pyplot as plt
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lightning_calibft import ClassSplit
from lightning_calibft.analysis import compare_curves, plot_snapshots, toy_example, update_similarity
from lightning_calibft.analysis.accuracy_gain import AccuracyGain, GroupAccuracies
from lightning_calibft.analysis.embedding import Embedding
from lightning_calibft.analysis.history import Evaluation, Snapshot
from lightning_calibft.analysis.logit_levels import GroupLevels, LogitLevels
from lightning_calibft.analysis.weights import MeanSimilarity, RowNorms
from lightning_calibft.metrics import SeenUnseenCurve
from lightning_calibft.plotting import COLORS, CURVE_COLORS, MARKERS

# How people see who lack one kind of cones (Machado, Oliveira and Fernandes, 2009, severity 1), in linear RGB.
VISIONS = {
    "normal": torch.eye(3).tolist(),
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
TO_XYZ = [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
PAGES = {"light": "#ffffff", "dark": "#15181c"}


def linear(color):
    encoded = torch.tensor(to_rgb(color))
    return torch.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)


def lab(color, vision):
    """CIELAB, in which a distance of 2 is just noticeable."""
    seen = (torch.tensor(VISIONS[vision]) @ linear(color)).clamp(0, 1)
    xyz = torch.tensor(TO_XYZ) @ seen / torch.tensor([0.95047, 1.0, 1.08883])
    x, y, z = torch.where(xyz > 0.008856, xyz ** (1 / 3), 7.787 * xyz + 16 / 116)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def contrast(color, page):
    """As the Web Content Accessibility Guidelines define it, which ask for 3 in graphics."""
    dark, light = sorted((torch.tensor(TO_XYZ)[1] @ linear(each)).item() for each in (color, page))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("vision", VISIONS)
def test_all_eyes_tell_the_colors_apart(vision):
    for one, other in itertools.combinations({*COLORS.values(), *CURVE_COLORS}, 2):
        assert (lab(one, vision) - lab(other, vision)).norm() > 15, (one, other)


def test_each_color_stands_out_from_the_page():
    assert len({*COLORS.values()}) == len({*MARKERS.values()}) == len(COLORS)
    for color in {*COLORS.values(), *CURVE_COLORS}:
        assert contrast(color, PAGES["light"]) > 3
    for role in COLORS.keys() - {"gamma"}:  # which has the color of the text
        assert contrast(COLORS[role], PAGES["dark"]) > 3


def snapshots():
    group, groups = GroupLevels(1.0, 2.0, 3.0, 9), GroupAccuracies(0.1, 0.2, 0.3, 0.4)
    evaluation = Evaluation(0.5, groups, 0.6, 1.0, 0.7, 0.8, 0.9)
    norms, updates = RowNorms(1.0, 0.1, 2.0, 0.2), MeanSimilarity(0.1, 0.9, -0.5)
    return [Snapshot(step, step, norms, updates, LogitLevels(group, group), evaluation) for step in range(3)]


def pictures():
    split, target = ClassSplit(6, [0, 1, 2]), torch.arange(60) % 6
    logits = {name: torch.randn(60, 6, generator=torch.Generator().manual_seed(0)) for name in "abcde"}
    metric, low = SeenUnseenCurve(6, [0, 1, 2]), GroupAccuracies(0.1, 0.2, 0.3, 0.4)
    metric.update(logits["a"], target)
    curves = compare_curves(logits, target, [0, 1, 2], gammas={"a": {"no calibration": 0.0, "found": 1.0}}).values()
    return {
        **{
            quantity: lambda ax, quantity=quantity: plot_snapshots(snapshots(), quantity, ax=ax)
            for quantity in ("accuracies", "updates")
        },
        "curves": lambda ax: [curve.plot(ax) for curve in curves],
        "metric": lambda ax: metric.plot(ax=ax, score=True, gamma=1.0),
        "gain": AccuracyGain(low, low, low, low).plot,
        "features": Embedding(logits["a"][:, :2], target, split).plot,
        "toy": toy_example(steps=5).plot,
    }


@pytest.mark.parametrize("name", pictures())
def test_a_legend_hides_no_data(name):
    """Nor the labels of the axes, in a figure as narrow as a phone."""
    figure = Figure(figsize=(4.2, 4.6), layout="constrained")
    axis = figure.subplots()
    pictures()[name](ax=axis)
    figure.draw_without_rendering()
    legend = axis.get_legend().get_window_extent()
    labels = [axis.xaxis.label, axis.title, *axis.get_xticklabels()]
    for other in (axis.get_window_extent(), *(text.get_window_extent() for text in labels if text.get_text())):
        assert not legend.overlaps(other)
    assert figure.bbox.x0 <= legend.x0
    assert figure.bbox.y0 <= legend.y0
    assert legend.x1 <= figure.bbox.x1


@pytest.mark.parametrize("name", pictures())
def test_no_two_lines_of_a_picture_look_the_same(name):
    axis = Figure().subplots()
    pictures()[name](ax=axis)
    lines = [each for each in axis.get_legend_handles_labels()[0] if isinstance(each, Line2D)]
    looks = [(line.get_linestyle(), line.get_marker(), line.get_fillstyle()) for line in lines]
    if name in ("curves", "toy"):  # more lines than styles
        looks = [(*look, line.get_color()) for look, line in zip(looks, lines, strict=True)]
    assert len(looks) == len(set(looks))


def test_the_style_is_that_of_the_package_on_an_axis_of_the_user():
    with plt.rc_context({"axes.prop_cycle": plt.cycler(color=["red", "lime", "cyan"])}):
        _, axis = plt.subplots()
        pictures()["curves"](axis)
    colors = [line.get_color() for line in axis.get_lines() if line.get_linestyle() != "None"]
    assert colors == [*CURVE_COLORS, CURVE_COLORS[0]]
    plt.close("all")


def test_the_matrix_has_no_color_of_a_role():
    axis = Figure().subplots()
    update_similarity(torch.zeros(3, 2), torch.randn(3, 2), [0]).plot(axis)
    ends = [axis.images[0].cmap(end) for end in (0.0, 1.0)]
    for vision in VISIONS:
        assert (lab(ends[0], vision) - lab(ends[1], vision)).norm() > 15
        assert all((lab(end, vision) - lab(color, vision)).norm() > 15 for end in ends for color in COLORS.values())
