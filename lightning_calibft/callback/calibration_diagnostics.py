"""A callback that reports what fine-tuning does to absent classes."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_calibft._arguments import check_integer, check_path
from lightning_calibft.analysis.history import History, Snapshot
from lightning_calibft.analysis.report import Format, Report
from lightning_calibft.calibration.batch_reader import BatchReader, UnpackBatch
from lightning_calibft.calibration.loaders import flat_loaders
from lightning_calibft.callback.absent_class_calibration import AbsentClassCalibration
from lightning_calibft.callback.lightning_package import LightningCallback, LightningModule, Trainer
from lightning_calibft.callback.snapshot_recorder import SnapshotRecorder
from lightning_calibft.callback.trainer_checks import check_trainer
from lightning_calibft.callback.trainer_data import is_model_parallel
from lightning_calibft.checkpoint.files import replace_atomically
from lightning_calibft.head.find import find_head
from lightning_calibft.head.layers import num_classes
from lightning_calibft.labels.class_map import ClassMap, resolve_class_map
from lightning_calibft.labels.dataset_labels import class_names_of_loaders
from lightning_calibft.labels.label_names import LabelNames, names_by_row, row_names_of
from lightning_calibft.plotting import check_matplotlib
from lightning_calibft.split import ClassSplit, class_ids

_FORMATS: dict[str, Format] = {".md": "markdown", ".html": "html"}


class CalibrationDiagnostics(LightningCallback):
    """Measures what fine-tuning does to absent classes, and writes a one-page report when the fit ends.

    For each validation and each epoch it records the accuracies on seen and absent classes, AUSUC, and the best gamma;
    the mean logits of the true class and of the largest other classes; the norms of the head's rows; and how similar
    the updates of these rows are since the first step. The report says in words whether gamma helps, and whether
    calibration cannot help because the features of absent classes got worse. The analyses are those of Mai et al.,
    "Fine-Tuning is Fine, if Calibrated" (NeurIPS 2024); see :mod:`lightning_calibft.analysis`.

    The measurements use the logits without gamma from the module's own validation, over all validation loaders
    together. The callback works alone or with :class:`~lightning_calibft.AbsentClassCalibration`, in any order. With
    it, the report also has the gamma that it has found.

    The figures and the text of the report also go to each TensorBoardLogger, WandbLogger and MLFlowLogger of the
    Trainer, at the last step. Their names begin with that of the file, as in ``calibration_report/seen_unseen_curve``.

    Note:
        The callback does not change the loss, the random state, the weights, or the state dict of the model. Its own
        state (the measurements so far and a copy of the head's first weight) is saved in checkpoints, and a resumed fit
        continues with it.

        Call ``trainer.validate(model, val_loader)`` before ``trainer.fit`` to make the model before fine-tuning the
        first point. This needs ``seen_classes``.

    Args:
        seen_classes: Head rows of the classes in the fine-tuning data. ``None``: the labels of the training batches so
            far. Whenever a new class appears, earlier measurements are dropped.
        absent_classes: Head rows of the absent classes that can occur. ``None``: all classes that are not seen.
        head: Dotted name of the module that outputs the logits, if it is not found automatically.
        every_n_epochs: Measure every ``every_n_epochs`` epochs, starting with the first, and in the last epoch.
        output: The file to write, ``.md`` or ``.html``, with its pictures embedded. Relative to the Trainer's
            ``default_root_dir``. An existing file is replaced.
        unpack_batch: As in :class:`~lightning_calibft.AbsentClassCalibration`.
        class_map: As in :class:`~lightning_calibft.AbsentClassCalibration`.
        label_names: As in :class:`~lightning_calibft.AbsentClassCalibration`.

    Attributes:
        snapshots: The measurements so far, in order.

    Raises:
        ModuleNotFoundError: In ``setup``, if matplotlib is not installed.
        ValueError: If an argument is out of range, or, when a fit starts, if the head is not found or the classes do
            not fit it.
        RuntimeError: In ``setup``, if the strategy shards the weights.

    Example::

        diagnostics = CalibrationDiagnostics(seen_classes=[0, 1, 2], output="report.html")
        trainer = Trainer(callbacks=[diagnostics, AbsentClassCalibration()])
        trainer.validate(model, val_loader)
        trainer.fit(model, train_loader, val_loader)
    """

    def __init__(
        self,
        seen_classes: list[int] | None = None,
        absent_classes: list[int] | None = None,
        *,
        head: str | None = None,
        every_n_epochs: int = 1,
        output: str = "calibration_report.md",
        unpack_batch: UnpackBatch | str | None = None,
        class_map: ClassMap | None = None,
        label_names: LabelNames | None = None,
    ) -> None:
        check_integer("every_n_epochs", every_n_epochs, least=1)
        check_path("output", output)
        if Path(output).suffix not in _FORMATS:
            raise ValueError(f"Expected argument `output` to end in .md or .html, but got {output!r}.")
        self.seen_classes = seen_classes
        self.absent_classes = absent_classes
        self.head = head
        self.every_n_epochs = every_n_epochs
        self.output = output
        self.unpack_batch = unpack_batch
        self.class_map = class_map
        self.label_names = label_names
        self._recorder: SnapshotRecorder | None = None
        self._history: History | None = None
        self._history_before_fit: History | None = None  # of a validation before the fit
        self._restored_classes: list[int] = []
        self._last_weight: Tensor | None = None
        self._ended = False
        self._warned = False

    @property
    def snapshots(self) -> list[Snapshot]:
        """The measurements so far, in order."""
        return [] if self._history is None else self._history.snapshots

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        check_trainer(trainer, pl_module)
        if is_model_parallel(trainer):
            raise RuntimeError(
                "CalibrationDiagnostics does not support ModelParallelStrategy, because each process holds only a part"
                " of the head's weight. Use the strategy 'ddp', or train without this callback."
            )
        if stage == "fit":
            check_matplotlib()
            if trainer.is_global_zero:
                self._path(trainer).parent.mkdir(parents=True, exist_ok=True)
            self._history, self._restored_classes, self._warned = None, [], False

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored_classes = state_dict["seen_classes"]
        self._history = state_dict["history"] and History.from_state_dict(state_dict["history"])

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        recorder = self._start_recorder(trainer, pl_module)
        weight, before, self._history_before_fit = recorder.weight(), self._history_before_fit, None
        if self._history is not None:  # restored
            recorder.add_classes({*self._restored_classes, *self._history.seen_classes})
        elif before is not None and before.begins_with(weight):
            self._history = before
        else:
            self._history = History(trainer.current_epoch, trainer.global_step, weight)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._recorder is not None:
            self._recorder.add_training_batch(batch, trainer.train_dataloader)
            self._recorder.check_first_batch()

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit":
            self._start_recorder(trainer, pl_module).start_validation()
        elif self._recorder is not None and not trainer.sanity_checking and self._is_due(trainer):
            self._recorder.start_validation()

    @override
    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        assert self._recorder is not None
        self._recorder.start_batch(batch)

    @override
    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any) -> None:
        assert self._recorder is not None
        self._recorder.end_batch()

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Not in `on_validation_epoch_end`, where weight averaging may or may not have restored the trained weights.
        assert self._recorder is not None
        if trainer.state.fn == "fit":
            assert self._history is not None
            self._recorder.end_validation(self._history, trainer.current_epoch + 1, trainer.global_step)
        else:
            self._history_before_fit = History(0, 0, self._recorder.weight())
            self._recorder.end_validation(self._history_before_fit, 0, 0)
            self._remove_recorder()

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._recorder is None or self._history is None or not self._is_due(trainer):
            return
        if not (self.snapshots and self.snapshots[-1].step == trainer.global_step):  # else a validation added it
            self._recorder.end_epoch(self._history, trainer.current_epoch + 1, trainer.global_step)

    @override
    def state_dict(self) -> dict[str, Any]:
        classes = [] if self._recorder is None else self._recorder.classes()
        return {"seen_classes": classes, "history": self._history and self._history.state_dict()}

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self._recorder is not None
        self._last_weight = self._recorder.weight()
        self._ended = True
        self._remove_recorder()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # Not in `on_fit_end`, where the other callback may not have found gamma yet.
        if self._ended and trainer.is_global_zero:
            self._report(trainer, pl_module)
        self._ended, self._last_weight = False, None

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._remove_recorder()

    def _start_recorder(self, trainer: Trainer, model: LightningModule) -> SnapshotRecorder:
        self._remove_recorder()
        width, split = num_classes(find_head(model, self.head)), None
        absent = None if self.absent_classes is None else class_ids("absent_classes", self.absent_classes, width)
        if self.seen_classes is not None:
            split = ClassSplit(width, self.seen_classes, absent)
        reader = BatchReader(self.unpack_batch, resolve_class_map(self.class_map, self.label_names, width))
        self._recorder = SnapshotRecorder(model, self.head, reader, split, trainer.strategy, self._warn_once, absent)
        return self._recorder

    def _remove_recorder(self) -> None:
        if self._recorder is not None:
            self._recorder.remove()
            self._recorder = None

    def _is_due(self, trainer: Trainer) -> bool:
        epoch = trainer.current_epoch
        return epoch % self.every_n_epochs == 0 or epoch + 1 == trainer.max_epochs

    def _path(self, trainer: Trainer) -> Path:
        return Path(trainer.default_root_dir, self.output)

    def _report(self, trainer: Any, model: LightningModule) -> None:
        history = self._history
        if history is None or history.split is None:
            rank_zero_warn(
                "CalibrationDiagnostics writes no report, because no epoch was trained with both seen and absent"
                " classes."
            )
            return
        weights = None
        if history.weight is not None and self._last_weight is not None:
            weights = history.weight, self._last_weight
        others = (each for each in trainer.callbacks if isinstance(each, AbsentClassCalibration))
        report = Report(
            history.snapshots,
            history.split,
            weights,
            curves=history.curves,
            result=next((other.result for other in others), None),
            class_names=self._class_names(trainer, model, history.split.num_classes),
            model=type(model).__name__,
        )
        path = self._path(trainer)
        text = report.text(_FORMATS[path.suffix])
        try:
            replace_atomically(path, lambda file: file.write(text.encode()))
        except OSError as error:  # must not fail a fit that is complete
            rank_zero_warn(f"CalibrationDiagnostics could not write its report: {error}.")
        else:
            rank_zero_info(f"Calibration report: {path}")
        for logger in trainer.loggers:
            try:
                self._log(logger, report, trainer.global_step)
            except Exception as error:  # a server may not answer
                rank_zero_warn(
                    f"CalibrationDiagnostics could not give its report to {type(logger).__name__}: {error!r}."
                )

    def _log(self, logger: Any, report: Report, step: int) -> None:
        """Give the report to a logger that shows figures."""
        file = Path(self.output)
        # By name, because each of Lightning's packages has classes of its own.
        kinds = {kind.__name__ for kind in type(logger).__mro__}
        if "TensorBoardLogger" in kinds:
            # It shows no figures that are embedded in a text.
            logger.experiment.add_text(f"{file.stem}/text", report.text("markdown", figures=False), step)
            for name, figure in report.figures():
                logger.experiment.add_figure(f"{file.stem}/{name}", figure, step, close=False)
        elif "WandbLogger" in kinds:
            text = report.text("markdown", figures=False)
            logger.log_text(f"{file.stem}/text", columns=["report"], data=[[text]], step=step)
            for name, figure in report.figures():
                logger.log_image(f"{file.stem}/{name}", images=[figure], step=step)
        elif "MLFlowLogger" in kinds:
            logger.experiment.log_text(logger.run_id, report.text(_FORMATS[file.suffix]), f"{file.stem}/{file.name}")
            for name, figure in report.figures():
                logger.experiment.log_figure(logger.run_id, figure, f"{file.stem}/{name}.png")

    def _class_names(self, trainer: Trainer, model: LightningModule, num_classes: int) -> dict[int, str]:
        """Return the names of the head's rows, as far as the arguments, the model or the datasets tell them."""
        if self.label_names is not None:
            return names_by_row(self.label_names, num_classes)
        if names := row_names_of(model):
            return dict(enumerate(names))
        named: dict[int, str] = {}
        for loaders in (trainer.val_dataloaders, trainer.train_dataloader):
            named.update(class_names_of_loaders(flat_loaders(loaders)))
        rows = resolve_class_map(self.class_map, self.label_names, num_classes)
        return named if rows is None else {rows[label]: name for label, name in named.items() if label in rows}

    def _warn_once(self, reason: str) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(f"CalibrationDiagnostics ignores some batches. {reason}", stacklevel=2)
