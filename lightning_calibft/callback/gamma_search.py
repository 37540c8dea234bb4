"""Find gamma as the callback's arguments ask for, and remember which weights it belongs to."""

from __future__ import annotations

import hashlib
import math
import pickle
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any, get_args

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import nn
from torch.distributed.tensor import DTensor

from lightning_calibft._arguments import check_choice, check_type
from lightning_calibft._format import CHILD_NAME
from lightning_calibft.calibration.batch_reader import BatchReader
from lightning_calibft.calibration.distributed import SharedErrors
from lightning_calibft.calibration.evaluation_pass import EvaluationPass, check_tolerance, preserve_random_state
from lightning_calibft.calibration.loaders import check_max_samples, flat_loaders, is_read_once
from lightning_calibft.calibration.result import CalibrationResult
from lightning_calibft.callback.lightning_package import LightningModule, Trainer
from lightning_calibft.callback.listed_classes import count_held_out
from lightning_calibft.callback.pretrained_weights import PretrainedWeights
from lightning_calibft.callback.retraining import Retraining
from lightning_calibft.callback.trainer_checks import check_estimator_of_parts
from lightning_calibft.callback.trainer_data import (
    Source,
    calibration_dataloader,
    calibration_pass,
    check_source,
    check_unlabeled_batch,
    is_model_parallel,
    sharded_reading,
    unlabeled_dataloader,
)
from lightning_calibft.callback.training_steps import TrainingSteps
from lightning_calibft.callback.weight_averaging import check_no_averaging
from lightning_calibft.estimators import (
    Estimator,
    check_estimator,
    check_estimator_width,
    check_unlabeled,
    make_estimator,
    needs_absent_samples,
    needs_held_out_samples,
    needs_pretrained_logits,
)
from lightning_calibft.head.attach import get_gamma
from lightning_calibft.split import ClassSplit

# From 50 held-out samples, `pseudo_absent` loses at most 0.2 points more than from all of them in the recorded runs,
# and 3 points less than from training samples on an ImageNet network. From 20, it loses up to 0.4 more.
LEAST_HELD_OUT = 50


