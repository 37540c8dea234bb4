"""An error of the calibration comes when the run has saved what it saves without the callback."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import TensorDataset

from lightning_calibft import AbsentClassCalibration, get_gamma
from tests.helpers.runs import SEEN, TRAIN, Plain, loader, pretrained, quiet, trainer_of

pytestmark = quiet


class Skipping(Plain):
    """Skips batches with a sample that is not a number, as runs with half precision do."""

    def training_step(self, batch, batch_idx):
        return None if batch[0].isnan().any() else super().training_step(batch, batch_idx)


class Unreadable(TensorDataset):
    """Fails when two epochs have been read."""

    reads = 0

    def __getitem__(self, index):
        self.reads += 1
        if self.reads > 2 * len(self):
            raise OSError("the disk is gone")
        return super().__getitem__(index)


def with_nan():
    inputs, target = (tensor.clone() for tensor in TRAIN.tensors)
    inputs[-1] = torch.nan
    return loader(TensorDataset(inputs, target), shuffle=False)


def unreadable():
    return loader(Unreadable(*TRAIN.tensors), shuffle=False)


def fit(folder, data, *callbacks):
    checkpoints = ModelCheckpoint(folder, save_last=True, every_n_epochs=50)
    module = pretrained(Skipping)
    trainer = trainer_of(folder, *callbacks, checkpoints, max_epochs=2)
    try:
        trainer.fit(module, data())
    finally:
        files = sorted(path.name for path in folder.rglob("*.ckpt"))
    return module, files


@pytest.mark.parametrize(
    ("data", "error", "text"), [(with_nan, ValueError, "NaN or infinite"), (unreadable, OSError, "the disk is gone")]
)
def test_the_files_of_the_plain_run_are_there(data, error, text, tmp_path):
    plain, own = tmp_path / "plain", tmp_path / "own"
    _, expected = fit(plain, data)
    assert expected == ["last.ckpt"]
    callback = AbsentClassCalibration(SEEN)
    with pytest.raises(error, match=text):
        fit(own, data, callback)
    assert sorted(path.name for path in own.rglob("*.ckpt")) == expected
    assert callback.result is None


def test_a_model_whose_calibration_failed_has_no_gamma(tmp_path):
    module = pretrained(Skipping)
    with pytest.raises(ValueError, match="Gamma stays unset"):
        trainer_of(tmp_path, AbsentClassCalibration(SEEN)).fit(module, with_nan())
    assert get_gamma(module) is None
