"""What a dataset says about its labels, without loading a sample."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset


def labels_of(dataset: Any) -> Tensor | None:
    """Return the label of each sample, shape ``(N,)``, if the dataset has a list of them, or else ``None``.

    The lists of ``Subset``, ``ConcatDataset`` and ``TensorDataset`` are read, and the attributes ``targets``,
    ``labels``, ``samples`` and ``imgs`` that the datasets of torchvision and many others have. Properties are not read,
    since they may load samples. A dataset that transforms its labels says nothing here, and neither does one whose
    lists are of different labels.

    Example:
        >>> labels_of(Subset(TensorDataset(torch.randn(4, 2), torch.tensor([5, 5, 7, 9])), [0, 2]))
        tensor([5, 7])
    """
    if _is_plain(dataset, Subset):
        return labels_at(dataset.indices, labels_of(dataset.dataset))
    if _is_plain(dataset, ConcatDataset):
        parts = [labels_of(part) for part in dataset.datasets]
        known = [part for part in parts if part is not None]
        return torch.cat(known) if len(known) == len(parts) else None
    if _is_plain(dataset, TensorDataset):
        found = [_as_labels(tensor, len(dataset)) for tensor in dataset.tensors]
    elif _transforms_labels(dataset):
        return None
    else:
        lists = [_attribute(dataset, name) for name in ("targets", "labels")]
        pairs = [_attribute(dataset, name) for name in ("samples", "imgs")]
        lists += [[pair[1] for pair in each] for each in pairs if _are_pairs(each)]
        found = [_as_labels(each, _length(dataset)) for each in lists if each is not None]
    labels_found = [each for each in found if each is not None]
    if labels_found and all(torch.equal(each, labels_found[0]) for each in labels_found):
        return labels_found[0]
    return None


def labels_at(indices: Any, labels: Tensor | None) -> Tensor | None:
    """Return the labels at some indices, or ``None`` if the labels are ``None`` or the indices are no positions."""
    if labels is not None:
        with suppress(IndexError, TypeError, ValueError):
            return labels[torch.as_tensor(indices, dtype=torch.long)]
    return None


def class_names_of(dataset: Any) -> dict[int, str]:
    """Return the names of the labels of a dataset by its attribute ``class_to_idx`` or ``classes``, if it has one.

    Example:
        >>> from torchvision.datasets import MNIST
        >>> class_names_of(MNIST)[3]
        '3 - three'
    """
    if isinstance(dataset, Subset):
        return class_names_of(dataset.dataset)
    if isinstance(dataset, ConcatDataset):
        named = [class_names_of(part) for part in dataset.datasets]
        return named[0] if all(each == named[0] for each in named) else {}
    by_name, names = _attribute(dataset, "class_to_idx"), _attribute(dataset, "classes")
    if isinstance(by_name, Mapping) and all(isinstance(label, int) for label in by_name.values()):
        return {label: str(name) for name, label in by_name.items()}
    if isinstance(names, Sequence) and all(isinstance(name, str) for name in names):
        return dict(enumerate(names))
    return {}


def class_names_of_loaders(loaders: Iterable[Any]) -> dict[int, str]:
    """Return the names that the datasets of some loaders have for their labels, if they have the same names."""
    named = [class_names_of(getattr(loader, "dataset", None)) for loader in loaders]
    return named[0] if named and all(each == named[0] for each in named) else {}


def _is_plain(dataset: Any, kind: type[Dataset[Any]]) -> bool:
    """Return whether a dataset is of a kind of torch's and returns its samples, not others made from them."""
    return isinstance(dataset, kind) and type(dataset).__getitem__ is kind.__getitem__


def _attribute(dataset: Any, name: str) -> Any:
    """Return an attribute that holds data, or ``None`` if there is none or a function would compute it."""
    value = inspect.getattr_static(dataset, name, None)
    return None if hasattr(type(value), "__get__") else value


def _transforms_labels(dataset: Any) -> bool:
    own, joint = (inspect.getattr_static(dataset, name, None) for name in ("target_transform", "transforms"))
    # torchvision's `transforms` takes image and label together. With a `transform` of images, it holds that one.
    return own is not None or (joint is not None and type(joint).__name__ != "StandardTransform")


def _are_pairs(samples: Any) -> bool:
    return isinstance(samples, (list, tuple)) and all(
        isinstance(each, (list, tuple)) and len(each) == 2 for each in samples
    )


def _length(dataset: Any) -> int | None:
    try:
        return len(dataset)
    except (TypeError, NotImplementedError):
        return None


def _as_labels(values: Any, length: int | None) -> Tensor | None:
    """Return ``length`` integers as a vector, or ``None`` if ``values`` are anything else."""
    with suppress(Exception):  # whatever it is, it does not list labels then
        array = np.asarray(values.cpu() if isinstance(values, Tensor) else values)
        if array.ndim == 2 and array.shape[1] == 1:
            array = array[:, 0]
        if array.ndim == 1 and len(array) == length and array.dtype.kind in "iu":
            return torch.from_numpy(array.astype(np.int64))
    return None
