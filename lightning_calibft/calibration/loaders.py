"""Read the fine-tuning data once, in order and completely, without touching the loader that training uses."""

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
# Loaders of Fabric and accelerate around a ``DataLoader``. Their classes are private or optional, so they are known by
# name. Fabric keeps the ``DataLoader`` under a private name, too, and has no public way to it.
_OF_FABRIC = ("lightning.fabric.wrappers._FabricDataLoader", "lightning_fabric.wrappers._FabricDataLoader")
_OF_ACCELERATE = "accelerate.data_loader.DataLoaderShard"


def check_max_samples(max_samples: int | None) -> None:
    """Check that ``max_samples`` is ``None`` or a number of samples.

    Raises:
        ValueError: If it is not an integer of at least 1.
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
    """Return, for each loader in ``loaders``, a loader that reads this process's share of its samples once.

    Iterating the user's loader again can cut short an epoch that it is in the middle of, and it drops or pads samples.
    So a plain ``DataLoader`` over a map-style dataset is rebuilt if its sampler or batch sampler has a length. The new
    loader has the same dataset, collate function and workers:

    - Indices that are numbers or strings are read in order, each once.
    - Other indices, and the batches of a custom batch sampler, stay in the batches in which one epoch draws them. The
      samples of such a batch may share a size, and a new batch could mix sizes. Repeated indices are left out.

    For a custom sampler, a copy is read, with a fixed seed and no further than its length. What Fabric and accelerate
    wrap a loader in does not count. Every other loader is used as it is, except that a loader with persistent workers
    gets new ones.

    Args:
        loaders: A loader, a collection of loaders, or any iterable of batches.
        max_samples: Read a random subset of this size (drawn with a fixed seed), with an equal share from each loader.
            Batches that must stay together are drawn as batches. The memory for the indices grows with this number,
            not with the size of the dataset.
        max_batches: Read as many samples as this many of the loader's batches hold: the first ones, or, if the loader
            shuffles, a random subset.
        at_random: Read a rebuilt loader in random order (with a fixed seed), so that reading can stop anywhere.
        share: The number of the share of a rebuilt loader's samples to read, and the number of shares. ``None``: each
            process reads its own share.
        errors: Reports errors to the other processes, which combine the indices that their samplers draw.

    Raises:
        TypeError: If ``loaders`` is not an iterable of batches.
        ValueError: If there are several loaders and ``at_random`` is set, since the samples read first would all come
            from the first loader.
    """
    if not isinstance(loaders, Iterable) or isinstance(loaders, (str, bytes)) or getattr(loaders, "ndim", 1) == 0:
        kind = type(loaders).__name__
        raise TypeError(f"Expected argument `loader` to be a DataLoader or an iterable of batches, but got a {kind}.")
    leaves = flat_loaders(loaders)
    flat: list[Any] = [loaders] if any(_is_part_of_a_batch(leaf) for leaf in leaves) else list(map(unwrapped, leaves))
    if at_random and len(flat) > 1:
        raise ValueError(
            f"Expected argument `tolerance` to be None with several loaders, but got {len(flat)} of them: the samples"
            " read first would all come from the first one. Limit their number with `max_samples`, or join the datasets"
            " with `torch.utils.data.ConcatDataset`."
        )
    limit = max_samples and math.ceil(max_samples / max(1, len(flat)))
    share, errors = share or rank_and_world_size(), errors or SharedErrors()
    return [
        _rebuilt_for_reading(loader, limit, max_batches, at_random, share, errors)
        if _can_be_rebuilt(loader)
        else _without_persistent_workers(loader)
        for loader in flat
    ]


def unlabeled_loaders(unlabeled: Any, *args: Any, **kwargs: Any) -> list[Iterable[Any]]:
    """Return :func:`calibration_loaders` of the argument ``unlabeled``, whose batches can be tensors.

    Raises:
        TypeError: If it is not an iterable of batches.
    """
    if isinstance(unlabeled, (str, bytes, Tensor)) or not isinstance(unlabeled, Iterable):
        kind = type(unlabeled).__name__
        raise TypeError(
            f"Expected argument `unlabeled` to be a DataLoader or an iterable of batches, but got a {kind}."
        )
    return calibration_loaders(unlabeled, *args, **kwargs)


def flat_loaders(loaders: Any) -> list[Any]:
    """Return the loaders in a possibly nested list, tuple or dict, or a list of the one loader."""
    if isinstance(loaders, dict):
        loaders = list(loaders.values())
    if isinstance(loaders, (list, tuple)):
        return list(chain.from_iterable(map(flat_loaders, loaders)))
    return [loaders]


def unwrapped(loader: Any) -> Any:
    """Return a loader without what Fabric or accelerate wrap it in to move its batches and to share them out.

    With accelerate and an iterable dataset, ``loader`` is returned, since only it knows the share of this process.
    """
    name = f"{type(loader).__module__}.{type(loader).__qualname__}"
    if name in _OF_FABRIC:
        return loader._dataloader
    if name != _OF_ACCELERATE or isinstance(loader.dataset, IterableDataset):
        return loader
    loader = loader.base_dataloader
    batch_sampler = loader.batch_sampler
    if batch_sampler is None:
        return rebuilt_loader(loader, loader.dataset, batch_size=None, sampler=loader.sampler)
    if type(batch_sampler).__module__ == "accelerate.data_loader":  # one that gives each process its share
        batch_sampler = batch_sampler.batch_sampler
    return rebuilt_loader(loader, loader.dataset, batch_sampler=batch_sampler)


def is_read_once(loader: Any) -> bool:
    """Return whether a loader gives its batches only once: it is an iterator, or its samples follow from one.

    This is what can be seen without reading. A dataset that holds an iterator may still be one that can be read again.
    """
    if not isinstance(loader, DataLoader):
        return isinstance(loader, Iterator)
    if isinstance(loader.dataset, IterableDataset):
        # Each worker process starts with a copy of the iterator, so the original is not used up.
        held = vars(loader.dataset).values() if loader.num_workers == 0 else ()
        return isinstance(loader.dataset, Iterator) or any(isinstance(value, Iterator) for value in held)
    return isinstance(loader.batch_sampler, Iterator) or isinstance(_sampler(loader), Iterator)


def rebuilt_loader(loader: DataLoader[Any], dataset: Dataset[Any], **batches: Any) -> DataLoader[Any]:
    """Return a loader of ``dataset`` with the workers and the collate function of another loader.

    Args:
        loader: The other loader, which does not change.
        dataset: The dataset to read.
        **batches: Arguments of ``DataLoader`` that say what to read: ``sampler``, ``batch_size``, ``batch_sampler`` and
            so on.
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
    """Return the indices that the loader draws from, which may be fewer than its dataset has.

    Raises:
        ValueError: If the indices are not numbers or strings.
    """
    indices = _indices(loader, SharedErrors())
    if indices is None:
        raise ValueError(
            f"Expected a loader whose sampler gives the number or the name of one sample at a time, but got a"
            f" {type(_sampler(loader)).__name__}."
        )
    return indices


