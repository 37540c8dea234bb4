"""The ``calibft`` command: inspect, fold, export and calibrate weight files, and change their share."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import warnings
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lightning_calibft._format import expectations
from lightning_calibft.checkpoint.inspect import inspect_checkpoint
from lightning_calibft.cli.options import NAMED_BY_FILE, command_line

if TYPE_CHECKING:
    import torch
    from torch import nn

    from lightning_calibft.calibration.result import CalibrationResult

# Each command imports what it needs, so that `calibft --help` does not wait for torch.
EXIT_ERROR, EXIT_NOT_CALIBRATED, EXIT_HURTS, EXIT_INTERRUPTED = 1, 3, 4, 130  # argparse uses 2

_CALIBRATED = (".pth", ".pt", ".bin", ".safetensors")  # what `calibrate` writes
_OF_IMAGES = ("mean", "std", "crop_pct", "interpolation")  # options, and names of timm
_LONGEST_LINE = 2000  # characters: the names in a file can have any length


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status.

    Args:
        arguments: The command-line arguments after ``calibft``. ``None``: those of this process.
    """
    args = command_line().parse_args(arguments)
    commands = {"inspect": _inspect, "fold": _fold, "export": _export, "share": _share, "calibrate": _calibrate}

    def warn(message: Warning | str, *_: Any, **__: Any) -> None:
        _complain(args, "warning", message)

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # warnings of other libraries about each other
            warnings.filterwarnings("always", module="lightning_calibft")
            warnings.showwarning = warn
            return commands[args.command](args)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except (ArithmeticError, ImportError, LookupError, OSError, RuntimeError, TypeError, ValueError) as error:
        _complain(args, "error", error)
        return EXIT_ERROR


def _complain(args: argparse.Namespace, kind: str, message: object) -> None:
    """Print an error or warning of the Python functions on one line, naming arguments as they are written here."""

    def as_written(found: re.Match[str]) -> str:
        words = args.words.get(found["name"])
        return found[0] if words is None else f"`{words[-1 if found['value'] == '=False' else 0]}`"

    text = re.sub(r"`(?P<name>\w+)(?P<value>=(True|False|\[\.\.\.\]))?`", as_written, " ".join(str(message).split()))
    text = _printable(text if len(text) < _LONGEST_LINE else f"{text[:_LONGEST_LINE]}...")
    print(f"calibft: {kind}: {text}", file=sys.stderr)  # noqa: T201


