"""Putting the calibration's buffers into the head before any weights are restored into it."""

from __future__ import annotations

from typing import Any, get_args

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_calibft._arguments import check_choice
from lightning_calibft.calibration import BatchReader, UnpackBatch
from lightning_calibft.callback.averaging import check_averaged_copies, check_averaging_order
from lightning_calibft.callback.checks import check_class_lists, check_estimator_of_parts, check_launcher, check_trainer
from lightning_calibft.callback.data import Source
from lightning_calibft.callback.kept import restore_calibration
from lightning_calibft.callback.pretrained import PretrainedWeights
from lightning_calibft.callback.retraining import Retraining
from lightning_calibft.estimators import (
    Estimator,
    check_estimator,
    check_estimator_width,
    make_estimator,
    needs_absent_samples,
    needs_pretrained_logits,
)
from lightning_calibft.head import HeadNotFoundError, attach, attached_heads, find_head, get_gamma, num_classes
from lightning_calibft.labels.class_map import ClassMap, resolve_class_map
from lightning_calibft.labels.label_names import LabelNames
from lightning_calibft.split import ClassSplit


class HeadAttachment(Callback):
    """The part of the callback that finds the head and attaches the calibration to it.

    Its arguments are those of :class:`~lightning_calibft.AbsentClassCalibration`.
    """

    def __init__(
        self,
        seen_classes: list[int] | None,
        absent_classes: list[int] | None,
        head: str | None,
        estimator: str | Estimator,
        estimator_kwargs: dict[str, Any] | None,
        source: Source,
        unpack_batch: UnpackBatch | str | None,
        class_map: ClassMap | None,
        label_names: LabelNames | None,
    ) -> None:
        pcv = isinstance(estimator, str) and estimator == "pcv"  # a metric makes something else of `==`
        self._retraining = Retraining(estimator_kwargs or {}) if pcv else None
        if self._retraining is None:
            check_estimator(estimator, estimator_kwargs, seen_classes, absent_classes)
        check_choice("source", source, get_args(Source))
        check_class_lists(seen_classes, absent_classes)
        if source == "training_steps":
            self._check_steps(estimator, seen_classes)
        self.seen_classes = seen_classes
        self.absent_classes = absent_classes
        self.head = head
        self.estimator = estimator
        self.estimator_kwargs = estimator_kwargs
        self.source = source
        self.unpack_batch = unpack_batch
        self.class_map = class_map
        self.label_names = label_names
        self._reader = self._make_reader(None)
        self._before = PretrainedWeights()
        self._split: ClassSplit | None = None  # where the arguments tell it
        self._late: RemovableHandle | None = None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        check_trainer(trainer, pl_module)
        if stage == TrainerFn.FITTING:
            check_averaging_order(trainer, pl_module, self)
            check_launcher(trainer, pl_module, self.head)
            if self._needs_weights_before():
                check_estimator_of_parts(trainer, self.estimator)
                self._before.watch(pl_module)
                self._warn_if_fine_tuned(pl_module)
        if isinstance(trainer.strategy, ModelParallelStrategy):
            # Later: `configure_model` shards the head, and torch would shard all that belongs to it. From a folder,
            # weights are restored into what the state dict has by then.
            self._late = pl_module.register_state_dict_pre_hook(lambda *_: self._attach(pl_module))
            return
        try:
            self._attach(pl_module)
        except HeadNotFoundError:
            # The module may build it in `setup` or `configure_model`: then attach when weights are restored into it.
            self._late = pl_module.register_load_state_dict_pre_hook(lambda *_: self._attach(pl_module))

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._attach_late(trainer, pl_module)
        check_averaged_copies(trainer, pl_module)
        if self._needs_weights_before():
            self._before.start(pl_module, resumed=trainer.ckpt_path is not None)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._attach_late(trainer, pl_module)

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._attach_late(trainer, pl_module)

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._attach_late(trainer, pl_module)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._forget_late()
        self._before.forget()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._forget_late()  # a tuner leaves a fit in the middle without a word
        self._before.forget()

    def _attach_late(self, trainer: Trainer, model: LightningModule) -> None:
        attached = bool(attached_heads(model))
        if self._late is not None or not attached:  # built, or built anew, in the module's `setup`
            self._forget_late()
            self._attach(model)
        if isinstance(trainer.strategy, ModelParallelStrategy) and not attached:
            restore_calibration(trainer, model)

    def _forget_late(self) -> None:
        if self._late is not None:
            self._late.remove()
            self._late = None

    def _attach(self, model: LightningModule) -> None:
        width = num_classes(find_head(model, self.head))
        self._reader = self._make_reader(width)
        check_estimator_width(self.estimator, width)
        if not isinstance(self.estimator, str):
            self._split = self.estimator.split
        elif self.seen_classes is not None:
            self._split = ClassSplit(width, self.seen_classes, self.absent_classes)
            self._check_split(self._split)
        attach(model, self.head)

    def _check_split(self, split: ClassSplit) -> None:
        """Ask of the classes what the estimator asks beyond a split."""
        if self._retraining is not None:
            self._retraining.plan.pseudo_splits(split)
        else:
            make_estimator(self.estimator, split, self.estimator_kwargs)

    def _needs_weights_before(self) -> bool:
        return self._retraining is not None or needs_pretrained_logits(self.estimator)

    def _warn_if_fine_tuned(self, model: LightningModule) -> None:
        if get_gamma(model) is None:
            return
        name = self.estimator if isinstance(self.estimator, str) else type(self.estimator).__name__
        calibrate = f"`lightning_calibft.calibrate(model, loader, estimator={name!r}, pretrained=...)` after the fit"
        rank_zero_warn(
            f"The estimator {name!r} takes the weights that this fit begins with for those from before fine-tuning, but"
            " the model is calibrated, so it has been fine-tuned already. If these are not meant, build the module anew"
            + (f", or call {calibrate}." if self._retraining is None else ".")
        )

    def _make_reader(self, num_classes: int | None) -> BatchReader:
        return BatchReader(self.unpack_batch, resolve_class_map(self.class_map, self.label_names, num_classes))

    def _check_steps(self, estimator: str | Estimator, seen_classes: list[int] | None) -> None:
        if self._retraining is not None or needs_pretrained_logits(estimator) or needs_absent_samples(estimator):
            raise ValueError(
                f"Expected argument `source` to be 'train' or 'validation' for the estimator {estimator!r}, but got"
                " 'training_steps', which have the logits of the fine-tuning data under the present weights alone."
            )
        if isinstance(estimator, str) and seen_classes is None:
            raise ValueError(
                "Expected argument `seen_classes` beside `source='training_steps'`, but got None. The classes must be"
                " known before the first step."
            )
