"""Samplers of every kind: what they draw is read once, not without end, and not cut where it belongs together."""

from __future__ import annotations

import tracemalloc
from collections import Counter
from itertools import chain, count, islice

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from lightning_calibft import calibrate
from lightning_calibft.calibration.loaders import batches_of, calibration_loaders, rebuilt_loader, sample_indices
from tests.calibration.nets import net
from tests.helpers.runs import SEEN, TRAIN, quiet

pytestmark = quiet

N = 24
LARGE = 50_000_000


class Data(Dataset):
    """Gives the index back, whatever it is."""

    def __init__(self, length=N):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return index


class Drawing(Sampler):
    """A sampler of the user's own, of what a function makes of numbers."""

    def __init__(self, make=int, order=lambda n: torch.randperm(n).tolist(), length=N, epochs=1):
        self.make, self.order, self.length, self.epochs = make, order, length, epochs

    def __iter__(self):
        return (self.make(n) for _ in range(self.epochs) for n in self.order(self.length))

    def __len__(self):
        return self.length


class Batches(Drawing):
    """A batch sampler that has one size for all samples of a batch, and batches of several lengths."""

    def __iter__(self):
        numbers, batches = super().__iter__(), count()
        while batch := list(islice(numbers, 4 + next(batches) % 3)):
            size = 32 * (1 + len(batch) % 2)
            yield [(size, index) for index in batch]

    def __len__(self):
        return 5 * self.epochs if self.epochs < 1000 else 5


class Repeating(Drawing):
    """Each index three times in a row, as repeated augmentation draws them."""

    def __iter__(self):
        return chain.from_iterable([index] * 3 for index in super().__iter__())


def as_they_are(batch):
    return batch


def read(loader, **limits):
    (new,) = calibration_loaders(loader, **limits)
    assert new is not loader
    return [batch if isinstance(batch, list) else [batch] for batch in batches_of(new, None)]


def loader_of(sampler, batch_size=5, **kwargs):
    return DataLoader(Data(), batch_size, sampler=sampler, collate_fn=as_they_are, **kwargs)


ENDLESS = 10**9
CASES = {
    "endless": (Drawing(epochs=ENDLESS), list(range(N))),
    "endless_in_order": (Drawing(order=range, epochs=ENDLESS), list(range(N))),
    "endless_of_random_numbers": (Drawing(order=lambda n: iter(lambda: int(torch.randint(n, ())), -1)), None),
    "repeating": (Repeating(length=8), None),
    "tensors": (Drawing(order=torch.randperm), list(range(N))),
    "numpy": (Drawing(np.int64), list(np.arange(N))),
    "numbers_in_tensors": (Drawing(torch.tensor), [torch.tensor(n) for n in range(N)]),
    "strings": (Drawing(str), sorted(map(str, range(N)))),
    "dicts": (Drawing(lambda n: {"index": n}), [{"index": n} for n in range(N)]),
    "endless_dicts": (Drawing(lambda n: {"index": n}, epochs=ENDLESS), [{"index": n} for n in range(N)]),
    "lists": (Drawing(lambda n: [n, 0.5]), [[n, 0.5] for n in range(N)]),
    "sets": (Drawing(lambda n: {n}), [{n} for n in range(N)]),
    "slices": (Drawing(lambda n: slice(n, n + 1)), [slice(n, n + 1) for n in range(N)]),
    "tuples": (Drawing(lambda n: (n % 2, n)), [(n % 2, n) for n in range(N)]),
    "kinds_that_cannot_be_compared": (Drawing(lambda n: n if n % 2 else str(n)), None),
    "subset_of_dicts": (SubsetRandomSampler([{"index": n} for n in range(N)]), [{"index": n} for n in range(N)]),
    "subset_in_a_tensor": (SubsetRandomSampler(torch.arange(0, N, 2)), list(range(0, N, 2))),
    "subset_in_an_array": (SubsetRandomSampler(np.arange(0, N, 2)), list(np.arange(0, N, 2))),
    "random_of_other_data": (RandomSampler(range(7)), list(range(7))),
    "distributed": (DistributedSampler(Data(), num_replicas=3, rank=1), list(range(N))),
}


