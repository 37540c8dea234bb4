"""Gamma as a mean over samples: three sums are all that is kept."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_calibft._arguments import check_type
from lightning_calibft.functional._inputs import _SEEN
from lightning_calibft.functional.logit_gap import check_seen_classes, gap_compute, gap_sums
from lightning_calibft.labels.class_map import ClassMap
from lightning_calibft.labels.label_names import LabelNames
from lightning_calibft.metrics.base import AbsentClassMetric
from lightning_calibft.split import ClassIds


class GammaEstimator(AbsentClassMetric):
    """Base of the estimators that look at samples of seen classes.

    Args:
        num_classes: Number of classes ``C``, the width of the logits.
        seen_classes: Ids of the at least two classes in the fine-tuning data.
        absent_classes: Ids of the classes that it lacks. ``None``: all that are not seen.
        configuration: What else decides the update.
        ignore_index: A label whose samples are left out.
        validate_args: Whether to check the values of the tensors. ``False`` avoids a host synchronisation.
        class_map: The head's row of each target, where they differ, as
            :func:`~lightning_calibft.resolve_class_map` takes it. The ``seen_classes`` are rows all the same.
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
        configuration: tuple[object, ...] = (),
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
        check_type("configuration", configuration, tuple)
        check_seen_classes(len(self.split.seen_classes))
        self._name_states(type(self).__name__, *configuration)
        self._add_states()

    def _add_states(self) -> None:
        raise NotImplementedError

    def _counted(self, rows: Tensor) -> Tensor:
        """Tell which samples are of seen classes, ``(N,)``."""
        return self._groups.of_samples(rows, self._ignored_row) == _SEEN


class MeanGap(GammaEstimator):
    """Base of the estimators whose gamma is the mean of one number for each sample of a seen class.

    The state is three numbers. After ``compute`` on all processes, :attr:`standard_error` and :attr:`num_samples` need
    no further communication.
    """

    _computed_error: tuple[Tensor, Tensor] | None = None

    def _add_states(self) -> None:
        self._add("count", torch.tensor(0), "sum")
        self._add("total", torch.tensor(0.0, dtype=torch.float64), "sum")
        self._add("squares", torch.tensor(0.0, dtype=torch.float64), "sum")

    def _gaps(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the gap of each sample, ``(N,)``; of samples of other than seen classes anything."""
        raise NotImplementedError

    def update(self, logits: Tensor, target: Tensor) -> None:
        """Add a batch of logits ``(N, C)`` and class ids ``(N,)``."""
        target = self._rows(logits, target, probabilities=True)
        self._add_gaps(self._gaps(logits, target), target)

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
