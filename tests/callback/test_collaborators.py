"""What the callback has its work done by, each by itself and without a Trainer."""

from __future__ import annotations

import copy

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn

from lightning_calibft import AbsentClassCalibration, ClassSplit, set_gamma
from lightning_calibft.calibration.batch_reader import BatchReader
from lightning_calibft.callback.evaluation_monitor import EvaluationMonitor
from lightning_calibft.callback.head_attachment import HeadAttachment
from lightning_calibft.callback.lightning_package import LightningCallback
from lightning_calibft.callback.pretrained_weights import PretrainedWeights
from lightning_calibft.callback.training_labels import TrainingLabels, training_batches
from lightning_calibft.callback.training_steps import TrainingSteps
from lightning_calibft.functional import ausuc, average_logit_gap, split_accuracy
from tests.helpers.runs import ABSENT, NUM_CLASSES, SEEN, TRAIN, VAL, Plain, pretrained

SPLIT = ClassSplit(NUM_CLASSES, SEEN, ABSENT)


class Late(LightningModule):
    """Builds its head when it is told to."""

    def build(self):
        self.fc = nn.Linear(5, NUM_CLASSES)
        return self


def keys(model):
    return [key for key in model.state_dict() if "absent_class_calibration" in key]


def test_a_head_that_exists_is_attached_at_once():
    checked = []
    model, attachment = Plain(), HeadAttachment(None, checked.append)
    attachment.attach_or_wait(model, sharded=False)
    assert checked == [NUM_CLASSES]
    assert keys(model) == ["fc.absent_class_calibration.offset", "fc.absent_class_calibration.mask"]
    attachment.ensure(None, model)
    assert checked == [NUM_CLASSES]  # nothing was left to do


def test_a_late_head_is_attached_before_weights_are_restored():
    checked = []
    model, attachment = Late(), HeadAttachment(None, checked.append)
    attachment.attach_or_wait(model, sharded=False)
    model.build()
    state = set_gamma(Late().build(), 2.5, SEEN, ABSENT).state_dict()
    model.load_state_dict(state)  # strictly: the keys must be there
    assert model.fc.absent_class_calibration.offset == 2.5


def test_a_sharded_head_is_attached_before_its_state_is_asked_for():
    checked = []
    model, attachment = Plain(), HeadAttachment(None, checked.append)
    attachment.attach_or_wait(model, sharded=True)
    assert keys(model) != []
    assert checked == [NUM_CLASSES]


def test_what_the_check_refuses_is_not_attached():
    def refuse(num_classes):
        raise ValueError(f"not {num_classes}")

    model = Plain()
    with pytest.raises(ValueError, match="not 6"):
        HeadAttachment(None, refuse).attach_or_wait(model, sharded=False)
    assert keys(model) == []


@pytest.mark.parametrize("sharded", [False, True])
def test_waiting_ends(sharded):
    checked = []
    model, attachment = Late(), HeadAttachment(None, checked.append)
    attachment.attach_or_wait(model, sharded)
    attachment.stop_waiting()
    model.build()
    model.load_state_dict(model.state_dict())
    assert keys(model) == []


def test_labels_are_those_of_all_batches():
    labels, reader = TrainingLabels(NUM_CLASSES, mapped=False), BatchReader()
    for target in TRAIN.tensors[1].split(4):
        labels.add_batch((None, target), None, reader)
    assert labels.classes() == SEEN
    labels.add_classes([5])
    assert labels.classes() == sorted([*SEEN, 5])


@pytest.mark.parametrize(
    ("batch", "loaders", "expected"),
    [
        (("x", "y"), "loader", [("x", "y")]),
        ({"a": 1, "b": None}, {"a": "loader", "b": "loader"}, [1]),
        ([1, [2, 3]], ["loader", ["loader", "loader"]], [1, 2, 3]),
        ([torch.ones(1), torch.ones(1)], ["loader", "loader"], [[torch.ones(1), torch.ones(1)]]),
    ],
)
def test_batches_of_a_collection_of_loaders(batch, loaders, expected):
    assert training_batches(batch, loaders) == expected


@pytest.mark.parametrize("gamma", [0.0, 1.5])
def test_the_monitor_measures_what_the_model_predicts(gamma):
    model, monitor = pretrained().eval(), EvaluationMonitor()
    set_gamma(model, gamma, SEEN, ABSENT)
    monitor.start(model, BatchReader(), SPLIT, num_loaders=1, step=7)
    inputs, target = VAL.tensors
    for batch in zip(inputs.split(10), target.split(10), strict=True):
        monitor.start_batch(batch)
        model(batch[0])
        monitor.end_batch(0)
    values, logits = monitor.values("val"), model(inputs)
    assert (monitor.counted, monitor.step) == (True, 7)
    assert values["val_ausuc"].item() == pytest.approx(ausuc(logits, target, SEEN, ABSENT).item(), abs=1e-6)
    absent = split_accuracy(logits, target, SEEN, ABSENT, samples="absent").item()
    assert values["val_acc_absent"].item() == absent
    # What another gamma would have given, from the margins alone.
    set_gamma(model, -2.0, SEEN, ABSENT)
    other = split_accuracy(model(inputs), target, SEEN, ABSENT, samples="absent").item()
    assert monitor.accuracies("val", -2.0)["val_acc_absent"].item() == other != absent


def test_the_monitor_counts_no_batch_without_one_forward():
    model, monitor = pretrained().eval(), EvaluationMonitor()
    set_gamma(model, 1.0, SEEN, ABSENT)
    monitor.start(model, BatchReader(), SPLIT, num_loaders=1, step=0)
    monitor.start_batch((VAL.tensors[0][:4], VAL.tensors[1][:4]))
    with pytest.warns(UserWarning, match=r"one forward .* batch of 4 labels, but got \[\]"):
        monitor.end_batch(0)
    assert not monitor.counted


def test_the_steps_give_the_gap_of_their_own_logits():
    model = pretrained().eval()
    set_gamma(model, 9.0, SEEN, ABSENT)  # plays no part
    steps, inputs, target = TrainingSteps(model, "alg", None, SPLIT), *TRAIN.tensors
    for part, rows in zip(inputs.split(8), target.split(8), strict=True):
        steps.start_step(rows)
        model(part)
        steps.end_forward()
        model(part[:1])  # something else looks at the model
        steps.end_step(skipped=False)
    expected = average_logit_gap(pretrained().eval()(inputs), target, SEEN, ABSENT)
    expected = getattr(expected, "gamma", expected)
    assert steps.result().gamma == pytest.approx(expected.item(), abs=1e-6)


def test_the_weights_before_are_those_from_before_a_checkpoint():
    model, before = pretrained(), PretrainedWeights()
    first = copy.deepcopy(model.state_dict())
    before.watch(model)
    model.load_state_dict(Plain().state_dict())
    before.start(model, resumed=True)
    assert before.weights is not None
    assert all(torch.equal(before.weights[key], value) for key, value in first.items())
    before.start(model, resumed=False)
    assert not torch.equal(before.weights["fc.weight"], first["fc.weight"])
    before.forget()
    assert before.weights is None


def test_the_callback_has_no_other_base_of_ours():
    assert AbsentClassCalibration.__bases__ == (LightningCallback,)
