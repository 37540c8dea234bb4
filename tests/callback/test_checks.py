"""Trainers that the callback refuses."""

from __future__ import annotations

import pytest
import pytorch_lightning
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn

from lightning_calibft import AbsentClassCalibration
from tests.runs import (
    Plain,
    loader,
    quiet,
    trainer_of,
)

pytestmark = quiet


def test_the_other_lightning(tmp_path):
    trainer = pytorch_lightning.Trainer(
        default_root_dir=tmp_path, accelerator="cpu", logger=False, callbacks=[AbsentClassCalibration()], max_epochs=1
    )

    class Module(pytorch_lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(5, 6)

        training_step = Plain.training_step
        configure_optimizers = Plain.configure_optimizers

    with pytest.raises(TypeError, match=r"a trainer of the package `lightning`, but got pytorch_lightning\."):
        trainer.fit(Module(), loader())


def test_sharded_weights_are_refused(tmp_path, monkeypatch):
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK", "WORLD_SIZE", "NODE_RANK"):
        monkeypatch.setenv(name, "0")  # so that they are put back
        monkeypatch.delenv(name)
    try:
        text = r"does not support ModelParallelStrategy, which shards .* call `lightning_calibft.calibrate\("
        with pytest.raises(RuntimeError, match=text):
            trainer_of(tmp_path, AbsentClassCalibration(), strategy=ModelParallelStrategy()).fit(Plain(), loader())
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
