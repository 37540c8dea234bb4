"""Checks of arguments, and the errors that they raise."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral, Real
from typing import cast

import torch
from torch import Tensor, nn

from lightning_calibft._format import check_path as check_path

_LARGEST = torch.iinfo(torch.long).max


def is_integer(value: object) -> bool:
    """Return whether a value is an integer. A ``bool`` is not."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def check_integer(name: str, value: object, least: int = -_LARGEST, most: int = _LARGEST) -> None:
    """Raise if an argument is not an integer, or is out of range."""
    if not is_integer(value):
        raise TypeError(f"Expected argument `{name}` to be an integer, but got {value!r}.")
    number = cast(int, value)
    if number < least:
        raise ValueError(f"Expected argument `{name}` to be at least {least}, but got {value}.")
    if number > most:
        raise ValueError(f"Expected argument `{name}` to be at most {most}, but got {value}.")


def check_number(name: str, value: object) -> float:
    """Return an argument as a float; raise if it is not a real number or a tensor with one element."""
    one = isinstance(value, Tensor) and value.numel() == 1 and not value.is_meta
    number = value.item() if isinstance(value, Tensor) and one else value
    if isinstance(number, bool) or not isinstance(number, Real):
        raise TypeError(f"Expected argument `{name}` to be a number, but got {value!r}.")
    try:
        return float(number)
    except OverflowError:
        raise ValueError(
            f"Expected argument `{name}` to be a number that fits in float64, but got {value!r}."
        ) from None


def check_gamma(gamma: object) -> float:
    """Return gamma as a float; raise if it is not a number or not finite in float32."""
    number = check_number("gamma", gamma)
    if not abs(number) <= torch.finfo(torch.float32).max:
        raise ValueError(f"Expected argument `gamma` to be finite in float32, but got {gamma}.")
    return number


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raise if an argument is not one of the allowed strings."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"Expected argument `{name}` to be one of {', '.join(map(repr, choices))}, but got {value!r}.")


def check_type(name: str, value: object, kind: type, remedy: str = "") -> None:
    """Raise if an argument is not an instance of a class."""
    if not isinstance(value, kind):
        got = f"the class {value.__name__}" if isinstance(value, type) else f"a {type(value).__name__}"
        raise TypeError(f"Expected argument `{name}` to be a {kind.__name__}, but got {got}.{remedy}")


def check_items(name: str, value: object, kind: type) -> None:
    """Raise if an argument is not a nonempty list of instances of a class."""
    listed = isinstance(value, Sequence) and not isinstance(value, (str, bytes)) and len(value) > 0
    if not listed or not all(isinstance(item, kind) for item in cast(Sequence[object], value)):
        raise TypeError(f"Expected argument `{name}` to be a list of at least one {kind.__name__}, but got {value!r}.")


def check_model(name: str, value: object) -> None:
    """Raise if an argument is not a model."""
    check_type(name, value, nn.Module, " Pass the `torch.nn.Module` itself, with its weights loaded.")


def check_tensor(name: str, value: object) -> None:
    """Raise if an argument is not a dense tensor. The device ``meta`` is allowed: not all callers read the values."""
    if not isinstance(value, Tensor):
        raise TypeError(
            f"Expected argument `{name}` to be a tensor, but got a {type(value).__name__}. Convert it with"
            " `torch.as_tensor`."
        )
    if value.layout != torch.strided or value.is_nested or value.is_quantized:
        kind = "quantized" if value.is_quantized else "sparse or nested"
        raise TypeError(
            f"Expected argument `{name}` to be a dense tensor, but got a {kind} one. Convert it with `to_dense`,"
            " `dequantize` or `to_padded_tensor`."
        )


def check_class_ids(name: str, value: Tensor, remedy: str) -> None:
    """Raise if labels are not integers: soft, multi-label and boolean labels do not name a single class."""
    if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise TypeError(
            f"Expected {name} to be a tensor of class ids, but got dtype {value.dtype} with shape {tuple(value.shape)}."
            f" Soft and multi-label targets do not name a single class. {remedy}"
        )


def check_values(name: str, value: Tensor) -> None:
    """Raise if a tensor has a shape but no values."""
    if value.is_meta:
        raise TypeError(f"Expected argument `{name}` to have values, but got a tensor on the device 'meta'.")


def check_absent_share(value: object) -> float | None:
    """Return a share of absent samples as a float, or ``None``; raise if it is neither."""
    if value is None:
        return None
    share = check_number("absent_share", value)
    if not 0 < share < 1:
        raise ValueError(
            f"Expected argument `absent_share` to be None or a number in (0, 1), but got {value!r}. It is the share of"
            " samples of absent classes that the model will meet. If there are none, do not calibrate."
        )
    return share
