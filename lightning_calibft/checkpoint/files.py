"""Reading and writing checkpoint files safely."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import shutil
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple
from uuid import uuid4

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lightning_calibft._arguments import StrPath, check_path

METADATA_KEY = "lightning_calibft"
SAFETENSORS = ".safetensors"


def read_checkpoint(path: StrPath, *, weights_only: bool) -> dict[str, Any]:
    """Load a checkpoint file onto the CPU, or say in one line why it cannot be.

    What a safetensors file holds comes under ``state_dict``, and its facts about the calibration under
    ``METADATA_KEY``, as in a checkpoint of Lightning.
    """
    check_path("path", path)
    if not os.path.exists(path):
        raise FileNotFoundError(f"Expected a checkpoint file, but {os.fspath(path)!r} does not exist.")
    if os.path.isdir(path):
        raise ValueError(
            f"Expected a checkpoint file, but {os.fspath(path)!r} is a directory. Consolidate a sharded checkpoint"
            " first, with `python -m lightning.fabric.utilities.consolidate_checkpoint FOLDER`."
        )
    if is_safetensors(path):
        return _read_safetensors(path)
    try:
        # timm's training script saves its arguments as a Namespace, which can run no code.
        with torch.serialization.safe_globals([argparse.Namespace]):
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


def is_safetensors(path: StrPath) -> bool:
    """Tell by its name whether a file is one of safetensors."""
    return Path(path).suffix == SAFETENSORS


def _read_safetensors(path: StrPath) -> dict[str, Any]:
    try:
        with safe_open(path, "pt") as file:
            state = OrderedDict((key, file.get_tensor(key)) for key in file.keys())  # noqa: SIM118
            facts = json.loads((file.metadata() or {}).get(METADATA_KEY, "{}"))
    except (SafetensorError, ValueError) as error:
        raise ValueError(
            f"Expected a checkpoint file, but {os.fspath(path)!r} is truncated or no safetensors file: {error}."
        ) from error
    return {"state_dict": state, METADATA_KEY: facts} if facts else {"state_dict": state}


def read_exported_facts(path: StrPath) -> dict[str, Any] | None:
    """Return what an exported graph or folder tells of its calibration; ``None`` for what is neither.

    Raises:
        ValueError: If it is damaged.
        ModuleNotFoundError: If the package ``onnx`` is missing for an ``.onnx`` file.
    """
    check_path("path", path)
    suffix, config = Path(path).suffix, Path(path, "config.json")
    try:
        if config.is_file():
            return dict(json.loads(config.read_text()).get(METADATA_KEY, {}))
        if suffix == ".pt2" and os.path.isfile(path):
            with zipfile.ZipFile(path) as archive:
                names = [name for name in archive.namelist() if name.endswith(f"{METADATA_KEY}.json")]
                return dict(json.loads(archive.read(names[0]))) if names else {}
        if suffix == ".onnx" and os.path.isfile(path):
            import onnx

            properties = onnx.load(os.fspath(path), load_external_data=False).metadata_props
            return dict(json.loads(next((item.value for item in properties if item.key == METADATA_KEY), "{}")))
    except (OSError, ModuleNotFoundError):
        raise
    except Exception as error:  # each library has its own for damaged files
        raise ValueError(f"Expected an exported model, but {os.fspath(path)!r} cannot be read: {error}.") from error
    return None


class Signature(NamedTuple):
    """What changes when a file is written anew."""

    modified: int
    size: int
    inode: int


class ReplacedError(Exception):
    """Something else has written or deleted a file in the meantime."""


def signature(path: StrPath) -> Signature | None:
    """Return the signature of a file, ``None`` if there is none."""
    try:
        stat = os.stat(path)
    except OSError:
        return None
    return Signature(stat.st_mtime_ns, stat.st_size, stat.st_ino)


def write_atomically(checkpoint: Mapping[str, Any], path: StrPath, replaces: Signature | None = None) -> None:
    """Write a file such that at every instant ``path`` holds what it held before, or all of ``checkpoint``.

    A safetensors file holds its state dict and its facts about the calibration only.

    Args:
        checkpoint: What to write.
        path: Where to write it.
        replaces: Of the file that it is made of, which alone it may take the place of. ``None``: of any.

    Raises:
        ReplacedError: If there is another file by now, or none; it is as it was.
    """

    def write(file: BinaryIO) -> None:
        if is_safetensors(path):
            file.write(_to_safetensors(checkpoint))
        else:
            torch.save(checkpoint, file)

    replace_atomically(path, write, replaces)


def replace_atomically(path: StrPath, write: Callable[[BinaryIO], object], replaces: Signature | None = None) -> None:
    """Let ``write`` fill a file beside ``path`` that takes its place once it is on the disk."""
    target = Path(os.path.realpath(path))  # a link stays a link
    temporary = target.with_name(f".{uuid4().hex}.tmp")
    try:
        with open(temporary, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if target.exists():
            shutil.copymode(target, temporary)
        if replaces is not None and signature(target) != replaces:
            raise ReplacedError(os.fspath(path))
        os.replace(temporary, target)
    except BaseException:
        with suppress(FileNotFoundError):
            temporary.unlink()
        raise
    _sync_folder(target.parent)


@contextmanager
def new_folder(path: StrPath) -> Iterator[Path]:
    """Give a folder to fill that becomes ``path`` in the end; after an exception nothing is left of it.

    Raises:
        FileExistsError: If there is something at ``path`` already, other than an empty folder.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise FileExistsError(
            f"Expected argument `destination` to be a new folder, but {os.fspath(path)!r} exists. Remove it, or choose"
            " another name."
        )
    temporary = target.with_name(f".{uuid4().hex}.tmp")
    try:
        temporary.mkdir()
        yield temporary
        os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _sync_folder(target.parent)


def _to_safetensors(checkpoint: Mapping[str, Any]) -> bytes:
    if others := [(key, value) for key, value in checkpoint["state_dict"].items() if not isinstance(value, Tensor)]:
        raise ValueError(
            f"Expected a state dict of tensors for a file of safetensors, but {others[0][0]!r} in it is a"
            f" {type(others[0][1]).__name__}. Name the file .ckpt or .pth."
        )
    # Each tensor on its own: safetensors refuses those that share memory, as tied weights do.
    state = {key: value.detach().clone().contiguous() for key, value in checkpoint["state_dict"].items()}
    facts = checkpoint.get(METADATA_KEY)
    return save(state, {"format": "pt", **({METADATA_KEY: json.dumps(facts)} if facts else {})})


def _sync_folder(folder: Path) -> None:
    """Make the renaming itself survive a loss of power, where the system can open a folder."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
