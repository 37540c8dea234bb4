"""Accuracies of seen and absent classes, over many batches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_calibft.functional._inputs import Average, Group
from lightning_calibft.functional.accuracy import (
    accuracy_compute,
    accuracy_update,
    check_accuracy_arguments,
    harmonic_compute,
)
from lightning_calibft.labels.class_map import ClassMap
from lightning_calibft.labels.label_names import LabelNames
from lightning_calibft.metrics.absent_class_metric import AbsentClassMetric
from lightning_calibft.split import ClassIds


class SplitAccuracy(AbsentClassMetric):
    r"""Accuracy :math:`Acc_{samples/candidates}` of the argmax among the candidate classes.

    The paper's :math:`Acc_{S/Y}` is ``samples="seen", candidates="all"``. See
    :func:`lightning_calibft.functional.split_accuracy`. The state has a constant size; instances that differ only in
    ``samples`` share it in a :class:`torchmetrics.MetricCollection`.

    As input to ``forward`` and ``update`` the metric accepts:

    - ``preds``: A float tensor of shape ``(N, C)``.
    - ``target``: An integer tensor of shape ``(N,)`` with class ids.

    As output of ``forward`` and ``compute`` the metric returns a float64 scalar in [0, 1], NaN with a warning if no
    sample counts.

    Args:
        num_classes: Number of classes ``C``, the width of the logits.
        seen_classes: Ids of the classes in the fine-tuning data.
        absent_classes: Ids of the classes that it lacks. ``None``: all that are not seen.
        samples: Whose accuracy: of the samples of ``"all"``, ``"seen"`` or ``"absent"`` classes.
        candidates: Among which classes the argmax runs.
        top_k: The true class must be among this many largest logits.
        average: ``"micro"`` weighs samples equally, ``"macro"`` classes that have samples.
        ignore_index: A label whose samples are left out.
        validate_args: Whether to check the values of the tensors. ``False`` avoids a host synchronisation.
        class_map: The head's row of each target, where they differ, as
            :func:`~lightning_calibft.resolve_class_map` takes it. The ``seen_classes`` are rows all the same.
        label_names: Names of the head's rows, for a ``class_map`` of names.
        kwargs: Arguments of :class:`torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> from lightning_calibft.metrics import SplitAccuracy
        >>> metric = SplitAccuracy(3, seen_classes=[0, 1], samples="absent", candidates="absent")
        >>> metric(torch.tensor([[3.0, 0.0, 1.0], [2.0, 0.0, 1.0]]), torch.tensor([0, 2]))
        tensor(1., dtype=torch.float64)
    """

    is_differentiable: bool = False
    higher_is_better: bool = True
    plot_lower_bound: float = 0.0
    plot_upper_bound: float = 1.0

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
        check_accuracy_arguments(self._groups, samples, candidates, top_k, average)
        self.samples: Group = samples
        self.candidates: Group = candidates
        self.top_k = top_k
        self.average: Average = average
        self._constants["classes"] = self._groups.classes(candidates)
        self._add_counts()

    def _add_counts(self, *configuration: object) -> None:
        # Seen and absent samples are counted apart, so `samples` plays no part in the update.
        self._name_states("accuracy", self.candidates, self.top_k, self.average, *configuration)
        counts = torch.zeros(2 if self.average == "micro" else self.split.num_classes, dtype=torch.long)
        self._add("correct", counts, "sum")
        self._add("total", counts.clone(), "sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add a batch of logits ``(N, C)`` and class ids ``(N,)``."""
        target = self._rows(preds, target, probabilities=False)
        classes = self._constants["classes"]
        correct, total = accuracy_update(
            preds, target, self._groups, classes, self.top_k, self.average, self._ignored_row
        )
        self._increase("correct", correct)
        self._increase("total", total)

    def compute(self) -> Tensor:
        """Return the accuracy of all samples so far."""
        return accuracy_compute(self._get("correct"), self._get("total"), self._groups, self.samples, self.average)


class HarmonicMeanAccuracy(SplitAccuracy):
    r"""Harmonic mean of :math:`Acc_{S/Y}` and :math:`Acc_{U/Y}`, both among all classes, as the logits are.

    See :func:`lightning_calibft.functional.harmonic_mean_accuracy`.

    As input to ``forward`` and ``update`` the metric accepts:

    - ``preds``: A float tensor of shape ``(N, C)``.
    - ``target``: An integer tensor of shape ``(N,)`` with class ids.

    As output of ``forward`` and ``compute`` the metric returns a float64 scalar in [0, 1], 0 if both accuracies are 0,
    NaN with a warning if a group has no samples.

    Args:
        num_classes: Number of classes ``C``, the width of the logits.
        seen_classes: Ids of the classes in the fine-tuning data.
        absent_classes: Ids of the classes that it lacks. ``None``: all that are not seen.
        average: ``"micro"`` weighs samples equally, ``"macro"`` classes that have samples.
        ignore_index: A label whose samples are left out.
        validate_args: Whether to check the values of the tensors. ``False`` avoids a host synchronisation.
        class_map: The head's row of each target, where they differ, as
            :func:`~lightning_calibft.resolve_class_map` takes it. The ``seen_classes`` are rows all the same.
        label_names: Names of the head's rows, for a ``class_map`` of names.
        kwargs: Arguments of :class:`torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> from lightning_calibft.metrics import HarmonicMeanAccuracy
        >>> metric = HarmonicMeanAccuracy(3, seen_classes=[0, 1])
        >>> metric(torch.tensor([[3.0, 0.0, 1.0], [2.0, 0.0, 1.0], [0.0, 1.0, 2.0]]), torch.tensor([0, 2, 2]))
        tensor(0.6667, dtype=torch.float64)
    """

    def __init__(
        self,
        num_classes: int,
        seen_classes: ClassIds,
        absent_classes: ClassIds | None = None,
        *,
        average: Average = "micro",
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
            average=average,
            ignore_index=ignore_index,
            validate_args=validate_args,
            class_map=class_map,
            label_names=label_names,
            **kwargs,
        )

    def compute(self) -> Tensor:
        """Return the harmonic mean of the two accuracies of all samples so far."""
        return harmonic_compute(self._get("correct"), self._get("total"), self._groups, self.average)
