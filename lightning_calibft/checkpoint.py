"""Checkpoint files: write gamma into them, load them, fold gamma into the bias, say what they hold."""

from __future__ import annotations

import copy
import io
import os
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any, TypeVar

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_calibft.calibration import CalibrationResult
from lightning_calibft.files import StrPath, read_checkpoint, write_atomically
from lightning_calibft.head import CHILD_NAME, set_gamma

METADATA_KEY = "lightning_calibft"
_OFFSET, _MASK = f"{CHILD_NAME}.offset", f"{CHILD_NAME}.mask"

Module = TypeVar("Module", bound=LightningModule)


def load_calibrated(module_class: type[Module], path: StrPath, *, weights_only: bool = True, **kwargs: Any) -> Module:
    """Load a calibrated Lightning checkpoint into a module class that knows nothing of the calibration.

    ``MyModule.load_from_checkpoint(path)`` alone stops at the calibration's two keys (and drops gamma with
    ``strict=False``); this loads the rest strictly and puts gamma into the head.

    Args:
        module_class: The ``LightningModule`` class that was trained.
        path: A checkpoint that :class:`~lightning_calibft.AbsentClassCalibration` has calibrated.
        weights_only: Refuse files that hold more than tensors and plain Python values. ``False`` unpickles anything,
            which can run code: only for files that you trust.
        kwargs: Arguments of ``module_class.load_from_checkpoint``, such as ``map_location`` and hyperparameters.

    Returns:
        The module in eval mode, calibrated.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is no checkpoint, needs ``weights_only=False``, or is not calibrated.

    Example::

        model = load_calibrated(MyModule, "checkpoints/best.ckpt")
    """
    checkpoint = read_checkpoint(path, weights_only=weights_only)
    state = state_dict_of(checkpoint, path)
    calibration = {key: state.pop(key) for key in list(state) if key.endswith((_OFFSET, _MASK))}
    heads = _calibrated_heads(calibration, checkpoint, path)
    stripped = io.BytesIO()
    torch.save({**checkpoint, "state_dict": state}, stripped)
    stripped.seek(0)
    module = module_class.load_from_checkpoint(stripped, weights_only=weights_only, **kwargs)
    for prefix, (gamma, mask) in heads.items():
        seen, absent = _classes(checkpoint, mask)
        set_gamma(module.get_submodule(prefix.rstrip(".")), gamma, seen, absent)
    return module.eval()


def fold_checkpoint(source: StrPath, destination: StrPath, *, weights_only: bool = True) -> None:
    """Add gamma to the bias of the head and write a checkpoint that loads anywhere, without this package.

    The folded file has the keys of the uncalibrated one. It is for inference: training it further would teach the
    model to undo gamma.

    Args:
        source: A calibrated checkpoint, of Lightning or a plain state dict.
        destination: The file to write; it appears whole or not at all.
        weights_only: As in :func:`load_calibrated`.

    Raises:
        FileNotFoundError: If there is no file ``source``.
        ValueError: If ``source`` is no calibrated checkpoint or folded already, if its head has no bias, or if
            ``destination`` is the same file.

    Example::

        fold_checkpoint("checkpoints/best.ckpt", "model.ckpt")
    """
    if os.path.realpath(source) == os.path.realpath(destination):
        raise ValueError(
            f"Expected argument `destination` to differ from `source`, but both are {os.fspath(source)!r}. Folding"
            " cannot be undone: keep the calibrated file."
        )
    checkpoint = read_checkpoint(source, weights_only=weights_only)
    state = state_dict_of(checkpoint, source)
    for prefix, (gamma, mask) in _calibrated_heads(state, checkpoint, source).items():
        bias = state.get(f"{prefix}bias")
        if bias is None:
            raise ValueError(
                f"Expected the head {prefix.rstrip('.')!r} in {os.fspath(source)!r} to have a bias that takes up gamma,"
                " but it has none. Load the model with `load_calibrated`, and use `fold(model, add_bias=True)`."
            )
        state[f"{prefix}bias"] = (bias.float() + gamma * mask).to(bias.dtype)
    folded = _without_calibration({**checkpoint, "state_dict": state} if "state_dict" in checkpoint else state)
    if "state_dict" in folded:
        folded[METADATA_KEY] = {**checkpoint.get(METADATA_KEY, {}), "folded": True}
    write_atomically(folded, destination)


