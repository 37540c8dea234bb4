"""timm's models from files of weights."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import timm
from torch import Tensor, nn

from lightning_calibft.checkpoint.files import StrPath, read_checkpoint
from lightning_calibft.checkpoint.state import (
    bare_weights,
    calibrated_heads,
    facts_of,
    fold_state,
    folded_facts,
    is_folded,
    state_dict_of,
    without_calibration,
)


def load_raw(
    name: str, path: StrPath, *, num_classes: int | None = None, weights_only: bool = True, **model_args: Any
) -> nn.Module:
    """Build a timm model with the weights of a file, without the gamma that the file may hold.

    Args:
        name: Name of the model in timm.
        path: A checkpoint of Lightning, of timm's training script, or a plain state dict.
        num_classes: Number of classes; ``None``: as many as the file has.
        weights_only: As in :func:`~lightning_calibft.load_calibrated`.
        model_args: Arguments of ``timm.create_model``.

    Raises:
        ValueError: If the file is none, is folded already, or does not fit the model.
    """
    checkpoint = read_checkpoint(path, weights_only=weights_only)
    if is_folded(checkpoint):
        raise ValueError(
            f"Expected weights without gamma, but in {os.fspath(path)!r} it is folded into the bias: calibrating them"
            " would count it twice. Take the file that this one was made of."
        )
    state = without_calibration(state_dict_of(checkpoint, path))
    return _create(name, bare_weights(checkpoint, state, None), path, num_classes, model_args)


def load_folded(
    name: str | None, path: StrPath, *, weights_only: bool = True, **model_args: Any
) -> tuple[nn.Module, dict[str, Any]]:
    """Build a timm model with gamma in its bias, from a calibrated or a folded file, and return the facts beside it.

    Args:
        name: Name of the model in timm; ``None``: the one that the file names.
        path: As in :func:`load_raw`.
        weights_only: As in :func:`~lightning_calibft.load_calibrated`.
        model_args: Arguments of ``timm.create_model``. None: those that the file names.

    Raises:
        ValueError: If the file is none, is not calibrated, or does not fit the model.
    """
    checkpoint = read_checkpoint(path, weights_only=weights_only)
    facts, state = facts_of(checkpoint), state_dict_of(checkpoint, path)
    if not is_folded(checkpoint):
        heads = calibrated_heads(checkpoint, path)
        state, facts = fold_state(state, heads, path, add_bias=False), folded_facts(facts, heads)
    name = name or facts.get("model")
    if name is None:
        raise ValueError(f"Expected argument `model` to name a timm model, for {os.fspath(path)!r} does not tell it.")
    args = model_args or facts.get("model_args", {})
    return _create(name, bare_weights(checkpoint, state, None), path, facts["num_classes"], args), facts


def _create(
    name: str, state: Mapping[str, Any], path: StrPath, num_classes: int | None, model_args: Mapping[str, Any]
) -> nn.Module:
    num_classes = num_classes or _width(name, state)
    if num_classes is None:
        raise ValueError(
            f"Expected argument `num_classes` beside {name!r}: {os.fspath(path)!r} does not tell the number of classes."
        )
    try:
        model = timm.create_model(name, num_classes=num_classes, **model_args)
        model.load_state_dict(state)
    except RuntimeError as error:  # an unknown model, or keys and shapes that do not fit
        raise ValueError(f"{os.fspath(path)!r} does not fit timm's {name!r}: {error}") from error
    return model.eval()


def _width(name: str, state: Mapping[str, Any]) -> int | None:
    """Return the width of the classifier that timm names, if ``state`` has it."""
    config = timm.get_pretrained_cfg(name)
    names = getattr(config, "classifier", None) or ()
    for classifier in (names,) if isinstance(names, str) else names:
        if isinstance(weight := state.get(f"{classifier}.weight"), Tensor):
            return len(weight)
    return None
