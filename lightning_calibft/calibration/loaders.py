"""Reading the fine-tuning data once, in order and whole, without touching the loader that the training uses."""

from __future__ import annotations

import copy
import math
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from itertools import islice
from typing import Any, cast

import torch
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import Tensor, distributed
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from lightning_calibft._arguments import is_integer
from lightning_calibft.calibration.distributed import rank_and_world_size

_MOST_SAMPLES = torch.iinfo(torch.long).max


def check_max_samples(max_samples: int | None) -> None:
    """Refuse to read nothing.

    Raises:
        ValueError: If ``max_samples`` is no integer of at least 1.
    """
    if max_samples is not None and not (is_integer(max_samples) and 1 <= max_samples <= _MOST_SAMPLES):
        raise ValueError(f"Expected argument `max_samples` to be an integer of at least 1, but got {max_samples!r}.")


def calibration_loaders(
    loaders: Any,
    max_samples: int | None = None,
    max_batches: int | None = None,
    *,
    at_random: bool = False,
    share: tuple[int, int] | None = None,
) -> list[Iterable[Any]]:
    """Return, for each loader in ``loaders``, one that reads this process' share of its samples once and in order.

    A plain ``DataLoader`` over a map-style dataset is built anew over the same samples, collate function and workers:
    iterating the user's own again can shorten the epoch that it is in the middle of, and drops or pads samples. Every
    other loader is used as it is, but for persistent workers, of which it gets its own.

    Args:
        loaders: A loader, a collection of loaders, or any iterable of batches.
        max_samples: Read a random subset of this size (drawn with a fixed seed), of each map-style dataset its share.
        max_batches: Read as many samples as are in this many of the loader's batches: the first, or of a loader that
            shuffles a random subset.
        at_random: Read a plain loader in random order (with a fixed seed), so that one can stop anywhere.
        share: Which share of a plain loader's samples is read, and of how many. ``None``: each process reads its own.

    Raises:
        TypeError: If ``loaders`` is no iterable.
        ValueError: If there are several loaders to read ``at_random``: what is read first would be of the first alone.
    """
    if not isinstance(loaders, Iterable) or isinstance(loaders, (str, bytes)) or getattr(loaders, "ndim", 1) == 0:
        kind = type(loaders).__name__
        raise TypeError(f"Expected argument `loader` to be a DataLoader or an iterable of batches, but got a {kind}.")
    leaves = CombinedLoader(loaders, "sequential").flattened
    flat: list[Any] = [loaders] if any(_of_batches(leaf) for leaf in leaves) else leaves
    if at_random and len(flat) > 1:
        raise ValueError(
            f"Expected argument `tolerance` to be None with several loaders, but got {len(flat)} of them: the first"
            " samples are of one alone. Limit what is read with `max_samples`, or join the datasets with"
            " `torch.utils.data.ConcatDataset`."
        )
    limit = max_samples and math.ceil(max_samples / max(1, len(flat)))
    share = share or rank_and_world_size()
    return [
        _anew(loader, limit, max_batches, at_random, share) if _is_plain(loader) else _apart(loader) for loader in flat
    ]


def batches_of(loader: Iterable[Any], max_batches: int | None) -> Iterator[Any]:
    """Yield the first batches of a loader, and leave its generators of random numbers as they were.

    After an error in it, its worker processes end at once.
    """
    states = [(generator, generator.get_state()) for generator in _generators(loader)]
    try:
        yield from islice(loader, max_batches)
    except Exception as error:
        if getattr(loader, "num_workers", 0):
            # The frames of torch hold each other and the workers: these would stay until Python looks for such cycles,
            # which then waits 5 seconds for each of them.
            traceback.clear_frames(error.__traceback__)
        raise
    finally:
        for generator, state in states:
            generator.set_state(state)


def _generators(loader: Any) -> list[torch.Generator]:
    if not isinstance(loader, DataLoader):
        return []
    parts = [loader, loader.sampler, loader.batch_sampler, getattr(loader.batch_sampler, "sampler", None)]
    values = [value for part in parts for value in getattr(part, "__dict__", {}).values()]
    return [value for value in values if isinstance(value, torch.Generator)]


def _apart(loader: Any) -> Any:
    """Return a loader without the workers that the user's own has, if they would end its epoch to begin another."""
    if isinstance(loader, DataLoader) and loader.persistent_workers:
        loader = copy.copy(loader)
        loader._iterator = None  # private in torch, and where it keeps them
    return loader


