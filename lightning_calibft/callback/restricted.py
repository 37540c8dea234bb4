"""The user's training data, restricted to some of its classes."""

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
    """Refuse loaders of which no part can be taken by class.

    Raises:
        ValueError: If one is not a plain ``DataLoader`` of a map-style dataset with one of torch's samplers.
    """
    for loader in flat_loaders(loaders):
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
        self._leaves: list[DataLoader[Any]] = flat_loaders(loaders)
        self._rows = [_rows(loader, reader) for loader in self._leaves]
        self.rows = torch.cat(self._rows)

    def of_classes(self, classes: Sequence[int]) -> tuple[Any, float]:
        """Return the same collection of loaders for the samples of some classes, and their share of all samples."""
        kept = [torch.isin(rows, torch.tensor(classes)) for rows in self._rows]
        masks = iter(kept)
        restricted = apply_to_collection(
            self._loaders, DataLoader, lambda loader: _restricted(loader, next(masks)), wrong_dtype=(dict, list, tuple)
        )
        return restricted, float(torch.cat(kept).double().mean())


def _rows(loader: DataLoader[Any], reader: BatchReader) -> Tensor:
    (in_order,) = calibration_loaders(loader)
    rows = torch.cat([reader.rows(batch).cpu() for batch in in_order])
    if len(rows) != (number := len(sample_indices(loader))):
        raise ValueError(
            f"Expected training data with one sample an index for the estimator 'pcv', but {number} indices give"
            f" {len(rows)} labels. Let the loader make the batches, or call `pseudo_cross_validation`."
        )
    return rows


def _restricted(loader: DataLoader[Any], kept: Tensor) -> DataLoader[Any]:
    subset = Subset(loader.dataset, torch.tensor(list(sample_indices(loader)))[kept].tolist())
    sampler, batches = _sampler(loader.sampler, subset, kept), cast("BatchSampler | None", loader.batch_sampler)
    drawn = len(cast(Sized, sampler))
    return rebuilt_loader(
        loader,
        subset,
        batch_size=None if batches is None else batches.batch_size,
        sampler=sampler,
        # Not if it leaves no batch at all; and no last batch of one sample, which batch normalization may refuse.
        drop_last=batches is not None
        and drawn >= batches.batch_size
        and (batches.drop_last or drawn % batches.batch_size == 1),
    )


def _sampler(sampler: Any, subset: Subset[Any], kept: Tensor) -> Sampler[int]:
    """Return a sampler of the same kind, which draws as often from the subset as the user's does on average."""
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