def inspect_checkpoint(path: StrPath, *, weights_only: bool = True) -> dict[str, Any]:
    """Tell whether a checkpoint is calibrated, and how.

    Args:
        path: A checkpoint of Lightning or a plain state dict.
        weights_only: As in :func:`load_calibrated`.

    Returns:
        Plain Python values: ``calibrated`` and ``folded`` (bools), ``heads`` (dotted names), ``gamma`` and, as far as
        the file tells, ``standard_error``, ``num_samples``, ``estimator``, ``num_classes``, ``seen_classes``,
        ``absent_classes`` and ``version`` (of this package).

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is no checkpoint or needs ``weights_only=False``.

    Example::

        inspect_checkpoint("checkpoints/best.ckpt")["gamma"]
    """
    checkpoint = read_checkpoint(path, weights_only=weights_only)
    state = state_dict_of(checkpoint, path)
    metadata = checkpoint.get(METADATA_KEY, {})
    masks = {key.removesuffix(_MASK): mask for key, mask in state.items() if key.endswith(_MASK) and mask.any()}
    heads = [prefix.rstrip(".") for prefix in masks]
    info: dict[str, Any] = {"calibrated": bool(masks), "folded": False, "heads": heads, **metadata}
    for prefix, mask in masks.items():
        info["gamma"] = state[prefix + _OFFSET].item()
        info["num_classes"] = len(mask)
        info["absent_classes"] = mask.nonzero().flatten().tolist()
    return info


def state_dict_of(checkpoint: Mapping[str, Any], path: StrPath) -> dict[str, Any]:
    """Return a copy of the state dict in a Lightning checkpoint, or of a plain state dict."""
    state = checkpoint.get("state_dict", checkpoint)
    tensors = state.values() if isinstance(state, Mapping) and all(isinstance(key, str) for key in state) else ()
    if not any(isinstance(value, Tensor) for value in tensors):
        raise ValueError(f"Expected a checkpoint with a state dict, but {os.fspath(path)!r} holds no named tensors.")
    return copy.copy(state)  # with its `_metadata`, by which modules tell the version of their entries


def is_folded(checkpoint: Mapping[str, Any]) -> bool:
    """Tell whether gamma was folded into the bias of this checkpoint."""
    return bool(checkpoint.get(METADATA_KEY, {}).get("folded"))


def put_calibration(checkpoint: dict[str, Any], calibration: Mapping[str, Tensor], result: CalibrationResult) -> None:
    """Set the calibration's entries in a Lightning checkpoint and say in its metadata where they come from."""
    checkpoint["state_dict"].update(calibration)
    checkpoint[METADATA_KEY] = {**result.as_dict(), "version": version("lightning-calibft")}


def calibration_entries(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return copies, on the CPU, of the calibration's entries in a state dict."""
    entries = {key: value for key, value in state_dict.items() if key.endswith((_OFFSET, _MASK))}
    return {key: value.detach().cpu().clone() for key, value in entries.items()}


def _calibrated_heads(
    state: Mapping[str, Tensor], checkpoint: Mapping[str, Any], path: StrPath
) -> dict[str, tuple[float, Tensor]]:
    """Return gamma and the mask of each head, by the prefix of its keys."""
    if is_folded(checkpoint):
        raise ValueError(
            f"Expected a calibrated checkpoint, but in {os.fspath(path)!r} gamma is folded into the bias already. Load"
            " it as any other, with `load_from_checkpoint`."
        )
    heads = {
        key.removesuffix(_OFFSET): (value.item(), state[key.removesuffix(_OFFSET) + _MASK])
        for key, value in state.items()
        if key.endswith(_OFFSET)
    }
    if not heads or not all(mask.any() for _, mask in heads.values()):
        raise ValueError(
            f"Expected a calibrated checkpoint, but {os.fspath(path)!r} holds no gamma. Train with the"
            " `AbsentClassCalibration` callback, or calibrate the loaded model with `calibrate(model, loader)`."
        )
    return heads


def _classes(checkpoint: Mapping[str, Any], mask: Tensor) -> tuple[list[int], list[int]]:
    """Return the seen and the absent classes; without metadata, what is not absent counts as seen."""
    absent = mask.nonzero().flatten().tolist()
    seen = checkpoint.get(METADATA_KEY, {}).get("seen_classes")
    return seen or (mask == 0).nonzero().flatten().tolist(), absent


def _without_calibration(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Drop the calibration's keys from every state dict in a checkpoint (weight averaging keeps a second one)."""
    stripped = copy.copy(checkpoint)
    for key, value in checkpoint.items():
        if key in ("state_dict", "current_model_state"):
            stripped[key] = _without_calibration(value)
        elif key.endswith((_OFFSET, _MASK)):
            del stripped[key]
    return stripped
