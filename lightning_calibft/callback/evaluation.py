"""Logging AUSUC and accuracies of validation and test, with no change to the user's module."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from typing_extensions import override

from lightning_calibft.callback.attachment import HeadAttachment
from lightning_calibft.callback.monitor import LogitMonitor
from lightning_calibft.split import ClassSplit


class EvaluationMetrics(HeadAttachment):
    """The part of the callback that follows evaluation loops."""

    _monitor: LogitMonitor

    def _split_so_far(self, trainer: Trainer, model: LightningModule) -> ClassSplit | None:
        """Return the classes as far as they are known, or ``None`` to log nothing."""
        return self._split

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_start(trainer, pl_module)
        self._start(trainer, pl_module, trainer.num_val_batches)

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_test_start(trainer, pl_module)
        self._start(trainer, pl_module, trainer.num_test_batches)

    @override
    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._monitor.start_batch(batch)

    @override
    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._monitor.end_batch(dataloader_idx)

    on_test_batch_start = on_validation_batch_start
    on_test_batch_end = on_validation_batch_end

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._log(trainer, pl_module, "val")

    @override
    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._log(trainer, pl_module, "test")

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        self._monitor.stop()

    def _start(self, trainer: Trainer, model: LightningModule, num_batches: list[int | float]) -> None:
        split = None if trainer.sanity_checking else self._split_so_far(trainer, model)
        self._monitor.start(model, self._reader, split, len(num_batches), trainer.global_step)

    def _log(self, trainer: Trainer, model: LightningModule, prefix: str) -> None:
        counted = self._monitor.counted
        if self._monitor.split is not None and trainer.strategy.reduce_boolean_decision(counted, all=False):
            # The values are the same on all processes; the flag keeps Lightning from warning that they may not be.
            model.log_dict(
                self._monitor.values(prefix),
                sync_dist=trainer.world_size > 1,
                add_dataloader_idx=False,  # they have it already
            )
