"""What checkpoints hold of a calibration, as dicts in memory."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Mapping
from copy import copy
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from lightning_calibft.calibration import CalibrationResult
from lightning_calibft.checkpoint.files import METADATA_KEY, StrPath
from lightning_calibft.head import CHILD_NAME

OFFSET, MASK = f"{CHILD_NAME}.offset", f"{CHILD_NAME}.mask"
LIGHTNING_VERSION = "pytorch-lightning_version"  # Lightning's own key, in each of its checkpoints

# Where training scripts keep the weights, in the order in which timm looks for them.
_STATE_KEYS = ("state_dict_ema", "model_ema", "state_dict", "model")
# What the keys of a Linear or Conv2d begin with, also of a reparametrized one and of one with an adapter.
_LINEAR_KEYS = ("weight", "bias", "parametrizations.weight.", "base_layer.", "lora_")


def state_key(checkpoint: Mapping[str, Any]) -> str | None:
    """Return the key of the state dict in a checkpoint; ``None`` if the checkpoint is a state dict itself."""
    return next((key for key in _STATE_KEYS if isinstance(checkpoint.get(key), Mapping)), None)


def state_dict_of(checkpoint: Mapping[str, Any], path: StrPath) -> OrderedDict[str, Any]:
    """Return a copy of the state dict in a checkpoint of Lightning or timm, or of a plain state dict."""
    key = state_key(checkpoint)
    state = checkpoint if key is None else checkpoint[key]
    tensors = state.values() if all(isinstance(name, str) for name in state) else ()
    if not any(isinstance(value, Tensor) for value in tensors):
        raise ValueError(f"Expected a checkpoint with a state dict, but {os.fspath(path)!r} holds no named tensors.")
    return _like(state, state)


def facts_of(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a checkpoint tells of its calibration: itself, or its state dict in its ``_metadata``."""
    key = state_key(checkpoint)
    state = checkpoint if key is None else checkpoint[key]
    facts = checkpoint.get(METADATA_KEY) or getattr(state, "_metadata", {}).get(METADATA_KEY)
    return dict(facts) if isinstance(facts, Mapping) else {}


def is_folded(checkpoint: Mapping[str, Any]) -> bool:
    """Tell whether gamma was folded into the bias of this checkpoint."""
    return bool(facts_of(checkpoint).get("folded"))


def put_calibration(checkpoint: dict[str, Any], calibration: Mapping[str, Tensor], result: CalibrationResult) -> None:
    """Set the calibration's entries in a checkpoint and say in its metadata where they come from."""
    checkpoint["state_dict"].update(calibration)
    checkpoint[METADATA_KEY] = {**result.as_dict(), **versions()}


def versions() -> dict[str, str]:
    """Return the versions of what calibrates, as plain strings."""
    return {"version": version("lightning-calibft"), "torch_version": str(torch.__version__)}


