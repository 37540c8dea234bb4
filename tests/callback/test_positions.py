"""Labels that look like numbers of folders, which nobody has mapped to rows."""

from __future__ import annotations

import warnings

import pytest
import torch.nn.functional as F
from lightning.pytorch import Callback
from torch import nn
from torch.utils.data import TensorDataset

from tests.callback.test_class_map import fit, folders
from tests.helpers.runs import TRAIN, Plain, loader, pretrained, quiet

pytestmark = quiet


class Wide(Plain):
    def build(self, dropout):
        super().build(dropout)
        self.fc = nn.Linear(16, 12)


HINT = r"The labels are 0 to 2: they look like positions .* `class_map=dataset\.classes.*pass `seen_classes=list"


def hints(met):
    return [str(warning.message) for warning in met if "look like positions" in str(warning.message)]


class AfterFirstEpoch(Callback):
    def __init__(self, met):
        self.met = met

    def on_train_epoch_start(self, trainer, pl_module):
        assert len(hints(self.met)) == min(trainer.current_epoch, 1)


def test_labels_that_look_like_positions_are_told_after_the_first_epoch(tmp_path):
    with pytest.warns(UserWarning, match=HINT) as met:
        fit(
            tmp_path,
            pretrained(Wide),
            folders(TRAIN),
            callbacks=[AfterFirstEpoch(met)],
            trainer_arguments={"max_epochs": 3},
        )
    assert len(hints(met)) == 1


def test_labels_that_look_like_positions_are_told_when_fitting_ends(tmp_path):
    with pytest.warns(UserWarning, match=HINT) as met:
        fit(tmp_path, pretrained(Wide), folders(TRAIN), trainer_arguments={"max_steps": 2, "max_epochs": -1})
    assert len(hints(met)) == 1


def test_labels_that_look_like_positions_in_the_calibration_data(tmp_path):
    class Mixed(Wide):
        def calibration_dataloader(self):
            return loader(folders(TRAIN))

    x, y = folders(TRAIN).tensors
    with pytest.warns(UserWarning, match=HINT) as met:
        fit(tmp_path, pretrained(Mixed), TensorDataset(x, F.one_hot(y, 12).float()))
    assert len(hints(met)) == 1


@pytest.mark.parametrize(
    ("make", "data", "arguments"),
    [
        (Wide, folders(TRAIN), {"class_map": [0, 1, 2]}),
        (Wide, folders(TRAIN), {"seen_classes": [0, 1, 2]}),
        (Wide, TRAIN, {}),
        (Plain, folders(TRAIN), {}),
    ],
    ids=["mapped", "given", "others", "narrow"],
)
def test_labels_that_may_be_rows(make, data, arguments, tmp_path):
    with warnings.catch_warnings(record=True) as met:
        warnings.simplefilter("always")
        fit(tmp_path, pretrained(make), data, **arguments)
    assert not hints(met)


def test_seen_classes_that_no_sample_has(tmp_path):
    text = r"but got none: its labels are the rows 0, 1, 2\. .* look like positions in a list of folders.*`class_map="
    with pytest.raises(ValueError, match=text):
        fit(tmp_path, pretrained(Wide), folders(TRAIN), seen_classes=[5, 7])
