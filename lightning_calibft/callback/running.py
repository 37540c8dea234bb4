"""The part of the callback that has gamma in the model while it still trains."""

from __future__ import annotations

import math
import warnings
from typing import Any, Literal, get_args

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from typing_extensions import override

from lightning_calibft._arguments import check_choice
from lightning_calibft.calibration import CalibrationResult, EvaluationPass
from lightning_calibft.callback.averaging import check_no_averaging
from lightning_calibft.callback.data import Source, calibration_pass, lockstep_of
from lightning_calibft.callback.evaluation import EvaluationMetrics
from lightning_calibft.callback.labels import LabelsMet, split_of_data
from lightning_calibft.callback.steps import TrainingSteps
from lightning_calibft.head import get_gamma, reset_gamma, set_gamma
from lightning_calibft.split import ClassSplit

Refresh = Literal["validation"]


def check_refresh(refresh: Refresh | None, source: Source, estimator: object) -> None:
    """Refuse to find gamma before each validation where that is done already, or too dear.

    Raises:
        ValueError: If ``refresh`` is unknown or does not go with the other arguments.
    """
    if refresh is None:
        return
    check_choice("refresh", refresh, get_args(Refresh))
    expected = "Expected argument `refresh` to be None beside"
    if source == "training_steps":
        raise ValueError(
            f"{expected} `source='training_steps'`, but got {refresh!r}: the steps tell gamma before each validation."
        )
    if isinstance(estimator, str) and estimator == "pcv":
        raise ValueError(f"{expected} `estimator='pcv'`, but got {refresh!r}: each time trains several models.")


class RunningCalibration(EvaluationMetrics):
    """Puts gamma into the model before each validation: of the training steps so far, or of a pass of its own."""

    max_samples: int | None
    tolerance: float | None
    refresh: Refresh | None
    log_metrics: bool
    result: CalibrationResult | None
    _labels: LabelsMet | None

    def _start_afresh(self) -> None:
        self._steps: TrainingSteps | None = None
        self._of_steps: list[CalibrationResult] = []
        self._refreshed: dict[int, CalibrationResult] = {}  # by the training step
        self._refreshed_after = -1  # batches, the last time

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == TrainerFn.FITTING:
            if self.source == "training_steps":
                check_no_averaging(trainer, "`source` to be 'train' or 'validation'", "'training_steps'")
            if self.refresh is not None:
                check_no_averaging(trainer, "`refresh` to be None", repr(self.refresh))

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        if self.source == "training_steps":
            assert self._split is not None
            lockstep = lockstep_of(trainer)
            self._steps = TrainingSteps(
                pl_module,
                self._reader,
                self.estimator,
                self.estimator_kwargs,
                self._split,
                counts=lockstep is None or lockstep.counts,
            )

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.tolerance is not None:  # refused now if it does not go with the data, not when training is done
            with isolate_rng():
                self._pass(trainer, pl_module)

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._steps is not None:
            self._steps.start_epoch()

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._steps is not None:
            self._steps.start_step(batch)

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        if self._steps is not None:
            self._steps.end_forward()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._steps is not None:
            self._steps.end_step(skipped=pl_module.automatic_optimization and not outputs)  # the step returned None

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._use_steps(trainer, pl_module)
            if self.refresh is not None:
                self._find_anew(trainer, pl_module)
        super().on_validation_start(trainer, pl_module)

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_epoch_end(trainer, pl_module)
        if trainer.state.fn != TrainerFn.FITTING or not self.log_metrics:
            return
        if (found := self._refreshed.get(trainer.global_step)) is not None:
            # The same on all processes; the flag keeps Lightning from warning that it may not be.
            pl_module.log("val_gamma", found.gamma, sync_dist=trainer.world_size > 1)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._use_steps(trainer, pl_module)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        self._stop_steps()

    def _use_steps(self, trainer: Trainer, model: LightningModule, last: bool = False) -> None:
        """Put gamma of the steps so far into the model: validation and what is saved from now on have it."""
        if self._steps is None or not trainer.strategy.reduce_boolean_decision(self._steps.counted, all=False):
            return
        try:
            result = self._steps.result()
        except ValueError:  # logits that are not finite; training may recover from them
            if last:
                raise
            return
        self._of_steps.append(result)
        self._put(model, result)

    def _stop_steps(self) -> None:
        if self._steps is not None:
            self._steps.stop()

    def _find_anew(self, trainer: Trainer, model: LightningModule) -> None:
        """Put gamma of the present weights into the model."""
        try:
            with isolate_rng():
                reading = self._pass(trainer, model)
                split = None if reading is None else self._split_of(trainer, reading)
                if reading is None or split is None:
                    return
                reading.progress = False  # in the middle of the Trainer's own bars
                result = reading.run(split)
        except ValueError as error:  # such as logits that are not finite; training may recover from them
            reset_gamma(model)
            self.result = None
            # On each process: the others may not know why.
            text = f"AbsentClassCalibration leaves step {trainer.global_step} without gamma. {error}"
            warnings.warn(text, stacklevel=2)
            return
        self._refreshed[trainer.global_step] = result
        self._refreshed_after = trainer.fit_loop.total_batch_idx
        self._put(model, result)

    def _put(self, model: LightningModule, result: CalibrationResult) -> None:
        self.result = result
        set_gamma(model, result.gamma, result.split.seen_classes, result.split.absent_classes)

    def _split_of(self, trainer: Trainer, reading: EvaluationPass) -> ClassSplit | None:
        return self._split or split_of_data(self._labels, trainer.strategy, reading)

    def _found_for(self, trainer: Trainer) -> CalibrationResult | None:
        """Return what the last validation has found, if nothing was trained since."""
        # Where a module steps its optimizers by itself, the number of steps may not tell.
        same = trainer.fit_loop.total_batch_idx == self._refreshed_after
        return self._refreshed.get(trainer.global_step) if same else None

    def _found_on_the_way(
        self, model: LightningModule, checkpoint: dict[str, Any], split: ClassSplit
    ) -> CalibrationResult | None:
        """Return what had been found when a checkpoint was written, whose weights ``model`` has now.

        Not if classes were met later: gamma of fewer would not fit the mask of all.
        """
        found = self._of_steps
        if self.refresh is not None:
            step = checkpoint.get("global_step")
            found = [result for each, result in self._refreshed.items() if each == step]
        gamma = get_gamma(model) or 0.0  # by which the file is known: another may lie in its place now
        same = (result for result in found if math.isclose(result.gamma, gamma, rel_tol=1e-6) and result.split == split)
        return next(same, None)

    def _pass(self, trainer: Trainer, model: LightningModule) -> EvaluationPass | None:
        return calibration_pass(
            trainer,
            model,
            self.source,
            self.estimator,
            self.estimator_kwargs,
            self._reader,
            self.max_samples,
            self.tolerance,
            None if self._retraining is not None else self._before.weights,
        )
