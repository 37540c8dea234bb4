"""Collect the classes in the training batches without making a training step wait."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_calibft.calibration.batch_reader import SOFT_LABEL, BatchReader, target_error
from lightning_calibft.calibration.data_check import (
    NO_LABEL,
    label_bins,
    largest_outside,
    warn_if_positions,
)
from lightning_calibft.calibration.evaluation_pass import EvaluationPass
from lightning_calibft.callback.lightning_package import Strategy
from lightning_calibft.callback.trainer_data import training_batches
from lightning_calibft.estimators import needs_absent_samples
from lightning_calibft.split import ClassSplit, shorten


class TrainingLabels:
    """Collects the class ids in the training batches of this process.

    Args:
        num_classes: Number of classes ``C`` of the head.
        mapped: Whether a ``class_map`` has turned the labels into rows.
        absent_classes: The classes that can be absent. ``None``: all that are not met.

    Attributes:
        num_classes: Number of classes ``C`` of the head.
        may_be_positions: Whether to warn after the first epoch if the labels look like positions in a list.
        given_up: Whether :meth:`give_up` was called, because labels of this process are mixed.
    """

    # The small kernels of a flush slow down fast training loops, so up to 64 label vectors are flushed together.
    flush_every = 64

    def __init__(self, num_classes: int, mapped: bool, absent_classes: Sequence[int] | None = None) -> None:
        self.num_classes = num_classes
        self.given_up = False
        self.may_be_positions = not mapped
        self._absent_classes = absent_classes
        self._found = torch.zeros(num_classes + 3, dtype=torch.int32)  # classes, then: out of range, ignored, mixed
        self._outside = torch.tensor(NO_LABEL)
        self._pending: list[Tensor] = []
        self._split: ClassSplit | None = None

    def add_batch(self, batch: Any, loaders: Any, reader: BatchReader, unlabeled: Sequence[Any] = ()) -> None:
        """Add the labels of a training batch, which may combine the batches of a collection of loaders.

        Raises:
            TypeError: As in :meth:`BatchReader.rows`.
            ValueError: As in :meth:`BatchReader.rows`.
        """
        for part in training_batches(batch, loaders, unlabeled):
            self._pending.append(reader.rows(part).clone())  # the step may overwrite it
        if len(self._pending) >= self.flush_every:
            self._flush()

    def give_up(self) -> None:
        """Stop collecting, because labels of this process are mixed. No process then knows the classes."""
        self.given_up = True
        self._pending = []
        self._found[-1] = 1

    def add_classes(self, classes: Iterable[int]) -> None:
        """Add class ids from an earlier run that this one resumes."""
        self._found[list(classes)] = 1

    def classes(self, strategy: Strategy | None = None) -> list[int]:
        """Return the classes that this process knows of. With ``strategy``, first combine those of all processes.

        The list is empty if labels are mixed.

        Args:
            strategy: The strategy of the Trainer. All processes must pass it in the same call.
        """
        self._flush()
        if strategy is not None:
            reduced = strategy.reduce(self._found.to(strategy.root_device), reduce_op="sum")
            self._found = (torch.as_tensor(reduced) > 0).to(self._found)
        *found, _, _, mixed = self._found.tolist()
        return [] if mixed else [index for index, count in enumerate(found) if count]

    def check(self, strategy: Strategy) -> None:
        """Check that the labels of all processes are rows of the head, and not of absent classes.

        Raises:
            ValueError: If a label was not a row of the head, or an absent class was met.
        """
        check_not_absent(self.classes(strategy), self._absent_classes)
        if self._found[-3] and not self._found[-1]:
            label = strategy.reduce(self._outside.to(strategy.root_device), reduce_op="max")
            label = int(torch.as_tensor(label))
            raise target_error(self.num_classes, label, "the training data has other labels, such as")

    def split(self, strategy: Strategy) -> ClassSplit | None:
        """Return the split in which the classes of all processes so far are seen.

        Return ``None`` if so far no class is seen or no class is absent.
        """
        classes = self.classes(strategy)
        if self._split is None or list(self._split.seen_classes) != classes:
            self._split = split_of_met(self.num_classes, classes, self._absent_classes)
        return self._split

    def end_epoch(self, strategy: Strategy) -> None:
        """Combine the classes of all processes. The first call warns if they look like positions in a list."""
        classes = self.classes(strategy)
        if self.may_be_positions:
            self.may_be_positions = False
            warn_if_positions(classes, self.num_classes)

    def _flush(self) -> None:
        if not self._pending:
            return
        target = torch.cat(self._pending)
        self._pending = []
        bins = torch.where(target == SOFT_LABEL, len(self._found) - 1, label_bins(target, self.num_classes))
        self._found = self._found.to(target.device).index_fill(0, bins, 1)
        self._outside = largest_outside(self._outside.to(target.device), target, self.num_classes)


def split_of_met(num_classes: int, met: Sequence[int], absent_classes: Sequence[int] | None) -> ClassSplit | None:
    """Return the split in which the classes met are seen, or ``None`` if no class is seen or no class is absent.

    Args:
        num_classes: Number of classes ``C`` of the head.
        met: The classes in the training data.
        absent_classes: The classes that can be absent. ``None``: all that are not met.
    """
    absent = set(range(num_classes) if absent_classes is None else absent_classes).difference(met)
    return ClassSplit(num_classes, met, absent) if met and absent else None


def check_not_absent(met: Sequence[int], absent_classes: Sequence[int] | None) -> None:
    """Refuse absent classes that the training data has.

    Raises:
        ValueError: If a class that was met is listed as absent.
    """
    if both := sorted(set(met).intersection(absent_classes or ())):
        raise ValueError(
            "Expected argument `absent_classes` to hold classes that the training data does not have, but it has"
            f" samples of {shorten(both)}. Remove them from the list, or their samples from the data."
        )


def split_of_data(
    labels: TrainingLabels | None,
    strategy: Strategy,
    reading: EvaluationPass,
    absent_classes: Sequence[int] | None = None,
) -> ClassSplit | None:
    """Return the split that follows from the labels in training, or, if there are none, from the data of a pass.

    Return ``None``, with a warning, if there are fewer than two seen classes or no absent class.

    Args:
        labels: The labels in training, or ``None``.
        strategy: The strategy of the Trainer.
        reading: The pass that will find gamma.
        absent_classes: The classes that can be absent. ``None``: all that are not seen.

    Raises:
        ValueError: If a label was not a row of the head, or of an absent class. Also if neither shows the seen classes:
            training labels are mixed or unknown, and the pass may read samples of other classes as well.
    """
    if labels is not None:
        labels.check(strategy)
    if labels is not None and (split := labels.split(strategy)) is not None and len(split.seen_classes) > 1:
        return split
    classes = [] if labels is None else labels.classes()
    if not classes and (reading.validation or needs_absent_samples(reading.estimator)):
        raise ValueError(
            "Expected argument `seen_classes` to name the classes of the training data, since neither its labels nor"
            " those of the calibration data show them, but got None."
        )
    classes = classes or reading.read_classes()
    check_not_absent(classes, absent_classes)
    if len(classes) >= 2 and (split := split_of_met(reading.num_classes, classes, absent_classes)) is not None:
        return split
    rank_zero_warn(
        f"The training data holds {len(classes)} of the {reading.num_classes} classes. AbsentClassCalibration needs at"
        " least two seen classes and one absent one, so the model is not calibrated."
    )
    return None
