"""The style of all plots, and the plot of a seen-unseen curve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle, islice
from typing import Any, Literal

from torch import Tensor

# torchmetrics exports no public names for its plot types; every metric built on it imports these two.
from torchmetrics.utilities.plot import _AX_TYPE as _AX_TYPE, _PLOT_OUT_TYPE as _PLOT_OUT_TYPE, plot_curve

from lightning_calibft.functional.seen_unseen_curve import point_at
from lightning_calibft.functional.share_table import ShareTable

# One color and one marker for each role, in all plots. Readers with any kind of color blindness can tell all colors of
# this file apart, and each role stands out from white and from dark pages.
COLORS = {"seen": "#0072B2", "absent": "#D55E00", "all": "#8A8A8A", "gamma": "#000000"}
MARKERS = {"seen": "o", "absent": "^", "all": "s", "gamma": "D"}
# Curves of different methods. Each curve is that of all gammas, so a single one has the color of gamma.
CURVE_COLORS = (COLORS["gamma"], "#BE6BF5", "#41A363", "#71034E")
_CURVE_STYLES = ("-", "--", "-.", ":")
_POINT_MARKERS = "osD^vPX*"
_FILLS: tuple[Literal["full", "none", "left"], ...] = ("full", "none", "left")


def check_matplotlib() -> None:
    """Raise an error if matplotlib is not installed.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Plotting needs matplotlib. Install it, or install this package with its extra `plot`."
        ) from error


def new_axis(ax: _AX_TYPE | None) -> tuple[Any, Any]:
    """Return a new figure and its axis, or ``None`` and the axis that was given."""
    if ax is not None:
        return None, ax
    check_matplotlib()
    from matplotlib import pyplot as plt

    return plt.subplots(layout="constrained")


def add_legend(axis: Any, pad: float = 4.5, **kwargs: Any) -> None:
    """Put the legend below the axis, where it hides no data and leaves the axis its width on a narrow page.

    Args:
        axis: The matplotlib axis.
        pad: The distance to the axis, in font sizes. The labels of the axis stand in between.
        kwargs: Further arguments of ``axis.legend``.
    """
    axis.legend(loc="upper left", bbox_to_anchor=(0, 0), borderaxespad=pad, fontsize="small", frameon=False, **kwargs)


def draw_lines(
    axis: Any, steps: Sequence[int], lines: Mapping[str, tuple[Sequence[float], str, str]], ylabel: str
) -> None:
    """Draw values over training steps: ``lines`` maps each label to its values, its role, and its line style.

    Lines of one role differ in their style and in how their markers are filled.
    """
    fills = {role: cycle(_FILLS) for role in COLORS}
    for label, (values, role, style) in lines.items():
        look = {"color": COLORS[role], "marker": MARKERS[role], "fillstyle": next(fills[role]), "linestyle": style}
        axis.plot(steps, values, markersize=5, label=label, **look)
    axis.set(xlabel="Training step", ylabel=ylabel)
    axis.grid(alpha=0.4)
    add_legend(axis)


def plot_seen_unseen_curve(
    curve: tuple[Tensor, Tensor, Tensor],
    *,
    gammas: Mapping[str, float] | None = None,
    score: Tensor | None = None,
    label: str | None = None,
    name: str | None = None,
    ax: _AX_TYPE | None = None,
) -> _PLOT_OUT_TYPE:
    """Draw a seen-unseen curve and mark operating points on it.

    To compare several methods, call this once for each of them with its own ``label`` and the same ``ax``.

    Args:
        curve: Seen accuracy, absent accuracy, and gamma, from
            :func:`lightning_calibft.functional.seen_unseen_curve` or
            :class:`lightning_calibft.metrics.SeenUnseenCurve`.
        gammas: The operating points to mark: a gamma for each name in the legend.
        score: Area under the curve, shown in the legend.
        label: Name of the curve in the legend.
        name: Title of the axis.
        ax: A matplotlib axis to draw on. ``None``: a new figure.

    Returns:
        The figure and the axis. The figure is ``None`` if ``ax`` was given.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.

    Example:
        >>> import torch
        >>> from lightning_calibft.functional import seen_unseen_curve
        >>> from lightning_calibft.plotting import plot_seen_unseen_curve
        >>> generator = torch.Generator().manual_seed(0)
        >>> logits, target = torch.randn(50, 4, generator=generator), torch.randint(4, (50,), generator=generator)
        >>> curve = seen_unseen_curve(logits, target, seen_classes=[0, 1])
        >>> figure, ax = plot_seen_unseen_curve(curve, gammas={"no calibration": 0.0})  # doctest: +SKIP
    """
    seen, absent, gamma = (value.reshape(-1).detach().cpu() for value in curve)
    figure, axis = new_axis(ax)
    num_curves = sum(line.get_linestyle() != "None" for line in axis.get_lines())
    num_points = len(axis.get_lines()) - num_curves
    plot_curve(
        ([seen], [absent], [gamma]) if label else (seen, absent, gamma),
        score=score if score is None or not label else score.reshape(1),
        ax=axis,
        label_names=("Accuracy of seen classes among all", "Accuracy of absent classes among all"),
        labels=[label] if label else None,
        name=name,
    )
    line = axis.get_lines()[-1]
    line.set_color(CURVE_COLORS[num_curves % len(CURVE_COLORS)])
    rounds = num_curves // len(CURVE_COLORS)  # so that a color that returns has another style
    line.set_linestyle(_CURVE_STYLES[(num_curves + rounds) % len(_CURVE_STYLES)])
    markers = islice(cycle(_POINT_MARKERS), num_points, None)
    for (text, value), marker in zip((gammas or {}).items(), markers, strict=False):
        x, y = point_at(seen, absent, gamma, value)
        axis.plot(
            x,
            y,
            color=line.get_color(),
            marker=marker,
            markersize=9,
            markeredgecolor="white",
            linestyle="None",
            label=f"{text} (gamma {value:.3g})",
        )
    if axis.get_legend_handles_labels()[0]:
        add_legend(axis)
    return figure, axis


