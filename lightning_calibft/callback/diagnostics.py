"""A callback that follows what fine-tuning does to absent classes, and writes a report about it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_calibft._arguments import check_integer, check_path
from lightning_calibft.analysis import calibration_report
from lightning_calibft.analysis.history import History, Snapshot
from lightning_calibft.analysis.report import Format
from lightning_calibft.calibration import BatchReader, UnpackBatch
from lightning_calibft.callback.checks import check_class_lists, check_trainer
from lightning_calibft.callback.listening import Observer
from lightning_calibft.checkpoint.files import replace_atomically
from lightning_calibft.head import find_head, num_classes
from lightning_calibft.labels.class_map import ClassMap, resolve_class_map
from lightning_calibft.labels.label_names import LabelNames
from lightning_calibft.plotting import check_matplotlib
from lightning_calibft.split import ClassSplit

_FORMATS: dict[str, Format] = {".md": "markdown", ".html": "html"}


class CalibrationDiagnostics(Callback):
    """Follows what fine-tuning does to the classes that it leaves out, and writes one page about it when a fit ends.

    It keeps, of each validation and of each epoch: accuracies of seen and absent classes, AUSUC and the best gamma;
    the mean logits of the true and the largest other classes; the norms of the head's rows, and how similar the changes
    of these rows since the first step are. The page says in words whether gamma helps, and whether calibration cannot
    help because the features of absent classes have become worse. The analyses are those of Mai et al., "Fine-Tuning is
    Fine, if Calibrated" (NeurIPS 2024); see :mod:`lightning_calibft.analysis`.

    It looks at what the module's own validation produces, of all validation loaders together, and at logits without
    gamma. It stands by itself or beside :class:`~lightning_calibft.AbsentClassCalibration`, in any order.

    Note:
        The loss, the random state, the weights and the state dict of the model are the same with and without it. Its
        own state (the numbers so far and a copy of the head's first weight) is in the checkpoints, and a resumed fit
        goes on with it.
        ``trainer.validate(model, val_loader)`` before ``trainer.fit`` makes the model before fine-tuning the first
        point. It needs ``seen_classes``.

    Args:
        seen_classes: Rows of the classes in the fine-tuning data. ``None``: the labels met in training so far; where
            later steps meet more, what was measured before is forgotten.
        absent_classes: Rows of the classes that it lacks. ``None``: all that are not seen.
        head: Dotted name of the module that gives the logits, where it is not found by itself.
        every_n_epochs: Measure in the first epoch, and then in every so manieth, and in the last one.
        output: The file to write, ``.md`` or ``.html``; pictures are in it. Relative to the Trainer's
            ``default_root_dir``. An earlier one is replaced.
        unpack_batch: As in :class:`~lightning_calibft.AbsentClassCalibration`.
        class_map: As in :class:`~lightning_calibft.AbsentClassCalibration`.
        label_names: As in :class:`~lightning_calibft.AbsentClassCalibration`.

    Attributes:
        snapshots: What was measured, in order.

    Raises:
        ModuleNotFoundError: In ``setup``, if matplotlib is not installed.
        ValueError: If an argument is out of its range; when a fit starts, if the head is not found or the classes do
            not fit it.
        RuntimeError: If the strategy shards the weights.

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
        check_class_lists(seen_classes, absent_classes)
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
        self._observer: Observer | None = None
        self._history: History | None = None
        self._before_fit: History | None = None  # a validation of the model before it
        self._restored_classes: list[int] = []
        self._warned = False

    @property
    def snapshots(self) -> list[Snapshot]:
        """What was measured, in order."""
        return [] if self._history is None else self._history.snapshots

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        check_trainer(trainer, pl_module)
        if isinstance(trainer.strategy, ModelParallelStrategy):
            raise RuntimeError(
                "CalibrationDiagnostics does not support ModelParallelStrategy: it compares whole weights of the head,"
                " of which each process has a part. Train without it, or use the strategy 'ddp'."
            )
        if stage == TrainerFn.FITTING:
            check_matplotlib()
            if trainer.is_global_zero:
                self._path(trainer).parent.mkdir(parents=True, exist_ok=True)
            self._history, self._restored_classes, self._warned = None, [], False

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        observer = self._observe(pl_module)
        weight, before, self._before_fit = observer.weight(), self._before_fit, None
        if self._history is not None:  # restored
            observer.add_classes({*self._restored_classes, *self._history.seen_classes})
        elif before is not None and before.begins_with(weight):
            self._history = before
        else:
            self._history = History(trainer.current_epoch, trainer.global_step, weight)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._observer is not None:
            self._observer.see_training_batch(batch, trainer.train_dataloader)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            self._observe(pl_module).start(trainer.strategy)
        elif self._observer is not None and not trainer.sanity_checking and self._is_due(trainer):
            self._observer.start(trainer.strategy)

    @override
    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        assert self._observer is not None
        self._observer.start_batch(batch)

    @override
    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any) -> None:
        assert self._observer is not None
        self._observer.end_batch()

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Not `on_validation_epoch_end`, where weight averaging may or may not have put the trained weights back.
        assert self._observer is not None
        if trainer.state.fn == TrainerFn.FITTING:
            assert self._history is not None
            self._observer.finish(self._history, trainer.current_epoch + 1, trainer.global_step, trainer.strategy)
        else:
            self._before_fit = History(0, 0, self._observer.weight())
            self._observer.finish(self._before_fit, 0, 0, trainer.strategy)
            self._leave()

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        step = trainer.global_step
        if self._observer is None or self._history is None or not self._is_due(trainer):
            return
        if self.snapshots and self.snapshots[-1].step == step:
            return  # by the validation
        if (split := self._observer.split_so_far(trainer.strategy)) is not None:
            self._history.add(split, trainer.current_epoch + 1, step, self._observer.weight())

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self._observer is not None
        if trainer.is_global_zero:
            self._write(self._path(trainer), self._observer.weight())
        self._leave()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._leave()

    @override
    def state_dict(self) -> dict[str, Any]:
        classes = [] if self._observer is None else self._observer.classes_met()
        return {"seen_classes": classes, "history": self._history and self._history.state_dict()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored_classes = state_dict["seen_classes"]
        self._history = state_dict["history"] and History.from_state_dict(state_dict["history"])

    def _observe(self, model: LightningModule) -> Observer:
        self._leave()
        width, split = num_classes(find_head(model, self.head)), None
        if self.seen_classes is not None:
            split = ClassSplit(width, self.seen_classes, self.absent_classes)
        reader = BatchReader(self.unpack_batch, resolve_class_map(self.class_map, self.label_names, width))
        self._observer = Observer(model, self.head, reader, split, self._warn_once)
        return self._observer

    def _leave(self) -> None:
        if self._observer is not None:
            self._observer.remove()
            self._observer = None

    def _is_due(self, trainer: Trainer) -> bool:
        epoch = trainer.current_epoch
        return epoch % self.every_n_epochs == 0 or epoch + 1 == trainer.max_epochs

    def _path(self, trainer: Trainer) -> Path:
        return Path(trainer.default_root_dir, self.output)

    def _write(self, path: Path, last: Tensor | None) -> None:
        history = self._history
        if history is None or history.split is None:
            rank_zero_warn(
                "CalibrationDiagnostics writes no report: no epoch was trained with classes of which some are seen and"
                " some are absent."
            )
            return
        weights = None if history.weight is None or last is None else (history.weight, last)
        text = calibration_report(history.snapshots, history.split, weights, format=_FORMATS[path.suffix])
        try:
            replace_atomically(path, lambda file: file.write(text.encode()))
        except OSError as error:  # the fit has done its work all the same
            rank_zero_warn(f"CalibrationDiagnostics could not write its report: {error}.")
        else:
            rank_zero_info(f"Calibration report: {path}")

    def _warn_once(self, reason: str) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(f"CalibrationDiagnostics does not count some batches. {reason}", stacklevel=2)
