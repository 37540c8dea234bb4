"""What the estimators share that need all samples at once: two numbers of each are kept."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics.utilities import dim_zero_cat, rank_zero_warn

from lightning_calibft.functional._inputs import real_dtype
from lightning_calibft.metrics.gamma_estimator import GammaEstimator


class SampleEstimator(GammaEstimator):
    """Base of the estimators that keep two numbers, 8 bytes, of each sample of a seen class.

    After ``compute`` on all processes, :attr:`standard_error` and :attr:`num_samples` need no further communication.
    """

    _samples: Tensor | None = None

    def _add_states(self) -> None:
        self._add("samples", [], "cat")

    def _gamma(self, samples: Tensor) -> Tensor:
        """Return gamma of finite ``samples (N, 2)``, N > 0, in ``real_dtype``."""
        raise NotImplementedError

    def _gamma_error(self, samples: Tensor) -> Tensor:
        """Return the standard error of gamma of finite ``samples (N, 2)``, N > 1, in ``real_dtype``."""
        raise NotImplementedError

    def _keep(self, samples: Tensor, rows: Tensor) -> None:
        # Marked instead of left out: no host synchronisation. A NaN of a sample that counts must not look like a mark.
        samples = samples.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
        self._get("samples").append(torch.where(self._counted(rows).unsqueeze(1), samples, torch.nan).float())

    def compute(self) -> Tensor:
        """Return gamma of all samples so far."""
        self._append_nothing()
        samples = dim_zero_cat(self._get("samples"))
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
        samples = self._get("samples")
        if isinstance(samples, list) and not samples:
            samples.append(torch.empty(0, 2, device=self.device))
