"""The ``calibft`` command: inspect, fold, export and calibrate weight files."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lightning_calibft.checkpoint.inspect import inspect_checkpoint
from lightning_calibft.cli.options import EPILOG, add_classes, add_command, add_files, add_model, add_reading

if TYPE_CHECKING:
    import torch
    from torch import nn

# Each command imports what it needs, so that `calibft --help` does not wait for torch.
EXIT_ERROR, EXIT_NOT_CALIBRATED, EXIT_INTERRUPTED = 1, 3, 130  # argparse uses 2

_CALIBRATED = (".pth", ".pt", ".bin", ".safetensors")  # what `calibrate` writes
_DESCRIPTION = """Bring back the classes that fine-tuning made a classifier forget."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status.

    Args:
        arguments: The command-line arguments after ``calibft``. ``None``: those of this process.
    """
    args = _parser().parse_args(arguments)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # warnings of other libraries about each other
            warnings.filterwarnings("always", module="lightning_calibft")
            warnings.showwarning = _show_warning
            return cast(int, args.run(args))
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except (ArithmeticError, ImportError, LookupError, OSError, RuntimeError, TypeError, ValueError) as error:
        print(f"calibft: error: {_line(error)}", file=sys.stderr)  # noqa: T201
        return EXIT_ERROR


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"calibft: warning: {_line(message)}", file=sys.stderr)  # noqa: T201


def _line(message: object) -> str:
    """Return a message of the Python functions on one line, with the command's flags in place of arguments."""
    return _printable(_as_flags(" ".join(str(message).split())))


