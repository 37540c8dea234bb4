"""The subcommands and arguments of the ``calibft`` command."""

from __future__ import annotations

import argparse
import ast
import math
import os
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

_DESCRIPTION = "Bring back the classes that fine-tuning made a classifier forget."
_EPILOG = """exit status: 0 success; 1 refused, with the reason on one stderr line; 2 usage error; 3 `inspect` found no
gamma in the file; 4 written by `calibrate` or `share`, but gamma is expected to hurt; 130 interrupted. With --json, the
result is one JSON object on stdout, with the "verdict" on gamma: helps, does not matter, hurts, or cannot be told."""

NAMED_BY_FILE = "auto"  # in place of the name of a model
# The estimators that need no samples of absent classes, and timm's interpolations. They are written out here because
# looking them up would import torch and timm.
_ESTIMATORS = ("alg", "pseudo_absent", "fixed")
_INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")


def command_line() -> argparse.ArgumentParser:
    """Return the parser of the command. What it has parsed knows its ``command`` and the ``words`` of that."""
    parser = argparse.ArgumentParser(prog="calibft", description=_DESCRIPTION, epilog=_EPILOG)
    parser.add_argument("--version", action="version", version=f"%(prog)s {version('lightning-calibft')}")
    commands = parser.add_subparsers(
        title="commands", required=True, metavar="COMMAND", dest="command", parser_class=_Subcommand
    )

    def subcommand(name: str, text: str) -> _Subcommand:
        command = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.", epilog=_EPILOG)
        command.set_defaults(words=command.words)
        return command

    inspect = subcommand("inspect", "show whether a file is calibrated, and how")
    inspect.add_argument("file", type=Path)

    fold = subcommand("fold", "add gamma to the bias and write a file that loads anywhere")
    export = subcommand("export", "write a timm model for onnxruntime, torch.export or timm itself")
    share = subcommand("share", "write a file for another share of absent samples, without data")
    for command, name, source, destination in (
        (fold, "source", "a calibrated file", "the file to write; its name decides the format"),
        (export, "source", "a calibrated file", "the file or folder to write; its name decides the format"),
        (share, "model_or_path", "a calibrated or folded file or folder", "the file or folder to write, of its kind"),
    ):
        command.add_argument(name, type=Path, help=source, metavar="source")
        command.add_argument("destination", type=Path, help=destination)
    fold.add_argument("--add-bias", action="store_true", help="give a head without bias a new one, which adds a key")
    fold.add_argument("--prefix", help="prefix of the model's keys, such as 'model.' (not for a .ckpt file)")
    export.add_argument("--model", help="name of the model in timm, if the file does not name it")
    share.add_argument(
        "--absent-share", type=float, required=True, help="share of samples of absent classes, such as 0.05"
    )

    calibrate = subcommand("calibrate", "find gamma for a fine-tuned timm model")
    calibrate.add_argument("model", help=f"name of the model in timm, or {NAMED_BY_FILE}: the one that the file names")
    calibrate.add_argument("weights", type=Path, help="file of its fine-tuned weights")
    calibrate.add_argument(
        "data",
        type=Path,
        help="the fine-tuning data: a folder with one folder of images per class; for pseudo_absent, images of these"
        " classes that were not trained on are better",
    )
    calibrate.add_argument("destination", type=Path, help="the calibrated file to write, .pth or .safetensors")
    calibrate.words["seen_classes"] = ["data"]  # they are its folders
    for command in (export, calibrate):
        command.add_argument(
            "--img-size", type=_integer(1), help="height and width of the images; the model's own by default"
        )
        command.add_argument(
            "--model-kwargs", dest="model_args", help="arguments of timm.create_model", **_NAMED_VALUES
        )
    _add_classes(calibrate)
    _add_search(calibrate)
    _add_reading(calibrate)
    return parser


class _Subcommand(argparse.ArgumentParser):
    """A subcommand with the options that all of them have.

    Attributes:
        words: What is written for each argument of the Python functions: its flags, or its name in the usage.
    """

    def __init__(self, **kwargs: Any) -> None:
        self.words: dict[str, list[str]] = {}
        super().__init__(**kwargs)
        self.add_argument("--json", action="store_true", help="print one JSON object")
        self.add_argument(
            "--ema",
            dest="use_ema",
            action=argparse.BooleanOptionalAction,
            help="in a file that has both, use the moving average of the weights, or the weights themselves",
        )
        self.add_argument(
            "--unsafe",
            dest="weights_only",
            action="store_false",
            help="unpickle any object (only for files that you trust)",
        )

    def add_argument(self, *args: Any, **kwargs: Any) -> argparse.Action:
        """Add an argument, and note its words."""
        action = super().add_argument(*args, **kwargs)
        self.words[action.dest] = list(action.option_strings) or [str(action.metavar or action.dest)]
        return action