def calibration_entries(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return copies, on the CPU, of the calibration's entries in a state dict."""
    entries = {key: value for key, value in state_dict.items() if key.endswith((OFFSET, MASK))}
    return {key: value.detach().cpu().clone() for key, value in entries.items()}


def calibrated_heads(checkpoint: Mapping[str, Any], path: StrPath) -> dict[str, tuple[float, Tensor]]:
    """Return gamma and the mask of each head, by the prefix of its keys."""
    state = state_dict_of(checkpoint, path)
    if is_folded(checkpoint):
        raise ValueError(
            f"Expected a calibrated checkpoint, but in {os.fspath(path)!r} gamma is folded into the bias already. Load"
            " it as any other, with `load_from_checkpoint`."
        )
    heads = {
        key.removesuffix(OFFSET): (value.item(), state[key.removesuffix(OFFSET) + MASK])
        for key, value in state.items()
        if key.endswith(OFFSET)
    }
    if not heads or not all(mask.any() for _, mask in heads.values()):
        key = state_key(checkpoint)
        inside = "" if key in (None, "state_dict") else f" in its {key!r}, which counts before other weights"
        raise ValueError(
            f"Expected a calibrated checkpoint, but {os.fspath(path)!r} holds no gamma{inside}. Train with the"
            " `AbsentClassCalibration` callback, or calibrate the loaded model with `calibrate(model, loader)`."
        )
    return heads


def classes_of(facts: Mapping[str, Any], mask: Tensor) -> tuple[list[int], list[int]]:
    """Return the seen and the absent classes; without facts, what is not absent counts as seen."""
    absent = mask.nonzero().flatten().tolist()
    return facts.get("seen_classes") or (mask == 0).nonzero().flatten().tolist(), absent


def fold_state(
    state: Mapping[str, Any], heads: Mapping[str, tuple[float, Tensor]], path: StrPath, add_bias: bool
) -> OrderedDict[str, Any]:
    """Return a state dict with gamma in the bias and without the calibration's entries.

    Raises:
        ValueError: If a head is not linear, or has no bias and none may be added.
    """
    folded = without_calibration(state)
    for prefix, (gamma, mask) in heads.items():
        keys = [key.removeprefix(prefix) for key in folded if key.startswith(prefix)]
        where = f"the head {prefix.rstrip('.')!r} in {os.fspath(path)!r}"
        if not keys or not all(key.startswith(_LINEAR_KEYS) for key in keys):
            raise ValueError(
                f"Expected {where} to be linear to fold gamma into its bias, but it holds"
                f" {', '.join(keys[:5]) or 'no weights'}. Keep the calibration attached: load the file into the"
                " attached model."
            )
        base = f"{prefix}base_layer." if any(key.startswith("base_layer.") for key in keys) else prefix
        if f"{base}bias" not in folded and not add_bias:
            raise ValueError(
                f"Expected {where} to have a bias that takes up gamma, but it has none. `add_bias` gives it a new one,"
                " which the original class refuses when it loads strictly, and drops in silence when not."
            )
        weight = next(value for key, value in folded.items() if key.startswith((f"{base}weight", f"{base}param")))
        bias = folded.get(f"{base}bias", torch.zeros(len(mask), dtype=weight.dtype))
        folded[f"{base}bias"] = (bias.float() + gamma * mask).to(bias.dtype)
    return folded


def folded_facts(facts: Mapping[str, Any], heads: Mapping[str, tuple[float, Tensor]]) -> dict[str, Any]:
    """Return what a folded file tells: all that is known of the calibration, and that it must not be folded again."""
    gamma, mask = next(iter(heads.values()))
    seen, absent = classes_of(facts, mask)
    classes = {"num_classes": len(mask), "seen_classes": seen, "absent_classes": absent}
    return {"gamma": gamma, **classes, **versions(), **facts, "folded": True}


def without_calibration(state: Mapping[str, Any]) -> OrderedDict[str, Any]:
    """Drop the calibration's entries from a state dict."""
    return _like(state, {key: value for key, value in state.items() if not key.endswith((OFFSET, MASK))})


def bare_weights(checkpoint: Mapping[str, Any], state: Mapping[str, Any], prefix: str | None) -> OrderedDict[str, Any]:
    """Return the state dict of the model inside its wrappers.

    Args:
        checkpoint: Where ``state`` comes from: one of Lightning has a wrapper, the LightningModule, of its own.
        state: The state dict, without calibration.
        prefix: What the keys of the model begin with; others are left out. ``None``: what all keys begin with, of a
            LightningModule with one child, and of compiled and distributed models.

    Raises:
        ValueError: If no key begins with ``prefix``.
    """
    if prefix is not None:
        return _strip(state, prefix)
    # A model that is one layer keeps its own name: without it nothing but "weight" would be left.
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
    # By these, modules tell the version of their entries.
    metadata = {f"{key}.": value for key, value in getattr(state, "_metadata", {}).items()}
    result._metadata = OrderedDict(  # type: ignore[attr-defined]
        (key.removeprefix(prefix).rstrip("."), value) for key, value in metadata.items() if key.startswith(prefix)
    )
    return result


def _like(state: Mapping[str, Any], values: Mapping[str, Any]) -> OrderedDict[str, Any]:
    """Return ``values`` as a state dict with the ``_metadata`` of ``state``."""
    result = OrderedDict(values)
    result._metadata = copy(getattr(state, "_metadata", OrderedDict()))  # type: ignore[attr-defined]
    return result
