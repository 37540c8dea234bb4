"""Read the data of a Trainer for the calibration pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import chain
from typing import Any, Literal, cast

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightning_calibft.calibration.batch_calls import logits_of_first_batch
from lightning_calibft.calibration.batch_reader import BatchReader, check_rows
from lightning_calibft.calibration.data_check import empty_error
from lightning_calibft.calibration.distributed import ShardedReading, SharedErrors, first_batch_of_any
from lightning_calibft.calibration.evaluation_pass import (
    EvaluationPass,
    check_runs_by_forward,
    head_width,
    proofs_kept,
)
from lightning_calibft.calibration.loaders import (
    calibration_loaders,
    flat_loaders,
    is_read_once,
    rebuilt_loader,
    unlabeled_loaders,
)
from lightning_calibft.calibration.unlabeled_reader import UnlabeledReader
from lightning_calibft.callback.lightning_package import LightningModule, Trainer, lightning_of
from lightning_calibft.callback.trainer_bar import bar_of
from lightning_calibft.estimators import Estimator, needs_absent_samples
from lightning_calibft.head.evaluation import evaluation
from lightning_calibft.labels.class_map import IGNORE_INDEX

Source = Literal["auto", "train", "validation", "training_steps"]


def is_model_parallel(trainer: Any) -> bool:
    """Return whether each process of the Trainer holds only a part of the model."""
    return isinstance(trainer.strategy, lightning_of(trainer).strategies.ModelParallelStrategy)


def calibration_dataloader(trainer: Trainer) -> Any:
    """Return the ``calibration_dataloader()`` of the datamodule or else the module, or ``None`` if there is none."""
    for owner in (getattr(trainer, "datamodule", None), trainer.lightning_module):
        if (method := getattr(owner, "calibration_dataloader", None)) is not None:
            return method()
    return None


def unlabeled_dataloader(trainer: Trainer) -> Callable[[], Any] | None:
    """Return the method ``unlabeled_dataloader`` of the datamodule or else the module, or ``None`` if there is none."""
    owners = getattr(trainer, "datamodule", None), trainer.lightning_module
    methods = (getattr(owner, "unlabeled_dataloader", None) for owner in owners)
    return next((method for method in methods if method is not None), None)


def check_unlabeled_batch(trainer: Trainer, model: LightningModule, loader: Any, reader: BatchReader) -> None:
    """Check, at the first training batch, that the first unlabeled batch can be read at the end.

    Raises:
        ValueError: If there is none, or the model does not run on it.
        ValueError, RuntimeError: If another process has failed. Its error says why.
    """
    errors, of_inputs = SharedErrors(), cast(BatchReader, UnlabeledReader(reader))
    with errors.shared(), evaluation(model), proofs_kept(model):
        check_runs_by_forward(model)
        batches = chain.from_iterable(unlabeled_loaders(loader, share=(0, 1)))
        batch = next(batches, None)
        if batch is None:
            raise ValueError("Expected `unlabeled` data to hold at least one batch, but got none. Check the loader.")
        batch = move_batch(trainer, batch)
        if is_model_parallel(trainer):  # all processes must run the same forwards
            batch = first_batch_of_any(batch, model.device, errors)
        logits_of_first_batch(model, batch, of_inputs.rows(batch), of_inputs, partial(quiet_forward, trainer))
    errors.agree()


def check_source(trainer: Trainer, source: Source, estimator: str | Estimator) -> None:
    """Check at the start of a fit that there will be data for the estimator at the end.

    Raises:
        ValueError: If there is no validation to take samples from, or no data with samples of absent classes.
    """
    if source == "validation" and not trainer.enable_validation:
        raise ValueError(
            "Expected argument `source` to be 'train' without validation, but got 'validation'. Give the Trainer"
            " validation data, or leave `source` out."
        )
    if source == "auto" and trainer.enable_validation:
        return
    if source in ("auto", "train") and needs_absent_samples(estimator) and calibration_dataloader(trainer) is None:
        raise ValueError(
            f"Expected argument `source` to be 'validation' for the estimator {estimator!r}, but got {source!r}: it"
            " needs labeled samples of absent classes. A `calibration_dataloader` that has them also works."
        )


def check_read_once(trainer: Any, source: Source, during_training: bool) -> None:
    """Check, before the first step, that the data for gamma can be read once more after training has read it.

    Args:
        trainer: The Trainer, with its loaders.
        source: As in :class:`~lightning_calibft.AbsentClassCalibration`.
        during_training: Whether the data is also read for gamma while it is used for training.

    Raises:
        ValueError: If it can be read only once, and training reads all of it or would miss what is read for gamma.
    """
    if source == "training_steps":
        return
    loaders = flat_loaders(trainer.train_dataloader if source == "train" else trainer.val_dataloaders)
    found = [(each, getattr(each, "dataset", None)) for each in loaders if is_read_once(each)]
    if not found or (source == "train" and calibration_dataloader(trainer) is not None):
        return
    loader, dataset = found[0]
    name = type(loader).__name__ + ("" if dataset is None else f" over a {type(dataset).__name__}")
    text = (
        f"data that can be read again for `source={source!r}`, but a {name} can be read only once, so nothing of it"
        " would be left when gamma is found. Pass `source='training_steps'` with `seen_classes`, or give the module or"
        " its datamodule a method `calibration_dataloader()`."
    )
    # An endless one can be read further, and a dataset that holds an iterator may begin anew each time.
    limit, timer = trainer.limit_train_batches, lightning_of(trainer).callbacks.Timer
    limited = trainer.max_steps != -1 or trainer.max_epochs == -1 or isinstance(limit, int) or limit < 1
    limited = limited or any(isinstance(each, timer) for each in trainer.callbacks)
    if not isinstance(dataset, IterableDataset) and (during_training or not limited):
        raise ValueError(f"Expected {text}")
    rank_zero_warn(f"AbsentClassCalibration expects {text} If it can be read further, ignore this.")


@contextmanager
def _validating(trainer: Any) -> Iterator[None]:
    """Let ``trainer.training`` be false, so that hooks, steps and forwards which then augment or mix do not."""
    stage = trainer.state.stage
    trainer.state.stage = type(stage)("validate")
    try:
        yield
    finally:
        trainer.state.stage = stage


def move_batch(trainer: Trainer, batch: Any) -> Any:
    """Move a batch to the device as a validation step does, with the precision and the user's transfer hooks."""
    with _validating(trainer):
        batch = trainer.precision_plugin.convert_input(batch)
        # Private in Lightning, which has no public way to run this hook of the datamodule or the module.
        batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=0)
        return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def sharded_reading(trainer: Any) -> ShardedReading | None:
    """Return which samples this process reads for a sharded model, or ``None`` if the model is not sharded."""
    if not is_model_parallel(trainer):
        return None
    shares = trainer.strategy.distributed_sampler_kwargs
    first = trainer.strategy.device_mesh["tensor_parallel"].get_local_rank() == 0
    return ShardedReading(shares["rank"], shares["num_replicas"], counts=first)


