"""Gamma from the maxima of equally many seen and absent logits."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from lightning_calibft.functional._group_logits import sorted_gaps
from lightning_calibft.functional._inputs import Groups, real_dtype
from lightning_calibft.metrics.mean_gap_estimator import MeanGapEstimator


class MatchedMaxima(MeanGapEstimator):
    r"""The gap between the expected maxima of equally many seen and absent logits.

    The average logit gap compares averages, but the prediction compares maxima, and the maximum of many classes is
    larger than the maximum of few. So both groups are reduced to the same number of classes,
    :math:`k = \min(|S| - 1, |U|)`:

    .. math::
        \gamma = \frac{1}{n} \sum_{i=1}^n \Big[ \mathop{\mathrm{E}}_{A \subset S \setminus y_i, |A| = k}
        \max_{c \in A} z_{ic} - \mathop{\mathrm{E}}_{A \subset U, |A| = k} \max_{c \in A} z_{ic} \Big]

    The expectations over random subsets have a closed form: the logit of rank :math:`j` (from 0, increasing) among
    :math:`m` is the maximum of :math:`\binom{j}{k - 1}` of the :math:`\binom{m}{k}` subsets. This estimator is
    original to this project. It corrects for the numbers of classes, but otherwise has the limitation of the average
    logit gap: it uses no samples of absent classes, so it cannot know how large their true-class logits are.

    The state is three numbers; an update sorts the logits of its batch. Input and output are those of
    :class:`~lightning_calibft.metrics.AverageLogitGap`, and so are the arguments.

    Args:
        num_classes: Number of classes ``C``, the width of the logits.
        seen_classes: Ids of the classes in the fine-tuning data, at least two.
        absent_classes: Ids of the classes missing from the fine-tuning data. ``None``: all classes that are not seen.
        kwargs: The other arguments of :class:`~lightning_calibft.metrics.AverageLogitGap`.

    Raises:
        ValueError: If there are fewer than two seen classes.

    Example:
        >>> import torch
        >>> from lightning_calibft.estimators import MatchedMaxima
        >>> metric = MatchedMaxima(6, seen_classes=[0, 1, 2])
        >>> metric.update(torch.tensor([[9.0, 2.0, 4.0, 0.0, -1.0, 1.0]]), torch.tensor([0]))
        >>> metric.compute()  # 4 minus the mean of 0, 1 and 1, the maxima of two absent logits
        tensor(3.3333, dtype=torch.float64)
    """

    def _gaps(self, preds: Tensor, target: Tensor) -> Tensor:
        return matched_maxima_gaps(preds, target, self._groups)


def matched_maxima_gaps(preds: Tensor, target: Tensor, groups: Groups) -> Tensor:
    """Return the expected maximum of ``k`` other seen logits minus that of ``k`` absent ones, ``(N,)``."""
    size = min(len(groups.seen) - 1, len(groups.absent))

    def gaps(others: Tensor, absent: Tensor) -> Tensor:
        return _expected_maximum(others, size) - _expected_maximum(absent, size)

    return sorted_gaps(gaps, preds, target, groups)


def _expected_maximum(values: Tensor, size: int) -> Tensor:
    """Return the mean maximum over all subsets of ``size`` columns. ``values (N, n)`` increase along the row."""
    largest = values[:, size - 1 :].to(real_dtype(values.device))
    return largest.mv(_shares_of_subsets(values.shape[1], size).to(largest))


@lru_cache
def _shares_of_subsets(count: int, size: int) -> Tensor:
    """Return the share of subsets of ``size`` whose largest rank is ``size - 1``, ..., ``count - 1``.

    From the largest rank down, each share is a simple fraction of the previous one, so binomial coefficients of
    hundreds of digits are never computed. The relative error of the j-th share is at most 2 j times that of one
    rounding.
    """
    shares = [size / count]
    for rank in range(count - 1, size - 1, -1):
        shares.append(shares[-1] * (rank - size + 1) / rank)
    return torch.tensor(shares[::-1], dtype=torch.float64)
