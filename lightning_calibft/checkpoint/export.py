"""Export a calibrated model to the formats of other tools."""

from __future__ import annotations

import copy
import io
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_calibft._arguments import check_model, check_type
from lightning_calibft._format import GRAPHS, METADATA_KEY, SAFETENSORS, StrPath, check_path, expectations
from lightning_calibft.calibration.result import CalibrationResult
from lightning_calibft.checkpoint.files import (
    check_destination_file,
    check_destination_folder,
    new_folder,
    replace_atomically,
    write_weights,
)
from lightning_calibft.checkpoint.state import calibrated_heads, folded_metadata
from lightning_calibft.head.fold import fold
from lightning_calibft.head.offset import record_of
from lightning_calibft.labels.label_names import row_names_of
from lightning_calibft.split import shorten

_WEIGHTS = (SAFETENSORS, ".pth", ".pt")
_LARGEST_ONNX = 2**31 - 2**20  # bytes: an ONNX file is one protobuf message of at most 2 GiB, graph included


def export(
    model: nn.Module,
    destination: StrPath,
    inputs: Tensor | tuple[Tensor, ...] | None = None,
    *,
    result: CalibrationResult | None = None,
    metrics: Mapping[str, float] | None = None,
) -> None:
    """Write a calibrated model, with gamma folded into its bias, for a tool that does not know this package.

    The name of ``destination`` decides the format:

    ============================= ===================================================================================
    ``.safetensors, .pth, .pt``    the state dict, for ``load_state_dict`` and timm's ``checkpoint_path``
    a folder, for a timm model     for ``timm.create_model("local-dir:FOLDER", pretrained=True)``, and for uploading
    a folder, for transformers     for ``from_pretrained(FOLDER)``
    ``.onnx``                      for onnxruntime and others (needs ``pip install 'lightning-calibft[onnx]'``)
    ``.pt2``                       for ``torch.export.load``
    ============================= ===================================================================================

    Each of them stores the calibration metadata together with the weights. ``model`` itself does not change. A head
    that cannot be folded, such as one without bias, can only be exported to ``.onnx`` and ``.pt2``, with its
    calibration attached.

    A folder also has a model card, ``README.md``. To share it on the Hub, call ``huggingface_hub.create_repo`` and
    ``huggingface_hub.upload_folder``.

    Args:
        model: A calibrated model, in eval or training mode. For a LightningModule, pass the model inside it.
        destination: The file or folder to write. It appears complete or not at all.
        inputs: Example inputs of ``model``, with at least two rows. Only needed for ``.onnx`` and ``.pt2``. The
            exported model accepts any number of rows if its code allows that.
        result: The return value of :func:`~lightning_calibft.calibrate`, to store more details about gamma.
        metrics: Numbers that were measured, by name, for the model card: what an evaluation of a Trainer returns.

    Raises:
        ValueError: If ``model`` is not calibrated or is already folded, if its head has no bias, or if ``destination``,
            ``inputs`` and ``model`` do not fit together.
        FileExistsError: If ``destination`` is a folder that already exists and is not empty.
        ModuleNotFoundError: If the packages for ``.onnx`` are missing.

    Example::

        calibrate(model, loader)
        export(model, "model.onnx", torch.zeros(2, 3, 224, 224))
    """
    check_model("model", model)
    check_path("destination", destination)
    if result is not None:
        check_type("result", result, CalibrationResult)
    if metrics is not None:
        check_type("metrics", metrics, Mapping)
    model = getattr(model, "_orig_mod", model)  # a compiled model
    check_destination(model, destination, inputs)
    heads = calibrated_heads(model.state_dict(), "the model")
    found = record_of(model.get_submodule(next(iter(heads)).rstrip("."))) if result is None else result.as_dict()
    metadata = folded_metadata(found, heads)
    copied = copy.deepcopy(model).eval()
    try:
        copied = fold(copied)
    except ValueError:  # gamma cannot be folded: only a graph can store the attached calibration
        if Path(destination).suffix not in GRAPHS:
            raise
    write_model(copied, destination, metadata, inputs, metrics)


