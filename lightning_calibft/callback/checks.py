"""What the callback asks of a Trainer, before any training time is spent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy

from lightning_calibft.entries import is_folded


def check_class_lists(seen_classes: list[int] | None, absent_classes: list[int] | None) -> None:
    """Refuse absent classes alone: which are seen is then not what training meets.

    Raises:
        ValueError: If ``seen_classes`` are missing beside ``absent_classes``.
    """
    if absent_classes is not None and seen_classes is None:
        raise ValueError(
            "Expected argument `seen_classes` beside `absent_classes`, but got None. Give both, or neither."
        )


def check_trainer(trainer: Any, model: LightningModule) -> None:
    """Refuse what would end in a wrong gamma or in none.

    Raises:
        TypeError: If the Trainer or the module come from the package ``pytorch_lightning``.
        RuntimeError: If the strategy shards the weights.
    """
    for name, value, expected in (("trainer", trainer, Trainer), ("module", model, LightningModule)):
        if not isinstance(value, expected):
            kind = type(value)
            raise TypeError(
                f"Expected a {name} of the package `lightning`, but got {kind.__module__}.{kind.__name__}."
                " Import from `lightning.pytorch`: its classes and those of `pytorch_lightning` do not mix."
            )
    if isinstance(trainer.strategy, (DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy)):
        raise RuntimeError(
            f"AbsentClassCalibration does not support {type(trainer.strategy).__name__}, which shards the weights and"
            " their checkpoints. Train without the callback, then call `lightning_calibft.calibrate(model, loader)` on"
            " the consolidated model; or use the strategy 'ddp'."
        )


def check_not_folded(checkpoint: Mapping[str, Any]) -> None:
    """Refuse to resume from a checkpoint that is for inference.

    Raises:
        ValueError: If gamma is folded into the bias in it.
    """
    if is_folded(checkpoint):
        raise ValueError(
            "Expected a checkpoint to resume from, but gamma is folded into the bias of this one: training it further"
            " would undo gamma, and calibrating it again would add it twice. Resume from the checkpoint that it was"
            " made of."
        )


def order_callbacks(trainer: Any, callback: Callback) -> None:
    """Let all others finish before ``callback`` (averaged weights must be in place) and checkpoints be saved after it.

    The list is replaced, not changed: the Trainer is iterating over it.
    """
    others = [other for other in trainer.callbacks if other is not callback]
    checkpoints = [other for other in others if isinstance(other, Checkpoint)]
    trainer.callbacks = [other for other in others if other not in checkpoints] + [callback, *checkpoints]
