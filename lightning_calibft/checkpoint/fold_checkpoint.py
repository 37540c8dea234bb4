"""Fold the gamma of a checkpoint file into the bias of its head."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_calibft._arguments import check_type
from lightning_calibft._format import MASK, METADATA_KEY, OFFSET, StrPath, check_path
from lightning_calibft.checkpoint.files import (
    check_destination_file,
    read_checkpoint,
    write_atomically,
    write_weights,
)
from lightning_calibft.checkpoint.state import (
    calibrated_heads,
    calibration_metadata,
    folded_metadata,
    state_dict_of,
    state_key,
    unwrapped_state_dict,
    warn_of_several_state_dicts,
    without_calibration,
)
from lightning_calibft.head.fold import folded_biases


def fold_checkpoint(
    source: StrPath,
    destination: StrPath,
    *,
    add_bias: bool = False,
    prefix: str | None = None,
    weights_only: bool = True,
) -> None:
    """Add gamma to the bias of the head and write a file that loads anywhere, without this package.

    The name of ``destination`` decides what is written. A ``.ckpt`` file holds the whole checkpoint, with the keys of
    the uncalibrated one, for ``MyModule.load_from_checkpoint``. Any other file holds only the state dict of the model,
    for ``model.load_state_dict`` and timm's ``create_model(..., checkpoint_path=...)``. Its keys are those of the model
    inside the LightningModule (``model.fc.bias`` becomes ``fc.bias``). The name ``.safetensors`` selects that format.
    All files store the calibration metadata, so that they are not folded or calibrated a second time.

    A folded file is for inference: training it further would teach the model to undo gamma.

    Args:
        source: A calibrated checkpoint from Lightning or timm's training script, or a plain state dict.
        destination: The file to write. It appears complete or not at all.
        add_bias: Give a head without bias a new one. The file then has one key more than the original class, which
            refuses to load it strictly and otherwise silently drops gamma.
        prefix: The prefix of the model's keys, such as ``"model."``, if the rule above does not fit. Other keys are
            left out. Not for a ``.ckpt`` file.
        weights_only: As in :func:`load_calibrated`.

    Raises:
        FileNotFoundError: If ``source`` does not exist.
        ValueError: If ``source`` is not a calibrated checkpoint or is already folded, if its head has no bias, or if
            ``destination`` is the same file.

    Example::

        fold_checkpoint("checkpoints/best.ckpt", "model.safetensors")
        model = timm.create_model("resnet50", checkpoint_path="model.safetensors")
    """
    check_path("source", source)
    check_path("destination", destination)
    if prefix is not None:
        check_type("prefix", prefix, str)
    if os.path.realpath(source) == os.path.realpath(destination):
        raise ValueError(
            f"Expected argument `destination` to differ from `source`, but both are {os.fspath(source)!r}. Folding"
            " cannot be undone: keep the calibrated file."
        )
    check_destination_file(destination)
    is_lightning = Path(destination).suffix == ".ckpt"
    if is_lightning and prefix is not None:
        raise ValueError(
            f"Expected argument `prefix` to be None for the `destination` {os.fspath(destination)!r}, but got"
            f" {prefix!r}. A .ckpt file keeps the keys of the LightningModule. Write a .pth or .safetensors file."
        )
    checkpoint = read_checkpoint(source, weights_only=weights_only)
    heads = calibrated_heads(checkpoint, source)
    warn_of_several_state_dicts(checkpoint, source)
    state = fold_state_dict(state_dict_of(checkpoint, source), heads, source, add_bias)
    metadata = folded_metadata(calibration_metadata(checkpoint, source), heads)
    if is_lightning and (key := state_key(checkpoint)) is not None:
        write_atomically({**_uncalibrated(checkpoint), key: state, METADATA_KEY: metadata}, destination)
    else:
        write_weights(state if is_lightning else unwrapped_state_dict(checkpoint, state, prefix), metadata, destination)


def fold_state_dict(
    state: Mapping[str, Any], heads: Mapping[str, tuple[float, Tensor]], path: StrPath, add_bias: bool
) -> OrderedDict[str, Any]:
    """Return a state dict with gamma in the bias and without the calibration's entries.

    Raises:
        ValueError: If gamma cannot be folded into a head.
    """
    folded = without_calibration(state)
    tensors = {key: value for key, value in folded.items() if isinstance(value, Tensor)}
    shifts = {prefix: gamma * mask.float() for prefix, (gamma, mask) in heads.items()}
    folded.update(folded_biases(tensors, shifts, add_bias=add_bias, where=f" in {os.fspath(path)!r}"))
    return folded


def _uncalibrated(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Drop the calibration from the other state dicts in a checkpoint (weight averaging keeps a second one)."""
    return {
        key: without_calibration(value)
        if isinstance(value, dict) and any(str(name).endswith((OFFSET, MASK)) for name in value)
        else value
        for key, value in checkpoint.items()
    }
