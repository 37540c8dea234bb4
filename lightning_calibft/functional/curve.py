"""The seen-unseen curve: every trade-off between seen and absent classes that some gamma reaches."""

from __future__ import annotations

from torch import Tensor

from lightning_calibft._arguments import check_choice
from lightning_calibft.functional._curve import (
    Criterion,
    Curve,
    Goal,
    curve_area,
    curve_best_gamma,
    curve_compute,
    curve_update,
    to_real,
)
from lightning_calibft.functional._inputs import Average, prepare, warn_if_probabilities
from lightning_calibft.split import ClassIds


def seen_unseen_curve(
    logits: Tensor,
    target: Tensor,
    seen_classes: ClassIds,
    absent_classes: ClassIds | None = None,
    *,
    average: Average = "micro",
    ignore_index: int | None = None,
    validate_args: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Accuracies :math:`(Acc_{S/Y}, Acc_{U/Y})` for every gamma added to the absent logits.

    The margin of a sample is :math:`m_i = \max_{c \in S} z_{ic} - \max_{c \in U} z_{ic}`. A sample that is right among
    the classes of its own group is right among all while :math:`\gamma < m_i` (seen) or :math:`\gamma > m_i` (absent),
    so the accuracies only change at the margins of such samples. One sort gives them all: O(N log N).
    Chao et al., "An Empirical Study and Analysis of Generalized Zero-Shot Learning", ECCV 2016.

    Args:
        logits: Logits of shape ``(N, C)``.
        target: Class ids of shape ``(N,)``.
        seen_classes: Ids of the classes in the fine-tuning data.
        absent_classes: Ids of the classes that it lacks. ``None``: all that are not seen.
        average: ``"micro"`` weighs samples equally, ``"macro"`` classes that have samples.
        ignore_index: A label whose samples are left out.
        validate_args: Whether to check the values of the tensors. ``False`` avoids a host synchronisation.

    Returns:
        ``seen_accuracy (K + 1,)``, falling to 0, ``absent_accuracy (K + 1,)``, rising from 0, and ``gamma (K,)``, the
        distinct margins in increasing order. Point ``k`` holds for gamma between ``gamma[k - 1]`` and ``gamma[k]``.
        All float64. A group without samples is NaN, with a warning.

    Raises:
        ValueError: If an argument is out of its range, or shapes or labels do not fit.
        TypeError: If ``logits`` or ``target`` has the wrong dtype.

    Example:
        >>> import torch
        >>> from lightning_calibft.functional import seen_unseen_curve
        >>> logits = torch.tensor([[3.0, 0.0, 1.0], [2.0, 0.0, 1.0], [0.0, 4.0, 1.0]])
        >>> seen, absent, gamma = seen_unseen_curve(logits, torch.tensor([0, 2, 1]), seen_classes=[0, 1])
        >>> seen.tolist(), absent.tolist(), gamma.tolist()
        ([1.0, 1.0, 0.5, 0.0], [0.0, 1.0, 1.0, 1.0], [1.0, 2.0, 3.0])
    """
    curve = _curve(logits, target, seen_classes, absent_classes, average, ignore_index, validate_args)
    seen, absent, gamma = (to_real(value, logits.device) for value in curve[:3])
    return seen, absent, gamma


def ausuc(
    logits: Tensor,
    target: Tensor,
    seen_classes: ClassIds,
    absent_classes: ClassIds | None = None,
    *,
    average: Average = "micro",
    ignore_index: int | None = None,
    validate_args: bool = True,
) -> Tensor:
    """Area under the seen-unseen curve, by the trapezoidal rule in the order of gamma.

    It judges the features apart from gamma: no calibration by one number changes it.

    Args:
        logits: Logits of shape ``(N, C)``.
        target: Class ids of shape ``(N,)``.
        seen_classes: Ids of the classes in the fine-tuning data.
        absent_classes: Ids of the classes that it lacks. ``None``: all that are not seen.
        average: ``"micro"`` weighs samples equally, ``"macro"`` classes that have samples.
        ignore_index: A label whose samples are left out.
        validate_args: Whether to check the values of the tensors. ``False`` avoids a host synchronisation.

    Returns:
        A float64 scalar in [0, 1], NaN with a warning if a group has no samples.

    Raises:
        ValueError: If an argument is out of its range, or shapes or labels do not fit.
        TypeError: If ``logits`` or ``target`` has the wrong dtype.

    Example:
        >>> import torch
        >>> from lightning_calibft.functional import ausuc
        >>> logits = torch.tensor([[3.0, 0.0, 1.0], [2.0, 0.0, 1.0], [0.0, 4.0, 1.0]])
        >>> ausuc(logits, torch.tensor([0, 2, 1]), seen_classes=[0, 1])
        tensor(1., dtype=torch.float64)
    """
    curve = _curve(logits, target, seen_classes, absent_classes, average, ignore_index, validate_args)
    return to_real(curve_area(curve.seen, curve.absent), logits.device)


def best_gamma(
    logits: Tensor,
    target: Tensor,
    seen_classes: ClassIds,
    absent_classes: ClassIds | None = None,
    *,
    criterion: Criterion = "accuracy",
    min_seen_accuracy: float | None = None,
    min_absent_accuracy: float | None = None,
    average: Average = "micro",
    ignore_index: int | None = None,
    validate_args: bool = True,
) -> Tensor:
    """The gamma that is best on these labelled samples, which must hold both seen and absent classes.

    On test data this is an oracle, not a method.

    Args:
        logits: Logits of shape ``(N, C)``.
        target: Class ids of shape ``(N,)``.
        seen_classes: Ids of the classes in the fine-tuning data.
        absent_classes: Ids of the classes that it lacks. ``None``: all that are not seen.
        criterion: ``"accuracy"`` of all samples, the ``"harmonic_mean"`` of both groups' accuracies, or
            ``"equal_accuracies"``, where those differ least.
        min_seen_accuracy: Only gammas with at least this accuracy of the seen samples, among all classes, count.
        min_absent_accuracy: The same for the absent samples.
        average: ``"micro"`` weighs samples equally, ``"macro"`` classes that have samples.
        ignore_index: A label whose samples are left out.
        validate_args: Whether to check the values of the tensors. ``False`` avoids a host synchronisation.

    Returns:
        A float64 scalar: the middle of the first best interval. If that is unbounded, 0 where it holds 0, else its
        finite end moved outwards by one logit. NaN with a warning if a group has no samples.

    Raises:
        ValueError: If an argument is out of its range, shapes or labels do not fit, or no gamma has the accuracies
            asked for.
        TypeError: If ``logits`` or ``target`` has the wrong dtype.

    Example:
        >>> import torch
        >>> from lightning_calibft.functional import best_gamma
        >>> logits = torch.tensor([[3.0, 0.0, 1.0], [2.0, 0.0, 1.0], [0.0, 4.0, 1.0]])
        >>> best_gamma(logits, torch.tensor([0, 2, 1]), seen_classes=[0, 1])
        tensor(1.5000, dtype=torch.float64)
    """
    goal = Goal(criterion, min_seen_accuracy, min_absent_accuracy)
    curve = _curve(logits, target, seen_classes, absent_classes, average, ignore_index, validate_args)
    return to_real(curve_best_gamma(curve, goal), logits.device)


def _curve(
    logits: Tensor,
    target: Tensor,
    seen_classes: ClassIds,
    absent_classes: ClassIds | None,
    average: Average,
    ignore_index: int | None,
    validate_args: bool,
) -> Curve:
    check_choice("average", average, ("micro", "macro"))
    groups = prepare(logits, target, seen_classes, absent_classes, ignore_index, validate_args)
    if validate_args:
        warn_if_probabilities(logits)
    return curve_compute(*curve_update(logits, target, groups, ignore_index), groups.of_class, average)
