"""Load calibrated Lightning checkpoints."""

from __future__ import annotations

import io
import os
import sys
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

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
from lightning_calibft.head.attach import attach_at, detach
from lightning_calibft.head.copies import split_copies
from lightning_calibft.head.layers import layer_width
from lightning_calibft.head.offset import offset_of
from lightning_calibft.split import ClassSplit

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule

Module = TypeVar("Module", bound="LightningModule")


def load_calibrated(module_class: type[Module], path: StrPath, *, weights_only: bool = True, **kwargs: Any) -> Module:
    """Load a calibrated Lightning checkpoint into a module class that does not know about the calibration.

    ``MyModule.load_from_checkpoint(path)`` alone fails because of the calibration's two keys, and with
    ``strict=False`` it drops gamma. This function loads the other keys strictly and sets gamma at the modules where the
    file has it.

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
        ValueError: If the file is not a checkpoint, needs ``weights_only=False``, or is not calibrated, or if
            ``module_class`` has no such module as the file is calibrated at.

    Example::

        model = load_calibrated(MyModule, "checkpoints/best.ckpt")
    """
    # Compare by name: each package of Lightning has its own LightningModule class.
    bases = module_class.__mro__ if isinstance(module_class, type) else ()
    packages = {base.__module__.split(".")[0] for base in bases if base.__name__ == "LightningModule"}
    if not (known := packages & {"lightning", "pytorch_lightning"}):
        raise TypeError(f"Expected argument `module_class` to be a LightningModule class, but got {module_class!r}.")
    check_is_whole(path)
    checkpoint = read_checkpoint(path, weights_only=weights_only)
    # Lightning loads `state_dict`, whatever other weights a callback has put beside it.
    checkpoint = choose_weights(checkpoint, path, False if is_state_dict(checkpoint.get("state_dict")) else None)
    heads, metadata = calibrated_heads(checkpoint, path), calibration_metadata(checkpoint, path)
    stripped = io.BytesIO()
    state = without_calibration(state_dict_of(checkpoint, path))
    # Lightning refuses to load a file without its version, such as one with only weights.
    torch.save({LIGHTNING_VERSION: sys.modules[known.pop()].__version__, **checkpoint, "state_dict": state}, stripped)
    stripped.seek(0)
    module: Module = module_class.load_from_checkpoint(stripped, weights_only=weights_only, **kwargs)
    modules = {prefix: _module_at(module, prefix.rstrip("."), path) for prefix in heads}
    widths = {len(mask) for _, mask in heads.values()} | set(filter(None, map(layer_width, modules.values())))
    if len(widths) > 1:
        raise ValueError(
            f"Expected the heads and the masks in {os.fspath(path)!r} to have one number of classes, but got"
            f" {sorted(widths)}. Pass the class that was trained, with its number of classes."
        )
    detach(module)  # one that the class attaches may be at another module
    attach_at(module, *split_copies(module, tuple(dict.fromkeys(modules.values()))), widths.pop())
    for prefix, (gamma, mask) in heads.items():
        offset_of(modules[prefix]).set(gamma, ClassSplit(len(mask), *classes_of(metadata, mask)), metadata)
    return module.eval()


def _module_at(model: LightningModule, name: str, path: StrPath) -> nn.Module:
    """Return the module that a file names, also if the model has other wrappers of compilers and parallel training."""
    named: dict[str, nn.Module] = dict(model.named_modules(remove_duplicate=False))
    if name in named:
        return named[name]
    found: list[nn.Module] = [
        module for other, module in named.items() if _without_wrappers(other) == _without_wrappers(name)
    ]
    if not found:
        raise ValueError(
            f"Expected argument `module_class` to have the module {name!r}, at which {os.fspath(path)!r} is calibrated,"
            f" but {type(model).__name__} has none. Pass the class that was trained."
        )
    return found[-1]  # the innermost


def _without_wrappers(name: str) -> list[str]:
    return [part for part in name.split(".") if part not in ("_orig_mod", "module")]
