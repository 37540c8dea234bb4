"""The callback: it translates the events of a Trainer into calls on the rest of the package."""

from __future__ import annotations

from typing import Any, cast

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torchmetrics import Metric
from typing_extensions import override

from lightning_calibft.calibration import UnpackBatch, check_max_samples, check_tolerance, head_width
from lightning_calibft.callback.checks import check_not_folded
from lightning_calibft.callback.data import Source
from lightning_calibft.callback.fitting import FitCalibration
from lightning_calibft.callback.kept import put_calibration_of
from lightning_calibft.callback.running import Refresh, check_refresh
from lightning_calibft.estimators import Estimator
from lightning_calibft.labels.class_map import ClassMap
from lightning_calibft.labels.label_names import LabelNames
from lightning_calibft.split import ClassSplit


class AbsentClassCalibration(FitCalibration):
    r"""Brings the classes that the fine-tuning data lacks back into the model's predictions.

    At the end of fitting it finds one number, gamma, in one eval-mode pass over the training data, and registers it in
    the classification head: from then on gamma is added to the logits of the absent classes in eval mode. Every
    checkpoint that ``ModelCheckpoint`` has kept gets the gamma of its own weights. Gamma is the average logit gap of
    Mai et al., "Fine-Tuning is Fine, if Calibrated" (NeurIPS 2024). While fitting, it logs ``val_ausuc``, ``val_acc``,
    ``val_acc_seen``, ``val_acc_absent`` and ``val_acc_harmonic`` (and ``test_...``) of what the model predicts.

    Note:
        The loss, the random state and the trained weights are the same with and without the callback, but for a
        compiled module with ``source="training_steps"``, whose graph it breaks, and for a stream that keeps its place
        in an object of this process with ``tolerance`` or ``refresh``, which read it while training goes on.
        Its hooks run after those of all other callbacks but ``ModelCheckpoint``.
        The module must map inputs to logits (or to their softmax) in ``forward``, unless one attribute of it does so
        alone, as in ``self.net(x)``.
        A ``calibration_dataloader()`` of the datamodule or the module, if there is one, is read instead of the
        training data: the place for clean transforms or for labels that are not mixed.
        ``WeightAveraging`` callbacks must stand behind this one in the list of callbacks.
        With ``ddp_spawn`` and ``ddp_notebook``, :func:`~lightning_calibft.attach` the module before the fit: else the
        Trainer could not bring gamma back into it, and is refused. The attributes of this callback stay in the
        processes that it ran in; :func:`~lightning_calibft.get_gamma` and
        :func:`~lightning_calibft.inspect_checkpoint` tell gamma.
        With ``ModelParallelStrategy`` checkpoints have the gamma that the model has when they are written, and are not
        calibrated again after the fit: it needs ``refresh="validation"`` or ``source="training_steps"``.

    Args:
        seen_classes: Rows of the classes in the fine-tuning data. ``None``: the labels met in training.
        absent_classes: Rows of the classes to bring back. ``None``: all that are not seen.
        head: Dotted name of the module that gives the logits, where it is not found by itself.
        estimator: How gamma is found: ``"alg"``, ``"pseudo_absent"`` (keeps a copy of the weights that the fit begins
            with), another of :data:`~lightning_calibft.estimators.ESTIMATORS`, such a metric, or ``"pcv"``:
            :func:`~lightning_calibft.pseudo_cross_validation` with this module, its data and this Trainer's settings,
            after the fit. Of the other callbacks it keeps those that shape the training, ``BaseFinetuning`` and
            ``GradientAccumulationScheduler``; it writes and logs nothing.
        estimator_kwargs: Further arguments of the estimator, such as ``{"min_seen_accuracy": 0.9}`` of the
            ``"operating_point"``; of ``"pcv"`` ``num_splits``, ``candidates``, ``seed``, ``folder`` and ``epochs``, the
            share of the fit's epochs (or steps) that each training takes.
        source: On what gamma is found. ``"train"``: one more pass over the training data, in eval mode.
            ``"validation"``: such a pass over the validation data, of which only an ``"operating_point"`` looks at the
            samples of absent classes. ``"training_steps"``: the logits of each epoch's own training steps, for data
            where a pass is too dear; validation and checkpoints then have the gamma of the steps before them. It needs
            ``seen_classes`` and steps that run the head once; those that return ``None`` are left out.
        unpack_batch: A function, or its import path, that takes a batch and returns ``(inputs, target)``, where
            batches are neither such pairs nor mappings with the target under ``label(s)``, ``target(s)`` or ``y``.
        class_map: The head's row of each target in the batches, where they differ, as in folders that number their
            classes from 0: the loss must map them itself. See :func:`~lightning_calibft.resolve_class_map`.
        label_names: Names of the head's rows, for a ``class_map`` of names.
        max_samples: Read at most about this many training samples, drawn at random with a fixed seed. Of a stream
            without an end, ``None`` reads as many as training has, in each pass.
        tolerance: Stop reading when the standard error of gamma is at most this, in logits: then samples are read in
            random order (of a custom loader in its own), and ``result.num_samples`` tells how many it took. With one
            ``DataLoader`` only.
        refresh: ``"validation"``: find gamma before each validation as well, and log it as ``val_gamma``. What is
            validated, monitored and saved is then calibrated; what is saved later has the gamma of the last validation
            until fitting ends. Each time costs a pass: give ``max_samples`` or a ``tolerance``.
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
        estimator_kwargs: dict[str, Any] | None = None,
        source: Source = "train",
        unpack_batch: UnpackBatch | str | None = None,
        class_map: ClassMap | None = None,
        label_names: LabelNames | None = None,
        max_samples: int | None = None,
        tolerance: float | None = None,
        refresh: Refresh | None = None,
        log_metrics: bool = True,
        calibrate_checkpoints: bool = True,
    ) -> None:
        check_max_samples(max_samples)
        check_tolerance(tolerance)
        checked = cast("str | Estimator", estimator)  # the protocol is more than LightningCLI can tell of a metric
        super().__init__(
            seen_classes,
            absent_classes,
            head,
            checked,
            estimator_kwargs,
            source,
            unpack_batch,
            class_map,
            label_names,
        )
        check_refresh(refresh, source, estimator)
        self.max_samples = max_samples
        self.tolerance = tolerance
        self.refresh = refresh
        self.log_metrics = log_metrics
        self.calibrate_checkpoints = calibrate_checkpoints
        self._start_afresh()

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
