"""Take the samples of some classes from the user's training data."""

from __future__ import annotations

from collections.abc import Sequence, Sized
from typing import Any, cast

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from lightning_calibft.calibration.batch_reader import BatchReader
from lightning_calibft.calibration.loaders import calibration_loaders, flat_loaders, rebuilt_loader, sample_indices

_SAMPLERS = (SequentialSampler, RandomSampler, SubsetRandomSampler, WeightedRandomSampler, DistributedSampler)


def check_loaders(loaders: Any) -> None:
    """Check that the samples of some classes can be taken from the loaders.

    Raises:
        ValueError: If a loader is not a plain ``DataLoader`` over a map-style dataset with one of torch's samplers.
    """
    for loader in flat_loaders(loaders):
        problem = None
        if type(loader) is not DataLoader or isinstance(loader.dataset, IterableDataset):
            problem = f"a {type(getattr(loader, 'dataset', loader)).__name__}"
        elif type(loader.sampler) not in _SAMPLERS or type(loader.batch_sampler) not in (BatchSampler, type(None)):
            problem = f"a {type(loader.sampler).__name__} in a {type(loader.batch_sampler).__name__}"
        if problem is not None:
            raise ValueError(
                "Expected the training data to be plain `DataLoader`s over map-style datasets, with torch's own"
                " samplers, for the estimator 'pcv', which trains on a part of the classes, but got"
                f" {problem}. Choose another `estimator`, or call `pseudo_cross_validation` with your own `fit_fn`."
            )


class ClassSubset:
    """Makes loaders of the training samples of some classes.

    Args:
        loaders: The training loaders of a Trainer, in any collection. They do not change.
        reader: Reads the labels of a batch.

    Attributes:
        rows: The head's row of each sample, one loader after another.

    Raises:
        ValueError: If the samples of a class cannot be taken from a loader.
    """

    def __init__(self, loaders: Any, reader: BatchReader) -> None:
        check_loaders(loaders)
        self._loaders = loaders
        self._leaves: list[DataLoader[Any]] = flat_loaders(loaders)
        self._rows = [_rows(loader, reader) for loader in self._leaves]
        self.rows = torch.cat(self._rows)

    def of_classes(self, classes: Sequence[int]) -> tuple[Any, float]:
        """Return the collection with loaders of the samples of ``classes`` only, and their share of all samples."""
        kept = [torch.isin(rows, torch.tensor(classes)) for rows in self._rows]
        masks = iter(kept)
        subset = apply_to_collection(
            self._loaders, DataLoader, lambda loader: _subset(loader, next(masks)), wrong_dtype=(dict, list, tuple)
        )
        return subset, float(torch.cat(kept).double().mean())


def _rows(loader: DataLoader[Any], reader: BatchReader) -> Tensor:
    (in_order,) = calibration_loaders(loader)
    rows = torch.cat([reader.rows(batch).cpu() for batch in in_order])
    if len(rows) != (number := len(sample_indices(loader))):
        raise ValueError(
            f"Expected training data with one sample per index for the estimator 'pcv', but {number} indices give"
            f" {len(rows)} labels. Let the loader make the batches, or call `pseudo_cross_validation`."
        )
    return rows


def _subset(loader: DataLoader[Any], kept: Tensor) -> DataLoader[Any]:
    subset = Subset(loader.dataset, torch.tensor(list(sample_indices(loader)))[kept].tolist())
    sampler, batches = _sampler(loader.sampler, subset, kept), cast("BatchSampler | None", loader.batch_sampler)
    drawn = len(cast(Sized, sampler))
    return rebuilt_loader(
        loader,
        subset,
        batch_size=None if batches is None else batches.batch_size,
        sampler=sampler,
        # Keep the only batch. Drop a last batch of one sample, which batch normalization may refuse.
        drop_last=batches is not None
        and drawn >= batches.batch_size
        and (batches.drop_last or drawn % batches.batch_size == 1),
    )


def _sampler(sampler: Any, subset: Subset[Any], kept: Tensor) -> Sampler[int]:
    """Return a sampler of the same kind that draws from the subset as often as the user's does on average."""
    if isinstance(sampler, WeightedRandomSampler):
        weights = sampler.weights[subset.indices]
        drawn = max(1, round(sampler.num_samples * float(weights.sum() / sampler.weights.sum())))
        return WeightedRandomSampler(
            weights.tolist(), drawn if sampler.replacement else min(drawn, len(subset)), sampler.replacement
        )
    if isinstance(sampler, RandomSampler):
        drawn = max(1, round(sampler.num_samples * float(kept.double().mean())))
        return RandomSampler(subset, sampler.replacement, drawn)
    in_order = isinstance(sampler, SequentialSampler) or not getattr(sampler, "shuffle", True)
    return SequentialSampler(subset) if in_order else RandomSampler(subset)
