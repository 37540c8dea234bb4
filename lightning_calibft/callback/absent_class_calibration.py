"""The main callback. Its hooks stand in the order in which a Trainer calls them."""

from __future__ import annotations

import math
import signal
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, cast

import torch
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torchmetrics import Metric
from typing_extensions import override

from lightning_calibft._arguments import check_type
from lightning_calibft._format import METADATA_KEY, expectations, warning_of_harm
from lightning_calibft.calibration.batch_calls import OwnForwardCall
from lightning_calibft.calibration.batch_reader import BatchReader, UnpackBatch
from lightning_calibft.calibration.data_check import warn_if_positions, warn_of_many_absent_rows
from lightning_calibft.calibration.distributed import SharedErrors
from lightning_calibft.calibration.evaluation_pass import EvaluationPass, head_width, preserve_random_state
from lightning_calibft.calibration.loaders import flat_loaders
from lightning_calibft.calibration.result import CalibrationResult
from lightning_calibft.callback.checkpoint_files import (
    KeptCheckpoints,
    calibrate_files,
    message_of,
    put_calibration_of,
)
from lightning_calibft.callback.evaluation_monitor import EvaluationMonitor
from lightning_calibft.callback.gamma_search import GammaSearch
from lightning_calibft.callback.head_attachment import HeadAttachment
from lightning_calibft.callback.lightning_package import LightningCallback, LightningModule, Trainer, lightning_of
from lightning_calibft.callback.listed_classes import ListedClasses
from lightning_calibft.callback.metric_log import MetricLog
from lightning_calibft.callback.network_copies import NetworkCopies
from lightning_calibft.callback.trainer_checks import (
    check_launcher,
    check_not_folded,
    check_sharded_checkpoints,
    check_trainer,
    finish_run,
    order_callbacks,
    warn_of_uploads,
)
from lightning_calibft.callback.trainer_data import (
    Source,
    calibration_dataloader,
    check_first_batch,
    check_read_once,
    is_model_parallel,
)
from lightning_calibft.callback.training_labels import TrainingLabels, check_not_absent, split_of_data, split_of_met
from lightning_calibft.callback.weight_averaging import averaged_copies, check_averaged_copies, check_averaging_order
from lightning_calibft.estimators import Estimator
from lightning_calibft.estimators.choice import with_absent_share
from lightning_calibft.head.attach import attached_split, reset_gamma, set_attached_gamma
from lightning_calibft.labels.class_map import ClassMap, resolve_class_map
from lightning_calibft.labels.dataset_labels import class_names_of_loaders
from lightning_calibft.labels.label_names import LabelNames, row_names_of
from lightning_calibft.metrics.ausuc_with_accuracies import NAMES
from lightning_calibft.split import ClassSplit, class_ids


