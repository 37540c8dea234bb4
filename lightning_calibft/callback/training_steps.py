"""Find gamma from the logits of the training steps, without a pass over the data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightning_calibft.calibration.batched_updates import BatchedUpdates
from lightning_calibft.calibration.distributed import SharedErrors
from lightning_calibft.calibration.result import CalibrationResult, result_of
from lightning_calibft.callback.lightning_package import LightningModule
from lightning_calibft.estimators import Estimator, make_estimator
from lightning_calibft.head.record import UnexpectedLogitsError, one_forward, record_logits
from lightning_calibft.split import ClassSplit


class TrainingSteps:
    """Updates an estimator with the raw logits of each training step of the current epoch.

    These are the logits of train mode, with the weights of the moment.

    Args:
        model: The module in training, on its device, with its head attached.
        estimator: As in :class:`~lightning_calibft.AbsentClassCalibration`.
        estimator_kwargs: As in :class:`~lightning_calibft.AbsentClassCalibration`.
        split: The seen and the absent classes.
        counts: Whether the logits of this process count. Pass ``False`` if another process has the same logits.

    Attributes:
        counted: Whether this process has ever counted a step.
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
        """Forget the steps of the epoch before."""
        self._updates.clear()
        self._estimator.reset()

    def start_step(self, rows: Tensor) -> None:
        """Record the logits of a step. ``rows`` are the head's rows of its samples, of shape ``(N,)``."""
        self._target = rows.clone()  # the step may overwrite it
        if self._records is None:
            self._records = self._recorder.start()
        self._records.clear()
        self._of_step = None

    def end_forward(self) -> None:
        """Take the logits recorded so far as those of the step. Later ones, such as of another callback, are not."""
        if self._of_step is None and self._records is not None:
            self._of_step = self._records[:]

    def end_step(self, skipped: bool) -> None:
        """Count the logits of the step, unless it was skipped. Later steps may also leave out the head.

        Args:
            skipped: Whether the training step returned ``None``.

        Raises:
            ValueError: If the step did not run the head exactly once on its batch.
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
        # If the logits do not count, update without rows: a metric without updates would not wait for the others.
        self._updates.add(*(each if self._counts else each[:0] for each in rows))
        self.counted = True

    def result(self) -> CalibrationResult:
        """Return the gamma of the steps of all processes since the last :meth:`start_epoch`.

        Raises:
            ValueError: If gamma is not finite.
        """
        self.stop()
        errors = SharedErrors()
        with errors.shared():
            self._updates.flush()
        errors.agree()
        return result_of(self._estimator, self._choice)

    def stop(self) -> None:
        """Stop recording until the next step, so that the logits of a validation are not counted."""
        self._recorder.stop()
        self._records = None

    def _count(self, logits: Tensor, target: Tensor) -> None:
        # Looked up at each call: a metric stores `update` as an attribute, so a copy's would update the original.
        self._estimator.update(logits, target)
