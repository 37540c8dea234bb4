"""The arguments of the ``calibft`` command."""

from __future__ import annotations

import argparse
import ast
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

EPILOG = """exit status: 0 success; 1 refused, with the reason on one stderr line; 2 usage error; 3 `inspect` found no
gamma in the file; 4 written by `calibrate` or `share`, but gamma is expected to hurt; 130 interrupted. With --json, the
result is one JSON object on stdout, with the "verdict" on gamma: helps, does not matter, hurts, or cannot be told."""


# The estimators that need no samples of absent classes, and timm's interpolations. They are written out here because
# looking them up would import torch and timm.
_ESTIMATORS = ("alg", "pseudo_absent", "fixed")
_INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")


class _Arguments(argparse.Action):
    """Parse ``name=value`` words, as timm's scripts do. Any other word is a usage error."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        arguments = {}
        for word in values:
            name, equals, value = word.partition("=")
            if not equals:
                raise argparse.ArgumentError(self, f"expected NAME=VALUE, but got {word!r}")
            try:
                arguments[name] = ast.literal_eval(value)
            except (ValueError, SyntaxError):
                arguments[name] = value
        setattr(namespace, self.dest, arguments)


def _integer(least: int) -> Callable[[str], int]:
    """Return a reader of integers of at least ``least`` and below 2**31, a limit for images, workers and rows."""

    def read(word: str) -> int:
        if not word.lstrip("-").isdecimal() or not least <= int(word) < 2**31:
            raise argparse.ArgumentTypeError(f"expected an integer of at least {least}, but got {word!r}")
        return int(word)

    return read


def finite_number(word: str) -> float:
    """Read a finite number."""
    if not math.isfinite(number := float(word)):
        raise ValueError
    return number


def positive_number(word: str) -> float:
    """Read a number above 0."""
    if (number := finite_number(word)) <= 0:
        raise ValueError
    return number


def add_command(commands: Any, name: str, run: Any, text: str) -> argparse.ArgumentParser:
    """Add a subcommand that calls ``run``, with the options that all subcommands share."""
    command: argparse.ArgumentParser = commands.add_parser(
        name, help=text, description=f"{text[0].upper()}{text[1:]}.", epilog=EPILOG
    )
    command.set_defaults(run=run)
    command.add_argument("--json", action="store_true", help="print one JSON object")
    command.add_argument(
        "--ema",
        dest="use_ema",
        action=argparse.BooleanOptionalAction,
        help="in a file that has both, use the moving average of the weights, or the weights themselves",
    )
    command.add_argument("--unsafe", action="store_true", help="unpickle any object (only for files that you trust)")
    return command


def add_files(command: argparse.ArgumentParser) -> None:
    """Add the source and destination files."""
    command.add_argument("source", type=Path, help="a calibrated file")
    command.add_argument("destination", type=Path, help="the file or folder to write; its name decides the format")


def add_model(command: argparse.ArgumentParser) -> None:
    """Add the options that build a timm model."""
    command.add_argument(
        "--img-size", type=_integer(1), help="height and width of the images; the model's own by default"
    )
    command.add_argument(
        "--model-kwargs",
        dest="model_args",
        nargs="*",
        default={},
        action=_Arguments,
        metavar="NAME=VALUE",
        help="arguments of timm.create_model",
    )


def add_classes(command: argparse.ArgumentParser) -> None:
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


def add_reading(command: argparse.ArgumentParser) -> None:
    """Add the options for finding gamma and reading images."""
    command.add_argument("--estimator", choices=_ESTIMATORS, default="alg", help="how gamma is found (%(default)s)")
    command.add_argument(
        "--estimator-kwargs", nargs="*", default={}, action=_Arguments, metavar="NAME=VALUE", help="its arguments"
    )
    command.add_argument(
        "--absent-share", type=float, help="share of samples of absent classes that the model will meet, such as 0.1"
    )
    command.add_argument(
        "--unlabeled",
        type=Path,
        help="a folder of images from where the model will be used, to estimate this share from instead",
    )
    command.add_argument(
        "--absent-classes",
        type=_integer(0),
        nargs="+",
        metavar="ROW",
        help="rows of the absent classes that can occur; by default all that are not in the data",
    )
    command.add_argument("--pretrained", type=Path, help="file of the weights before fine-tuning, for pseudo_absent")
    command.add_argument("--held-out", action="store_true", help="say that the images were not trained on")
    command.add_argument("--max-samples", type=int, help="read at most about this many images, drawn at random")
    command.add_argument("--tolerance", type=float, help="stop when the standard error of gamma is at most this")
    command.add_argument("--batch-size", type=_integer(1), default=64, help="(%(default)s)")
    command.add_argument(
        "--num-workers",
        type=_integer(0),
        default=min(4, os.cpu_count() or 1),
        help="processes that read images (%(default)s)",
    )
    command.add_argument("--device", help="where the model runs; by default a GPU if there is one")
    command.add_argument("--amp", action="store_true", help="run the model under autocast")
    command.add_argument("--crop-pct", type=positive_number, help="as in timm's scripts; the model's own by default")
    command.add_argument("--mean", type=finite_number, nargs="+", help="like --crop-pct")
    command.add_argument("--std", type=positive_number, nargs="+", help="like --crop-pct")
    command.add_argument("--interpolation", choices=_INTERPOLATIONS, help="like --crop-pct")
    command.add_argument(
        "--val", type=Path, help="labelled images to measure what gamma changes, a folder like the data, all classes"
    )
    command.add_argument("--no-progress", dest="progress", action="store_false", help="do not show a progress bar")