class GammaSearch:
    """Finds the gamma of a module in training: by a pass over data, from the training steps, or by more trainings.

    Args:
        estimator: As in :class:`~lightning_calibft.AbsentClassCalibration`.
        estimator_kwargs: As in :class:`~lightning_calibft.AbsentClassCalibration`.
        source: As in :class:`~lightning_calibft.AbsentClassCalibration`.
        max_samples: As in :class:`~lightning_calibft.AbsentClassCalibration`.
        tolerance: As in :class:`~lightning_calibft.AbsentClassCalibration`.
        refresh_on_validation: As in :class:`~lightning_calibft.AbsentClassCalibration`.
        seen_classes: As in :class:`~lightning_calibft.AbsentClassCalibration`. Only used to check the other arguments.
        absent_classes: As in :class:`~lightning_calibft.AbsentClassCalibration`. Only used to check the others.
        unlabeled: As in :class:`~lightning_calibft.AbsentClassCalibration`.

    Attributes:
        source: The data that gamma is found on. For ``"auto"``, it is chosen when the loaders exist.
        retraining: Pseudo cross-validation, for the estimator ``"pcv"``. ``None`` for other estimators.
        pretrained: The weights before the fit, for estimators that need them.
        steps: The training steps of the current epoch, for ``source="training_steps"`` during a fit. Otherwise
            ``None``.
        unlabeled: The training loaders without labels, which are not read.

    Raises:
        ValueError: If an argument is out of range, or if arguments do not fit together.
        TypeError: If an argument is of the wrong type.
    """

    def __init__(
        self,
        estimator: str | Estimator,
        estimator_kwargs: Mapping[str, Any] | None,
        source: Source,
        max_samples: int | None,
        tolerance: float | None,
        refresh_on_validation: bool,
        seen_classes: list[int] | None,
        absent_classes: list[int] | None,
        unlabeled: Any = None,
    ) -> None:
        pcv = isinstance(estimator, str) and estimator == "pcv"  # a metric overloads `==`
        self.retraining = Retraining(estimator_kwargs or {}) if pcv else None
        if self.retraining is None:
            check_estimator(estimator, estimator_kwargs, seen_classes, absent_classes)
        if unlabeled is not None:
            check_unlabeled(estimator, estimator_kwargs, None)
            check_read_again(unlabeled)
        check_choice("source", source, get_args(Source))
        check_max_samples(max_samples)
        check_tolerance(tolerance)
        check_type("refresh_on_validation", refresh_on_validation, bool)
        self.pretrained = PretrainedWeights()
        self.steps: TrainingSteps | None = None
        self.unlabeled: list[Any] = []
        self._traffic = unlabeled
        self._estimator = estimator
        self._estimator_kwargs = estimator_kwargs
        self.source = source
        self._chooses = source == "auto"
        self._max_samples = max_samples
        self._tolerance = tolerance
        self._refreshes = refresh_on_validation
        self._reader = BatchReader()
        if source == "training_steps":
            self._check_steps(seen_classes)
        if refresh_on_validation:
            self._check_refresh()
        self._forget_found()

    def _forget_found(self) -> None:
        self._of_steps: list[CalibrationResult] = []
        self._of_retraining: CalibrationResult | None = None
        self._found: dict[bytes, CalibrationResult] = {}  # by the fingerprint of the weights that they belong to
        self._found_after = -1  # number of training batches before the last result
        self._refreshed: tuple[int, CalibrationResult] | None = None  # the last one, and its training step

    def check_split(self, split: ClassSplit | None, num_classes: int) -> None:
        """Check that the estimator works with the classes.

        Raises:
            ValueError: If it needs other classes, or was made for another number of classes.
        """
        check_estimator_width(self._estimator, num_classes)
        if split is None:
            return
        if self.retraining is not None:
            self.retraining.plan.pseudo_splits(split)
        elif isinstance(self._estimator, str):
            make_estimator(self._estimator, split, self._estimator_kwargs)

    def setup(self, trainer: Trainer, model: LightningModule) -> None:
        """Check the Trainer, and start to watch the weights of the model, before weights are restored.

        Raises:
            RuntimeError: If gamma would be found while the model does not have its averaged weights, or if PCV would
                run in several processes.
            ValueError: If the estimator needs other weights and the model is sharded.
        """
        self._forget_found()
        if self.source == "training_steps":
            check_no_averaging(trainer, "`source='training_steps'`")
        if self._refreshes:
            check_no_averaging(trainer, "`refresh_on_validation=True`")
        if self.needs_weights_before:
            check_estimator_of_parts(trainer, self._estimator)
            self.pretrained.watch(model)
            self._warn_if_fine_tuned(model)
        if self.retraining is not None:
            self.retraining.setup(trainer)

    def start(self, trainer: Trainer, model: LightningModule, reader: BatchReader, split: ClassSplit | None) -> None:
        """Prepare for a fit that begins. By now, ``model`` is complete, on its device, and its gamma is reset.

        Raises:
            ValueError: If there is no data to find gamma on.
            TypeError: If PCV cannot copy the model.
        """
        check_source(trainer, "auto" if self._chooses else self.source, self._estimator)
        if self._chooses:
            validation = needs_absent_samples(self._estimator) and not _has_calibration_data(trainer)
            self.source = "validation" if validation else "train"
        self._reader = reader
        if self.needs_weights_before:
            self.pretrained.start(model, resumed=trainer.ckpt_path is not None)
        if self.retraining is not None:
            self.retraining.keep(model)
        if self.source == "training_steps":
            assert split is not None
            sharded = sharded_reading(trainer)
            counts = sharded is None or sharded.counts
            self.steps = TrainingSteps(model, self._estimator, self._estimator_kwargs, split, counts)

    def choose_source(
        self, trainer: Trainer, rows: dict[int, int] | None, readable: bool, seen_classes: Sequence[int]
    ) -> None:
        """Choose the data for ``source="auto"``, before the first step. Warn if it must be that of training.

        The arguments are those of :func:`count_held_out`.
        """
        if not self._chooses or self.source == "validation" or not needs_held_out_samples(self._estimator):
            return
        if _has_calibration_data(trainer):
            return
        number = count_held_out(trainer, rows, readable, seen_classes)
        if number >= LEAST_HELD_OUT:
            self.source = "validation"
        else:
            found = f"the validation data has {int(number)} samples of seen classes"
            self._warn_of_training_data(found if trainer.enable_validation else "there is no validation data")

    def check_unlabeled_batch(self, trainer: Trainer, model: LightningModule) -> None:
        """Check, at the first training batch, that the unlabeled data can be read at the end, if there is any.

        Raises:
            ValueError: If it has no batch, can be read only once, or the model does not run on it.
            RuntimeError: If another process has failed. Its error says why.
        """
        errors, data = SharedErrors(), None
        with preserve_random_state():
            with errors.shared():
                if (data := self._unlabeled_data(trainer)) is not None:
                    check_read_again(data)
                elif not self._takes_unlabeled() and unlabeled_dataloader(trainer) is not None:
                    rank_zero_warn(
                        "`unlabeled_dataloader()` is not read for gamma: that needs the estimator 'pseudo_absent' or"
                        " 'operating_point', without an `absent_share`."
                    )
            errors.agree()
            if data is not None:
                check_unlabeled_batch(trainer, model, data, self._reader)

    def _unlabeled_data(self, trainer: Trainer) -> Any:
        """Return the samples that the share of absent ones is estimated from, or ``None``."""
        if self._traffic is not None or not self._takes_unlabeled():
            return self._traffic
        method = unlabeled_dataloader(trainer)
        return None if method is None else method()

    def _takes_unlabeled(self) -> bool:
        """Return whether gamma can follow from an estimated share: the method can be there for other uses."""
        try:
            check_unlabeled(self._estimator, self._estimator_kwargs, None)
        except ValueError:
            return False
        return self.source != "training_steps"

    @property
    def needs_weights_before(self) -> bool:
        """Whether the weights before the fit are needed."""
        return self.retraining is not None or needs_pretrained_logits(self._estimator)

    def make_pass(self, trainer: Trainer, model: LightningModule, knows_classes: bool = True) -> EvaluationPass | None:
        """Prepare a pass over the data that gamma is found on. ``None``, with a warning, if there is no data.

        Args:
            trainer: The Trainer.
            model: The module, whose head is attached.
            knows_classes: Whether the seen classes are known. If not, only training data shows them.
        """
        if self._chooses and not knows_classes and not needs_absent_samples(self._estimator):
            self.source = "train"
        errors = SharedErrors()  # the loaders of the user can raise anything, also on one process only
        with errors.shared():
            reading = calibration_pass(
                trainer,
                model,
                self.source,
                self._estimator,
                self._estimator_kwargs,
                self._reader,
                self._max_samples,
                self._tolerance,
                None if self.retraining is not None else self.pretrained.weights,
                self.unlabeled,
                self._unlabeled_data(trainer),
                errors,
            )
        return reading if all(errors.gather(lambda: reading is not None)) else None

    def run(self, trainer: Trainer, reading: EvaluationPass, split: ClassSplit) -> CalibrationResult:
        """Find the gamma of the model's current weights, by a pass or by pseudo cross-validation."""
        if self.retraining is None:
            with _buffers_of_first(trainer, reading.model):
                held_out = self._chooses and reading.validation and not needs_absent_samples(self._estimator)
                if not held_out:
                    return reading.for_unlabeled(reading.run(split))
                reading, result = self._run_held_out(trainer, reading, split)
                return reading.for_unlabeled(result)
        if self._of_retraining is None:  # one gamma for all weights of a run
            assert self.pretrained.weights is not None
            self._of_retraining = self.retraining.run(trainer, self.pretrained.weights, reading, split)
        return self._of_retraining

    def run_before_validation(
        self, trainer: Trainer, model: LightningModule, reading: EvaluationPass, split: ClassSplit
    ) -> CalibrationResult:
        """Find the gamma of the current weights in the middle of a fit, and remember it for these weights."""
        result = self.run(trainer, reading, split)
        self.remember(trainer, model, result)
        self._refreshed = trainer.global_step, result
        return result

    def result_of_steps(self, trainer: Trainer, model: LightningModule) -> CalibrationResult | None:
        """Return the gamma of this epoch's training steps so far, or ``None`` if no step was ever counted.

        Raises:
            ValueError: If gamma is not finite.
        """
        if self.steps is None or not trainer.strategy.reduce_boolean_decision(self.steps.counted, all=False):
            return None
        result = self.steps.result()
        self._of_steps.append(result)
        self.remember(trainer, model, result)
        return result

    def remember(self, trainer: Trainer, model: LightningModule, result: CalibrationResult) -> None:
        """Remember the result for the weights and buffers that ``model`` has now."""
        self._found[_fingerprint(trainer, model)] = result
        self._found_after = trainer.fit_loop.total_batch_idx

    def found_for(self, trainer: Trainer, model: LightningModule) -> CalibrationResult | None:
        """Return the result for the weights and buffers that ``model`` has now, or ``None`` if there is none."""
        return self._found.get(_fingerprint(trainer, model)) if self._found else None

    def found_for_present(self, trainer: Trainer, model: LightningModule) -> CalibrationResult | None:
        """Return the result for what ``model`` is now, if there was no training since."""
        same = trainer.fit_loop.total_batch_idx == self._found_after  # otherwise, new classes may have appeared
        return self.found_for(trainer, model) if same else None

    def found_at(self, step: int) -> CalibrationResult | None:
        """Return the result from before the last validation, if that was at this training step."""
        return self._refreshed[1] if self._refreshed is not None and self._refreshed[0] == step else None

    def found_for_file(self, trainer: Trainer, model: LightningModule, split: ClassSplit) -> CalibrationResult | None:
        """Return the result for the weights of a file, if there is one. ``model`` has the weights now.

        Return ``None`` if new classes appeared after that, since this gamma is for another split. With
        ``source="training_steps"``, gamma does not follow from the weights. A file then keeps the one that it has.
        """
        gamma = trainer.strategy.broadcast(get_gamma(model)) or 0.0
        of_steps = (result for result in self._of_steps if math.isclose(result.gamma, gamma, rel_tol=1e-6))
        found = self.found_for(trainer, model) or next(of_steps, None)
        return found if found is not None and found.split == split else None

    def has_found(self, gamma: float | None) -> bool:
        """Return whether this gamma is one that was found in this fit."""
        return any(result.gamma == gamma for result in (*self._of_steps, *self._found.values()))

    def stop(self) -> None:
        """Stop recording training steps."""
        if self.steps is not None:
            self.steps.stop()

    def forget(self) -> None:
        """Free the memory that was used for the fit."""
        self.stop()
        self.steps = None
        self.unlabeled = []
        self.pretrained.forget()
        if self.retraining is not None:
            self.retraining.forget()

    def _run_held_out(
        self, trainer: Trainer, reading: EvaluationPass, split: ClassSplit
    ) -> tuple[EvaluationPass, CalibrationResult]:
        """Find gamma on the validation data that was chosen for the user, or on the training data if it does not do.

        Returns:
            The pass that was used, and its result.
        """
        enough = LEAST_HELD_OUT if self._max_samples is None else 1
        try:
            result = reading.run(split)
            if result.num_samples >= enough:
                return reading, result
            reason = f"the validation data has {result.num_samples} samples of seen classes"
        except Exception as error:  # the user did not choose this data; an error of one process is one of all
            reason = f"the validation data cannot be used: {error}"
        self._warn_of_training_data(reason)
        self.source = "train"
        again = self.make_pass(trainer, trainer.lightning_module)
        assert again is not None  # there was a validation, so there are training data
        return again, again.run(split)

    def _warn_of_training_data(self, reason: str) -> None:
        name = self._estimator if isinstance(self._estimator, str) else type(self._estimator).__name__
        rank_zero_warn(
            f"The estimator {name!r} finds gamma on the training data, since {reason}. A model that has"
            " learned its training data by heart has larger margins there than on new samples, and gamma is then too"
            f" large. Give the Trainer validation data with at least {LEAST_HELD_OUT} samples of the seen classes, or"
            " give the module or its datamodule a method `calibration_dataloader()` with samples that are not trained"
            " on. If you mean the training data, pass `source='train'`."
        )

    def _check_steps(self, seen_classes: list[int] | None) -> None:
        estimator = self._estimator
        if self.needs_weights_before or needs_absent_samples(estimator):
            raise ValueError(
                f"Expected argument `source` to be 'train' or 'validation' for the estimator {estimator!r}, but got"
                " 'training_steps', which only have the logits of the fine-tuning data under the current weights."
            )
        if isinstance(estimator, str) and seen_classes is None:
            raise ValueError(
                "Expected argument `seen_classes` to be given with `source='training_steps'`, but got None. The classes"
                " must be known before the first step."
            )

    def _check_refresh(self) -> None:
        expected = "Expected argument `refresh_on_validation` to be False with"
        if self.source == "training_steps":
            raise ValueError(
                f"{expected} `source='training_steps'`, but got True: the steps give gamma before each validation."
            )
        if self.retraining is not None:
            raise ValueError(f"{expected} `estimator='pcv'`, but got True: each refresh would train several models.")

    def _warn_if_fine_tuned(self, model: LightningModule) -> None:
        if get_gamma(model) is None:
            return
        name = self._estimator if isinstance(self._estimator, str) else type(self._estimator).__name__
        calibrate = f"`lightning_calibft.calibrate(model, loader, estimator={name!r}, pretrained=...)` after the fit"
        rank_zero_warn(
            f"The estimator {name!r} takes the weights that this fit begins with for those before fine-tuning, but the"
            " model is calibrated, so it has been fine-tuned already. If you do not mean these weights, build the"
            " module again" + (f", or call {calibrate}." if self.retraining is None else ".")
        )


