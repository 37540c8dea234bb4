"""Reading and writing checkpoint files safely."""

from __future__ import annotations

import os
import pickle
import shutil
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch

StrPath = str | os.PathLike[str]


def read_checkpoint(path: StrPath, *, weights_only: bool) -> dict[str, Any]:
    """Load a checkpoint file onto the CPU, or say in one line why it cannot be."""
    if not os.path.exists(path):
        raise FileNotFoundError(f"Expected a checkpoint file, but {os.fspath(path)!r} does not exist.")
    if os.path.isdir(path):
        raise ValueError(
            f"Expected a checkpoint file, but {os.fspath(path)!r} is a directory. Sharded checkpoints must be"
            " consolidated first."
        )
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=weights_only)
    except PermissionError:
        raise
    except Exception as error:  # a damaged file can raise anything
        if not zipfile.is_zipfile(path):
            raise ValueError(
                f"Expected a checkpoint file, but {os.fspath(path)!r} is truncated or no PyTorch file."
            ) from error
        if not weights_only or not isinstance(error, pickle.UnpicklingError):
            raise ValueError(f"Expected a checkpoint file, but {os.fspath(path)!r} cannot be read: {error}.") from error
        raise ValueError(
            f"Expected a checkpoint of tensors and plain values, but {os.fspath(path)!r} holds other Python objects,"
            " which can run code when they are loaded. If you trust the file, pass `weights_only=False`."
        ) from error
    if not isinstance(checkpoint, dict):
        raise ValueError(
            f"Expected a checkpoint with a state dict, but {os.fspath(path)!r} holds a {type(checkpoint).__name__}."
        )
    return checkpoint


def write_atomically(checkpoint: Mapping[str, Any], path: StrPath) -> None:
    """Write a file such that at every instant ``path`` holds what it held before, or all of ``checkpoint``."""
    target = Path(os.path.realpath(path))  # a link stays a link
    temporary = target.with_name(f".{uuid4().hex}.tmp")
    try:
        with open(temporary, "xb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        if target.exists():
            shutil.copymode(target, temporary)
        os.replace(temporary, target)
    except BaseException:
        with suppress(FileNotFoundError):
            temporary.unlink()
        raise
    _sync_folder(target.parent)


def _sync_folder(folder: Path) -> None:
    """Make the renaming itself survive a loss of power, where the system can open a folder."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
