"""What is known of a fit at one step of it: plain numbers, safe in a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_calibft.analysis.accuracy import GroupAccuracies
from lightning_calibft.analysis.logits import GroupLevels, LogitLevels
from lightning_calibft.analysis.weights import MeanSimilarity, RowNorms, mean_similarity, row_norms
from lightning_calibft.metrics import AUSUC
from lightning_calibft.split import ClassSplit


@dataclass(frozen=True)
class Evaluation:
    """A validation on labelled samples of seen and of absent classes, of the logits without gamma.

    Attributes:
        overall: Accuracy of all samples among all classes.
        groups: Accuracies of seen and of absent samples.
        ausuc: Area under the seen-unseen curve.
        best_gamma: The gamma with the best overall accuracy on these samples.
        best_overall: Overall accuracy with it.
        best_seen: Accuracy of seen samples among all classes with it.
        best_absent: The same of absent samples.
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
    """What was measured after one step of training; ``None`` for what was not.

    Attributes:
        epoch: Number of epochs that had begun.
        step: Number of training steps that had been made.
        norms: Norms of the head's rows.
        updates: Cosines between what the head's rows have gained since training began.
        levels: Mean logits of validation samples.
        evaluation: Accuracies and AUSUC, if the validation had samples of seen and of absent classes.
    """

    epoch: int
    step: int
    norms: RowNorms | None = None
    updates: MeanSimilarity | None = None
    levels: LogitLevels | None = None
    evaluation: Evaluation | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return dicts of plain Python numbers."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Snapshot:
        """Read what :meth:`as_dict` has written."""
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
    """Read an evaluation from the curve of a metric that has met samples of both groups."""
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
    """The snapshots of a fit, and the weight of the head that it began with.

    Args:
        epoch: Number of epochs before it began.
        step: Number of training steps before it began.
        weight: The weight of the head, of shape ``(C, D)``; ``None`` if it is not linear.
    """

    def __init__(self, epoch: int, step: int, weight: Tensor | None) -> None:
        self.epoch = epoch
        self.step = step
        self.weight = weight
        self.split: ClassSplit | None = None
        self.snapshots: list[Snapshot] = []

    def add(
        self,
        split: ClassSplit,
        epoch: int,
        step: int,
        weight: Tensor | None,
        levels: LogitLevels | None = None,
        evaluation: Evaluation | None = None,
    ) -> None:
        """Add what is known after a step. Numbers about other classes do not compare: they are forgotten."""
        if split != self.split:
            self.split, self.snapshots = split, []
        if not self.snapshots and step > self.step:
            self.snapshots = [Snapshot(self.epoch, self.step, _norms(self.weight, split))]
        updates = None
        if weight is not None and self.weight is not None and step > self.step:
            updates = mean_similarity(self.weight, weight, split)
        new = Snapshot(epoch, step, _norms(weight, split), updates, levels, evaluation)
        self.snapshots = [each for each in self.snapshots if each.step < step] + [new]

    @property
    def seen_classes(self) -> tuple[int, ...]:
        """The seen classes of the snapshots, none before the first."""
        return () if self.split is None else self.split.seen_classes

    def begins_with(self, weight: Tensor | None) -> bool:
        """Tell whether this is a history of the model whose head has this weight."""
        return weight is not None and self.weight is not None and torch.equal(weight, self.weight)

    def state_dict(self) -> dict[str, Any]:
        """Return plain numbers and a tensor."""
        split = self.split and [self.split.num_classes, [*self.split.seen_classes], [*self.split.absent_classes]]
        snapshots = [each.as_dict() for each in self.snapshots]
        begun = {"epoch": self.epoch, "step": self.step, "weight": self.weight}
        return {"begun": begun, "split": split, "snapshots": snapshots}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> History:
        """Read what :meth:`state_dict` has written."""
        history = cls(**state["begun"])
        history.split = state["split"] and ClassSplit(*state["split"])
        history.snapshots = [Snapshot.from_dict(values) for values in state["snapshots"]]
        return history


def _norms(weight: Tensor | None, split: ClassSplit) -> RowNorms | None:
    return None if weight is None else row_norms(weight, split.seen_classes, split.absent_classes)
