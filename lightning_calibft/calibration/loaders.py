"""Reading the fine-tuning data once, in order and whole, without touching the loader that the training uses."""

from __future__ import annotations

import copy
import math
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import chain, islice, pairwise, zip_longest
from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from lightning_calibft._arguments import is_integer
from lightning_calibft.calibration.distributed import SharedErrors, rank_and_world_size

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
    errors: SharedErrors | None = None,
) -> list[Iterable[Any]]:
    """Return, for each loader in ``loaders``, one that reads this process' share of its samples once.

    Iterating the user's own loader again can shorten the epoch that it is in the middle of, and drops or pads samples.
    So a plain ``DataLoader`` over a map-style dataset whose sampler or batch sampler has a length is rebuilt, with the
    same dataset, collate function and workers:

    - Indices that are numbers or strings are read in order, each once.
    - Other indices, and the batches of a batch sampler of the user's own, stay together in the batches in which one
      epoch draws them: they may share a size that a new batch would mix. Indices met before are left out.

    Of a sampler of the user's own a copy is read, with a fixed seed and no further than its length. Every other loader
    is used as it is, but for persistent workers, of which it gets its own.

    Args:
        loaders: A loader, a collection of loaders, or any iterable of batches.
        max_samples: Read a random subset of this size (drawn with a fixed seed), of each map-style dataset its share,
            and whole batches of those that stay together. The memory that the indices take grows with this number, not
            with the size of the dataset.
        max_batches: Read as many samples as are in this many of the loader's batches: the first, or of a loader that
            shuffles a random subset.
        at_random: Read a rebuilt loader in random order (with a fixed seed), so that one can stop anywhere.
        share: Which share of a rebuilt loader's samples is read, and of how many. ``None``: each process reads its own.
        errors: Those of the processes, which put together what their samplers draw.

    Raises:
        TypeError: If ``loaders`` is no iterable.
        ValueError: If there are several loaders to read ``at_random``: what is read first would be of the first alone.
    """
    if not isinstance(loaders, Iterable) or isinstance(loaders, (str, bytes)) or getattr(loaders, "ndim", 1) == 0:
        kind = type(loaders).__name__
        raise TypeError(f"Expected argument `loader` to be a DataLoader or an iterable of batches, but got a {kind}.")
    leaves = flat_loaders(loaders)
    flat: list[Any] = [loaders] if any(_is_part_of_a_batch(leaf) for leaf in leaves) else leaves
    if at_random and len(flat) > 1:
        raise ValueError(
            f"Expected argument `tolerance` to be None with several loaders, but got {len(flat)} of them: the first"
            " samples are of one alone. Limit what is read with `max_samples`, or join the datasets with"
            " `torch.utils.data.ConcatDataset`."
        )
    limit = max_samples and math.ceil(max_samples / max(1, len(flat)))
    share, errors = share or rank_and_world_size(), errors or SharedErrors()
    return [
        _rebuilt_for_reading(loader, limit, max_batches, at_random, share, errors)
        if _can_be_rebuilt(loader)
        else _without_persistent_workers(loader)
        for loader in flat
    ]


def flat_loaders(loaders: Any) -> list[Any]:
    """Return the loaders in a list, tuple or dict of them, nested or not; of one loader, that one."""
    if isinstance(loaders, dict):
        loaders = list(loaders.values())
    if isinstance(loaders, (list, tuple)):
        return list(chain.from_iterable(map(flat_loaders, loaders)))
    return [loaders]


def rebuilt_loader(loader: DataLoader[Any], dataset: Dataset[Any], **batches: Any) -> DataLoader[Any]:
    """Return a loader of ``dataset`` with the workers and the collate function of another one.

    Args:
        loader: The other one, which stays as it is.
        dataset: The dataset to read.
        **batches: What is read: the ``sampler``, ``batch_size``, ``batch_sampler`` and so on of a ``DataLoader``.
    """
    return DataLoader(
        dataset,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        prefetch_factor=loader.prefetch_factor if loader.num_workers else None,
        **batches,
    )


def sample_indices(loader: DataLoader[Any]) -> Sequence[Any]:
    """Return the samples that the loader draws from, which can be fewer than its dataset holds.

    Raises:
        ValueError: If its indices are no numbers or strings.
    """
    indices = _indices(loader, SharedErrors())
    if indices is None:
        raise ValueError(
            f"Expected a loader whose sampler gives the number or the name of one sample at a time, but got a"
            f" {type(_sampler(loader)).__name__}, which does not."
        )
    return indices


def length_of(loader: Any) -> int | None:
    """Return the length of a loader or sampler, or ``None`` if it does not know its own."""
    try:
        return len(loader)
    except (TypeError, NotImplementedError):
        return None


