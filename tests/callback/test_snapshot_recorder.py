"""SnapshotRecorder without a Trainer."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy

from lightning_calibft.analysis.history import History
from lightning_calibft.calibration.batch_reader import BatchReader
from lightning_calibft.callback.snapshot_recorder import SnapshotRecorder
from lightning_calibft.split import ClassSplit
from tests.callback.diagnosing import HARD, check_evaluation, check_levels, check_weights, val
from tests.helpers.runs import ABSENT, NUM_CLASSES, SEEN, pretrained


@pytest.fixture
def warned():
    return []


@pytest.fixture
def record(warned):
    def make(model, split=None):
        strategy = SingleDeviceStrategy(device=torch.device("cpu"))
        return SnapshotRecorder(model, None, BatchReader(), split, strategy, warned.append)

    return make


@torch.no_grad()
def validate(recorder, model, batches, forwards=1):
    recorder.start_validation()
    for batch in batches:
        recorder.start_batch(batch)
        for _ in range(forwards):
            model(batch[0])
        recorder.end_batch()


def training_batch(*labels):
    return [torch.randn(len(labels), 5), torch.tensor(labels)]


def test_a_validation_becomes_a_snapshot(record, warned):
    model = pretrained().eval()
    first, keys = model.fc.weight.detach().clone(), model.state_dict().keys()
    recorder, history = record(model, ClassSplit(NUM_CLASSES, SEEN, ABSENT)), History(0, 0, first)
    assert model.state_dict().keys() == keys
    with torch.no_grad():
        model.fc.weight += 0.1 * torch.randn_like(first)
    validate(recorder, model, val())
    recorder.end_validation(history, 1, 6)
    assert [(each.epoch, each.step) for each in history.snapshots] == [(0, 0), (1, 6)]
    with torch.no_grad():
        logits = model(HARD.tensors[0])
    check_evaluation(history.snapshots[1], logits, HARD.tensors[1])
    check_levels(history.snapshots[1], logits, HARD.tensors[1])
    check_weights(history.snapshots[1], first, model.fc.weight.detach())
    recorder.remove()
    assert not model.fc._forward_hooks
    assert warned == []


def test_the_classes_of_the_training_batches_are_the_seen_ones(record, warned):
    model = pretrained()
    weight = model.fc.weight.detach().clone()
    recorder, history = record(model), History(0, 0, weight)
    assert recorder.split() is None
    validate(recorder, model, val())
    recorder.end_validation(history, 1, 3)
    recorder.end_epoch(history, 1, 3)
    assert history.snapshots == []  # no class is seen yet
    recorder.add_training_batch(training_batch(4, 2, 4), None)
    recorder.add_classes([0])
    assert recorder.classes() == [0, 2, 4]
    assert recorder.split() == ClassSplit(NUM_CLASSES, [0, 2, 4])
    recorder.end_epoch(history, 1, 3)
    assert [each.step for each in history.snapshots] == [0, 3]
    assert torch.equal(recorder.weight(), weight)
    recorder.add_training_batch(training_batch(*range(NUM_CLASSES)), None)
    assert recorder.split() is None  # none is absent
    recorder.add_training_batch(["no", "labels"], None)
    assert len(warned) == 1
    assert "Or pass `seen_classes`" in warned[0]


@pytest.mark.parametrize("forwards", [0, 2])
def test_batches_with_other_than_one_forward_are_left_out(record, warned, forwards):
    model = pretrained().eval()
    recorder, history = record(model, ClassSplit(NUM_CLASSES, SEEN)), History(0, 0, None)
    batches = list(val())
    validate(recorder, model, batches, forwards)
    recorder.end_validation(history, 1, 6)
    assert history.snapshots == []
    assert len(warned) == len(batches)
    assert "exactly once on each validation batch" in warned[0]
