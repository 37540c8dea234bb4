"""Reading and writing checkpoint files safely."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import re
import shutil
import tempfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple
from uuid import uuid4

from lightning_calibft._format import LARGEST_JSON, METADATA_KEY, SAFETENSORS, StrPath, check_path
from lightning_calibft.checkpoint.metadata import parse_metadata

# torch does not compress the members of its zip archives, so a file that unpacks to many times its size is forged.
_LARGEST_UNPACKED, _LARGEST_RATIO = 64 * 2**20, 10

# How transformers and accelerate name the files of a checkpoint that they split.
_PART = re.compile(r"-\d+-of-(?!0*1\.)\d+\.")
_JOIN = 'Write it into one file first, with `save_pretrained(FOLDER, max_shard_size="1TB")`.'

_DTYPES = {  # what safetensors calls the types of torch
    **{f"torch.float{bits}": f"F{bits}" for bits in (16, 32, 64)},
    **{f"torch.int{bits}": f"I{bits}" for bits in (8, 16, 32, 64)},
    **{f"torch.uint{bits}": f"U{bits}" for bits in (8, 16, 32, 64)},
    "torch.bool": "BOOL",
    "torch.bfloat16": "BF16",
    "torch.float8_e4m3fn": "F8_E4M3",
    "torch.float8_e5m2": "F8_E5M2",
    "torch.complex64": "C64",
}


def read_checkpoint(path: StrPath, *, weights_only: bool) -> dict[str, Any]:
    """Load a checkpoint file onto the CPU, or raise an error that says in one line why that is not possible.

    The tensors of a safetensors file are returned under ``state_dict`` and its calibration metadata under
    ``METADATA_KEY``, as in a Lightning checkpoint.
    """
    check_is_file(path)
    if is_safetensors(path):
        return _read_safetensors(path)
    import torch

    try:
        if weights_only:
            _check_unpacked_size(path)
        # timm's training script saves its arguments as a Namespace, which cannot run code.
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = torch.load(path, map_location="cpu", weights_only=weights_only)
        if weights_only:
            _check_expanded_size(checkpoint)
    except PermissionError:
        raise
    except Exception as error:  # a damaged file can raise anything
        if not zipfile.is_zipfile(path):
            raise ValueError(
                f"Expected a checkpoint file, but {os.fspath(path)!r} is truncated or not a PyTorch file."
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


def check_is_file(path: StrPath) -> None:
    """Raise if ``path`` is not a regular file: it is missing, a folder, or something like a pipe, which never ends."""
    check_path("path", path)
    if not os.path.exists(path):
        raise FileNotFoundError(f"Expected a checkpoint file, but {os.fspath(path)!r} does not exist.")
    if os.path.isdir(path):
        remedy = "Consolidate a sharded checkpoint first, with `python -m lightning.fabric.utilities."
        remedy += "consolidate_checkpoint FOLDER`."
        if weights := sorted(Path(path).glob(f"*{SAFETENSORS}")):
            is_part = _PART.search(weights[0].name)
            remedy = _JOIN if is_part else f"Name the file in it, such as {str(weights[0])!r}."
        raise ValueError(f"Expected a checkpoint file, but {os.fspath(path)!r} is a directory. {remedy}")
    if not os.path.isfile(path):
        raise ValueError(f"Expected a checkpoint file, but {os.fspath(path)!r} is a device, a pipe or a socket.")


def check_is_whole(path: StrPath) -> None:
    """Raise if the name of a file says that it is one of several that a checkpoint is split into."""
    check_path("path", path)
    if _PART.search(Path(path).name):
        raise ValueError(f"Expected a whole checkpoint file, but {os.fspath(path)!r} is a part of one. {_JOIN}")


def check_differs(destination: StrPath, name: str, source: StrPath) -> None:
    """Raise if the file to write is the one that the argument ``name`` names, or a link to it."""
    if os.path.realpath(source) == os.path.realpath(destination):
        raise ValueError(
            f"Expected argument `destination` to differ from `{name}`, but both are {os.fspath(source)!r}. It cannot be"
            f" undone: keep the {'calibrated file' if name == 'source' else 'original weights'}."
        )


def check_destination_file(path: StrPath) -> None:
    """Raise if no file can be written to ``path``: its folder is missing, or something other than a file is there."""
    _check_parent(path)
    if os.path.isdir(path):
        raise IsADirectoryError(
            f"Expected argument `destination` to be a file, but {os.fspath(path)!r} is a directory."
        )
    _check_replaceable(path)


def check_destination_folder(path: StrPath) -> None:
    """Raise if no folder can be created at ``path``: something else is there, or the parent folder is missing."""
    _check_parent(path)
    target = Path(path)
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise FileExistsError(
            f"Expected argument `destination` to be a new folder, but {os.fspath(path)!r} exists. Remove it, or choose"
            " another name."
        )


def _check_parent(path: StrPath) -> None:
    check_path("destination", path)
    with suppress(FileNotFoundError):
        os.lstat(path)  # raises if the name is too long
    folder = Path(os.path.realpath(path)).parent
    if not folder.is_dir():
        raise FileNotFoundError(
            f"Expected argument `destination` to be in an existing directory, but there is no {os.fspath(folder)!r}."
        )
    with tempfile.TemporaryFile(dir=folder):  # raises if no file can be created there
        pass


def _check_replaceable(path: StrPath) -> None:
    if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
        raise ValueError(
            f"Expected the name of a file to write, but {os.fspath(path)!r} is a device, a pipe or a socket. It was"
            " left unchanged."
        )


def is_safetensors(path: StrPath) -> bool:
    """Return whether a file is a safetensors file, judging by its name."""
    return Path(path).suffix == SAFETENSORS


def _check_unpacked_size(path: StrPath) -> None:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(member.file_size for member in archive.infolist())
        if unpacked > max(_LARGEST_UNPACKED, _LARGEST_RATIO * os.path.getsize(path)):
            raise ValueError(f"it unpacks to {unpacked / 2**30:.1f} GiB, many times its size")


def _check_expanded_size(checkpoint: Any) -> None:
    """Raise if tensors repeat what is stored so often that copying them would take many times the memory."""
    import torch

    for state in (checkpoint, *checkpoint.values()) if isinstance(checkpoint, dict) else ():
        tensors = state.values() if isinstance(state, dict) else ()
        plain = [value for value in tensors if type(value) is torch.Tensor and value.layout == torch.strided]
        stored = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in plain}
        needed = sum(value.nbytes for value in plain)
        if needed > max(_LARGEST_UNPACKED, _LARGEST_RATIO * sum(stored.values())):
            raise ValueError(f"its tensors take {needed / 2**30:.1f} GiB, many times what is stored")


def _read_safetensors(path: StrPath) -> dict[str, Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            state = OrderedDict((key, file.get_tensor(key)) for key in file.keys())  # noqa: SIM118
            file_metadata = file.metadata() or {}
    except (SafetensorError, ValueError) as error:
        raise ValueError(
            f"Expected a checkpoint file, but {os.fspath(path)!r} is truncated or not a safetensors file: {error}."
        ) from error
    # `safetensors.torch.save_model` keeps only one name of a shared tensor, and lists the others in the metadata.
    state.update({name: state[kept] for name, kept in file_metadata.items() if kept in state and name not in state})
    metadata = parse_metadata(file_metadata.get(METADATA_KEY, "{}"), path)
    return {"state_dict": state, METADATA_KEY: metadata} if metadata else {"state_dict": state}


def weight_files(folder: Path) -> list[Path]:
    """Return the files of weights in a folder of timm or transformers. Loaders prefer safetensors."""
    others = (path for path in sorted(folder.iterdir()) if path.suffix in (".bin", ".pth", ".pt", ".ckpt"))
    return sorted(folder.glob(f"*{SAFETENSORS}")) or sorted(folder.glob("pytorch_model*.bin")) or list(others)


def read_config(folder: Path) -> dict[str, Any]:
    """Return the entries of the ``config.json`` in a folder of timm or transformers."""
    path = folder / "config.json"
    if path.stat().st_size > LARGEST_JSON:
        raise ValueError(f"Expected a small file, but {os.fspath(path)!r} takes {path.stat().st_size / 2**30:.1f} GiB.")
    config = parse_metadata(path.read_bytes(), folder)
    return config if isinstance(config, dict) else {}


class Signature(NamedTuple):
    """Properties of a file that change when it is written again."""

    modified: int
    size: int
    inode: int


class ReplacedError(Exception):
    """Raised if something else has written or deleted a file in the meantime."""


def signature(path: StrPath) -> Signature | None:
    """Return the signature of a file, or ``None`` if the file does not exist."""
    try:
        stat = os.stat(path)
    except OSError:
        return None
    return Signature(stat.st_mtime_ns, stat.st_size, stat.st_ino)


def write_atomically(checkpoint: dict[str, Any], path: StrPath, replaces: Signature | None = None) -> None:
    """Write a file so that at every instant ``path`` holds either its old content or all of ``checkpoint``.

    A safetensors file stores only the state dict and the calibration metadata.

    Args:
        checkpoint: The content to write.
        path: Where to write it.
        replaces: Signature of the file that may be replaced. ``None``: any file may be replaced.

    Raises:
        ReplacedError: If the file at ``path`` no longer has this signature. It is left unchanged.
    """

    def write(file: BinaryIO) -> None:
        if is_safetensors(path):
            _write_safetensors(checkpoint, file)
        else:
            import torch

            torch.save(checkpoint, file)

    replace_atomically(path, write, replaces)


def write_weights(state: Any, metadata: dict[str, Any], path: StrPath) -> None:
    """Write a state dict, and its calibration metadata where loaders ignore it."""
    if is_safetensors(path):
        write_atomically({"state_dict": state, METADATA_KEY: metadata}, path)
    else:
        state._metadata[METADATA_KEY] = metadata
        write_atomically(state, path)


def replace_atomically(path: StrPath, write: Callable[[BinaryIO], object], replaces: Signature | None = None) -> None:
    """Let ``write`` fill a temporary file next to ``path`` that replaces it once it is on the disk."""
    _check_replaceable(path)
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
    """Yield a temporary folder that becomes ``path`` at the end. After an exception it is deleted.

    Raises:
        FileExistsError: If something other than an empty folder already exists at ``path``.
    """
    check_destination_folder(path)
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{uuid4().hex}.tmp")
    try:
        temporary.mkdir()
        yield temporary
        mode = temporary.stat().st_mode & 0o666  # follow the umask: safetensors makes files readable by the owner only
        for file in temporary.rglob("*"):
            if file.is_file():
                file.chmod(mode)
        os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _sync_folder(target.parent)


def _write_safetensors(checkpoint: dict[str, Any], file: BinaryIO) -> None:
    """Write the state dict and the calibration metadata, one tensor after the other.

    The functions of safetensors need twice the size of all tensors in memory. The format is a header of JSON and its
    length, and then the tensors, the widest types first, so that each is aligned
    (https://huggingface.co/docs/safetensors).
    """
    import torch

    state, metadata = checkpoint["state_dict"], checkpoint.get(METADATA_KEY)
    header: dict[str, Any] = {
        "__metadata__": {"format": "pt", **({METADATA_KEY: json.dumps(metadata)} if metadata else {})}
    }
    end = 0
    for key, value in state.items():
        if not isinstance(value, torch.Tensor):
            raise ValueError(
                f"Expected a state dict of tensors for a safetensors file, but its entry {key!r} is a"
                f" {type(value).__name__}. Name the file .ckpt or .pth."
            )
        if str(value.dtype) not in _DTYPES:
            raise ValueError(
                f"Expected a state dict of plain tensors for a safetensors file, but its entry {key!r} has the dtype"
                f" {value.dtype}. Name the file .ckpt or .pth."
            )
    keys = sorted(state, key=lambda key: -state[key].element_size())
    for key in keys:
        start, end = end, end + state[key].nbytes
        dtype = _DTYPES[str(state[key].dtype)]
        header[key] = {"dtype": dtype, "shape": list(state[key].shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for key in keys:
        file.write(state[key].detach().cpu().contiguous().flatten().view(torch.uint8).numpy())


def _sync_folder(folder: Path) -> None:
    """Make the renaming survive a power failure, on systems that can open a folder."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
