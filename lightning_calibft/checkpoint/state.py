"""The calibration in a checkpoint: entries in the state dict, and metadata next to them."""

from __future__ import annotations

import math
import os
import warnings
from collections import OrderedDict
from collections.abc import Mapping
from importlib.metadata import version
from reprlib import repr as short
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_calibft._arguments import check_type
from lightning_calibft._format import MASK as MASK, METADATA_KEY, OFFSET as OFFSET, StrPath
from lightning_calibft.checkpoint.metadata import check_entries, check_metadata

if TYPE_CHECKING:
    from lightning_calibft.calibration.result import CalibrationResult

LIGHTNING_VERSION = "pytorch-lightning_version"  # Lightning writes this key into each checkpoint

# The keys under which training scripts save the weights, in the order in which timm looks for them.
_EMA_KEYS = ("state_dict_ema", "model_ema")
_STATE_KEYS = (*_EMA_KEYS, "state_dict", "model")


def state_key(checkpoint: Mapping[str, Any]) -> str | None:
    """Return the key of the state dict in a checkpoint, or ``None`` if the checkpoint itself is a state dict."""
    return next(iter(_state_keys(checkpoint)), None)


def choose_weights(checkpoint: dict[str, Any], path: StrPath, use_ema: bool | None) -> dict[str, Any]:
    """Return a checkpoint that holds only one of its state dicts.

    Args:
        checkpoint: The content of a file.
        path: The file, for errors.
        use_ema: Whether to choose the moving average of the weights. ``None``: what Lightning loads from its own files,
            and timm from others; if there are several state dicts, a warning says which one this is.

    Raises:
        ValueError: If there are no such weights.
    """
    if use_ema is not None:
        check_type("use_ema", use_ema, bool)
    keys = _state_keys(checkpoint)
    chosen = keys if use_ema is None else [key for key in keys if (key in _EMA_KEYS) is use_ema]
    if not chosen and (keys or use_ema):
        raise ValueError(
            f"Expected {os.fspath(path)!r} to hold {'averaged weights (EMA)' if use_ema else 'weights without EMA'}"
            f" because of the argument `use_ema`, but it holds {' and '.join(map(repr, keys)) or 'one state dict'}."
        )
    if len(keys) < 2:
        return checkpoint
    if use_ema is None:
        used = "as Lightning does" if LIGHTNING_VERSION in checkpoint else "as timm does"
        warnings.warn(
            f"{os.fspath(path)!r} holds {' and '.join(map(repr, keys))}. {keys[0]!r} is used, {used}. Choose with"
            " `use_ema=True` or `use_ema=False`.",
            stacklevel=3,
        )
    return {key: value for key, value in checkpoint.items() if key not in keys or key == chosen[0]}


def _state_keys(checkpoint: Mapping[str, Any]) -> list[str]:
    keys = ("state_dict", *_STATE_KEYS) if LIGHTNING_VERSION in checkpoint else _STATE_KEYS
    return [key for key in dict.fromkeys(keys) if is_state_dict(checkpoint.get(key))]


def is_state_dict(value: Any) -> bool:
    """Return whether a value is a mapping that holds tensors by name."""
    return isinstance(value, Mapping) and any(isinstance(key, str) and isinstance(value[key], Tensor) for key in value)


def state_dict_of(checkpoint: Mapping[str, Any], path: StrPath) -> OrderedDict[str, Any]:
    """Return a copy of the state dict in a Lightning or timm checkpoint, or of a plain state dict."""
    key = state_key(checkpoint)
    state = checkpoint if key is None else checkpoint[key]
    if not is_state_dict(state) or not all(isinstance(name, str) for name in state):
        nested = [name for name, value in checkpoint.items() if is_state_dict(value)]
        inside = f" outside {', '.join(map(short, nested[:3]))}. Save the one that you mean alone" if nested else ""
        raise ValueError(
            f"Expected a checkpoint with a state dict, but {os.fspath(path)!r} holds no named tensors{inside}."
        )
    return _like(state, state)


def calibration_metadata(checkpoint: Mapping[str, Any], path: StrPath) -> dict[str, Any]:
    """Return the calibration metadata of a checkpoint.

    Raises:
        ValueError: If it is invalid.
    """
    return check_metadata(_raw_metadata(checkpoint), path)


def is_folded(checkpoint: Mapping[str, Any]) -> bool:
    """Return whether gamma is folded into the bias of this checkpoint."""
    metadata = _raw_metadata(checkpoint)
    return isinstance(metadata, Mapping) and bool(metadata.get("folded"))


def _raw_metadata(checkpoint: Mapping[str, Any]) -> Any:
    key = state_key(checkpoint)
    state = checkpoint if key is None else checkpoint[key]
    return checkpoint.get(METADATA_KEY) or _module_versions(state).get(METADATA_KEY)


def _module_versions(state: object) -> Mapping[str, Any]:
    """Return the ``_metadata`` that torch attaches to a state dict: the versions of the modules, by name."""
    metadata = getattr(state, "_metadata", None)
    return metadata if isinstance(metadata, Mapping) else {}


def put_calibration(checkpoint: dict[str, Any], calibration: Mapping[str, Tensor], result: CalibrationResult) -> None:
    """Set the calibration's entries in a checkpoint, and its metadata."""
    checkpoint["state_dict"].update(calibration)
    checkpoint[METADATA_KEY] = {**result.as_dict(), **versions()}


def versions() -> dict[str, str]:
    """Return the versions of this package and of torch, as plain strings."""
    return {"version": version("lightning-calibft"), "torch_version": str(torch.__version__)}


