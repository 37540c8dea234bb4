"""The callback for the Trainer of transformers. Its hooks stand in the order in which the Trainer calls them."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, IterableDataset
from torchmetrics import Metric
from tqdm.auto import tqdm

from lightning_calibft._arguments import check_choice, check_type
from lightning_calibft._format import CHILD_NAME
from lightning_calibft.calibration import calibrate
from lightning_calibft.calibration.batch_reader import BatchReader, UnpackBatch, check_rows
from lightning_calibft.calibration.data_check import warn_if_positions
from lightning_calibft.calibration.distributed import SharedErrors, rank_and_world_size
from lightning_calibft.calibration.evaluation_pass import (
    EvaluationPass,
    check_pretrained,
    check_runs_by_forward,
    check_tolerance,
    head_width,
    preserve_random_state,
    proofs_kept,
)
from lightning_calibft.calibration.loaders import (
    batches_of,
    calibration_loaders,
    check_max_samples,
    is_read_once,
    length_of,
    rebuilt_loader,
    unwrapped,
)
from lightning_calibft.calibration.result import CalibrationResult
from lightning_calibft.calibration.unlabeled_reader import UnlabeledReader
from lightning_calibft.callback.checkpoint_files import message_of
from lightning_calibft.checkpoint.pretrained_folder import (
    load_pretrained,
    read_folder,
    silent_transformers,
    write_calibration,
)
from lightning_calibft.checkpoint.state import calibration_entries
from lightning_calibft.estimators import (
    Estimator,
    check_estimator,
    needs_absent_samples,
    needs_held_out_samples,
    needs_pretrained_logits,
)
from lightning_calibft.estimators.choice import check_unlabeled, with_absent_share
from lightning_calibft.head.attach import attach, attached_split, detach, get_gamma, reset_gamma, set_attached_gamma
from lightning_calibft.head.offset import attached_heads
from lightning_calibft.labels.class_map import ClassMap, resolve_class_map, rows_tensor, to_rows
from lightning_calibft.labels.dataset_labels import class_names_of, labels_of
from lightning_calibft.labels.label_names import LabelNames, row_names_of
from lightning_calibft.metrics.ausuc_with_accuracies import AUSUCWithAccuracies
from lightning_calibft.split import ClassSplit

try:
    from transformers.trainer_callback import TrainerCallback
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
except ImportError as error:
    raise ModuleNotFoundError(
        "The callback for the Trainer of transformers needs transformers and accelerate. Install them with"
        " `pip install 'lightning-calibft[transformers]'`."
    ) from error

LogMetrics = Literal["after_training", "always", "never"]


class AbsentClassCalibrationCallback(TrainerCallback):
    r"""Makes a model predict the classes that the ``Trainer`` of transformers fine-tunes it without.

    At the end of training, the callback finds one number, gamma, in one eval-mode pass over the training data (or
    other data, see ``calibration_dataset``), and attaches it to the classification head. From then on, gamma is added
    to the logits of the absent classes in eval mode. With ``load_best_model_at_end=True``, gamma is that of the best
    model. Each ``checkpoint-*`` folder that the run keeps gets the gamma of its own weights. Gamma is the average logit
    gap of Mai et al., "Fine-Tuning is Fine, if Calibrated" (NeurIPS 2024).

    ``Trainer.evaluate`` and ``Trainer.predict`` then also return ``eval_ausuc``, ``eval_acc_all``, ``eval_acc_seen``,
    ``eval_acc_absent`` and ``eval_acc_harmonic`` (or ``test_...``), with gamma. Names that ``compute_metrics`` returns
    stay its own.

    Note:
        Until training ends, the run is the same with and without the callback: the weights, the random state, what is
        logged, and all files. The model is attached after the last step, and before it for a single batch.

        What cannot be done is refused before the first step. If something fails in the calibration after the last step,
        a warning says so, and the run goes on: the script may still have to save the model.

        ``from_pretrained`` ignores entries that it does not know, and gamma with them. Load a calibrated folder with
        :func:`~lightning_calibft.load_calibrated`, or write one that loads anywhere with
        :func:`~lightning_calibft.export`, which folds gamma into the bias. A training that resumes from a calibrated
        folder sees the weights without gamma.

        Each evaluation with metrics reads its data a second time, since a callback does not get the logits. The
        integrations that report to TensorBoard, Weights & Biases and so on run before the callbacks of the user and do
        not get these metrics, unless they come after this one: ``Trainer(args(report_to="none"),
        callbacks=[AbsentClassCalibrationCallback(), TensorBoardCallback()])``.

        FSDP and DeepSpeed are refused.

    Args:
        seen_classes: Head rows of the classes in the fine-tuning data. ``None``: the labels that the training dataset
            lists, in a column ``label`` or ``labels`` or an attribute such as ``targets``, or else those in its
            batches, which are then read twice.
        absent_classes: Head rows of the absent classes that can occur. ``None``: all classes that are not seen.
        head: Dotted name of the module that outputs the logits, if it is not found automatically.
        estimator: As in :func:`~lightning_calibft.calibrate`.
        estimator_kwargs: As in :func:`~lightning_calibft.calibrate`.
        absent_share: As in :func:`~lightning_calibft.calibrate`.
        calibration_dataset: The dataset that gamma is found on, in the form of the training dataset, which is read if
            this is ``None``. Use it for samples that are not trained on (``"pseudo_absent"``), for samples of all
            classes (``"operating_point"``), or for images without augmentation.
        unlabeled_dataset: Samples from where the model will be used, in the form of the training dataset, with or
            without labels, which are ignored. Gamma is the one for the share of samples of absent classes in them. As
            ``unlabeled`` in :func:`~lightning_calibft.calibrate`.
        pretrained: The model before fine-tuning, or its state dict, for estimators that need it. ``None``: the weights
            that training begins with, or, if it resumes, those that the model had when the Trainer was made.
        unpack_batch: As in :func:`~lightning_calibft.calibrate`. Needed if the target of a batch is not under
            ``labels`` or another usual key.
        class_map: As in :func:`~lightning_calibft.calibrate`.
        label_names: Names of the head's rows, for a ``class_map`` of names. (The argument of this name in
            ``TrainingArguments`` is about the keys of a batch.)
        max_samples: As in :func:`~lightning_calibft.calibrate`. With ``None``, an endless stream is read for as many
            batches as training has read.
        tolerance: As in :func:`~lightning_calibft.calibrate`.
        log_metrics: When evaluations return the metrics: ``"after_training"``, ``"always"``, which is also before and
            during training, for ``metric_for_best_model="eval_ausuc"``, or ``"never"``. Before gamma is found, the
            accuracies are those without it, and the seen classes must be given or listed.
        calibrate_checkpoints: Whether to write gamma into the kept ``checkpoint-*`` folders as well.

    Attributes:
        result: The result of the calibration after training: gamma, its standard error, and the samples and classes.
        checkpoint_results: The result for each calibrated folder, by its path.

    Raises:
        ValueError: If an argument is out of range. When training begins, if the head is not found, its output is not
            the logits, the classes do not fit it, the model is one of regression or of several labels, or the data
            cannot be read again.
        TypeError: If an argument or the labels are of the wrong type.
        RuntimeError: When training begins, if the model is sharded over processes.

    Example::

        trainer = Trainer(model, args, train_dataset=train, callbacks=[AbsentClassCalibrationCallback()])
        trainer.train()
        trainer.evaluate(test)["eval_acc_absent"]
        export(trainer.model, "calibrated")  # for AutoModelForImageClassification.from_pretrained
    """

    def __init__(
        self,
        seen_classes: Sequence[int] | None = None,
        absent_classes: Sequence[int] | None = None,
        *,
        head: str | None = None,
        estimator: str | Metric = "alg",
        estimator_kwargs: Mapping[str, Any] | None = None,
        absent_share: float | None = None,
        calibration_dataset: Any = None,
        unlabeled_dataset: Any = None,
        pretrained: nn.Module | Mapping[str, Tensor] | None = None,
        unpack_batch: UnpackBatch | str | None = None,
        class_map: ClassMap | None = None,
        label_names: LabelNames | None = None,
        max_samples: int | None = None,
        tolerance: float | None = None,
        log_metrics: LogMetrics = "after_training",
        calibrate_checkpoints: bool = True,
    ) -> None:
        check_choice("log_metrics", log_metrics, get_args(LogMetrics))
        check_type("calibrate_checkpoints", calibrate_checkpoints, bool)
        check_max_samples(max_samples)
        check_tolerance(tolerance)
        self._estimator: str | Estimator = estimator  # type: ignore[assignment]  # `check_estimator` checks the protocol
        if unlabeled_dataset is not None:
            check_unlabeled(self._estimator, estimator_kwargs, absent_share)
        self._estimator_kwargs = with_absent_share(self._estimator, estimator_kwargs, absent_share)
        check_estimator(self._estimator, self._estimator_kwargs, seen_classes, absent_classes)
        if needs_absent_samples(self._estimator) and calibration_dataset is None:
            raise ValueError(
                f"Expected argument `calibration_dataset` to be a dataset with samples of absent classes for the"
                f" estimator {estimator!r}, but got None."
            )
        self.seen_classes = seen_classes
        self.absent_classes = absent_classes
        self.head = head
        self.estimator = estimator
        self.estimator_kwargs = estimator_kwargs
        self.absent_share = absent_share
        self.calibration_dataset = calibration_dataset
        self.unlabeled_dataset = unlabeled_dataset
        self.pretrained = pretrained
        self.unpack_batch = unpack_batch
        self.class_map = class_map
        self.label_names = label_names
        self.max_samples = max_samples
        self.tolerance = tolerance
        self.log_metrics = log_metrics
        self.calibrate_checkpoints = calibrate_checkpoints
        self.result: CalibrationResult | None = None
        self.checkpoint_results: dict[str, CalibrationResult] = {}
        self._needs_pretrained = needs_pretrained_logits(self._estimator) and pretrained is None
        self._weights_at_first: dict[str, Tensor] | None = None
        self._listed: list[int] | None = None  # the seen classes, if they are given or the dataset lists them
        self._folders: set[str] = set()
        self._training = False
        self._evaluated = False  # whether the model has predicted a batch since the last evaluation ended
        self._measured: dict[str, float] = {}
        self._told = False

    # The start.

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Keep the weights before a checkpoint is loaded, for estimators that need them."""
        if self._needs_pretrained:
            self._weights_at_first = _copy(model)

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, train_dataloader: Any = None, **kwargs: Any
    ) -> None:
        """Refuse what cannot be done, before the first step."""
        self.result, self.checkpoint_results, self._folders = None, {}, set()
        self._training, self._told, self._evaluated = True, False, False
        _check_kind(model)
        if self._needs_pretrained:
            self._keep_pretrained(model, resumed=state.global_step > 0, calibrated=get_gamma(model) is not None)
        reset_gamma(model)  # one from before does not fit the weights of this training
        loader, unlabeled = self._loader(train_dataloader, state, args), self._unlabeled(train_dataloader, args)
        with preserve_random_state(), self._attached(model):
            self._listed = self._classes(model, train_dataloader)
            self._check_first_batch(model, loader, unlabeled)
        if state.is_world_process_zero:
            self._warn_before_training(args, state, train_dataloader)
        if self.calibrate_checkpoints and state.global_step > 0:
            self._folders = _earlier_folders(args.output_dir, state)

    # Training and evaluation.

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the folder."""
        self._folders.add(os.path.join(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"))

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note that there is an evaluation."""
        self._evaluated = True

    def on_log(
        self,
        args: Any,
        state: Any,
        control: Any,
        logs: Any = None,
        model: Any = None,
        eval_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        """Add the metrics to what an evaluation logs."""
        prefix = _prefix(logs or {})
        if self._evaluated and prefix is not None:
            self._evaluated = False
            self._measured = self._measure(model, eval_dataloader, prefix, logs)
            logs.update(self._measured)
            if state.log_history and f"{prefix}_runtime" in state.log_history[-1]:
                state.log_history[-1].update(self._measured)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        """Add the metrics to what ``evaluate`` returns, if a Trainer of the user logs a copy of it."""
        metrics.update({name: value for name, value in self._measured.items() if name not in metrics})
        self._measured, self._evaluated = {}, False

    def on_predict(
        self,
        args: Any,
        state: Any,
        control: Any,
        metrics: Any,
        model: Any = None,
        eval_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        """Add the metrics to those of ``predict``."""
        self._evaluated = False
        if (prefix := _prefix(metrics)) is not None:
            metrics.update(self._measure(model, eval_dataloader, prefix, metrics))

    # The end. By now, all folders are written, and the model has the weights of the best one if it was asked for.

    def on_train_end(
        self, args: Any, state: Any, control: Any, model: Any = None, train_dataloader: Any = None, **kwargs: Any
    ) -> None:
        """Calibrate the model, and then the kept folders."""
        self._training = False
        data = self._loader(train_dataloader, state, args), self._unlabeled(train_dataloader, args)
        try:
            with preserve_random_state():
                self.result = self._calibrate_live(model, data, not args.disable_tqdm)
                if self.calibrate_checkpoints:
                    self._calibrate_folders(args, model, data, self.result)
        except Exception as error:  # the data and the model can raise anything, and the user has yet to save the model
            warnings.warn(
                f"AbsentClassCalibrationCallback could not calibrate the model. {message_of(error)} Save the model as"
                " it is, and call `lightning_calibft.calibrate(model, loader)`.",
                stacklevel=2,
            )
        self._weights_at_first = None
        if self.result is not None and state.is_world_process_zero:
            tqdm.write(_summary(self.result, self.checkpoint_results))

    # Helpers of the hooks.

    def _loader(self, train: Any, state: Any, args: Any) -> Any:
        """Return what gamma is found on: the training data, or another dataset through the same collator."""
        dataset = self.calibration_dataset
        loader = unwrapped(train) if dataset is None else _loader_of(dataset, train, args)
        endless = length_of(loader) is None and self.max_samples is None and dataset is None
        return _Beginning(loader, state.max_steps * args.gradient_accumulation_steps) if endless else loader

    def _unlabeled(self, train: Any, args: Any) -> Any:
        dataset = self.unlabeled_dataset
        return None if dataset is None else _loader_of(dataset, train, args)

    def _classes(self, model: nn.Module, train: Any) -> list[int] | None:
        """Return the seen classes, if they are given or the dataset lists them, and check them."""
        width = head_width(model)
        rows = resolve_class_map(self.class_map, self.label_names, width)
        if not isinstance(self._estimator, str):
            return None
        listed = None if self.seen_classes is None else list(self.seen_classes)
        if listed is None and self.unpack_batch is None and (labels := _listed_labels(train.dataset)) is not None:
            labels = labels if rows is None else to_rows(labels, rows_tensor(rows))
            check_rows(labels, width)
            listed = sorted({label for label in labels.tolist() if label >= 0})
            if rows is None:
                warn_if_positions(listed, width, class_names_of(train.dataset), row_names_of(model))
        if listed is not None:
            ClassSplit(width, listed, self.absent_classes)
        return listed

    def _check_first_batch(self, model: Any, loader: Any, unlabeled: Any) -> None:
        """Run the model on one batch, to check that labels are rows of the head, whose output is the logits.

        Then run it on one unlabeled batch, if there is any.
        """
        errors = SharedErrors()
        with errors.shared():
            check_pretrained(self._estimator, self._pretrained(), model)
            if self.tolerance is not None:
                calibration_loaders(loader, at_random=True)  # refuses data that it does not work with
            [few] = calibration_loaders(loader, getattr(loader, "batch_size", None) or 1, share=(0, 1), errors=errors)
            # Reading any other loader could move a stream that training is about to read.
            rebuilt = type(few) is DataLoader and few is not loader and not isinstance(few.dataset, IterableDataset)
            if rebuilt and (batch := next(iter(few), None)) is not None:
                _check_labels(batch, model)
                rows = resolve_class_map(self.class_map, self.label_names, head_width(model))
                reading = EvaluationPass(model, [[batch]], reader=BatchReader(self.unpack_batch, rows), bar=None)
                with closing(reading.evaluate()) as batches:
                    for evaluated in batches:
                        check_rows(evaluated.target, reading.num_classes)
            if unlabeled is not None:
                if is_read_once(unlabeled):
                    raise ValueError(
                        "Expected argument `unlabeled_dataset` to be data that can be read again for each folder, but"
                        " its dataset holds an iterator, which can be read only once."
                    )
                batch = next(iter(unlabeled), None)
                if batch is None:
                    raise ValueError(
                        "Expected argument `unlabeled_dataset` to hold at least one sample, but got none. Check the"
                        " dataset."
                    )
                of_inputs = cast(BatchReader, UnlabeledReader(BatchReader(self.unpack_batch)))
                with proofs_kept(model):
                    check_runs_by_forward(model)
                    list(EvaluationPass(model, [[batch]], reader=of_inputs, bar=None).evaluate())
        errors.agree()

    def _keep_pretrained(self, model: Any, resumed: bool, calibrated: bool) -> None:
        """Keep the weights before fine-tuning, or refuse if they are not known.

        Raises:
            ValueError: If training resumes, and the model had the weights of the checkpoint from the start.
        """
        if not resumed:
            if calibrated:
                warnings.warn(
                    f"The estimator {self.estimator!r} takes the weights that training begins with for those before"
                    " fine-tuning, but the model is calibrated, so it has been fine-tuned already. Pass the model"
                    " before fine-tuning as `pretrained`.",
                    stacklevel=3,
                )
            self._weights_at_first = _copy(model)
        elif self._weights_at_first is None or _are_equal(self._weights_at_first, _copy(model)):
            raise ValueError(
                f"Expected argument `pretrained` to be the model before fine-tuning for the estimator"
                f" {self.estimator!r}, but got None, and training resumes with a model of which these weights are not"
                " known: it had those of the checkpoint before."
            )

    def _pretrained(self) -> Mapping[str, Tensor] | None:
        if isinstance(self.pretrained, nn.Module):
            return self.pretrained.state_dict()
        return self._weights_at_first if self.pretrained is None else self.pretrained

    def _warn_before_training(self, args: Any, state: Any, train: Any) -> None:
        if self.calibration_dataset is None and is_read_once(train):
            warnings.warn(
                "AbsentClassCalibrationCallback expects training data that can be read again, but its dataset holds an"
                " iterator, of which nothing may be left when gamma is found. Pass a `calibration_dataset`. If it can"
                " be read further, ignore this.",
                stacklevel=3,
            )
        if needs_held_out_samples(self._estimator) and self.calibration_dataset is None:
            warnings.warn(
                f"The estimator {self.estimator!r} finds gamma on the training data. A model that has learned it by"
                " heart has larger margins there than on new samples, and gamma is then too large. Pass a"
                " `calibration_dataset` of samples that are not trained on.",
                stacklevel=3,
            )
        if self.calibrate_checkpoints and args.push_to_hub and args.hub_strategy != "end":
            warnings.warn(
                "The Trainer pushes checkpoints to the Hub as soon as they are saved, when they have no gamma yet. Only"
                " the folders on the disk are calibrated. Pass `hub_strategy='end'`.",
                stacklevel=3,
            )
        if self.calibrate_checkpoints and state.is_hyper_param_search:
            warnings.warn(
                "In a search for hyperparameters, the folders of checkpoints are not calibrated, since a callback does"
                " not get to know their names.",
                stacklevel=3,
            )
        if self.log_metrics == "always" and self._listed is None and isinstance(self._estimator, str):
            warnings.warn(
                "AbsentClassCalibrationCallback cannot read from the dataset which classes the training data has, so"
                " evaluations during training have no metrics of it. Pass `seen_classes=[...]`.",
                stacklevel=3,
            )

    @contextmanager
    def _attached(self, model: Any) -> Iterator[None]:
        """Attach the calibration for the block, so that nothing of it is in files that are saved later."""
        fresh = not attached_heads(model)
        attach(model, self.head)
        try:
            yield
        finally:
            if fresh:
                detach(model)

    def _find(self, model: Any, data: tuple[Any, Any], split: ClassSplit | None, progress: bool) -> CalibrationResult:
        """Find the gamma of the weights that the model has now, and set it."""
        loader, unlabeled = data
        seen, absent = self._listed, self.absent_classes
        if not isinstance(self._estimator, str):
            seen = absent = None
        elif split is not None:
            seen, absent = list(split.seen_classes), split.absent_classes
        return calibrate(
            model,
            loader,
            seen,
            absent_classes=absent,
            head=None if attached_heads(model) else self.head,
            estimator=self._estimator,
            estimator_kwargs=self._estimator_kwargs,
            unlabeled=unlabeled,
            unpack_batch=self.unpack_batch,
            class_map=self.class_map,
            label_names=self.label_names,
            max_samples=self.max_samples,
            tolerance=self.tolerance,
            pretrained=self._pretrained(),
            progress=progress,
        )

    def _calibrate_live(self, model: Any, data: tuple[Any, Any], progress: bool) -> CalibrationResult:
        # The running statistics of processes differ. The first process has those that are saved.
        rank, size = rank_and_world_size()
        buffers = SharedErrors().gather(lambda: dict(model.named_buffers()) if rank == 0 and size > 1 else {})[0]
        with _loaded(model, buffers):
            result = self._find(model, data, None, progress)
        set_attached_gamma(model, result.gamma, result.split, result.as_dict())
        return result

    def _calibrate_folders(self, args: Any, model: Any, data: tuple[Any, Any], live: CalibrationResult) -> None:
        """Write the gamma of its own weights into each folder that is left. Warn about those where this fails."""
        first, failed = rank_and_world_size()[0] == 0, dict[str, str]()
        kept, *_ = SharedErrors().gather(lambda: list(filter(os.path.isdir, self._folders)))
        own = _copy(model)
        for folder in sorted(kept, key=lambda each: int(each.rpartition("-")[2])):
            try:
                errors = SharedErrors()
                weights = errors.gather(lambda: _weights_in(folder, model) if first else {})[0]  # noqa: B023
                with _loaded(model, weights):
                    result = live
                    if not errors.gather(lambda: _are_equal(own, _copy(model)))[0]:
                        result = self._find(model, data, live.split, progress=not args.disable_tqdm)
                    set_attached_gamma(model, result.gamma, result.split, result.as_dict())
                    with errors.shared():
                        if args.should_save:
                            write_calibration(_inside(folder, model), _saved_entries(model), result)
                errors.agree()
                self.checkpoint_results[folder] = result
            except Exception as error:  # the disk, the data and the model can raise anything
                failed[folder] = message_of(error)
        set_attached_gamma(model, live.gamma, live.split, live.as_dict())  # the weights are back already
        if failed:
            told = "; ".join(f"{folder!r}: {reason.removesuffix('.')}" for folder, reason in failed.items())
            warnings.warn(
                f"AbsentClassCalibrationCallback could not calibrate the checkpoints {told}. These folders are as the"
                " Trainer has written them, and the model in memory is calibrated.",
                stacklevel=3,
            )

    def _measure(self, model: Any, loader: Any, prefix: str, logged: Mapping[str, Any]) -> dict[str, float]:
        """Return the metrics of an evaluation, from a pass of its own, without those that are logged already."""
        split = self._split_to_measure(model) if f"{prefix}_loss" in logged else None  # without it, there are no labels
        if split is None:
            return {}
        try:
            with preserve_random_state(), self._attached(model):
                rows = resolve_class_map(self.class_map, self.label_names, head_width(model))
                reader, loaders = BatchReader(self.unpack_batch, rows), calibration_loaders(unwrapped(loader))
                reading = EvaluationPass(model, loaders, reader=reader, validation=True, bar=None)
                metric = AUSUCWithAccuracies(split.num_classes, split.seen_classes, split.absent_classes)
                reading.feed(metric.to(reading.device), split)
                values = {"ausuc": metric.compute()}
                of_groups = metric.accuracies(get_gamma(model) or 0.0)
        except Exception as error:  # the data can raise anything, and the run must go on
            self._warn_once(f"adds no metrics to an evaluation. {message_of(error)}")
            return {}
        values.update({f"acc_{name}": value for name, value in of_groups.items()})
        named = {f"{prefix}_{name}": float(value) for name, value in values.items()}
        if taken := sorted(named.keys() & logged.keys()):
            self._warn_once(f"leaves {', '.join(taken)} as `compute_metrics` returns it.")
        return {name: value for name, value in named.items() if name not in logged}

    def _split_to_measure(self, model: Any) -> ClassSplit | None:
        if self.log_metrics == "never" or (self._training and self.log_metrics != "always"):
            return None
        if self.result is not None:
            return self.result.split
        known = None
        if self.log_metrics == "always":
            if not isinstance(self._estimator, str):
                return self._estimator.split
            seen = self._listed if self._listed is not None else self.seen_classes
            if seen is not None:
                with self._attached(model):
                    known = ClassSplit(head_width(model), seen, self.absent_classes)
        return attached_split(model, known) if attached_heads(model) else known

    def _warn_once(self, text: str) -> None:
        if not self._told:
            self._told = True
            warnings.warn(f"AbsentClassCalibrationCallback {text}", stacklevel=2)


class _Beginning:
    """The first batches of a stream, which may be endless."""

    def __init__(self, loader: Any, max_batches: int) -> None:
        self._loader, self._max_batches = loader, max_batches

    def __iter__(self) -> Iterator[Any]:
        return batches_of(self._loader, self._max_batches)


def _loader_of(dataset: Any, train: Any, args: Any) -> Any:
    """Return a loader of a dataset in the form of the training dataset, through the same collator."""
    known = getattr(train.dataset, "column_names", None)
    if known is not None and (others := set(getattr(dataset, "column_names", ())) - set(known)):
        dataset = dataset.remove_columns(sorted(others))  # as the Trainer has done with the training dataset
    return rebuilt_loader(train, dataset, batch_size=args.eval_batch_size)


def _check_kind(model: Any) -> None:
    """Refuse a model that no gamma can be found for.

    Raises:
        ValueError: If it is one of regression or of several labels.
        RuntimeError: If its weights are sharded over processes.
    """
    from accelerate.state import AcceleratorState, DistributedType

    sharding = (DistributedType.DEEPSPEED, DistributedType.FSDP, DistributedType.MEGATRON_LM)
    if AcceleratorState().distributed_type in sharding or any(isinstance(each, DTensor) for each in model.parameters()):
        raise RuntimeError(
            "FSDP, DeepSpeed and others that share a model among processes are not supported. Use DDP (`torchrun`), or"
            " train without the callback and call `lightning_calibft.calibrate(model, loader)` on the whole model."
        )
    kind = getattr(getattr(model, "config", None), "problem_type", None)
    if kind in ("regression", "multi_label_classification"):
        raise ValueError(
            f"Expected a model that gives each sample one class, but its `config.problem_type` is {kind!r}. Such a"
            " model has no absent classes. Leave the callback out."
        )


def _check_labels(batch: Any, model: Any) -> None:
    """Refuse labels with which transformers trains one classifier for each class."""
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    decides = getattr(getattr(model, "config", None), "problem_type", "") is None
    if decides and isinstance(labels, Tensor) and labels.is_floating_point():
        raise ValueError(
            "Expected integers as labels, one class for each sample, but got floating-point numbers, with which"
            " transformers trains a model of several labels. It has no absent classes. Leave the callback out."
        )


def _listed_labels(dataset: Any) -> Tensor | None:
    """Return the labels that a dataset lists, in an attribute or in a column, without loading another column."""
    if (labels := labels_of(dataset)) is not None:
        return labels
    for name in ("labels", "label"):
        if name in (getattr(dataset, "column_names", None) or ()):
            with suppress(Exception):  # a transform of the user can raise anything
                column = torch.as_tensor(list(dataset.select_columns(name).with_format(None)[name]))
                return column if column.ndim == 1 and column.dtype == torch.long else None
    return None


def _earlier_folders(output_dir: str, state: Any) -> set[str]:
    """Return the folders of the run that this one resumes: what they have logged is the beginning of its log."""
    found = set()
    for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*/trainer_state.json"):
        with suppress(OSError, ValueError, KeyError, TypeError):  # the file of another program
            earlier = json.loads(path.read_text())
            log = earlier["log_history"]
            if earlier["global_step"] <= state.global_step and log == state.log_history[: len(log)]:
                found.add(os.path.join(output_dir, path.parent.name))
    return found


def _prefix(metrics: Mapping[str, Any]) -> str | None:
    """Return the ``metric_key_prefix`` of what an evaluation logs."""
    return next((name.removesuffix("_runtime") for name in metrics if name.endswith("_runtime")), None)


def _copy(model: Any) -> dict[str, Tensor]:
    tensors = {key: value for key, value in model.state_dict().items() if isinstance(value, Tensor)}
    return {key: value.detach().cpu().clone() for key, value in tensors.items()}


def _are_equal(state: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Return whether two state dicts are equal apart from the calibration."""
    keys = [key for key in state if CHILD_NAME not in key]
    return all(key in other and torch.equal(state[key], other[key]) for key in keys)


@contextmanager
def _loaded(model: Any, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Run the model with other weights, or some of them, and then put all of its own back, and its calibration."""
    if not weights:
        yield
        return
    own = _copy(model)
    try:
        model.load_state_dict(weights, strict=False)
        yield
    finally:
        model.load_state_dict(own)


def _weights_in(folder: str, model: Any) -> dict[str, Tensor]:
    """Return the weights in a folder, by their names in the model.

    The names in the files may be others. ``from_pretrained`` knows them, and ``load_state_dict`` does not.

    Raises:
        ValueError: If they are not all weights of the model.
    """
    if _is_peft(model):
        import peft

        # Loading needs all entries of a head that PEFT saves in full, those of the calibration, too.
        read = {**read_folder(_inside(folder, model))[0], **_saved_entries(model)}
        own = _copy(model)
        try:
            loaded: Any = peft.set_peft_model_state_dict(model, read, adapter_name=model.active_adapter)
            wrong = loaded.unexpected_keys
            weights = _copy(model)
        finally:
            model.load_state_dict(own)
    elif hasattr(type(model), "from_pretrained"):
        weights, wrong = _copy(load_pretrained(type(model), folder)), []
    else:  # a plain module, of which the Trainer saves the state dict
        weights = dict(read_folder(folder)[0])
        wrong = list(model.state_dict().keys() ^ weights.keys())
    weights = {key: value for key, value in weights.items() if CHILD_NAME not in key}
    if wrong := [key for key in wrong if CHILD_NAME not in key]:
        raise ValueError(f"Expected {folder!r} to hold the weights of the model, but {wrong[0]!r} is of another.")
    return weights


def _saved_entries(model: Any) -> dict[str, Tensor]:
    """Return the calibration's entries by the names that they have in the files that ``save_pretrained`` writes."""
    entries = calibration_entries(model.state_dict())
    if _is_peft(model):
        import peft

        state = peft.get_peft_model_state_dict(model, adapter_name=model.active_adapter)
        return calibration_entries(state)
    if hasattr(model, "save_pretrained"):
        with tempfile.TemporaryDirectory() as folder, silent_transformers():
            model.save_pretrained(folder, state_dict=dict(entries))
            return dict(read_folder(folder)[0])
    return entries


def _inside(folder: str, model: Any) -> str:
    """Return where in a folder the weights are: PEFT saves each adapter that has a name of its own apart."""
    return (
        os.path.join(folder, model.active_adapter) if _is_peft(model) and model.active_adapter != "default" else folder
    )


def _is_peft(model: Any) -> bool:
    return "peft" in sys.modules and isinstance(model, sys.modules["peft"].PeftModel)


def _summary(result: CalibrationResult, folders: Mapping[str, CalibrationResult]) -> str:
    """Return gamma in words, and that of each folder."""
    lines = [
        f"Absent-class calibration ({result.estimator}): gamma = {result.gamma:.3f} ± {result.standard_error:.3f}"
        f" (sampling error only) from {result.num_samples:,} samples; {len(result.split.seen_classes)} classes seen,"
        f" {len(result.split.absent_classes)} absent"
    ]
    return "\n".join(lines + [f"  {folder}: gamma = {of_folder.gamma:.3f}" for folder, of_folder in folders.items()])
