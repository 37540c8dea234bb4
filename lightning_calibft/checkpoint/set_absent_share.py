"""Give a calibrated model the gamma for another share of samples of absent classes, without data."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_calibft._arguments import check_absent_share
from lightning_calibft._format import GRAPHS, METADATA_KEY, OFFSET, StrPath, check_path, verdict
from lightning_calibft.checkpoint.files import (
    check_destination_file,
    check_destination_folder,
    check_differs,
    check_is_whole,
    new_folder,
    read_checkpoint,
    read_config,
    replace_atomically,
    weight_files,
    write_atomically,
)
from lightning_calibft.checkpoint.metadata import check_metadata
from lightning_calibft.checkpoint.state import calibration_metadata, heads_of, is_state_dict, state_dict_of, state_key
from lightning_calibft.functional.share_table import ShareTable
from lightning_calibft.head.find import find_head
from lightning_calibft.head.fold import folded_biases, shift_biases
from lightning_calibft.head.layers import as_tuple, head_names
from lightning_calibft.head.offset import (
    attached_heads,
    folded_heads,
    keep_folded_record,
    offset_of,
    record_of,
)
from lightning_calibft.split import ClassSplit


def set_absent_share(
    model_or_path: nn.Module | StrPath,
    absent_share: float | Tensor,
    destination: StrPath | None = None,
    *,
    weights_only: bool = True,
) -> None:
    """Set gamma to that of a calibration for another share of samples of absent classes. It needs no data.

    A calibration keeps a table of gamma over shares, see :class:`~lightning_calibft.CalibrationResult`. Between the
    shares of the table, gamma is interpolated. It is exact for ``"alg"``, and within 0.01 logits of a fresh calibration
    for ``"pseudo_absent"`` in the recorded runs. For ``"operating_point"``, whose gamma jumps, it is between those of
    the shares above and below. The accuracies that are expected, the break-even share and the verdict change along with
    it. The standard error does not hold for other shares and is left out.

    In a folded model or file, the bias of the head changes by the difference to the gamma that it was folded with.
    Other processes are not asked: in a process group, change models on all processes, and write files on one.

    Args:
        model_or_path: A calibrated model that was changed by this package, or loaded by it or by transformers; or a
            file or folder that this package has calibrated, folded or exported: a ``.ckpt``, ``.pth`` or
            ``.safetensors`` file, or a folder of timm or transformers.
        absent_share: The share of samples of absent classes that the model will meet, from 0.001 to 0.999.
        destination: For a file or a folder, the new one to write, of the same kind. It appears complete or not at all.
            For a model: ``None``.
        weights_only: As in :func:`~lightning_calibft.load_calibrated`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the share is out of range; if the model or file is not calibrated, or its calibration knows no
            other shares, or has been changed since; if a folded head cannot be told from other layers; or if
            ``destination`` does not fit.
        TypeError: If an argument is of the wrong type.

    Example:
        >>> import torch
        >>> from lightning_calibft import calibrate, get_gamma, set_absent_share
        >>> model, data = torch.nn.Linear(8, 4), [(torch.randn(32, 8), torch.randint(2, (32,)))]
        >>> result = calibrate(model, data, progress=False)
        >>> set_absent_share(model, 0.75)
        >>> round(get_gamma(model) - result.gamma, 4)  # the log-odds of 3 : 1
        1.0986
    """
    share = check_absent_share(absent_share)
    if share is None:
        raise TypeError("Expected argument `absent_share` to be a number in (0, 1), but got None.")
    if isinstance(model_or_path, nn.Module):
        if destination is not None:
            raise ValueError(
                f"Expected argument `destination` to be None for a model, which is changed in place, but got"
                f" {destination!r}. Write it with `export(model, ...)`."
            )
        _change_model(model_or_path, share)
        return
    check_path("model_or_path", model_or_path)
    if destination is None:
        raise ValueError(
            f"Expected argument `destination` to name the file to write, but got None. {os.fspath(model_or_path)!r}"
            " itself is left as it is."
        )
    check_path("destination", destination)
    check_differs(destination, "model_or_path", model_or_path)
    change = _change_folder if Path(model_or_path, "config.json").is_file() else _change_file
    change(Path(model_or_path), share, Path(destination), weights_only)


def _at_share(record: Mapping[str, Any], absent_share: float, where: str) -> dict[str, Any]:
    """Return what is known of the gamma for another share."""
    expected = f"Expected {where} to hold a table of gamma over shares of absent samples,"
    if "gamma" not in record:
        raise ValueError(
            f"{expected} but it does not say how its gamma was found. Calibrate it again, or take the file that the"
            " calibration has written."
        )
    if "share_table" not in record:
        estimator = record.get("estimator")
        found = "an older release" if estimator not in ("fixed", "pcv") else f"the estimator {estimator!r}"
        raise ValueError(
            f"{expected} but its gamma was found by {found}, which knows none. Calibrate again, with the estimator"
            " 'alg', 'pseudo_absent' or 'operating_point', or set gamma yourself."
        )
    row = ShareTable.from_dict(record["share_table"]).at(absent_share)
    of_share = ("gamma", "absent_share", "seen_change", "absent_change", "break_even_share")
    kept = {
        key: value for key, value in record.items() if key not in (*of_share, "standard_error", "absent_share_interval")
    }
    changed = {**kept, **{key: row[key] for key in of_share if key in row}}
    return {**changed, "verdict": verdict(changed)[0]}


def _change_model(model: nn.Module, share: float) -> None:
    """Set the gamma of an attached model, or shift the bias of a folded one."""
    heads = [module for module in attached_heads(model).values() if offset_of(module).gamma() is not None]
    if heads:
        records = [record_of(module) for module in heads]
        changed = _at_share(next((each for each in records if not each), records[0]), share, "the model")
        split = ClassSplit(*(changed[key] for key in ("num_classes", "seen_classes", "absent_classes")))
        for module in heads:
            offset_of(module).set(changed["gamma"], split, changed)
        return
    folded = folded_heads(model)
    configs = [getattr(module, "config", None) for module in model.modules()]
    config = next((each for each in configs if getattr(each, METADATA_KEY, None)), None)
    if not folded and config is None:
        raise ValueError(
            "Expected argument `model_or_path` to be a calibrated model, but got one without gamma, or whose head has"
            " it in its bias and does not say so. Pass the file that it was loaded from."
        )
    record = record_of(folded[0]) if folded else check_metadata(getattr(config, METADATA_KEY), "the model")
    changed = _at_share(record, share, "the model")
    heads = folded or list(as_tuple(find_head(model)))
    shift = _shift(record, changed)
    shift_biases(model, {f"{name}.".removeprefix("."): shift for name in head_names(model, tuple(heads))})
    for module in folded:
        keep_folded_record(module, changed)
    if config is not None:
        setattr(config, METADATA_KEY, changed)


def _shift(record: Mapping[str, Any], changed: Mapping[str, Any]) -> Tensor:
    """Return what the bias of each class changes by."""
    shift = torch.zeros(record["num_classes"], dtype=torch.float64)
    shift[record["absent_classes"]] = changed["gamma"] - record["gamma"]
    return shift


def _change_file(source: Path, share: float, destination: Path, weights_only: bool) -> None:
    check_destination_file(destination)
    check_is_whole(source)
    if source.suffix in GRAPHS:
        raise ValueError(
            f"Expected a file of weights, but {os.fspath(source)!r} holds the code of the model too. Change the share"
            " in the file that it was exported from, and export that again."
        )
    if destination.suffix != source.suffix:
        raise ValueError(
            f"Expected argument `destination` to end in {source.suffix!r}, as {os.fspath(source)!r} does, but got"
            f" {os.fspath(destination)!r}. Convert the file with `fold_checkpoint` or `calibft export` afterwards."
        )
    checkpoint = read_checkpoint(source, weights_only=weights_only)
    state_dict_of(checkpoint, source)  # raises if there is none
    metadata = calibration_metadata(checkpoint, source)
    changed = _at_share(metadata, share, repr(os.fspath(source)))
    _change_weights([checkpoint], metadata, changed, source)
    _put_metadata(checkpoint, changed)
    write_atomically(checkpoint, destination)


def _change_folder(source: Path, share: float, destination: Path, weights_only: bool) -> None:
    if source.resolve() in destination.resolve().parents:
        raise ValueError(
            f"Expected argument `destination` to be outside {os.fspath(source)!r}, but got {os.fspath(destination)!r}."
        )
    check_destination_folder(destination)
    config = read_config(source)
    files = sorted({*weight_files(source), *source.glob("pytorch_model*.bin")})  # someone may load either
    checkpoints = {path.name: read_checkpoint(path, weights_only=weights_only) for path in files}
    known = [calibration_metadata(checkpoint, source / name) for name, checkpoint in checkpoints.items()]
    metadata = next(filter(None, known), None) or check_metadata(config.get(METADATA_KEY), source)
    changed = _at_share(metadata, share, repr(os.fspath(source)))
    _change_weights(checkpoints.values(), metadata, changed, source)
    with new_folder(destination) as folder:
        shutil.copytree(source, folder, dirs_exist_ok=True)
        for (name, checkpoint), told in zip(checkpoints.items(), known, strict=True):
            if told:
                _put_metadata(checkpoint, changed)
            write_atomically(checkpoint, folder / name)
        if METADATA_KEY in config:
            text = json.dumps({**config, METADATA_KEY: changed}, indent=2) + "\n"
            replace_atomically(folder / "config.json", lambda file: file.write(text.encode()))


def _change_weights(
    checkpoints: Iterable[dict[str, Any]], metadata: Mapping[str, Any], changed: Mapping[str, Any], path: Path
) -> None:
    """Change gamma in all state dicts of checkpoints, in place."""
    states = [state for checkpoint in checkpoints for state in _state_dicts(checkpoint)]
    if metadata.get("folded"):
        layers = [(state, prefix) for state in states for prefix in _layers(state, metadata["num_classes"])]
        if len(layers) != 1:
            raise ValueError(
                f"Expected {os.fspath(path)!r} to hold one layer of {metadata['num_classes']} classes with a bias, into"
                f" which gamma is folded, but got {[prefix.rstrip('.') for _, prefix in layers]}. Change the share in"
                " the file that it was made from, and fold that again."
            )
        ((state, prefix),) = layers
        tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
        shifts = {prefix: _shift(metadata, changed)}
        state.update(folded_biases(tensors, shifts, add_bias=False, where=f" in {os.fspath(path)!r}"))
        return
    heads = [(state, prefix, *head) for state in states for prefix, head in heads_of(state, path).items()]
    for _, prefix, gamma, mask in heads:
        absent = mask.nonzero().flatten().tolist()
        if absent != list(metadata["absent_classes"]) or not math.isclose(gamma, metadata["gamma"], rel_tol=1e-6):
            raise ValueError(
                f"Expected the head {prefix.rstrip('.')!r} in {os.fspath(path)!r} to have the gamma and the absent"
                " classes that its metadata describe, but it has others. Calibrate it again."
            )
    if not heads:
        raise ValueError(
            f"Expected a calibrated checkpoint, but {os.fspath(path)!r} holds no gamma. Calibrate its weights first,"
            " with `calibft calibrate` or, in Python, with `calibrate(model, loader)`."
        )
    for state, prefix, *_ in heads:
        state[prefix + OFFSET] = torch.full_like(state[prefix + OFFSET], changed["gamma"])


def _state_dicts(checkpoint: dict[str, Any]) -> list[dict[str, Any]]:
    values = [checkpoint] if state_key(checkpoint) is None else list(checkpoint.values())
    return [value for value in values if is_state_dict(value) and all(isinstance(name, str) for name in value)]


def _layers(state: Mapping[str, Any], num_classes: int) -> list[str]:
    """Return the prefixes of the layers with a weight and a bias for each class."""
    prefixes = [key.removesuffix("bias") for key in state if key.split(".")[-1] == "bias"]
    return [
        prefix
        for prefix in prefixes
        if state[prefix + "bias"].shape == (num_classes,)
        and isinstance(weight := state.get(prefix + "weight"), Tensor)
        and weight.ndim > 1
        and len(weight) == num_classes
    ]


def _put_metadata(checkpoint: dict[str, Any], changed: dict[str, Any]) -> None:
    """Put metadata where a checkpoint has them: beside the weights, or among the versions of a state dict."""
    if METADATA_KEY in checkpoint:
        checkpoint[METADATA_KEY] = changed
    else:
        key = state_key(checkpoint)
        state: Any = checkpoint if key is None else checkpoint[key]
        state._metadata[METADATA_KEY] = changed