def _printable(text: str) -> str:
    """Escape control characters, which the names in a file may contain, so that a terminal does not run them."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def _inspect(args: argparse.Namespace) -> int:
    info = inspect_checkpoint(args.file, use_ema=args.use_ema, weights_only=args.weights_only)
    _tell(args, args.file, info)
    return 0 if info["calibrated"] or info["folded"] else EXIT_NOT_CALIBRATED


def _fold(args: argparse.Namespace) -> int:
    from lightning_calibft.checkpoint.fold_checkpoint import fold_checkpoint

    fold_checkpoint(
        args.source,
        args.destination,
        add_bias=args.add_bias,
        prefix=args.prefix,
        use_ema=args.use_ema,
        weights_only=args.weights_only,
    )
    use_ema = args.use_ema if args.destination.suffix == ".ckpt" else None  # other files hold one kind of weights
    _tell(args, args.destination, inspect_checkpoint(args.destination, use_ema=use_ema, weights_only=args.weights_only))
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
        args.model, args.source, use_ema=args.use_ema, weights_only=args.weights_only, **dict(args.model_args)
    )
    size = data_config(model, img_size=args.img_size)["input_size"]
    inputs = torch.zeros(2, *size)
    check_destination(model, args.destination, inputs)
    write_model(model, args.destination, metadata, inputs)
    _tell(args, args.destination, {"calibrated": False, **metadata})
    return 0


def _share(args: argparse.Namespace) -> int:
    from lightning_calibft.checkpoint.set_absent_share import set_absent_share

    set_absent_share(args.model_or_path, args.absent_share, args.destination, weights_only=args.weights_only)
    info = inspect_checkpoint(args.destination, use_ema=args.use_ema, weights_only=args.weights_only)
    _tell(args, args.destination, info)
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
    config = data_config(model, img_size=args.img_size, **{name: getattr(args, name) for name in _OF_IMAGES})
    data, seen = open_folder(args.data, config, args.class_map, args.label_names, cast(int, model.num_classes))
    if args.unlabeled is not None:
        check_unlabeled(args.estimator, dict(args.estimator_kwargs), args.absent_share)
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
            estimator_kwargs=dict(args.estimator_kwargs),
            absent_classes=args.absent_classes,
            absent_share=args.absent_share,
            unlabeled=None if args.unlabeled is None else traffic,
            max_samples=args.max_samples,
            tolerance=args.tolerance,
            pretrained=None if args.pretrained is None else _load(args, args.pretrained, None, device)[0],
            held_out=args.held_out,
            progress=args.progress,
        )
    images = {name: config[name] for name in ("input_size", *_OF_IMAGES)}
    made_of = {"model": args.model, "model_args": model_args, "data_config": images}
    write_weights(model.cpu().state_dict(), {**result.as_dict(), **made_of, **versions()}, args.destination)
    info = inspect_checkpoint(args.destination)
    if val is not None:
        loader = DataLoader(val, args.batch_size, num_workers=args.num_workers)
        with torch.autocast(device.type, enabled=args.amp):
            measured = _validate(model.to(device), loader, result, args.progress)
        info["validation"] = {"num_samples": len(val), **measured}
        before, after = (measured[when]["acc_all"] for when in ("without_gamma", "with_gamma"))
        if before > after:
            warnings.warn(
                f"On the validation images, this gamma lowers the accuracy from {before:.1%} to {after:.1%}. Choose"
                " another `estimator`, or use the weights without gamma.",
                stacklevel=2,
            )
    _tell(args, args.destination, info)
    return EXIT_HURTS if result.verdict == "hurts" else 0


def _load(
    args: argparse.Namespace, path: Path, use_ema: bool | None, device: torch.device
) -> tuple[nn.Module, dict[str, Any]]:
    from lightning_calibft.checkpoint.timm_model import load_raw

    # The other file, of the weights before, is for the same model.
    model, args.model, model_args = load_raw(
        None if args.model == NAMED_BY_FILE else args.model,
        path,
        num_classes=args.num_classes,
        use_ema=use_ema,
        weights_only=args.weights_only,
        **dict(args.model_args),
    )
    return model.to(device), model_args


def _validate(model: nn.Module, loader: Iterable[Any], result: CalibrationResult, progress: bool) -> dict[str, Any]:
    """Return the accuracies on labeled images without and with gamma. ``None`` stands for a group without images."""
    from lightning_calibft.calibration.evaluation_pass import EvaluationPass, plain_bar
    from lightning_calibft.metrics.ausuc_with_accuracies import AUSUCWithAccuracies

    bar = (lambda _, total: plain_bar("Validating", total)) if progress else None
    reading, split, found = EvaluationPass(model, [loader], bar=bar), result.split, {}
    metric = AUSUCWithAccuracies(split.num_classes, split.seen_classes, split.absent_classes).to(reading.device)
    for batch in reading.evaluate():
        metric.update(batch.logits, batch.target)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about groups without images
        for name, gamma in (("without_gamma", 0.0), ("with_gamma", result.gamma)):
            accuracies = {f"acc_{group}": value for group, value in metric.accuracies(gamma).items()}
            values = {"ausuc": metric.compute(), **accuracies}
            found[name] = {key: None if value.isnan() else value.item() for key, value in values.items()}
    return found


def _tell(args: argparse.Namespace, path: Path, info: dict[str, Any]) -> None:
    """Print what is known of a file."""
    if args.json:  # JSON has no NaN, which is the standard error of a single sample
        known = {key: None if value != value else value for key, value in info.items()}
        print(json.dumps(known, allow_nan=False))  # noqa: T201
    elif info["calibrated"] or info["folded"]:
        state = "calibrated, gamma is folded into the bias" if info["folded"] else "calibrated"
        _show(f"{path}: {state}", _facts(info), expectations(info))
        if found := info.get("validation"):
            title = f"accuracy on {found['num_samples']:,} validation images, without gamma -> with gamma"
            _show(title, {group: _change(found, f"acc_{group}") for group in ("all", "seen", "absent", "harmonic")})
    else:
        _show(f"{path}: not calibrated", {})


def _change(found: dict[str, Any], key: str) -> str:
    values = [found[when][key] for when in ("without_gamma", "with_gamma")]
    return " -> ".join("no images" if value is None else f"{value:.1%}" for value in values)


def _show(title: str, facts: dict[str, str], sentences: Sequence[str] = ()) -> None:
    """Print names and texts: with rich in a terminal, unless it is not installed or the user wants plain text."""
    title, sentences = _printable(title), list(map(_printable, sentences))
    facts = {name: _printable(text) for name, text in facts.items()}
    plain = not sys.stdout.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    if plain or find_spec("rich") is None:
        lines = [*(f"{name:9}  {text}" for name, text in facts.items()), *sentences]
        print("\n  ".join([title, *lines]))  # noqa: T201
        return
    from rich.console import Console
    from rich.padding import Padding
    from rich.table import Table

    console, table = Console(markup=False, emoji=False, highlight=False), Table(show_header=False)
    for fact in facts.items():
        table.add_row(*fact)
    for part in (title, *([table] if facts else []), *(Padding.indent(sentence, 2) for sentence in sentences)):
        console.print(part)


def _facts(info: dict[str, Any]) -> dict[str, str]:
    """Return what is known of the calibration of a file, by name."""
    facts = {"gamma": f"{info['gamma']:.4f}"}
    if "standard_error" in info:
        facts["gamma"] += f" ± {info['standard_error']:.4f} (sampling error only)"
    if {"estimator", "num_samples"} <= info.keys():
        facts["found by"] = f"{info['estimator']} from {info['num_samples']:,} samples"
    absent, seen = info["absent_classes"], info.get("seen_classes", [])
    facts["classes"] = f"{info['num_classes']}: {len(seen) or 'unknown'} seen, {len(absent)} absent"
    if seen:
        facts["seen"] = ", ".join(map(str, seen[:10])) + (f" and {len(seen) - 10} more" if len(seen) > 10 else "")
    if "absent_share" in info:
        facts["meant for"] = f"a share of {info['absent_share']:.1%} of absent samples"
    if info.get("heads"):
        facts["head"] = ", ".join(info["heads"])
    names = {"version": "lightning-calibft", "torch_version": "torch", "lightning_version": "lightning"}
    known = [f"{name} {info[key]}" for key, name in names.items() if key in info]
    if known:
        facts["made with"] = ", ".join(known)
    return facts
