"""Seen-unseen curves of several methods."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from lightning_calibft._arguments import check_number, check_type
from lightning_calibft.functional import ausuc, seen_unseen_curve
from lightning_calibft.functional.seen_unseen_curve import point_at
from lightning_calibft.metrics import AUSUC, SeenUnseenCurve
from lightning_calibft.plotting import _AX_TYPE, _PLOT_OUT_TYPE, plot_seen_unseen_curve
from lightning_calibft.split import ClassIds


@dataclass(frozen=True)
class CurvePoint:
    """The point of a gamma on a curve: the accuracies of seen and of absent samples among all classes."""

    gamma: float
    seen_accuracy: float
    absent_accuracy: float


@dataclass(frozen=True)
class MethodCurve:
    """The seen-unseen curve of one method.

    Attributes:
        name: Name of the method.
        curve: Seen accuracy, absent accuracy, and gamma; see :func:`lightning_calibft.functional.seen_unseen_curve`.
        ausuc: Area under it.
        points: Operating points by name.
    """

    name: str
    curve: tuple[Tensor, Tensor, Tensor]
    ausuc: float
    points: dict[str, CurvePoint]

    def plot(self, ax: _AX_TYPE | None = None) -> _PLOT_OUT_TYPE:
        """Draw the curve and mark its operating points.

        To compare methods, draw them on the same axis. Returns a new figure and its axis, or ``None`` and ``ax`` if it
        was given.
        """
        gammas = {f"{self.name}, {text}": point.gamma for text, point in self.points.items()}
        area = self.curve[0].new_tensor(self.ausuc)
        return plot_seen_unseen_curve(self.curve, gammas=gammas, score=area, label=self.name, ax=ax)


def curve_of(metric: AUSUC, name: str, gammas: Mapping[str, float]) -> MethodCurve:
    """Return the curve of the samples that a metric was updated with, and the points of some gammas on it."""
    seen, absent, gamma = (value.cpu() for value in SeenUnseenCurve.compute(metric))
    points = {
        text: CurvePoint(at, *(accuracy.item() for accuracy in point_at(seen, absent, gamma, at)))
        for text, at in gammas.items()
    }
    return MethodCurve(name, (seen, absent, gamma), metric.compute().item(), points)


def compare_curves(
    preds: Mapping[str, Tensor],
    target: Tensor,
    seen_classes: ClassIds,
    absent_classes: ClassIds | None = None,
    *,
    gammas: Mapping[str, Mapping[str, float]] | None = None,
) -> dict[str, MethodCurve]:
    """Return the seen-unseen curve of each method, and the points of its gammas on the curve.

    Args:
        preds: Logits without gamma, of shape ``(N, C)``, for the name of each method.
        target: Class ids of shape ``(N,)``, the same for all methods.
        seen_classes: Ids of the classes in the fine-tuning data.
        absent_classes: Ids of the classes that it lacks. ``None``: all classes that are not seen.
        gammas: Operating points of a method: a gamma for each name. Methods that are not in it have one, at gamma 0.

    Raises:
        ValueError: If ``gammas`` names an unknown method, or as in
            :func:`lightning_calibft.functional.seen_unseen_curve`.

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
    check_type("preds", preds, Mapping, " Pass a dict with the logits of each method.")
    gammas = {} if gammas is None else gammas
    check_type("gammas", gammas, Mapping)
    if unknown := sorted(gammas.keys() - preds.keys()):
        raise ValueError(
            f"Expected argument `gammas` to name methods of `preds`, {', '.join(map(repr, preds))}, but got"
            f" {unknown[0]!r}."
        )
    methods = {}
    for name, of_method in preds.items():
        curve = seen_unseen_curve(of_method, target, seen_classes, absent_classes)
        points = {}
        of_name = gammas.get(name, {"no calibration": 0.0})
        check_type("gammas", of_name, Mapping, " Pass a dict with the gammas of each method.")
        for text, gamma in of_name.items():
            gamma = check_number("gammas", gamma)
            seen, absent = point_at(*curve, gamma)
            points[text] = CurvePoint(gamma, seen.item(), absent.item())
        area = ausuc(of_method, target, seen_classes, absent_classes)
        methods[name] = MethodCurve(name, curve, area.item(), points)
    return methods
