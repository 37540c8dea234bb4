"""What calibrated files have in common: names, paths, JSON and words about gamma. Nothing here imports torch."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

StrPath = str | os.PathLike[str]

CHILD_NAME = "absent_class_calibration"  # the module inside the head that calibrates it
OFFSET, MASK = f"{CHILD_NAME}.offset", f"{CHILD_NAME}.mask"
METADATA_KEY = "lightning_calibft"  # what a file says about its calibration, stored with the weights
SAFETENSORS = ".safetensors"
GRAPHS = (".onnx", ".pt2")  # files of models with their code
LARGEST_JSON = 64 * 2**20  # bytes: the class ids of the widest heads take a few MiB


def parse_json(text: str | bytes) -> Any:
    """Parse JSON in which no name may appear twice.

    Raises:
        ValueError: If the text is not JSON, holds a name twice, or is nested too deeply.
    """
    try:
        return json.loads(text, object_pairs_hook=_once)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(entries := dict(pairs)) < len(pairs):
        raise ValueError("it holds a name twice")
    return entries


def check_path(name: str, value: object) -> None:
    """Raise if an argument is not a path."""
    if not isinstance(value, (str, os.PathLike)):
        raise TypeError(f"Expected argument `{name}` to be a path, a string or `pathlib.Path`, but got {value!r}.")


def expectations(calibration: Mapping[str, Any]) -> list[str]:
    """Return sentences that say what a gamma is expected to do, given what is known of its calibration."""
    gamma, sentences = calibration["gamma"], []
    if {"seen_change", "absent_change"} <= calibration.keys():
        seen, absent = (100 * calibration[key] for key in ("seen_change", "absent_change"))
        of_each = f"{seen:+.1f} points on seen samples, {absent:+.1f} on absent ones"
        sentences.append(f"expected change in accuracy: {of_each}")
    if "break_even_share" in calibration and gamma != 0:
        side, limit = "more" if gamma > 0 else "less", calibration["break_even_share"]
        told = f" (it is for {calibration['absent_share']:.1%})" if "absent_share" in calibration else ""
        sentences.append(f"gamma pays if {side} than {limit:.1%} of the samples are of absent classes{told}")
    if gamma < 0:
        sentences.append("gamma is negative: the model predicts absent classes even less often than without it")
    return sentences


def expected_harm(calibration: Mapping[str, Any]) -> str:
    """Return a warning if a gamma is expected to do harm at the share of absent samples that was told, or ``""``."""
    gamma, share, limit = (calibration.get(key) for key in ("gamma", "absent_share", "break_even_share"))
    if not gamma or share is None or limit is None or (share >= limit if gamma > 0 else share <= limit):
        return ""
    return (
        f"Gamma ({gamma:.3f}) is expected to do harm: at the share of absent samples that was told, {share:.1%}, it"
        f" costs more accuracy than it brings. It pays {'above' if gamma > 0 else 'below'} {limit:.1%}. It is in the"
        " model all the same. Check `absent_share`, or remove gamma with `lightning_calibft.detach(model)`."
    )
