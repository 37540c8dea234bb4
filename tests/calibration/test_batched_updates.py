"""Small batches are counted together, and each row once."""

from __future__ import annotations

import pytest
import torch

from lightning_calibft import AbsentClassCalibration, ClassSplit, calibrate, get_gamma
from lightning_calibft.calibration.batch_reader import BatchReader
from lightning_calibft.calibration.batched_updates import BatchedUpdates
from lightning_calibft.calibration.data_check import DataCheck
from lightning_calibft.callback.training_labels import TrainingLabels
from tests.callback.measures import Measures, logged
from tests.helpers.references import _reference_gap
from tests.helpers.runs import ABSENT, SEEN, TRAIN, VAL, Plain, loader, pretrained, quiet, raw_logits, trainer_of

pytestmark = quiet


class Reused:
    """A loader that gives each batch in the same memory, as those of images on a GPU do."""

    def __init__(self, dataset, batch_size=8):
        self.dataset, self.batch_size = dataset, batch_size

    def __len__(self):
        return len(self.dataset) // self.batch_size

    def __iter__(self):
        inputs, target = (tensor[: self.batch_size].clone() for tensor in self.dataset.tensors)
        for index in range(len(self)):
            rows = slice(index * self.batch_size, (index + 1) * self.batch_size)
            inputs.copy_(self.dataset.tensors[0][rows])
            target.copy_(self.dataset.tensors[1][rows])
            yield inputs, target


@pytest.mark.parametrize("sizes", [[], [0], [7], [3, 0, 2, 30, 1], [1] * 50, [40, 1]])
def test_every_row_once_and_in_order(sizes, monkeypatch):
    monkeypatch.setattr(BatchedUpdates, "limit", 50)
    logits = torch.randn(sum(sizes), 2, generator=torch.Generator().manual_seed(0))
    target, updates = torch.arange(sum(sizes)), []
    joined = BatchedUpdates(lambda *tensors: updates.append(tensors))
    for batch in zip(logits.split(sizes), target.split(sizes), strict=True):
        joined.add(*batch)
    joined.flush()
    joined.flush()
    assert torch.equal(torch.cat([target[:0], *(update[1] for update in updates)]), target)
    assert torch.equal(torch.cat([logits[:0], *(update[0] for update in updates)]), logits)
    assert all(len(update[1]) >= 25 for update in updates[:-1])  # 50 logits of two classes
    assert len(updates) <= 1 + sum(sizes) // 25


def test_a_large_batch_is_not_copied():
    logits, given = torch.randn(2**10, 2**9), []
    BatchedUpdates(given.append).add(logits)
    assert given[0] is logits


def test_what_is_forgotten_is_not_counted():
    given = []
    joined = BatchedUpdates(given.append)
    joined.add(torch.zeros(1, 2))
    joined.clear()
    joined.add(torch.ones(1, 2))
    joined.flush()
    assert torch.equal(torch.cat(given), torch.ones(1, 2))


def gap(model):
    x, y = (tensor[: len(Reused(TRAIN)) * 8] for tensor in TRAIN.tensors)
    return _reference_gap(raw_logits(model.state_dict(), x, make=type(model)), y, SEEN, ABSENT)[0]


def test_a_loader_may_write_over_its_batches():
    model = pretrained()
    assert calibrate(model, Reused(TRAIN), SEEN, progress=False).gamma == pytest.approx(gap(model), abs=1e-5)


def test_a_validation_loader_may_write_over_its_batches(tmp_path):
    values = []
    for batches in (loader(VAL, shuffle=False), Reused(VAL)):
        trainer = trainer_of(tmp_path, AbsentClassCalibration(SEEN))
        trainer.validate(pretrained(Measures), batches, verbose=False)
        values.append(logged(trainer, "val"))
    assert values[0] == pytest.approx(values[1], abs=1e-12)


def test_a_training_loader_may_write_over_its_batches(tmp_path):
    gammas = []
    for batches in (loader(shuffle=False, drop_last=True), Reused(TRAIN)):
        model = pretrained(Plain)
        trainer_of(tmp_path, AbsentClassCalibration(SEEN, source="training_steps")).fit(model, batches)
        gammas.append(get_gamma(model))
    assert gammas[0] == pytest.approx(gammas[1], abs=1e-12)


def test_counting_never_waits_for_the_device():
    """On the device without values whatever reads one fails, as does copying to the host."""
    device = torch.device("meta")
    logits, target = torch.empty(70, 8, 6, device=device), torch.empty(70, 8, dtype=torch.long, device=device)
    check, labels = DataCheck(ClassSplit(6, SEEN), device, False, "accident"), TrainingLabels(6, mapped=False)
    joined = BatchedUpdates(lambda logits, target, batch: check.count(target, batch, logits))
    reader = BatchReader(rows={7: 0, 9: 5})
    for index in range(70):
        labels.add_batch((logits[index], target[index]), None, reader)
        joined.add(logits[index], target[index], torch.full_like(target[index], index))
    joined.flush()
    with pytest.raises(RuntimeError, match="meta"):
        check.raise_or_warn()