def drawn_from(loader: DataLoader[Any]) -> tuple[Sequence[Any] | Tensor | None, bool, bool]:
    """Return the indices that the loader draws from, whether it shuffles them, and whether it may repeat some of them.

    The indices are ``None`` with a custom sampler or batch sampler, which are not asked.
    """
    sampler = _sampler(loader)
    known = None if _has_own_batches(loader) else _known_indices(sampler)
    shuffles, repeats = not isinstance(sampler, SequentialSampler) and getattr(sampler, "shuffle", True), False
    if isinstance(sampler, (RandomSampler, WeightedRandomSampler)):
        repeats = sampler.replacement or (known is not None and len(sampler) != len(known))
    return known, shuffles, repeats


def length_of(loader: Any) -> int | None:
    """Return the length of a loader or sampler, or ``None`` if it has none."""
    try:
        return len(loader)
    except (TypeError, NotImplementedError):
        return None


def batches_of(loader: Iterable[Any], max_batches: int | None) -> Iterator[Any]:
    """Yield the batches of a loader, at most its length, and then restore its random number generators.

    After an error in the loader, its worker processes end at once.
    """
    states = [(generator, generator.get_state()) for generator in _generators(loader)]
    numbers = [number for number in (length_of(loader), max_batches) if number is not None]
    try:
        yield from islice(loader, min(numbers, default=None))  # a loader with a length can still be endless
    except Exception as error:
        if getattr(loader, "num_workers", 0):
            # The frames of torch form a cycle that holds the workers. They would stay until garbage collection, which
            # then waits 5 seconds for each of them.
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
    """Copy a loader that has persistent workers: reading it with the same workers would end the user's epoch."""
    if isinstance(loader, DataLoader) and loader.persistent_workers:
        loader = copy.copy(loader)
        loader._iterator = None  # private in torch; it holds the workers
    return loader


