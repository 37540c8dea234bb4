"""Work with Lightning's weight averaging callbacks, which keep a second copy of the module."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from lightning_calibft.callback.lightning_package import Callback, LightningModule, lightning_of
from lightning_calibft.head.offset import attached_heads


def check_averaging_order(trainer: Any, model: LightningModule, callback: Callback) -> None:
    """Refuse a callback that copies the module before it has a calibration, since the copy would not have its buffers.

    Raises:
        RuntimeError: If a ``WeightAveraging`` callback comes before ``callback`` and the module is not attached.
    """
    before = trainer.callbacks[: trainer.callbacks.index(callback)]
    averaging = _averaging_callbacks(trainer, before)
    if averaging and not attached_heads(model):
        raise RuntimeError(
            f"{type(averaging[0]).__name__} comes before AbsentClassCalibration in the Trainer's `callbacks`, so its"
            " copy of the model would have no gamma. Put AbsentClassCalibration first."
        )


def check_averaged_copies(trainer: Any, model: LightningModule) -> None:
    """Refuse a model if a part of it, such as the head, was built after a weight averaging callback copied the model.

    Raises:
        RuntimeError: If a copy does not have all weights and the calibration.
    """
    for other in _averaging_callbacks(trainer, trainer.callbacks):
        state = model.state_dict()
        checkpoint = {"state_dict": state}
        other.on_save_checkpoint(trainer, model, checkpoint)  # stores the state of its copy
        if missing := [key for key in state if key not in checkpoint["state_dict"]]:
            raise RuntimeError(
                f"{type(other).__name__} copied the model before {', '.join(missing)} existed. Build the"
                " classification head in the module's `__init__`."
            )


def check_no_averaging(trainer: Any, argument: str) -> None:
    """Refuse weight averaging if gamma is found while the averaged weights are not in the model.

    Args:
        trainer: The Trainer.
        argument: The argument that causes this, with its value, for the error.

    Raises:
        RuntimeError: If a callback averages the weights.
    """
    kind = lightning_of(trainer).callbacks.StochasticWeightAveraging
    averaging = _averaging_callbacks(trainer, trainer.callbacks)
    if found := averaging + [each for each in trainer.callbacks if isinstance(each, kind)]:
        raise RuntimeError(
            f"{argument} is not supported with {type(found[0]).__name__}: the averaged weights are not in the"
            " model when gamma is found. Leave the argument out."
        )


def averaged_copies(trainer: Any, model: LightningModule) -> Iterator[None]:
    """For each averaged copy, swap its weights and buffers into ``model`` for one iteration of the loop.

    ``WeightAveraging`` validates and saves this copy, so it needs the calibration, too.
    """
    for other in _averaging_callbacks(trainer, trainer.callbacks):
        other.on_validation_epoch_start(trainer, model)
        yield
        other.on_validation_epoch_end(trainer, model)


def _averaging_callbacks(trainer: Any, callbacks: Iterable[Callback]) -> list[Any]:
    kind = getattr(lightning_of(trainer).callbacks, "WeightAveraging", ())  # Lightning has it since 2.6
    return [callback for callback in callbacks if isinstance(callback, kind)]
