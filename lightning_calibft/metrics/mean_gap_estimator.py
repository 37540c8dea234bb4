"""What the estimators share whose gamma is a mean over samples: three sums are all that is kept."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_calibft.functional.average_logit_gap import gap_compute, gap_sums
from lightning_calibft.metrics.gamma_estimator import GammaEstimator


class MeanGapEstimator(GammaEstimator):
    """Base of the estimators whose gamma is the mean of one number for each sample of a seen class.

    The state is three numbers. After ``compute`` on all processes, :attr:`standard_error` and :attr:`num_samples` need
    no further communication.
    """

    _computed_error: tuple[Tensor, Tensor] | None = None

    def _add_states(self) -> None:
        self._add("count", torch.tensor(0), "sum")
        self._add("total", torch.tensor(0.0, dtype=torch.float64), "sum")
        self._add("squares", torch.tensor(0.0, dtype=torch.float64), "sum")

    def _gaps(self, preds: Tensor, target: Tensor) -> Tensor:
        """Return the gap of each sample, ``(N,)``; of samples of other than seen classes anything."""
        raise NotImplementedError

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add a batch of logits ``(N, C)`` and class ids ``(N,)``."""
        target = self._rows(preds, target, probabilities=True)
        self._add_gaps(self._gaps(preds, target), target)

    def _add_gaps(self, gaps: Tensor, rows: Tensor) -> None:
        for name, value in zip(("count", "total", "squares"), gap_sums(gaps, self._counted(rows)), strict=True):
            self._increase(name, value)

    def compute(self) -> Tensor:
        """Return gamma, the mean gap of all samples so far."""
        count = self._get("count")
        gamma, standard_error = gap_compute(count, self._get("total"), self._get("squares"))
        # Kept because here, and only here, the states are those of all processes.
        self._computed_error = standard_error, count.clone()
        return gamma

    @property
    def standard_error(self) -> Tensor:
        """Standard error of gamma, NaN for fewer than two samples."""
        return self._error()[0].to(self.device)

    @property
    def num_samples(self) -> int:
        """Number of samples that gamma is the mean of."""
        return int(self._error()[1])

    def _error(self) -> tuple[Tensor, Tensor]:
        self.compute()
        assert self._computed_error is not None
        return self._computed_error
