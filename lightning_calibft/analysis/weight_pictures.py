"""Drawing what fine-tuning does to the rows of the classification head."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_calibft._arguments import check_type
from lightning_calibft.analysis._axes import _AX_TYPE, _PLOT_OUT_TYPE, COLORS, check_series, draw_lines, new_axis
from lightning_calibft.analysis.weights import MeanSimilarity, RowNorms, UpdateSimilarity


def plot_row_norms(steps: Sequence[int], norms: Sequence[RowNorms], *, ax: _AX_TYPE | None = None) -> _PLOT_OUT_TYPE:
    """Draw the norms of the rows over training: means, and one standard deviation around them.

    Args:
        steps: Training steps.
        norms: From :func:`row_norms`, one a step.
        ax: A matplotlib axis to draw on. ``None``: a new figure.

    Returns:
        Figure and axis; the figure is ``None`` if ``ax`` was given.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
    """
    check_series(steps, "norms", norms, RowNorms)
    figure, axis = new_axis(ax)
    means = {
        "seen classes": ([each.seen_mean for each in norms], COLORS["seen"], "-"),
        "absent classes": ([each.absent_mean for each in norms], COLORS["absent"], "-"),
    }
    deviations = ([each.seen_std for each in norms], [each.absent_std for each in norms])
    for (values, color, _), spread in zip(means.values(), deviations, strict=True):
        low, high = zip(*((a - b, a + b) for a, b in zip(values, spread, strict=True)), strict=True)
        axis.fill_between(steps, low, high, color=color, alpha=0.15)
    draw_lines(axis, steps, means, "L2 norm of the head's rows")
    return figure, axis


def plot_mean_similarity(
    steps: Sequence[int], means: Sequence[MeanSimilarity], *, ax: _AX_TYPE | None = None
) -> _PLOT_OUT_TYPE:
    """Draw the mean cosines between updates over training; arguments and results as in :func:`plot_row_norms`."""
    check_series(steps, "means", means, MeanSimilarity)
    figure, axis = new_axis(ax)
    lines = {
        "between seen classes": ([each.within_seen for each in means], COLORS["seen"], "-"),
        "between absent classes": ([each.within_absent for each in means], COLORS["absent"], "-"),
        "between a seen and an absent class": ([each.between for each in means], COLORS["both"], "--"),
    }
    axis.axhline(0, color="black", linewidth=0.8)
    draw_lines(axis, steps, lines, "Mean cosine between updates")
    return figure, axis


def plot_update_similarity(similarity: UpdateSimilarity, *, ax: _AX_TYPE | None = None) -> _PLOT_OUT_TYPE:
    """Draw the matrix of cosines, the seen classes first.

    Args:
        similarity: From :func:`update_similarity`.
        ax: A matplotlib axis to draw on. ``None``: a new figure.

    Returns:
        Figure and axis; the figure is ``None`` if ``ax`` was given.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
    """
    check_type("similarity", similarity, UpdateSimilarity)
    figure, axis = new_axis(ax)
    seen, absent = similarity.split.seen_classes, similarity.split.absent_classes
    order = [*seen, *absent]
    image = axis.imshow(similarity.matrix[order][:, order].numpy(), cmap="RdBu_r", vmin=-1, vmax=1)
    for line in (axis.axhline, axis.axvline):
        line(len(seen) - 0.5, color="black", linewidth=0.8)
    middles = [(len(seen) - 1) / 2, len(seen) + (len(absent) - 1) / 2]
    axis.set_xticks(middles, ["seen", "absent"])
    axis.set_yticks(middles, ["seen", "absent"])
    axis.figure.colorbar(image, ax=axis, label="Cosine between updates")
    return figure, axis
