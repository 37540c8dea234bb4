"""What the estimators share that need all samples at once: two numbers of each are kept."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics.utilities import dim_zero_cat, rank_zero_warn

from lightning_calibft.class_map import ClassMap
from lightning_calibft.functional._inputs import _SEEN, real_dtype
from lightning_calibft.functional.logit_gap import check_seen_classes
from lightning_calibft.label_names import LabelNames
from lightning_calibft.metrics.base import AbsentClassMetric
from lightning_calibft.split import ClassIds


class KeptSamples(AbsentClassMetric):
    """Base of the estimators that keep two numbers, 8 bytes, of each sample of a seen class.

    After ``compute`` on all processes, :attr:`standard_error` and :attr:`num_samples` need no further communication.

    Args:
        num_classes: Number of classes ``C``, the width of the logits.
        seen_classes: Ids of the at least two classes in the fine-tuning data.
        absent_classes: Ids of the classes that it lacks. ``None``: all that are not seen.
        ignore_index: A label whose samples are left out.
        validate_args: Whether to check the values of the tensors. ``False`` avoids a host synchronisation.
        class_map: The head's row of each target, where they differ, as
            :func:`~lightning_calibft.class_map.resolve_class_map` takes it. The ``seen_classes`` are rows all the same.
        label_names: Names of the head's rows, for a ``class_map`` of names.
        kwargs: Arguments of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If there are fewer than two seen classes.
    """

    is_differentiable: bool = False
    higher_is_better: bool | None = None

    def __init__(
        self,
        num_classes: int,
        seen_classes: ClassIds,
        absent_classes: ClassIds | None = None,
        *,
        ignore_index: int | None = None,
        validate_args: bool = True,
        class_map: ClassMap | None = None,
        label_names: LabelNames | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            num_classes,
            seen_classes,
            absent_classes,
            ignore_index,
            validate_args,
            class_map,
            label_names,
            **kwargs,
        )
        check_seen_classes(len(self.split.seen_classes))
        self._samples: Tensor | None = None
        self._name_states(type(self).__name__)
        self._add("samples", [], "cat")

    def _gamma(self, samples: Tensor) -> Tensor:
        """Return gamma of finite ``samples (N, 2)``, N > 0, in ``real_dtype``."""
        raise NotImplementedError

    def _gamma_error(self, samples: Tensor) -> Tensor:
        """Return the standard error of gamma of finite ``samples (N, 2)``, N > 1, in ``real_dtype``."""
        raise NotImplementedError

    def _keep(self, samples: Tensor, rows: Tensor) -> None:
        # Marked instead of left out: no host synchronisation. A NaN of a sample that counts must not look like a mark.
        counted = self._groups.of_samples(rows, self._ignored_row) == _SEEN
        samples = samples.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
        self._get("samples").append(torch.where(counted.unsqueeze(1), samples, torch.nan).float())

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
