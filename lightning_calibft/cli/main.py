"""The command ``calibft``: inspect, fold, export and calibrate files of weights."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_calibft.calibration import calibrate
from lightning_calibft.checkpoint.export import check_destination, write_model
from lightning_calibft.checkpoint.load import fold_checkpoint, inspect_checkpoint, write_weights
from lightning_calibft.checkpoint.state import versions
from lightning_calibft.checkpoint.timm_model import load_folded, load_raw
from lightning_calibft.cli.options import EPILOG, add_classes, add_command, add_files, add_model, add_reading
from lightning_calibft.labels.image_folders import data_config, open_folder, rows_of_folders
from lightning_calibft.split import shorten

EXIT_ERROR, EXIT_NOT_CALIBRATED, EXIT_INTERRUPTED = 1, 3, 130  # 2 is that of argparse

_DESCRIPTION = """Bring back the classes that fine-tuning made a classifier forget."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status.

    Args:
        arguments: The words behind ``calibft``. ``None``: those of this process.
    """
    args = _parser().parse_args(arguments)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the libraries, about how they use each other
            warnings.filterwarnings("always", module="lightning_calibft")
            warnings.showwarning = _show_warning
            return args.run(args)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except (ImportError, LookupError, OSError, RuntimeError, TypeError, ValueError) as error:
        print(f"calibft: error: {_as_flags(' '.join(str(error).split()))}", file=sys.stderr)  # noqa: T201
        return EXIT_ERROR


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"calibft: warning: {_as_flags(str(message))}", file=sys.stderr)  # noqa: T201


def _inspect(args: argparse.Namespace) -> int:
    info = inspect_checkpoint(args.file, weights_only=not args.unsafe)
    _print(args, info, _described(args.file, info))
    return 0 if info["calibrated"] or info["folded"] else EXIT_NOT_CALIBRATED


def _fold(args: argparse.Namespace) -> int:
    fold_checkpoint(
        args.source, args.destination, add_bias=args.add_bias, prefix=args.prefix, weights_only=not args.unsafe
    )
    info = inspect_checkpoint(args.destination, weights_only=not args.unsafe)
    _print(args, info, _described(args.destination, info))
    return 0


def _export(args: argparse.Namespace) -> int:
    model, facts = load_folded(args.model, args.source, weights_only=not args.unsafe, **args.model_args)
    size = data_config(model, img_size=args.img_size)["input_size"]
    inputs = torch.zeros(2, *size)
    check_destination(model, args.destination, inputs)
    write_model(model, args.destination, facts, inputs)
    _print(args, facts, _described(args.destination, {"calibrated": False, **facts}))
    return 0


def _calibrate(args: argparse.Namespace) -> int:
    model = _load(args, args.weights)
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
    loader = DataLoader(dataset, args.batch_size, num_workers=args.workers)
    with torch.autocast(torch.device(args.device).type, enabled=args.amp):
        result = calibrate(
            model,
            loader,
            seen_classes=sorted(set(rows.values())),
            estimator=args.estimator,
            estimator_kwargs=args.estimator_kwargs,
            max_samples=args.max_samples,
            tolerance=args.tolerance,
            pretrained=None if args.pretrained is None else _load(args, args.pretrained),
            progress=not args.quiet,
        )
    facts = {**result.as_dict(), "model": args.model, "model_args": args.model_args, **versions()}
    write_weights(model.cpu().state_dict(), facts, args.destination)
    info = inspect_checkpoint(args.destination)
    _print(args, info, _described(args.destination, info))
    return 0


def _load(args: argparse.Namespace, path: Path) -> nn.Module:
    return load_raw(args.model, path, num_classes=args.num_classes, weights_only=not args.unsafe, **args.model_args).to(
        args.device
    )


def _as_flags(message: str) -> str:
    """Let a message of the Python functions name the flags of the command."""
    for argument in (
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
    return message.replace("`weights_only=False`", "`--unsafe`")


def _print(args: argparse.Namespace, info: dict[str, Any], text: str) -> None:
    print(json.dumps(info) if args.json else text)  # noqa: T201


def _described(path: Path, info: dict[str, Any]) -> str:
    """Say in a few lines what a file holds."""
    if not (info["calibrated"] or info["folded"]):
        return f"{path}: not calibrated"
    lines = {"gamma": f"{info['gamma']:.4f}"}
    if "standard_error" in info:
        lines["gamma"] += f" ± {info['standard_error']:.4f}"
        lines["found by"] = f"{info['estimator']} from {info['num_samples']:,} samples"
    absent, seen = info["absent_classes"], info.get("seen_classes", [])
    lines["classes"] = f"{info['num_classes']}: {len(seen) or 'unknown'} seen, {len(absent)} absent"
    if seen:
        lines["seen"] = shorten(seen)
    if info.get("heads"):
        lines["head"] = ", ".join(info["heads"])
    names = {"version": "lightning-calibft", "torch_version": "torch", "lightning_version": "lightning"}
    known = [f"{name} {info[key]}" for key, name in names.items() if key in info]
    if known:
        lines["made with"] = ", ".join(known)
    state = "calibrated, gamma is folded into the bias" if info["folded"] else "calibrated"
    return "\n".join([f"{path}: {state}", *(f"  {name:9}  {text}" for name, text in lines.items())])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="calibft", description=_DESCRIPTION, epilog=EPILOG)
    parser.add_argument("--version", action="version", version=f"%(prog)s {versions()['version']}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    inspect = add_command(commands, "inspect", _inspect, "tell whether a file is calibrated, and how")
    inspect.add_argument("file", type=Path)

    fold = add_command(commands, "fold", _fold, "add gamma to the bias: a file that loads anywhere")
    add_files(fold)
    fold.add_argument("--add-bias", action="store_true", help="give a head without bias a new one: one key more")
    fold.add_argument("--prefix", help="what the model's keys begin with, as 'model.' (not for a .ckpt file)")

    export = add_command(commands, "export", _export, "write a timm model for onnxruntime, torch.export or timm itself")
    add_files(export)
    export.add_argument("--model", help="name of the model in timm, where the file does not tell it")
    add_model(export)

    calibrate = add_command(commands, "calibrate", _calibrate, "find gamma of a fine-tuned timm model")
    calibrate.add_argument("model", help="name of the model in timm")
    calibrate.add_argument("weights", type=Path, help="file of its fine-tuned weights")
    calibrate.add_argument("data", type=Path, help="the fine-tuning data: a folder with one folder of images a class")
    calibrate.add_argument("destination", type=Path, help="the calibrated file to write, .pth or .safetensors")
    add_classes(calibrate)
    add_model(calibrate)
    add_reading(calibrate)
    return parser
