"""The average logit gap, over many batches: the default estimator of gamma."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_calibft.class_map import ClassMap
from lightning_calibft.functional.logit_gap import check_seen_classes, gap_compute, gap_update
from lightning_calibft.label_names import LabelNames
from lightning_calibft.metrics.base import AbsentClassMetric
from lightning_calibft.split import ClassIds


class AverageLogitGap(AbsentClassMetric):
    r"""How far the absent logits lie below the seen ones on the fine-tuning data: the paper's estimate of gamma.

    .. math::
        \gamma = \frac{1}{n} \sum_{i=1}^n \Big[ \frac{1}{|S| - 1} \sum_{c \in S, c \neq y_i} z_{ic}
        - \frac{1}{|U|} \sum_{c \in U} z_{ic} \Big]

    See :func:`lightning_calibft.functional.average_logit_gap`. The state is three numbers. After ``compute`` on all
    processes, :attr:`standard_error` and :attr:`num_samples` need no further communication.

    As input to ``forward`` and ``update`` the metric accepts:

    - ``logits``: A float tensor of shape ``(N, C)`` from the fine-tuned model in eval mode, not probabilities.
    - ``target``: An integer tensor of shape ``(N,)`` with class ids. Samples of classes that are not seen are left out.

    As output of ``forward`` and ``compute`` the metric returns gamma, a float64 scalar, NaN with a warning if no sample
    counts.

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

    Example:
        >>> import torch
        >>> from lightning_calibft.metrics import AverageLogitGap
        >>> metric = AverageLogitGap(3, seen_classes=[0, 1])
        >>> metric.update(torch.tensor([[4.0, 1.0, -2.0], [2.0, 4.0, -1.0]]), torch.tensor([0, 1]))
        >>> metric.compute()
        tensor(3., dtype=torch.float64)
        >>> metric.standard_error, metric.num_samples
        (tensor(0., dtype=torch.float64), 2)
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
        self._computed_error: tuple[Tensor, Tensor] | None = None
        self._name_states("gap")
        self._add("count", torch.tensor(0), "sum")
        self._add("total", torch.tensor(0.0, dtype=torch.float64), "sum")
        self._add("squares", torch.tensor(0.0, dtype=torch.float64), "sum")

    def update(self, logits: Tensor, target: Tensor) -> None:
        """Add a batch of logits ``(N, C)`` and class ids ``(N,)``."""
        target = self._rows(logits, target, probabilities=True)
        count, total, squares = gap_update(logits, target, self._groups, self._ignored_row)
        self._increase("count", count)
        self._increase("total", total)
        self._increase("squares", squares)

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
