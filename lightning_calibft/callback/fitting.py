"""The part of the callback that follows a fit, from its first batch to the calibrated model and files."""

from __future__ import annotations

from functools import partial
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from typing_extensions import override

from lightning_calibft.calibration import CalibrationResult, EvaluationPass, head_width
from lightning_calibft.callback.averaging import averaged_copies
from lightning_calibft.callback.checks import check_kept_parts, order_callbacks
from lightning_calibft.callback.data import calibration_dataloader, check_first_batch, check_source, lockstep_of
from lightning_calibft.callback.kept import KeptCheckpoints, calibrate_files
from lightning_calibft.callback.labels import LabelsMet, training_batches
from lightning_calibft.callback.monitor import LogitMonitor
from lightning_calibft.callback.report import report
from lightning_calibft.callback.running import RunningCalibration
from lightning_calibft.head import reset_gamma, set_gamma
from lightning_calibft.split import ClassSplit


class FitCalibration(RunningCalibration):
    """Finds gamma when a fit ends, and puts it into the model and its kept checkpoints."""

    calibrate_checkpoints: bool

    @override
    def _start_afresh(self) -> None:
        super()._start_afresh()
        self._monitor = LogitMonitor()
        self.result: CalibrationResult | None = None
        self.checkpoint_results: dict[str, CalibrationResult] = {}
        self._finished = False
        self._batch_checked = False
        self._labels: LabelsMet | None = None
        self._restored_classes: list[int] = []
        self._kept: KeptCheckpoints | None = None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == TrainerFn.FITTING:
            if self._retraining is not None:
                self._retraining.setup(trainer)
            if self.calibrate_checkpoints and self.source != "training_steps":
                check_kept_parts(trainer, self.refresh)
            order_callbacks(trainer, self)
            self._start_afresh()

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        check_source(trainer, self.source, self.estimator)
        reset_gamma(pl_module)  # what is saved from now on until the end has other weights
        for _ in averaged_copies(trainer, pl_module):
            reset_gamma(pl_module)
        self._kept = KeptCheckpoints(trainer)
        if self._split is None:
            self._labels = LabelsMet(head_width(pl_module), self._reader.maps)
            self._labels.add_classes(self._restored_classes)
        if self._retraining is not None:
            self._retraining.keep(pl_module)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        # As at the start of the fit, for strategies that restore a checkpoint after it.
        reset_gamma(pl_module)
        if self._labels is not None:
            self._labels.add_classes(self._restored_classes)
        if self._retraining is not None:
            self._retraining.check(trainer)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        assert self._kept is not None
        self._kept.note()
        for part in training_batches(batch, trainer.train_dataloader):
            if not self._batch_checked:
                check_first_batch(trainer, pl_module, part, self._reader)
                self._batch_checked = True
            if self._labels is not None:
                self._count_labels(trainer, part)
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self._kept is not None
        self._kept.note()
        super().on_train_epoch_end(trainer, pl_module)
        if self._labels is not None:  # a checkpoint saved now knows the labels of all processes
            self._labels.end_epoch(trainer.strategy)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._retraining is None:  # it waits until all is saved: it takes long
            self._calibrate(trainer, pl_module, trained=True)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Most strategies have moved the model to the CPU, and asynchronous writers have finished.
        device = pl_module.device
        pl_module.to(trainer.strategy.root_device)
        if not self._finished:  # or nothing was left to train, so `on_train_end` was not called
            self._calibrate(trainer, pl_module, trained=False)
        if self.result is not None:
            if self.calibrate_checkpoints and lockstep_of(trainer) is None:  # else they have had a gamma from the first
                self._calibrate_kept(trainer, pl_module, self.result)
            self._report(trainer, self.result)
        self._forget()
        pl_module.to(device)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        self._forget()
        if not isinstance(exception, KeyboardInterrupt):
            return
        if self.result is None:
            rank_zero_warn("Fitting was interrupted: the model and its checkpoints are not calibrated.")
        elif self._finished and self.calibrate_checkpoints:
            rank_zero_warn(
                "Calibrating was interrupted: the model in memory is calibrated, but not each of its checkpoints."
                " `inspect_checkpoint` tells which are; `trainer.save_checkpoint` saves the model with its gamma."
            )

    def _count_labels(self, trainer: Trainer, batch: Any) -> None:
        assert self._labels is not None
        try:
            self._labels.add(self._reader.rows(batch))
        except (TypeError, ValueError):
            if calibration_dataloader(trainer) is None:
                raise
            self._labels = None  # mixed labels: those of the calibration data are read at the end

    def _forget(self) -> None:
        """Free the memory of what was kept for the fit."""
        self._steps = None
        self._before.forget()
        if self._retraining is not None:
            self._retraining.forget()

    def _calibrate(self, trainer: Trainer, model: LightningModule, trained: bool) -> None:
        self._finished = True
        self._use_steps(trainer, model, last=True)
        self._stop_steps()
        if self._steps is not None and self.result is not None:
            return
        if (found := self._found_for(trainer)) is not None:
            self._put(model, found)
            return
        self.result = None
        with isolate_rng():
            reading = self._pass(trainer, model)
            if reading is None:
                return
            split = self._split_of(trainer, reading)
            if split is not None:
                live = self._find(trainer, reading, split)
                self._put(model, live)
                for _ in averaged_copies(trainer, model):
                    # Training ends with the averaged weights.
                    result = live if trained else self._find(trainer, reading, split)
                    set_gamma(model, result.gamma, split.seen_classes, split.absent_classes)

    def _find(self, trainer: Trainer, reading: EvaluationPass, split: ClassSplit) -> CalibrationResult:
        if self._retraining is None:
            return reading.run(split)
        if self.result is not None:
            return self.result  # all weights of a run have the same
        assert self._before.weights is not None
        return self._retraining.run(trainer, self._before.weights, reading, split)

    def _calibrate_kept(self, trainer: Trainer, model: LightningModule, live: CalibrationResult) -> None:
        assert self._kept is not None
        kept = self._kept.files(self.refresh is not None) if trainer.is_global_zero else None
        files = trainer.strategy.broadcast(kept)
        if not files:
            return
        with isolate_rng():
            reading = self._pass(trainer, model)
            assert reading is not None
            run = partial(self._result_of_file, trainer, model, reading, live.split)
            self.checkpoint_results = calibrate_files(files, trainer, model, live, run)

    def _result_of_file(
        self,
        trainer: Trainer,
        model: LightningModule,
        reading: EvaluationPass,
        split: ClassSplit,
        checkpoint: dict[str, Any],
    ) -> CalibrationResult:
        return self._found_on_the_way(model, checkpoint, split) or self._find(trainer, reading, split)

    def _report(self, trainer: Trainer, result: CalibrationResult) -> None:
        before, after = {}, {}
        same = self._monitor.counted and self._monitor.split == result.split  # or classes were met after validation
        if trainer.strategy.reduce_boolean_decision(same, all=False):
            before, after = (self._monitor.accuracies("val", gamma) for gamma in (0.0, result.gamma))
        report(trainer, result, before, after, self._monitor.step, self.checkpoint_results)
