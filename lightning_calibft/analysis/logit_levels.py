"""Mean logits of labeled samples: that of the true class, and the largest ones of the other classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_calibft.functional._group_logits import top_classes
from lightning_calibft.functional._inputs import _SEEN, Groups, prepare, real_dtype
from lightning_calibft.metrics.absent_class_metric import AbsentClassMetric
from lightning_calibft.split import ClassIds


@dataclass(frozen=True)
class GroupLevels:
    """Mean logits of the samples of one group of classes, NaN where there are none.

    Attributes:
        true: Logit of the true class.
        other_seen: Largest logit among the seen classes that are not the true one.
        other_absent: Largest logit among the absent classes that are not the true one.
        num_samples: Number of samples.
    """

    true: float
    other_seen: float
    other_absent: float
    num_samples: int


@dataclass(frozen=True)
class LogitLevels:
    """Mean logits of the samples of seen and of absent classes."""

    seen: GroupLevels
    absent: GroupLevels


def logit_levels(
    preds: Tensor, target: Tensor, seen_classes: ClassIds, absent_classes: ClassIds | None = None
) -> LogitLevels:
    """Return the mean ground-truth logit and the mean largest other logits of labeled samples.

    For samples of absent classes, ``true - other_absent`` tells how well the absent classes are told apart, whatever
    gamma is, and ``other_seen - true`` is the gap that gamma has to close. See Mai et al., "Fine-Tuning is Fine, if
    Calibrated", NeurIPS 2024, section 5.

    Args:
        preds: Logits of shape ``(N, C)``, without gamma.
        target: Class ids of shape ``(N,)``.
        seen_classes: Ids of the classes in the fine-tuning data.
        absent_classes: Ids of the classes that it lacks. ``None``: all classes that are not seen.

    Raises:
        ValueError: If shapes, classes or labels do not fit.
        TypeError: If ``preds`` or ``target`` has the wrong dtype.

    Example:
        >>> import torch
        >>> from lightning_calibft.analysis import logit_levels
        >>> logits = torch.tensor([[5.0, 1.0, 2.0, 0.0], [4.0, 3.0, 1.0, 2.0]])
        >>> logit_levels(logits, torch.tensor([0, 3]), seen_classes=[0, 1]).absent
        GroupLevels(true=2.0, other_seen=4.0, other_absent=1.0, num_samples=1)
    """
    groups = prepare(preds, target, seen_classes, absent_classes, None, validate_args=True)
    return _levels(*_sums(preds, target, groups, None))


class LogitLevelsMetric(AbsentClassMetric):
    """The means of :func:`logit_levels` over many batches. The state is eight numbers.

    As input to ``update`` the metric accepts the logits ``preds (N, C)`` and ``target (N,)``. As output of ``compute``
    it returns a tensor of shape ``(2, 3)``: the means ``true``, ``other_seen``, and ``other_absent`` of seen and of
    absent samples. :meth:`levels` returns the same by name.

    Args:
        num_classes: Number of classes ``C``, the width of the logits.
        seen_classes: Ids of the classes in the fine-tuning data.
        absent_classes: Ids of the classes that it lacks. ``None``: all classes that are not seen.
        ignore_index: A label whose samples are ignored.
        validate_args: Whether to check the values of the tensors. ``False`` avoids a host synchronization.
        kwargs: Arguments for :class:`torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> from lightning_calibft.analysis.logit_levels import LogitLevelsMetric
        >>> metric = LogitLevelsMetric(4, seen_classes=[0, 1])
        >>> metric.update(torch.tensor([[5.0, 1.0, 2.0, 0.0], [4.0, 3.0, 1.0, 2.0]]), torch.tensor([0, 3]))
        >>> metric.compute()
        tensor([[5., 1., 2.],
                [2., 4., 1.]], dtype=torch.float64)
    """

    higher_is_better: bool | None = None
    sums: Tensor
    counts: Tensor

    def __init__(
        self,
        num_classes: int,
        seen_classes: ClassIds,
        absent_classes: ClassIds | None = None,
        *,
        ignore_index: int | None = None,
        validate_args: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            num_classes, seen_classes, absent_classes, ignore_index=ignore_index, validate_args=validate_args, **kwargs
        )
        self.add_state("sums", torch.zeros(2, 3, dtype=real_dtype(self.device)), dist_reduce_fx="sum")
        self.add_state("counts", torch.zeros(2, dtype=torch.long), dist_reduce_fx="sum")
        self._found: LogitLevels | None = None

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add a batch of logits ``(N, C)`` and class ids ``(N,)``."""
        target = self._rows(preds, target, probabilities=False)
        sums, counts = _sums(preds, target, self._groups, self._ignored_row)
        self.sums = self.sums + sums
        self.counts = self.counts + counts

    def compute(self) -> Tensor:
        """Return the means of all samples so far."""
        self._found = _levels(self.sums, self.counts)
        return _means(self.sums, self.counts)

    def levels(self) -> LogitLevels:
        """Return the means by name, and the numbers of samples."""
        self.compute()
        assert self._found is not None
        return self._found


def _sums(logits: Tensor, target: Tensor, groups: Groups, ignore_index: int | None) -> tuple[Tensor, Tensor]:
    """Return the sums of the three logits over the samples of each group, ``(2, 3)``, and their numbers, ``(2,)``."""
    logits, dtype = logits.detach(), real_dtype(logits.device)
    group = groups.of_samples(target, ignore_index)
    place = target.long().clamp(0, logits.shape[1] - 1).unsqueeze(1)
    others = logits.scatter(1, place, -torch.inf)
    parts = (logits.gather(1, place), *(top_classes(others, classes)[0] for classes in (groups.seen, groups.absent)))
    levels = torch.cat(parts, 1).to(dtype)
    member = torch.stack([group == _SEEN, group > _SEEN])
    sums = torch.where(member.unsqueeze(2), levels, 0).sum(1)
    return sums, member.sum(1)


def _means(sums: Tensor, counts: Tensor) -> Tensor:
    means = sums / counts.unsqueeze(1)
    return means.masked_fill(means == -torch.inf, torch.nan)  # a group of one class has no other


def _levels(sums: Tensor, counts: Tensor) -> LogitLevels:
    seen, absent = (
        GroupLevels(true, other_seen, other_absent, count)
        for (true, other_seen, other_absent), count in zip(_means(sums, counts).tolist(), counts.tolist(), strict=True)
    )
    return LogitLevels(seen, absent)
