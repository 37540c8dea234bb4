"""Read and calibrate the weights in a folder that ``save_pretrained`` of transformers or PEFT has written."""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_calibft._format import CHILD_NAME, OFFSET, StrPath, check_path
from lightning_calibft.calibration.result import CalibrationResult
from lightning_calibft.checkpoint.files import read_checkpoint, replace_atomically, write_weights
from lightning_calibft.checkpoint.metadata import parse_metadata
from lightning_calibft.checkpoint.state import calibration_metadata, state_dict_of, versions

# In the order in which transformers looks for them. An index lists the files of weights that are split.
_INDEX = ".index.json"
_NAMES = (
    "model.safetensors",
    f"model.safetensors{_INDEX}",
    "pytorch_model.bin",
    f"pytorch_model.bin{_INDEX}",
    "adapter_model.safetensors",
    "adapter_model.bin",
)


def read_folder(folder: StrPath) -> tuple[OrderedDict[str, Tensor], dict[str, Any]]:
    """Return the state dict in a folder, of all its files, and its calibration metadata.

    Raises:
        FileNotFoundError: If the folder or a file of its weights is missing.
        ValueError: If a file is not one of weights.
    """
    state, metadata = OrderedDict[str, Tensor](), dict[str, Any]()
    for path in _files(folder):
        checkpoint = read_checkpoint(path, weights_only=True)
        state.update(state_dict_of(checkpoint, path))
        metadata.update(calibration_metadata(checkpoint, path))
    return state, metadata


def load_pretrained(model_class: Any, folder: StrPath, **kwargs: Any) -> Any:
    """Return what ``model_class.from_pretrained(folder)`` returns, strictly, and without a word about the calibration.

    Args:
        model_class: A class of transformers or PEFT that has ``from_pretrained``.
        folder: The folder.
        kwargs: Further arguments of ``from_pretrained``.

    Raises:
        ValueError: If the weights do not fit the model. PEFT does not tell.
    """
    with silent_transformers():  # it would report the calibration's entries as unexpected
        if model_class.__module__.startswith("peft."):
            return model_class.from_pretrained(folder, **kwargs)
        model, report = model_class.from_pretrained(folder, output_loading_info=True, **kwargs)
    told = [str(key) for kind in ("missing", "unexpected", "mismatched") for key in report[f"{kind}_keys"]]
    if wrong := [key for key in told if CHILD_NAME not in key]:
        raise ValueError(
            f"Expected {os.fspath(folder)!r} to hold the weights of a {type(model).__name__}, but {wrong[0]!r} is"
            " missing, unknown or of another shape. Pass the class that was trained."
        )
    return model


@contextmanager
def silent_transformers() -> Iterator[None]:
    """Let transformers show no progress bars and report no more than errors in the block."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def write_calibration(folder: StrPath, entries: Mapping[str, Tensor], result: CalibrationResult) -> None:
    """Put gamma into the weights in a folder, next to those of the head. All other weights stay as they are.

    At every instant the folder is one that loads, with gamma or without it.

    Args:
        folder: The folder.
        entries: The calibration's entries of the state dict, by their names in the folder.
        result: What is stored as the calibration metadata.

    Raises:
        FileNotFoundError: If the folder or a file of its weights is missing.
        ValueError: If a file is not one of weights.
    """
    heads = tuple(key.removesuffix(OFFSET) for key in entries if key.endswith(OFFSET))
    for path in reversed(_files(folder)):
        checkpoint = read_checkpoint(path, weights_only=True)
        state = state_dict_of(checkpoint, path)
        if any(key.startswith(heads) for key in state):
            break
    state.update(entries)
    write_weights(state, {**result.as_dict(), **versions()}, path)
    if (index := _index(folder)) is not None:
        content = _read_index(index)
        added = [value.nbytes for key, value in entries.items() if key not in content["weight_map"]]
        content["weight_map"].update(dict.fromkeys(entries, path.name))
        if "total_size" in content.get("metadata", {}):
            content["metadata"]["total_size"] += sum(added)
        text = json.dumps(content, indent=2, sort_keys=True) + "\n"
        replace_atomically(index, lambda file: file.write(text.encode()))


def _first(folder: StrPath) -> Path:
    """Return the file of the weights in a folder, or their index."""
    check_path("path", folder)
    found = next((path for name in _NAMES if (path := Path(folder, name)).is_file()), None)
    if found is None:
        raise FileNotFoundError(
            f"Expected a folder that `save_pretrained` has written, but {os.fspath(folder)!r} has none of"
            f" {', '.join(_NAMES)}."
        )
    return found


def _index(folder: StrPath) -> Path | None:
    """Return the index of the weights in a folder, or ``None`` if they are in one file."""
    first = _first(folder)
    return first if first.name.endswith(_INDEX) else None


def _files(folder: StrPath) -> list[Path]:
    """Return the files of the weights in a folder."""
    if (index := _index(folder)) is None:
        return [_first(folder)]
    return [Path(folder, name) for name in sorted(set(_read_index(index)["weight_map"].values()))]


def _read_index(path: Path) -> dict[str, Any]:
    """Return the content of an index, which says in which file each weight is."""
    content: Any = parse_metadata(path.read_bytes(), path)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    names = weight_map.values() if isinstance(weight_map, dict) else ()
    if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise ValueError(f"Expected {os.fspath(path)!r} to name files of weights beside it, but it does not.")
    return dict(content)
