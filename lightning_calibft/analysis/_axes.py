"""What the drawing functions share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

# torchmetrics exports no public names for its plot types; every metric built on it imports these two.
from torchmetrics.utilities.plot import _AX_TYPE, _PLOT_OUT_TYPE

from lightning_calibft._arguments import check_items

__all__ = ["COLORS", "_AX_TYPE", "_PLOT_OUT_TYPE", "check_matplotlib", "check_series", "draw_lines", "new_axis"]

# The same for every picture: what is of seen classes, of absent ones, and of both.
COLORS = {"seen": "tab:blue", "absent": "tab:orange", "both": "0.4"}


def check_matplotlib() -> None:
    """Refuse to go on without matplotlib.

    Raises:
        ModuleNotFoundError: If it is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Expected matplotlib to be installed for pictures. Install it, or this package with its extra `plot`."
        ) from error


def new_axis(ax: _AX_TYPE | None) -> tuple[Any, Any]:
    """Return a new figure and its axis, or no figure and the axis that was given."""
    if ax is not None:
        return None, ax
    check_matplotlib()
    from matplotlib import pyplot as plt

    return plt.subplots(layout="constrained")


def check_series(steps: object, name: str, values: object, kind: type) -> None:
    """Refuse what are not as many training steps as things measured at them.

    Raises:
        TypeError: If ``steps`` are no integers, or the argument ``name`` holds other things than of this ``kind``.
        ValueError: If there are more of one than of the other.
    """
    check_items(name, values, kind)
    check_items("steps", steps, int)
    if len(cast(Sequence[int], steps)) != len(cast(Sequence[Any], values)):
        raise ValueError(f"Expected argument `steps` to hold one step for each of `{name}`, but got {steps!r}.")


def draw_lines(
    axis: Any, steps: Sequence[int], lines: Mapping[str, tuple[Sequence[float], str, str]], ylabel: str
) -> None:
    """Draw numbers over training: by their name in the legend the values, the colour and the style."""
    for label, (values, color, style) in lines.items():
        axis.plot(steps, values, color=color, linestyle=style, marker=".", label=label)
    axis.set(xlabel="Training step", ylabel=ylabel)
    axis.grid(alpha=0.4)
    axis.legend(fontsize="small")
