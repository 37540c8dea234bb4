"""Seen-unseen curves of several methods."""

from __future__ import annotations

import pytest
import torch

from lightning_calibft.analysis import compare_curves
from tests.helpers.references import _reference_at_gamma, _reference_ausuc, random_case


def test_areas_and_operating_points():
    logits, target, seen, absent = random_case(0)
    other = logits + torch.randn_like(logits)
    gammas = {"one": {"ALG": 0.6, "best": 1.1}}
    methods = compare_curves({"one": logits, "other": other}, target, seen, absent, gammas=gammas)
    assert list(methods) == ["one", "other"]
    for name, of_method in (("one", logits), ("other", other)):
        assert methods[name].ausuc == pytest.approx(_reference_ausuc(of_method, target, seen, absent), rel=1e-12)
    assert list(methods["one"].points) == ["ALG", "best"]
    for name, gamma in (("ALG", 0.6), ("best", 1.1)):
        point = methods["one"].points[name]
        expected = _reference_at_gamma(logits, target, seen, absent, gamma)
        assert (point.seen_accuracy, point.absent_accuracy) == pytest.approx(expected[:2], rel=1e-12)
        assert point.gamma == gamma
    point = methods["other"].points["no calibration"]
    expected = _reference_at_gamma(other, target, seen, absent, 0.0)
    assert (point.seen_accuracy, point.absent_accuracy) == pytest.approx(expected[:2], rel=1e-12)


def test_unknown_method():
    logits, target, seen, absent = random_case(0)
    with pytest.raises(ValueError, match="'one', but got 'two'"):
        compare_curves({"one": logits}, target, seen, absent, gammas={"two": {"x": 1.0}})


def test_picture():
    logits, target, seen, absent = random_case(0)
    methods = compare_curves({"one": logits, "other": 2 * logits + 1}, target, seen, absent)
    figure, ax = methods["one"].plot()
    assert figure is ax.figure
    assert methods["other"].plot(ax) == (None, ax)
    assert len(ax.lines) == 4  # a curve and a point each
    for curve, point in (ax.lines[:2], ax.lines[2:]):
        assert curve.get_color() == point.get_color()
    assert ax.lines[0].get_color() != ax.lines[2].get_color()
    assert ax.lines[0].get_linestyle() != ax.lines[2].get_linestyle()
    marked = ax.lines[1]
    assert (marked.get_xdata()[0], marked.get_ydata()[0]) == pytest.approx(
        _reference_at_gamma(logits, target, seen, absent, 0.0)[:2]
    )
    texts = [text.get_text() for text in ax.get_legend().get_texts()]
    assert f"one AUC={methods['one'].ausuc:.3f}" in texts
    assert "other, no calibration (gamma 0)" in texts
