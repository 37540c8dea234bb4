"""Each sample is read once and in order, and the user's own loader is left alone."""

from __future__ import annotations

from collections import UserDict
from dataclasses import dataclass

import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from lightning_calibft.calibration.distributed import all_reduce, rank_and_world_size
from lightning_calibft.calibration.loaders import calibration_loaders
from tests.helpers.runs import quiet

pytestmark = quiet

N = 23


class Numbers(Dataset):
    def __len__(self):
        return N

    def __getitem__(self, index):
        return index


class Named(Dataset):
    """Indexed by strings."""

    def __len__(self):
        return 3

    def __getitem__(self, index):
        return {"a": 0, "b": 1, "c": 2}[index]


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(N))


class Whole(Dataset):
    """Gives a batch an index."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return torch.arange(5 * index, 5 * index + 5)


class Evens(Sampler):
    def __init__(self, shuffle=True):
        self.shuffle = shuffle

    def __iter__(self):
        order = torch.randperm(12) if self.shuffle else torch.arange(12)
        return iter((2 * order).tolist())

    def __len__(self):
        return 12


class Unsized(Sampler):
    def __iter__(self):
        return iter([5, 3, 1])


class Triples:
    """A batch sampler of the user's own."""

    def __iter__(self):
        return iter([[5, 3, 1], [9, 3]])

    def __len__(self):
        return 2


class Custom(DataLoader):
    """What it gives is its own business."""

    def __iter__(self):
        for batch in super().__iter__():
            yield batch + 100


def read(loaders, **limits):
    return [torch.as_tensor(batch).tolist() for loader in calibration_loaders(loaders, **limits) for batch in loader]


def flat(batches):
    return [number for batch in batches for number in batch]


ALL, EVENS = list(range(N)), list(range(0, N, 2))
numbers = Numbers()
GENERATOR = torch.Generator().manual_seed(3)
CASES = {
    "in_order": (DataLoader(numbers, 5), ALL, 5),
    "shuffled": (DataLoader(numbers, 5, shuffle=True, generator=GENERATOR), ALL, 5),
    "drop_last": (DataLoader(numbers, 5, shuffle=True, drop_last=True), ALL, 5),
    "subset": (DataLoader(numbers, 5, sampler=SubsetRandomSampler(EVENS, GENERATOR)), EVENS, 5),
    "subset_twice": (DataLoader(numbers, 5, sampler=SubsetRandomSampler([4, 2, 4])), [2, 4], 5),
    "weighted": (DataLoader(numbers, 5, sampler=WeightedRandomSampler([1, 0] * 11 + [1], 99)), EVENS, 5),
    "replacement": (DataLoader(numbers, 5, sampler=RandomSampler(numbers, True, 3)), ALL, 5),
    "own_sampler": (DataLoader(numbers, 5, sampler=Evens(), drop_last=True), EVENS, 5),
    "list_sampler": (DataLoader(numbers, 5, sampler=[7, 1, 1]), [1, 7], 5),
    "own_batches": (DataLoader(numbers, batch_sampler=Triples()), [5, 3, 1, 9], 3),
    "batches_of_all": (DataLoader(numbers, batch_sampler=BatchSampler(RandomSampler(numbers), 4, True)), ALL, 4),
    "batches_of_subset": (DataLoader(numbers, batch_sampler=BatchSampler(Evens(), 4, True)), EVENS, 4),
    "batches_in_order": (DataLoader(numbers, batch_sampler=BatchSampler(SequentialSampler(numbers), 4, True)), ALL, 4),
}


@pytest.mark.parametrize("name", CASES)
def test_each_sample_once_and_in_order(name):
    loader, expected, batch_size = CASES[name]
    before, state = torch.get_rng_state(), GENERATOR.get_state()
    batches = read(loader)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(GENERATOR.get_state(), state)
    assert flat(batches) == expected
    assert {len(batch) for batch in batches[:-1]} <= {batch_size}


def test_strange_indices_and_whole_batches():
    assert flat(read(DataLoader(Named(), 2, sampler=["c", "a"]))) == [0, 2]
    assert read(DataLoader(Whole(), batch_size=None, shuffle=True)) == torch.arange(20).view(4, 5).tolist()


def test_what_is_read_as_it_is():
    stream, own, unsized = DataLoader(Stream(), 5), Custom(numbers, 5), DataLoader(numbers, 2, sampler=Unsized())
    for loader in (stream, own, unsized):
        assert calibration_loaders(loader, max_samples=3) == [loader]
    assert flat(read(stream)) == ALL
    assert flat(read(own)) == [number + 100 for number in ALL]
    assert flat(read(unsized)) == [5, 3, 1]


