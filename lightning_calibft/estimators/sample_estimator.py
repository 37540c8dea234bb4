"""What the estimators share that need all samples at once: two numbers of each are kept."""

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
    """Base of the estimators that keep two numbers, 8 bytes, of each sample of a seen class.

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
        """Return gamma of finite ``samples (N, 2)``, N > 0, in ``real_dtype``."""
        raise NotImplementedError

    def _gamma_error(self, samples: Tensor) -> Tensor:
        """Return the standard error of gamma of finite ``samples (N, 2)``, N > 1, in ``real_dtype``."""
        raise NotImplementedError

    def _keep(self, samples: Tensor, rows: Tensor) -> None:
        # Marked instead of left out: no host synchronization. A NaN of a sample that counts must not look like a mark.
        samples = samples.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
        samples = torch.where(self._counted(rows).unsqueeze(1), samples, torch.nan).float()
        append_part(cast("list[Tensor]", self.samples), samples)

    def compute(self) -> Tensor:
        """Return gamma of all samples so far."""
        self._append_nothing()
        samples = dim_zero_cat(self.samples)
        samples = samples[~samples.isnan().any(1)].to(real_dtype(samples.device))
        # Kept because here, and only here, the states are those of all processes.
        self._samples = samples
        if not len(samples):
            rank_zero_warn("The estimate of gamma met no sample of a seen class, so gamma is NaN.")
        elif not samples.isfinite().all():
            rank_zero_warn("The estimate of gamma met logits that are NaN or infinite, so gamma is NaN.")
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
        """Number of samples that gamma rests on."""
        return len(self._gathered())

    def _gathered(self) -> Tensor:
        self.compute()
        assert self._samples is not None
        return self._samples

    def _append_nothing(self) -> None:
        # A process without samples has an empty tensor to share, of the right shape. Gathered, it is no list.
        if isinstance(self.samples, list) and not self.samples:
            self.samples.append(torch.empty(0, 2, device=self.device))
