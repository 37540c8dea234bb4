"""What all estimators of gamma from samples of seen classes share."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_calibft._arguments import check_type
from lightning_calibft.functional._inputs import _SEEN
from lightning_calibft.functional.average_logit_gap import check_seen_classes
from lightning_calibft.labels.class_map import ClassMap
from lightning_calibft.labels.label_names import LabelNames
from lightning_calibft.metrics.absent_class_metric import AbsentClassMetric
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
