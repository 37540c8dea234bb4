"""A gamma that is already known."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from typing_extensions import Unpack

from lightning_calibft._arguments import check_number
from lightning_calibft.functional._inputs import real_dtype
from lightning_calibft.metrics.absent_class_metric import MetricOptions
from lightning_calibft.metrics.mean_gap_estimator import MeanGapEstimator
from lightning_calibft.split import ClassIds


class FixedGamma(MeanGapEstimator):
    """A gamma that is already known, for example from an earlier run or a sweep. The samples are only counted.

    Input and output are those of :class:`~lightning_calibft.metrics.AverageLogitGap`. The standard error is 0.

    Args:
        num_classes: Number of classes ``C``, the width of the logits.
        seen_classes: Ids of the classes in the fine-tuning data, at least two.
        absent_classes: Ids of the classes missing from the fine-tuning data. ``None``: all classes that are not seen.
        gamma: The number to add to the logits of the absent classes.
        kwargs: The other arguments of :class:`~lightning_calibft.metrics.AverageLogitGap`.

    Raises:
        ValueError: If there are fewer than two seen classes, or ``gamma`` is not finite.

    Example:
        >>> import torch
        >>> from lightning_calibft.estimators import FixedGamma
        >>> metric = FixedGamma(3, seen_classes=[0, 1], gamma=2.5)
        >>> metric.update(torch.tensor([[4.0, 1.0, -2.0]]), torch.tensor([0]))
        >>> metric.compute(), metric.num_samples
        (tensor(2.5000, dtype=torch.float64), 1)
    """

    def __init__(
        self,
        num_classes: int,
        seen_classes: ClassIds,
        absent_classes: ClassIds | None = None,
        *,
        gamma: float,
        **kwargs: Unpack[MetricOptions],
    ) -> None:
        gamma = check_number("gamma", gamma)
        if not math.isfinite(gamma):
            raise ValueError(f"Expected argument `gamma` to be finite, but got {gamma}.")
        super().__init__(num_classes, seen_classes, absent_classes, **kwargs)
        self.gamma = gamma
        self._set_configuration(type(self).__name__, gamma)

    def _gaps(self, preds: Tensor, target: Tensor) -> Tensor:
        return torch.full((len(preds),), self.gamma, dtype=real_dtype(preds.device), device=preds.device)

    def compute(self) -> Tensor:
        """Return gamma."""
        return torch.full_like(super().compute(), self.gamma)

    @property
    def standard_error(self) -> Tensor:
        """Standard error of gamma, always 0."""
        return torch.zeros_like(self.compute())
