"""Read image folders as timm does, and map them to the rows of the head."""

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
    """Return timm's input size, normalization and cropping for a model. Overrides other than ``None`` replace them."""
    given = {key: value for key, value in overrides.items() if value is not None}
    config: dict[str, Any] = resolve_model_data_config(model, given)
    return config


def open_folder(root: StrPath, config: Mapping[str, Any]) -> ImageFolder:
    """Open a folder that has one folder of images per class, with timm's evaluation transforms."""
    return ImageFolder(os.fspath(root), transform=create_transform(**config, is_training=False))


def rows_of_folders(
    folders: Sequence[str], class_map: str | None, label_names: str | None, num_classes: int
) -> dict[int, int]:
    """Return the head's row of each folder, by the number of the folder.

    Args:
        folders: Names of the folders, in the order of their class numbers.
        class_map: As in :func:`~lightning_calibft.calibrate`, or a JSON file that maps names of folders to rows.
            ``None``: the name of each folder is its row, or the name of its row.
        label_names: As in :func:`~lightning_calibft.calibrate`. ``None``: WordNet ids, for ImageNet heads.
        num_classes: Number of rows.

    Raises:
        ValueError: If a folder has no row, or ``class_map`` is for a different number of folders.
    """
    targets: Any = class_map
    if class_map is None:
        named_by_rows = label_names is None and all(name.isdecimal() for name in folders)
        targets = [int(name) for name in folders] if named_by_rows else list(folders)
        label_names = label_names or infer_imagenet_subset({"num_classes": num_classes})
    elif os.path.isfile(class_map) and isinstance(by_name := json.loads(Path(class_map).read_text()), Mapping):
        if missing := sorted(set(folders) - by_name.keys()):
            raise ValueError(f"Expected {class_map!r} to name every folder, but it does not name {', '.join(missing)}.")
        targets = [by_name[name] for name in folders]
    rows: dict[int, int] = resolve_class_map(targets, label_names, num_classes)
    if len(rows) != len(folders):
        raise ValueError(
            f"Expected argument `class_map` to give the row of {len(folders)} folders, but got {len(rows)} rows. Name"
            " the folders by WordNet ids and pass `label_names`, or map the folder names in a JSON file."
        )
    return rows
