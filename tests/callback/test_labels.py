"""Labels that are no seen classes, and too many or too few that are."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import TensorDataset

from lightning_calibft import AbsentClassCalibration, get_gamma
from tests.helpers.runs import (
    ABSENT,
    SEEN,
    TRAIN,
    VAL,
    Plain,
    assert_calibrated,
    blobs,
    loader,
    pretrained,
    quiet,
    read,
    split_state,
    trainer_of,
)

pytestmark = quiet


class Hinge(Plain):
    """A loss that takes any label."""

    def loss(self, batch):
        return (self(batch[0]).square().sum(1) * batch[1]).mean()


@pytest.mark.parametrize("arguments", [{}, {"seen_classes": SEEN}], ids=["inferred", "given"])
@pytest.mark.parametrize("label", [6, -1])
def test_labels_outside_of_the_head(label, arguments, tmp_path):
    x, y = TRAIN.tensors
    data = loader(TensorDataset(x, torch.where(y == 3, label, y)))
    with pytest.raises(ValueError, match=r"class ids in \[0, 6\), rows of the classification head, but") as error:
        trainer_of(tmp_path, AbsentClassCalibration(**arguments), max_epochs=1).fit(module := pretrained(Hinge), data)
    assert ("calibration_dataloader()" if label == 6 else "-100") in str(error.value)
    assert get_gamma(module) is None


def test_labels_that_the_loss_ignores(tmp_path):
    x, y = TRAIN.tensors
    module, callback = pretrained(), AbsentClassCalibration()
    keep = torch.arange(len(y)) % 5 > 0
    trainer_of(tmp_path, callback).fit(module, loader(TensorDataset(x, torch.where(keep, y, -100))))
    assert callback.result.num_samples == keep.sum()
    assert_calibrated(module.state_dict(), TensorDataset(x[keep], y[keep]))


def test_labels_of_classes_that_were_not_named(tmp_path):
    module, callback = pretrained(), AbsentClassCalibration(seen_classes=[0, 2], absent_classes=ABSENT)
    with pytest.warns(UserWarning, match="15 of 45 samples .* not of the `seen_classes` and were left out"):
        trainer_of(tmp_path, callback).fit(module, loader())
    keep = TRAIN.tensors[1] != 3
    assert_calibrated(module.state_dict(), TensorDataset(*(part[keep] for part in TRAIN.tensors)), seen=[0, 2])


@pytest.mark.parametrize(
    ("classes", "count"), [([*SEEN, *ABSENT], "6 of the 6"), ([2], "1 of the 6")], ids=["all_classes", "one_class"]
)
def test_nothing_to_calibrate(classes, count, tmp_path):
    module, callback = pretrained(), AbsentClassCalibration()
    checkpoints = ModelCheckpoint(tmp_path)
    with pytest.warns(UserWarning, match=rf"holds {count} classes\. .* so the model is not calibrated"):
        trainer_of(tmp_path, callback, checkpoints).fit(module, loader(blobs(classes)), loader(VAL, shuffle=False))
    assert callback.result is None
    assert split_state(module.state_dict())[1:] == (0.0, [])
    assert split_state(read(checkpoints.best_model_path)["state_dict"])[1:] == (0.0, [])
