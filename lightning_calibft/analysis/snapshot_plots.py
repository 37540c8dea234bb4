"""Plots of what was measured over training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

from lightning_calibft._arguments import check_choice, check_items
from lightning_calibft.analysis.history import Evaluation, Snapshot
from lightning_calibft.analysis.logit_levels import GroupLevels
from lightning_calibft.analysis.weights import MeanSimilarity, RowNorms
from lightning_calibft.plotting import _AX_TYPE, _PLOT_OUT_TYPE, COLORS, draw_lines, new_axis

Quantity = Literal["accuracies", "absent_logits", "seen_logits", "row_norms", "updates"]


def plot_snapshots(snapshots: Sequence[Snapshot], quantity: Quantity, *, ax: _AX_TYPE | None = None) -> _PLOT_OUT_TYPE:
    """Draw one quantity over training.

    Args:
        snapshots: The snapshots of a fit in order, as in ``CalibrationDiagnostics.snapshots``.
        quantity: What to draw. ``"accuracies"``: accuracies and AUSUC. ``"absent_logits"`` or ``"seen_logits"``: the
            mean logits of absent or seen samples, as from :func:`logit_levels`. ``"row_norms"``: the mean norms of the
            head's rows and one standard deviation around them, as from :func:`row_norms`. ``"updates"``: the mean
            cosines between the updates of the head's rows, as from :func:`update_similarity`.
        ax: A matplotlib axis to draw on. ``None``: a new figure.

    Returns:
        The figure and the axis. The figure is ``None`` if ``ax`` was given.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
        ValueError: If no snapshot holds this quantity.

    Example:
        >>> import torch
        >>> from lightning_calibft.analysis import Snapshot, plot_snapshots, row_norms
        >>> weights = [torch.eye(3), 2 * torch.eye(3)]
        >>> snapshots = [
        ...     Snapshot(epoch=step, step=step, norms=row_norms(weight, [0, 1])) for step, weight in enumerate(weights)
        ... ]
        >>> figure, ax = plot_snapshots(snapshots, "row_norms")  # doctest: +SKIP
    """
    check_items("snapshots", snapshots, Snapshot)
    check_choice("quantity", quantity, get_args(Quantity))
    if not (measured := measured_steps(snapshots, quantity)):
        raise ValueError(f"Expected argument `snapshots` to hold {quantity!r} of at least one step, but got none.")
    figure, axis = new_axis(ax)
    steps, values = zip(*measured, strict=True)
    _PLOTS[quantity].draw(axis, steps, values)
    return figure, axis


def measured_steps(snapshots: Sequence[Snapshot], quantity: Quantity) -> list[tuple[int, Any]]:
    """Return the steps at which a quantity was measured, with its values."""
    values = ((each.step, _PLOTS[quantity].read(each)) for each in snapshots)
    return [(step, value) for step, value in values if value is not None]


def _draw_accuracies(axis: Any, steps: Sequence[int], evaluations: Sequence[Evaluation]) -> None:
    lines = {
        "Acc_S/Y": ([each.groups.seen_among_all for each in evaluations], "seen", "-"),
        "Acc_U/Y": ([each.groups.absent_among_all for each in evaluations], "absent", "-"),
        "Acc_U/U": ([each.groups.absent_among_absent for each in evaluations], "absent", "--"),
        "Acc_Y/Y": ([each.overall for each in evaluations], "all", "-"),
        "Acc_Y/Y with the best gamma": ([each.best_overall for each in evaluations], "all", "--"),
        "AUSUC": ([each.ausuc for each in evaluations], "all", ":"),
    }
    draw_lines(axis, steps, lines, "Accuracy or area")


def _draw_logits(samples: str, axis: Any, steps: Sequence[int], levels: Sequence[GroupLevels]) -> None:
    lines = {
        "true class": ([each.true for each in levels], samples, "-"),
        "largest other seen class": ([each.other_seen for each in levels], "seen", "--"),
        "largest other absent class": ([each.other_absent for each in levels], "absent", "--"),
    }
    draw_lines(axis, steps, lines, "Mean logit")


def _draw_norms(axis: Any, steps: Sequence[int], norms: Sequence[RowNorms]) -> None:
    for group, bounds in (
        ("seen", [(each.seen_mean - each.seen_std, each.seen_mean + each.seen_std) for each in norms]),
        ("absent", [(each.absent_mean - each.absent_std, each.absent_mean + each.absent_std) for each in norms]),
    ):
        axis.fill_between(steps, *zip(*bounds, strict=True), color=COLORS[group], alpha=0.15)
    lines = {
        "seen classes": ([each.seen_mean for each in norms], "seen", "-"),
        "absent classes": ([each.absent_mean for each in norms], "absent", "-"),
    }
    draw_lines(axis, steps, lines, "L2 norm of the head's rows")


def _draw_updates(axis: Any, steps: Sequence[int], means: Sequence[MeanSimilarity]) -> None:
    axis.axhline(0, color="black", linewidth=0.8, zorder=0)
    lines = {
        "two seen classes": ([each.within_seen for each in means], "seen", "-"),
        "two absent classes": ([each.within_absent for each in means], "absent", "-"),
        "a seen and an absent class": ([each.between for each in means], "all", "--"),
    }
    draw_lines(axis, steps, lines, "Mean cosine between updates")


class _Plot(NamedTuple):
    """How to read a quantity from a snapshot (``None``: not measured), and how to draw it."""

    read: Callable[[Snapshot], Any]
    draw: Callable[[Any, Sequence[int], Sequence[Any]], None]


def _if_any(levels: GroupLevels) -> GroupLevels | None:
    return levels if levels.num_samples else None


_PLOTS: dict[Quantity, _Plot] = {
    "accuracies": _Plot(lambda each: each.evaluation, _draw_accuracies),
    "absent_logits": _Plot(lambda each: each.levels and _if_any(each.levels.absent), partial(_draw_logits, "absent")),
    "seen_logits": _Plot(lambda each: each.levels and _if_any(each.levels.seen), partial(_draw_logits, "seen")),
    "row_norms": _Plot(lambda each: each.norms, _draw_norms),
    "updates": _Plot(lambda each: each.updates, _draw_updates),
}
