"""The base class of all estimators of gamma from samples of seen classes."""

from __future__ import annotations

from torch import Tensor
from typing_extensions import Unpack

from lightning_calibft.functional.average_logit_gap import check_seen_classes
from lightning_calibft.metrics.absent_class_metric import AbsentClassMetric, MetricOptions
from lightning_calibft.split import ClassIds


class GammaEstimator(AbsentClassMetric):
    """Base class of the estimators that use samples of seen classes.

    Args:
        num_classes: Number of classes ``C``, the width of the logits.
        seen_classes: Ids of the classes in the fine-tuning data, at least two.
        absent_classes: Ids of the classes missing from the fine-tuning data. ``None``: all classes that are not seen.
        kwargs: The arguments ``ignore_index``, ``validate_args``, ``class_map`` and ``label_names`` of all metrics of
            this package, see :class:`~lightning_calibft.metrics.AUSUC`, and those of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If there are fewer than two seen classes.
    """

    higher_is_better: bool | None = None

    def __init__(
        self,
        num_classes: int,
        seen_classes: ClassIds,
        absent_classes: ClassIds | None = None,
        **kwargs: Unpack[MetricOptions],
    ) -> None:
        super().__init__(num_classes, seen_classes, absent_classes, **kwargs)
        check_seen_classes(len(self.split.seen_classes))
        self._set_configuration(type(self).__name__)

    def _counted(self, rows: Tensor) -> Tensor:
        """Return which samples belong to seen classes, ``(N,)``."""
        return self._groups.are_seen(rows, self._ignored_row, self.validate_args)
