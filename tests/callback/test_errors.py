"""What cannot work is said with a remedy, before training where it can be known, and leaves nothing behind."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_calibft import AbsentClassCalibration, get_gamma
from lightning_calibft.metrics import AverageLogitGap
from tests.helpers.runs import (
    MASK,
    NUM_CLASSES,
    OFFSET,
    SEEN,
    TRAIN,
    Plain,
    loader,
    pretrained,
    quiet,
    read,
    split_state,
    trainer_of,
)

pytestmark = quiet


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"estimator": "platt"}, ValueError, "one of 'alg', 'pseudo_absent', .* or a metric, but got 'platt'"),
        ({"estimator": 3}, TypeError, "`estimator` to be a name or a torchmetrics Metric"),
        ({"max_samples": 0}, ValueError, "`max_samples` to be an integer of at least 1, but got 0"),
        ({"unpack_batch": "no.such.function"}, ValueError, "`unpack_batch` to be the import path of a function"),
        ({"unpack_batch": "function"}, ValueError, "`unpack_batch` to be the import path of a function"),
        ({"unpack_batch": 3}, TypeError, "`unpack_batch` to be a function, but got 3"),
        (
            {"estimator": AverageLogitGap(6, SEEN), "seen_classes": SEEN},
            ValueError,
            "`absent_classes` to be None with an `estimator`",
        ),
    ],
)
def test_arguments(arguments, error, text):
    with pytest.raises(error, match=text):
        AbsentClassCalibration(**arguments)


def assert_refused(folder, callback, error, text, make=Plain, data=None):
    """Fitting raises before a step is done; return whether the module has the keys that it had."""
    module = make()
    keys = list(module.state_dict())
    trainer = trainer_of(folder, callback)
    with pytest.raises(error, match=text):
        trainer.fit(module, data or loader())
    assert trainer.global_step == 0
    assert get_gamma(module) is None
    return keys == list(module.state_dict())


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"seen_classes": [0, 6]}, ValueError, r"`seen_classes` to hold class ids in \[0, 6\), but got 6"),
        ({"seen_classes": [0, -1]}, ValueError, r"`seen_classes` to hold class ids in \[0, 6\), but got -1"),
        ({"seen_classes": [0, 2, 0]}, ValueError, "`seen_classes` to hold each class once, but got 0 more than once"),
        ({"seen_classes": [True, False]}, TypeError, "`seen_classes` to hold integers, but got True"),
        ({"seen_classes": [0.0, 1.0]}, TypeError, "`seen_classes` to hold integers, but got 0.0"),
        ({"seen_classes": list(range(6))}, ValueError, "`seen_classes` to leave out at least one of the 6 classes"),
        ({"seen_classes": [2]}, ValueError, "`seen_classes` to hold at least 2 classes, but got 1"),
        ({"seen_classes": []}, ValueError, "`seen_classes` to name at least one class"),
        ({"seen_classes": [0, 2], "absent_classes": [2, 3]}, ValueError, "share no class, but both hold 2"),
        ({"seen_classes": [0, 2], "absent_classes": []}, ValueError, "`absent_classes` to name at least one class"),
        ({"estimator": AverageLogitGap(7, SEEN)}, ValueError, "`estimator` to be made for the 6 classes of the head"),
    ],
)
def test_classes_are_checked_against_the_head(arguments, error, text, tmp_path):
    assert assert_refused(tmp_path, AbsentClassCalibration(**arguments), error, text)


class Auxiliary(Plain):
    """What is called fc is not what decides."""

    def build(self, dropout):
        super().build(dropout)
        self.real = nn.Linear(16, NUM_CLASSES)

    def forward(self, x):
        return self.real(self.body(x)) + 0 * self.fc(self.body(x))


class TwoHeads(Plain):
    def build(self, dropout):
        self.body, self.head, self.fc = nn.Linear(5, 16), nn.Linear(16, 6), nn.Linear(16, 6)

    def forward(self, x):
        return self.head(self.body(x))


class Scaled(Plain):
    def forward(self, x):
        return super().forward(x) / 2


class NoHead(Plain):
    def build(self, dropout):
        self.body = nn.Conv1d(1, 6, 5)

    def forward(self, x):
        return self.body(x[:, None]).flatten(1)


@pytest.mark.parametrize(
    ("make", "arguments", "text"),
    [
        (Auxiliary, {}, r"head 'fc' of Auxiliary to give the logits.*The head is 'real': pass `head=\"real\"`"),
        (TwoHeads, {}, "several modules that could be the classification head: .*'head'"),
        (TwoHeads, {"head": "fc"}, r"The head is 'head': pass `head=\"head\"`"),
        (Scaled, {}, "moves them by 0.5 times"),
        (NoHead, {}, "Found no classification head in NoHead"),
        (Plain, {"head": "net.fc"}, "`head` to name a module of Plain, but got 'net.fc'"),
        (Plain, {"head": "body.1"}, "`head` to be a Linear, a 1x1 Conv2d"),
    ],
)
def test_the_head(make, arguments, text, tmp_path):
    assert_refused(tmp_path, AbsentClassCalibration(**arguments), ValueError, text, make)


@pytest.mark.parametrize("arguments", [{}, {"seen_classes": SEEN}], ids=["inferred", "given"])
@pytest.mark.parametrize(
    ("data", "error", "text"),
    [
        (
            TensorDataset(TRAIN.tensors[0], 0.9 * F.one_hot(TRAIN.tensors[1], 6).float()),
            TypeError,
            r"class ids, but got dtype torch.float32 with shape \(8, 6\)\. Soft .*calibration_dataloader\(\)",
        ),
        (TensorDataset(TRAIN.tensors[0], torch.ones(len(TRAIN), 6) > 0), TypeError, "got dtype torch.bool"),
        (TensorDataset(TRAIN.tensors[0], torch.ones(len(TRAIN), 6).long()), ValueError, r"\(N,\), .* got \(8, 6\)"),
        (TensorDataset(*TRAIN.tensors, TRAIN.tensors[1] // 2), ValueError, "either could be it. Pass `unpack_batch`"),
        (TRAIN.tensors[0], ValueError, "a pair .inputs, target., .* but got a Tensor. Pass `unpack_batch`"),
        ([{"x": x, "kind": y} for x, y in TRAIN], ValueError, "under one of the keys label, labels, .* keys x, kind"),
        ([(x, str(y)) for x, y in TRAIN], TypeError, "target of a batch to be a tensor, but got a"),
    ],
    ids=["soft", "multi_label", "one_hot", "triple", "no_pair", "no_target_key", "strings"],
)
def test_batches(data, error, text, arguments, tmp_path):
    assert_refused(tmp_path, AbsentClassCalibration(**arguments), error, text, data=loader(data))


def test_training_that_diverged(tmp_path):
    class Diverges(Plain):
        def on_train_epoch_end(self):
            if self.current_epoch == 1:
                self.fc.bias.data[3] = float("nan")

    module, checkpoints = pretrained(Diverges), ModelCheckpoint(tmp_path, save_top_k=-1)
    with pytest.raises(ValueError, match=r"finite logits .* batch 0 has NaN.*Gamma stays unset"):
        trainer_of(tmp_path, AbsentClassCalibration(), checkpoints).fit(module, loader())
    assert get_gamma(module) is None
    assert split_state(read(checkpoints.best_model_path)["state_dict"])[1:] == (0.0, [])


def test_no_training_data(tmp_path):
    module = pretrained()
    with pytest.warns(UserWarning, match="found no training data: the model is not calibrated"):
        trainer_of(tmp_path, AbsentClassCalibration(), limit_train_batches=0).fit(module, loader())
    assert get_gamma(module) is None

    with pytest.raises(ValueError, match="data to hold samples of the seen classes, but got none"):
        trainer_of(tmp_path, AbsentClassCalibration()).fit(module, DataLoader([]))
    assert get_gamma(module) is None


@pytest.mark.parametrize("data", [[], DataLoader([])], ids=["no_batches", "no_samples"])
def test_an_empty_calibration_dataloader(data, tmp_path):
    class Module(Plain):
        def calibration_dataloader(self):
            return data

    text = "data to hold samples of the seen classes, but got none. Check the loader"
    assert_refused(tmp_path, AbsentClassCalibration(), ValueError, text, Module)


def test_an_interrupted_run_is_not_calibrated(tmp_path):
    class Interrupts(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                raise KeyboardInterrupt

    module = pretrained()
    text = "interrupted: the model and its checkpoints are not calibrated"
    with pytest.warns(UserWarning, match=text), pytest.raises((KeyboardInterrupt, SystemExit)):
        trainer_of(tmp_path, AbsentClassCalibration(), Interrupts()).fit(module, loader())
    assert get_gamma(module) is None


def test_an_error_of_the_user_leaves_the_module_usable(tmp_path):
    class Fails(Plain):
        def training_step(self, batch, batch_idx):
            raise RuntimeError("mine")

    module, callback = Fails(), AbsentClassCalibration()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="mine"):
            trainer_of(tmp_path, callback).fit(module, loader())
    assert get_gamma(module) is None
    assert list(module.state_dict())[-2:] == [f"fc.{OFFSET}", f"fc.{MASK}"]
