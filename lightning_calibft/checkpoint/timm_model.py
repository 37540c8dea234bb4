"""Build timm models from weight files."""

from __future__ import annotations

import argparse
import math
import os
import warnings
from collections.abc import Mapping
from contextlib import suppress
from reprlib import repr as short
from typing import Any, cast

import timm
import torch
from torch import Tensor, nn

from lightning_calibft._format import StrPath
from lightning_calibft.checkpoint.files import check_is_whole, read_checkpoint
from lightning_calibft.checkpoint.fold_checkpoint import fold_state_dict
from lightning_calibft.checkpoint.metadata import check_metadata
from lightning_calibft.checkpoint.state import (
    calibrated_heads,
    calibration_metadata,
    choose_weights,
    folded_metadata,
    is_folded,
    state_dict_of,
    unwrapped_state_dict,
    without_calibration,
)
from lightning_calibft.labels.label_names import did_you_mean

# The model arguments that a file may set by itself. None of them can refer to another file or to a URL.
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
    name: str | None,
    path: StrPath,
    *,
    num_classes: int | None = None,
    use_ema: bool | None = None,
    weights_only: bool = True,
    **model_args: Any,
) -> tuple[nn.Module, str, dict[str, Any]]:
    """Build a timm model with the weights of a file, ignoring a gamma in it, and return its name and arguments.

    What the file says about the images, such as their mean, replaces what timm has in ``pretrained_cfg``.

    Args:
        name: Name of the model in timm. If the file names another one, there is a warning. ``None``: the one that the
            file names.
        path: A checkpoint from Lightning or timm's training script, or a plain state dict.
        num_classes: Number of classes. ``None``: as many as the file has.
        use_ema: As in :func:`~lightning_calibft.fold_checkpoint`.
        weights_only: As in :func:`load_folded`.
        model_args: Arguments of ``timm.create_model``. If empty: those that the file names.

    Raises:
        ValueError: If the file is not a checkpoint, is already folded, does not fit the model, or names arguments that
            are not allowed, or if timm has no such model.
    """
    if name is not None:
        check_model_name(name)
    check_is_whole(path)
    checkpoint = choose_weights(read_checkpoint(path, weights_only=weights_only), path, use_ema)
    if is_folded(checkpoint):
        raise ValueError(
            f"Expected weights without gamma, but in {os.fspath(path)!r} gamma is folded into the bias. Calibrating"
            " these weights would count it twice. Use the file that this one was made from."
        )
    metadata = {**_training_arguments(checkpoint, path), **calibration_metadata(checkpoint, path)}
    if name is None:
        name = _named_model(metadata, path, weights_only)
    elif "model" in metadata and _without_tag(metadata["model"]) != _without_tag(name):
        warnings.warn(
            f"{os.fspath(path)!r} holds a {metadata['model']!r}, as it says, but {name!r} is built.", stacklevel=2
        )
    args = model_args or _model_args(metadata, path, weights_only)
    state = without_calibration(state_dict_of(checkpoint, path))
    model = _create(name, unwrapped_state_dict(checkpoint, state, None), path, num_classes, args, metadata)
    return model, name, args


def load_folded(
    name: str | None,
    path: StrPath,
    *,
    use_ema: bool | None = None,
    weights_only: bool = True,
    **model_args: Any,
) -> tuple[nn.Module, dict[str, Any]]:
    """Build a timm model with gamma in its bias from a calibrated or folded file, and return the file's metadata.

    Args:
        name: Name of the model in timm. ``None``: the one that the file names.
        path: As in :func:`load_raw`.
        use_ema: As in :func:`~lightning_calibft.fold_checkpoint`.
        weights_only: As in :func:`~lightning_calibft.load_calibrated`. If true, the file may only name timm's own
            models and a few plain arguments, but no other files or URLs.
        model_args: Arguments of ``timm.create_model``. If empty: those that the file names.

    Raises:
        ValueError: If the file is not a checkpoint, is not calibrated, does not fit the model, or names a model or
            arguments that are not allowed, or if timm has no such model.
    """
    if name is not None:
        check_model_name(name)
    check_is_whole(path)
    checkpoint = choose_weights(read_checkpoint(path, weights_only=weights_only), path, use_ema)
    metadata, state = calibration_metadata(checkpoint, path), state_dict_of(checkpoint, path)
    if not is_folded(checkpoint):
        heads = calibrated_heads(checkpoint, path)
        state, metadata = fold_state_dict(state, heads, path, add_bias=False), folded_metadata(metadata, heads)
    metadata = {**_training_arguments(checkpoint, path), **metadata}
    if name is None:
        name = _named_model(metadata, path, weights_only)
    args = model_args or _model_args(metadata, path, weights_only)
    width = metadata["num_classes"]
    if not any(isinstance(value, Tensor) and value.shape[:1] == (width,) for value in state.values()):
        raise ValueError(
            f"Expected {os.fspath(path)!r} to have a head of {width} classes, as its metadata says, but it has none."
        )
    return _create(name, unwrapped_state_dict(checkpoint, state, None), path, width, args, metadata), metadata


def _named_model(metadata: Mapping[str, Any], path: StrPath, weights_only: bool) -> str:
    """Return the name of the model that a file names, if it may."""
    if "model" not in metadata:
        raise ValueError(
            f"Expected argument `model` to name a timm model, because {os.fspath(path)!r} does not name one."
        )
    name = str(metadata["model"])
    if weights_only and not _is_known(name):
        raise ValueError(
            f"Expected {os.fspath(path)!r} to name one of timm's own models, but it names {name!r}. If that is"
            " correct, pass it as argument `model`."
        )
    return name


