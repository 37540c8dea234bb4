"""The names of a calibration in state dicts and files. Nothing here imports torch."""

from __future__ import annotations

import os

StrPath = str | os.PathLike[str]

CHILD_NAME = "absent_class_calibration"  # the module inside the head that calibrates it
OFFSET, MASK = f"{CHILD_NAME}.offset", f"{CHILD_NAME}.mask"
METADATA_KEY = "lightning_calibft"  # what a file says about its calibration, stored with the weights
SAFETENSORS = ".safetensors"
GRAPHS = (".onnx", ".pt2")  # files of models with their code


def check_path(name: str, value: object) -> None:
    """Raise if an argument is not a path."""
    if not isinstance(value, (str, os.PathLike)):
        raise TypeError(f"Expected argument `{name}` to be a path, a string or `pathlib.Path`, but got {value!r}.")
