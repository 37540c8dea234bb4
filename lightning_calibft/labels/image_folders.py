"""Folders of images, as timm reads them, and the rows of the head that they belong to."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from timm.data import create_transform, infer_imagenet_subset, resolve_model_data_config
from torch import nn
from torchvision.datasets import ImageFolder

from lightning_calibft._format import StrPath
from lightning_calibft.labels.class_map import resolve_class_map


def data_config(model: nn.Module, **overrides: Any) -> dict[str, Any]:
    """Return the input size, normalization and cropping that timm knows for a model, some of them replaced."""
    given = {key: value for key, value in overrides.items() if value is not None}
    config: dict[str, Any] = resolve_model_data_config(model, given)
    return config


def open_folder(root: StrPath, config: Mapping[str, Any]) -> ImageFolder:
    """Open a folder with one folder of images a class, with timm's transforms for evaluation."""
    return ImageFolder(os.fspath(root), transform=create_transform(**config, is_training=False))


def rows_of_folders(
    folders: Sequence[str], class_map: str | None, label_names: str | None, num_classes: int
) -> dict[int, int]:
    """Return the head's row of each folder, by its number.

    Args:
        folders: Names of the folders, in the order in which they number the classes.
        class_map: As in :func:`~lightning_calibft.calibrate`, or a JSON file that maps names of folders to rows.
            ``None``: the folders are named by their rows, or by the names of the rows.
        label_names: As in :func:`~lightning_calibft.calibrate`. ``None``: WordNet ids, of ImageNet heads.
        num_classes: Number of rows.

    Raises:
        ValueError: If a folder has no row, or ``class_map`` is about another number of folders.
    """
    targets: Any = class_map
    if class_map is None:
        named_by_rows = label_names is None and all(name.isdecimal() for name in folders)
        targets = [int(name) for name in folders] if named_by_rows else list(folders)
        label_names = label_names or infer_imagenet_subset({"num_classes": num_classes})
    elif os.path.isfile(class_map) and isinstance(by_name := json.loads(Path(class_map).read_text()), Mapping):
        if missing := sorted(set(folders) - by_name.keys()):
            raise ValueError(f"Expected {class_map!r} to name every folder, but it lacks {', '.join(missing)}.")
        targets = [by_name[name] for name in folders]
    rows: dict[int, int] = resolve_class_map(targets, label_names, num_classes)
    if len(rows) != len(folders):
        raise ValueError(
            f"Expected argument `class_map` to give the row of {len(folders)} folders, but got {len(rows)} rows. Name"
            " the folders by WordNet ids and pass `label_names`, or map their names in a JSON file."
        )
    return rows
