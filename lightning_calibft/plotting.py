"""Drawing the seen-unseen curve."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

# torchmetrics exports no public names for its plot types; every metric built on it imports these two.
from torchmetrics.utilities.plot import _AX_TYPE, _PLOT_OUT_TYPE, plot_curve

from lightning_calibft.functional.seen_unseen_curve import point_at


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

    Several methods go on one axis by calling this once for each, with its ``label`` and the same ``ax``.

    Args:
        curve: Seen accuracy, absent accuracy and gamma, from :func:`lightning_calibft.functional.seen_unseen_curve` or
            :class:`lightning_calibft.metrics.SeenUnseenCurve`.
        gammas: Operating points to mark, by their name in the legend.
        score: Area under the curve, added to the legend.
        label: Name of the curve in the legend.
        name: Title of the axis.
        ax: A matplotlib axis to draw on. ``None``: a new figure.

    Returns:
        Figure and axis; the figure is ``None`` if ``ax`` was given.

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
    figure, axes = plot_curve(
        ([seen], [absent], [gamma]) if label else (seen, absent, gamma),
        score=score if score is None or not label else score.reshape(1),
        ax=ax,
        label_names=("Accuracy of seen classes among all", "Accuracy of absent classes among all"),
        labels=[label] if label else None,
        name=name,
    )
    axis: Any = axes  # one axis, though the type says array as well
    for text, value in (gammas or {}).items():
        x, y = point_at(seen, absent, gamma, value)
        axis.plot(x, y, marker="o", linestyle="None", label=f"{text} (gamma {value:.3g})")
    if axis.get_legend_handles_labels()[0]:
        axis.legend()
    return figure, axis
