"""timm's models from files of weights."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from reprlib import repr as short
from typing import Any

import timm
from torch import Tensor, nn

from lightning_calibft._format import StrPath
from lightning_calibft.checkpoint.files import read_checkpoint
from lightning_calibft.checkpoint.fold_checkpoint import fold_state_dict
from lightning_calibft.checkpoint.state import (
    calibrated_heads,
    calibration_metadata,
    folded_metadata,
    is_folded,
    state_dict_of,
    unwrapped_state_dict,
    warn_of_several_state_dicts,
    without_calibration,
)
from lightning_calibft.labels.label_names import did_you_mean

# The arguments of a model that a file may name for itself: none of them names another file, or an address.
_ARGUMENTS = {
    "act_layer",
    "attn_drop_rate",
    "class_token",
    "drop_path_rate",
    "drop_rate",
    "dynamic_img_pad",
    "dynamic_img_size",
    "fc_norm",
    "global_pool",
    "img_size",
    "in_chans",
    "init_values",
    "no_embed_class",
    "norm_layer",
    "output_stride",
    "patch_drop_rate",
    "patch_size",
    "pos_drop_rate",
    "pos_embed",
    "proj_drop_rate",
    "qk_norm",
    "qkv_bias",
    "reg_tokens",
    "strict_img_size",
    "window_size",
}
_LARGEST_ARGUMENT = 2**16


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
        ValueError: If the file is none, is folded already, or does not fit the model, or if timm has no such model.
    """
    check_model_name(name)
    checkpoint = read_checkpoint(path, weights_only=weights_only)
    if is_folded(checkpoint):
        raise ValueError(
            f"Expected weights without gamma, but in {os.fspath(path)!r} it is folded into the bias: calibrating them"
            " would count it twice. Take the file that this one was made of."
        )
    warn_of_several_state_dicts(checkpoint, path)
    state = without_calibration(state_dict_of(checkpoint, path))
    return _create(name, unwrapped_state_dict(checkpoint, state, None), path, num_classes, model_args)


def load_folded(
    name: str | None, path: StrPath, *, weights_only: bool = True, **model_args: Any
) -> tuple[nn.Module, dict[str, Any]]:
    """Build a timm model with gamma in its bias, from a calibrated or a folded file, and return the file's metadata.

    Args:
        name: Name of the model in timm; ``None``: the one that the file names.
        path: As in :func:`load_raw`.
        weights_only: As in :func:`~lightning_calibft.load_calibrated`. If true, the file may name models of timm and a
            few plain arguments, and no other files or addresses.
        model_args: Arguments of ``timm.create_model``. None: those that the file names.

    Raises:
        ValueError: If the file is none, is not calibrated, does not fit the model, or names what it may not, or if timm
            has no such model.
    """
    if name is not None:
        check_model_name(name)
    checkpoint = read_checkpoint(path, weights_only=weights_only)
    warn_of_several_state_dicts(checkpoint, path)
    metadata, state = calibration_metadata(checkpoint, path), state_dict_of(checkpoint, path)
    if not is_folded(checkpoint):
        heads = calibrated_heads(checkpoint, path)
        state, metadata = fold_state_dict(state, heads, path, add_bias=False), folded_metadata(metadata, heads)
    if name is None:
        if "model" not in metadata:
            raise ValueError(
                f"Expected argument `model` to name a timm model, for {os.fspath(path)!r} does not tell it."
            )
        name = str(metadata["model"])
        if weights_only and not _is_known(name):
            raise ValueError(
                f"Expected {os.fspath(path)!r} to name a model that timm has itself, but it names {name!r}. If that is"
                " right, pass it as argument `model`."
            )
    args = model_args or metadata.get("model_args", {})
    if weights_only and not model_args:
        for key, value in args.items():
            if key not in _ARGUMENTS or not _is_plain(value):
                raise ValueError(
                    f"Expected {os.fspath(path)!r} to name arguments of its model that cannot load other files, but it"
                    f" names {key}={short(value)}. If that is right, pass all arguments of the model yourself, as"
                    " `model_args`."
                )
    width = metadata["num_classes"]
    if not any(isinstance(value, Tensor) and value.shape[:1] == (width,) for value in state.values()):
        raise ValueError(
            f"Expected {os.fspath(path)!r} to have a head of {width} classes, as its metadata say, but it has none."
        )
    return _create(name, unwrapped_state_dict(checkpoint, state, None), path, width, args), metadata


def check_model_name(name: str) -> None:
    """Raise if timm has no model of this name, which may also be the address of one, as ``hf-hub:timm/resnet18``."""
    if ":" not in name and not _is_known(name):
        raise ValueError(
            f"Expected the name of a model that timm has, but got {name!r}."
            f"{did_you_mean(name.split('.')[0], timm.list_models())}"
        )


def _is_known(name: str) -> bool:
    """Return whether timm has a model of this name, which may end in the tag of pre-trained weights."""
    return name.split(".")[0] in timm.list_models()


def _is_plain(value: object) -> bool:
    if isinstance(value, (list, tuple)):
        return len(value) <= 8 and all(isinstance(item, (int, float)) and _is_plain(item) for item in value)
    if isinstance(value, (int, float)):
        return math.isfinite(value) and abs(value) <= _LARGEST_ARGUMENT
    return value is None or (isinstance(value, str) and value.isidentifier())


def _create(
    name: str, state: Mapping[str, Any], path: StrPath, num_classes: int | None, model_args: Mapping[str, Any]
) -> nn.Module:
    num_classes = num_classes or _width(name, state)
    if num_classes is None:
        raise ValueError(
            f"Expected argument `num_classes` beside {name!r}: {os.fspath(path)!r} does not tell the number of classes."
        )
    try:
        model: nn.Module = timm.create_model(name, num_classes=num_classes, **model_args)
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:  # of arguments that the model does not know
        raise ValueError(f"timm cannot build {name!r} with the arguments {dict(model_args)}: {error}") from error
    _check_fit(model.state_dict(), state, f"Expected {os.fspath(path)!r} to hold the weights of timm's {name!r},")
    model.load_state_dict(state)
    return model.eval()


def _check_fit(own: Mapping[str, Tensor], state: Mapping[str, Any], expected: str) -> None:
    """Raise if weights have other names or shapes than those of a model, and name a few of them."""
    missing, unknown = [key for key in own if key not in state], [key for key in state if key not in own]
    if missing or unknown:
        parts = {"lacks": missing, "has unknown": unknown}
        told = ", and ".join(f"{verb} {', '.join(keys[:3])}{_more(keys)}" for verb, keys in parts.items() if keys)
        raise ValueError(f"{expected} but it {told}.")
    for key, value in own.items():
        shape = tuple(state[key].shape) if isinstance(state[key], Tensor) else type(state[key]).__name__
        if shape != tuple(value.shape):
            raise ValueError(f"{expected} but {key} has the shape {shape} instead of {tuple(value.shape)}.")


def _more(keys: list[str]) -> str:
    return f" and {len(keys) - 3} others" if len(keys) > 3 else ""


def _width(name: str, state: Mapping[str, Any]) -> int | None:
    """Return the width of the classifier that timm names, if ``state`` has it."""
    config = timm.get_pretrained_cfg(name)
    names = getattr(config, "classifier", None) or ()
    for classifier in (names,) if isinstance(names, str) else names:
        if isinstance(weight := state.get(f"{classifier}.weight"), Tensor):
            return len(weight)
    return None
