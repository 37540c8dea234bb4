"""Gamma from the soft maximum of the logits of each group."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from typing_extensions import Unpack

from lightning_calibft._arguments import check_number
from lightning_calibft.functional._group_logits import in_row_chunks, other_seen_logits
from lightning_calibft.functional._inputs import Groups, real_dtype
from lightning_calibft.metrics.absent_class_metric import MetricOptions
from lightning_calibft.metrics.mean_gap_estimator import MeanGapEstimator
from lightning_calibft.split import ClassIds


class LogSumExpGap(MeanGapEstimator):
    r"""The gap between the soft maximum of the seen logits and that of the absent ones, both per class.

    .. math::
        \gamma = \frac{T}{n} \sum_{i=1}^n \Big[
        \log \frac{1}{|S| - 1} \sum_{c \in S, c \neq y_i} e^{z_{ic} / T}
        - \log \frac{1}{|U|} \sum_{c \in U} e^{z_{ic} / T} \Big]

    With this gamma, a wrong seen class and an absent class get the same softmax probability on (geometric) average. A
    high temperature :math:`T` approaches the average logit gap, and a low one the gap of the maxima. This estimator is
    original to this project. It has the same limitation as the average logit gap: it uses no samples of absent classes.

    The state is three numbers; an update needs all logits of its batch at once. Input and output are those of
    :class:`~lightning_calibft.metrics.AverageLogitGap`.

    Args:
        num_classes: Number of classes ``C``, the width of the logits.
        seen_classes: Ids of the classes in the fine-tuning data, at least two.
        absent_classes: Ids of the classes missing from the fine-tuning data. ``None``: all classes that are not seen.
        temperature: The number that the logits are divided by; 1 is that of the softmax.
        kwargs: The other arguments of :class:`~lightning_calibft.metrics.AverageLogitGap`.

    Raises:
        ValueError: If there are fewer than two seen classes, or ``temperature`` is not positive and finite.

    Example:
        >>> import torch
        >>> from lightning_calibft.estimators import LogSumExpGap
        >>> metric = LogSumExpGap(6, seen_classes=[0, 1, 2])
        >>> metric.update(torch.tensor([[9.0, 3.0, 3.0, 1.0, 1.0, 1.0]]), torch.tensor([0]))
        >>> metric.compute()
        tensor(2.0000, dtype=torch.float64)
    """

    def __init__(
        self,
        num_classes: int,
        seen_classes: ClassIds,
        absent_classes: ClassIds | None = None,
        *,
        temperature: float = 1.0,
        **kwargs: Unpack[MetricOptions],
    ) -> None:
        temperature = check_number("temperature", temperature)
        if not 0 < temperature < math.inf:
            raise ValueError(f"Expected argument `temperature` to be positive and finite, but got {temperature}.")
        super().__init__(num_classes, seen_classes, absent_classes, **kwargs)
        self.temperature = temperature
        self._set_configuration(type(self).__name__, temperature)

    def _gaps(self, preds: Tensor, target: Tensor) -> Tensor:
        return log_sum_exp_gaps(preds, target, self._groups, self.temperature)


def log_sum_exp_gaps(preds: Tensor, target: Tensor, groups: Groups, temperature: float) -> Tensor:
    """Return the soft maximum of the other seen logits minus that of the absent ones, both per class, ``(N,)``."""
    dtype = real_dtype(preds.device)

    def soft_maximum(values: Tensor, count: int) -> Tensor:
        return temperature * (values.to(dtype).div_(temperature).logsumexp(1) - math.log(count))

    def gaps(preds: Tensor, target: Tensor) -> tuple[Tensor]:
        others = other_seen_logits(preds, target, groups, -torch.inf)
        absent = preds.index_select(1, groups.absent)
        return (soft_maximum(others, len(groups.seen) - 1) - soft_maximum(absent, len(groups.absent)),)

    return in_row_chunks(gaps, preds, target)[0]
