"""Labels that look like numbers of folders, which nobody has mapped to rows."""

from __future__ import annotations

import re
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from PIL import Image
from torch import nn
from torch.utils.data import TensorDataset
from torchvision.datasets import ImageFolder
from torchvision.transforms.functional import to_tensor

from lightning_calibft import calibrate
from lightning_calibft.labels.label_names import rows_of_names, wordnet_ids
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


class Named(TensorDataset):
    """Samples with the list of names that a folder of images has. ``labels`` are positions in it."""

    def __init__(self, labels, names, with_index=True):
        labels = torch.tensor(labels).repeat(40)[: max(40, len(labels))]
        super().__init__(torch.randn(len(labels), 5), labels)
        self.classes = list(names)
        if with_index:
            self.class_to_idx = {name: index for index, name in enumerate(names)}


def rows(number):
    class Rows(Plain):
        def build(self, dropout):
            super().build(dropout)
            self.fc = nn.Linear(16, number)

    return Rows()


class BeforeFirstStep(Callback):
    def __init__(self, met):
        self.met, self.number = met, None

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 0:
            self.number = len(hints(self.met))


def said_before_training(folder, module, data, **arguments):
    with warnings.catch_warnings(record=True) as met:
        warnings.simplefilter("always")
        before = BeforeFirstStep(met)
        fit(folder, module, data, callbacks=[before], **arguments)
    assert before.number == len(hints(met))
    return hints(met)


WORDS = [f"word{index:03}" for index in range(1000)]
WORDNET = list(rows_of_names("imagenet-1k", 1000))


@pytest.mark.parametrize(
    ("labels", "names", "number", "says"),
    [
        (
            [0, 1, 2],
            ["ant", "bee", "cat"],
            6,
            r"0 to 2: .* \('ant', 'bee', 'cat'\), not .*class_map=\[\.\.\.\]`.*range\(3\)\)`",
        ),
        ([0, 1, 2], ["1", "2", "4"], 6, r"0 to 2: .* \('1', '2', '4'\), not .*`class_map=\[1, 2, 4\]`"),
        ([0, 2], ["1", "2", "4"], 6, r"The labels are 0, 2: .*`class_map=\[1, 2, 4\]`.*pass `seen_classes=\[0, 2\]`"),
        ([0, 1, 2, 3], ["0", "1", "10", "2"], 12, r"`class_map=\[0, 1, 10, 2\]`"),
        (range(30), WORDS[:30], 65, r"0 to 29: .* \('word000', 'word001', 'word002' and 27 more\)"),
        (range(500), WORDS[:500], 1000, "0 to 499"),
        ([3, 7], WORDS[:10], 12, r"The labels are 3, 7: .*pass `seen_classes=\[3, 7\]`"),
        (range(10), wordnet_ids("imagenette"), 1000, "0 to 9"),
    ],
    ids=["3 of 6", "numbers", "some", "strings in order", "30 of 65", "500 of 1000", "not the first", "wordnet"],
)
@pytest.mark.parametrize("with_index", [True, False])
def test_names_that_are_not_those_of_the_rows(labels, names, number, says, with_index, tmp_path):
    (text,) = said_before_training(tmp_path, rows(number), Named(list(labels), names, with_index))
    assert re.search(says, text)


@pytest.mark.parametrize(
    ("labels", "names", "number", "arguments"),
    [
        ([0, 1, 2], ["0", "1", "2"], 6, {}),
        (range(500), WORDNET[:500], 1000, {}),
        ([0, 1, 2], WORDS[:12], 12, {}),  # of all rows
        ([0, 1, 2], ["1", "2", "4"], 6, {"class_map": [1, 2, 4]}),
        ([0, 1, 2], ["ant", "bee", "cat"], 6, {"seen_classes": [0, 1, 2]}),
        ([0, 1, 2], ["ant", "bee", "cat", "dog"], 6, {"seen_classes": [0, 1, 2]}),
    ],
)
def test_names_that_are_those_of_the_rows(labels, names, number, arguments, tmp_path):
    assert not said_before_training(tmp_path, rows(number), Named(list(labels), names), **arguments)


def test_names_of_labels_that_are_no_positions(tmp_path):
    data = Named([3, 5], ["cat", "dog"])
    data.class_to_idx = {"cat": 3, "dog": 5}
    assert not said_before_training(tmp_path, rows(6), data)


def test_seen_classes_that_are_the_names_of_folders(tmp_path):
    (text,) = said_before_training(tmp_path, rows(6), Named([0, 1, 2], ["1", "2", "4"]), seen_classes=[1, 2, 4])
    assert "`class_map=[1, 2, 4]`" in text


def test_the_names_in_the_config_of_a_transformer(tmp_path):
    module = rows(6)
    module.config = SimpleNamespace(id2label=dict(enumerate(WORDS[:6])))
    assert not said_before_training(tmp_path, module, Named([0, 1, 2], WORDS[:3]))
    assert said_before_training(tmp_path, module, Named([0, 1, 2], WORDS[1:4]))


def test_a_folder_of_images(tmp_path):
    for name in ("1", "2", "4"):
        (tmp_path / name).mkdir()
        for index in range(4):
            Image.new("RGB", (2, 2), (60 * int(name), 9 * index, 0)).save(tmp_path / name / f"{index}.png")

    class Images(Plain):
        def build(self, dropout):
            super().build(dropout)
            self.body[0] = nn.Linear(12, 16)

        def forward(self, x):
            return super().forward(x.flatten(1))

    data = ImageFolder(tmp_path, transform=to_tensor)
    (text,) = said_before_training(tmp_path, Images(), data)
    assert "`class_map=[1, 2, 4]`" in text
    with pytest.warns(UserWarning, match=r"look like positions .*`class_map=\[1, 2, 4\]`"):
        calibrate(Images(), loader(data), progress=False)


def test_seen_classes_that_no_sample_has(tmp_path):
    text = r"but got none: its labels are the rows 0, 1, 2\. .* look like positions in a list of folders.*`class_map="
    with pytest.raises(ValueError, match=text):
        fit(tmp_path, pretrained(Wide), folders(TRAIN), seen_classes=[5, 7])
