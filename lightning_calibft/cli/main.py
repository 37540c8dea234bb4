"""The ``calibft`` command: inspect, fold, export and calibrate weight files, and change their share."""

from __future__ import annotations

import argparse
import json
import math
import sys
import warnings
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lightning_calibft._format import expectations
from lightning_calibft.checkpoint.inspect import inspect_checkpoint
from lightning_calibft.cli.options import EPILOG, add_classes, add_command, add_files, add_model, add_reading

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from lightning_calibft.calibration.result import CalibrationResult

# Each command imports what it needs, so that `calibft --help` does not wait for torch.
EXIT_ERROR, EXIT_NOT_CALIBRATED, EXIT_HURTS, EXIT_INTERRUPTED = 1, 3, 4, 130  # argparse uses 2

_CALIBRATED = (".pth", ".pt", ".bin", ".safetensors")  # what `calibrate` writes
_NAMED_BY_FILE = "auto"
_LONGEST_LINE = 2000  # characters: the names in a file can have any length
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
    text = _printable(_as_flags(" ".join(str(message).split())))
    return text if len(text) < _LONGEST_LINE else f"{text[:_LONGEST_LINE]}..."


def _printable(text: str) -> str:
    """Escape control characters, which the names in a file may contain, so that a terminal does not run them."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def _inspect(args: argparse.Namespace) -> int:
    info = inspect_checkpoint(args.file, use_ema=args.use_ema, weights_only=not args.unsafe)
    _print(args, info, _described(args.file, info))
    return 0 if info["calibrated"] or info["folded"] else EXIT_NOT_CALIBRATED


def _fold(args: argparse.Namespace) -> int:
    from lightning_calibft.checkpoint.fold_checkpoint import fold_checkpoint

    fold_checkpoint(
        args.source,
        args.destination,
        add_bias=args.add_bias,
        prefix=args.prefix,
        use_ema=args.use_ema,
        weights_only=not args.unsafe,
    )
    keeps_all = args.destination.suffix == ".ckpt"
    use_ema = args.use_ema if keeps_all else None
    info = inspect_checkpoint(args.destination, use_ema=use_ema, weights_only=not args.unsafe)
    _print(args, info, _described(args.destination, info))
    return 0


def _export(args: argparse.Namespace) -> int:
    from lightning_calibft.checkpoint.export import check_destination, check_name, write_model
    from lightning_calibft.checkpoint.files import check_differs

    check_differs(args.destination, "source", args.source)
    check_name(args.destination)

    import torch

    from lightning_calibft.checkpoint.timm_model import load_folded
    from lightning_calibft.labels.image_folders import data_config

    model, metadata = load_folded(
        args.model, args.source, use_ema=args.use_ema, weights_only=not args.unsafe, **args.model_args
    )
    size = data_config(model, img_size=args.img_size)["input_size"]
    inputs = torch.zeros(2, *size)
    check_destination(model, args.destination, inputs)
    write_model(model, args.destination, metadata, inputs)
    _print(args, metadata, _described(args.destination, {"calibrated": False, **metadata}))
    return 0


def _share(args: argparse.Namespace) -> int:
    from lightning_calibft.checkpoint.set_absent_share import set_absent_share

    set_absent_share(args.source, args.absent_share, args.destination, weights_only=not args.unsafe)
    info = inspect_checkpoint(args.destination, use_ema=args.use_ema, weights_only=not args.unsafe)
    _print(args, info, _described(args.destination, info))
    return EXIT_HURTS if info["verdict"] == "hurts" else 0


def _calibrate(args: argparse.Namespace) -> int:
    from lightning_calibft.checkpoint.files import check_destination_file, check_differs, write_weights

    if args.destination.suffix not in _CALIBRATED:
        raise ValueError(
            f"Expected argument `destination` to end in one of {', '.join(_CALIBRATED)}, but got"
            f" {str(args.destination)!r}."
        )
    for name in ("weights", "pretrained"):
        if (source := getattr(args, name)) is not None:
            check_differs(args.destination, name, source)
    check_destination_file(args.destination)

    import torch
    from torch.utils.data import DataLoader

    from lightning_calibft.calibration.calibrate import calibrate
    from lightning_calibft.checkpoint.state import versions
    from lightning_calibft.estimators import check_unlabeled
    from lightning_calibft.labels.image_folders import UnlabeledImages, check_same_numbers, data_config, open_folder

    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model, model_args = _load(args, args.weights, args.use_ema, device)
    config = data_config(
        model,
        img_size=args.img_size,
        crop_pct=args.crop_pct,
        mean=args.mean,
        std=args.std,
        interpolation=args.interpolation,
    )
    data, seen = open_folder(args.data, config, args.class_map, args.label_names, cast(int, model.num_classes))
    if args.unlabeled is not None:
        check_unlabeled(args.estimator, args.estimator_kwargs, args.absent_share)
        traffic = DataLoader(UnlabeledImages(args.unlabeled, config), args.batch_size, num_workers=args.num_workers)
    val = None
    if args.val is not None:  # opened now, so that what is wrong with it is told before the images are read
        val, _ = open_folder(args.val, config, args.class_map, args.label_names, cast(int, model.num_classes))
        check_same_numbers(args.class_map, data.classes, val.classes)
    with torch.autocast(device.type, enabled=args.amp):
        result = calibrate(
            model,
            DataLoader(data, args.batch_size, num_workers=args.num_workers),
            seen_classes=seen,
            estimator=args.estimator,
            estimator_kwargs=args.estimator_kwargs,
            absent_classes=args.absent_classes,
            absent_share=args.absent_share,
            unlabeled=None if args.unlabeled is None else traffic,
            max_samples=args.max_samples,
            tolerance=args.tolerance,
            pretrained=None if args.pretrained is None else _load(args, args.pretrained, None, device)[0],
            held_out=args.held_out,
            progress=args.progress,
        )
    images = {name: config[name] for name in ("input_size", "mean", "std", "crop_pct", "interpolation")}
    made_of = {"model": args.model, "model_args": model_args, "data_config": images}
    write_weights(model.cpu().state_dict(), {**result.as_dict(), **made_of, **versions()}, args.destination)
    info = inspect_checkpoint(args.destination)
    text = _described(args.destination, info)
    if val is not None:
        loader = DataLoader(val, args.batch_size, num_workers=args.num_workers)
        with torch.autocast(device.type, enabled=args.amp):
            info["validation"] = _validate(model.to(device), loader, result, args.progress)
        text += _validation_text(info["validation"])
        before, after = (info["validation"][when]["acc_all"] for when in ("without_gamma", "with_gamma"))
        if before > after:
            warnings.warn(
                f"On the validation images, this gamma lowers the accuracy from {before:.1%} to {after:.1%}. Choose"
                " another `estimator`, or use the weights without gamma.",
                stacklevel=2,
            )
    _print(args, info, text)
    return EXIT_HURTS if result.verdict == "hurts" else 0


def _load(
    args: argparse.Namespace, path: Path, use_ema: bool | None, device: torch.device
) -> tuple[nn.Module, dict[str, Any]]:
    from lightning_calibft.checkpoint.timm_model import load_raw

    # The other file, of the weights before, is for the same model.
    model, args.model, model_args = load_raw(
        None if args.model == _NAMED_BY_FILE else args.model,
        path,
        num_classes=args.num_classes,
        use_ema=use_ema,
        weights_only=not args.unsafe,
        **args.model_args,
    )
    return model.to(device), model_args


def _validate(
    model: nn.Module, loader: Iterable[tuple[Tensor, Tensor]], result: CalibrationResult, progress: bool
) -> dict[str, Any]:
    """Return the accuracies on labelled images without and with gamma. ``None`` stands for a group without images."""
    import torch
    from tqdm import tqdm

    from lightning_calibft.functional import calibrate_logits
    from lightning_calibft.head.record import one_forward, record_logits
    from lightning_calibft.metrics import absent_class_metrics

    device, split, num_samples = next(model.parameters()).device, result.split, 0
    classes = split.num_classes, split.seen_classes, split.absent_classes
    without_gamma, with_gamma = (absent_class_metrics(*classes).to(device) for _ in range(2))
    recorder = record_logits(model)
    with torch.inference_mode():
        for images, target in tqdm(loader, desc="Validating", disable=not progress):
            with recorder as recorded:
                model(images.to(device))
                logits = one_forward(recorded, len(target), split.num_classes)
            without_gamma.update(logits, target.to(device))
            with_gamma.update(calibrate_logits(logits, result.gamma, *classes[1:]), target.to(device))
            num_samples += len(target)
    found: dict[str, Any] = {"num_samples": num_samples}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about groups without images
        for name, metrics in (("without_gamma", without_gamma), ("with_gamma", with_gamma)):
            values = {key: value.item() for key, value in metrics.compute().items()}
            found[name] = {key: None if math.isnan(value) else value for key, value in values.items()}
    return found


def _validation_text(found: dict[str, Any]) -> str:
    lines = [f"\n  accuracy on {found['num_samples']:,} validation images, without gamma -> with gamma"]
    for name, key in (("all", "acc_all"), ("seen", "acc_seen"), ("absent", "acc_absent"), ("harmonic", "acc_harmonic")):
        values = [found[when][key] for when in ("without_gamma", "with_gamma")]
        lines.append(f"  {name:9}  {' -> '.join('no images' if value is None else f'{value:.1%}' for value in values)}")
    return "\n".join(lines)


def _as_flags(message: str) -> str:
    """Replace the arguments of Python functions with the flags of the command."""
    for argument in (
        "absent_classes",
        "absent_share",
        "add_bias",
        "class_map",
        "estimator",
        "estimator_kwargs",
        "label_names",
        "max_samples",
        "mean",
        "model",
        "num_classes",
        "prefix",
        "pretrained",
        "std",
        "tolerance",
        "unlabeled",
    ):
        message = message.replace(f"`{argument}`", f"`--{argument.replace('_', '-')}`")
    for argument, flag in (
        ("absent_classes=[...]", "absent-classes ROW ..."),
        ("add_bias=True", "add-bias"),
        ("model_args", "model-kwargs"),
        ("use_ema", "[no-]ema"),
        ("use_ema=False", "no-ema"),
        ("use_ema=True", "ema"),
        ("weights_only=False", "unsafe"),
    ):
        message = message.replace(f"`{argument}`", f"`--{flag}`")
    return message


def _print(args: argparse.Namespace, info: dict[str, Any], text: str) -> None:
    if args.json:  # JSON has no NaN, which is the standard error of a single sample
        text = json.dumps({key: None if value != value else value for key, value in info.items()}, allow_nan=False)
    print(text)  # noqa: T201


def _described(path: Path, info: dict[str, Any]) -> str:
    """Return a few lines that describe the calibration of a file."""
    if not (info["calibrated"] or info["folded"]):
        return _printable(f"{path}: not calibrated")
    lines = {"gamma": f"{info['gamma']:.4f}"}
    if "standard_error" in info:
        lines["gamma"] += f" ± {info['standard_error']:.4f} (sampling error only)"
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
    told = [f"{path}: {state}", *(f"  {name:9}  {text}" for name, text in lines.items())]
    return "\n".join(map(_printable, [*told, *(f"  {sentence}" for sentence in expectations(info))]))


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

    share = add_command(commands, "share", _share, "write a file for another share of absent samples, without data")
    share.add_argument("source", type=Path, help="a calibrated or folded file or folder")
    share.add_argument("destination", type=Path, help="the file or folder to write, of the same kind")
    share.add_argument(
        "--absent-share", type=float, required=True, help="share of samples of absent classes, such as 0.05"
    )

    calibrate = add_command(commands, "calibrate", _calibrate, "find gamma for a fine-tuned timm model")
    calibrate.add_argument("model", help=f"name of the model in timm, or {_NAMED_BY_FILE}: the one that the file names")
    calibrate.add_argument("weights", type=Path, help="file of its fine-tuned weights")
    calibrate.add_argument(
        "data",
        type=Path,
        help="the fine-tuning data: a folder with one folder of images per class; for pseudo_absent, images of these"
        " classes that were not trained on are better",
    )
    calibrate.add_argument("destination", type=Path, help="the calibrated file to write, .pth or .safetensors")
    add_classes(calibrate)
    add_model(calibrate)
    add_reading(calibrate)
    return parser
