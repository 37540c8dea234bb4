"""The base class of estimators whose gamma is a mean over samples, which keep only three sums."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import Unpack

from lightning_calibft.functional.average_logit_gap import gap_compute, gap_sums
from lightning_calibft.metrics.absent_class_metric import MetricOptions
from lightning_calibft.metrics.gamma_estimator import GammaEstimator
from lightning_calibft.split import ClassIds


class MeanGapEstimator(GammaEstimator):
    """Base class of the estimators whose gamma is the mean of one number for each sample of a seen class.

    The state is three numbers. After ``compute`` on all processes, :attr:`standard_error` and :attr:`num_samples` need
    no further communication.
    """

    count: Tensor
    total: Tensor
    squares: Tensor

    def __init__(
        self,
        num_classes: int,
        seen_classes: ClassIds,
        absent_classes: ClassIds | None = None,
        **kwargs: Unpack[MetricOptions],
    ) -> None:
        super().__init__(num_classes, seen_classes, absent_classes, **kwargs)
        self._computed_error: tuple[Tensor, Tensor] | None = None
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("total", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("squares", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")

    def _gaps(self, preds: Tensor, target: Tensor) -> Tensor:
        """Return the gap of each sample, ``(N,)``. Values for samples of other classes do not matter."""
        raise NotImplementedError

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add a batch of logits ``(N, C)`` and class ids ``(N,)``."""
        target = self._rows(preds, target, probabilities=True)
        self._add_gaps(self._gaps(preds, target), target)

    def _add_gaps(self, gaps: Tensor, rows: Tensor) -> None:
        count, total, squares = gap_sums(gaps, self._counted(rows))
        self.count = self.count + count
        self.total = self.total + total
        self.squares = self.squares + squares

    def compute(self) -> Tensor:
        """Return gamma, the mean gap of all samples so far."""
        gamma, standard_error = gap_compute(self.count, self.total, self.squares)
        # Kept here because only here do the states include all processes.
        self._computed_error = standard_error, self.count.clone()
        return gamma

    @property
    def standard_error(self) -> Tensor:
        """Standard error of gamma, NaN for fewer than two samples."""
        return self._error()[0].to(self.device)

    @property
    def num_samples(self) -> int:
        """Number of samples in the mean."""
        return int(self._error()[1])

    def _error(self) -> tuple[Tensor, Tensor]:
        self.compute()
        assert self._computed_error is not None
        return self._computed_error