def _printable(text: str) -> str:
    """Escape control characters, which the names in a file may contain, so that a terminal does not run them."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def _inspect(args: argparse.Namespace) -> int:
    info = inspect_checkpoint(args.file, weights_only=not args.unsafe)
    _print(args, info, _described(args.file, info))
    return 0 if info["calibrated"] or info["folded"] else EXIT_NOT_CALIBRATED


def _fold(args: argparse.Namespace) -> int:
    from lightning_calibft.checkpoint.fold_checkpoint import fold_checkpoint

    fold_checkpoint(
        args.source, args.destination, add_bias=args.add_bias, prefix=args.prefix, weights_only=not args.unsafe
    )
    info = inspect_checkpoint(args.destination, weights_only=not args.unsafe)
    _print(args, info, _described(args.destination, info))
    return 0


def _export(args: argparse.Namespace) -> int:
    import torch

    from lightning_calibft.checkpoint.export import check_destination, write_model
    from lightning_calibft.checkpoint.timm_model import load_folded
    from lightning_calibft.labels.image_folders import data_config

    model, metadata = load_folded(args.model, args.source, weights_only=not args.unsafe, **args.model_args)
    size = data_config(model, img_size=args.img_size)["input_size"]
    inputs = torch.zeros(2, *size)
    check_destination(model, args.destination, inputs)
    write_model(model, args.destination, metadata, inputs)
    _print(args, metadata, _described(args.destination, {"calibrated": False, **metadata}))
    return 0


def _calibrate(args: argparse.Namespace) -> int:
    from lightning_calibft.checkpoint.files import check_destination_file, write_weights

    if args.destination.suffix not in _CALIBRATED:
        raise ValueError(
            f"Expected argument `destination` to end in one of {', '.join(_CALIBRATED)}, but got"
            f" {str(args.destination)!r}."
        )
    check_destination_file(args.destination)

    import torch
    from torch.utils.data import DataLoader

    from lightning_calibft.calibration.calibrate import calibrate
    from lightning_calibft.checkpoint.state import versions
    from lightning_calibft.labels.image_folders import data_config, open_folder, rows_of_folders

    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model = _load(args, args.weights, device)
    config = data_config(
        model,
        img_size=args.img_size,
        crop_pct=args.crop_pct,
        mean=args.mean,
        std=args.std,
        interpolation=args.interpolation,
    )
    dataset = open_folder(args.data, config)
    rows = rows_of_folders(dataset.classes, args.class_map, args.label_names, cast(int, model.num_classes))
    dataset.target_transform = rows.__getitem__
    loader = DataLoader(dataset, args.batch_size, num_workers=args.num_workers)
    with torch.autocast(device.type, enabled=args.amp):
        result = calibrate(
            model,
            loader,
            seen_classes=sorted(set(rows.values())),
            estimator=args.estimator,
            estimator_kwargs=args.estimator_kwargs,
            absent_share=args.absent_share,
            max_samples=args.max_samples,
            tolerance=args.tolerance,
            pretrained=None if args.pretrained is None else _load(args, args.pretrained, device),
            progress=args.progress,
        )
    metadata = {**result.as_dict(), "model": args.model, "model_args": args.model_args, **versions()}
    write_weights(model.cpu().state_dict(), metadata, args.destination)
    info = inspect_checkpoint(args.destination)
    _print(args, info, _described(args.destination, info))
    return 0


def _load(args: argparse.Namespace, path: Path, device: torch.device) -> nn.Module:
    from lightning_calibft.checkpoint.timm_model import load_raw

    model = load_raw(args.model, path, num_classes=args.num_classes, weights_only=not args.unsafe, **args.model_args)
    return model.to(device)


def _as_flags(message: str) -> str:
    """Replace the arguments of Python functions with the flags of the command."""
    for argument in (
        "absent_share",
        "add_bias",
        "class_map",
        "estimator_kwargs",
        "label_names",
        "max_samples",
        "model",
        "num_classes",
        "prefix",
        "pretrained",
        "tolerance",
    ):
        message = message.replace(f"`{argument}`", f"`--{argument.replace('_', '-')}`")
    for argument, flag in (
        ("add_bias=True", "add-bias"),
        ("model_args", "model-kwargs"),
        ("weights_only=False", "unsafe"),
    ):
        message = message.replace(f"`{argument}`", f"`--{flag}`")
    return message


def _print(args: argparse.Namespace, info: dict[str, Any], text: str) -> None:
    print(json.dumps(info) if args.json else text)  # noqa: T201


def _described(path: Path, info: dict[str, Any]) -> str:
    """Return a few lines that describe the calibration of a file."""
    if not (info["calibrated"] or info["folded"]):
        return _printable(f"{path}: not calibrated")
    lines = {"gamma": f"{info['gamma']:.4f}"}
    if "standard_error" in info:
        lines["gamma"] += f" ± {info['standard_error']:.4f}"
    if {"estimator", "num_samples"} <= info.keys():
        lines["found by"] = f"{info['estimator']} from {info['num_samples']:,} samples"
    absent, seen = info["absent_classes"], info.get("seen_classes", [])
    lines["classes"] = f"{info['num_classes']}: {len(seen) or 'unknown'} seen, {len(absent)} absent"
    if seen:
        lines["seen"] = ", ".join(map(str, seen[:10])) + (f" and {len(seen) - 10} more" if len(seen) > 10 else "")
    if info.get("heads"):
        lines["head"] = ", ".join(info["heads"])
    names = {"version": "lightning-calibft", "torch_version": "torch", "lightning_version": "lightning"}
    known = [f"{name} {info[key]}" for key, name in names.items() if key in info]
    if known:
        lines["made with"] = ", ".join(known)
    state = "calibrated, gamma is folded into the bias" if info["folded"] else "calibrated"
    return "\n".join(map(_printable, [f"{path}: {state}", *(f"  {name:9}  {text}" for name, text in lines.items())]))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="calibft", description=_DESCRIPTION, epilog=EPILOG)
    parser.add_argument("--version", action="version", version=f"%(prog)s {version('lightning-calibft')}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    inspect = add_command(commands, "inspect", _inspect, "show whether a file is calibrated, and how")
    inspect.add_argument("file", type=Path)

    fold = add_command(commands, "fold", _fold, "add gamma to the bias and write a file that loads anywhere")
    add_files(fold)
    fold.add_argument("--add-bias", action="store_true", help="give a head without bias a new one, which adds a key")
    fold.add_argument("--prefix", help="prefix of the model's keys, such as 'model.' (not for a .ckpt file)")

    export = add_command(commands, "export", _export, "write a timm model for onnxruntime, torch.export or timm itself")
    add_files(export)
    export.add_argument("--model", help="name of the model in timm, if the file does not name it")
    add_model(export)

    calibrate = add_command(commands, "calibrate", _calibrate, "find gamma for a fine-tuned timm model")
    calibrate.add_argument("model", help="name of the model in timm")
    calibrate.add_argument("weights", type=Path, help="file of its fine-tuned weights")
    calibrate.add_argument("data", type=Path, help="the fine-tuning data: a folder with one folder of images per class")
    calibrate.add_argument("destination", type=Path, help="the calibrated file to write, .pth or .safetensors")
    add_classes(calibrate)
    add_model(calibrate)
    add_reading(calibrate)
    return parser
