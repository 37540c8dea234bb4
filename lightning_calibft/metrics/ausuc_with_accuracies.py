"""The area under the seen-unseen curve and the accuracies at gamma 0, from one pass over the logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_calibft.functional._group_logits import BatchReduction
from lightning_calibft.functional.accuracy import accuracy_compute, count_right, harmonic_compute
from lightning_calibft.metrics.seen_unseen_curve import AUSUC

NAMES = ("ausuc", "acc_all", "acc_seen", "acc_absent", "acc_harmonic")


class AUSUCWithAccuracies(AUSUC):
    """An AUSUC that also counts what the accuracies of :func:`absent_class_metrics` need, so a batch is reduced once.

    In a compute group of a collection, only the first metric is updated and the others share its states. On its own,
    this metric gives the values of the whole collection: see :meth:`values`.

    Args:
        num_classes: Number of classes ``C``, the width of the logits.
        args: Other positional arguments of :class:`AUSUC`.
        kwargs: Keyword arguments of :class:`AUSUC`.
    """

    correct: Tensor
    total: Tensor

    def __init__(self, num_classes: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(num_classes, *args, **kwargs)
        self._set_configuration("accuracies", self.average)
        counts = torch.zeros(2 if self.average == "micro" else num_classes, dtype=torch.long)
        self.add_state("correct", counts, dist_reduce_fx="sum")
        self.add_state("total", counts.clone(), dist_reduce_fx="sum")
        self._values: dict[str, Tensor] = {}

    def compute(self) -> Tensor:  # type: ignore[override]
        """Return the area under the curve of all samples so far."""
        # The other values are kept here because only here do the states include all processes.
        counts, area = (self.correct, self.total, self._groups), super().compute()
        of_groups = {group: accuracy_compute(*counts, group, self.average) for group in ("all", "seen", "absent")}
        values = (area, *of_groups.values(), harmonic_compute(*counts, self.average))
        self._values = dict(zip(NAMES, values, strict=True))
        return area

    def values(self) -> dict[str, Tensor]:
        """Return the values of :func:`absent_class_metrics` for all samples so far, by name."""
        self.compute()
        return self._values

    def reset(self) -> None:
        """Forget all samples."""
        super().reset()
        self._values = {}

    def _append(self, reduction: BatchReduction) -> None:
        super()._append(reduction)
        correct, total = count_right(reduction.best, reduction.place, self._groups, self.average)
        self.correct = self.correct + correct
        self.total = self.total + total