def batches_of(loader: Iterable[Any], max_batches: int | None) -> Iterator[Any]:
    """Yield the batches of a loader, no more than its length, and leave its random number generators as they were.

    After an error in it, its worker processes end at once.
    """
    states = [(generator, generator.get_state()) for generator in _generators(loader)]
    numbers = [number for number in (length_of(loader), max_batches) if number is not None]
    try:
        yield from islice(loader, min(numbers, default=None))  # a loader with a length can be endless all the same
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


def _without_persistent_workers(loader: Any) -> Any:
    """Return a copy of a loader that has persistent workers: with the same ones, it would end the user's own epoch."""
    if isinstance(loader, DataLoader) and loader.persistent_workers:
        loader = copy.copy(loader)
        loader._iterator = None  # private in torch, and where it keeps them
    return loader


def _is_part_of_a_batch(leaf: Any) -> bool:
    return isinstance(leaf, (Tensor, Mapping)) or not isinstance(leaf, Iterable)


def _can_be_rebuilt(loader: Any) -> bool:
    # A subclass may give batches that its dataset and collate function alone do not explain.
    if type(loader) is not DataLoader or isinstance(loader.dataset, IterableDataset):
        return False
    return length_of(loader.batch_sampler if _has_own_batches(loader) else _sampler(loader)) is not None


def _has_own_batches(loader: DataLoader[Any]) -> bool:
    return loader.batch_sampler is not None and type(loader.batch_sampler) is not BatchSampler


def _sampler(loader: DataLoader[Any]) -> Any:
    """Return the user's sampler, out of the wrapper with which Lightning gives each process a share of it."""
    sampler: Any = getattr(loader.batch_sampler, "sampler", loader.sampler)
    # Private, and the one way back: what the wrapper draws depends on the process.
    return getattr(sampler.dataset, "_sampler", sampler) if isinstance(sampler, DistributedSampler) else sampler


def _rebuilt_for_reading(
    loader: DataLoader[Any],
    max_samples: int | None,
    max_batches: int | None,
    at_random: bool,
    share: tuple[int, int],
    errors: SharedErrors,
) -> DataLoader[Any]:
    rank, shares = share
    max_batches = max_batches and max_batches * shares
    batch_size = getattr(loader.batch_sampler, "batch_size", None)
    # A loader without a generator draws its seed from the global random stream.
    options: dict[str, Any] = {"generator": torch.Generator()}
    indices = None
    if not _has_own_batches(loader):
        indices = _indices(loader, errors, max_samples, max_batches and max_batches * (batch_size or 1))
    if indices is not None:
        options["batch_size"] = batch_size
        options["sampler"] = _RandomOrder(indices, rank, shares) if at_random else indices[rank::shares]
    else:
        batches = _whole_batches(loader, errors, max_samples, max_batches, at_random)[rank::shares]
        if loader.batch_sampler is None:  # the dataset gives a batch an index
            options.update(batch_size=None, sampler=list(chain.from_iterable(batches)))
        else:
            options["batch_sampler"] = batches
    return rebuilt_loader(loader, loader.dataset, **options)


def _indices(
    loader: DataLoader[Any], errors: SharedErrors, max_samples: int | None = None, first: int | None = None
) -> Sequence[Any] | None:
    """Return the distinct indices of a loader in order, or ``None`` if they are no numbers or strings.

    Args:
        loader: A loader without a batch sampler of the user's own.
        errors: Those of the processes.
        max_samples: Return a random subset of this size.
        first: Return as many as this: the first ones, or of a sampler that shuffles a random subset.
    """
    sampler = _sampler(loader)
    known = _known_indices(sampler)
    window, number = _how_many(sampler, len(sampler if known is None else known), max_samples, first)
    if isinstance(known, range) and number is None:
        return known[:window]
    positions = _random_subset(window, number)
    if isinstance(known, Tensor):
        return known[list(positions)].tolist()
    if known is not None:
        drawn = _plain([known[position] for position in positions])
    else:
        # The sampler of each process may give it a share of its own: together they are what the run trains on.
        parts = errors.gather(lambda: _drawn(loader, sampler, positions))
        drawn = _plain(list(chain.from_iterable(parts)))
    if drawn is None:
        return None
    indices = sorted(set(drawn))
    return [indices[position] for position in _random_subset(len(indices), number)]


