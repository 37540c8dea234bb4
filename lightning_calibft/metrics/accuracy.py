"""Accuracies of seen and absent classes, over many batches."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import Unpack

from lightning_calibft._arguments import check_choice
from lightning_calibft.functional._inputs import Average, Group
from lightning_calibft.functional.accuracy import (
    accuracy_compute,
    accuracy_update,
    check_accuracy_arguments,
    harmonic_compute,
)
from lightning_calibft.metrics.absent_class_metric import AbsentClassMetric, MetricOptions
from lightning_calibft.split import ClassIds


class _CountedAccuracy(AbsentClassMetric):
    """Counts right samples of each group or class among the candidate classes."""

    higher_is_better: bool = True
    plot_lower_bound: float = 0.0
    plot_upper_bound: float = 1.0
    correct: Tensor
    total: Tensor

    def __init__(
        self,
        num_classes: int,
        seen_classes: ClassIds,
        absent_classes: ClassIds | None = None,
        *,
        average: Average = "micro",
        **kwargs: Unpack[MetricOptions],
    ) -> None:
        super().__init__(num_classes, seen_classes, absent_classes, **kwargs)
        check_choice("average", average, ("micro", "macro"))
        self.average: Average = average
        self._count_among("all", top_k=1)
        # Seen and absent samples are counted separately, so `samples` does not affect the update.
        counts = torch.zeros(2 if average == "micro" else num_classes, dtype=torch.long)
        self.add_state("correct", counts, dist_reduce_fx="sum")
        self.add_state("total", counts.clone(), dist_reduce_fx="sum")

    def _count_among(self, candidates: Group, top_k: int) -> None:
        self.candidates, self.top_k = candidates, top_k
        self._set_configuration("accuracy", candidates, top_k, self.average)

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add a batch of logits ``(N, C)`` and class ids ``(N,)``."""
        rows = self._rows(preds, target, probabilities=False)
        options = self.candidates, self.top_k, self.average, self._ignored_row, self.validate_args
        correct, total = accuracy_update(preds, rows, self._groups, *options)
        self.correct = self.correct + correct
        self.total = self.total + total


class SplitAccuracy(_CountedAccuracy):
    r"""Accuracy :math:`Acc_{samples/candidates}` of the argmax among the candidate classes.

    The paper's :math:`Acc_{S/Y}` is ``samples="seen", candidates="all"``. See
    :func:`lightning_calibft.functional.split_accuracy`. The state has a constant size; instances that differ only in
    ``samples`` share it in a :class:`torchmetrics.MetricCollection`.

    As input to ``forward`` and ``update`` the metric accepts:

    - ``preds``: A float tensor of shape ``(N, C)``.
    - ``target``: An integer tensor of shape ``(N,)`` with class ids.

    As output of ``forward`` and ``compute`` the metric returns a float64 scalar in [0, 1], or NaN with a warning if no
    sample counts.

    Args:
        num_classes: Number of classes ``C``, the width of the logits.
        seen_classes: Ids of the classes in the fine-tuning data.
        absent_classes: Ids of the classes missing from the fine-tuning data. ``None``: all classes that are not seen.
        samples: Which samples to score: those of ``"all"``, ``"seen"`` or ``"absent"`` classes.
        candidates: The classes that the argmax chooses from.
        top_k: A sample is right if its true class has one of the ``top_k`` largest logits.
        average: ``"micro"`` weights samples equally, ``"macro"`` weights classes that have samples equally.
        kwargs: The arguments ``ignore_index``, ``validate_args``, ``class_map`` and ``label_names`` of all metrics of
            this package, see :class:`~lightning_calibft.metrics.AUSUC`, and those of :class:`torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> from lightning_calibft.metrics import SplitAccuracy
        >>> metric = SplitAccuracy(3, seen_classes=[0, 1], samples="absent", candidates="absent")
        >>> metric(torch.tensor([[3.0, 0.0, 1.0], [2.0, 0.0, 1.0]]), torch.tensor([0, 2]))
        tensor(1., dtype=torch.float64)
    """

    def __init__(
        self,
        num_classes: int,
        seen_classes: ClassIds,
        absent_classes: ClassIds | None = None,
        *,
        samples: Group = "all",
        candidates: Group = "all",
        top_k: int = 1,
        average: Average = "micro",
        **kwargs: Unpack[MetricOptions],
    ) -> None:
        super().__init__(num_classes, seen_classes, absent_classes, average=average, **kwargs)
        check_accuracy_arguments(self._groups, samples, candidates, top_k, average)
        self.samples: Group = samples
        self._count_among(candidates, top_k)

    def compute(self) -> Tensor:
        """Return the accuracy of all samples so far."""
        return accuracy_compute(self.correct, self.total, self._groups, self.samples, self.average)


class HarmonicMeanAccuracy(_CountedAccuracy):
    r"""Harmonic mean of :math:`Acc_{S/Y}` and :math:`Acc_{U/Y}`, both among all classes, of the logits as given.

    See :func:`lightning_calibft.functional.harmonic_mean_accuracy`.

    As input to ``forward`` and ``update`` the metric accepts:

    - ``preds``: A float tensor of shape ``(N, C)``.
    - ``target``: An integer tensor of shape ``(N,)`` with class ids.

    As output of ``forward`` and ``compute`` the metric returns a float64 scalar in [0, 1], 0 if both accuracies are 0,
    or NaN with a warning if a group has no samples.

    Args:
        num_classes: Number of classes ``C``, the width of the logits.
        seen_classes: Ids of the classes in the fine-tuning data.
        absent_classes: Ids of the classes missing from the fine-tuning data. ``None``: all classes that are not seen.
        average: ``"micro"`` weights samples equally, ``"macro"`` weights classes that have samples equally.
        kwargs: The arguments ``ignore_index``, ``validate_args``, ``class_map`` and ``label_names`` of all metrics of
            this package, see :class:`~lightning_calibft.metrics.AUSUC`, and those of :class:`torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> from lightning_calibft.metrics import HarmonicMeanAccuracy
        >>> metric = HarmonicMeanAccuracy(3, seen_classes=[0, 1])
        >>> metric(torch.tensor([[3.0, 0.0, 1.0], [2.0, 0.0, 1.0], [0.0, 1.0, 2.0]]), torch.tensor([0, 2, 2]))
        tensor(0.6667, dtype=torch.float64)
    """

    def compute(self) -> Tensor:
        """Return the harmonic mean of the two accuracies of all samples so far."""
        return harmonic_compute(self.correct, self.total, self._groups, self.average)