def calibration_entries(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return copies, on the CPU, of the calibration's entries in a state dict."""
    entries = {key: value for key, value in state_dict.items() if key.endswith((OFFSET, MASK))}
    return {key: value.detach().cpu().clone() for key, value in entries.items()}


def calibrated_heads(checkpoint: Mapping[str, Any], path: StrPath) -> dict[str, tuple[float, Tensor]]:
    """Return gamma and the mask of each calibrated head, by the prefix of its keys.

    A frozen copy of the model, such as a teacher, has the entries without a gamma, and is left out.

    Raises:
        ValueError: If no head is calibrated, if the entries are invalid, or if gamma is already folded into the bias.
    """
    state = state_dict_of(checkpoint, path)
    if is_folded(checkpoint):
        raise ValueError(
            f"Expected a calibrated checkpoint, but in {os.fspath(path)!r} gamma is already folded into the bias. Load"
            " it like any other checkpoint."
        )
    heads = heads_of(state, path)
    if not heads:
        key = state_key(checkpoint)
        inside = "" if key in (None, "state_dict") else f" in its {key!r}"
        raise ValueError(
            f"Expected a calibrated checkpoint, but {os.fspath(path)!r} holds no gamma{inside}. Calibrate its weights"
            " first, with `calibft calibrate` or, in Python, with `calibrate(model, loader)`."
        )
    return heads


def heads_of(state: Mapping[str, Any], path: StrPath) -> dict[str, tuple[float, Tensor]]:
    """Return gamma and the mask of each head in a state dict that has a gamma, by the prefix of its keys."""
    heads: dict[str, tuple[float, Any]] = {}
    for prefix in [key.removesuffix(OFFSET) for key in state if key.endswith(OFFSET)]:
        mask = state.get(prefix + MASK)
        gamma, rows = check_entries(prefix.rstrip("."), state[prefix + OFFSET], mask, path)
        if any(rows):
            heads[prefix] = gamma, mask
    return heads


def classes_of(metadata: Mapping[str, Any], mask: Tensor) -> tuple[list[int], list[int]]:
    """Return the seen and the absent classes. Without metadata, all classes that are not absent count as seen."""
    absent = mask.nonzero().flatten().tolist()
    return metadata.get("seen_classes") or (mask == 0).nonzero().flatten().tolist(), absent


def folded_metadata(metadata: Mapping[str, Any], heads: Mapping[str, tuple[float, Tensor]]) -> dict[str, Any]:
    """Return the metadata of a folded file: all that is known about the calibration, and that it is folded.

    Where the metadata and the state dict differ, the state dict is right, because it produces the logits.
    """
    gamma, mask = next(iter(heads.values()))
    recorded = metadata.get("gamma", gamma)
    seen, absent = classes_of(metadata, mask)
    return {
        **versions(),
        **metadata,
        "gamma": recorded if math.isclose(recorded, gamma, rel_tol=1e-6) else gamma,  # the offset is in float32
        "num_classes": len(mask),
        "seen_classes": seen,
        "absent_classes": absent,
        "folded": True,
    }


def without_calibration(state: Mapping[str, Any]) -> OrderedDict[str, Any]:
    """Return a state dict without the calibration's entries."""
    return _like(state, {key: value for key, value in state.items() if not key.endswith((OFFSET, MASK))})


def unwrapped_state_dict(
    checkpoint: Mapping[str, Any], state: Mapping[str, Any], prefix: str | None
) -> OrderedDict[str, Any]:
    """Return the state dict of the model inside its wrappers.

    Args:
        checkpoint: The checkpoint that ``state`` comes from. In one of Lightning, the LightningModule is a wrapper.
        state: The state dict, without calibration.
        prefix: The prefix of the model's keys. Other keys are left out. ``None``: the prefix that all keys share, if
            the model is the only child of a LightningModule, or is compiled or distributed.

    Raises:
        ValueError: If no key begins with ``prefix``.
    """
    if prefix is not None:
        return _strip(state, prefix)
    # A LightningModule whose only child is one layer keeps the layer's name. Otherwise just "weight" would be left.
    while (common := next(iter(state)).split(".")[0] + ".") and all(key.startswith(common) for key in state):
        lightning = LIGHTNING_VERSION in checkpoint and any(key.count(".") > 1 for key in state)
        if common not in ("_orig_mod.", "module.") and not lightning:
            break
        checkpoint = {} if common not in ("_orig_mod.", "module.") else checkpoint
        state = _strip(state, common)
    return _like(state, state)


def _strip(state: Mapping[str, Any], prefix: str) -> OrderedDict[str, Any]:
    stripped = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    if not stripped:
        raise ValueError(
            f"Expected argument `prefix` to begin the keys of the weights, but got {prefix!r} and keys such as"
            f" {next(iter(state))!r}."
        )
    result = _like({}, stripped)
    versions_of = {f"{key}.": value for key, value in _module_versions(state).items()}
    result._metadata = OrderedDict(  # type: ignore[attr-defined]
        (key.removeprefix(prefix).rstrip("."), value) for key, value in versions_of.items() if key.startswith(prefix)
    )
    return result


def _like(state: Mapping[str, Any], values: Mapping[str, Any]) -> OrderedDict[str, Any]:
    """Return ``values`` as a state dict with the ``_metadata`` of ``state``."""
    result = OrderedDict(values)
    result._metadata = OrderedDict(_module_versions(state))  # type: ignore[attr-defined]
    return result