def _whole_batches(
    loader: DataLoader[Any],
    errors: SharedErrors,
    max_samples: int | None,
    max_batches: int | None,
    at_random: bool,
) -> list[list[Any]]:
    """Return the batches of indices of one epoch as they are drawn, without the indices that came before."""
    sampler: Any = loader.batch_sampler if _has_own_batches(loader) else _sampler(loader)
    batch_sampler = sampler
    if not _has_own_batches(loader):
        batch_sampler = BatchSampler(sampler, getattr(loader.batch_sampler, "batch_size", 1), drop_last=False)
    window, number = _how_many(sampler, len(batch_sampler), max_samples, max_batches)
    parts = errors.gather(lambda: _drawn(loader, batch_sampler, _random_subset(window, number)))
    batches, met = [], set[str]()
    for batch in chain.from_iterable(zip_longest(*parts, fillvalue=())):
        keys = [repr(index) for index in batch]  # which tells those apart that cannot be hashed
        kept = [index for key, index in zip(keys, batch, strict=True) if key not in met]
        met.update(keys)
        if kept:
            batches.append(kept)
    if at_random or max_samples is not None:
        batches = [batches[position] for position in _random_positions(len(batches))]
    batches = batches[:max_batches]
    if max_samples is None:
        return batches
    ends = torch.tensor([len(batch) for batch in batches]).cumsum(0).tolist()
    cut = [batch[: max(0, len(batch) + max_samples - end)] for batch, end in zip(batches, ends, strict=True)]
    return [batch for batch in cut if batch]


def _known_indices(sampler: Any) -> Sequence[Any] | Tensor | None:
    """Return what a sampler of torch draws from, or ``None`` for one of the user's own."""
    if type(sampler) in (SequentialSampler, RandomSampler, DistributedSampler):
        return range(len(getattr(sampler, "data_source", getattr(sampler, "dataset", ()))))
    if isinstance(sampler, WeightedRandomSampler):
        return sampler.weights.nonzero().flatten()
    if isinstance(sampler, SubsetRandomSampler):
        indices = sampler.indices
        return indices if isinstance(indices, (range, Tensor)) else list(indices)
    return None


def _how_many(sampler: Any, length: int, max_samples: int | None, first: int | None) -> tuple[int, int | None]:
    """Return among how many of the first items of a sampler to choose, and how many to choose unless all."""
    shuffles = not isinstance(sampler, SequentialSampler) and getattr(sampler, "shuffle", True)
    window = length if first is None or shuffles else min(length, first)
    number = min((number for number in (max_samples, first) if number is not None), default=None)
    return window, None if number is None or number >= window else number


def _drawn(loader: DataLoader[Any], sampler: Any, positions: Sequence[int]) -> list[Any]:
    """Return what the sampler of a loader draws at some positions, which rise, of one epoch."""
    with suppress(Exception):  # whatever it holds says that it cannot be copied
        # The user's own would use up random numbers of its own. The dataset stays shared.
        sampler = copy.deepcopy(sampler, {id(loader.dataset): loader.dataset})
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        items = iter(sampler)
        if isinstance(positions, range):
            return list(islice(items, len(positions)))
        skipped = [position - before - 1 for before, position in pairwise([-1, *positions])]
        return [item for number in skipped for item in islice(items, number, number + 1)]


def _plain(indices: list[Any]) -> list[Any] | None:
    """Return indices that can be sorted and cut into new batches at no risk, ``None`` for others."""
    kinds = {Integral if isinstance(index, Integral) else type(index) for index in indices}
    return indices if kinds <= {Integral} or kinds <= {str} else None


def _random_subset(length: int, number: int | None) -> Sequence[int]:
    """Return ``number`` of the positions below ``length``, in order, drawn with a fixed seed; ``None``: all."""
    if number is None or number >= length:
        return range(length)
    return sorted(islice(_random_positions(length), number))


def _random_positions(length: int) -> Iterator[int]:
    """Yield the positions below ``length`` in the random order of ``torch.randperm`` with the seed 0.

    Fisher and Yates' shuffle, of which only the positions that have been swapped are kept.
    """
    generator, swapped = torch.Generator().manual_seed(0), dict[int, int]()
    for position in range(length):
        other = position + int(torch.randint(length - position, (), generator=generator))
        drawn = swapped.get(other, other)
        swapped[other] = swapped.get(position, position)
        swapped.pop(position, None)
        yield drawn


class _RandomOrder(Sampler[Any]):
    """A share of the indices in random order, drawn while it is read."""

    def __init__(self, indices: Sequence[Any], rank: int, shares: int) -> None:
        self._indices, self._rank, self._shares = indices, rank, shares

    def __iter__(self) -> Iterator[Any]:
        positions = islice(_random_positions(len(self._indices)), self._rank, None, self._shares)
        return (self._indices[position] for position in positions)

    def __len__(self) -> int:
        return len(range(self._rank, len(self._indices), self._shares))
