"""Load calibrated checkpoints of Lightning, and calibrated folders of transformers and PEFT."""

from __future__ import annotations

import io
import os
import sys
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, overload

import torch
from torch import nn

from lightning_calibft._format import StrPath
from lightning_calibft.checkpoint.files import check_is_whole, read_checkpoint
from lightning_calibft.checkpoint.pretrained_folder import load_pretrained, read_folder
from lightning_calibft.checkpoint.state import (
    LIGHTNING_VERSION,
    calibrated_heads,
    calibration_metadata,
    choose_weights,
    classes_of,
    heads_of,
    is_state_dict,
    state_dict_of,
    without_calibration,
)
from lightning_calibft.head.attach import attach, attach_at, detach, set_attached_gamma
from lightning_calibft.head.copies import split_copies
from lightning_calibft.head.layers import layer_width
from lightning_calibft.head.offset import offset_of
from lightning_calibft.split import ClassSplit

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule

Module = TypeVar("Module", bound="LightningModule")


class Pretrained(Protocol):
    """A class with ``from_pretrained``, such as the models and the ``AutoModel...`` classes of transformers."""

    @classmethod
    def from_pretrained(cls, path: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Return the model in a folder."""


@overload
def load_calibrated(
    module_class: type[Module], path: StrPath, *, weights_only: bool = True, **kwargs: Any
) -> Module: ...


@overload
def load_calibrated(
    module_class: type[Pretrained], path: StrPath, *, weights_only: bool = True, **kwargs: Any
) -> Any: ...


def load_calibrated(module_class: Any, path: StrPath, *, weights_only: bool = True, **kwargs: Any) -> Any:
    """Load a calibrated checkpoint into a class that does not know about the calibration.

    ``MyModule.load_from_checkpoint(path)`` alone fails because of the calibration's two keys, and with
    ``strict=False`` it drops gamma, as ``from_pretrained`` of transformers does. This function loads the other keys
    strictly and sets gamma at the modules where the file has it.

    Args:
        module_class: The ``LightningModule`` class that was trained. For a folder of transformers or PEFT: a class with
            ``from_pretrained``, such as ``AutoModelForImageClassification``.
        path: A checkpoint that :class:`~lightning_calibft.AbsentClassCalibration` has calibrated, or a folder of
            :class:`~lightning_calibft.integrations.AbsentClassCalibrationCallback`.
        weights_only: Refuse files that hold more than tensors and plain Python values. ``False`` unpickles any object,
            which can run code. Use it only for files that you trust.
        kwargs: Arguments of ``module_class.load_from_checkpoint``, such as ``map_location`` and hyperparameters, or of
            ``module_class.from_pretrained``.

    Returns:
        The module in eval mode, calibrated.

    Raises:
        FileNotFoundError: If ``path`` does not exist.
        TypeError: If ``module_class`` is neither a LightningModule class nor one with ``from_pretrained``, or ``path``
            is not a path.
        ValueError: If the file is not a checkpoint, needs ``weights_only=False``, or is not calibrated, or if
            ``module_class`` has no such module as the file is calibrated at.

    Example::

        model = load_calibrated(MyModule, "checkpoints/best.ckpt")
        model = load_calibrated(AutoModelForImageClassification, "outputs/checkpoint-500")
    """
    # Compare by name: each package of Lightning has its own LightningModule class.
    bases = module_class.__mro__ if isinstance(module_class, type) else ()
    packages = {base.__module__.split(".")[0] for base in bases if base.__name__ == "LightningModule"}
    if not (known := packages & {"lightning", "pytorch_lightning"}):
        if not isinstance(module_class, type) or not hasattr(module_class, "from_pretrained"):
            raise TypeError(
                f"Expected argument `module_class` to be a LightningModule class, or one with `from_pretrained` for a"
                f" folder of transformers, but got {module_class!r}."
            )
        return _load_folder(module_class, path, **kwargs)
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
    module = module_class.load_from_checkpoint(stripped, weights_only=weights_only, **kwargs)
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


def _load_folder(model_class: Any, folder: StrPath, **kwargs: Any) -> Any:
    state, metadata = read_folder(folder)
    heads = heads_of(state, folder)
    if not heads:
        raise ValueError(
            f"Expected a calibrated folder, but {os.fspath(folder)!r} holds no gamma that is not folded into the bias."
            " Load a folded folder with `from_pretrained`, and calibrate any other with `calibrate(model, loader)`."
        )
    gamma, mask = next(iter(heads.values()))
    model = load_pretrained(model_class, folder, **kwargs)
    named = dict(model.named_modules())
    modules = [named[prefix.rstrip(".")] for prefix in heads if prefix.rstrip(".") in named]
    if len(modules) == len(heads) and not model_class.__module__.startswith("peft."):
        attach_at(model, *split_copies(model, tuple(dict.fromkeys(modules))), len(mask))
    else:  # in the file, the head has another name
        attach(model)
    return set_attached_gamma(model, gamma, ClassSplit(len(mask), *classes_of(metadata, mask)), metadata).eval()


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
