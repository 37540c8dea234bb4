"""Getting on with Lightning's weight averaging callbacks, which keep a second copy of the module."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging

from lightning_calibft.head import attached_heads


def check_averaging_order(trainer: Any, model: LightningModule, callback: Callback) -> None:
    """Refuse an averaged copy of a module that has no calibration yet: their buffers would not match.

    Raises:
        RuntimeError: If a ``WeightAveraging`` callback stands before ``callback``.
    """
    before = trainer.callbacks[: trainer.callbacks.index(callback)]
    averaging = _averaging(before)
    if averaging and not attached_heads(model):
        raise RuntimeError(
            f"Expected AbsentClassCalibration to stand before {type(averaging[0]).__name__} in the Trainer's"
            " `callbacks`: the averaged copy of the model is made in their order and would lack gamma. Make a Trainer"
            " with AbsentClassCalibration first."
        )


def check_averaged_copies(trainer: Any, model: LightningModule) -> None:
    """Refuse a model of which a part, such as the head, was built after a weight averaging callback copied it.

    Raises:
        RuntimeError: If a copy lacks weights or the calibration.
    """
    for other in _averaging(trainer.callbacks):
        state = model.state_dict()
        checkpoint = {"state_dict": state}
        other.on_save_checkpoint(trainer, model, checkpoint)  # puts the state of its copy there
        if missing := [key for key in state if key not in checkpoint["state_dict"]]:
            raise RuntimeError(
                f"Expected the whole model to exist when {type(other).__name__} copies it, but {', '.join(missing)}"
                " came later. Build the classification head in the module's `__init__`."
            )


def check_no_averaging(trainer: Any, expected: str, got: str) -> None:
    """Refuse averaged weights where gamma is found while they are not in the model.

    Args:
        trainer: The trainer.
        expected: The argument, and what it may be.
        got: What it is.

    Raises:
        RuntimeError: If a callback averages the weights.
    """
    for callback in trainer.callbacks:
        if isinstance(callback, (WeightAveraging, StochasticWeightAveraging)):
            raise RuntimeError(
                f"Expected argument {expected} beside {type(callback).__name__}, but got {got}: the averaged weights"
                " are not in the model when gamma is found."
            )


def averaged_copies(trainer: Any, model: LightningModule) -> Iterator[None]:
    """Put each averaged copy, with its buffers, in the place of ``model`` for one turn of the loop.

    The copy is what ``WeightAveraging`` validates and saves, so it needs the calibration too.
    """
    for other in _averaging(trainer.callbacks):
        other.on_validation_epoch_start(trainer, model)
        yield
        other.on_validation_epoch_end(trainer, model)


def _averaging(callbacks: Iterable[Callback]) -> list[WeightAveraging]:
    return [callback for callback in callbacks if isinstance(callback, WeightAveraging)]
