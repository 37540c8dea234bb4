"""Seen-unseen curves of several methods on one axis."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from lightning_calibft._arguments import check_items, check_number, check_type
from lightning_calibft.analysis._axes import _AX_TYPE, _PLOT_OUT_TYPE, new_axis
from lightning_calibft.functional import ausuc, seen_unseen_curve
from lightning_calibft.functional.seen_unseen_curve import point_at
from lightning_calibft.plotting import plot_seen_unseen_curve
from lightning_calibft.split import ClassIds


@dataclass(frozen=True)
class CurvePoint:
    """Where a gamma stands on a curve: accuracies of seen and of absent samples among all classes."""

    gamma: float
    seen_accuracy: float
    absent_accuracy: float


@dataclass(frozen=True)
class MethodCurve:
    """The seen-unseen curve of one method.

    Attributes:
        curve: Seen accuracy, absent accuracy and gamma; see :func:`lightning_calibft.functional.seen_unseen_curve`.
        ausuc: Area under it.
        points: Operating points by name.
    """

    curve: tuple[Tensor, Tensor, Tensor]
    ausuc: float
    points: dict[str, CurvePoint] = field(default_factory=dict)


def compare_curves(
    logits: Mapping[str, Tensor],
    target: Tensor,
    seen_classes: ClassIds,
    absent_classes: ClassIds | None = None,
    *,
    gammas: Mapping[str, Mapping[str, float]] | None = None,
) -> dict[str, MethodCurve]:
    """Seen-unseen curves of several methods, and where their gammas stand on them.

    Args:
        logits: Logits of shape ``(N, C)`` of each method, by its name, without gamma.
        target: Class ids of shape ``(N,)``, the same for all.
        seen_classes: Ids of the classes in the fine-tuning data.
        absent_classes: Ids of the classes that it lacks. ``None``: all that are not seen.
        gammas: Operating points of a method: gammas by their names. A method left out has gamma 0.

    Raises:
        ValueError: If ``gammas`` names no method, or as in :func:`lightning_calibft.functional.seen_unseen_curve`.

    Example:
        >>> import torch
        >>> from lightning_calibft.analysis import compare_curves
        >>> logits = torch.tensor([[3.0, 0.0, 1.0], [2.0, 0.0, 1.0], [0.0, 4.0, 1.0]])
        >>> methods = compare_curves(
        ...     {"fine-tuned": logits}, torch.tensor([0, 2, 1]), [0, 1], gammas={"fine-tuned": {"ALG": 1.5}}
        ... )
        >>> methods["fine-tuned"].points["ALG"]
        CurvePoint(gamma=1.5, seen_accuracy=1.0, absent_accuracy=1.0)
    """
    check_type("logits", logits, Mapping, " Give the logits of each method by its name.")
    gammas = {} if gammas is None else gammas
    check_type("gammas", gammas, Mapping)
    if unknown := sorted(gammas.keys() - logits.keys()):
        raise ValueError(
            f"Expected argument `gammas` to name methods of `logits`, {', '.join(map(repr, logits))}, but got"
            f" {unknown[0]!r}."
        )
    methods = {}
    for name, of_method in logits.items():
        curve = seen_unseen_curve(of_method, target, seen_classes, absent_classes)
        points = {}
        of_name = gammas.get(name, {"no calibration": 0.0})
        check_type("gammas", of_name, Mapping, " Give the gammas of each method by their names.")
        for text, gamma in of_name.items():
            gamma = check_number("gammas", gamma)
            seen, absent = point_at(*curve, gamma)
            points[text] = CurvePoint(gamma, seen.item(), absent.item())
        area = ausuc(of_method, target, seen_classes, absent_classes)
        methods[name] = MethodCurve(curve, area.item(), points)
    return methods


def plot_seen_unseen_curves(methods: Mapping[str, MethodCurve], *, ax: _AX_TYPE | None = None) -> _PLOT_OUT_TYPE:
    """Draw the curves of several methods on one axis, their operating points marked.

    Args:
        methods: From :func:`compare_curves`.
        ax: A matplotlib axis to draw on. ``None``: a new figure.

    Returns:
        Figure and axis; the figure is ``None`` if ``ax`` was given.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
    """
    check_type("methods", methods, Mapping)
    check_items("methods", list(methods.values()), MethodCurve)
    figure, axis = new_axis(ax)
    for name, method in methods.items():
        gammas = {f"{name}, {text}": point.gamma for text, point in method.points.items()}
        area = method.curve[0].new_tensor(method.ausuc)
        plot_seen_unseen_curve(method.curve, gammas=gammas, score=area, label=name, ax=axis)
    axis.legend(loc="lower left", fontsize="small")
    return figure, axis
