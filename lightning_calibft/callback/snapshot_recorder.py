"""Measure a model while it is trained and validated."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lightning_calibft.analysis.history import History, evaluation_of
from lightning_calibft.analysis.logit_levels import LogitLevelsMetric
from lightning_calibft.analysis.weights import head_weight
from lightning_calibft.calibration.batch_reader import BatchReader
from lightning_calibft.calibration.distributed import SharedErrors
from lightning_calibft.callback.lightning_package import Strategy
from lightning_calibft.callback.training_labels import TrainingLabels, check_not_absent
from lightning_calibft.head.find import find_head
from lightning_calibft.head.layers import num_classes
from lightning_calibft.head.record import LogitRecorder, UnexpectedLogitsError, one_forward
from lightning_calibft.metrics import AUSUC
from lightning_calibft.split import ClassSplit, shorten


class SnapshotRecorder:
    """Records the logits of validation batches at the head of a model and makes snapshots of them.

    It adds nothing to the state dict of the model. A batch whose labels or logits cannot be read is left out and
    reported to ``warn``.

    Args:
        model: The model, on its device.
        head: As in :func:`~lightning_calibft.find_head`.
        reader: Reads the labels of a batch.
        split: The seen and the absent classes. ``None``: the labels of the training batches are the seen classes.
        strategy: The strategy of the Trainer, which combines what the processes have recorded.
        warn: Called with the reason if a batch is left out.
        absent_classes: Without ``split``, the classes that can be absent. ``None``: all that are not met.
    """

    def __init__(
        self,
        model: nn.Module,
        head: str | None,
        reader: BatchReader,
        split: ClassSplit | None,
        strategy: Strategy,
        warn: Callable[[str], None],
        absent_classes: Sequence[int] | None = None,
    ) -> None:
        self._model = model
        self._head = head
        self._reader = reader
        self._split = split
        self._strategy = strategy
        self._warn = warn
        self._labels = None
        self._absent_classes = absent_classes
        self._checked = self._told = False
        if split is None:
            self._labels = TrainingLabels(num_classes(find_head(model, head)), reader.maps, absent_classes)
        self._recorder = LogitRecorder(model, head)
        self._metrics: tuple[AUSUC, LogitLevelsMetric] | None = None  # while a validation runs
        self._target: Tensor | None = None
        self._counted = False

    def weight(self) -> Tensor | None:
        """Return the current weight of the head on the CPU, or ``None`` if the head is not linear."""
        try:
            return head_weight(self._model, self._head).cpu()
        except ValueError:
            return None

    def add_training_batch(self, batch: Any, loaders: Any) -> None:
        """Read the labels of a training batch, unless the split was given."""
        if self._labels is None:
            return
        try:
            self._labels.add_batch(batch, loaders, self._reader)
        except Exception as error:  # a function of the user can raise anything, and the run must go on
            self._warn(f"{error} Or pass `seen_classes`.")

    def check_first_batch(self) -> None:
        """Refuse absent classes that the first training batch has, on any process. Later calls do nothing.

        Raises:
            ValueError: If a class that was met is listed as absent.
        """
        checked, self._checked = self._checked, True
        if not checked and self._labels is not None and self._absent_classes is not None:
            errors = SharedErrors()
            with errors.shared():
                check_not_absent(self._labels.classes(), self._absent_classes)
            errors.agree()

    def add_classes(self, classes: Iterable[int]) -> None:
        """Add the seen classes of the run that this one resumes."""
        if self._labels is not None:
            self._labels.add_classes(classes)

    def classes(self) -> list[int]:
        """Return the classes in the training batches of this process. Empty if the split was given."""
        return [] if self._labels is None else self._labels.classes()

    def split(self) -> ClassSplit | None:
        """Return the split on all processes, or ``None`` if so far no class is seen or no class is absent."""
        if self._labels is None:
            return self._split
        split = self._labels.split(self._strategy)
        if not self._told and (both := {*self._labels.classes()} & {*(self._absent_classes or ())}):
            self._told = True
            rank_zero_warn(
                f"CalibrationDiagnostics counts the classes {shorten(sorted(both))} as seen: they are in"
                " `absent_classes`, but the training data has samples of them. Remove them from the list, or their"
                " samples from the data."
            )
        return split

    def start_validation(self) -> None:
        """Start to count validation batches, if the split is known."""
        if (split := self.split()) is None:
            return
        classes, device = (split.num_classes, split.seen_classes, split.absent_classes), self._strategy.root_device
        curve, levels = AUSUC(*classes, validate_args=False), LogitLevelsMetric(*classes, validate_args=False)
        self._metrics, self._counted = (curve.to(device), levels.to(device)), False

    def start_batch(self, batch: Any) -> None:
        """Record the logits of a validation batch until :meth:`end_batch`."""
        if self._metrics is None:
            return
        try:
            self._target = self._reader.rows(batch)  # now, since the step may remove it from the batch
        except Exception as error:
            self._warn(str(error))
        else:
            self._recorder.start()

    def end_batch(self) -> None:
        """Count the recorded logits."""
        target, self._target = self._target, None
        if self._metrics is None or target is None:
            return
        width = self._metrics[0].split.num_classes
        try:
            logits = one_forward(
                self._recorder.stop(), len(target), width, "Run the model exactly once on each validation batch."
            )
        except UnexpectedLogitsError as error:
            self._warn(str(error))
            return
        for metric in self._metrics:
            metric.update(logits, target)
        self._counted = True

    def end_validation(self, history: History, epoch: int, step: int) -> None:
        """Add a snapshot of the validation samples of all processes to ``history``, if any were counted."""
        metrics, self._metrics = self._metrics, None
        if metrics is None or not self._strategy.reduce_boolean_decision(self._counted, all=False):
            return
        curve, levels = metrics[0], metrics[1].levels()
        both = levels.seen.num_samples and levels.absent.num_samples
        history.add(curve.split, epoch, step, self.weight(), levels, evaluation_of(curve) if both else None)

    def end_epoch(self, history: History, epoch: int, step: int) -> None:
        """Add a snapshot of the weights to ``history``, if the split is known."""
        if (split := self.split()) is not None:
            history.add(split, epoch, step, self.weight())

    def remove(self) -> None:
        """Remove the hooks from the model."""
        self._metrics = None
        self._recorder.remove()
