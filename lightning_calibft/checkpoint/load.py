"""Checkpoint files: load them, fold gamma into the bias, say what they hold."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any, TypeVar

import lightning
import torch
from lightning.pytorch import LightningModule

from lightning_calibft._arguments import check_path, check_type
from lightning_calibft.checkpoint.files import (
    METADATA_KEY,
    StrPath,
    is_safetensors,
    read_checkpoint,
    read_exported_facts,
    write_atomically,
)
from lightning_calibft.checkpoint.state import (
    LIGHTNING_VERSION,
    MASK,
    OFFSET,
    bare_weights,
    calibrated_heads,
    classes_of,
    facts_of,
    fold_state,
    folded_facts,
    state_dict_of,
    state_key,
    without_calibration,
)
from lightning_calibft.head import set_gamma

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
        TypeError: If ``module_class`` is no LightningModule class, or ``path`` no path.
        ValueError: If the file is no checkpoint, needs ``weights_only=False``, or is not calibrated.

    Example::

        model = load_calibrated(MyModule, "checkpoints/best.ckpt")
    """
    if not (isinstance(module_class, type) and issubclass(module_class, LightningModule)):
        raise TypeError(f"Expected argument `module_class` to be a LightningModule class, but got {module_class!r}.")
    checkpoint = read_checkpoint(path, weights_only=weights_only)
    heads = calibrated_heads(checkpoint, path)
    stripped = io.BytesIO()
    state = without_calibration(state_dict_of(checkpoint, path))
    # Without a version, as in a file of weights alone, Lightning refuses to load.
    torch.save({LIGHTNING_VERSION: lightning.__version__, **checkpoint, "state_dict": state}, stripped)
    stripped.seek(0)
    module = module_class.load_from_checkpoint(stripped, weights_only=weights_only, **kwargs)
    for prefix, (gamma, mask) in heads.items():
        seen, absent = classes_of(facts_of(checkpoint), mask)
        set_gamma(module.get_submodule(prefix.rstrip(".")), gamma, seen, absent)
    return module.eval()


def fold_checkpoint(
    source: StrPath,
    destination: StrPath,
    *,
    add_bias: bool = False,
    prefix: str | None = None,
    weights_only: bool = True,
) -> None:
    """Add gamma to the bias of the head and write a file that loads anywhere, without this package.

    The name of ``destination`` decides what is written. A ``.ckpt`` file is the whole checkpoint, with the keys of the
    uncalibrated one, for ``MyModule.load_from_checkpoint``. Any other is the state dict of the model alone, for
    ``model.load_state_dict`` and timm's ``create_model(..., checkpoint_path=...)``; its keys begin inside the
    LightningModule (``model.fc.bias`` becomes ``fc.bias``). A ``.safetensors`` file is one of safetensors. All hold
    the facts of the calibration, by which folding or calibrating them again is refused.

    A folded file is for inference: training it further would teach the model to undo gamma.

    Args:
        source: A calibrated checkpoint: of Lightning, of timm's training script, or a plain state dict.
        destination: The file to write; it appears whole or not at all.
        add_bias: Give a head without bias a new one. The file then has one key more than the original class: that
            refuses it when it loads strictly, and drops gamma in silence when not.
        prefix: What the keys of the model begin with, such as ``"model."``, where the rule above does not fit; others
            are left out. Not for a ``.ckpt`` file.
        weights_only: As in :func:`load_calibrated`.

    Raises:
        FileNotFoundError: If there is no file ``source``.
        ValueError: If ``source`` is no calibrated checkpoint or folded already, if its head has no bias, or if
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
    whole = Path(destination).suffix == ".ckpt"
    if whole and prefix is not None:
        raise ValueError(
            f"Expected argument `prefix` to be None beside the `destination` {os.fspath(destination)!r}, but got"
            f" {prefix!r}: a .ckpt file is for the LightningModule, whose keys stay. Name it .pth or .safetensors."
        )
    checkpoint = read_checkpoint(source, weights_only=weights_only)
    heads = calibrated_heads(checkpoint, source)
    state = fold_state(state_dict_of(checkpoint, source), heads, source, add_bias)
    facts = folded_facts(facts_of(checkpoint), heads)
    if whole and (key := state_key(checkpoint)) is not None:
        write_atomically({**_stripped(checkpoint), key: state, METADATA_KEY: facts}, destination)
        return
    write_weights(state if whole else bare_weights(checkpoint, state, prefix), facts, destination)


def write_weights(state: Any, facts: dict[str, Any], path: StrPath) -> None:
    """Write a state dict and the facts of its calibration, the latter where loaders overlook them."""
    if is_safetensors(path):
        write_atomically({"state_dict": state, METADATA_KEY: facts}, path)
    else:
        state._metadata[METADATA_KEY] = facts
        write_atomically(state, path)


def inspect_checkpoint(path: StrPath, *, weights_only: bool = True) -> dict[str, Any]:
    """Tell whether a checkpoint is calibrated, and how.

    Args:
        path: A checkpoint: of Lightning, of timm's training script, or a plain state dict; or what
            :func:`~lightning_calibft.export` has written.
        weights_only: As in :func:`load_calibrated`.

    Returns:
        Plain Python values: ``calibrated`` and ``folded`` (bools), ``heads`` (dotted names), ``gamma`` and, as far as
        the file tells, ``standard_error``, ``num_samples``, ``estimator``, ``num_classes``, ``seen_classes``,
        ``absent_classes``, ``version`` (of this package), ``torch_version`` and ``lightning_version``.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is no checkpoint or needs ``weights_only=False``.

    Example::

        inspect_checkpoint("checkpoints/best.ckpt")["gamma"]
    """
    if (facts := read_exported_facts(path)) is not None:
        return {"calibrated": False, "folded": False, "heads": [], **facts}
    checkpoint = read_checkpoint(path, weights_only=weights_only)
    state = state_dict_of(checkpoint, path)
    masks = {key.removesuffix(MASK): mask for key, mask in state.items() if key.endswith(MASK) and mask.any()}
    heads = [prefix.rstrip(".") for prefix in masks]
    info: dict[str, Any] = {"calibrated": bool(masks), "folded": False, "heads": heads, **facts_of(checkpoint)}
    for prefix, mask in masks.items():
        info["gamma"] = state[prefix + OFFSET].item()
        info["num_classes"] = len(mask)
        info["absent_classes"] = mask.nonzero().flatten().tolist()
    if LIGHTNING_VERSION in checkpoint:
        info["lightning_version"] = str(checkpoint[LIGHTNING_VERSION])
    return info


def _stripped(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Drop the calibration from the other state dicts in a checkpoint (weight averaging keeps a second one)."""
    return {
        key: without_calibration(value)
        if isinstance(value, dict) and any(str(name).endswith((OFFSET, MASK)) for name in value)
        else value
        for key, value in checkpoint.items()
    }
