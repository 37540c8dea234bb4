"""The callback: it translates the events of a Trainer into calls on the rest of the package."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torchmetrics import Metric
from typing_extensions import override

from lightning_calibft.calibration import CalibrationResult, Pass, UnpackBatch, check_max_samples, head_width
from lightning_calibft.callback.averaging import averaged_copies
from lightning_calibft.callback.checks import check_not_folded, order_callbacks
from lightning_calibft.callback.data import calibration_dataloader, calibration_pass, check_first_batch
from lightning_calibft.callback.evaluation import EvaluationMetrics
from lightning_calibft.callback.kept import KeptCheckpoints, calibrate_files, put_calibration_of
from lightning_calibft.callback.labels import LabelsMet, split_of_data, training_batches
from lightning_calibft.callback.monitor import LogitMonitor
from lightning_calibft.callback.report import report
from lightning_calibft.class_map import ClassMap
from lightning_calibft.estimators import Estimator
from lightning_calibft.head import reset_gamma, set_gamma
from lightning_calibft.label_names import LabelNames
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
        seen_classes: Rows of the classes in the fine-tuning data. ``None``: the labels met in training.
        absent_classes: Rows of the classes to bring back. ``None``: all that are not seen.
        head: Dotted name of the module that gives the logits, where it is not found by itself.
        estimator: How gamma is found: ``"alg"``, ``"pseudo_absent"`` (better; keeps a copy of the weights that the fit
            begins with), or such a metric.
        unpack_batch: A function, or its import path, that takes a batch and returns ``(inputs, target)``, where
            batches are neither such pairs nor mappings with the target under ``label(s)``, ``target(s)`` or ``y``.
        class_map: The head's row of each target in the batches, where they differ, as in folders that number their
            classes from 0: the loss must map them itself. See :func:`~lightning_calibft.class_map.resolve_class_map`.
        label_names: Names of the head's rows, for a ``class_map`` of names.
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
        estimator: str | Metric = "alg",
        unpack_batch: UnpackBatch | str | None = None,
        class_map: ClassMap | None = None,
        label_names: LabelNames | None = None,
        max_samples: int | None = None,
        log_metrics: bool = True,
        calibrate_checkpoints: bool = True,
    ) -> None:
        check_max_samples(max_samples)
        checked = cast("str | Estimator", estimator)  # the protocol is more than LightningCLI can tell of a metric
        super().__init__(seen_classes, absent_classes, head, checked, unpack_batch, class_map, label_names)
        self.max_samples = max_samples
        self.log_metrics = log_metrics
        self.calibrate_checkpoints = calibrate_checkpoints
        self._start_afresh()

    def _start_afresh(self) -> None:
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
            self._labels = LabelsMet(head_width(pl_module), self._reader.maps)
            self._labels.add_classes(self._restored_classes)

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

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self._kept is not None
        self._kept.note()
        if self._labels is not None:  # a checkpoint saved now knows the labels of all processes
            self._labels.end_epoch(trainer.strategy)

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
        self._before.forget()
        pl_module.cpu()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        if isinstance(exception, KeyboardInterrupt) and self.result is None:
            rank_zero_warn("Fitting was interrupted: the model and its checkpoints are not calibrated.")

    def _count_labels(self, trainer: Trainer, batch: Any) -> None:
        assert self._labels is not None
        try:
            self._labels.add(self._reader.rows(batch))
        except (TypeError, ValueError):
            if calibration_dataloader(trainer) is None:
                raise
            self._labels = None  # mixed labels: those of the calibration data are read at the end

    def _calibrate(self, trainer: Trainer, model: LightningModule, trained: bool) -> None:
        self._finished = True
        with isolate_rng():
            reading = self._pass(trainer, model)
            if reading is None:
                return
            split = self._split or split_of_data(self._labels, trainer.strategy, reading)
            if split is not None:
                self.result = reading.run(split)
                set_gamma(model, self.result.gamma, split.seen_classes, split.absent_classes)
                for _ in averaged_copies(trainer, model):
                    result = self.result if trained else reading.run(split)  # training ends with the averaged weights
                    set_gamma(model, result.gamma, split.seen_classes, split.absent_classes)

    def _pass(self, trainer: Trainer, model: LightningModule) -> Pass | None:
        return calibration_pass(trainer, model, self.estimator, self._reader, self.max_samples, self._before.weights)

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
        report(trainer, result, before, after, self._monitor.step, self.checkpoint_results)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._kept is not None:
            self._kept.note()

    @override
    def _split_so_far(self, trainer: Trainer, model: LightningModule) -> ClassSplit | None:
        if not self.log_metrics:
            return None
        if self._split is not None:
            return self._split
        classes = self._labels.classes(trainer.strategy) if self._labels is not None else self._restored_classes
        width = head_width(model)
        return ClassSplit(width, classes) if 0 < len(classes) < width else None

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"seen_classes": self._labels.classes() if self._labels is not None else self._restored_classes}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored_classes = state_dict["seen_classes"]

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        results = [self.result, *self.checkpoint_results.values()]
        put_calibration_of(pl_module, [result for result in results if result is not None], checkpoint)

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            check_not_folded(checkpoint)
        elif "current_model_state" in checkpoint:
            # `WeightAveraging` has put back the weights from before averaging, which have no gamma.
            pl_module.load_state_dict(checkpoint["state_dict"], strict=pl_module.strict_loading)
