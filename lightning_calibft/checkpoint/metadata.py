"""Check what a file says about its calibration: it may be damaged or forged. Nothing here imports torch."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from operator import lt
from reprlib import repr as short
from typing import Any

from lightning_calibft._format import VERDICTS, StrPath, parse_json

_MOST_CLASSES = 2**31 - 1
_LARGEST_GAMMA = (2 - 2**-23) * 2.0**127  # the largest float32


def parse_metadata(text: str | bytes, path: StrPath) -> Any:
    """Parse JSON in which no name may appear twice.

    Raises:
        ValueError: If the text is not JSON, holds a name twice, or is nested too deeply.
    """
    try:
        return parse_json(text)
    except ValueError as error:
        raise ValueError(
            f"Expected the calibration metadata of {os.fspath(path)!r} to be readable JSON, but it is not: {error}."
        ) from error


def check_metadata(metadata: Any, path: StrPath) -> dict[str, Any]:
    """Return the known entries of the calibration metadata: none, if it is not a mapping.

    Raises:
        ValueError: If an entry is invalid, or if the metadata of a folded calibration is incomplete.
    """
    if not isinstance(metadata, Mapping):
        return {}
    known = {key: metadata[key] for key in _ENTRIES if key in metadata}
    for key, value in known.items():
        is_valid, kind = _ENTRIES[key]
        if not is_valid(value):
            raise ValueError(f"{_expected(path)} hold {kind} as {key!r}, but got {short(value)}.")
    if known.get("folded"):
        for key in ("gamma", "num_classes", "absent_classes"):
            if key not in known:
                raise ValueError(f"{_expected(path)} hold {key!r}, because gamma is folded, but it is missing.")
    for key in ("seen_classes", "absent_classes"):
        width = known.get("num_classes", _MOST_CLASSES)
        if any(row >= width for row in known.get(key, ())):
            raise ValueError(f"{_expected(path)} hold class ids below {width} as {key!r}, but got {short(known[key])}.")
    return known


def check_entries(head: str, offset: Any, mask: Any, path: StrPath) -> tuple[float, list[float]]:
    """Return gamma and the mask of a head, given its two arrays or tensors.

    Raises:
        ValueError: If gamma is not one finite number, or the mask is not one number in [0, 1] per class.
    """
    where = f"the calibration of the head {head!r} in {os.fspath(path)!r}"
    gamma, values = _plain(offset, 0), _plain(mask, 1)
    if not _is_finite(gamma):
        raise ValueError(f"Expected {where} to have one finite number as its offset, but got {short(offset)}.")
    if not isinstance(values, list) or not values or not all(_is_finite(value) and 0 <= value <= 1 for value in values):
        raise ValueError(f"Expected {where} to have a mask of zeros and ones, one per class, but got {short(mask)}.")
    return gamma, values


def _plain(array: Any, ndim: int) -> Any:
    """Return an array or tensor with ``ndim`` dimensions as plain numbers, or ``None`` for anything else."""
    if getattr(array, "ndim", None) != ndim:
        return None
    try:
        if hasattr(array, "untyped_storage") and array.nbytes > array.untyped_storage().nbytes():
            return None  # a small storage that is expanded to a large shape
        return array.tolist()
    except Exception:  # it has no values, is sparse, or is an unknown type
        return None


def _expected(path: StrPath) -> str:
    return f"Expected the calibration metadata of {os.fspath(path)!r} to"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    return _is_number(value) and abs(value) <= _LARGEST_GAMMA


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value.isprintable() and len(value) <= 1000


def _is_classes(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(map(_is_count, value)) and len(set(value)) == len(value)


def _is_arguments(value: Any) -> bool:
    return isinstance(value, Mapping) and all(map(_is_text, value))


def _is_data_config(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and value.keys() <= _DATA_CONFIG.keys()
        and all(_DATA_CONFIG[key](value[key]) for key in value)
    )


def _are_numbers(least: float, integers: bool = False) -> Callable[[Any], bool]:
    """Return a check for one to four finite numbers above ``least``, one for each channel or side of an image."""

    def check(value: Any) -> bool:
        return (
            isinstance(value, (list, tuple))
            and 1 <= len(value) <= 4
            and all(_is_finite(item) and least < item <= 2048 for item in value)  # larger images would fill the memory
            and all(isinstance(item, int) or not integers for item in value)
        )

    return check


# What timm's `resolve_data_config` returns, and reads of the arguments of its training script.
_DATA_CONFIG: dict[str, Callable[[Any], bool]] = {
    "input_size": lambda value: _are_numbers(0, integers=True)(value) and len(value) == 3,
    "mean": _are_numbers(-math.inf),
    "std": _are_numbers(0),
    "crop_pct": lambda value: _is_finite(value) and 0.1 <= value <= 2,
    "interpolation": lambda value: value in ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos", "random"),
}


def _is_share(value: Any) -> bool:
    return _is_number(value) and 0 <= value <= 1


def _is_share_table(value: Any) -> bool:
    if not isinstance(value, Mapping) or not {"absent_share", "gamma"} <= value.keys() <= _SHARE_TABLE.keys():
        return False
    if not all(_SHARE_TABLE[key](value[key]) for key in value):
        return False
    shares = value["absent_share"]
    return (
        1 < len(shares) <= 1000
        and all(len(column) == len(shares) for column in value.values() if not _is_number(column))
        and shares[0] > 0
        and shares[-1] < 1
        and all(map(lt, shares, shares[1:]))
    )


def _are(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Return a check for a list of values that each pass ``check``."""
    return lambda value: isinstance(value, (list, tuple)) and all(map(check, value))