def _add_classes(command: argparse.ArgumentParser) -> None:
    """Add the options that map each folder to a row of the head."""
    command.add_argument("--num-classes", type=_integer(2), help="rows of the head, if the weights do not show it")
    command.add_argument(
        "--class-map",
        help="the head's row of each folder: a JSON file (a list in the folders' order, or folder: row),"
        " or a name such as imagenet-r",
    )
    command.add_argument(
        "--label-names", help="the name of each row, to match folders with: a file, or a label set such as imagenet-1k"
    )
    command.add_argument(
        "--absent-classes",
        type=_integer(0),
        nargs="+",
        metavar="ROW",
        help="rows of the absent classes that can occur; by default all that are not in the data",
    )


def _add_search(command: argparse.ArgumentParser) -> None:
    """Add the options that say how gamma is found, and for what."""
    command.add_argument("--estimator", choices=_ESTIMATORS, default="alg", help="how gamma is found (%(default)s)")
    command.add_argument("--estimator-kwargs", help="its arguments", **_NAMED_VALUES)
    command.add_argument(
        "--absent-share", type=float, help="share of samples of absent classes that the model will meet, such as 0.1"
    )
    command.add_argument(
        "--unlabeled",
        type=Path,
        help="a folder of images from where the model will be used, to estimate this share from instead",
    )
    command.add_argument("--pretrained", type=Path, help="file of the weights before fine-tuning, for pseudo_absent")
    command.add_argument("--held-out", action="store_true", help="say that the images were not trained on")
    command.add_argument("--max-samples", type=_integer(1), help="read at most about this many images, drawn at random")
    command.add_argument("--tolerance", type=float, help="stop when the standard error of gamma is at most this")
    command.add_argument(
        "--val", type=Path, help="labeled images to measure what gamma changes, a folder like the data, all classes"
    )


def _add_reading(command: argparse.ArgumentParser) -> None:
    """Add the options that say how images are read, and where the model runs."""
    command.add_argument("--batch-size", type=_integer(1), default=64, help="(%(default)s)")
    command.add_argument(
        "--num-workers",
        type=_integer(0),
        default=min(4, os.cpu_count() or 1),
        help="processes that read images (%(default)s)",
    )
    command.add_argument("--device", help="where the model runs; by default a GPU if there is one")
    command.add_argument("--amp", action="store_true", help="run the model under autocast")
    command.add_argument("--crop-pct", type=_number(0), help="as in timm's scripts; the model's own by default")
    command.add_argument("--mean", type=_number(), nargs="+", help="like --crop-pct")
    command.add_argument("--std", type=_number(0), nargs="+", help="like --crop-pct")
    command.add_argument("--interpolation", choices=_INTERPOLATIONS, help="like --crop-pct")
    command.add_argument("--no-progress", dest="progress", action="store_false", help="do not show a progress bar")


def _integer(least: int) -> Callable[[str], int]:
    """Return a reader of integers of at least ``least`` and below 2**31, a limit for images, workers and rows."""

    def read(word: str) -> int:
        if not word.lstrip("-").isdecimal() or not least <= int(word) < 2**31:
            raise argparse.ArgumentTypeError(f"expected an integer of at least {least}, but got {word!r}")
        return int(word)

    return read


def _number(above: float = -math.inf) -> Callable[[str], float]:
    """Return a reader of finite numbers above ``above``."""

    def read(word: str) -> float:
        try:
            number = float(word)
        except ValueError:
            number = math.nan
        if not above < number < math.inf:
            kind = "a finite number" if above < 0 else f"a finite number above {above:g}"
            raise argparse.ArgumentTypeError(f"expected {kind}, but got {word!r}")
        return number

    return read


def _named_value(word: str) -> tuple[str, Any]:
    """Read ``name=value``, as timm's scripts do."""
    name, equals, value = word.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, but got {word!r}")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


_NAMED_VALUES: dict[str, Any] = {"nargs": "*", "default": [], "type": _named_value, "metavar": "NAME=VALUE"}
