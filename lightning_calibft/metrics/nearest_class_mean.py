"""Accuracy of the nearest class mean, over many batches."""

from __future__ import annotations

import hashlib
from typing import Any

from torch import Tensor

from lightning_calibft._arguments import check_integer
from lightning_calibft.functional._inputs import Average, Group, check_matrix
from lightning_calibft.functional.nearest_class_mean import nearest_class_mean_logits
from lightning_calibft.labels.class_map import ClassMap
from lightning_calibft.labels.label_names import LabelNames
from lightning_calibft.metrics.accuracy import SplitAccuracy
from lightning_calibft.split import ClassIds


class NearestClassMeanAccuracy(SplitAccuracy):
    """Accuracy of the class whose mean is nearest to the features in cosine similarity.

    It judges the features apart from the classification head. See
    :func:`lightning_calibft.functional.nearest_class_mean_accuracy`.

    As input to ``forward`` and ``update`` the metric accepts:

    - ``features``: A float tensor of shape ``(N, D)``, the input of the classification head.
    - ``target``: An integer tensor of shape ``(N,)`` with class ids.

    As output of ``forward`` and ``compute`` the metric returns a float64 scalar in [0, 1], NaN with a warning if no
    sample counts.

    Args:
        num_classes: Number of classes ``C``.
        seen_classes: Ids of the classes in the fine-tuning data.
        absent_classes: Ids of the classes that it lacks. ``None``: all that are not seen.
        class_means: Means of shape ``(C, D)`` from :func:`lightning_calibft.functional.class_means`. A class whose row
            is NaN is never predicted.
        samples: Whose accuracy: of the samples of ``"all"``, ``"seen"`` or ``"absent"`` classes.
        candidates: Among which classes the nearest is sought.
        average: ``"micro"`` weighs samples equally, ``"macro"`` classes that have samples.
        ignore_index: A label whose samples are left out.
        validate_args: Whether to check the values of the tensors. ``False`` avoids a host synchronisation.
        class_map: The head's row of each target, where they differ, as
            :func:`~lightning_calibft.resolve_class_map` takes it. The ``seen_classes`` are rows all the same.
        label_names: Names of the head's rows, for a ``class_map`` of names.
        kwargs: Arguments of :class:`torchmetrics.Metric`.

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
        ignore_index: int | None = None,
        validate_args: bool = True,
        class_map: ClassMap | None = None,
        label_names: LabelNames | None = None,
        **kwargs: Any,
    ) -> None:
        check_integer("num_classes", num_classes, least=2)
        check_matrix("class_means", class_means)
        if len(class_means) != num_classes:
            raise ValueError(
                f"Expected argument `class_means` to have {num_classes} rows, one per class, but got"
                f" {len(class_means)}."
            )
        # Two sets of means make two updates, so the names of the states depend on them.
        self._digest = hashlib.sha256(class_means.detach().double().cpu().numpy().tobytes()).hexdigest()
        super().__init__(
            num_classes,
            seen_classes,
            absent_classes,
            samples=samples,
            candidates=candidates,
            average=average,
            ignore_index=ignore_index,
            validate_args=validate_args,
            class_map=class_map,
            label_names=label_names,
            **kwargs,
        )
        self._constants["class_means"] = class_means.detach().clone().to(self.device)

    @property
    def class_means(self) -> Tensor:
        """Means of shape ``(C, D)``; NaN for the classes without one."""
        return self._constants["class_means"]

    def _add_counts(self, *configuration: object) -> None:
        super()._add_counts(self._digest, *configuration)

    def update(self, features: Tensor, target: Tensor) -> None:
        """Add a batch of features ``(N, D)`` and class ids ``(N,)``."""
        super().update(nearest_class_mean_logits(features, self.class_means), target)