def _first_batch(trainer: Trainer, loader: Any) -> Any:
    """Return the first batch of a loader on the device, as the pass will read it.

    Raises:
        ValueError: If the loader is empty.
    """
    # Read all samples: the share of this process may be empty.
    for batch in chain.from_iterable(calibration_loaders(loader, share=(0, 1))):
        return move_batch(trainer, batch)
    raise empty_error()  # a `StopIteration` would end the training as if it were complete


def check_first_batch(
    trainer: Trainer, model: LightningModule, batch: Any, reader: BatchReader
) -> tuple[Any, list[Any]]:
    """Check at the first training batch that the pass at the end will be able to read its first batch.

    Args:
        trainer: The Trainer.
        model: The module, whose head is attached.
        batch: The first batch, which may combine the batches of a collection of loaders.
        reader: Splits batches.

    Returns:
        The labeled part of the batch, or the batch if training mixes its labels. ``None`` if there is a
        ``calibration_dataloader()``. Also the training loaders whose batches have no labels, as in semi-supervised
        learning. They are not read.

    Raises:
        TypeError: If a target does not hold class ids.
        ValueError: If the batch cannot be split, a label is not a row of the head, or the output of the head is not the
            logits. Also if the ``calibration_dataloader()`` is empty.
        ValueError, RuntimeError: If another process has failed. Its error says why.
    """
    errors, unlabeled = SharedErrors(), _called_unlabeled(trainer.train_dataloader)
    with errors.shared(), evaluation(model):
        clean = calibration_dataloader(trainer)
        if clean is not None:
            batches = {-1: _first_batch(trainer, clean)}
        else:
            batches = dict(enumerate(training_batches(batch, trainer.train_dataloader, unlabeled)))
        mixed = False
        try:
            labeled = _labeled(batches, reader, head_width(model)) if batches else {}
        except (TypeError, ValueError):
            labeled = {} if clean is not None else _unmixed(trainer, reader, head_width(model))
            if not (mixed := bool(labeled)):
                raise
        if clean is None and len(batches) > 1:
            loaders = _without(flat_loaders(trainer.train_dataloader), unlabeled)
            known = errors.gather(lambda: list(labeled))
            unlabeled += [loader for index, loader in enumerate(loaders) if all(index not in each for each in known)]
        part = next(iter(labeled.values()), None)
        if part is not None:
            first = part
            if is_model_parallel(trainer):  # all processes must run the same forwards, and these depend on the batch
                first = first_batch_of_any(first, model.device, errors)
            logits_of_first_batch(model, first, reader.rows(first), reader, partial(quiet_forward, trainer))
    errors.agree()
    return (None if clean is not None else batch if mixed else part), unlabeled