@pytest.mark.parametrize("name", CASES)
def test_each_index_once(name):
    sampler, expected = CASES[name]
    state = torch.get_rng_state()
    drawn = list(chain.from_iterable(read(loader_of(sampler))))
    assert torch.equal(torch.get_rng_state(), state)
    assert max(Counter(map(repr, drawn)).values()) == 1
    if expected is not None:
        assert sorted(map(repr, drawn)) == sorted(map(repr, expected))
    again = list(chain.from_iterable(read(loader_of(sampler))))
    assert list(map(repr, again)) == list(map(repr, drawn))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("max_samples", [1, 6, 1000])
def test_at_most_so_many(name, max_samples):
    sampler, expected = CASES[name]
    drawn = list(chain.from_iterable(read(loader_of(sampler), max_samples=max_samples)))
    assert 1 <= len(drawn) <= max_samples
    assert max(Counter(map(repr, drawn)).values()) == 1
    if expected is not None:
        assert len(drawn) == min(max_samples, len(expected))
        assert set(map(repr, drawn)) <= set(map(repr, expected))


@pytest.mark.parametrize("name", CASES)
def test_at_random(name):
    sampler, expected = CASES[name]
    drawn = list(map(repr, chain.from_iterable(read(loader_of(sampler), at_random=True))))
    assert sorted(drawn) == sorted(map(repr, chain.from_iterable(read(loader_of(sampler)))))
    if expected is not None:
        assert drawn != list(map(repr, expected))


@pytest.mark.parametrize("epochs", [1, ENDLESS])
@pytest.mark.parametrize("limits", [{}, {"at_random": True}, {"max_samples": 13}, {"max_batches": 2}])
def test_batches_of_one_size_stay_together(epochs, limits):
    loader = DataLoader(Data(), batch_sampler=Batches(epochs=epochs), collate_fn=as_they_are)
    batches = read(loader, **limits)
    assert all(len({size for size, _ in batch}) == 1 for batch in batches)
    drawn = list(chain.from_iterable(batches))
    assert len(set(drawn)) == len(drawn)
    assert len(drawn) == (13 if "max_samples" in limits else len(drawn))
    assert len(batches) == (2 if "max_batches" in limits else len(batches))
    if not limits or "at_random" in limits:
        assert {index for _, index in drawn} == set(range(N))