def _is_part_of_a_batch(leaf: Any) -> bool:
    return isinstance(leaf, (Tensor, Mapping)) or not isinstance(leaf, Iterable)


def _can_be_rebuilt(loader: Any) -> bool:
    # The batches of a subclass may not follow from its dataset and collate function alone.
    if type(loader) is not DataLoader or isinstance(loader.dataset, IterableDataset):
        return False
    return length_of(loader.batch_sampler if _has_own_batches(loader) else _sampler(loader)) is not None


def _has_own_batches(loader: DataLoader[Any]) -> bool:
    return loader.batch_sampler is not None and type(loader.batch_sampler) is not BatchSampler


def _sampler(loader: DataLoader[Any]) -> Any:
    """Return the user's sampler, without the wrapper with which Lightning gives each process a share."""
    sampler: Any = getattr(loader.batch_sampler, "sampler", loader.sampler)
    # Private, and the only way to the original: the samples that the wrapper draws depend on the process.
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
    # Without a generator, a loader draws its seed from the global random stream.
    options: dict[str, Any] = {"generator": torch.Generator()}
    indices = None
    if not _has_own_batches(loader):
        indices = _indices(loader, errors, max_samples, max_batches and max_batches * (batch_size or 1))
    if indices is not None:
        options["batch_size"] = batch_size
        options["sampler"] = _RandomOrder(indices, rank, shares) if at_random else indices[rank::shares]
    else:
        batches = _whole_batches(loader, errors, max_samples, max_batches, at_random)[rank::shares]
        if loader.batch_sampler is None:  # the dataset returns a batch for each index
            options.update(batch_size=None, sampler=list(chain.from_iterable(batches)))
        else:
            options["batch_sampler"] = batches
    return rebuilt_loader(loader, loader.dataset, **options)


