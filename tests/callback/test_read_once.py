"""Data that gives each batch only once: nothing of it is left when gamma is found, and that is said before training."""

from __future__ import annotations

import itertools
from datetime import timedelta

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from lightning_calibft import AbsentClassCalibration, get_gamma
from lightning_calibft.calibration.loaders import is_read_once
from tests.helpers.runs import (
    SEEN,
    TRAIN,
    VAL,
    Plain,
    Stream,
    assert_calibrated,
    loader,
    no_warnings,
    pretrained,
    quiet,
    trainer_of,
)

pytestmark = quiet


def batches():
    yield from loader(shuffle=False)


class Stored(IterableDataset):
    """Returns the iterator that it has."""

    def __init__(self):
        self.samples = iter(TRAIN)

    def __iter__(self):
        return self.samples


class Itself(IterableDataset):
    """Is its own iterator."""

    def __init__(self):
        self.position = 0

    def __iter__(self):
        return self

    def __next__(self):
        if self.position == len(TRAIN):
            raise StopIteration
        self.position += 1
        return TRAIN[self.position - 1]


class Queue(IterableDataset):
    """Nothing shows that what it has given is gone."""

    def __init__(self):
        self.rest = list(TRAIN)

    def __iter__(self):
        while self.rest:
            yield self.rest.pop()


SURE = {
    "generator": batches,
    "iterator": lambda: iter(list(batches())),
    "sampler": lambda: DataLoader(TRAIN, 8, sampler=iter(range(len(TRAIN)))),
    "batch_sampler": lambda: DataLoader(TRAIN, batch_sampler=iter([[0, 1, 2, 3], [4, 5, 6, 7]])),
}
UNSURE = {"stored": lambda: DataLoader(Stored(), 8), "itself": lambda: DataLoader(Itself(), 8)}


@pytest.mark.parametrize("arguments", [{}, {"seen_classes": SEEN}], ids=["inferred", "given"])
@pytest.mark.parametrize("name", SURE)
def test_it_is_refused_before_the_first_step(name, arguments, tmp_path):
    trainer, module = trainer_of(tmp_path, AbsentClassCalibration(**arguments), max_epochs=1), pretrained()
    with pytest.raises(ValueError, match=r"data that can be read again .* Pass `source='training_steps'`"):
        trainer.fit(module, SURE[name]())
    assert trainer.global_step == 0


@pytest.mark.parametrize("name", ["generator", "sampler"])
def test_in_a_collection_of_loaders(name, tmp_path):
    trainer = trainer_of(tmp_path, AbsentClassCalibration(SEEN), max_epochs=1)
    with pytest.raises(ValueError, match="data that can be read again"):
        trainer.fit(pretrained(), {"a": loader(), "b": [SURE[name]()]})


def test_the_validation_data(tmp_path):
    callback = AbsentClassCalibration(SEEN, source="validation")
    trainer = trainer_of(tmp_path, callback, max_epochs=1, num_sanity_val_steps=0)
    with pytest.raises(ValueError, match=r"data that can be read again for `source='validation'`, but a generator"):
        trainer.fit(pretrained(), loader(), (batch for batch in loader(VAL)))


@pytest.mark.parametrize("name", UNSURE)
def test_what_may_begin_anew_is_told(name, tmp_path):
    trainer = trainer_of(tmp_path, AbsentClassCalibration(SEEN), max_epochs=1)
    with (
        pytest.warns(UserWarning, match=r"expects data that can be read again .*over a (Stored|Itself)"),
        pytest.raises(ValueError, match=r"but got none\..* can be read only once, nothing is left .*training_steps"),
    ):
        trainer.fit(pretrained(), UNSURE[name]())


def test_what_does_not_show_is_told_in_the_end(tmp_path):
    trainer = trainer_of(tmp_path, AbsentClassCalibration(SEEN), max_epochs=1)
    with no_warnings(), pytest.raises(ValueError, match=r"but got none\..* nothing is left .*training_steps"):
        trainer.fit(pretrained(), DataLoader(Queue(), 8))
    assert trainer.global_step == 6


@pytest.mark.parametrize("name", [*SURE, *UNSURE])
def test_the_remedy(name, tmp_path):
    module, callback = pretrained(), AbsentClassCalibration(SEEN, source="training_steps")
    with no_warnings():
        trainer_of(tmp_path, callback, max_epochs=1).fit(module, {**SURE, **UNSURE}[name]())
    assert get_gamma(module) == pytest.approx(callback.result.gamma)


class Clean(Plain):
    def calibration_dataloader(self):
        return loader(shuffle=False)


def test_the_other_remedy(tmp_path):
    module = pretrained(Clean)
    with no_warnings():
        trainer_of(tmp_path, AbsentClassCalibration(), max_epochs=1).fit(module, batches())
    assert_calibrated(module.state_dict(), make=Clean)


@pytest.mark.parametrize(
    "limit",
    [{"max_steps": 3}, {"limit_train_batches": 3}, {"max_epochs": -1, "max_time": timedelta(seconds=1)}],
    ids=["max_steps", "limit_train_batches", "max_time"],
)
def test_an_endless_one_can_be_read_further(limit, tmp_path):
    """And while it is trained on, nothing is taken from it."""
    data = itertools.cycle(loader(shuffle=False))
    with pytest.warns(UserWarning, match=r"expects data that can be read again .* If it can be read further"):
        trainer_of(tmp_path, AbsentClassCalibration(SEEN), **limit).fit(module := pretrained(), data)
    assert get_gamma(module) is not None
    refreshing = AbsentClassCalibration(SEEN, refresh_on_validation=True)
    with pytest.raises(ValueError, match="data that can be read again"):
        trainer_of(tmp_path, refreshing, **limit).fit(pretrained(), data, loader(VAL, shuffle=False))


@pytest.mark.parametrize(
    "data",
    [
        loader(),
        DataLoader(Stream(TRAIN), 8),
        [(torch.zeros(1), torch.zeros(1))],
        DataLoader(Stored(), 8, num_workers=1),
    ],
)
def test_what_can_be_read_again(data):
    assert not is_read_once(data)
