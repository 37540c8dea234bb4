"""What names a calibration has in state dicts and files. Nothing here imports torch."""

from __future__ import annotations

import os

StrPath = str | os.PathLike[str]

CHILD_NAME = "absent_class_calibration"  # of the module that calibrates, in its head
OFFSET, MASK = f"{CHILD_NAME}.offset", f"{CHILD_NAME}.mask"
METADATA_KEY = "lightning_calibft"  # of what a file tells about its calibration, beside the weights
SAFETENSORS = ".safetensors"


def check_path(name: str, value: object) -> None:
    """Raise if an argument cannot be the path of a file."""
    if not isinstance(value, (str, os.PathLike)):
        raise TypeError(f"Expected argument `{name}` to be a path, a string or `pathlib.Path`, but got {value!r}.")
