"""Accuracies of a group of samples among a group of classes, and the calibration of logits."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_calibft._arguments import check_choice, check_number
from lightning_calibft.functional._group_logits import reduce_batch, top_classes
from lightning_calibft.functional._inputs import (
    Average,
    Group,
    Groups,
    check_floating,
    prepare,
    real_dtype,
    warn_if_empty,
)
from lightning_calibft.split import ClassIds, ClassSplit


def calibrate_logits(
    logits: Tensor, gamma: float | Tensor, seen_classes: ClassIds, absent_classes: ClassIds | None = None
) -> Tensor:
    r"""Add gamma to the logits of the absent classes: :math:`z_c + \gamma \cdot [c \in U]`.

    Args:
        logits: Logits of shape ``(..., C)``.
        gamma: The number to add, usually positive.
        seen_classes: Ids of the classes in the fine-tuning data.
        absent_classes: Ids of the classes missing from the fine-tuning data. ``None``: all classes that are not seen.

    Returns:
        A new tensor with the shape and dtype of ``logits``. The sum is computed in at least float32.

    Raises:
        ValueError: If ``logits`` has no class dimension, or the classes do not match it.
        TypeError: If ``logits`` is not a floating point tensor, or ``gamma`` is not a number.

    Example:
        >>> import torch
        >>> from lightning_calibft.functional import calibrate_logits
        >>> calibrate_logits(torch.tensor([[2.0, 1.0, 0.5]]), 3.0, seen_classes=[0, 1])
        tensor([[2.0000, 1.0000, 3.5000]])
    """
    check_floating("logits", logits)
    number = check_number("gamma", gamma)
    if math.isnan(number):
        raise ValueError("Expected argument `gamma` to be a number, but got nan.")
    if logits.ndim == 0 or logits.shape[-1] < 2:
        raise ValueError(f"Expected argument `logits` to have shape (..., C), but got {tuple(logits.shape)}.")
    absent = ClassSplit(logits.shape[-1], seen_classes, absent_classes).absent_mask.to(logits.device)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    shifted = logits.to(dtype) + (gamma if isinstance(gamma, Tensor) else number)
    return torch.where(absent, shifted.to(logits.dtype), logits)


def split_accuracy(
    preds: Tensor,
    target: Tensor,
    seen_classes: ClassIds,
    absent_classes: ClassIds | None = None,
    *,
    samples: Group = "all",
    candidates: Group = "all",
    top_k: int = 1,
    average: Average = "micro",
    ignore_index: int | None = None,
    validate_args: bool = True,
) -> Tensor:
    r"""Accuracy :math:`Acc_{samples/candidates}` of the argmax among the candidate classes.

    The paper's :math:`Acc_{S/Y}` is ``samples="seen", candidates="all"``. Classes that are neither seen nor absent
    never compete, and their samples are not counted. Ties are broken as in :func:`torch.max`. A row with a NaN among
    the candidates counts as wrong.

    Args:
        preds: Logits of shape ``(N, C)``.
        target: Class ids of shape ``(N,)``.
        seen_classes: Ids of the classes in the fine-tuning data.
        absent_classes: Ids of the classes missing from the fine-tuning data. ``None``: all classes that are not seen.
        samples: Which samples to score: those of ``"all"``, ``"seen"`` or ``"absent"`` classes.
        candidates: The classes that the argmax chooses from.
        top_k: A sample is right if its true class has one of the ``top_k`` largest logits.
        average: ``"micro"`` weights samples equally, ``"macro"`` weights classes that have samples equally.
        ignore_index: Samples with this label are left out.
        validate_args: Whether to check the values of the tensors. ``False`` avoids a host synchronization.

    Returns:
        A float64 scalar in [0, 1], or NaN with a warning if no sample counts.

    Raises:
        ValueError: If an argument is out of range, or shapes or labels do not match.
        TypeError: If ``preds`` or ``target`` has the wrong dtype.

    Example:
        >>> import torch
        >>> from lightning_calibft.functional import split_accuracy
        >>> logits = torch.tensor([[3.0, 0.0, 1.0], [2.0, 0.0, 1.0]])
        >>> target = torch.tensor([0, 2])
        >>> split_accuracy(logits, target, [0, 1], samples="absent")
        tensor(0., dtype=torch.float64)
        >>> split_accuracy(logits, target, [0, 1], samples="absent", candidates="absent")
        tensor(1., dtype=torch.float64)
    """
    groups = prepare(preds, target, seen_classes, absent_classes, ignore_index, validate_args)
    check_accuracy_arguments(groups, samples, candidates, top_k, average)
    correct, total = accuracy_update(preds, target, groups, candidates, top_k, average, ignore_index)
    return accuracy_compute(correct, total, groups, samples, average)


def harmonic_mean_accuracy(
    preds: Tensor,
    target: Tensor,
    seen_classes: ClassIds,
    absent_classes: ClassIds | None = None,
    *,
    average: Average = "micro",
    ignore_index: int | None = None,
    validate_args: bool = True,
) -> Tensor:
    r"""Harmonic mean of :math:`Acc_{S/Y}` and :math:`Acc_{U/Y}`, both among all classes and at gamma 0.

    Args:
        preds: Logits of shape ``(N, C)``.
        target: Class ids of shape ``(N,)``.
        seen_classes: Ids of the classes in the fine-tuning data.
        absent_classes: Ids of the classes missing from the fine-tuning data. ``None``: all classes that are not seen.
        average: ``"micro"`` weights samples equally, ``"macro"`` weights classes that have samples equally.
        ignore_index: Samples with this label are left out.
        validate_args: Whether to check the values of the tensors. ``False`` avoids a host synchronization.

    Returns:
        A float64 scalar in [0, 1], 0 if both accuracies are 0, NaN with a warning if a group has no samples.

    Raises:
        ValueError: If an argument is out of range, or shapes or labels do not match.
        TypeError: If ``preds`` or ``target`` has the wrong dtype.

    Example:
        >>> import torch
        >>> from lightning_calibft.functional import harmonic_mean_accuracy
        >>> logits = torch.tensor([[3.0, 0.0, 1.0], [2.0, 0.0, 1.0], [0.0, 1.0, 2.0]])
        >>> harmonic_mean_accuracy(logits, torch.tensor([0, 2, 2]), seen_classes=[0, 1])
        tensor(0.6667, dtype=torch.float64)
    """
    groups = prepare(preds, target, seen_classes, absent_classes, ignore_index, validate_args)
    check_choice("average", average, ("micro", "macro"))
    correct, total = accuracy_update(preds, target, groups, "all", 1, average, ignore_index)
    return harmonic_compute(correct, total, groups, average)


def check_accuracy_arguments(groups: Groups, samples: str, candidates: Group, top_k: int, average: str) -> None:
    """Raise if an argument of the accuracy is out of range."""
    check_choice("samples", samples, ("all", "seen", "absent"))
    check_choice("candidates", candidates, ("all", "seen", "absent"))
    check_choice("average", average, ("micro", "macro"))
    limit = len(groups.classes(candidates))
    if isinstance(top_k, bool) or not isinstance(top_k, int) or not 1 <= top_k <= limit:
        raise ValueError(
            f"Expected argument `top_k` to be an integer in [1, {limit}], the number of candidate classes, but got"
            f" {top_k!r}."
        )


def accuracy_update(
    preds: Tensor,
    target: Tensor,
    groups: Groups,
    candidates: Group,
    top_k: int,
    average: Average,
    ignore_index: int | None,
    checked: bool = False,
) -> tuple[Tensor, Tensor]:
    """Count right and all samples: ``(2,)`` for seen and absent if micro, ``(C,)`` for each class if macro."""
    if top_k == 1:
        place, _, right, best = reduce_batch(preds, target, groups, ignore_index, preds.dtype, checked)
        if candidates == "all":
            right = best
        else:
            right &= groups.members[:, 0 if candidates == "seen" else 1].index_select(0, place)
    else:
        values, predicted = top_classes(preds, groups.classes(candidates), top_k)
        # A logit of -inf never wins, and topk puts NaN first.
        found = (predicted == target.long().unsqueeze(1)) & (values > -torch.inf)
        right, (_, place) = found.any(1) & ~values[:, 0].isnan(), groups.places(target, ignore_index)
    return count_right(right, place, groups, average)


def count_right(right: Tensor, place: Tensor, groups: Groups, average: Average) -> tuple[Tensor, Tensor]:
    """Count right and all samples: ``(2,)`` for seen and absent if micro, ``(C,)`` for each class if macro."""
    if average == "micro":
        members = groups.members.t().index_select(1, place)
        return (members & right).sum(1), members.sum(1)
    zeros = torch.zeros_like(groups.of_class)
    correct, total = zeros.index_add(0, place, right.long()), zeros.index_add(0, place, torch.ones_like(place))
    return correct[:-1], total[:-1]


def _mean(correct: Tensor, total: Tensor, groups: Groups, samples: Group, average: Average) -> Tensor:
    dtype = real_dtype(total.device)
    if average == "micro":
        chosen = {"all": slice(0, 2), "seen": slice(0, 1), "absent": slice(1, 2)}[samples]
        return correct[chosen].sum().to(dtype) / total[chosen].sum()
    classes = groups.classes(samples)
    classes = classes[total[classes] > 0]
    return (correct[classes].to(dtype) / total[classes]).mean()


def accuracy_compute(correct: Tensor, total: Tensor, groups: Groups, samples: Group, average: Average) -> Tensor:
    """Compute the accuracy of a group of samples from the counts of ``accuracy_update``."""
    value = _mean(correct, total, groups, samples, average)
    empty = bool(value.isnan())
    warn_if_empty(seen=empty and samples != "absent", absent=empty and samples != "seen")
    return value


def harmonic_compute(correct: Tensor, total: Tensor, groups: Groups, average: Average) -> Tensor:
    """Compute the harmonic mean of both groups' accuracies from the counts of ``accuracy_update``."""
    seen = _mean(correct, total, groups, "seen", average)
    absent = _mean(correct, total, groups, "absent", average)
    warn_if_empty(seen=bool(seen.isnan()), absent=bool(absent.isnan()))
    return harmonic_mean(seen, absent)


def harmonic_mean(a: Tensor, b: Tensor) -> Tensor:
    """Return the harmonic mean of numbers in [0, 1]: 0 if both are 0, NaN if either is NaN."""
    return torch.where(a + b > 0, 2 * a * b / (a + b), a + b)