def _indices(
    loader: DataLoader[Any], errors: SharedErrors, max_samples: int | None = None, first: int | None = None
) -> Sequence[Any] | None:
    """Return the distinct indices of a loader in order, or ``None`` if they are not numbers or strings.

    Args:
        loader: A loader without a custom batch sampler.
        errors: Reports errors to the other processes.
        max_samples: Return a random subset of this size.
        first: Return this many: the first ones, or, if the sampler shuffles, a random subset.
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
        # The samplers of the processes may draw different shares. Together they are what the run trains on.
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
    """Return the batches of indices of one epoch as they are drawn, without repeated indices."""
    sampler: Any = loader.batch_sampler if _has_own_batches(loader) else _sampler(loader)
    batch_sampler = sampler
    if not _has_own_batches(loader):
        batch_sampler = BatchSampler(sampler, getattr(loader.batch_sampler, "batch_size", 1), drop_last=False)
    window, number = _how_many(sampler, len(batch_sampler), max_samples, max_batches)
    parts = errors.gather(lambda: _drawn(loader, batch_sampler, _random_subset(window, number)))
    batches, known = [], set[str]()
    for batch in chain.from_iterable(zip_longest(*parts, fillvalue=())):
        keys = [repr(index) for index in batch]  # the indices may not be hashable
        kept = [index for key, index in zip(keys, batch, strict=True) if key not in known]
        known.update(keys)
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
    """Return the indices that one of torch's samplers draws from, or ``None`` for a custom sampler."""
    if type(sampler) in (SequentialSampler, RandomSampler, DistributedSampler):
        return range(len(getattr(sampler, "data_source", getattr(sampler, "dataset", ()))))
    if isinstance(sampler, WeightedRandomSampler):
        return sampler.weights.nonzero().flatten()
    if isinstance(sampler, SubsetRandomSampler):
        indices = sampler.indices
        return indices if isinstance(indices, (range, Tensor)) else list(indices)
    return None


def _how_many(sampler: Any, length: int, max_samples: int | None, first: int | None) -> tuple[int, int | None]:
    """Return how many first items of a sampler to choose from, and how many to choose, or ``None`` for all."""
    shuffles = not isinstance(sampler, SequentialSampler) and getattr(sampler, "shuffle", True)
    window = length if first is None or shuffles else min(length, first)
    number = min((number for number in (max_samples, first) if number is not None), default=None)
    return window, None if number is None or number >= window else number


def _drawn(loader: DataLoader[Any], sampler: Any, positions: Sequence[int]) -> list[Any]:
    """Return what the sampler of a loader draws at some positions of one epoch, in increasing order."""
    with suppress(Exception):  # any attribute may refuse to be copied
        # The original would use up its random numbers. The dataset stays shared.
        sampler = copy.deepcopy(sampler, {id(loader.dataset): loader.dataset})
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        items = iter(sampler)
        if isinstance(positions, range):
            return list(islice(items, len(positions)))
        skipped = [position - before - 1 for before, position in pairwise([-1, *positions])]
        return [item for number in skipped for item in islice(items, number, number + 1)]


def _plain(indices: list[Any]) -> list[Any] | None:
    """Return ``indices`` if they can safely be sorted and cut into new batches, or else ``None``."""
    kinds = {Integral if isinstance(index, Integral) else type(index) for index in indices}
    return indices if kinds <= {Integral} or kinds <= {str} else None


def _random_subset(length: int, number: int | None) -> Sequence[int]:
    """Return ``number`` random positions below ``length`` (fixed seed), in order, or all of them for ``None``."""
    if number is None or number >= length:
        return range(length)
    return sorted(islice(_random_positions(length), number))


def _random_positions(length: int) -> Iterator[int]:
    """Yield the positions below ``length`` in the random order of ``torch.randperm`` with the seed 0.

    This is the Fisher-Yates shuffle. Only the positions that have been swapped are stored.
    """
    generator, swapped = torch.Generator().manual_seed(0), dict[int, int]()
    for position in range(length):
        other = position + int(torch.randint(length - position, (), generator=generator))
        drawn = swapped.get(other, other)
        swapped[other] = swapped.get(position, position)
        swapped.pop(position, None)
        yield drawn


class _RandomOrder(Sampler[Any]):
    """A share of the indices in random order. The order is drawn while the sampler is read."""

    def __init__(self, indices: Sequence[Any], rank: int, shares: int) -> None:
        self._indices, self._rank, self._shares = indices, rank, shares

    def __iter__(self) -> Iterator[Any]:
        positions = islice(_random_positions(len(self._indices)), self._rank, None, self._shares)
        return (self._indices[position] for position in positions)

    def __len__(self) -> int:
        return len(range(self._rank, len(self._indices), self._shares))
