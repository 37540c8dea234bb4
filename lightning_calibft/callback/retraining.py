"""Pseudo cross-validation with the user's own module, data and Trainer."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Set
from dataclasses import dataclass, fields, replace
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor, nn
from tqdm.auto import tqdm

from lightning_calibft.calibration.evaluation_pass import EvaluationPass
from lightning_calibft.calibration.result import CalibrationResult
from lightning_calibft.callback.class_subset import ClassSubset, check_loaders
from lightning_calibft.callback.lightning_package import Callback, LightningModule, Trainer, lightning_of
from lightning_calibft.callback.nested_fit import Progress, copy_of, fit_nested, no_op
from lightning_calibft.callback.trainer_bar import bar_of
from lightning_calibft.cross_validation.pseudo_cross_validation import cost, of_classes
from lightning_calibft.cross_validation.splits import CrossValidationPlan, cross_validate
from lightning_calibft.head.attach import reset_gamma
from lightning_calibft.split import ClassSplit


@dataclass(frozen=True)
class RetrainingPlan(CrossValidationPlan):
    """The ``estimator_kwargs`` of ``"pcv"``.

    Raises:
        TypeError: If a value is of the wrong type.
        ValueError: If a value is out of range.
    """

    epochs: float = 1.0  # as a share of the epochs or steps of the fit

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.epochs, bool) or not (isinstance(self.epochs, (int, float)) and 0 < self.epochs < math.inf):
            raise ValueError(f"Expected argument `epochs` to be a positive share, but got {self.epochs!r}.")


class Retraining:
    """Keeps a copy of the module before a fit. After the fit, trains copies of it on a part of the classes.

    Args:
        options: Fields of :class:`RetrainingPlan`.

    Raises:
        TypeError: If an option is of the wrong type.
        ValueError: If an option is unknown or out of range.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        known = [field.name for field in fields(RetrainingPlan)]
        if unknown := sorted(options.keys() - known):
            raise ValueError(
                f"Expected argument `estimator_kwargs` to hold {' or '.join(map(repr, known))} for the estimator 'pcv',"
                f" but got {unknown[0]!r}."
            )
        self.plan = RetrainingPlan(**options)
        self._callbacks: list[Callback] = []
        self._module: LightningModule | None = None
        self._accumulate = 1

    def setup(self, trainer: Any) -> None:
        """Check the Trainer before the fit, and copy the callbacks that shape the training.

        Raises:
            RuntimeError: If there are several processes.
        """
        if trainer.world_size > 1:
            raise RuntimeError(
                f"Expected a Trainer with one device for the estimator 'pcv', which trains in a single process,"
                f" but got {trainer.world_size}. Choose another `estimator`, or call `pseudo_cross_validation`."
            )
        # Copies from before they have seen the module. Other callbacks watch or save the training, but do not shape it.
        callbacks = lightning_of(trainer).callbacks
        shaping = (callbacks.BaseFinetuning, callbacks.GradientAccumulationScheduler)
        self._callbacks = [copy.deepcopy(each) for each in trainer.callbacks if isinstance(each, shaping)]
        self._accumulate = trainer.accumulate_grad_batches

    def keep(self, module: LightningModule) -> None:
        """Copy the module to the CPU before it is trained.

        Raises:
            TypeError: If the module cannot be copied.
        """
        self._module = copy_of(module).cpu()
        for hook in ("prepare_data", "setup", "configure_model", "teardown"):
            setattr(self._module, hook, no_op)  # it is set up already: another setup could rebuild parts of it
        self._module.configure_callbacks = list  # type: ignore[method-assign]

    def check(self, trainer: Trainer, own_names: Set[str]) -> None:
        """Check the training data and the schedulers once they exist, and announce the trainings after the fit.

        Args:
            trainer: The Trainer.
            own_names: The names that only the callback logs.

        Raises:
            ValueError: If the samples of some classes cannot be taken from a loader, or if a scheduler monitors a value
                that the callback logs.
        """
        check_loaders(trainer.train_dataloader)
        for config in trainer.lr_scheduler_configs:
            if config.reduce_on_plateau and str(config.monitor).split("/dataloader_idx_")[0] in own_names:
                raise ValueError(
                    f"Expected learning rate schedulers to monitor values that the module itself logs for the"
                    f" estimator 'pcv', but got {config.monitor!r}, which its trainings do not log. Monitor another"
                    " value."
                )
        splits, times = self.plan.num_splits, self.plan.num_splits * self.plan.epochs / 2
        rank_zero_info(
            f"AbsentClassCalibration(estimator='pcv') will train {splits} more models after this fit, each on about"
            f" half of the classes. Together they take about {times:.1f} times as long as this fit."
        )

    def run(
        self,
        trainer: Any,
        weights: Mapping[str, Tensor],
        reading: EvaluationPass,
        split: ClassSplit,
    ) -> CalibrationResult:
        """Cross-validate with nested fits; see :func:`~lightning_calibft.cross_validation.cross_validate`.

        Args:
            trainer: The user's Trainer. Its training has ended.
            weights: The weights before the fit.
            reading: A pass over the data that gamma is found on.
            split: The seen and the absent classes.
        """
        assert self._module is not None
        device, before = trainer.strategy.root_device, self._module
        before.load_state_dict(weights, strict=before.strict_loading)
        reset_gamma(before.to(device))
        data = ClassSubset(trainer.train_dataloader, reading.reader)
        limits = self._limits(trainer, 1.0)
        steps, epochs = limits.get("max_steps"), limits["max_epochs"]
        length = f"{epochs} epochs of its samples" if steps is None else f"its share of {steps} steps"
        rank_zero_info(f"{cost(self.plan, split, data.rows)} Each trains for {length}.")
        make_bar = bar_of(trainer)

        def fit(index: int, pseudo_split: ClassSplit) -> nn.Module:
            module = copy_of(before)
            parts, share = data.of_classes(pseudo_split.seen_classes)
            mode = trainer.fit_loop._combined_loader._mode  # private in Lightning
            loaders = lightning_of(trainer).utilities.CombinedLoader(parts, mode)
            shaping = [*copy.deepcopy(self._callbacks), Progress(bar, self.plan.num_splits - index)]
            fit_nested(trainer, module, loaders, share, self._limits(trainer, share), self._accumulate, shaping)
            return module.to(device)

        def read(module: nn.Module) -> EvaluationPass:
            return replace(reading, model=module, bar=None)

        with tqdm(disable=True) if make_bar is None else make_bar("Cross-validating", None) as bar:
            number = len(of_classes(data.rows, split.seen_classes))
            settings = {"epochs": self.plan.epochs, "num_samples": number, **limits}
            return cross_validate(self.plan, split, before, fit, read, settings)

    def forget(self) -> None:
        """Free the memory."""
        self._module = None

    def _limits(self, trainer: Trainer, share: float) -> dict[str, Any]:
        """Return how long to train on a share of the samples."""
        if 0 <= trainer.max_steps <= trainer.global_step:  # the steps ended the fit
            return {"max_epochs": -1, "max_steps": max(1, round(trainer.global_step * self.plan.epochs * share))}
        return {"max_epochs": max(1, round(trainer.current_epoch * self.plan.epochs))}