def test_the_loader_is_built_anew():
    def collate(batch):
        return batch

    def init(worker):
        pass

    loader = DataLoader(
        numbers,
        5,
        shuffle=True,
        num_workers=2,
        persistent_workers=True,
        prefetch_factor=3,
        collate_fn=collate,
        worker_init_fn=init,
        timeout=9,
        multiprocessing_context="fork",
    )
    (new,) = calibration_loaders(loader)
    assert new is not loader
    for name in ("dataset", "num_workers", "prefetch_factor", "collate_fn", "worker_init_fn", "timeout", "batch_size"):
        assert getattr(new, name) is getattr(loader, name)
    assert new.multiprocessing_context.get_start_method() == "fork"
    assert not new.persistent_workers
    assert not new.drop_last
    assert list(new) == [list(range(a, min(a + 5, N))) for a in range(0, N, 5)]


def test_an_epoch_goes_on_where_it_was():
    loader = DataLoader(numbers, 5, num_workers=1, persistent_workers=True)
    epoch = iter(loader)
    first = next(epoch).tolist()
    assert flat(read(loader)) == ALL
    assert first + flat(batch.tolist() for batch in epoch) == ALL


def test_collections():
    one, two = DataLoader([0, 1, 2], 2), DataLoader([3, 4], 2)
    assert read([one, two]) == read({"a": one, "b": two}) == read((one, [two])) == [[0, 1], [2], [3, 4]]
    batches = [(torch.zeros(2), torch.zeros(2)), (torch.ones(2), torch.ones(2))]
    assert calibration_loaders(batches) == [batches]
    mappings = [{"x": torch.zeros(2), "y": torch.zeros(2)}]
    assert calibration_loaders(mappings) == [mappings]
    generator = iter(batches)
    assert calibration_loaders(generator) == [generator]
    assert read([]) == []


@dataclass
class Pair:
    inputs: torch.Tensor
    target: torch.Tensor


@pytest.mark.parametrize("make", [lambda x, y: (x, y), lambda x, y: {"x": x, "y": y}, UserDict, Pair])
def test_a_list_of_batches_is_one_loader(make):
    parts = torch.zeros(4, 2), torch.tensor([0, 1, 2, 3])
    batches = [make({"x": parts[0], "y": parts[1]}) if make is UserDict else make(*parts) for _ in range(3)]
    (only,) = calibration_loaders(batches)
    assert only is batches


@pytest.mark.parametrize("loader", [None, 3])
def test_no_loader(loader):
    with pytest.raises(TypeError, match="`loader` to be a DataLoader or an iterable of batches, but got a "):
        calibration_loaders(loader)


def test_max_samples():
    loader = DataLoader(numbers, 5, shuffle=True)
    some = flat(read(loader, max_samples=7))
    assert len(some) == len(set(some)) == 7
    assert some == sorted(some) != ALL[:7]
    torch.manual_seed(1)
    assert flat(read(loader, max_samples=7)) == some
    assert flat(read(loader, max_samples=N)) == flat(read(loader, max_samples=999)) == ALL
    assert len(flat(read([loader, DataLoader(numbers, 2)], max_samples=7))) == 8  # four of each
    assert set(flat(read(CASES["subset"][0], max_samples=5))) <= set(EVENS)


@pytest.mark.parametrize("max_batches", [1, 2, 3])
def test_max_batches(max_batches):
    size = 5 * max_batches
    assert flat(read(DataLoader(numbers, 5), max_batches=max_batches)) == ALL[:size]
    assert flat(read(DataLoader(numbers, 5, sampler=Evens(shuffle=False)), max_batches=max_batches)) == EVENS[:size]
    shuffled = flat(read(DataLoader(numbers, 5, shuffle=True), max_batches=max_batches))
    assert len(set(shuffled)) == size
    assert shuffled == sorted(shuffled) != ALL[:size]
    assert len(flat(read(DataLoader(numbers, 5, shuffle=True), max_batches=max_batches, max_samples=4))) == 4
    assert len(read(DataLoader(Whole(), batch_size=None), max_batches=max_batches)) == max_batches


def test_without_a_process_group():
    assert rank_and_world_size() == (0, 1)
    tensor = torch.ones(2)
    assert all_reduce(tensor) is tensor