def _of_batches(leaf: Any) -> bool:
    """Tell a batch, or a part of one, from a loader."""
    return isinstance(leaf, (Tensor, Mapping)) or not isinstance(leaf, Iterable)


def _is_plain(loader: Any) -> bool:
    # A subclass may give batches that its dataset and collate function alone do not explain.
    return type(loader) is DataLoader and not isinstance(loader.dataset, IterableDataset) and _sized(loader)


def _sized(loader: DataLoader) -> bool:
    return hasattr(_batches_of_indices(loader), "__len__")


def _anew(
    loader: DataLoader, max_samples: int | None, max_batches: int | None, at_random: bool, share: tuple[int, int]
) -> DataLoader:
    (rank, shares), indices, batch_size = share, sample_indices(loader), _batch_size(loader)
    if max_batches is not None:
        size, sampler = max_batches * (batch_size or 1) * shares, _batches_of_indices(loader)
        shuffles = not isinstance(sampler, SequentialSampler) and getattr(sampler, "shuffle", True)
        indices = _random_subset(indices, size) if shuffles else indices[:size]
    if max_samples is not None:
        indices = _random_subset(indices, max_samples)
    if at_random:
        indices = [indices[i] for i in _random_order(indices)]
    return DataLoader(
        loader.dataset,
        batch_size=batch_size,
        sampler=indices[rank::shares],
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        prefetch_factor=loader.prefetch_factor if loader.num_workers else None,
        generator=torch.Generator(),  # a loader without one draws its seed from the global random stream
    )


def _random_subset(indices: Sequence[Any], size: int) -> Sequence[Any]:
    """Return ``size`` of the indices, drawn with a fixed seed, or all if there are no more."""
    if size >= len(indices):
        return indices
    return [indices[i] for i in sorted(_random_order(indices)[:size])]


def _random_order(indices: Sequence[Any]) -> list[int]:
    return torch.randperm(len(indices), generator=torch.Generator().manual_seed(0)).tolist()


def _batches_of_indices(loader: DataLoader) -> Any:
    """Return what tells the loader's indices: a sampler, or the user's own batch sampler."""
    if _own_batches(loader):
        return loader.batch_sampler
    sampler = getattr(loader.batch_sampler, "sampler", loader.sampler)
    # Private, and the one way back to the user's sampler: what Lightning's wrapper draws depends on the process.
    return cast(Any, sampler.dataset)._sampler if isinstance(sampler, DistributedSamplerWrapper) else sampler


def _to_read(loader: DataLoader) -> Any:
    """Return a copy of what tells the indices: to iterate the user's own would use up random numbers of its own."""
    sampler = _batches_of_indices(loader)
    try:
        return copy.deepcopy(sampler, {id(loader.dataset): loader.dataset})  # which stays shared
    except Exception:  # whatever it holds says that it cannot be copied
        return sampler


def _own_batches(loader: DataLoader) -> bool:
    return loader.batch_sampler is not None and type(loader.batch_sampler) is not BatchSampler


def _batch_size(loader: DataLoader) -> int | None:
    if _own_batches(loader):
        return max(map(len, _to_read(loader)), default=1)
    return getattr(loader.batch_sampler, "batch_size", None)


def sample_indices(loader: DataLoader) -> Sequence[Any]:
    """Return the samples that the loader draws from, which can be fewer than its dataset holds."""
    sampler = _batches_of_indices(loader)
    data = getattr(sampler, "data_source", getattr(sampler, "dataset", None))
    if type(sampler) in (SequentialSampler, RandomSampler, DistributedSampler) and data is loader.dataset:
        return range(len(cast(Sized, data)))
    if isinstance(sampler, WeightedRandomSampler):
        return sampler.weights.nonzero().flatten().tolist()
    if isinstance(sampler, SubsetRandomSampler):  # iterating it would use up random numbers of its generator
        return sorted(set(sampler.indices))
    drawn = {index for batch in _to_read(loader) for index in batch} if _own_batches(loader) else set(_to_read(loader))
    world_size = rank_and_world_size()[1]
    if world_size > 1:
        # A distributed sampler gives each process a share, padded: together they are what the run trains on.
        shares: list[set[Any]] = [set()] * world_size
        distributed.all_gather_object(shares, drawn)
        drawn = set().union(*shares)
    return sorted(drawn)
