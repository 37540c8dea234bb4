"""Where the data of the pass comes from, and the hooks that it goes through."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_calibft import AbsentClassCalibration
from tests.helpers.runs import (
    NUM_CLASSES,
    SEEN,
    TRAIN,
    VAL,
    Plain,
    assert_calibrated,
    loader,
    pretrained,
    quiet,
    read,
    trainer_of,
)

pytestmark = quiet


class Data(LightningDataModule):
    def train_dataloader(self):
        return loader()

    def val_dataloader(self):
        return loader(VAL, shuffle=False)

    test_dataloader = val_dataloader


def test_a_datamodule(tmp_path):
    module, callback = pretrained(), AbsentClassCalibration()
    trainer = trainer_of(tmp_path, callback, ModelCheckpoint(tmp_path, monitor="val_ausuc", mode="max"))
    trainer.fit(module, datamodule=Data())
    assert_calibrated(module.state_dict())
    trainer.test(module, datamodule=Data(), ckpt_path="best", verbose=False)
    assert_calibrated(module.state_dict())


def mixup(samples):
    """A collate function that gives soft labels."""
    x, y = torch.utils.data.default_collate(samples)
    return (x + x.flip(0)) / 2, (F.one_hot(y, NUM_CLASSES) + F.one_hot(y.flip(0), NUM_CLASSES)) / 2


class MixedData(Data):
    def train_dataloader(self):
        return loader(collate_fn=mixup)


class MixedDataWithClean(MixedData):
    def calibration_dataloader(self):
        return loader()


class WithClean(Plain):
    def calibration_dataloader(self):
        return loader()


@pytest.mark.parametrize("arguments", [{}, {"seen_classes": SEEN}], ids=["inferred", "given"])
@pytest.mark.parametrize(
    ("make", "data"), [(Plain, MixedDataWithClean), (WithClean, MixedData)], ids=["data", "module"]
)
def test_calibration_dataloader_replaces_mixed_labels(make, data, arguments, tmp_path):
    module, callback = pretrained(make), AbsentClassCalibration(**arguments)
    checkpoints = ModelCheckpoint(tmp_path)
    trainer_of(tmp_path, callback, checkpoints).fit(module, datamodule=data())
    assert_calibrated(module.state_dict(), make=make)
    assert_calibrated(read(checkpoints.best_model_path)["state_dict"], make=make)
    assert callback.result.num_samples == len(TRAIN)


class MixesInModel(Plain):
    def on_after_batch_transfer(self, batch, dataloader_idx):
        return mixup(list(zip(*batch, strict=True))) if self.training else batch


class MixesInTrainer(Plain):
    def on_after_batch_transfer(self, batch, dataloader_idx):
        return mixup(list(zip(*batch, strict=True))) if self.trainer.training else batch


@pytest.mark.parametrize("mixes", [MixesInModel, MixesInTrainer])
@pytest.mark.parametrize("max_epochs", [0, 2])
def test_transfer_hooks_do_not_mix_in_the_pass(mixes, max_epochs, tmp_path):
    class Module(mixes, WithClean):
        pass

    module = pretrained(Module)
    trainer_of(tmp_path, AbsentClassCalibration(), max_epochs=max_epochs).fit(module, loader())
    assert_calibrated(module.state_dict(), make=Module)


class Shifts(Plain):
    """Labels and inputs are what the hooks make of them."""

    def on_before_batch_transfer(self, batch, dataloader_idx):
        return batch[0], batch[1] - 10

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return batch[0] / 2, batch[1]


@pytest.mark.parametrize("max_epochs", [0, 2])
def test_transfer_hooks_apply_to_the_pass(max_epochs, tmp_path):
    dataset = torch.utils.data.TensorDataset(2 * TRAIN.tensors[0], TRAIN.tensors[1] + 10)
    module = pretrained(Shifts)
    trainer_of(tmp_path, AbsentClassCalibration(), max_epochs=max_epochs).fit(module, loader(dataset))
    assert_calibrated(module.state_dict(), make=Shifts)