def check_name(destination: StrPath) -> None:
    """Raise if the name of ``destination`` stands for no format, or if nothing can be written there.

    Raises:
        ValueError: If the name has an unknown suffix.
        FileNotFoundError: If the parent folder is missing.
        FileExistsError: If a folder is to be written, but something else already exists there.
    """
    suffix = Path(destination).suffix
    if suffix not in (*_WEIGHTS, *GRAPHS, ""):
        raise ValueError(
            f"Expected argument `destination` {os.fspath(destination)!r} to end in one of"
            f" {', '.join((*_WEIGHTS, *GRAPHS))}, or to be a folder."
        )
    (check_destination_file if suffix else check_destination_folder)(destination)


def check_destination(model: nn.Module, destination: StrPath, inputs: Any) -> None:
    """Raise early if :func:`write_model` could not write to ``destination``.

    Raises:
        ValueError: If the name, the model or the inputs do not fit together, and as in :func:`check_name`.
        ImportError: If a package is missing or too old.
    """
    check_name(destination)
    suffix, where = Path(destination).suffix, f"argument `destination` {os.fspath(destination)!r}"
    if suffix in GRAPHS:
        rows = inputs if isinstance(inputs, tuple) else (inputs,)
        if not all(isinstance(tensor, Tensor) and tensor.ndim and len(tensor) > 1 for tensor in rows):
            raise ValueError(
                f"Expected argument `inputs` to hold tensors with at least two rows for the {where}, but got"
                f" {[tuple(x.shape) if isinstance(x, Tensor) else x for x in rows]}. Exporting runs the model on them."
            )
    elif not suffix and _is_timm(model):
        import timm

        if not hasattr(timm.models, "save_for_hf"):
            raise ImportError(
                f"Writing a folder needs a newer timm than {timm.__version__}: `pip install --upgrade timm`."
            )
    elif not suffix and not _is_timm(model) and not hasattr(model, "save_pretrained"):
        raise ValueError(
            f"Expected a timm or transformers model to write the folder {os.fspath(destination)!r}, but got"
            f" {type(model).__name__}. Pass the model inside it, or a file name that ends in {', '.join(_WEIGHTS)}."
        )
    if suffix == ".onnx":
        size = sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))
        if size > _LARGEST_ONNX:
            raise ValueError(
                f"Expected a model of less than 2 GiB, the limit of an ONNX file, for the {where}, but its weights take"
                f" {size / 2**30:.1f} GiB. Write a .pt2 or .safetensors file."
            )
        _check_onnx()


def write_model(
    model: nn.Module,
    destination: StrPath,
    metadata: dict[str, Any],
    inputs: Tensor | tuple[Tensor, ...] | None,
    metrics: Mapping[str, float] | None = None,
) -> None:
    """Write a model without further folding, in the format that :func:`export` describes."""
    suffix = Path(destination).suffix
    if suffix in _WEIGHTS:
        write_weights(model.state_dict(), metadata, destination)
    elif suffix == "":
        with new_folder(destination) as folder:
            _write_folder(model, folder, metadata)
            _write_card(model, folder, metadata, metrics or {})
    else:
        assert inputs is not None
        write = _write_onnx if suffix == ".onnx" else _write_program
        write(model, destination, metadata, inputs if isinstance(inputs, tuple) else (inputs,))


def _is_timm(model: nn.Module) -> bool:
    return hasattr(model, "pretrained_cfg") and hasattr(model, "num_features")


def _write_folder(model: Any, folder: Path, metadata: Mapping[str, Any]) -> None:
    from safetensors import SafetensorError

    try:
        if _is_timm(model):
            from timm.models import save_for_hf

            for tensor in (*model.parameters(), *model.buffers()):
                tensor.data = tensor.data.contiguous()  # timm writes no other layout, such as channels-last
            save_for_hf(model, str(folder), {METADATA_KEY: dict(metadata)}, safe_serialization=True)
        else:
            setattr(model.config, METADATA_KEY, dict(metadata))
            model.save_pretrained(folder)
    except SafetensorError as error:  # what safetensors raises if the disk is full
        raise OSError(f"Could not write the weights: {error}.") from error