class AbsentClassCalibration(LightningCallback):
    r"""Makes a fine-tuned model predict the classes that its fine-tuning data does not contain.

    At the end of a fit, the callback finds one number, gamma, in one eval-mode pass over the training data (or other
    data, see ``source``), and stores it in the classification head. From then on, gamma is added to the logits of the
    absent classes in eval mode. Every checkpoint that ``ModelCheckpoint`` keeps gets the gamma of its own weights.
    Gamma is the average logit gap of Mai et al., "Fine-Tuning is Fine, if Calibrated" (NeurIPS 2024). In validation and
    test, the callback logs ``val_ausuc``, ``val_acc_all``, ``val_acc_seen``, ``val_acc_absent`` and
    ``val_acc_harmonic`` (or ``test_...``).

    Note:
        The loss, the random state and the trained weights are the same with and without the callback, with two
        exceptions: ``source="training_steps"`` breaks the graph of a compiled module, and ``tolerance`` and
        ``refresh_on_validation`` read the data during training, which moves a stream that keeps its position in an
        object of this process.

        The hooks run after those of all other callbacks, except for those that save checkpoints.

        Modules run as they are: a module's ``forward`` is called as its own steps call it, and a module whose
        ``forward`` does not map inputs to logits is run through its ``validation_step`` or ``training_step``, with
        logging and optimizers muted. The page "Which modules work" (``docs/modules.md``) lists the forms.

        If the datamodule or the module has a method ``calibration_dataloader()``, its data is read instead of the
        training data, and with ``source="auto"`` instead of the validation data. Use it for clean transforms, for
        labels that are not mixed, or for samples that are not trained on.

        ``WeightAveraging`` callbacks must come after this one in the list of callbacks, unless the calibration was
        attached to the module before.

        With ``ddp_spawn`` and ``ddp_notebook``, call :func:`~lightning_calibft.attach` on the module before the fit.
        Otherwise the Trainer could not bring gamma back into the module, and the fit is refused. The attributes of this
        callback stay in the processes that it ran in. Use :func:`~lightning_calibft.get_gamma` and
        :func:`~lightning_calibft.inspect_checkpoint` to read gamma.

        With ``ModelParallelStrategy``, checkpoints have the gamma that the model has when they are written, and are not
        calibrated again after the fit. This needs ``refresh_on_validation=True`` or ``source="training_steps"``.

    Args:
        seen_classes: Head rows of the classes in the fine-tuning data. ``None``: the labels in the training batches.
            Before they are all met, validation takes those that the datasets list in ``targets``, ``labels``,
            ``samples`` or ``tensors``, if they do. If the metrics of validations cannot be compared, a warning says so.
        absent_classes: Head rows of the absent classes that can occur, with or without ``seen_classes``. ``None``: all
            classes that are not seen. Rows that never occur move gamma, so leave them out. A class that the training
            data has is refused.
        head: Dotted name of the module that outputs the logits, if it is not found automatically.
        estimator: How gamma is found: ``"alg"``, ``"pseudo_absent"`` (keeps a copy of the weights that the fit begins
            with), another name in :data:`~lightning_calibft.estimators.ESTIMATORS`, an instance of such a metric, or
            ``"pcv"``. The latter runs :func:`~lightning_calibft.pseudo_cross_validation` after the fit, with this
            module, its data and the settings of this Trainer. Of the other callbacks, only those that shape the
            training take part (``BaseFinetuning`` and ``GradientAccumulationScheduler``). These trainings save and log
            nothing.
        estimator_kwargs: Further arguments of the estimator, such as ``{"min_seen_accuracy": 0.9}`` for
            ``"operating_point"``. For ``"pcv"``: ``num_splits``, ``candidates``, ``seed``, ``folder`` and ``epochs``,
            the length of each training as a share of the fit's epochs (or steps).
        absent_share: The share of samples of absent classes that the model will meet, in (0, 1). ``None``: as the
            estimator documents it; ``"alg"`` then is that of the paper, and ``"pseudo_absent"`` assumes 0.5.
        unlabeled: A loader of samples from where the model will be used, as in :func:`~lightning_calibft.calibrate`.
            The share of samples of absent classes in them takes the place of ``absent_share``. ``None``: the
            ``unlabeled_dataloader()`` of the datamodule or the module, if there is one. It needs the estimator
            ``"pseudo_absent"`` or ``"operating_point"``.
        source: The data that gamma is found on. ``"train"``: one more pass over the training data, in eval mode.
            ``"validation"``: a pass over the validation data, where only ``"operating_point"`` uses the samples of
            absent classes. Accuracies on the same data are then slightly optimistic: gamma has seen its labels of seen
            classes. ``"auto"``: the training data for ``"alg"`` and ``"pcv"``. Estimators that look at margins
            (``"pseudo_absent"``), which are too large on samples that were trained on, take the validation data if it
            has at least 50 samples of seen classes. Otherwise, they take the training data, with a warning before
            training. ``"training_steps"``: the logits of the training steps themselves, if a pass would take too
            long. Validation and checkpoints then have the gamma of the epoch's steps so far. This needs
            ``seen_classes`` and training steps that run the head once. Steps that return ``None`` are left out.
        unpack_batch: A function, or its import path, that takes a batch and returns ``(inputs, target)``. Needed if the
            target is not the second item of a pair, the only vector of class ids in a longer tuple, or what a mapping
            or an object has under ``label(s)``, ``target(s)``, ``y`` or the like.
        class_map: The head's row for each target in the batches, if they differ, as with image folders, which number
            their classes from 0. The loss must map the targets itself. See
            :func:`~lightning_calibft.resolve_class_map`.
        label_names: Names of the head's rows, for a ``class_map`` of names.
        max_samples: Read at most about this many samples, drawn at random with a fixed seed. With ``None``, each pass
            over an endless stream reads as many batches as training has read.
        tolerance: Stop reading when the standard error of gamma is at most this, in logits. Samples are then read in
            random order (those of a custom loader in its own order), and ``result.num_samples`` is the number of
            samples read. Works with one ``DataLoader`` only.
        refresh_on_validation: Whether to find gamma before each validation as well, and log it as ``val_gamma``. The
            model is then calibrated when it is validated, monitored and saved. Checkpoints saved between validations
            have the gamma of the last one until the fit ends. Each refresh takes a pass, so consider ``max_samples`` or
            ``tolerance``.
        log_metrics: Whether to log the metrics of validation and test, and ``val_gamma``.
        metric_prefix: Text to put before each name that is logged, as in ``"calibft_"`` for ``calibft_val_ausuc``. If
            the module or another callback logs the same name, theirs is not touched, and the one of this callback is
            left out, with a warning.
        calibrate_checkpoints: Whether to write gamma into the kept checkpoint files as well. If not, what is saved when
            training ends waits for the pass, so that it has gamma.

    Attributes:
        result: The result of the calibration after the fit: gamma, its standard error, and the samples and classes.
        checkpoint_results: The result for each calibrated checkpoint file, by its path.

    Raises:
        ValueError: If an argument is out of range. When a fit starts or at its first batch, if the head is not found,
            its output is not the logits, or the classes do not fit it. At the end, if logits are not finite, or labels
            are not rows of the head or are of absent classes.
        TypeError: If an argument, the Trainer or the labels are of the wrong type.
        RuntimeError: If the order of callbacks or the strategy is not supported, or if a file could not be calibrated.

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
        estimator_kwargs: dict[str, Any] | None = None,
        absent_share: float | None = None,
        unlabeled: Any = None,
        source: Source = "auto",
        unpack_batch: UnpackBatch | str | None = None,
        class_map: ClassMap | None = None,
        label_names: LabelNames | None = None,
        max_samples: int | None = None,
        tolerance: float | None = None,
        refresh_on_validation: bool = False,
        log_metrics: bool = True,
        metric_prefix: str = "",
        calibrate_checkpoints: bool = True,
    ) -> None:
        check_type("log_metrics", log_metrics, bool)
        check_type("metric_prefix", metric_prefix, str)
        check_type("calibrate_checkpoints", calibrate_checkpoints, bool)
        checked = cast("str | Estimator", estimator)  # LightningCLI cannot check the protocol, only the type `Metric`
        self.seen_classes = seen_classes
        self.absent_classes = absent_classes
        self.head = head
        self.estimator = checked
        self.estimator_kwargs = estimator_kwargs
        self.absent_share = absent_share
        self.unlabeled = unlabeled
        self.source = source
        self.unpack_batch = unpack_batch
        self.class_map = class_map
        self.label_names = label_names
        self.max_samples = max_samples
        self.tolerance = tolerance
        self.refresh_on_validation = refresh_on_validation
        self.log_metrics = log_metrics
        self.metric_prefix = metric_prefix
        self.calibrate_checkpoints = calibrate_checkpoints
        self._search = GammaSearch(
            checked,
            with_absent_share(checked, estimator_kwargs, absent_share),
            source,
            max_samples,
            tolerance,
            refresh_on_validation,
            seen_classes,
            absent_classes,
            unlabeled,
        )
        self._attachment = HeadAttachment(head, self._read_arguments)
        self._copies = NetworkCopies()
        self._reader = self._make_reader(None)
        self._split: ClassSplit | None = None  # if the arguments give it
        self._absent: Sequence[int] | None = None
        self._start_afresh()

    def _start_afresh(self) -> None:
        self.result: CalibrationResult | None = None
        self.checkpoint_results: dict[str, CalibrationResult] = {}
        self._monitor = EvaluationMonitor()
        self._log = MetricLog()
        self._labels: TrainingLabels | None = None
        self._listed: ListedClasses | None = None
        self._restored_classes: list[int] = []
        self._files: KeptCheckpoints | None = None
        self._best: tuple[str, int] | None = None  # the best file and its training step
        self._batch_checked = False
        self._told_of_rows = False
        self._own_call: OwnForwardCall | None = None
        self._labels_missed = False
        self._steps_failure: Exception | None = None
        self._terminated = False
        self._finished = False
        self._failure: Exception | None = None

    # The start. Weights are restored between `setup` and `on_fit_start`, so the buffers must exist before that.

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        check_trainer(trainer, pl_module)
        if stage == "fit":
            check_averaging_order(trainer, pl_module, self)
            check_launcher(trainer, pl_module, self.head)
            self._search.setup(trainer, pl_module)
            if self.calibrate_checkpoints and self.source != "training_steps":
                check_sharded_checkpoints(trainer, self.refresh_on_validation)
        self._copies.begin()
        self._attachment.attach_or_wait(pl_module, sharded=is_model_parallel(trainer))
        if stage == "fit":
            order_callbacks(trainer, self)
            self._start_afresh()

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn == "fit":
            check_not_folded(checkpoint)
        elif "current_model_state" in checkpoint:
            # `WeightAveraging` has restored the weights from before averaging, which have no gamma.
            pl_module.load_state_dict(checkpoint["state_dict"], strict=pl_module.strict_loading)

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored_classes = state_dict["seen_classes"]

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._attachment.ensure(trainer, pl_module)
        self._copies.note(pl_module)
        check_averaged_copies(trainer, pl_module)
        reset_gamma(pl_module)  # a gamma from before does not fit the weights of this fit
        for _ in averaged_copies(trainer, pl_module):
            reset_gamma(pl_module)
        self._files = KeptCheckpoints(trainer)
        early = self.source == "training_steps" or (self.refresh_on_validation and trainer.enable_validation)
        if self.calibrate_checkpoints and not early:
            warn_of_uploads(trainer)
        self._begin(trainer, pl_module)

    # Training.

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Again, for strategies that restore a checkpoint only after `on_fit_start`.
        reset_gamma(pl_module)
        if self._labels is not None:
            self._labels.add_classes(self._restored_classes)
        self._read_lists(trainer, pl_module)
        seen = self._listed_classes() if self._split is None else list(self._split.seen_classes)
        self._warn_of_many_absent_rows(seen)
        self._search.choose_source(trainer, self._rows, self.unpack_batch is None, seen)
        check_read_once(trainer, self._search.source, during_training=self.refresh_on_validation)
        if self.tolerance is not None:  # refuse data that it does not work with now, not after training
            with preserve_random_state():
                self._search.make_pass(trainer, pl_module)
        if self._search.retraining is not None:
            names = {f"{self.metric_prefix}val_{name}" for name in NAMES}
            self._search.retraining.check(trainer, names - self._log.taken(trainer))

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        order_callbacks(trainer, self)
        if self._search.steps is not None:
            self._search.steps.start_epoch()

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        assert self._files is not None
        if self._files.forgetful:
            self._files.note()
        if batch_idx == 0 or not self._batch_checked:
            self._ensure_attached(trainer, pl_module)
        if not self._batch_checked:
            self._check_first_batch(trainer, pl_module, batch)
        if self._labels is not None and not self._labels.given_up:
            self._count_labels(trainer, batch)
        if self._search.steps is not None and self._failure is None:
            with self._told_at_the_end(postpone=self._search.steps.counted):
                self._search.steps.start_step(self._reader.rows(batch))
        self._copies.pause_gamma()

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        if self._search.steps is not None and self._failure is None:
            self._search.steps.end_forward()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._own_call is not None:
            self._reader.own_call, self._own_call = self._own_call.stop(), None
        self._copies.resume_gamma()
        if self._search.steps is not None and self._failure is None:
            with self._told_at_the_end(postpone=self._search.steps.counted):
                # If there are no outputs, the step returned None.
                self._search.steps.end_step(skipped=pl_module.automatic_optimization and not outputs)

    # Validation and test.

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._ensure_attached(trainer, pl_module)
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._use_steps(trainer, pl_module)
            if self.refresh_on_validation:
                self._refresh(trainer, pl_module)
        if self._files is not None and self._files.best_is_new():
            self._monitor.keep()  # what may have been measured of it, for the report
        self._start_monitor(trainer, pl_module, "val", trainer.num_val_batches)

    @override
    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._monitor.start_batch(batch)
        self._copies.start_evaluation_batch()

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
        self._copies.end_evaluation_batch()
        self._monitor.end_batch(dataloader_idx)

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._fill_metrics(trainer, "val")
        if trainer.state.fn == "fit" and (found := self._search.found_at(trainer.global_step)) is not None:
            gamma = torch.tensor(found.gamma, dtype=torch.float32, device=pl_module.device)
            self._log.fill({f"{self.metric_prefix}val_gamma": gamma})

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._log.end()

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._ensure_attached(trainer, pl_module)
        self._start_monitor(trainer, pl_module, "test", trainer.num_test_batches)

    on_test_batch_start = on_validation_batch_start
    on_test_batch_end = on_validation_batch_end

    @override
    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._fill_metrics(trainer, "test")

    on_test_end = on_validation_end

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._attachment.ensure(trainer, pl_module)

    # Checkpoints are saved after validation, and at the end of epochs and of training.

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self._files is not None
        self._files.note()
        self._use_steps(trainer, pl_module)
        if self._labels is not None:  # so that a checkpoint saved now has the labels of all processes
            self._labels.end_epoch(trainer.strategy)
            self._warn_of_many_absent_rows(self._labels.classes())
        if self.calibrate_checkpoints and not is_model_parallel(trainer):
            # If training ends now, what it saves last is on the disk before the pass begins, in which the process may
            # die. Files that are not calibrated later must have their gamma when they are written.
            order_callbacks(trainer, self, last=True)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"seen_classes": self._labels.classes() if self._labels is not None else self._restored_classes}

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        results = [self.result, *self.checkpoint_results.values()]
        put_calibration_of(pl_module, [result for result in results if result is not None], checkpoint)

    # The end. The user's run does not wait for the calibration: the model gets its gamma when all is saved, the files
    # get theirs when all are written, and an error is raised when everything else is done.

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        order_callbacks(trainer, self)
        if self._search.retraining is not None:  # takes long, so it waits until the Trainer has finished with the model
            return
        if trainer.strategy.reduce_boolean_decision(self._failure is not None, all=False):
            return
        if trainer.world_size > 1:
            self._hold_termination()
        with self._told_at_the_end():
            self._calibrate(trainer, pl_module, trained=True)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._terminated:
            self._terminated = False
            signal.raise_signal(signal.SIGTERM)
        if not trainer.strategy.reduce_boolean_decision(self._failure is not None, all=False):
            with self._told_at_the_end():
                self._calibrate_all(trainer, pl_module)
        self._search.forget()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._attachment.stop_waiting()  # a tuner can leave a fit in the middle without calling other hooks
        self._search.pretrained.forget()
        if stage == "fit" and trainer.strategy.reduce_boolean_decision(self._failure is not None, all=False):
            failure, self._failure = self._failure, None
            finish_run(trainer, pl_module, self, stage)
            raise failure or RuntimeError("Calibrating failed on another process. See the error there.")
        own_end = (
            getattr(pl_module.on_fit_end, "__func__", None) is not lightning_of(trainer).LightningModule.on_fit_end
        )
        if stage == "fit" and own_end and self.result is not None:
            self._follow(trainer, pl_module, self.result)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._attachment.stop_waiting()
        self._copies.resume_gamma()
        self._monitor.stop()
        if self._own_call is not None:
            self._own_call.stop()
        self._search.forget()
        if not isinstance(exception, KeyboardInterrupt):
            return
        if self.result is None:
            rank_zero_warn("Fitting was interrupted: the model and its checkpoints are not calibrated.")
        elif self._finished and self.calibrate_checkpoints:
            rank_zero_warn(
                "Calibrating was interrupted: the model in memory is calibrated, but not all of its checkpoints are."
                " `inspect_checkpoint` shows which ones are. `trainer.save_checkpoint` saves the model with its gamma."
            )

    # Helpers of the hooks.

    def _begin(self, trainer: Trainer, model: LightningModule) -> None:
        """Begin a fit, or begin it again with a head that has replaced the one before."""
        self._batch_checked = False
        if self._split is None:
            classes = self._restored_classes if self._labels is None else self._labels.classes()
            self._labels = TrainingLabels(width := head_width(model), self._reader.maps, self._absent)
            self._labels.add_classes(label for label in classes if label < width)
        else:
            self._labels = None
        self._listed = ListedClasses(head_width(model), self._absent)
        self._search.start(trainer, model, self._reader, self._split)

    def _ensure_attached(self, trainer: Trainer, model: LightningModule) -> None:
        """Attach the calibration again if the module has replaced its head."""
        replaced = self._attachment.ensure(trainer, model)
        self._copies.note(model)
        if replaced and trainer.state.fn == "fit":
            reset_gamma(model)
            self._begin(trainer, model)
            if trainer.train_dataloader is not None:
                self._read_lists(trainer, model)

    def _read_arguments(self, num_classes: int) -> None:
        """Interpret the arguments again, now that the width of the head is known."""
        self._reader = self._make_reader(num_classes)
        self._split, self._absent = None, None
        if self.absent_classes is not None:
            self._absent = class_ids("absent_classes", self.absent_classes, num_classes)
        if not isinstance(self.estimator, str):
            self._split = self.estimator.split
        elif self.seen_classes is not None:
            self._split = ClassSplit(num_classes, self.seen_classes, self._absent)
        self._search.check_split(self._split, num_classes)

    def _make_reader(self, num_classes: int | None) -> BatchReader:
        self._rows = resolve_class_map(self.class_map, self.label_names, num_classes)
        return BatchReader(self.unpack_batch, self._rows)

    def _read_lists(self, trainer: Any, model: LightningModule) -> None:
        """Read the classes that the datasets list, and warn if their names show that the labels are not rows."""
        assert self._listed is not None
        compares = self.log_metrics and trainer.enable_validation and not trainer.fast_dev_run
        tell = compares and self._labels is not None and not self._restored_classes
        self._listed.read(trainer, self._rows, self._restored_classes, readable=self.unpack_batch is None, tell=tell)
        names = class_names_of_loaders(flat_loaders(trainer.train_dataloader))
        if self._reader.maps or not names:
            return
        listed = self._listed.classes()
        if self._labels is not None:
            self._labels.may_be_positions = False  # the names say more
            warn_if_positions(listed or sorted(names), self._labels.num_classes, names, row_names_of(model))
        elif self._split is not None and not set(listed) <= set(self._split.seen_classes):
            warn_if_positions(listed, self._split.num_classes, names, row_names_of(model))

    def _warn_of_many_absent_rows(self, seen: list[int]) -> None:
        """Warn once if most rows of the head may never occur, where that moves gamma and nothing was said about it."""
        said = self.absent_share is not None or "absent_share" in (self.estimator_kwargs or {})
        counts = isinstance(self.estimator, str) and self.estimator in ("alg", "pseudo_absent")
        if self._told_of_rows or said or not counts or self._labels is None or self._absent is not None or not seen:
            return
        self._told_of_rows = True
        absent = self._labels.num_classes - len(seen)
        positions = not self._reader.maps and seen == list(range(len(seen)))  # there is another warning for those
        if not positions:
            warn_of_many_absent_rows(len(seen), absent)

    def _check_first_batch(self, trainer: Trainer, model: LightningModule, batch: Any) -> None:
        check = partial(check_first_batch, trainer, model, batch, self._reader)
        part, self._search.unlabeled = self._copies.check_first_batch(model, check)
        with self._copies.evaluated(model):
            self._search.check_unlabeled_batch(trainer, model)
        self._batch_checked = True
        if self._absent is not None and self._labels is not None:
            self._check_none_is_absent(part)
        if part is not None:
            self._own_call = OwnForwardCall(model, self._reader, part)

    def _check_none_is_absent(self, part: Any) -> None:
        """Refuse, before the first step, absent classes that the training data has, as far as it is known."""
        errors = SharedErrors()
        with errors.shared():
            rows = set() if part is None else set(self._reader.rows(part).tolist())
            listed = self._listed_classes()
            check_not_absent(listed if rows <= set(listed) else sorted(rows), self._absent)
        errors.agree()

    def _count_labels(self, trainer: Trainer, batch: Any) -> None:
        assert self._labels is not None
        try:
            self._labels.add_batch(batch, trainer.train_dataloader, self._reader, self._search.unlabeled)
        except Exception:  # the user's function can raise anything; the first batch was fine
            if calibration_dataloader(trainer) is None:
                self._labels_missed = True
            else:
                self._labels.give_up()  # the labels of the calibration data are read at the end

    def _start_monitor(
        self, trainer: Trainer, model: LightningModule, stage: str, num_batches: list[int | float]
    ) -> None:
        logs = self.log_metrics and not trainer.sanity_checking
        split = self._split_so_far(trainer, model) if logs else None
        self._monitor.start(model, self._reader, split, len(num_batches), trainer.global_step)
        names = [] if split is None else self._monitor.names(f"{self.metric_prefix}{stage}")
        if logs and trainer.state.fn == "fit" and self._search.found_at(trainer.global_step) is not None:
            names.append(f"{self.metric_prefix}val_gamma")
        self._log.announce(trainer, model, names)

    def _split_so_far(self, trainer: Trainer, model: LightningModule) -> ClassSplit | None:
        """Return the split as far as it is known. It is the same on all processes."""
        known = self._split
        if known is None and self._labels is not None and trainer.state.fn == "fit":
            assert self._listed is not None
            at_end = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
            return self._listed.split(self._labels.classes(trainer.strategy), at_end)
        if known is None and self._labels is not None:
            known = self._labels.split(trainer.strategy)
        elif known is None:
            known = split_of_met(head_width(model), self._restored_classes, self._absent)
        # In a fit, the head has no gamma or one for this split. Otherwise, it may have that of any other run.
        return known if trainer.state.fn == "fit" else attached_split(model, known, self._restored_classes)

    def _fill_metrics(self, trainer: Trainer, stage: str) -> None:
        counted = self._monitor.counted
        if self._monitor.split is not None and trainer.strategy.reduce_boolean_decision(counted, all=False):
            self._log.fill(self._monitor.values(f"{self.metric_prefix}{stage}"))  # the same on all processes

    def _use_steps(self, trainer: Trainer, model: LightningModule) -> None:
        """Put the gamma of the training steps so far into the model, for validation and checkpoints."""
        self._steps_failure = None
        if self._search.steps is None:
            return
        if trainer.strategy.reduce_boolean_decision(self._failure is not None, all=False):
            reset_gamma(model)  # the steps since the failure are missing
            return
        try:
            result = self._search.result_of_steps(trainer, model)
        except Exception as error:  # for example, logits that are not finite; training may recover
            self._steps_failure = error
            return
        if result is not None:
            self._put(model, result)

    def _refresh(self, trainer: Trainer, model: LightningModule) -> None:
        """Find the gamma of the current weights and put it into the model."""
        try:
            if self._labels is not None:
                self._labels.check(trainer.strategy)
            with preserve_random_state():
                reading = self._search.make_pass(trainer, model, self._knows_classes(trainer))
                if reading is None:
                    return
                split = self._split_so_far(trainer, model)
                if split is None or len(split.seen_classes) < 2:
                    split = self._split_of(trainer, reading)
                if split is None:
                    return
                with self._copies.evaluated(model):
                    result = self._search.run_before_validation(trainer, model, reading, split)
        except Exception as error:  # the data and the model can raise anything, and training may recover
            reset_gamma(model)
            self.result = None
            # Warn on each process: the others may not know the reason.
            text = f"AbsentClassCalibration leaves step {trainer.global_step} without gamma. {message_of(error)}"
            warnings.warn(text, stacklevel=2)
            return
        self._put(model, result)

    def _hold_termination(self) -> None:
        """Hold a SIGTERM back until the Trainer has put back the handler from before the fit.

        Lightning's own handler sends a message to the other processes at once. They would take it for one that belongs
        to the pass, and all would wait forever.
        """

        def note(*_: Any) -> None:
            self._terminated = True

        with suppress(ValueError):  # only the main thread can do this, and only there do signals arrive
            signal.signal(signal.SIGTERM, note)

    @contextmanager
    def _told_at_the_end(self, postpone: bool = True) -> Iterator[None]:
        """Keep an error until the run of the user is complete. Without ``postpone``, raise it now."""
        try:
            yield
        except Exception as error:
            if not postpone:
                raise
            self._failure = self._failure or error

    def _calibrate_all(self, trainer: Trainer, model: LightningModule) -> None:
        """Calibrate the model, unless that is done, and the kept files. Then report."""
        # By now, most strategies have moved the model to the CPU, and asynchronous writers have finished.
        device, errors = model.device, SharedErrors()
        with errors.shared():
            model.to(trainer.strategy.root_device)
        errors.agree()
        try:
            if not self._finished:  # with "pcv", or if nothing was left to train
                self._calibrate(trainer, model, trained=False)
            elif self.result is not None:  # since then, the module or a callback may have changed the weights
                found = self._search.found_for(trainer, model)
                if found is not None and found.split == self.result.split:
                    self._put(model, found)
                else:
                    self._calibrate(trainer, model, trained=True)
            if self.result is not None:
                if self.calibrate_checkpoints and not is_model_parallel(trainer):  # its files were saved with a gamma
                    self._calibrate_files(trainer, model, self.result)
                self._report(trainer, self.result)
        finally:
            model.to(device)

    def _calibrate(self, trainer: Trainer, model: LightningModule, trained: bool) -> None:
        """Put the gamma of the final weights into the model and into averaged copies of it."""
        self._finished = True
        self._ensure_attached(trainer, model)
        self._search.stop()
        if self._steps_failure is not None:
            raise self._steps_failure
        if self._labels is not None and self._labels_missed:
            self._labels.give_up()
        if self._labels is not None:
            try:
                self._labels.check(trainer.strategy)
            except ValueError:
                self.result = None
                reset_gamma(model)  # that of an earlier validation was for other classes
                raise
        self._end_lists(trainer)
        split = self._split or (self._labels and self._labels.split(trainer.strategy))
        found = self._search.found_for_present(trainer, model)
        if found is not None and split in (None, found.split):
            self._put(model, found)
            return
        self.result = None
        reset_gamma(model)
        with preserve_random_state():
            reading = self._search.make_pass(trainer, model, self._knows_classes(trainer))
            split = None if reading is None else self._split_of(trainer, reading)
            if reading is None or split is None:
                return
            live = self._run(trainer, model, reading, split)
            self._search.remember(trainer, model, live)
            self._put(model, live)
            for _ in averaged_copies(trainer, model):
                # When training ends, the model already has the averaged weights.
                result = live if trained else self._run(trainer, model, reading, split)
                set_attached_gamma(model, result.gamma, split, result.as_dict())

    def _run(
        self, trainer: Trainer, model: LightningModule, reading: EvaluationPass, split: ClassSplit
    ) -> CalibrationResult:
        with self._copies.evaluated(model):
            return self._search.run(trainer, reading, split)

    def _end_lists(self, trainer: Trainer) -> None:
        """Go on with the classes that were met in training, instead of those that the datasets list."""
        if self._labels is not None and self._listed is not None:
            self._listed.end(self._labels.classes(trainer.strategy))

    def _knows_classes(self, trainer: Trainer) -> bool:
        """Return whether the seen classes are known without reading data. It is the same on all processes."""
        return self._split is not None or bool(self._labels and self._labels.classes(trainer.strategy))

    def _listed_classes(self) -> list[int]:
        assert self._listed is not None
        return self._listed.classes() or self._restored_classes

    def _split_of(self, trainer: Trainer, reading: EvaluationPass) -> ClassSplit | None:
        return self._split or split_of_data(self._labels, trainer.strategy, reading, self._absent)

    def _put(self, model: LightningModule, result: CalibrationResult) -> None:
        self.result = result
        self._copies.leave_out_frozen()
        set_attached_gamma(model, result.gamma, result.split, result.as_dict())

    def _follow(self, trainer: Trainer, model: LightningModule, live: CalibrationResult) -> None:
        """Put the gamma of its weights into a model whose own ``on_fit_end`` may have changed them, or warn."""
        found = self._search.found_for(trainer, model)
        if found is not None and found.split == live.split:
            self._put(model, found)
        else:
            rank_zero_warn(
                f"The `on_fit_end` of {type(model).__name__} has changed the weights after gamma was found. Change them"
                " in `on_train_end`, or call `calibrate(model, loader)`."
            )

    def _calibrate_files(self, trainer: Trainer, model: LightningModule, live: CalibrationResult) -> None:
        """Write the gamma of its own weights into each kept file."""
        assert self._files is not None
        kept = self._files
        files = SharedErrors().gather(lambda: kept.files() if trainer.is_global_zero else [])[0]
        if not files:
            return
        with preserve_random_state():
            reading = self._search.make_pass(trainer, model)
            assert reading is not None

            def run(only_weights: bool) -> CalibrationResult:
                if only_weights and (found := self._search.found_for_file(trainer, model, live.split)) is not None:
                    return found
                result = self._run(trainer, model, reading, live.split)
                if only_weights:
                    self._search.remember(trainer, model, result)
                return result

            def attach() -> None:  # loading a file may build the network again
                self._attachment.ensure(trainer, model)
                self._copies.note(model)

            done = calibrate_files(
                files,
                trainer,
                model,
                live.split,
                run=run,
                attach=attach,
                is_foreign=lambda checkpoint: self._is_foreign(checkpoint, live.split),
            )
            self.checkpoint_results = {path: file.result for path, file in done.items()}
            best = kept.best_path()
            self._best = trainer.strategy.broadcast((best, done[best].step) if best in done else None)

    def _is_foreign(self, checkpoint: Mapping[str, Any], split: ClassSplit) -> bool:
        """Return whether a run with other classes has written a checkpoint."""
        told = checkpoint.get(METADATA_KEY)
        state = told or checkpoint.get("callbacks", {}).get(self.state_key, {})
        classes = set(state.get("seen_classes", ()))
        if told is not None and not self._search.has_found(told.get("gamma")):
            return classes != set(split.seen_classes)
        return not classes <= set(split.seen_classes)  # this run may have met some of its classes later

    def _report(self, trainer: Trainer, result: CalibrationResult) -> None:
        """Print gamma and the accuracies without and with it, and send them to the loggers."""
        before: dict[str, Tensor] = {}
        after: dict[str, Tensor] = {}
        told = expectations(result.as_dict())
        # The splits differ if new classes appeared after validation.
        same = self._monitor.counted and self._monitor.split == result.split
        if trainer.strategy.reduce_boolean_decision(same, all=False):
            before, after, alone = (
                self._monitor.accuracies(f"{self.metric_prefix}val", gamma) for gamma in (0.0, result.gamma, -math.inf)
            )
            told += _falls(before, after)
            if self._search.source != "validation":
                told += _learned_by_heart(result, [float(alone[name]) for name in alone if "val_acc_seen" in name])
        note = f"validation data, weights of step {self._monitor.step} of {trainer.global_step}"
        areas = self._monitor.areas(f"{self.metric_prefix}val") if before else {}
        table = _table({**areas, **before}, {**areas, **after})
        rank_zero_info(_summary(result, table, note, told, self.checkpoint_results, self._about_best(trainer, result)))
        if harm := warning_of_harm(result.as_dict()):
            rank_zero_warn(harm)
        logged = {
            f"{self.metric_prefix}gamma": result.gamma,
            f"{self.metric_prefix}gamma_standard_error": result.standard_error,
            **{f"{name}_uncalibrated": float(value) for name, value in before.items()},
            **{f"{name}_calibrated": float(value) for name, value in after.items()},
        }
        logged = self._log.free(trainer, logged)
        for logger in trainer.loggers:
            logger.log_metrics(logged, step=trainer.global_step)

    def _about_best(self, trainer: Trainer, live: CalibrationResult) -> list[str]:
        """Return the accuracies of the best file, if it has other weights and a validation has measured them."""
        if self._best is None:
            return []
        (path, step), prefix = self._best, f"{self.metric_prefix}val"
        found, measured = self.checkpoint_results[path], self._monitor.of_step(step)
        same = step == self._monitor.step and found.gamma == live.gamma
        known = measured is not None and measured.split == found.split
        if same or not trainer.strategy.reduce_boolean_decision(known):
            return []
        assert measured is not None
        if not trainer.strategy.reduce_boolean_decision(measured.counted, all=False):
            return []
        areas, before, after = (
            measured.areas(prefix),
            *(measured.accuracies(prefix, each) for each in (0.0, found.gamma)),
        )
        note = f"  (the best file, {path}: validation data, weights of step {step})"
        return [*_table({**areas, **before}, {**areas, **after}), note]


def _table(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> list[str]:
    """Return the lines of a table of values without and with gamma. No values make no table."""
    width = max(map(len, before), default=0)
    lines = [f"  {'':{width}}  gamma 0  calibrated"] if before else []
    return lines + [f"  {name:{width}}  {float(before[name]):7.4f}  {float(after[name]):10.4f}" for name in before]


def _falls(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> list[str]:
    """Return a sentence for each accuracy on all samples that gamma lowers."""
    names = [name for name in before if "val_acc_all" in name and after[name] < before[name]]
    return [
        f"{name} falls: "
        + (
            "this data has no samples of absent classes, so gamma can only cost accuracy here"
            if before[name.replace("acc_all", "acc_absent")].isnan()
            else "on this data, gamma does harm; compare its share of absent samples with `absent_share`"
        )
        for name in names
    ]


def _learned_by_heart(result: CalibrationResult, in_validation: Sequence[float]) -> list[str]:
    """Return a sentence if the model is right on the samples behind gamma, but clearly less often in validation."""
    accuracy, lowest = result.seen_accuracy, min(in_validation, default=math.nan)
    if accuracy is None or accuracy < 0.95 or not lowest <= accuracy - 0.05:
        return []
    return [
        f"among the seen classes, {accuracy:.1%} of the samples behind gamma are right, but {lowest:.1%} in validation:"
        " the model has learned them by heart, and gamma is too large; use samples that were not trained on"
    ]


def _summary(
    result: CalibrationResult,
    table: Sequence[str],
    note: str,
    told: Sequence[str],
    files: Mapping[str, CalibrationResult],
    about_best: Sequence[str],
) -> str:
    """Return a plain-text table of gamma, what is known of it, the accuracies without and with it, and the files."""
    split = result.split
    lines = [
        f"Absent-class calibration ({result.estimator}): gamma = {result.gamma:.3f} ± {result.standard_error:.3f}"
        f" (sampling error only) from {result.num_samples:,} samples; {len(split.seen_classes)} classes seen,"
        f" {len(split.absent_classes)} absent"
    ]
    if table:
        lines += [*table, f"  ({note})"]
    lines += [f"  {sentence}" for sentence in told]
    lines += [f"  {file}: gamma = {of_file.gamma:.3f}" for file, of_file in files.items()]
    return "\n".join([*lines, *about_best])
