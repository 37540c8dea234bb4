"""Load calibrated Lightning checkpoints."""

from __future__ import annotations

import io
from typing import Any, TypeVar

import lightning
import torch
from lightning.pytorch import LightningModule

from lightning_calibft._format import StrPath
from lightning_calibft.checkpoint.files import check_is_whole, read_checkpoint
from lightning_calibft.checkpoint.state import (
    LIGHTNING_VERSION,
    calibrated_heads,
    calibration_metadata,
    choose_weights,
    classes_of,
    is_state_dict,
    state_dict_of,
    without_calibration,
)
from lightning_calibft.head.attach import set_gamma

Module = TypeVar("Module", bound=LightningModule)


def load_calibrated(module_class: type[Module], path: StrPath, *, weights_only: bool = True, **kwargs: Any) -> Module:
    """Load a calibrated Lightning checkpoint into a module class that does not know about the calibration.

    ``MyModule.load_from_checkpoint(path)`` alone fails because of the calibration's two keys, and with
    ``strict=False`` it drops gamma. This function loads the other keys strictly and sets gamma at the head.

    Args:
        module_class: The ``LightningModule`` class that was trained.
        path: A checkpoint that :class:`~lightning_calibft.AbsentClassCalibration` has calibrated.
        weights_only: Refuse files that hold more than tensors and plain Python values. ``False`` unpickles any object,
            which can run code. Use it only for files that you trust.
        kwargs: Arguments of ``module_class.load_from_checkpoint``, such as ``map_location`` and hyperparameters.

    Returns:
        The module in eval mode, calibrated.

    Raises:
        FileNotFoundError: If ``path`` does not exist.
        TypeError: If ``module_class`` is not a LightningModule class, or ``path`` is not a path.
        ValueError: If the file is not a checkpoint, needs ``weights_only=False``, or is not calibrated.

    Example::

        model = load_calibrated(MyModule, "checkpoints/best.ckpt")
    """
    if not (isinstance(module_class, type) and issubclass(module_class, LightningModule)):
        raise TypeError(f"Expected argument `module_class` to be a LightningModule class, but got {module_class!r}.")
    check_is_whole(path)
    checkpoint = read_checkpoint(path, weights_only=weights_only)
    # Lightning loads `state_dict`, whatever other weights a callback has put beside it.
    checkpoint = choose_weights(checkpoint, path, False if is_state_dict(checkpoint.get("state_dict")) else None)
    heads, metadata = calibrated_heads(checkpoint, path), calibration_metadata(checkpoint, path)
    stripped = io.BytesIO()
    state = without_calibration(state_dict_of(checkpoint, path))
    # Lightning refuses to load a file without its version, such as one with only weights.
    torch.save({LIGHTNING_VERSION: lightning.__version__, **checkpoint, "state_dict": state}, stripped)
    stripped.seek(0)
    module = module_class.load_from_checkpoint(stripped, weights_only=weights_only, **kwargs)
    for prefix, (gamma, mask) in heads.items():
        seen, absent = classes_of(metadata, mask)
        set_gamma(module.get_submodule(prefix.rstrip(".")), gamma, seen, absent)
    return module.eval()
