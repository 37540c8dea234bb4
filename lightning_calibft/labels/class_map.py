"""Map the class numbers of a dataset to the rows of the classification head."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, overload

import torch
from torch import Tensor

from lightning_calibft._arguments import check_class_ids, check_integer, check_tensor, is_integer
from lightning_calibft.labels.label_names import (
    CLASS_MAPS,
    LabelNames,
    did_you_mean,
    label_set_of,
    read_json,
    rows_of_names,
    wordnet_ids,
)

ClassMap = list[int] | list[str] | dict[int, int] | dict[int, str] | str | os.PathLike[str]

IGNORE_INDEX = -100  # the default of torch.nn.functional.cross_entropy: samples that the loss ignores
_MOST_TARGET = 2**39
# This is added to a target without a row. The sum is not a row of any head, and the target can be recovered from it.
UNMAPPED = -2 * _MOST_TARGET


@overload
def resolve_class_map(class_map: None, label_names: None = None, num_classes: int | None = None) -> None: ...
@overload
def resolve_class_map(
    class_map: ClassMap, label_names: LabelNames | None = None, num_classes: int | None = None
) -> dict[int, int]: ...
@overload
def resolve_class_map(
    class_map: ClassMap | None, label_names: LabelNames | None = None, num_classes: int | None = None
) -> dict[int, int] | None: ...
def resolve_class_map(
    class_map: ClassMap | None, label_names: LabelNames | None = None, num_classes: int | None = None
) -> dict[int, int] | None:
    """Return the row of the head of each target of a dataset.

    Several targets may have the same row. Their classes are then merged.

    Args:
        class_map: One of

            - a list with the row, or its name, of target 0, target 1 and so on;
            - a dict from targets (integers, or strings of digits) to rows or names;
            - the path of a JSON file with such a list or dict;
            - a dataset whose folders are WordNet ids in alphabetical order, as ``ImageFolder`` numbers them:
              ``"imagenet-a"``, ``"imagenet-r"``, ``"mini-imagenet"``, ``"imagenette"`` or ``"imagewoof"``.
        label_names: The names of the head's rows: a list, the path of a text file with one name per line, the path of a
            JSON file (``.json``) with a list, or one of timm's label sets, such as ``"imagenet-1k"``, which has WordNet
            ids and words (``"lion"``, ``"tabby cat"``). A name such as ``"tabby, tabby cat"`` can also be given by one
            of its words. Words may be written in any case, and with ``_`` for spaces.
        num_classes: Number of rows. ``None``: it is not checked, and the known datasets assume a head with 1000 rows.

    Returns:
        The row of each target, or ``None`` if ``class_map`` is ``None``.

    Raises:
        TypeError: If a target is not an integer, or a row is neither an integer nor a name (``bool`` is refused).
        ValueError: If a name is unknown or has several rows, if a row or a target is out of range, or if a file is
            missing or does not hold such a list or dict.

    Example:
        >>> resolve_class_map(["cat", "dog"], label_names=["ant", "cat", "cow", "dog"])
        {0: 1, 1: 3}
        >>> resolve_class_map("imagenette", num_classes=1000)[9]
        701
        >>> resolve_class_map(["lion", "tabby_cat"], label_names="imagenet-1k")
        {0: 291, 1: 281}
    """
    if class_map is None:
        if label_names is not None:
            raise ValueError(
                "Expected argument `class_map` to be given with `label_names`, but got None. Pass the name of each"
                " target, such as `class_map=dataset.classes`, or leave out `label_names`."
            )
        return None
    targets: Any = class_map
    if isinstance(class_map, str) and class_map in CLASS_MAPS:
        targets = wordnet_ids(class_map)
        label_names = label_set_of(num_classes) if label_names is None else label_names
    elif isinstance(class_map, (str, os.PathLike)):
        targets = read_json("class_map", class_map, CLASS_MAPS)
    if num_classes is not None:
        check_integer("num_classes", num_classes, least=1)
    by_name = None if label_names is None else rows_of_names(label_names, num_classes)
    rows = {target: _row(value, by_name) for target, value in _pairs(targets).items()}
    if wrong := [row for row in rows.values() if not 0 <= row < (num_classes or _MOST_TARGET)]:
        raise ValueError(
            f"Expected argument `class_map` to hold rows of the classification head, in [0, {num_classes or 'C'}), but"
            f" got {wrong[0]}."
        )
    return rows


def rows_tensor(rows: Mapping[int, int]) -> Tensor:
    """Return the sorted targets and their rows as a tensor of shape ``(2, K)`` for :func:`to_rows`."""
    return torch.tensor([sorted(rows), [rows[target] for target in sorted(rows)]])


def to_rows(target: Tensor, rows: Tensor, ignore_index: int | None = IGNORE_INDEX) -> Tensor:
    """Map targets to rows of the head, on their device and without synchronizing with the host.

    Args:
        target: Integers of any shape.
        rows: The return value of :func:`rows_tensor`, on the same device.
        ignore_index: The target that becomes ``IGNORE_INDEX``. ``UNMAPPED`` is added to a target without a row.

    Raises:
        TypeError: If ``target`` is not an integer tensor.

    Example:
        >>> to_rows(torch.tensor([1, -100, 0]), rows_tensor({0: 217, 1: 482}))
        tensor([ 482, -100,  217])
    """
    check_tensor("target", target)
    check_class_ids("argument `target`", target, "A `class_map` maps integers.")
    target = target.long()
    known, row = rows
    index = torch.searchsorted(known, target).clamp(max=len(known) - 1)
    mapped = torch.where(known[index] == target, row[index], target.clamp(-_MOST_TARGET, _MOST_TARGET - 1) + UNMAPPED)
    return mapped if ignore_index is None else torch.where(target == ignore_index, IGNORE_INDEX, mapped)


def is_unmapped(rows: Any) -> Any:
    """Return whether a number, or each number in a tensor, stands for a target without a row in :func:`to_rows`."""
    return rows < UNMAPPED // 2


def check_mapped(rows: Tensor) -> None:
    """Raise if :func:`to_rows` found a target without a row. This synchronizes with the host."""
    if len(unmapped := rows[is_unmapped(rows)]):
        raise unmapped_error(unmapped[0].item())


def unmapped_error(row: int | float) -> ValueError:
    """Return the error for a target without a row, given the number that :func:`to_rows` returned for it."""
    return ValueError(
        f"Expected argument `class_map` to give the row of every target, but {row - UNMAPPED} is missing. Add it,"
        " or leave its samples out of the data."
    )


def _pairs(targets: Any) -> dict[int, Any]:
    if isinstance(targets, Mapping):
        pairs = [(_target(target), value) for target, value in targets.items()]
    elif isinstance(targets, Sequence) and not isinstance(targets, (str, bytes)):
        pairs = list(enumerate(targets))
    else:
        raise TypeError(
            f"Expected argument `class_map` to be a list or dict of rows or names, the path of a JSON file, or one of"
            f" {', '.join(map(repr, CLASS_MAPS))}, but got {targets!r}."
        )
    if not pairs:
        raise ValueError("Expected argument `class_map` to map at least one target, but it is empty.")
    by_target = dict(pairs)
    if len(by_target) < len(pairs):
        raise ValueError(f"Expected argument `class_map` to hold each target once, but got {list(targets)!r}.")
    return by_target


def _target(key: Any) -> int:
    if isinstance(key, str) and key.isdecimal():  # as in JSON
        key = int(key)
    if not is_integer(key):
        raise TypeError(
            f"Expected argument `class_map` to map the dataset's targets, which are integers, but got {key!r}. To"
            " use folder names, pass the list `dataset.classes`."
        )
    if key < 0:
        raise ValueError(f"Expected argument `class_map` to map targets of at least 0, but got {key}.")
    if key >= _MOST_TARGET:
        raise ValueError(f"Expected argument `class_map` to map targets below {_MOST_TARGET}, but got {key}.")
    return int(key)


def _examples(by_name: Mapping[str, list[int]]) -> list[str]:
    """Return the first and the last name: of a label set, a WordNet id and a word."""
    names = list(by_name)
    return names[:1] + names[1:][-1:]


def _row(value: Any, by_name: Mapping[str, list[int]] | None) -> int:
    if is_integer(value):
        return int(value)
    if not isinstance(value, str):
        raise TypeError(f"Expected argument `class_map` to hold rows of the head or their names, but got {value!r}.")
    if by_name is None:
        raise ValueError(
            f"Expected argument `label_names` to name the rows of the head, because `class_map` holds the name"
            f" {value!r}, but got None. Pass the list of names, a file of them, or a label set such as 'imagenet-1k'."
        )
    rows = by_name.get(value) or by_name.get(value.replace("_", " ").lower(), [])
    if not rows:
        raise ValueError(
            f"Expected argument `class_map` to hold names such as {' or '.join(map(repr, _examples(by_name)))}, names"
            f" that are in `label_names`, but got {value!r}.{did_you_mean(value, by_name)}"
        )
    if len(rows) > 1:
        raise ValueError(
            f"Expected argument `label_names` to give the name {value!r}, which is in `class_map`, to one row, but the"
            f" rows {', '.join(map(str, rows))} have it. Pass the row itself."
        )
    return rows[0]
