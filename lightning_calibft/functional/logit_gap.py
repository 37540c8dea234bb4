"""The average logit gap: gamma from the fine-tuning data alone."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor
from torchmetrics.utilities import rank_zero_warn

from lightning_calibft.functional._inputs import _SEEN, Groups, prepare, real_dtype, warn_if_probabilities
from lightning_calibft.split import ClassIds


@overload
def average_logit_gap(
    logits: Tensor,
    target: Tensor,
    seen_classes: ClassIds,
    absent_classes: ClassIds | None = None,
    *,
    return_standard_error: Literal[False] = False,
    ignore_index: int | None = None,
    validate_args: bool = True,
) -> Tensor: ...


@overload
def average_logit_gap(
    logits: Tensor,
    target: Tensor,
    seen_classes: ClassIds,
    absent_classes: ClassIds | None = None,
    *,
    return_standard_error: Literal[True],
    ignore_index: int | None = None,
    validate_args: bool = True,
) -> tuple[Tensor, Tensor]: ...


def average_logit_gap(
    logits: Tensor,
    target: Tensor,
    seen_classes: ClassIds,
    absent_classes: ClassIds | None = None,
    *,
    return_standard_error: bool = False,
    ignore_index: int | None = None,
    validate_args: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Estimate gamma by how far the absent logits lie below the seen ones on the fine-tuning data.

    .. math::
        \gamma = \frac{1}{n} \sum_{i=1}^n \Big[ \frac{1}{|S| - 1} \sum_{c \in S, c \neq y_i} z_{ic}
        - \frac{1}{|U|} \sum_{c \in U} z_{ic} \Big]

    The logit of the true class is left out. Mai et al., "Fine-Tuning is Fine, if Calibrated", NeurIPS 2024, section 5.

    Args:
        logits: Logits of shape ``(N, C)`` from the fine-tuned model in eval mode.
        target: Class ids of shape ``(N,)``. Samples whose label is not a seen class are left out.
        seen_classes: Ids of the at least two classes in the fine-tuning data.
        absent_classes: Ids of the classes that it lacks. ``None``: all that are not seen.
        return_standard_error: Whether to return the standard error of the mean as well.
        ignore_index: A label whose samples are left out.
        validate_args: Whether to check the values of the tensors. ``False`` avoids a host synchronisation.

    Returns:
        Gamma, a float64 scalar (float32 on devices without float64), NaN with a warning if no sample counts; with
        ``return_standard_error`` the pair of gamma and its standard error, the sample standard deviation of the gaps
        over :math:`\sqrt{n}`.

    Raises:
        ValueError: If there are fewer than two seen classes, or shapes or labels do not fit.
        TypeError: If ``logits`` or ``target`` has the wrong dtype.

    Example:
        >>> import torch
        >>> from lightning_calibft.functional import average_logit_gap
        >>> logits = torch.tensor([[4.0, 1.0, -2.0], [2.0, 3.0, -1.0]])
        >>> average_logit_gap(logits, torch.tensor([0, 1]), seen_classes=[0, 1])
        tensor(3., dtype=torch.float64)
    """
    groups = prepare(logits, target, seen_classes, absent_classes, ignore_index, validate_args)
    check_seen_classes(len(groups.seen))
    if validate_args:
        warn_if_probabilities(logits)
    # Row chunks bound the float64 copies.
    rows = max(1, 2**22 // logits.shape[1])
    parts = [
        gap_update(part, labels, groups, ignore_index)
        for part, labels in zip(logits.split(rows), target.split(rows), strict=True)
    ]
    count, total, squares = (torch.stack(sums).sum(0) for sums in zip(*parts, strict=True))
    gamma, standard_error = gap_compute(count, total, squares)
    return (gamma, standard_error) if return_standard_error else gamma


def check_seen_classes(num_seen_classes: int) -> None:
    """Raise if no seen class is left once the true class is taken out."""
    if num_seen_classes < 2:
        raise ValueError(
            "Expected argument `seen_classes` to hold at least 2 classes, but got 1. The average logit gap compares"
            " the absent classes with the seen classes other than the true one: choose gamma in another way."
        )


def gap_update(
    logits: Tensor, target: Tensor, groups: Groups, ignore_index: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Number of samples, sum of their gaps and sum of the squares."""
    logits, dtype = logits.detach(), real_dtype(logits.device)
    counted = groups.of_samples(target, ignore_index) == _SEEN
    own = logits.gather(1, target.long().clamp(0, logits.shape[1] - 1).unsqueeze(1)).squeeze(1).to(dtype)
    seen = logits.index_select(1, groups.seen).sum(1, dtype=dtype)
    absent = logits.index_select(1, groups.absent).sum(1, dtype=dtype)
    gap = (seen - own) / (len(groups.seen) - 1) - absent / len(groups.absent)
    gap = torch.where(counted, gap, 0.0)
    return counted.sum(), gap.sum(), gap.square().sum()


def gap_compute(count: Tensor, total: Tensor, squares: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of the gaps and its standard error."""
    if not count:
        rank_zero_warn("The average logit gap met no sample of a seen class, so gamma is NaN.")
    gamma = total / count
    variance = (squares - total * gamma).clamp(min=0) / (count - 1)
    return gamma, torch.where(count > 1, (variance / count).sqrt(), torch.nan)