def _unmixed(trainer: Any, reader: BatchReader, num_classes: int) -> dict[int, Any]:
    """Return a batch as the pass will read it, if only the transfer hooks of training mix its labels."""
    loader = trainer.train_dataloader
    if type(loader) is not DataLoader or isinstance(loader.dataset, IterableDataset) or loader.batch_size is None:
        return {}
    with suppress(Exception):  # the user's code can raise anything, and what is told is what training has met
        aside = rebuilt_loader(loader, loader.dataset, batch_size=loader.batch_size, generator=torch.Generator())
        return _labeled({0: move_batch(trainer, next(iter(aside)))}, reader, num_classes)
    return {}


def _called_unlabeled(loaders: Any) -> list[Any]:
    """Return the loaders of a dictionary whose names say that they have no labels. Their datasets may have some."""
    if not isinstance(loaders, Mapping):
        return []
    named = [loader for name, loader in loaders.items() if "unlabel" in str(name).lower()]
    return flat_loaders(named) if len(named) < len(loaders) else []


def _without(loaders: list[Any], others: Sequence[Any]) -> list[Any]:
    return [loader for loader in loaders if all(loader is not other for other in others)]


def _labeled(batches: Mapping[int, Any], reader: BatchReader, num_classes: int) -> dict[int, Any]:
    """Return the batches that have labels, of those of several loaders.

    Raises:
        TypeError: If none has a target, and that of the first one does not hold class ids.
        ValueError: If none has a target, or if a label is not a row of the head.
    """
    labeled, failure = dict[int, Any](), None
    for index, batch in batches.items():
        try:
            reader.find_target(batch, num_classes)
            rows = reader.rows(batch)
        except (TypeError, ValueError) as error:
            failure = failure or error
            continue
        if len(batches) == 1 or not ((rows == -1) | (rows == IGNORE_INDEX)).all():
            check_rows(rows, num_classes)
            labeled[index] = batch
    if not labeled and failure is not None:
        raise failure
    return labeled


@contextmanager
def quiet_forward(trainer: Any) -> Iterator[None]:
    """Run a forward as in validation, with the precision of the Trainer and without its loggers, which it may call."""
    loggers, should_stop = trainer.loggers, trainer.should_stop
    trainer.loggers = [lightning_of(trainer).loggers.logger.DummyLogger() for _ in loggers]
    try:
        with _validating(trainer), trainer.precision_plugin.forward_context():
            yield
    finally:
        trainer.loggers, trainer.should_stop = loggers, should_stop


