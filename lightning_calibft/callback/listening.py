"""Hearing the logits of a head without adding anything to it that a checkpoint would hold."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import Strategy
from torch import Tensor

from lightning_calibft.analysis.history import History, evaluation_of
from lightning_calibft.analysis.logit_levels import LogitLevelsMetric
from lightning_calibft.analysis.weights import head_weight
from lightning_calibft.calibration import BatchReader
from lightning_calibft.callback.labels import LabelsMet, training_batches
from lightning_calibft.head import find_head, num_classes
from lightning_calibft.head.record import LogitRecorder, UnexpectedLogitsError, one_forward
from lightning_calibft.metrics import AUSUC
from lightning_calibft.split import ClassSplit


class Observer:
    """What :class:`~lightning_calibft.CalibrationDiagnostics` sees of a model and its batches.

    Args:
        model: The model, on its device.
        head: As in :func:`~lightning_calibft.find_head`.
        reader: Finds the labels in a batch.
        split: The seen and the absent classes; ``None``: the labels met in training tell.
        warn: Called with the reason why batches are not counted.
    """

    def __init__(
        self,
        model: LightningModule,
        head: str | None,
        reader: BatchReader,
        split: ClassSplit | None,
        warn: Callable[[str], None],
    ) -> None:
        self._model, self._head, self._reader, self._split, self._warn = model, head, reader, split, warn
        self._labels = LabelsMet(num_classes(find_head(model, head)), reader.maps) if split is None else None
        self._recorder = LogitRecorder(model, head)
        self._metrics: tuple[AUSUC, LogitLevelsMetric] | None = None
        self._target: Tensor | None = None
        self._counted = False

    def weight(self) -> Tensor | None:
        """Return the present weight of the head on the CPU, or ``None`` if it is not linear."""
        try:
            return head_weight(self._model, self._head).cpu()
        except ValueError:
            return None

    def classes_met(self) -> list[int]:
        """Return the classes that this process has met in training."""
        return [] if self._labels is None else self._labels.classes()

    def add_classes(self, classes: Iterable[int]) -> None:
        """Take classes that were met earlier, in a run that this one resumes."""
        if self._labels is not None:
            self._labels.add_classes(classes)

    def split_so_far(self, strategy: Strategy) -> ClassSplit | None:
        """Return the classes as far as they are known, on all processes alike."""
        if self._labels is None:
            return self._split
        classes = self._labels.classes(strategy)
        return ClassSplit(self._labels.num_classes, classes) if 0 < len(classes) < self._labels.num_classes else None

    def see_training_batch(self, batch: Any, loaders: Any) -> None:
        """Note the labels of a batch, unless the classes are known."""
        if self._labels is None:
            return
        try:
            for part in training_batches(batch, loaders):
                self._labels.add(self._reader.rows(part))
        except (TypeError, ValueError) as error:
            self._warn(f"{error} Or pass `seen_classes`.")

    def start(self, strategy: Strategy) -> None:
        """Begin a validation, if the classes are known."""
        if (split := self.split_so_far(strategy)) is None:
            return
        ids, device = (split.num_classes, split.seen_classes, split.absent_classes), self._model.device
        curve, levels = AUSUC(*ids, validate_args=False), LogitLevelsMetric(*ids, validate_args=False)
        self._metrics, self._counted = (curve.to(device), levels.to(device)), False

    def start_batch(self, batch: Any) -> None:
        """Listen to the head until :meth:`end_batch`, if a validation has begun."""
        if self._metrics is None:
            return
        try:
            self._target = self._reader.rows(batch)  # now: the step may take it out of the batch
        except (TypeError, ValueError) as error:
            self._warn(str(error))
        else:
            self._recorder.start()

    def end_batch(self) -> None:
        """Count what was heard."""
        target, self._target = self._target, None
        if self._metrics is None or target is None:
            return
        try:
            logits = one_forward(
                self._recorder.stop(),
                len(target),
                self._metrics[0].split.num_classes,
                "Run the model once on a validation batch.",
            )
        except UnexpectedLogitsError as error:
            self._warn(str(error))
            return
        for metric in self._metrics:
            metric.update(logits, target)
        self._counted = True

    def finish(self, history: History, epoch: int, step: int, strategy: Strategy) -> None:
        """Add what the samples of all processes tell to a history, if a validation has begun and there were any."""
        metrics, self._metrics = self._metrics, None
        if metrics is None or not strategy.reduce_boolean_decision(self._counted, all=False):
            return
        curve, levels = metrics[0], metrics[1].levels()
        both = levels.seen.num_samples and levels.absent.num_samples
        history.add(curve.split, epoch, step, self.weight(), levels, evaluation_of(curve) if both else None)

    def remove(self) -> None:
        """Leave the model."""
        self._metrics = None
        self._recorder.remove()
