"""The average logit gap, over many batches: the default estimator of gamma."""

from __future__ import annotations

import math

from torch import Tensor
from typing_extensions import Unpack

from lightning_calibft._arguments import check_absent_share
from lightning_calibft.functional.average_logit_gap import average_gaps, prior_shift
from lightning_calibft.functional.share_table import ShareTable
from lightning_calibft.metrics.absent_class_metric import MetricOptions
from lightning_calibft.metrics.mean_gap_estimator import MeanGapEstimator
from lightning_calibft.split import ClassIds


class AverageLogitGap(MeanGapEstimator):
    r"""The average gap between seen and absent logits on the fine-tuning data: the paper's estimate of gamma.

    .. math::
        \gamma = \frac{1}{n} \sum_{i=1}^n \Big[ \frac{1}{|S| - 1} \sum_{c \in S, c \neq y_i} z_{ic}
        - \frac{1}{|U|} \sum_{c \in U} z_{ic} \Big]

    See :func:`lightning_calibft.functional.average_logit_gap`. The state is three numbers. (Gamma alone needs
    only sums for each class, but its standard error needs the gap of each sample.) After ``compute`` on all processes,
    :attr:`standard_error` and :attr:`num_samples` need no further communication. The standard error is the sampling
    error alone: this estimate compares means where the prediction compares maxima, so gamma can be further off.

    As input to ``forward`` and ``update`` the metric accepts:

    - ``preds``: A float tensor of shape ``(N, C)`` from the fine-tuned model in eval mode, not probabilities.
    - ``target``: An integer tensor of shape ``(N,)`` with class ids. Samples of classes that are not seen are left out.

    As output of ``forward`` and ``compute`` the metric returns gamma, a float64 scalar, or NaN with a warning if no
    sample counts.

    Args:
        num_classes: Number of classes ``C``, the width of the logits.
        seen_classes: Ids of the classes in the fine-tuning data, at least two.
        absent_classes: Ids of the classes missing from the fine-tuning data. ``None``: all classes that are not seen.
        absent_share: The share of samples of absent classes that the model will meet, in (0, 1). It shifts gamma by the
            log-odds of the classes. ``None``: no shift, as in the paper.
        ignore_index: Samples with this label are left out.
        validate_args: Whether to check the values of the tensors. ``False`` avoids a host synchronization.
        class_map: The head's row for each target, if targets are not row numbers. See
            :func:`~lightning_calibft.resolve_class_map`. In either case ``seen_classes`` holds row numbers.
        label_names: Names of the head's rows, needed if ``class_map`` contains names.
        kwargs: Arguments of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If there are fewer than two seen classes, or ``absent_share`` is not in (0, 1).
        TypeError: If ``absent_share`` is not a number.

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

    def __init__(
        self,
        num_classes: int,
        seen_classes: ClassIds,
        absent_classes: ClassIds | None = None,
        *,
        absent_share: float | None = None,
        **kwargs: Unpack[MetricOptions],
    ) -> None:
        super().__init__(num_classes, seen_classes, absent_classes, **kwargs)
        self.absent_share = check_absent_share(absent_share)

    def compute(self) -> Tensor:
        """Return gamma, the mean gap of all samples so far, shifted if ``absent_share`` is known."""
        return super().compute() + self._shift(self.absent_share)

    @property
    def share_table(self) -> ShareTable | None:
        """Gamma for each share of absent samples, which is exact between them, too. ``None`` if gamma is NaN."""
        mean = self.compute().item() - self._shift(self.absent_share)  # of all processes
        return None if math.isnan(mean) else ShareTable.of(lambda share: {"gamma": mean + self._shift(share)})

    def _shift(self, absent_share: float | None) -> float:
        return prior_shift(absent_share, len(self.split.seen_classes), len(self.split.absent_classes))

    def _gaps(self, preds: Tensor, target: Tensor) -> Tensor:
        return average_gaps(preds, target, self._groups)
