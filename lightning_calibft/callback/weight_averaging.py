"""Working beside Lightning's weight averaging callbacks, which keep a second copy of the module."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from lightning.pytorch import Callback, LightningModule

from lightning_calibft.callback.lightning_package import lightning_of
from lightning_calibft.head.offset import attached_heads


def check_averaging_order(trainer: Any, model: LightningModule, callback: Callback) -> None:
    """Refuse an averaged copy of a module that has no calibration yet: their buffers would not match.

    Raises:
        RuntimeError: If a ``WeightAveraging`` callback stands before ``callback``.
    """
    before = trainer.callbacks[: trainer.callbacks.index(callback)]
    averaging = _averaging_callbacks(trainer, before)
    if averaging and not attached_heads(model):
        raise RuntimeError(
            f"{type(averaging[0]).__name__} stands before AbsentClassCalibration in the Trainer's `callbacks`: the copy"
            " that it makes of the model would lack gamma. Put AbsentClassCalibration first."
        )


def check_averaged_copies(trainer: Any, model: LightningModule) -> None:
    """Refuse a model of which a part, such as the head, was built after a weight averaging callback copied it.

    Raises:
        RuntimeError: If a copy lacks weights or the calibration.
    """
    for other in _averaging_callbacks(trainer, trainer.callbacks):
        state = model.state_dict()
        checkpoint = {"state_dict": state}
        other.on_save_checkpoint(trainer, model, checkpoint)  # puts the state of its copy there
        if missing := [key for key in state if key not in checkpoint["state_dict"]]:
            raise RuntimeError(
                f"{type(other).__name__} copied the model before {', '.join(missing)} existed. Build the"
                " classification head in the module's `__init__`."
            )


def check_no_averaging(trainer: Any, argument: str) -> None:
    """Refuse averaged weights where gamma is found while they are not in the model.

    Args:
        trainer: The Trainer.
        argument: The argument that asks for it, with its value.

    Raises:
        RuntimeError: If a callback averages the weights.
    """
    callbacks = lightning_of(trainer).callbacks
    for callback in trainer.callbacks:
        if isinstance(callback, (callbacks.WeightAveraging, callbacks.StochasticWeightAveraging)):
            raise RuntimeError(
                f"{argument} is not supported beside {type(callback).__name__}: the averaged weights are not in the"
                " model when gamma is found. Leave the argument out."
            )


def averaged_copies(trainer: Any, model: LightningModule) -> Iterator[None]:
    """Put each averaged copy, with its buffers, in the place of ``model`` for one turn of the loop.

    The copy is what ``WeightAveraging`` validates and saves, so it needs the calibration too.
    """
    for other in _averaging_callbacks(trainer, trainer.callbacks):
        other.on_validation_epoch_start(trainer, model)
        yield
        other.on_validation_epoch_end(trainer, model)


def _averaging_callbacks(trainer: Any, callbacks: Iterable[Callback]) -> list[Any]:
    kind = lightning_of(trainer).callbacks.WeightAveraging
    return [callback for callback in callbacks if isinstance(callback, kind)]
