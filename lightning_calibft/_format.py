"""What calibrated files have in common: names, paths and JSON. Nothing here imports torch."""

from __future__ import annotations

import json
import os
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