def test_indices_with_a_size_stay_together_in_batches_of_torch():
    """Its `BatchSampler` cuts what a sampler draws, which changes the size with each batch."""
    sizes = Drawing(lambda n: n, order=lambda n: [(32 + 32 * (k // 5 % 2), k) for k in range(n)])
    for batch in read(loader_of(sizes)) + read(loader_of(sizes), max_samples=7):
        assert len({size for size, _ in batch}) == 1


def test_a_dataset_that_takes_a_batch_of_indices():
    """The way of torch to load in bulk: a batch sampler in the place of a sampler."""
    loader = DataLoader(Data(), None, sampler=BatchSampler(RandomSampler(Data()), 5, drop_last=False))
    (new,) = calibration_loaders(loader)
    assert sorted(chain.from_iterable(new)) == list(range(N))
    assert {len(batch) for batch in new} == {4, 5}
    assert len(list(calibration_loaders(loader, max_batches=2)[0])) == 2


def test_batches_with_indices_met_before():
    class Overlapping(Batches):
        def __iter__(self):
            return iter([[0, 1, 2], [2, 3], [1, 3], [4]])

    loader = DataLoader(Data(), batch_sampler=Overlapping(), collate_fn=as_they_are)
    assert read(loader) == [[0, 1, 2], [3], [4]]


def test_a_sampler_in_order_is_read_from_its_start():
    in_order = Drawing(order=lambda n: range(n - 1, -1, -1))
    in_order.shuffle = False
    assert list(chain.from_iterable(read(loader_of(in_order), max_batches=2))) == list(range(N - 10, N))


def test_a_sampler_without_a_length_is_used_as_it_is():
    class Unsized(Drawing):
        __len__ = None

    for loader in (
        loader_of(Unsized()),
        DataLoader(Data(), batch_sampler=BatchSampler(Unsized(), 5, drop_last=False)),
        DataLoader(Data(), batch_sampler=type("Own", (BatchSampler,), {})(Unsized(), 5, drop_last=False)),
    ):
        assert calibration_loaders(loader) == [loader]


def test_an_endless_loader_with_a_length():
    class Endless(DataLoader):
        def __iter__(self):
            while True:
                yield from super().__iter__()

    loader = Endless(TRAIN, 8)
    result = calibrate(net(), loader, SEEN, progress=False)
    assert result.num_samples == len(TRAIN)


class Counting(Drawing):
    """Counts its epochs."""

    begun = 0

    def __iter__(self):
        self.begun += 1
        return super().__iter__()


class Uncopied(Counting):
    def __deepcopy__(self, memo):
        raise TypeError


def test_the_user_s_own_sampler_is_not_read_if_it_can_be_copied():
    for sampler, epochs in ((Counting(), 0), (Uncopied(), 1)):
        assert len(read(loader_of(sampler))) == 5
        assert sampler.begun == epochs


@pytest.mark.parametrize(
    "make",
    [
        lambda data: DataLoader(data, 100, shuffle=True),
        lambda data: DataLoader(data, 100),
        lambda data: DataLoader(data, 100, sampler=DistributedSampler(data, 2, 1)),
        lambda data: DataLoader(data, 100, sampler=SubsetRandomSampler(range(0, LARGE, 2))),
        lambda data: DataLoader(data, 100, sampler=RandomSampler(range(LARGE))),
        lambda data: DataLoader(data, 100, sampler=Drawing(order=range, length=LARGE // 500)),
        lambda data: DataLoader(data, batch_sampler=type("Own", (BatchSampler,), {})(range(LARGE // 500), 10, False)),
    ],
)
@pytest.mark.parametrize("limits", [{"max_samples": 100}, {"at_random": True, "max_samples": 100}])
def test_a_few_of_many_samples_take_little_memory(make, limits):
    loader = make(Data(LARGE))
    tracemalloc.start()
    try:
        drawn = torch.cat(list(calibration_loaders(loader, **limits)[0]))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(drawn.unique()) == 100
    assert drawn.max() > LARGE // 1000  # not the first ones
    assert peak < 2**21  # a list of 100,000 numbers takes 4 MB


def test_random_order_is_drawn_while_it_is_read():
    (loader,) = calibration_loaders(DataLoader(Data(LARGE), 100), at_random=True)
    tracemalloc.start()
    try:
        first = next(iter(loader))
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()
    assert len(loader) == LARGE // 100
    assert len(first.unique()) == 100


@pytest.mark.parametrize("length", [1, 2, 1000])
def test_the_draw_is_that_of_randperm(length):
    """So that the samples of a given `max_samples` stay the same."""
    order = torch.randperm(length, generator=torch.Generator().manual_seed(0)).tolist()
    assert list(chain.from_iterable(read(DataLoader(Data(length), 7, collate_fn=as_they_are), at_random=True))) == order
    number = max(1, length // 3)
    some = read(DataLoader(Data(length), 7, collate_fn=as_they_are), max_samples=number)
    assert list(chain.from_iterable(some)) == sorted(order[:number])


def test_weights_of_zero_are_not_drawn_from():
    loader = loader_of(WeightedRandomSampler([0.0, 1.0] * (N // 2), 100))
    assert list(chain.from_iterable(read(loader))) == list(range(1, N, 2))
    assert set(chain.from_iterable(read(loader, max_samples=3))) < set(range(1, N, 2))


def test_sample_indices():
    assert sample_indices(DataLoader(Data(), 5)) == range(N)
    assert sample_indices(loader_of(Drawing())) == list(range(N))
    with pytest.raises(ValueError, match=r"whose sampler gives the number or the name of one sample .* got a Drawing"):
        sample_indices(loader_of(Drawing(lambda n: {"index": n})))


def test_rebuilding_changes_nothing_else():
    loader = DataLoader(Data(), 5, collate_fn=as_they_are, num_workers=1, prefetch_factor=3, timeout=7)
    new = rebuilt_loader(loader, Data(3), batch_size=2, sampler=SequentialSampler(Data(3)), drop_last=True)
    assert (new.collate_fn, new.num_workers, new.prefetch_factor, new.timeout) == (as_they_are, 1, 3, 7)
    assert (new.batch_size, new.drop_last, len(new.dataset)) == (2, True, 3)


def test_gamma_does_not_depend_on_the_kind_of_sampler():
    class Indexed(Dataset):
        def __len__(self):
            return len(TRAIN)

        def __getitem__(self, index):
            return TRAIN[index["index"] if isinstance(index, dict) else index]

    data, gammas = Indexed(), []
    for sampler in (None, Drawing(length=len(data)), Drawing(lambda n: {"index": n}, length=len(data), epochs=ENDLESS)):
        gammas.append(calibrate(net(), DataLoader(data, 8, sampler=sampler), SEEN, progress=False).gamma)
    assert gammas[1:] == pytest.approx(gammas[:1] * 2, rel=1e-6)
