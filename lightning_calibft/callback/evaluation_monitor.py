"""Measure AUSUC and accuracies from the logits of the user's own evaluation loop."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_calibft.calibration.batch_reader import BatchReader, target_error
from lightning_calibft.calibration.batched_updates import BatchedUpdates
from lightning_calibft.calibration.data_check import NO_LABEL, largest_outside
from lightning_calibft.callback.lightning_package import LightningModule
from lightning_calibft.head.attach import get_gamma
from lightning_calibft.head.record import LogitRecorder, UnexpectedLogitsError, one_forward, record_logits
from lightning_calibft.metrics.ausuc_with_accuracies import NAMES, AUSUCWithAccuracies
from lightning_calibft.split import ClassSplit

_REMEDY = (
    "Run the model once on a batch, or log `lightning_calibft.metrics.absent_class_metrics` in the LightningModule."
)


class EvaluationMonitor:
    """Records the logits of each evaluation batch at the head and updates one metric per loader.

    Attributes:
        split: The seen and the absent classes of the metrics. ``None`` if nothing is measured.
        step: The training step after which the evaluation began. -1 before the first evaluation.
        counted: Whether this process has counted a batch of the evaluation.
    """

    def __init__(self) -> None:
        self.split: ClassSplit | None = None
        self.step = -1
        self.counted = False
        self._reader = BatchReader()
        self._recorder: LogitRecorder | None = None
        self._target: Tensor | None = None
        self._unmapped = torch.tensor(NO_LABEL)
        self._warned = False
        self._gamma = 0.0
        self._shift = torch.zeros(())  # what `calibrate_logits` would add, without its checks
        self._metrics: list[AUSUCWithAccuracies] = []
        self._updates: list[BatchedUpdates] = []
        self._kept: EvaluationMonitor | None = None

    def keep(self) -> None:
        """Keep the last evaluation when the next one starts, for :meth:`of_step`."""
        self._kept = copy.copy(self)
        self._kept._kept, self._metrics = None, []  # the next evaluation makes its own metrics

    def of_step(self, step: int) -> EvaluationMonitor | None:
        """Return the last or the kept evaluation, if it was after this training step."""
        known = (each for each in (self, self._kept) if each is not None and each.step == step and each._metrics)
        return next(known, None)

    def start(
        self, model: LightningModule, reader: BatchReader, split: ClassSplit | None, num_loaders: int, step: int
    ) -> None:
        """Begin an evaluation of ``model`` with its current gamma, after the training step ``step``."""
        self.stop()  # an evaluation may have ended with an error
        self._reader, self._target = reader, None
        if split != self.split or num_loaders != len(self._metrics):
            self._metrics = [] if split is None else [_metric_of(split) for _ in range(num_loaders)]
        self.split, self.counted, self.step = split, False, step
        if split is None:
            return
        device = model.device
        for metric in self._metrics:
            metric.to(device).reset()
        self._updates = [BatchedUpdates(partial(_count, metric)) for metric in self._metrics]
        self._recorder = record_logits(model)
        self._gamma = get_gamma(model) or 0.0
        self._shift = self._gamma * split.absent_mask.to(device, torch.float32)
        self._unmapped = torch.tensor(NO_LABEL, device=device)

    def start_batch(self, batch: Any) -> None:
        """Record the logits of the model until :meth:`end_batch`."""
        if self.split is None:
            return
        assert self._recorder is not None
        try:
            self._reader.find_target(batch, self.split.num_classes)
            self._target = self._reader.rows(batch).clone()  # now, since the step may change the batch
        except Exception as error:  # a function of the user can raise anything, and the run must go on
            self._warn_once(str(error))
        else:
            self._recorder.start()

    def end_batch(self, dataloader_idx: int) -> None:
        """Stop recording and count the batch in the metric of its loader."""
        records = self.stop()
        target, self._target = self._target, None
        if self.split is None or target is None:
            return
        try:
            logits = one_forward(records, len(target), self.split.num_classes, _REMEDY)
        except UnexpectedLogitsError as error:
            self._warn_once(str(error))
            return
        if self._reader.maps:
            self._unmapped = largest_outside(self._unmapped, target, self.split.num_classes)
        if self._gamma != 0:
            logits = (logits + self._shift).to(logits.dtype)
        self._updates[dataloader_idx].add(logits, target)
        self.counted = True

    def stop(self) -> list[Tensor]:
        """Stop recording and return the recorded logits. Call this after an exception as well."""
        return [] if self._recorder is None else self._recorder.stop()

    def names(self, prefix: str) -> list[str]:
        """Return the names of the :meth:`values` of this evaluation. With several loaders, they end as in Lightning."""
        return list(self._named(prefix, [dict.fromkeys(NAMES) for _ in self._metrics]))

    def values(self, prefix: str) -> dict[str, Tensor]:
        """Return the values of the metrics by name."""
        if self.split is not None and (label := int(self._unmapped)) != NO_LABEL:
            self._warn_once(str(target_error(self.split.num_classes, label)), "samples")
        for updates in self._updates:
            updates.flush()
        return self._named(prefix, [metric.values() for metric in self._metrics])

    def accuracies(self, prefix: str, gamma: float) -> dict[str, Tensor]:
        """Return the accuracies that the evaluation would have had with ``gamma``, from the stored margins."""
        of_loaders = [metric.accuracies(gamma - self._gamma) for metric in self._metrics]
        named = [{f"acc_{key}": accuracy for key, accuracy in of_loader.items()} for of_loader in of_loaders]
        return self._named(prefix, named)

    def areas(self, prefix: str) -> dict[str, Tensor]:
        """Return AUSUC, which does not depend on gamma."""
        return self._named(prefix, [{"ausuc": metric.compute()} for metric in self._metrics])

    def _named(self, prefix: str, values: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        suffixes = [f"/dataloader_idx_{index}" for index in range(len(values))] if len(values) > 1 else [""]
        return {
            f"{prefix}_{name}{suffix}": value
            for suffix, of_loader in zip(suffixes, values, strict=True)
            for name, value in of_loader.items()
        }

    def _warn_once(self, reason: str, of: str = "batches") -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(f"AbsentClassCalibration logs no metrics for some {of}. {reason}", stacklevel=2)


def _metric_of(split: ClassSplit) -> AUSUCWithAccuracies:
    return AUSUCWithAccuracies(split.num_classes, split.seen_classes, split.absent_classes, validate_args=False)


def _count(metric: AUSUCWithAccuracies, logits: Tensor, target: Tensor) -> None:
    # Not `metric.update` itself, which torchmetrics wraps in each instance: that can be neither pickled nor copied.
    metric.update(logits, target)
