"""The user's training data, restricted to some of its classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from lightning_calibft.calibration import BatchReader, calibration_loaders, sample_indices

_SAMPLERS = (SequentialSampler, RandomSampler, SubsetRandomSampler, WeightedRandomSampler)


def check_loaders(loaders: Any) -> None:
    """Refuse loaders whose samples cannot be told apart by their class.

    Raises:
        ValueError: If one is not a plain ``DataLoader`` of a map-style dataset with one of torch's samplers.
    """
    for loader in CombinedLoader(loaders, "sequential").flattened:
        met = None
        if type(loader) is not DataLoader or isinstance(loader.dataset, IterableDataset):
            met = f"a {type(getattr(loader, 'dataset', loader)).__name__}"
        elif type(loader.sampler) not in _SAMPLERS or type(loader.batch_sampler) not in (BatchSampler, type(None)):
            met = f"a {type(loader.sampler).__name__} in a {type(loader.batch_sampler).__name__}"
        if met is not None:
            raise ValueError(
                "Expected training data of plain `DataLoader`s over map-style datasets, with torch's own samplers, for"
                f" the estimator 'pcv', which trains on a part of their classes, but got {met}. Choose another"
                " `estimator`, or call `pseudo_cross_validation` with a `fit_fn` of your own."
            )


class RestrictedData:
    """The rows of all samples of the loaders of a Trainer, and such loaders for some of them.

    Args:
        loaders: The training loaders, in whatever collection.
        reader: Finds the labels in a batch.

    Attributes:
        rows: The head's row of each sample, of one loader after the other.
    """

    def __init__(self, loaders: Any, reader: BatchReader) -> None:
        check_loaders(loaders)
        self._loaders = loaders
        self._leaves: list[DataLoader] = CombinedLoader(loaders, "sequential").flattened
        self._rows = [_rows(loader, reader) for loader in self._leaves]
        self.rows = torch.cat(self._rows)

    def of_classes(self, classes: Sequence[int]) -> tuple[Any, float]:
        """Return the same collection of loaders for the samples of some classes, and their share of all samples."""
        kept = [torch.isin(rows, torch.tensor(classes)) for rows in self._rows]
        combined = CombinedLoader(self._loaders, "sequential")
        combined.flattened = [_restricted(loader, mask) for loader, mask in zip(self._leaves, kept, strict=True)]
        return combined.iterables, float(torch.cat(kept).double().mean())


def _rows(loader: DataLoader, reader: BatchReader) -> Tensor:
    (in_order,) = calibration_loaders(loader)
    return torch.cat([reader.rows(batch).cpu() for batch in in_order])


def _restricted(loader: DataLoader, kept: Tensor) -> DataLoader:
    indices = torch.tensor(list(sample_indices(loader)))[kept].tolist()
    subset = Subset(loader.dataset, indices)
    batch_sampler = cast("BatchSampler | None", loader.batch_sampler)
    batch_size = None if batch_sampler is None else batch_sampler.batch_size
    return DataLoader(
        subset,
        batch_size=batch_size,
        sampler=_sampler(loader.sampler, subset, indices, float(kept.double().mean())),
        # Else a small part could leave no batch at all.
        drop_last=batch_sampler is not None and batch_sampler.drop_last and len(subset) >= batch_sampler.batch_size,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        prefetch_factor=loader.prefetch_factor if loader.num_workers else None,
    )


def _sampler(sampler: Any, subset: Subset, indices: list[int], share: float) -> Sampler | None:
    """Return a sampler of the same kind, which draws as large a share of its samples."""
    if isinstance(sampler, WeightedRandomSampler):
        weights = sampler.weights[indices].tolist()
        return WeightedRandomSampler(weights, max(1, round(sampler.num_samples * share)), sampler.replacement)
    if isinstance(sampler, RandomSampler) and sampler.replacement:
        return RandomSampler(subset, replacement=True, num_samples=max(1, round(sampler.num_samples * share)))
    return None if isinstance(sampler, SequentialSampler) else RandomSampler(subset)
