"""Names of the rows of classification heads, and of the classes of well-known subsets of ImageNet."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import Any

from lightning_calibft._format import LARGEST_JSON, parse_json

LabelNames = list[str] | str | os.PathLike[str]

LABEL_SETS = (
    "imagenet-1k",
    "imagenet-12k",
    "imagenet-21k-goog",
    "imagenet-21k-miil",
    "imagenet-22k",
    "imagenet-22k-ms",
)
_OF_TIMM = {"imagenet-a": "imagenet_a", "imagenet-r": "imagenet_r", "mini-imagenet": "mini_imagenet"}
_WORDNET_IDS = {  # https://github.com/fastai/imagenette
    "imagenette": "n01440764 n02102040 n02979186 n03000684 n03028079 n03394916 n03417042 n03425413 n03445777 n03888257",
    "imagewoof": "n02086240 n02087394 n02088364 n02089973 n02093754 n02096294 n02099601 n02105641 n02111889 n02115641",
}
CLASS_MAPS = (*_OF_TIMM, *_WORDNET_IDS)


def wordnet_ids(name: str) -> list[str]:
    """Return the WordNet ids of the classes of a known dataset, in the order of its folders."""
    if name in _WORDNET_IDS:
        return _WORDNET_IDS[name].split()
    # This path is private: timm has these lists for its own evaluation scripts, but no function that returns them.
    return sorted((files("timm.data") / "_info" / f"{_OF_TIMM[name]}_synsets.txt").read_text().split())


def rows_of_names(label_names: LabelNames, num_classes: int | None) -> dict[str, list[int]]:
    """Return the rows with each name, in the order of the rows, and then those with each word in small letters.

    ``label_names`` and the errors are as in ``resolve_class_map``.
    """
    names: Any = label_names
    descriptions: list[str] | None = None  # such as "tabby, tabby cat"
    if isinstance(label_names, (str, os.PathLike)):
        if label_names in LABEL_SETS:
            from timm.data import ImageNetInfo

            info = ImageNetInfo(str(label_names))
            names, descriptions = info.label_names(), info.label_descriptions()
        elif Path(label_names).suffix == ".json":
            names = read_json("label_names", label_names, LABEL_SETS)
        else:
            names = [line.strip() for line in _read("label_names", label_names, LABEL_SETS).splitlines()]
    if not isinstance(names, Sequence):
        raise TypeError(f"Expected argument `label_names` to be a list of names, but got {names!r}.")
    if wrong := [name for name in names if not isinstance(name, str)]:
        raise TypeError(f"Expected argument `label_names` to hold the names of the head's rows, but got {wrong[0]!r}.")
    if num_classes is not None and len(names) != num_classes:
        raise ValueError(
            f"Expected argument `label_names` to name each of the {num_classes} rows of the head, but got {len(names)}"
            " names."
        )
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        rows.setdefault(name, []).append(row)
    words: dict[str, list[int]] = {}
    for row, description in enumerate(names if descriptions is None else descriptions):
        for word in dict.fromkeys(description.lower().split(", ")):
            words.setdefault(word, []).append(row)
    return {**rows, **{word: of_word for word, of_word in words.items() if word not in rows}}


def names_by_row(label_names: LabelNames, num_classes: int) -> dict[int, str]:
    """Return the name of each row. The WordNet ids of timm's label sets are followed by their first word."""
    names: dict[int, list[str]] = {}
    for name, rows in rows_of_names(label_names, num_classes).items():
        for row in rows:
            names.setdefault(row, []).append(name)
    shown = 2 if label_names in LABEL_SETS else 1
    return {row: " ".join(of_row[:shown]) for row, of_row in names.items()}


def row_names_of(model: Any) -> list[str]:
    """Return the names of the rows of the head in the config of a transformers model, or an empty list."""
    for module in model.modules():
        names = getattr(getattr(module, "config", None), "id2label", None)
        if isinstance(names, Mapping) and set(names) == set(range(len(names))):
            return [str(names[row]) for row in range(len(names))]
    return []


def label_set_of(num_classes: int | None) -> str:
    """Return the label set for a head with ``num_classes`` rows. ``None`` means 1000.

    Raises:
        ValueError: If timm has no such label set.
    """
    from timm.data import infer_imagenet_subset

    name: str | None = infer_imagenet_subset({"num_classes": 1000 if num_classes is None else num_classes})
    if name is None:
        raise ValueError(
            f"Expected argument `label_names` to give the WordNet ids of a head of {num_classes} rows, which is not a"
            " known ImageNet head, but got None. Pass the list of ids, or the rows themselves as `class_map`."
        )
    return name


def read_json(argument: str, path: Any, known: Sequence[str]) -> Any:
    """Return the content of a JSON file. If it is missing, the error lists the ``known`` names."""
    text = _read(argument, path, known)
    try:
        return parse_json(text)
    except ValueError as error:
        raise ValueError(
            f"Expected argument `{argument}` to be a JSON file, but {os.fspath(path)!r} is not: {error}."
        ) from error


def _read(argument: str, path: Any, known: Sequence[str]) -> str:
    try:
        if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
            raise OSError("it is a device, a pipe or a socket")  # which may give nothing, or never end
        if os.path.getsize(path) > LARGEST_JSON:
            raise OSError(f"it takes {os.path.getsize(path) / 2**30:.1f} GiB")
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:  # ValueError: the file is not text, or the path has a null byte
        raise ValueError(
            f"Expected argument `{argument}` to be one of {', '.join(map(repr, known))} or the path of a file, but"
            f" got {os.fspath(path)!r}: {error}.{did_you_mean(os.fspath(path), known)}"
        ) from error


def did_you_mean(name: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    """Return a "Did you mean" question with the known names close to ``name``, or an empty string."""
    close = get_close_matches(name, known, n=3)
    return f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
