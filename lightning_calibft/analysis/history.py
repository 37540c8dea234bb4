"""What was measured during a fit, as plain numbers that are safe in a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_calibft.analysis.accuracy_gain import GroupAccuracies
from lightning_calibft.analysis.curves import MethodCurve
from lightning_calibft.analysis.logit_levels import GroupLevels, LogitLevels
from lightning_calibft.analysis.weights import MeanSimilarity, RowNorms, mean_similarity, row_norms
from lightning_calibft.metrics import AUSUC
from lightning_calibft.split import ClassSplit


@dataclass(frozen=True)
class Evaluation:
    """Results of a validation on samples of seen and of absent classes, for logits without gamma.

    Attributes:
        overall: Accuracy on all samples among all classes.
        groups: Accuracies on seen and on absent samples.
        ausuc: Area under the seen-unseen curve.
        best_gamma: The gamma with the best overall accuracy on these samples.
        best_overall: Overall accuracy with it.
        best_seen: Accuracy on seen samples among all classes with it.
        best_absent: Accuracy on absent samples among all classes with it.
    """

    overall: float
    groups: GroupAccuracies
    ausuc: float
    best_gamma: float
    best_overall: float
    best_seen: float
    best_absent: float


@dataclass(frozen=True)
class Snapshot:
    """What was measured after one training step. ``None`` means not measured.

    Attributes:
        epoch: Number of epochs started so far.
        step: Number of training steps so far.
        norms: Norms of the head's rows.
        updates: Mean cosines between the updates of the head's rows since the start of training.
        levels: Mean logits of validation samples.
        evaluation: Accuracies and AUSUC, if the validation data had samples of seen and of absent classes.
    """

    epoch: int
    step: int
    norms: RowNorms | None = None
    updates: MeanSimilarity | None = None
    levels: LogitLevels | None = None
    evaluation: Evaluation | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the measurements as dicts of plain Python numbers."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Snapshot:
        """Build a snapshot from the output of :meth:`as_dict`."""
        norms, updates, levels, evaluation = (values[name] for name in ("norms", "updates", "levels", "evaluation"))
        return cls(
            values["epoch"],
            values["step"],
            norms and RowNorms(**norms),
            updates and MeanSimilarity(**updates),
            levels and LogitLevels(**{group: GroupLevels(**of_group) for group, of_group in levels.items()}),
            evaluation and Evaluation(**{**evaluation, "groups": GroupAccuracies(**evaluation["groups"])}),
        )


def evaluation_of(metric: AUSUC) -> Evaluation:
    """Compute an evaluation from a metric that was updated with samples of both groups."""
    area, best = metric.compute().item(), metric.best_gamma().item()
    plain, calibrated = metric.accuracies(0.0), metric.accuracies(best)
    return Evaluation(
        overall=plain["all"].item(),
        groups=GroupAccuracies(
            plain["seen"].item(),
            plain["absent"].item(),
            metric.accuracies(-float("inf"))["seen"].item(),
            metric.accuracies(float("inf"))["absent"].item(),
        ),
        ausuc=area,
        best_gamma=best,
        best_overall=calibrated["all"].item(),
        best_seen=calibrated["seen"].item(),
        best_absent=calibrated["absent"].item(),
    )


class History:
    """The snapshots of a fit, and the weight of the head at its start.

    Args:
        epoch: Number of epochs before the fit.
        step: Number of training steps before the fit.
        weight: Weight of the head at the start, of shape ``(C, D)``. ``None`` if the head is not linear.

    Attributes:
        split: The seen and the absent classes of the snapshots.
        snapshots: The snapshots in order.
        curves: The seen-unseen curves of the last and of the first validation since the history was begun or loaded.
    """

    def __init__(self, epoch: int, step: int, weight: Tensor | None) -> None:
        self.epoch = epoch
        self.step = step
        self.weight = weight
        self.split: ClassSplit | None = None
        self.snapshots: list[Snapshot] = []
        self.curves: list[MethodCurve] = []

    def add(
        self,
        split: ClassSplit,
        epoch: int,
        step: int,
        weight: Tensor | None,
        levels: LogitLevels | None = None,
        evaluation: Evaluation | None = None,
        curve: MethodCurve | None = None,
    ) -> None:
        """Add a snapshot. If the split has changed, earlier ones are not comparable and are dropped."""
        if split != self.split:
            self.split, self.snapshots, self.curves = split, [], []
        if curve is not None:
            self.curves = [curve, *self.curves[-1:]]
        if not self.snapshots and step > self.step:
            self.snapshots = [Snapshot(self.epoch, self.step, _norms(self.weight, split))]
        updates = None
        if weight is not None and self.weight is not None and step > self.step:
            updates = mean_similarity(self.weight, weight, split)
        new = Snapshot(epoch, step, _norms(weight, split), updates, levels, evaluation)
        self.snapshots = [each for each in self.snapshots if each.step < step] + [new]

    @property
    def seen_classes(self) -> tuple[int, ...]:
        """The seen classes of the snapshots. Empty before the first one."""
        return () if self.split is None else self.split.seen_classes

    def begins_with(self, weight: Tensor | None) -> bool:
        """Return whether this is the history of a model whose head started with this weight."""
        return weight is not None and self.weight is not None and torch.equal(weight, self.weight)

    def state_dict(self) -> dict[str, Any]:
        """Return the history as plain numbers and a tensor."""
        split = self.split and [self.split.num_classes, [*self.split.seen_classes], [*self.split.absent_classes]]
        snapshots = [each.as_dict() for each in self.snapshots]
        begun = {"epoch": self.epoch, "step": self.step, "weight": self.weight}
        return {"begun": begun, "split": split, "snapshots": snapshots}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> History:
        """Build a history from the output of :meth:`state_dict`."""
        history = cls(**state["begun"])
        history.split = state["split"] and ClassSplit(*state["split"])
        history.snapshots = [Snapshot.from_dict(values) for values in state["snapshots"]]
        return history


def _norms(weight: Tensor | None, split: ClassSplit) -> RowNorms | None:
    return None if weight is None else row_norms(weight, split.seen_classes, split.absent_classes)
