"""Read image folders as timm does, and map them to the rows of the head."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from timm.data import create_transform, infer_imagenet_subset, resolve_model_data_config
from torch import nn
from torch.utils.data import Dataset
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS, default_loader

from lightning_calibft._format import StrPath
from lightning_calibft.labels.class_map import resolve_class_map
from lightning_calibft.labels.label_names import CLASS_MAPS, read_json


def data_config(model: nn.Module, **overrides: Any) -> dict[str, Any]:
    """Return timm's input size, normalization and cropping for a model. Overrides other than ``None`` replace them."""
    given = {key: value for key, value in overrides.items() if value is not None}
    channels = model.pretrained_cfg["input_size"][0]  # type: ignore[index]
    for name in ("mean", "std"):
        if len(given.get(name, [0])) not in (1, channels):
            raise ValueError(
                f"Expected argument `{name}` to hold one number, or one for each of the {channels} channels, but got"
                f" {given[name]}."
            )
    config: dict[str, Any] = resolve_model_data_config(model, {"in_chans": channels, **given})
    return config


def open_folder(
    root: StrPath, config: Mapping[str, Any], class_map: str | None, label_names: str | None, num_classes: int
) -> tuple[ImageFolder, list[int]]:
    """Open a folder that has one folder of images per class, with timm's evaluation transforms.

    Args:
        root: The folder.
        config: The return value of :func:`data_config`.
        class_map: As in :func:`rows_of_folders`.
        label_names: As in :func:`rows_of_folders`.
        num_classes: Number of rows of the head.

    Returns:
        The dataset, whose targets are rows of the head, and the sorted rows that it has.
    """
    dataset = ImageFolder(os.fspath(root), transform=create_transform(**config, is_training=False))
    rows = rows_of_folders(dataset.classes, class_map, label_names, num_classes)
    dataset.target_transform = rows.__getitem__
    return dataset, sorted(set(rows.values()))


class UnlabeledImages(Dataset[Any]):
    """All images in a folder and its subfolders, whose names mean nothing, in the order of their paths.

    Args:
        root: The folder.
        config: The return value of :func:`data_config`.

    Raises:
        FileNotFoundError: If there is no such folder, or no image in it.
    """

    def __init__(self, root: StrPath, config: Mapping[str, Any]) -> None:
        self._paths = sorted(str(path) for path in Path(root).rglob("*") if path.suffix.lower() in IMG_EXTENSIONS)
        if not self._paths:
            raise FileNotFoundError(f"Found no images in the folder {os.fspath(root)!r} or in folders inside it.")
        self._transform = create_transform(**config, is_training=False)

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> Any:
        return self._transform(default_loader(self._paths[index]))


def check_same_numbers(class_map: str | None, folders: Sequence[str], others: Sequence[str]) -> None:
    """Raise if a class map that goes by the numbers of folders would give folders of one name different rows.

    Raises:
        ValueError: If the names differ and ``class_map`` is neither ``None`` nor a JSON file that maps names.
    """
    if class_map is not None and _rows_by_name(class_map) is None and list(folders) != list(others):
        raise ValueError(
            "Expected argument `class_map` to map the names of folders to rows, because the validation data has other"
            f" folders than the training data, but got {class_map!r}, which goes by their numbers. Write a JSON file of"
            " folder: row."
        )


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
    elif (by_name := _rows_by_name(class_map)) is not None:
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


def _rows_by_name(class_map: str) -> Mapping[str, Any] | None:
    """Return what a JSON file maps names of folders to, or ``None`` for another class map."""
    content = read_json("class_map", class_map, CLASS_MAPS) if os.path.isfile(class_map) else None
    return content if isinstance(content, Mapping) else None
