"""Fold the gamma of a checkpoint file into the bias of its head."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_calibft._arguments import check_type
from lightning_calibft._format import GRAPHS, METADATA_KEY, StrPath, check_path
from lightning_calibft.checkpoint.files import (
    check_destination_file,
    check_differs,
    check_is_whole,
    read_checkpoint,
    write_atomically,
    write_weights,
)
from lightning_calibft.checkpoint.state import (
    calibrated_heads,
    calibration_metadata,
    choose_weights,
    folded_metadata,
    heads_of,
    is_state_dict,
    state_dict_of,
    state_key,
    unwrapped_state_dict,
    without_calibration,
)
from lightning_calibft.head.fold import folded_biases


def fold_checkpoint(
    source: StrPath,
    destination: StrPath,
    *,
    add_bias: bool = False,
    prefix: str | None = None,
    use_ema: bool | None = None,
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
        use_ema: Which weights to fold in a file that also has their moving average, as those of timm's training script
            (``state_dict_ema``). ``None``: what Lightning loads from its own files, and timm from others, with a
            warning. A ``.ckpt`` file keeps all, and gamma is folded into each that has one.
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
    check_differs(destination, "source", source)
    check_destination_file(destination)
    if Path(destination).suffix in GRAPHS:
        raise ValueError(
            f"Expected argument `destination` to be a file of weights, but got {os.fspath(destination)!r}. Write it"
            " with `export(model, ...)` or `calibft export`."
        )
    is_lightning = Path(destination).suffix == ".ckpt"
    if is_lightning and prefix is not None:
        raise ValueError(
            f"Expected argument `prefix` to be None for the `destination` {os.fspath(destination)!r}, but got"
            f" {prefix!r}. A .ckpt file keeps the keys of the LightningModule. Write a .pth or .safetensors file."
        )
    check_is_whole(source)
    checkpoint = read_checkpoint(source, weights_only=weights_only)
    chosen = choose_weights(checkpoint, source, use_ema)
    heads = calibrated_heads(chosen, source)
    state = fold_state_dict(state_dict_of(chosen, source), heads, source, add_bias)
    metadata = folded_metadata(calibration_metadata(chosen, source), heads)
    if is_lightning and (key := state_key(chosen)) is not None:
        folded = {
            name: state if name == key else _fold_if_calibrated(value, source, add_bias)
            for name, value in checkpoint.items()
        }
        write_atomically({**folded, METADATA_KEY: metadata}, destination)
    else:
        write_weights(state if is_lightning else unwrapped_state_dict(chosen, state, prefix), metadata, destination)


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


def _fold_if_calibrated(value: Any, path: StrPath, add_bias: bool) -> Any:
    """Fold an entry of a checkpoint that is another state dict with a gamma: weight averaging keeps a second one."""
    if not is_state_dict(value) or not all(isinstance(name, str) for name in value):
        return value
    return fold_state_dict(value, heads_of(value, path), path, add_bias)
