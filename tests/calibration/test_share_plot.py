"""The picture of gamma and the expected accuracies over the share of absent samples."""

from __future__ import annotations

import matplotlib
import numpy as np
import pytest
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from lightning_calibft import calibrate
from lightning_calibft.plotting import COLORS
from tests.helpers.runs import SEEN, loader, pretrained, quiet

matplotlib.use("Agg")
pytestmark = quiet


@pytest.fixture(scope="module")
def result():
    before = pretrained()
    before.fc.weight.data *= 1.5
    return calibrate(
        pretrained(), loader(), SEEN, estimator="pseudo_absent", pretrained=before, absent_share=0.25, progress=False
    )


def test_what_is_drawn(result):
    figure, ax = result.plot()
    assert isinstance(figure, Figure)
    lines = {line.get_label(): line for line in ax.get_lines()}
    table = result.share_table
    shares = np.array(table.absent_share)
    seen, absent = (lines[f"accuracy on {side} samples"].get_ydata() for side in ("seen", "absent"))
    assert (tuple(seen), tuple(absent)) == (table.seen_accuracy, table.absent_accuracy)
    overall = lines["on all samples, gamma for this share"].get_ydata()
    np.testing.assert_allclose(overall, (1 - shares) * seen + shares * absent)
    fixed, plain = (
        lines[f"on all samples, {text}"].get_ydata() for text in (f"gamma {result.gamma:.3g}", "without gamma")
    )
    changes = (1 - shares) * result.seen_change + shares * result.absent_change
    np.testing.assert_allclose(np.subtract(fixed, plain), changes, atol=1e-12)
    (right,) = [axis for axis in figure.axes if axis is not ax]
    assert tuple(right.get_lines()[0].get_ydata()) == table.gamma
    assert list(lines["share in use, 25.0%"].get_xdata()) == [0.25, 0.25]
    limit = result.break_even_share
    assert list(lines[f"break-even share, {limit:.1%}"].get_xdata()) == [limit, limit]
    assert {text.get_text() for text in ax.get_legend().get_texts()} == {*lines, "gamma for this share"}
    plt.close(figure)


def test_lines_differ_without_color(result):
    figure, ax = result.plot()
    looks = [(line.get_linestyle(), line.get_marker(), line.get_fillstyle()) for line in ax.get_lines()]
    assert len(set(looks)) == len(looks)
    assert {line.get_color() for line in ax.get_lines()} <= set(COLORS.values())
    plt.close(figure)


def test_on_a_given_axis(result):
    ax = Figure().subplots()
    assert result.plot(ax=ax) == (None, ax)
    assert len(ax.get_lines()) == 7


def test_an_estimator_that_knows_gamma_alone():
    result = calibrate(pretrained(), loader(), SEEN, progress=False)
    figure, ax = result.plot()
    assert [line.get_label() for line in ax.get_lines()] == ["gamma for this share"]
    assert figure.axes == [ax]
    plt.close(figure)


def test_an_estimator_that_knows_no_other_shares():
    result = calibrate(pretrained(), loader(), SEEN, estimator="fixed", estimator_kwargs={"gamma": 1.0}, progress=False)
    with pytest.raises(ValueError, match="the estimator 'fixed' knows none"):
        result.plot()