def calibration_pass(
    trainer: Trainer,
    model: LightningModule,
    source: Source,
    estimator: str | Estimator,
    estimator_kwargs: Mapping[str, Any] | None,
    reader: BatchReader,
    max_samples: int | None,
    tolerance: float | None,
    pretrained: Mapping[str, Tensor] | None,
    unlabeled: Sequence[Any],
    of_traffic: Any,
    errors: SharedErrors,
) -> EvaluationPass | None:
    """Prepare a pass over the data that gamma is found on. ``None``, with a warning, if there is no data.

    The training loaders in ``unlabeled`` are left out. The share of absent samples is estimated from the samples
    ``of_traffic``, unless it is ``None``.
    """
    clean = None if source == "validation" else calibration_dataloader(trainer)
    if source == "validation":
        loaders, max_batches = trainer.val_dataloaders, max_validation_batches(trainer)
    else:
        loaders = trainer.train_dataloader if clean is None else clean
        max_batches = _max_batches(trainer, of_training=clean is None)
    if unlabeled and clean is None and source != "validation":
        loaders = _without(flat_loaders(loaders), unlabeled)
    if loaders is None:
        data = "validation" if source == "validation" else "training"
        rank_zero_warn(f"AbsentClassCalibration found no {data} data: the model is not calibrated.")
        return None
    sharded = sharded_reading(trainer)
    return EvaluationPass(
        model,
        calibration_loaders(
            loaders,
            max_samples,
            max_batches,
            at_random=tolerance is not None,
            share=sharded and sharded[:2],
            errors=errors,
        ),
        estimator,
        estimator_kwargs,
        reader,
        max_samples=max_samples,
        max_batches=max_batches,
        tolerance=tolerance,
        validation=source == "validation",
        bar=bar_of(trainer),
        pretrained=pretrained,
        transfer=partial(move_batch, trainer),
        context=partial(quiet_forward, trainer),
        sharded=sharded,
        unlabeled=None
        if of_traffic is None
        else unlabeled_loaders(of_traffic, max_samples, share=sharded and sharded[:2], errors=errors),
    )


def _max_batches(trainer: Trainer, of_training: bool) -> int | None:
    """Return how many batches of each loader to read, or ``None`` for all of them."""
    if math.isinf(trainer.num_training_batches):
        # A stream may be endless, so read as many batches as training has read.
        return (trainer.fit_loop.total_batch_idx + 1 or None) if of_training else None
    limit = trainer.limit_train_batches
    return int(trainer.num_training_batches) if isinstance(limit, int) or limit < 1 else None


def max_validation_batches(trainer: Trainer) -> int | None:
    """Return how many batches of each validation loader are read, or ``None`` for all of them."""
    limit = trainer.limit_val_batches
    if not (isinstance(limit, int) or limit < 1):
        return None
    numbers = [number for number in trainer.num_val_batches if math.isfinite(number)]
    return int(max(numbers, default=0)) or None


def training_batches(batch: Any, loaders: Any, unlabeled: Sequence[Any] = ()) -> list[Any]:
    """Return the batches in a training batch: with a list or dict of loaders, one from each that is not exhausted.

    Batches of the loaders in ``unlabeled`` are left out.
    """
    if isinstance(loaders, Mapping) and isinstance(batch, Mapping) and loaders.keys() == batch.keys():
        pairs = [(batch[key], loaders[key]) for key in loaders]
    elif (
        isinstance(loaders, (list, tuple))
        and isinstance(batch, (list, tuple))
        and len(loaders) == len(batch)
        and not any(isinstance(part, Tensor) for part in batch)
    ):
        pairs = list(zip(batch, loaders, strict=True))
    else:
        return [] if batch is None or any(loaders is other for other in unlabeled) else [batch]
    return [leaf for part, loader in pairs for leaf in training_batches(part, loader, unlabeled)]