def plot_share_table(
    table: ShareTable,
    gamma: float,
    changes: tuple[float, float] | None = None,
    absent_share: float | None = None,
    break_even_share: float | None = None,
    ax: _AX_TYPE | None = None,
) -> _PLOT_OUT_TYPE:
    """Draw gamma and the expected accuracies over the share of samples of absent classes, and mark the gamma in use.

    Args:
        table: What is known of each share. Without accuracies, only gamma is drawn.
        gamma: The gamma in use.
        changes: What it is expected to change in the accuracies on samples of seen and of absent classes.
        absent_share: The share that it is for, which is marked.
        break_even_share: The share at which it begins to pay, which is marked.
        ax: A matplotlib axis to draw on. ``None``: a new figure.

    Returns:
        The figure and the axis of the accuracies, or of gamma if that is all. The figure is ``None`` if ``ax`` was
        given.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
    """
    figure, axis = new_axis(ax)
    shares, right = table.absent_share, axis
    if table.seen_accuracy is not None and table.absent_accuracy is not None:
        for role, values in (("seen", table.seen_accuracy), ("absent", table.absent_accuracy)):
            _draw_share(axis, shares, values, role, "-", f"accuracy on {role} samples")
        sides = zip(shares, table.seen_accuracy, table.absent_accuracy, strict=True)
        overall = [(1 - share) * seen + share * absent for share, seen, absent in sides]
        _draw_share(axis, shares, overall, "all", "-", "on all samples, gamma for this share")
        without = table.seen_accuracy_without, table.absent_accuracy_without
        if without[0] is not None and without[1] is not None:
            plain = [(1 - share) * without[0] + share * without[1] for share in shares]
            if changes is not None:
                pairs = zip(shares, plain, strict=True)
                fixed = [each + (1 - share) * changes[0] + share * changes[1] for share, each in pairs]
                _draw_share(axis, shares, fixed, "all", "--", f"on all samples, gamma {gamma:.3g}", "none")
            _draw_share(axis, shares, plain, "all", ":", "on all samples, without gamma", "left")
        axis.set(ylabel="Expected accuracy among all classes", ylim=(0, 1))
        right = axis.twinx()
    _draw_share(right, shares, table.gamma, "gamma", "-.", "gamma for this share")
    right.set(ylabel="Gamma")
    for share, style, text in ((absent_share, "-", "share in use"), (break_even_share, "--", "break-even share")):
        if share is not None and 0 < share < 1:
            axis.axvline(share, color=COLORS["gamma"], linestyle=style, linewidth=1, label=f"{text}, {share:.1%}")
    axis.set_xscale("logit")
    axis.set(xlabel="Share of samples of absent classes", xlim=(shares[0], shares[-1]))
    axis.set_xticks([0.001, 0.01, 0.1, 0.5, 0.9, 0.99, 0.999], ["0.1%", "1%", "10%", "50%", "90%", "99%", "99.9%"])
    axis.minorticks_off()
    axis.grid(alpha=0.4)
    handles, labels = axis.get_legend_handles_labels()
    if right is not axis:
        more = right.get_legend_handles_labels()
        handles, labels = [*handles, *more[0]], [*labels, *more[1]]
    add_legend(axis, handles=handles, labels=labels)
    return figure, axis


def _draw_share(
    axis: Any,
    shares: Sequence[float],
    values: Sequence[float],
    role: str,
    style: str,
    label: str,
    fill: Literal["full", "none", "left"] = "full",
) -> None:
    every = max(1, len(shares) // 10)
    look = {"color": COLORS[role], "marker": MARKERS[role], "fillstyle": fill, "linestyle": style}
    axis.plot(shares, values, markevery=every, markersize=5, label=label, **look)