def check_read_again(unlabeled: Any) -> None:
    """Check that unlabeled data can be read for each file that is kept.

    Raises:
        ValueError: If it can be read only once.
    """
    if any(map(is_read_once, flat_loaders(unlabeled) if isinstance(unlabeled, (list, tuple, dict)) else [unlabeled])):
        raise ValueError(
            f"Expected argument `unlabeled` to be data that can be read again for each file that is kept, but got a"
            f" {type(unlabeled).__name__} that can be read only once. Pass a list or a DataLoader."
        )


def _has_calibration_data(trainer: Trainer) -> bool:
    with preserve_random_state():  # the user's method may draw which samples it takes
        return calibration_dataloader(trainer) is not None


def _fingerprint(trainer: Trainer, model: LightningModule) -> bytes:
    """Return a hash of the parameters and buffers of the model on the first process, apart from its calibration.

    The first process decides for all: its model is the one that is saved, and the running statistics of the others
    differ from it.
    """
    return SharedErrors().gather(lambda: _hash(model) if trainer.is_global_zero else b"")[0]


def _hash(model: LightningModule) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if CHILD_NAME not in name:
            local = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach().cpu()
            digest.update(f"{name} {local.dtype} {tuple(local.shape)}".encode())
            if local.layout != torch.strided or local.is_quantized:  # these cannot be seen as bytes
                local = torch.frombuffer(pickle.dumps(local), dtype=torch.uint8)
            digest.update(local.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.digest()


@contextmanager
def _buffers_of_first(trainer: Trainer, model: nn.Module) -> Iterator[None]:
    """Give all processes the buffers of the first one, whose model is saved, and then put their own back.

    Otherwise, each process would measure its share of the samples with its own running statistics.
    """
    if trainer.world_size == 1 or is_model_parallel(trainer):
        yield
        return
    buffers = {name: buffer for name, buffer in model.named_buffers() if CHILD_NAME not in name}
    own = {name: buffer.clone() for name, buffer in buffers.items()}
    first = trainer.strategy.broadcast({name: buffer.cpu() for name, buffer in buffers.items()})
    try:
        for name, buffer in buffers.items():
            if buffer.shape == first[name].shape:
                buffer.copy_(first[name])
        yield
    finally:
        for name, buffer in buffers.items():
            buffer.copy_(own[name])
