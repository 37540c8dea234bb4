"""Gamma from the logits that the training steps produce anyway, without a pass over the data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_calibft.calibration.batched_updates import BatchedUpdates
from lightning_calibft.calibration.result import CalibrationResult, result_of
from lightning_calibft.estimators import Estimator, make_estimator
from lightning_calibft.head.record import UnexpectedLogitsError, one_forward, record_logits
from lightning_calibft.split import ClassSplit


class TrainingSteps:
    """Feeds an estimator with the raw logits of each training step of the present epoch.

    They are those of train mode and of the weights as they were at each step.

    Args:
        model: The module in training, its head attached and on its device.
        estimator: As the callback takes it.
        estimator_kwargs: Likewise.
        split: The seen and the absent classes.
        counts: Whether the logits of this process count, or another has the same.

    Attributes:
        counted: Whether this process has counted any step.
    """

    def __init__(
        self,
        model: LightningModule,
        estimator: str | Estimator,
        estimator_kwargs: Mapping[str, Any] | None,
        split: ClassSplit,
        counts: bool = True,
    ) -> None:
        self.counted = False
        self._counts = counts
        self._choice = estimator
        self._estimator = make_estimator(estimator, split, estimator_kwargs).to(model.device)
        self._num_classes = split.num_classes
        self._updates = BatchedUpdates(self._count)
        self._recorder = record_logits(model)
        self._records: list[Tensor] | None = None
        self._of_step: list[Tensor] | None = None
        self._target: Tensor | None = None

    def start_epoch(self) -> None:
        """Forget the steps so far."""
        self._updates.clear()
        self._estimator.reset()

    def start_step(self, rows: Tensor) -> None:
        """Record a step on samples of these rows of the head, of shape ``(N,)``."""
        self._target = rows.clone()  # the step may write over it
        if self._records is None:
            self._records = self._recorder.start()
        self._records.clear()
        self._of_step = None

    def end_forward(self) -> None:
        """Take what was recorded for the step's own; what comes later, such as pictures of another callback, is not."""
        if self._of_step is None and self._records is not None:
            self._of_step = self._records[:]

    def end_step(self, skipped: bool) -> None:
        """Count the logits of the step, unless the module has skipped it.

        Raises:
            ValueError: If the step ran the head more or less than once on its batch.
        """
        self.end_forward()
        assert self._target is not None
        assert self._of_step is not None
        if skipped or (not self._of_step and self.counted):
            return
        try:
            logits = one_forward(self._of_step, len(self._target), self._num_classes)
        except UnexpectedLogitsError as error:
            raise ValueError(
                "Expected argument `source` to be 'train' or 'validation' for this module, but got 'training_steps'."
                f" In a training step: {error}"
            ) from None
        self._of_step.clear()
        rows = (logits, self._target)
        # An update with no rows, not none at all, after which a metric would not wait for the other processes.
        self._updates.add(*(each if self._counts else each[:0] for each in rows))
        self.counted = True

    def result(self) -> CalibrationResult:
        """Return gamma of the steps since the last :meth:`start_epoch`, of all processes."""
        self.stop()
        self._updates.flush()
        return result_of(self._estimator, self._choice)

    def stop(self) -> None:
        """Record no more until the next step: the logits of a validation are not those of a step."""
        self._recorder.stop()
        self._records = None

    def _count(self, logits: Tensor, target: Tensor) -> None:
        # Not handed over as it is: a metric keeps its `update` in itself, and a copy of this would feed the original.
        self._estimator.update(logits, target)
