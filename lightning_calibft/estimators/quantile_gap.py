"""Gamma from a quantile of the logits of each group."""

from __future__ import annotations

import math

from torch import Tensor
from typing_extensions import Unpack

from lightning_calibft._arguments import check_number
from lightning_calibft.functional._group_logits import sorted_gaps
from lightning_calibft.functional._inputs import Groups, real_dtype
from lightning_calibft.metrics.absent_class_metric import MetricOptions
from lightning_calibft.metrics.mean_gap_estimator import MeanGapEstimator
from lightning_calibft.split import ClassIds


class QuantileGap(MeanGapEstimator):
    r"""The gap between a quantile of the seen logits and that of the absent ones.

    .. math::
        \gamma = \frac{1}{n} \sum_{i=1}^n \Big[ Q_q\big(z_{ic} : c \in S, c \neq y_i\big)
        - Q_q\big(z_{ic} : c \in U\big) \Big]

    The quantiles :math:`Q_q` interpolate linearly. This estimator is original to this project. With few classes, a high
    quantile is close to the maximum, and maxima of groups of different sizes are not comparable: see
    :class:`~lightning_calibft.estimators.MatchedMaxima`.

    The state is three numbers; an update sorts the logits of its batch. Input and output are those of
    :class:`~lightning_calibft.metrics.AverageLogitGap`.

    Args:
        num_classes: Number of classes ``C``, the width of the logits.
        seen_classes: Ids of the classes in the fine-tuning data, at least two.
        absent_classes: Ids of the classes missing from the fine-tuning data. ``None``: all classes that are not seen.
        quantile: The quantile to compare, in [0, 1].
        kwargs: The other arguments of :class:`~lightning_calibft.metrics.AverageLogitGap`.

    Raises:
        ValueError: If there are fewer than two seen classes, or ``quantile`` is not in [0, 1].

    Example:
        >>> import torch
        >>> from lightning_calibft.estimators import QuantileGap
        >>> metric = QuantileGap(6, seen_classes=[0, 1, 2], quantile=0.5)
        >>> metric.update(torch.tensor([[9.0, 2.0, 4.0, 0.0, -1.0, 1.0]]), torch.tensor([0]))
        >>> metric.compute()  # the medians: 3 minus 0
        tensor(3., dtype=torch.float64)
    """

    def __init__(
        self,
        num_classes: int,
        seen_classes: ClassIds,
        absent_classes: ClassIds | None = None,
        *,
        quantile: float = 0.9,
        **kwargs: Unpack[MetricOptions],
    ) -> None:
        quantile = check_number("quantile", quantile)
        if not 0 <= quantile <= 1:
            raise ValueError(f"Expected argument `quantile` to be in [0, 1], but got {quantile}.")
        super().__init__(num_classes, seen_classes, absent_classes, **kwargs)
        self.quantile = quantile
        self._set_configuration(type(self).__name__, quantile)

    def _gaps(self, preds: Tensor, target: Tensor) -> Tensor:
        return quantile_gaps(preds, target, self._groups, self.quantile)


def quantile_gaps(preds: Tensor, target: Tensor, groups: Groups, quantile: float) -> Tensor:
    """Return the quantile of the other seen logits minus that of the absent ones, ``(N,)``."""

    def gaps(others: Tensor, absent: Tensor) -> Tensor:
        return _quantile(others, quantile) - _quantile(absent, quantile)

    return sorted_gaps(gaps, preds, target, groups)


def _quantile(values: Tensor, quantile: float) -> Tensor:
    """Return a quantile of each row of ``values (N, n)``, which increase along the row, by linear interpolation."""
    # `torch.quantile` would sort again, and it accepts at most 16 million numbers.
    place = quantile * (values.shape[1] - 1)
    below = math.floor(place)
    above = min(below + 1, values.shape[1] - 1)
    low, high = (values[:, column].to(real_dtype(values.device)) for column in (below, above))
    return low.lerp(high, place - below)
