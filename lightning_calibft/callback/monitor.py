"""AUSUC and accuracies of the logits that the user's own evaluation loop produces."""

from __future__ import annotations

import warnings
from contextlib import ExitStack
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torchmetrics import MetricCollection

from lightning_calibft.calibration import BatchReader
from lightning_calibft.calibration.faults import NO_LABEL, largest_outside, target_error
from lightning_calibft.functional import calibrate_logits
from lightning_calibft.head import get_gamma, record_logits
from lightning_calibft.metrics import AUSUC, absent_class_metrics
from lightning_calibft.split import ClassSplit


class LogitMonitor:
    """Records the logits of each evaluation batch at the head and keeps one set of metrics for each loader."""

    def __init__(self) -> None:
        self._reader = BatchReader()
        self._recording = ExitStack()
        self._records: list[Tensor] = []
        self._target: Tensor | None = None
        self._unmapped = torch.tensor(NO_LABEL)
        self._warned = False
        self.split: ClassSplit | None = None
        self.gamma = 0.0
        self.step = -1
        self.counted = False  # whether any batch was
        self.metrics: list[MetricCollection] = []

    def start(
        self, model: LightningModule, reader: BatchReader, split: ClassSplit | None, num_loaders: int, step: int
    ) -> None:
        """Begin an evaluation of ``model``, with the gamma it has now, after training step ``step``."""
        self._reader = reader
        self._unmapped = torch.tensor(NO_LABEL, device=model.device)
        self.split, self.counted, self.step, self.metrics = split, False, step, []
        self.gamma = get_gamma(model) or 0.0
        if split is not None:
            ids = (split.num_classes, split.seen_classes, split.absent_classes)
            self.metrics = [
                absent_class_metrics(*ids, validate_args=False).to(model.device) for _ in range(num_loaders)
            ]

    def start_batch(self, model: LightningModule, batch: Any) -> None:
        """Record the logits of ``model`` until :meth:`end_batch`."""
        if self.split is None:
            return
        try:
            self._target = self._reader.rows(batch)  # now: the step may take it out of the batch
        except (TypeError, ValueError) as error:
            self._warn_once(str(error))
        else:
            self._records = self._recording.enter_context(record_logits(model))

    def end_batch(self, dataloader_idx: int) -> None:
        """Count the batch in the metrics of its loader."""
        self.stop()
        target, self._target = self._target, None
        records, self._records = self._records, []
        if self.split is None or target is None:
            return
        if [logits.shape for logits in records] != [(len(target), self.split.num_classes)]:
            self._warn_once(
                f"A batch of {len(target)} labels came with logits of the shapes"
                f" {[tuple(logits.shape) for logits in records]}. Run the model once on a batch, or log"
                " `lightning_calibft.metrics.absent_class_metrics` in the LightningModule."
            )
            return
        if self._reader.maps:
            self._unmapped = largest_outside(self._unmapped, target, self.split.num_classes)
        logits = calibrate_logits(records[0], self.gamma, self.split.seen_classes, self.split.absent_classes)
        self.metrics[dataloader_idx].update(logits, target)
        self.counted = True

    def stop(self) -> None:
        """Stop recording; after an exception as well."""
        self._recording.close()

    def values(self, prefix: str) -> dict[str, Tensor]:
        """Return the metrics of the evaluation, named as Lightning does where there are several loaders."""
        if self.split is not None and (label := int(self._unmapped)) != NO_LABEL:
            self._warn_once(str(target_error(self.split.num_classes, label)), "samples")
        return self._named(prefix, [metrics.compute() for metrics in self.metrics])

    def accuracies(self, prefix: str, gamma: float) -> dict[str, Tensor]:
        """Return what the accuracies of the evaluation would have been with ``gamma``, from its margins alone."""
        of_loaders = [cast(AUSUC, metrics["ausuc"]).accuracies(gamma - self.gamma) for metrics in self.metrics]
        named = [
            {"acc" if key == "all" else f"acc_{key}": accuracy for key, accuracy in of_loader.items()}
            for of_loader in of_loaders
        ]
        return self._named(prefix, named)

    def _named(self, prefix: str, values: list[dict[str, Tensor]]) -> dict[str, Tensor]:
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
