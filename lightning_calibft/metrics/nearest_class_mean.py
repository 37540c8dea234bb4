"""Accuracy of the nearest class mean, over many batches."""

from __future__ import annotations

import hashlib

from torch import Tensor
from typing_extensions import Unpack

from lightning_calibft._arguments import check_integer
from lightning_calibft.functional._inputs import Average, Group, check_matrix
from lightning_calibft.functional.nearest_class_mean import nearest_class_mean_logits
from lightning_calibft.metrics.absent_class_metric import MetricOptions
from lightning_calibft.metrics.accuracy import SplitAccuracy
from lightning_calibft.split import ClassIds


class NearestClassMeanAccuracy(SplitAccuracy):
    """Accuracy of the class whose mean is nearest to the features in cosine similarity.

    It judges the features independently of the classification head. See
    :func:`lightning_calibft.functional.nearest_class_mean_accuracy`.

    As input to ``forward`` and ``update`` the metric accepts:

    - ``features``: A float tensor of shape ``(N, D)``, the input of the classification head.
    - ``target``: An integer tensor of shape ``(N,)`` with class ids.

    The input is called ``features`` because the other metrics take logits. To use them together in a
    :class:`torchmetrics.MetricCollection`, call ``update(preds=..., features=..., target=...)``: each metric takes what
    it needs. Without ``features`` this metric raises a ``TypeError``.

    As output of ``forward`` and ``compute`` the metric returns a float64 scalar in [0, 1], or NaN with a warning if no
    sample counts.

    Args:
        num_classes: Number of classes ``C``.
        seen_classes: Ids of the classes in the fine-tuning data.
        absent_classes: Ids of the classes missing from the fine-tuning data. ``None``: all classes that are not seen.
        class_means: Means of shape ``(C, D)`` from :func:`lightning_calibft.functional.class_means`. A class whose row
            is NaN is never predicted.
        samples: Which samples to score: those of ``"all"``, ``"seen"`` or ``"absent"`` classes.
        candidates: The classes among which to find the nearest mean.
        average: ``"micro"`` weights samples equally, ``"macro"`` weights classes that have samples equally.
        kwargs: The arguments ``ignore_index``, ``validate_args``, ``class_map`` and ``label_names`` of all metrics of
            this package, see :class:`~lightning_calibft.metrics.AUSUC`, and those of :class:`torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> from lightning_calibft.metrics import NearestClassMeanAccuracy
        >>> means = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> metric = NearestClassMeanAccuracy(2, seen_classes=[0], class_means=means)
        >>> metric(torch.tensor([[0.9, 0.1], [0.2, 0.3]]), torch.tensor([0, 1]))
        tensor(1., dtype=torch.float64)
    """

    def __init__(
        self,
        num_classes: int,
        seen_classes: ClassIds,
        absent_classes: ClassIds | None = None,
        *,
        class_means: Tensor,
        samples: Group = "all",
        candidates: Group = "all",
        average: Average = "micro",
        **kwargs: Unpack[MetricOptions],
    ) -> None:
        check_integer("num_classes", num_classes, least=2)
        check_matrix("class_means", class_means)
        if len(class_means) != num_classes:
            raise ValueError(
                f"Expected argument `class_means` to have {num_classes} rows, one per class, but got"
                f" {len(class_means)}."
            )
        super().__init__(
            num_classes,
            seen_classes,
            absent_classes,
            samples=samples,
            candidates=candidates,
            average=average,
            **kwargs,
        )
        self._constants["class_means"] = class_means.detach().clone().to(self.device)
        # Metrics with different means must not share an update.
        digest = hashlib.sha256(class_means.detach().double().cpu().numpy().tobytes()).hexdigest()
        self._set_configuration("nearest class mean", candidates, average, digest)

    @property
    def class_means(self) -> Tensor:
        """Means of shape ``(C, D)``, NaN for classes without a mean."""
        return self._constants["class_means"]

    def update(self, features: Tensor, target: Tensor) -> None:
        """Add a batch of features ``(N, D)`` and class ids ``(N,)``."""
        super().update(nearest_class_mean_logits(features, self.class_means), target)