def _write_card(model: Any, folder: Path, metadata: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
    """Write the model card of a folder, with what is known of gamma and what was measured."""
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    library, kind = "transformers", type(model).__name__
    if _is_timm(model):
        library, kind = "timm", model.pretrained_cfg.get("architecture") or kind
    task = "text-classification" if kind.endswith("ForSequenceClassification") else "image-classification"
    numbers = {name: float(value) for name, value in metrics.items() if isinstance(value, (int, float, Tensor))}
    measured = {name: value for name, value in numbers.items() if math.isfinite(value)}
    data = ModelCardData(
        model_name=kind,
        library_name=library,
        pipeline_tag=task,
        tags=["absent-class-calibration", "lightning_calibft"],
        eval_results=[EvalResult(task, "unknown", "evaluation data", *item) for item in measured.items()] or None,
    )
    names = row_names_of(model)
    seen, absent = (
        [" ".join(names[row].split()) if names else row for row in metadata[f"{group}_classes"]]
        for group in ("seen", "absent")
    )
    error = f" ± {metadata['standard_error']:.3f} (sampling error only)" if "standard_error" in metadata else ""
    samples = f" from {metadata['num_samples']:,} samples" if "num_samples" in metadata else ""
    found = f", found by `{metadata['estimator']}`{samples}" if "estimator" in metadata else ""
    lines = [
        f"- gamma: {metadata['gamma']:.3f}{error}{found}",
        f"- seen classes ({len(seen)}): {shorten(seen)}",
        f"- absent classes ({len(absent)}): {shorten(absent)}",
    ]
    if "absent_share" in metadata:
        lines.append(f"- share of samples of absent classes that gamma is for: {metadata['absent_share']:.1%}")
    lines += [f"- {sentence}" for sentence in expectations(metadata)]
    lines += [f"- {name}: {value:.4g}" for name, value in measured.items()]
    text = (
        f"# {kind}, calibrated for absent classes\n\n"
        f"This model was fine-tuned on data of {len(seen)} of its {metadata['num_classes']} classes, after which it"
        " would almost never predict the others. So one number, gamma, was added to the bias of its head at the absent"
        " classes ([Mai et al., NeurIPS 2024](https://arxiv.org/abs/2409.16223)) with `lightning_calibft`"
        f" {metadata['version']}. Load it like any other model of {library}. Training it further would undo gamma.\n\n"
    )
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}" + "\n".join(lines) + "\n")
    card.save(folder / "README.md")


def _dynamic_rows(inputs: tuple[Tensor, ...]) -> tuple[dict[int, Any], ...]:
    return tuple({0: torch.export.Dim.AUTO} for _ in inputs)


def _write_program(model: nn.Module, path: StrPath, metadata: Mapping[str, Any], inputs: tuple[Tensor, ...]) -> None:
    program = torch.export.export(model, inputs, dynamic_shapes=_dynamic_rows(inputs))
    extra = {f"{METADATA_KEY}.json": json.dumps(metadata)}
    buffer = io.BytesIO()  # torch's own writing to a file aborts the process if the disk is full
    torch.export.save(program, buffer, extra_files=extra)
    replace_atomically(path, lambda file: file.write(buffer.getbuffer()))


def _check_onnx() -> None:
    try:
        import onnxscript  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Exporting to ONNX needs onnx and onnxscript. Install them with `pip install 'lightning-calibft[onnx]'`."
        ) from error


def _write_onnx(model: nn.Module, path: StrPath, metadata: Mapping[str, Any], inputs: tuple[Tensor, ...]) -> None:
    program = torch.onnx.export(model, inputs, dynamo=True, dynamic_shapes=_dynamic_rows(inputs), verbose=False)
    assert program is not None
    program.model.metadata_props[METADATA_KEY] = json.dumps(metadata)
    replace_atomically(path, lambda file: file.write(program.model_proto.SerializeToString()))