# What `ShareTable.as_dict` returns.
_SHARE_TABLE: dict[str, Callable[[Any], bool]] = {
    "gamma": _are(_is_finite),
    **dict.fromkeys(
        ("absent_share", "seen_accuracy", "absent_accuracy", "seen_below", "absent_below", "break_even_share"),
        _are(_is_share),
    ),
    **dict.fromkeys(("seen_accuracy_without", "absent_accuracy_without"), _is_share),
}

_TEXT: tuple[Callable[[Any], bool], str] = (_is_text, "a line of text")
_CLASSES: tuple[Callable[[Any], bool], str] = (_is_classes, "a list of class ids")
_SHARE: tuple[Callable[[Any], bool], str] = (_is_share, "a share in [0, 1]")
_CHANGE: tuple[Callable[[Any], bool], str] = (
    lambda value: _is_number(value) and -1 <= value <= 1,
    "a change in [-1, 1]",
)
_ENTRIES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "gamma": (_is_finite, "a finite number"),
    "standard_error": (lambda value: _is_number(value) and not _LARGEST_GAMMA < abs(value) < math.inf, "a number"),
    "num_samples": (_is_count, "a number of samples"),
    "estimator": _TEXT,
    "absent_share": _SHARE,
    "absent_share_interval": (
        lambda value: _are(_is_share)(value) and len(value) == 2 and value[0] <= value[1],
        "both ends of an interval of shares",
    ),
    "seen_accuracy": _SHARE,
    "seen_change": _CHANGE,
    "absent_change": _CHANGE,
    "break_even_share": _SHARE,
    "verdict": (lambda value: value in VERDICTS, f"one of {', '.join(VERDICTS)}"),
    "held_out": (lambda value: isinstance(value, bool), "true or false"),
    "share_table": (_is_share_table, "columns of numbers for shares in (0, 1) that increase"),
    "num_classes": (lambda value: _is_count(value) and 1 < value <= _MOST_CLASSES, "a number of classes"),
    "seen_classes": _CLASSES,
    "absent_classes": _CLASSES,
    "model": _TEXT,
    "model_args": (_is_arguments, "named arguments"),
    "data_config": (_is_data_config, "the input size, mean, std, crop and interpolation of the images"),
    "version": _TEXT,
    "torch_version": _TEXT,
    "lightning_version": _TEXT,
    "folded": (lambda value: isinstance(value, bool), "true or false"),
}
