"""The data of a Trainer, as the calibration pass reads it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from itertools import chain
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from lightning_calibft.calibration import BatchReader, Pass, calibration_loaders, check_head, empty_error
from lightning_calibft.class_map import check_mapped
from lightning_calibft.estimators import Estimator
from lightning_calibft.head import eval_mode


def calibration_dataloader(trainer: Trainer) -> Any:
    """Return the user's ``calibration_dataloader()``, of the datamodule or the module, or ``None``."""
    for owner in (getattr(trainer, "datamodule", None), trainer.lightning_module):
        if (method := getattr(owner, "calibration_dataloader", None)) is not None:
            return method()
    return None


def move_batch(trainer: Trainer, batch: Any) -> Any:
    """Move a batch to the device as a validation step does, with the precision and the user's transfer hooks."""
    stage = trainer.state.stage
    trainer.state.stage = RunningStage.VALIDATING  # hooks that augment or mix do so if `trainer.training`
    try:
        batch = trainer.precision_plugin.convert_input(batch)
        # Private in Lightning, which has no other way to run this hook of the datamodule or else the module.
        batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=0)
        return trainer.strategy.batch_to_device(batch, dataloader_idx=0)
    finally:
        trainer.state.stage = stage


def _first_calibration_batch(trainer: Trainer) -> Any:
    """Return the first batch of the user's ``calibration_dataloader()`` on the device, or ``None``.

    Raises:
        ValueError: If it is empty.
    """
    loader = calibration_dataloader(trainer)
    if loader is None:
        return None
    for batch in chain.from_iterable(calibration_loaders(loader)):
        return move_batch(trainer, batch)
    raise empty_error()  # not a `StopIteration`, with which training would end as if it were done


def check_first_batch(trainer: Trainer, model: LightningModule, batch: Any, reader: BatchReader) -> None:
    """Meet at the first training batch what would be wrong with the first batch of the pass at the end.

    Raises:
        TypeError: If its target does not hold class ids.
        ValueError: If it cannot be split, a target is not mapped, or the head does not give the logits.
    """
    with isolate_rng(), eval_mode(model), trainer.precision_plugin.forward_context():
        clean = _first_calibration_batch(trainer)
        batch = batch if clean is None else clean
        rows = reader.rows(batch)
        if reader.maps:
            check_mapped(rows)
        check_head(model, batch, reader)


def calibration_pass(
    trainer: Trainer,
    model: LightningModule,
    estimator: str | Estimator,
    reader: BatchReader,
    max_samples: int | None,
    pretrained: Mapping[str, Tensor] | None,
) -> Pass | None:
    """Prepare the pass over the calibration data or else the training data; ``None``, with a warning, for neither."""
    clean = calibration_dataloader(trainer)
    loaders = trainer.train_dataloader if clean is None else clean
    if loaders is None:
        rank_zero_warn("AbsentClassCalibration found no training data: the model is not calibrated.")
        return None
    max_batches = _max_batches(trainer, of_training=clean is None)
    progress_bar = trainer.progress_bar_callback
    return Pass(
        model,
        calibration_loaders(loaders, max_samples, max_batches),
        estimator,
        reader,
        max_samples=max_samples,
        max_batches=max_batches,
        progress=progress_bar is not None and getattr(progress_bar, "is_enabled", True),  # not all bars have it
        pretrained=pretrained,
        transfer=partial(move_batch, trainer),
        context=trainer.precision_plugin.forward_context,
    )


def _max_batches(trainer: Trainer, of_training: bool) -> int | None:
    """Return how many batches of each loader to read, or ``None`` for all of them."""
    if math.isinf(trainer.num_training_batches):
        # A stream may have no end: as many as training has read.
        return (trainer.fit_loop.total_batch_idx + 1 or None) if of_training else None
    limit = trainer.limit_train_batches
    return int(trainer.num_training_batches) if isinstance(limit, int) or limit < 1 else None
