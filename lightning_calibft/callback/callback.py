"""The callback: it translates the events of a Trainer into calls on the rest of the package."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from typing_extensions import override

from lightning_calibft.calibration import (
    CalibrationResult,
    Pass,
    UnpackBatch,
    check_head,
    check_max_samples,
    get_target,
    resolve_unpack_batch,
)
from lightning_calibft.callback.averaging import averaged_copies
from lightning_calibft.callback.checks import order_callbacks
from lightning_calibft.callback.data import calibration_dataloader, calibration_pass, first_calibration_batch
from lightning_calibft.callback.evaluation import EvaluationMetrics
from lightning_calibft.callback.kept import KeptCheckpoints, calibrate_files
from lightning_calibft.callback.labels import LabelsMet, training_batches
from lightning_calibft.callback.monitor import LogitMonitor
from lightning_calibft.callback.report import logged_values, summary
from lightning_calibft.checkpoint import calibration_entries, is_folded, put_calibration
from lightning_calibft.estimators import Estimator, check_estimator
from lightning_calibft.head import eval_mode, get_gamma, reset_gamma, set_gamma
from lightning_calibft.split import ClassSplit


class AbsentClassCalibration(EvaluationMetrics):
    r"""Brings the classes that the fine-tuning data lacks back into the model's predictions.

    At the end of fitting it finds one number, gamma, in one eval-mode pass over the training data, and registers it in
    the classification head: from then on gamma is added to the logits of the absent classes in eval mode. Every
    checkpoint that ``ModelCheckpoint`` has kept gets the gamma of its own weights. Gamma is the average logit gap of
    Mai et al., "Fine-Tuning is Fine, if Calibrated" (NeurIPS 2024). While fitting, it logs ``val_ausuc``, ``val_acc``,
    ``val_acc_seen``, ``val_acc_absent`` and ``val_acc_harmonic`` (and ``test_...``) of what the model predicts.

    Note:
        The loss, the random state and the trained weights are the same with and without the callback.
        The module must map inputs to logits (or to their softmax) in ``forward``, unless one attribute of it does so
        alone, as in ``self.net(x)``.
        A ``calibration_dataloader()`` of the datamodule or the module, if there is one, is read instead of the
        training data: the place for clean transforms or for labels that are not mixed.
        ``WeightAveraging`` callbacks must stand behind this one in the list of callbacks.

    Args:
        seen_classes: Ids of the classes in the fine-tuning data. ``None``: the labels met in training.
        absent_classes: Ids of the classes to bring back. ``None``: all that are not seen.
        head: Dotted name of the module that gives the logits, where it is not found by itself.
        estimator: How gamma is found: a name in ``lightning_calibft.estimators.ESTIMATORS``, or such a metric.
        unpack_batch: A function, or its import path, that takes a batch and returns ``(inputs, target)``, where
            batches are neither such pairs nor mappings with the target under ``label(s)``, ``target(s)`` or ``y``.
        max_samples: Read at most about this many training samples, drawn at random with a fixed seed.
        log_metrics: Whether to log the metrics of validation and test.
        calibrate_checkpoints: Whether to write gamma into the kept checkpoint files as well.

    Attributes:
        result: Gamma and what it rests on, after fitting.
        checkpoint_results: The same for each checkpoint file that was calibrated, by its path.

    Raises:
        ValueError: In ``setup`` or at the first batch, if the head is not found or does not give the logits, or if the
            classes do not fit it. At the end, if logits are not finite or labels are no rows of the head.
        TypeError: If an argument, the Trainer or the labels are of the wrong type.
        RuntimeError: If the order of callbacks or the strategy are not supported, or a file could not be calibrated.

    Example::

        trainer = Trainer(callbacks=[AbsentClassCalibration(), ModelCheckpoint(monitor="val_ausuc", mode="max")])
        trainer.fit(model, train_dataloader, val_dataloader)
        trainer.test(model, test_dataloader, ckpt_path="best")  # a calibrated test
    """

    def __init__(
        self,
        seen_classes: list[int] | None = None,
        absent_classes: list[int] | None = None,
        *,
        head: str | None = None,
        estimator: str | Estimator = "alg",
        unpack_batch: UnpackBatch | str | None = None,
        max_samples: int | None = None,
        log_metrics: bool = True,
        calibrate_checkpoints: bool = True,
    ) -> None:
        check_estimator(estimator, seen_classes, absent_classes)
        if absent_classes is not None and seen_classes is None:
            raise ValueError(
                "Expected argument `seen_classes` beside `absent_classes`, but got None. Give both, or neither."
            )
        check_max_samples(max_samples)
        super().__init__(seen_classes, absent_classes, head, estimator)
        self.unpack_batch = unpack_batch
        self.max_samples = max_samples
        self.log_metrics = log_metrics
        self.calibrate_checkpoints = calibrate_checkpoints
        self._unpack = resolve_unpack_batch(unpack_batch)
        self._start_afresh()

    def _start_afresh(self) -> None:
        self._monitor = LogitMonitor(self._unpack)
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
            order_callbacks(trainer, self)
            self._start_afresh()

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        reset_gamma(pl_module)  # what is saved from now on until the end has other weights
        for _ in averaged_copies(trainer, pl_module):
            reset_gamma(pl_module)
        self._kept = KeptCheckpoints(trainer)
        if self._split is None:
            self._labels = LabelsMet(self._width(pl_module))
            self._labels.add_classes(self._restored_classes)

    # -- training ------------------------------------------------------------------------------------------------------

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        assert self._kept is not None
        self._kept.note()
        for part in training_batches(batch, trainer.train_dataloader):
            if not self._batch_checked:
                self._check_batch(trainer, pl_module, part)
            if self._labels is not None:
                self._count_labels(trainer, part)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self._kept is not None
        self._kept.note()
        if self._labels is not None:
            self._labels.classes(trainer.strategy)  # a checkpoint saved now knows the labels of all processes

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._calibrate(trainer, pl_module, trained=True)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # The strategy has moved the model to the CPU, and asynchronous writers have finished.
        pl_module.to(trainer.strategy.root_device)
        if not self._finished:  # nothing was left to train, so `on_train_end` was not called
            self._calibrate(trainer, pl_module, trained=False)
        if self.result is not None:
            if self.calibrate_checkpoints:
                self._calibrate_kept(trainer, pl_module, self.result)
            self._report(trainer, self.result)
        pl_module.cpu()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        if isinstance(exception, KeyboardInterrupt) and self.result is None:
            rank_zero_warn("Fitting was interrupted: the model and its checkpoints are not calibrated.")

    def _check_batch(self, trainer: Trainer, model: LightningModule, batch: Any) -> None:
        """Meet now what would be wrong with the first batch of the pass at the end."""
        with isolate_rng(), eval_mode(model), trainer.precision_plugin.forward_context():
            clean = first_calibration_batch(trainer)
            batch = batch if clean is None else clean
            get_target(batch, self._unpack)
            check_head(model, batch, self._unpack)
        self._batch_checked = True

    def _count_labels(self, trainer: Trainer, batch: Any) -> None:
        assert self._labels is not None
        try:
            self._labels.add(get_target(batch, self._unpack))
        except (TypeError, ValueError):
            if calibration_dataloader(trainer) is None:
                raise
            self._labels = None  # mixed labels: those of the calibration data are read at the end

    # -- calibration ---------------------------------------------------------------------------------------------------

    def _calibrate(self, trainer: Trainer, model: LightningModule, trained: bool) -> None:
        self._finished = True
        with isolate_rng():
            reading = self._pass(trainer, model)
            split = None if reading is None else self._final_split(trainer, reading)
            if reading is not None and split is not None:
                self.result = reading.run(split)
                set_gamma(model, self.result.gamma, split.seen_classes, split.absent_classes)
                for _ in averaged_copies(trainer, model):
                    result = self.result if trained else reading.run(split)  # training ends with the averaged weights
                    set_gamma(model, result.gamma, split.seen_classes, split.absent_classes)

    def _pass(self, trainer: Trainer, model: LightningModule) -> Pass | None:
        reading = calibration_pass(trainer, model, self.estimator, self._unpack, self.max_samples)
        if reading is None:
            rank_zero_warn("AbsentClassCalibration found no training data: the model is not calibrated.")
        return reading

    def _final_split(self, trainer: Trainer, reading: Pass) -> ClassSplit | None:
        if self._split is not None:
            return self._split
        classes = self._labels.classes(trainer.strategy) if self._labels is not None else []
        classes = classes or reading.read_classes()
        if 2 <= len(classes) < reading.num_classes:
            return ClassSplit(reading.num_classes, classes)
        rank_zero_warn(
            f"The training data holds {len(classes)} of the {reading.num_classes} classes: AbsentClassCalibration needs"
            " at least two seen classes and one absent one, so the model is not calibrated."
        )
        return None

    def _calibrate_kept(self, trainer: Trainer, model: LightningModule, live: CalibrationResult) -> None:
        assert self._kept is not None
        files = trainer.strategy.broadcast(self._kept.files() if trainer.is_global_zero else None)
        if not files:
            return
        with isolate_rng():
            reading = self._pass(trainer, model)
            assert reading is not None
            run = partial(reading.run, live.split)
            self.checkpoint_results = calibrate_files(files, trainer, model, live, run)

    def _report(self, trainer: Trainer, result: CalibrationResult) -> None:
        before, after = {}, {}
        if trainer.strategy.reduce_boolean_decision(self._monitor.counted, all=False):
            before, after = (self._monitor.accuracies("val", gamma) for gamma in (0.0, result.gamma))
        where = f"validation data, weights of step {self._monitor.step} of {trainer.global_step}"
        rank_zero_info(summary(result, before, after, where, self.checkpoint_results))
        for logger in trainer.loggers:
            logger.log_metrics(logged_values(result, before, after), step=trainer.global_step)

    # -- evaluation ----------------------------------------------------------------------------------------------------

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._kept is not None:
            self._kept.note()

    @override
    def _split_so_far(self, trainer: Trainer, model: LightningModule) -> ClassSplit | None:
        if not self.log_metrics or self._split is not None:
            return self._split if self.log_metrics else None
        classes = self._labels.classes(trainer.strategy) if self._labels is not None else self._restored_classes
        width = self._width(model)
        return ClassSplit(width, classes) if 0 < len(classes) < width else None

    # -- state ---------------------------------------------------------------------------------------------------------

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"seen_classes": self._labels.classes() if self._labels is not None else self._restored_classes}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored_classes = state_dict["seen_classes"]

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        # After fitting, the model may have got the weights and the gamma of a kept file, or of one without gamma.
        gamma, results = get_gamma(pl_module), [self.result, *self.checkpoint_results.values()]
        if gamma is None or not (found := [r for r in results if r and math.isclose(r.gamma, gamma, rel_tol=1e-6)]):
            return
        entries = calibration_entries(checkpoint["state_dict"])
        if not any(value.any() for value in entries.values()):
            # Another callback has put its own copy of the weights here, which knows no gamma.
            entries = calibration_entries(pl_module.state_dict())
        put_calibration(checkpoint, entries, found[0])

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn == TrainerFn.FITTING and is_folded(checkpoint):
            raise ValueError(
                "Expected a checkpoint to resume from, but gamma is folded into the bias of this one: training it"
                " further would undo gamma, and calibrating it again would add it twice. Resume from the checkpoint"
                " that it was made of."
            )
        if trainer.state.fn != TrainerFn.FITTING and "current_model_state" in checkpoint:
            # `WeightAveraging` has put back the weights from before averaging, which have no gamma.
            pl_module.load_state_dict(checkpoint["state_dict"], strict=pl_module.strict_loading)
