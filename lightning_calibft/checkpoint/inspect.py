"""Read what a file says about its calibration. Nothing here imports torch unless a file needs it."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning_calibft._format import LARGEST_JSON, MASK, METADATA_KEY, OFFSET, StrPath, check_path
from lightning_calibft.checkpoint.files import (
    check_is_file,
    is_safetensors,
    read_checkpoint,
    read_config,
    weight_files,
)
from lightning_calibft.checkpoint.metadata import check_entries, check_metadata, parse_metadata


def inspect_checkpoint(path: StrPath, *, use_ema: bool | None = None, weights_only: bool = True) -> dict[str, Any]:
    """Return whether a checkpoint is calibrated, and how.

    Args:
        path: A checkpoint from Lightning or timm's training script, a plain state dict, a file or folder written by
            :func:`~lightning_calibft.export`, or a timm or transformers folder with a ``config.json`` and weights.
        use_ema: As in :func:`~lightning_calibft.fold_checkpoint`.
        weights_only: As in :func:`load_calibrated`.

    Returns:
        Plain Python values: ``calibrated`` and ``folded`` (bools), ``heads`` (dotted names) and, as far as the
        file stores them, ``gamma``, ``standard_error``, ``num_samples``, ``estimator``, ``num_classes``,
        ``seen_classes``, ``absent_classes``, ``absent_share``, ``seen_accuracy``, ``seen_change``, ``absent_change``,
        ``break_even_share``, ``verdict``, ``held_out``, ``share_table`` (see
        :class:`~lightning_calibft.CalibrationResult`), ``version`` (of this package), ``torch_version`` and
        ``lightning_version``.

    Raises:
        FileNotFoundError: If ``path`` does not exist.
        ValueError: If the file is not a checkpoint, needs ``weights_only=False``, or stores an impossible calibration.

    Example::

        inspect_checkpoint("checkpoints/best.ckpt")["gamma"]
    """
    check_path("path", path)
    if Path(path, "config.json").is_file():
        return _inspect_folder(Path(path), use_ema, weights_only)
    check_is_file(path)
    if is_safetensors(path):
        return _inspect_safetensors([path])
    if Path(path).suffix in (".pt2", ".onnx"):
        return _information({}, _metadata_of_graph(path), path)
    from lightning_calibft.checkpoint.state import (
        LIGHTNING_VERSION,
        calibration_metadata,
        choose_weights,
        state_dict_of,
    )

    checkpoint = choose_weights(read_checkpoint(path, weights_only=weights_only), path, use_ema)
    entries = {key: value for key, value in state_dict_of(checkpoint, path).items() if key.endswith((OFFSET, MASK))}
    information = _information(entries, calibration_metadata(checkpoint, path), path)
    if isinstance(checkpoint.get(LIGHTNING_VERSION), str):
        information["lightning_version"] = checkpoint[LIGHTNING_VERSION]
    return information


def _inspect_folder(folder: Path, use_ema: bool | None, weights_only: bool) -> dict[str, Any]:
    """Look into the weights of a folder, and into its ``config.json`` if the weights hold no gamma."""
    files = weight_files(folder)
    if files and is_safetensors(files[0]):
        weights = [_inspect_safetensors(files)]
    else:
        weights = [inspect_checkpoint(path, use_ema=use_ema, weights_only=weights_only) for path in files]
    for information in weights:
        if information["calibrated"] or information["folded"]:
            return information
    return _information({}, check_metadata(read_config(folder).get(METADATA_KEY), folder), folder)


def _inspect_safetensors(paths: Iterable[StrPath]) -> dict[str, Any]:
    """Read only the calibration's entries, from one file or from all parts of a split one."""
    from safetensors import SafetensorError, safe_open

    entries: dict[str, Any] = {}
    file_metadata: dict[str, str] = {}
    path: StrPath = ""
    for path in paths:
        check_is_file(path)
        try:
            with safe_open(path, "numpy") as file:
                file_metadata.update(file.metadata() or {})
                keys = [key for key in file.keys() if key.endswith((OFFSET, MASK))]  # noqa: SIM118
                if twice := entries.keys() & keys:
                    raise ValueError(f"another file beside it holds {min(twice)!r} too. Inspect each file on its own")
                needs_torch = any(file.get_slice(key).get_dtype() == "BF16" for key in keys)
            with safe_open(path, "pt" if needs_torch else "numpy") as file:
                entries.update({key: file.get_tensor(key) for key in keys})
        except (SafetensorError, TypeError, ValueError) as error:  # TypeError: a dtype that neither library knows
            raise ValueError(
                f"Expected a checkpoint file, but {os.fspath(path)!r} is truncated or not a safetensors file: {error}."
            ) from error
    metadata = parse_metadata(file_metadata.get(METADATA_KEY, "{}"), path)
    return _information(entries, check_metadata(metadata, path), path)


def _metadata_of_graph(path: StrPath) -> dict[str, Any]:
    text: str | bytes = "{}"
    try:
        if Path(path).suffix == ".onnx":
            import onnx

            properties = onnx.load(os.fspath(path), load_external_data=False).metadata_props
            text = next((item.value for item in properties if item.key == METADATA_KEY), text)
        else:
            with zipfile.ZipFile(path) as archive:
                members = [member for member in archive.infolist() if member.filename.endswith(f"{METADATA_KEY}.json")]
                if members and members[0].file_size > LARGEST_JSON:
                    raise ValueError(f"its metadata unpacks to {members[0].file_size / 2**30:.1f} GiB")
                text = archive.read(members[0]) if members else text
    except (OSError, ModuleNotFoundError):
        raise
    except Exception as error:  # each library has its own errors for damaged files
        raise ValueError(f"Expected an exported model, but {os.fspath(path)!r} cannot be read: {error}.") from error
    return check_metadata(parse_metadata(text, path), path)


def _information(entries: Mapping[str, Any], metadata: Mapping[str, Any], path: StrPath) -> dict[str, Any]:
    """Merge the entries in the state dict with the metadata. The entries win, because they produce the logits."""
    information: dict[str, Any] = {"calibrated": False, "folded": False, "heads": [], **metadata}
    for prefix in dict.fromkeys(key.removesuffix(MASK).removesuffix(OFFSET) for key in entries):
        head = prefix.rstrip(".")
        gamma, mask = check_entries(head, entries.get(prefix + OFFSET), entries.get(prefix + MASK), path)
        if any(mask):
            information["calibrated"] = True
            information["heads"].append(head)
            information["gamma"] = gamma
            information["num_classes"] = len(mask)
            information["absent_classes"] = [row for row, absent in enumerate(mask) if absent]
    return information
