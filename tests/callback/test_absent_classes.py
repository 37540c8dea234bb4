"""The classes that can occur, named without the seen ones, and heads with many rows that may never occur."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import TensorDataset

from lightning_calibft import AbsentClassCalibration, CalibrationDiagnostics, get_gamma, inspect_checkpoint
from lightning_calibft.metrics import AverageLogitGap
from tests.helpers.references import _reference_gap
from tests.helpers.runs import (
    SEEN,
    TRAIN,
    VAL,
    Plain,
    Unlisted,
    loader,
    no_warnings,
    pretrained,
    quiet,
    raw_logits,
    trainer_of,
)

pytestmark = quiet

BOTH = r"`absent_classes` to hold classes that the training data does not have, but it has samples of {}. Remove"


@pytest.mark.parametrize("data", [TRAIN, Unlisted(TRAIN)])
def test_absent_classes_alone(tmp_path, data):
    """The seen classes are those met, and the other rows neither compete nor count."""
    module, callback = pretrained(), AbsentClassCalibration(absent_classes=[4, 1])
    trainer = trainer_of(tmp_path, callback, ModelCheckpoint(tmp_path, "last"))
    with no_warnings():
        trainer.fit(module, loader(data), loader(VAL, shuffle=False))
    split = callback.result.split
    assert (list(split.seen_classes), list(split.absent_classes)) == (SEEN, [1, 4])
    x, y = TRAIN.tensors
    gamma = _reference_gap(raw_logits(module.state_dict(), x), y, SEEN, [1, 4])[0]
    assert get_gamma(module) == pytest.approx(gamma, rel=1e-5)
    assert inspect_checkpoint(tmp_path / "last.ckpt")["absent_classes"] == [1, 4]
    x, y = VAL.tensors
    logits = raw_logits(module.state_dict(), x)[:, [*SEEN, 1, 4]]
    occurs = y != 5
    right = torch.tensor([*SEEN, 1, 4])[logits.argmax(1)] == y
    assert trainer.callback_metrics["val_acc_all"].item() == pytest.approx(right[occurs].float().mean().item())


def test_a_resumed_fit_has_the_same_classes(tmp_path):
    first = AbsentClassCalibration(absent_classes=[4, 1])
    trainer_of(tmp_path, first, ModelCheckpoint(tmp_path, "first"), max_epochs=1).fit(pretrained(), loader())
    callback = AbsentClassCalibration(absent_classes=[4, 1])
    trainer = trainer_of(tmp_path, callback, max_epochs=2)
    x, y = TRAIN.tensors
    part = TensorDataset(x[y != SEEN[0]], y[y != SEEN[0]])
    trainer.fit(pretrained(), loader(Unlisted(part)), ckpt_path=tmp_path / "first.ckpt")
    assert callback.result.split == first.result.split


class Counts(Plain):
    steps = 0

    def training_step(self, batch, batch_idx):
        self.steps += 1
        return super().training_step(batch, batch_idx)


def test_an_absent_class_in_the_data_is_refused_before_the_first_step(tmp_path):
    x, y = TRAIN.tensors
    late = TensorDataset(*(part[y.argsort(stable=True)] for part in (x, y)))
    for data in (late, Unlisted(TensorDataset(x.flip(0), y.flip(0)))):  # in the list, in the first batch
        module = pretrained(Counts)
        absent = [1, 3] if data is late else [1, int(y[-1])]
        with pytest.raises(ValueError, match=BOTH.format(absent[1])):
            trainer_of(tmp_path, AbsentClassCalibration(absent_classes=absent)).fit(module, loader(data, shuffle=False))
        assert module.steps == 0


@pytest.mark.filterwarnings("ignore:AbsentClassCalibration leaves step .* without gamma")
@pytest.mark.parametrize("refresh", [False, True])
def test_an_absent_class_that_is_met_late_is_told_at_the_end(tmp_path, refresh):
    x, y = TRAIN.tensors
    data = Unlisted(TensorDataset(*(part[y.argsort(stable=True)] for part in (x, y))))
    module, checkpoints = pretrained(Counts), ModelCheckpoint(tmp_path, "last")
    callback = AbsentClassCalibration(absent_classes=[1, 3], refresh_on_validation=refresh)
    with pytest.raises(ValueError, match=BOTH.format(3)):
        trainer_of(tmp_path, callback, checkpoints).fit(module, loader(data, shuffle=False), loader(VAL, shuffle=False))
    assert module.steps == 12
    assert (tmp_path / "last.ckpt").exists()
    assert get_gamma(module) is None


@pytest.mark.parametrize(
    ("absent", "error", "text"),
    [
        ([6], ValueError, r"`absent_classes` to hold class ids in \[0, 6\), but got 6"),
        ([1, 1], ValueError, "`absent_classes` to hold each class once, but got 1"),
        ([True], TypeError, "`absent_classes` to hold integers, but got True"),
        ([], ValueError, "`absent_classes` to name at least one class"),
    ],
)
@pytest.mark.parametrize("kind", [AbsentClassCalibration, CalibrationDiagnostics])
def test_absent_classes_that_are_no_rows(tmp_path, kind, absent, error, text):
    with pytest.raises(error, match=text):
        trainer_of(tmp_path, kind(absent_classes=absent)).fit(pretrained(), loader())


def test_the_report_refuses_an_absent_class_that_the_first_batch_has(tmp_path):
    module, diagnostics = pretrained(Counts), CalibrationDiagnostics(absent_classes=[1, int(TRAIN.tensors[1][0])])
    with pytest.raises(ValueError, match=BOTH.format(int(TRAIN.tensors[1][0]))):
        trainer_of(tmp_path, diagnostics).fit(module, loader(TRAIN, shuffle=False))
    assert module.steps == 0


def test_the_report_tells_of_an_absent_class_that_is_met_late(tmp_path):
    x, y = TRAIN.tensors
    data = TensorDataset(*(part[y.argsort(stable=True)] for part in (x, y)))
    module, diagnostics = pretrained(Counts), CalibrationDiagnostics(absent_classes=[1, int(y.max())])
    with pytest.warns(UserWarning, match=rf"counts the classes {int(y.max())} as seen: they are in `absent_c") as told:
        trainer_of(tmp_path, diagnostics).fit(module, loader(data, shuffle=False), loader(VAL, shuffle=False))
    assert module.steps == 12
    assert sum("as seen" in str(warning.message) for warning in told) == 1


def test_the_report_measures_the_same_classes(tmp_path):
    diagnostics = CalibrationDiagnostics(absent_classes=[1, 4])
    trainer_of(tmp_path, diagnostics).fit(pretrained(), loader(), loader(VAL, shuffle=False))
    split = diagnostics._history.split
    assert (list(split.seen_classes), list(split.absent_classes)) == (SEEN, [1, 4])


class WideHead(Plain):
    def build(self, dropout):
        self.body = nn.Sequential(nn.Linear(5, 16), nn.ReLU())
        self.fc = nn.Linear(16, 40)


def wide(folder, callback, data=TRAIN):
    trainer_of(folder, callback, max_epochs=2).fit(WideHead(), loader(data))


@pytest.mark.parametrize("data", [TRAIN, Unlisted(TRAIN)])
@pytest.mark.parametrize("kwargs", [{}, {"estimator": "pseudo_absent", "source": "train"}])
def test_many_rows_that_may_never_occur_are_told_once(tmp_path, data, kwargs):
    text = r"37 rows that are not in the training data, which has 3 classes.*`absent_classes=\[...\]`.*`absent_share`"
    with pytest.warns(UserWarning, match=text) as told:
        wide(tmp_path, AbsentClassCalibration(**kwargs), data)
    assert sum("37 rows" in str(warning.message) for warning in told) == 1


@pytest.mark.parametrize(
    "kwargs",
    [
        {"absent_classes": [1, 4]},
        {"seen_classes": SEEN},
        {"absent_share": 0.2},
        {"estimator": "fixed", "estimator_kwargs": {"gamma": 1.0}},
        {"estimator": AverageLogitGap(40, SEEN)},
    ],
)
def test_nothing_is_told_where_it_does_not_matter_or_something_was_said(tmp_path, kwargs):
    with no_warnings("rows that are not in the training data"):
        wide(tmp_path, AbsentClassCalibration(**kwargs))


def test_nothing_is_told_of_a_head_of_ten_absent_rows_a_class(tmp_path):
    class Narrower(WideHead):
        def build(self, dropout):
            super().build(dropout)
            self.fc = nn.Linear(16, 33)

    with no_warnings("rows that are not in the training data"):
        trainer_of(tmp_path, AbsentClassCalibration()).fit(Narrower(), loader())
