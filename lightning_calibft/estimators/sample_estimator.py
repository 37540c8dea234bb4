"""The base class of estimators that need all samples at once, and keep two numbers for each."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torchmetrics.utilities import dim_zero_cat, rank_zero_warn
from typing_extensions import Unpack

from lightning_calibft.functional._inputs import real_dtype
from lightning_calibft.metrics.absent_class_metric import MetricOptions, append_part
from lightning_calibft.metrics.gamma_estimator import GammaEstimator
from lightning_calibft.split import ClassIds


class SampleEstimator(GammaEstimator):
    """Base class of the estimators that keep two numbers (8 bytes) for each sample of a seen class.

    After ``compute`` on all processes, :attr:`standard_error` and :attr:`num_samples` need no further communication.
    """

    samples: list[Tensor] | Tensor

    def __init__(
        self,
        num_classes: int,
        seen_classes: ClassIds,
        absent_classes: ClassIds | None = None,
        **kwargs: Unpack[MetricOptions],
    ) -> None:
        super().__init__(num_classes, seen_classes, absent_classes, **kwargs)
        self._samples: Tensor | None = None
        self.add_state("samples", [], dist_reduce_fx="cat")

    def _gamma(self, samples: Tensor) -> Tensor:
        """Return gamma for finite ``samples (N, 2)``, N > 0, in ``real_dtype``."""
        raise NotImplementedError

    def _gamma_error(self, samples: Tensor) -> Tensor:
        """Return the standard error of gamma for finite ``samples (N, 2)``, N > 1, in ``real_dtype``."""
        raise NotImplementedError

    def _keep(self, samples: Tensor, rows: Tensor) -> None:
        # Samples that do not count become NaN, which needs no host synchronization. NaN in counted ones becomes inf.
        samples = samples.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
        samples = torch.where(self._counted(rows).unsqueeze(1), samples, torch.nan).float()
        append_part(cast("list[Tensor]", self.samples), samples)

    def compute(self) -> Tensor:
        """Return gamma for all samples so far."""
        self._append_nothing()
        samples = dim_zero_cat(self.samples)
        samples = samples[~samples.isnan().any(1)].to(real_dtype(samples.device))
        # Kept here because only here do the states include all processes.
        self._samples = samples
        if not len(samples):
            rank_zero_warn("The estimate of gamma received no samples of seen classes, so gamma is NaN.")
        elif not samples.isfinite().all():
            rank_zero_warn("The estimate of gamma received logits that are NaN or infinite, so gamma is NaN.")
        else:
            return self._gamma(samples)
        return samples.new_tensor(torch.nan)

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """Gather the states of all processes."""
        self._append_nothing()
        super().sync(*args, **kwargs)

    def reset(self) -> None:
        """Forget all samples."""
        super().reset()
        self._samples = None

    @property
    def standard_error(self) -> Tensor:
        """Standard error of gamma, NaN for fewer than two samples."""
        samples = self._gathered()
        if len(samples) < 2 or not samples.isfinite().all():
            return samples.new_tensor(torch.nan)
        return self._gamma_error(samples)

    @property
    def num_samples(self) -> int:
        """Number of samples used for gamma."""
        return len(self._gathered())

    def _gathered(self) -> Tensor:
        self.compute()
        assert self._samples is not None
        return self._samples

    def _append_nothing(self) -> None:
        # A process without samples must share an empty tensor of the right shape. After gathering, it is not a list.
        if isinstance(self.samples, list) and not self.samples:
            self.samples.append(torch.empty(0, 2, device=self.device))