def _training_arguments(checkpoint: Mapping[str, Any], path: StrPath) -> dict[str, Any]:
    """Return what timm's training script has written about the model and the images, in the form of our metadata."""
    args = checkpoint.get("args")
    args = vars(args) if isinstance(args, argparse.Namespace) else args if isinstance(args, Mapping) else {}
    name = args.get("model", checkpoint.get("arch"))
    if not isinstance(name, str) or not _is_known(name):  # other scripts use these keys for other things
        return {}
    data = {key: args[key] for key in ("input_size", "mean", "std", "crop_pct", "interpolation") if args.get(key)}
    if "input_size" not in data and args.get("img_size"):
        data["input_size"] = [args.get("in_chans") or 3, args["img_size"], args["img_size"]]
    model_args = args.get("model_kwargs") or {}
    for key, argument in (("in_chans", "in_chans"), ("gp", "global_pool")):
        if args.get(key) and isinstance(model_args, Mapping):
            model_args = {argument: args[key], **model_args}
    return check_metadata({"model": name, "model_args": model_args, "data_config": data}, path)


def _model_args(metadata: Mapping[str, Any], path: StrPath, weights_only: bool) -> dict[str, Any]:
    """Return the arguments of the model that a file names, if it may."""
    args = dict(metadata.get("model_args", {}))
    for key, value in args.items() if weights_only else ():
        if key not in _ARGUMENTS or not _is_plain(value):
            raise ValueError(
                f"Expected {os.fspath(path)!r} to name arguments of its model that cannot load other files, but it"
                f" names {key}={short(value)}. If that is correct, pass all arguments of the model yourself, as"
                " `model_args`."
            )
    return args


def check_model_name(name: str) -> None:
    """Raise if timm has no model of this name. The name may also be an address such as ``hf-hub:timm/resnet18``."""
    if ":" not in name and not _is_known(name):
        raise ValueError(
            f"Expected the name of a timm model, but got {name!r}."
            f"{did_you_mean(_without_tag(name), timm.list_models())}"
        )


def _is_known(name: str) -> bool:
    """Return whether timm has a model of this name, which may end in a tag for pre-trained weights."""
    return _without_tag(name) in timm.list_models()


def _without_tag(name: str) -> str:
    return name.split(".")[0]


def _is_plain(value: object) -> bool:
    if isinstance(value, (list, tuple)):
        return len(value) <= 8 and all(isinstance(item, (int, float)) and _is_plain(item) for item in value)
    if isinstance(value, (int, float)):
        return math.isfinite(value) and abs(value) <= _LARGEST_ARGUMENT
    return value is None or (isinstance(value, str) and value.isidentifier())


def _create(
    name: str,
    state: Mapping[str, Any],
    path: StrPath,
    num_classes: int | None,
    model_args: Mapping[str, Any],
    metadata: Mapping[str, Any],
) -> nn.Module:
    num_classes = num_classes or _width(name, state)
    if num_classes is None:
        raise ValueError(
            f"Expected {os.fspath(path)!r} to hold the weights of timm's {name!r}, but it does not show for how many"
            " classes they are. If it is the right file, pass their number as `num_classes`."
        )

    def build(device: str) -> nn.Module:
        with torch.device(device):
            return cast(nn.Module, timm.create_model(name, num_classes=num_classes, **model_args))

    def check_fit(model: nn.Module) -> None:
        _check_fit(model.state_dict(), state, f"Expected {os.fspath(path)!r} to hold the weights of timm's {name!r},")

    try:
        # First without memory, of which the arguments in a forged file could ask for any amount.
        with suppress(RuntimeError):  # in older releases of timm, some models compute with tensors in `__init__`
            check_fit(build("meta"))
        model = build("cpu")
    except _UnfitError:
        raise
    except Exception as error:  # wrong arguments raise anything
        raise ValueError(f"timm cannot build {name!r} with the arguments {dict(model_args)}: {error}") from error
    check_fit(model)
    model.load_state_dict(state)
    cast("dict[str, Any]", model.pretrained_cfg).update(metadata.get("data_config", {}))
    return model.eval()


class _UnfitError(ValueError):
    """The weights of a file are not those of the model."""


def _check_fit(own: Mapping[str, Tensor], state: Mapping[str, Any], expected: str) -> None:
    """Raise if the weights do not have the names and shapes of the model, and list a few that differ."""
    missing, unknown = [key for key in own if key not in state], [key for key in state if key not in own]
    if missing or unknown:
        parts = {"is missing": missing, "has unknown": unknown}
        details = ", and ".join(f"{verb} {', '.join(keys[:3])}{_more(keys)}" for verb, keys in parts.items() if keys)
        raise _UnfitError(f"{expected} but it {details}.")
    for key, value in own.items():
        shape = tuple(state[key].shape) if isinstance(state[key], Tensor) else type(state[key]).__name__
        if shape != tuple(value.shape):
            raise _UnfitError(f"{expected} but {key} has the shape {shape} instead of {tuple(value.shape)}.")


def _more(keys: list[str]) -> str:
    return f" and {len(keys) - 3} more" if len(keys) > 3 else ""


def _width(name: str, state: Mapping[str, Any]) -> int | None:
    """Return the number of rows of the classifier that timm names, or ``None`` if ``state`` does not have it."""
    config = timm.get_pretrained_cfg(name)
    names = getattr(config, "classifier", None) or ()
    for classifier in (names,) if isinstance(names, str) else names:
        if isinstance(weight := state.get(f"{classifier}.weight"), Tensor):
            return len(weight)
    return None
