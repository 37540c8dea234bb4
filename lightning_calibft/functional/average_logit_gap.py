"""The average logit gap: gamma from the fine-tuning data alone."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics.utilities import rank_zero_warn

from lightning_calibft._arguments import check_absent_share
from lightning_calibft.functional._group_logits import in_row_chunks, rows_at_a_time
from lightning_calibft.functional._inputs import (
    Groups,
    prepare,
    warn_if_probabilities,
)
from lightning_calibft.split import ClassIds


class GammaEstimate(NamedTuple):
    """Gamma and how uncertain it is."""

    gamma: Tensor
    standard_error: Tensor


def average_logit_gap(
    preds: Tensor,
    target: Tensor,
    seen_classes: ClassIds,
    absent_classes: ClassIds | None = None,
    *,
    absent_share: float | None = None,
    ignore_index: int | None = None,
    validate_args: bool = True,
) -> GammaEstimate:
    r"""Estimate gamma as the average gap between seen and absent logits on the fine-tuning data.

    .. math::
        \gamma = \frac{1}{n} \sum_{i=1}^n \Big[ \frac{1}{|S| - 1} \sum_{c \in S, c \neq y_i} z_{ic}
        - \frac{1}{|U|} \sum_{c \in U} z_{ic} \Big]

    The logit of the true class is left out. Mai et al., "Fine-Tuning is Fine, if Calibrated", NeurIPS 2024, section 5.

    This treats all classes as equally frequent. If the share :math:`p` of samples of absent classes is known, the
    log-odds of the classes shift, as in the logit adjustment of Menon et al. (ICLR 2021), and gamma with them:

    .. math:: \gamma + \log \frac{p / |U|}{(1 - p) / |S|}

    Args:
        preds: Logits of shape ``(N, C)`` from the fine-tuned model in eval mode.
        target: Class ids of shape ``(N,)``. Samples whose label is not a seen class are left out.
        seen_classes: Ids of the classes in the fine-tuning data, at least two.
        absent_classes: Ids of the classes missing from the fine-tuning data. ``None``: all classes that are not seen.
        absent_share: The share of samples of absent classes that the model will meet, in (0, 1). ``None``: no shift, as
            in the paper.
        ignore_index: Samples with this label are left out.
        validate_args: Whether to check the values of the tensors. ``False`` avoids a host synchronization.

    Returns:
        Gamma and its standard error, the sample standard deviation of the gaps divided by :math:`\sqrt{n}`. Both are
        float64 scalars (float32 on devices without float64). Gamma is NaN with a warning if no sample counts.

    Raises:
        ValueError: If there are fewer than two seen classes, ``absent_share`` is not in (0, 1), or shapes or labels do
            not match.
        TypeError: If ``preds`` or ``target`` has the wrong dtype, or ``absent_share`` is not a number.

    Example:
        >>> import torch
        >>> from lightning_calibft.functional import average_logit_gap
        >>> logits = torch.tensor([[4.0, 1.0, -2.0], [2.0, 3.0, -1.0]])
        >>> average_logit_gap(logits, torch.tensor([0, 1]), seen_classes=[0, 1]).gamma
        tensor(3., dtype=torch.float64)
    """
    share = check_absent_share(absent_share)
    groups = prepare(preds, target, seen_classes, absent_classes, ignore_index, validate_args)
    check_seen_classes(len(groups.seen))
    if validate_args:
        warn_if_probabilities(preds)
    gaps, counted = average_gaps(preds, target, groups), groups.are_seen(target, ignore_index)
    gamma, standard_error = gap_compute(*gap_sums(gaps, counted))
    return GammaEstimate(gamma + prior_shift(share, len(groups.seen), len(groups.absent)), standard_error)


def prior_shift(absent_share: float | None, num_seen: int, num_absent: int) -> float:
    """Return the log-odds of an absent class against a seen one, 0 if the share of absent samples is not known."""
    return 0.0 if absent_share is None else math.log(absent_share / (1 - absent_share) * num_seen / num_absent)


def check_seen_classes(num_seen_classes: int) -> None:
    """Raise if no seen class is left when the true class is left out."""
    if num_seen_classes < 2:
        raise ValueError(
            "Expected argument `seen_classes` to hold at least 2 classes, but got 1. The estimate compares the absent"
            " classes with the seen classes other than the true one. With one seen class, set gamma by hand."
        )


def average_gaps(preds: Tensor, target: Tensor, groups: Groups, checked: bool = False) -> Tensor:
    """Return a gap for each sample, ``(N,)``. It is the average logit gap if the sample's class is seen.

    If labels are not ``checked``, they may be outside of ``[0, C)``.
    """
    preds, (column, _) = preds.detach(), groups.places(target, None, checked)
    own, weights = preds.gather(1, column.unsqueeze(1)).squeeze(1), groups.gap_weights
    # One buffer for all chunks: the memory of a new one would have to be mapped again.
    buffer = weights.new_empty(min(rows_at_a_time(preds, 2**16), preds.shape[0]), weights.shape[0])

    def reduce(chunk: Tensor) -> tuple[Tensor]:
        columns = chunk if groups.competing is None else chunk.index_select(1, groups.competing)
        return (buffer[: chunk.shape[0]].copy_(columns).mv(weights),)

    return in_row_chunks(reduce, preds)[0].sub_(own, alpha=1 / (groups.seen.shape[0] - 1))


def gap_sums(gaps: Tensor, counted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the number of counted samples, the sum of their gaps, and the sum of the squared gaps."""
    gaps = gaps.masked_fill(~counted, 0.0)
    return counted.sum(), gaps.sum(), gaps.dot(gaps)


def gap_compute(count: Tensor, total: Tensor, squares: Tensor) -> GammaEstimate:
    """Compute the mean of the gaps and its standard error."""
    if not count:
        rank_zero_warn("The estimate of gamma received no samples of seen classes, so gamma is NaN.")
    gamma = total / count
    variance = (squares - total * gamma).clamp(min=0) / (count - 1)
    return GammaEstimate(gamma, torch.where(count > 1, (variance / count).sqrt(), torch.nan))
