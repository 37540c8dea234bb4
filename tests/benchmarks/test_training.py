"""What the callback and the pass cost, against the same Trainer and the same loop without them."""

from __future__ import annotations

import time

import lightning.pytorch as pl
import pytest
import timm
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_calibft import AbsentClassCalibration, attach, calibrate
from tests.benchmarks.conftest import DEVICES

NUM_CLASSES = 20


class Classifier(pl.LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.cross_entropy(self(x), y)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("loss", nn.functional.cross_entropy(self(x), y))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-4)


class Stopwatch(pl.Callback):
    """Times what repeats: training steps or an evaluation loop, not what a run does once."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 10:
            self.start = time.perf_counter()

    def on_train_epoch_end(self, trainer, pl_module):
        self.seconds = time.perf_counter() - self.start

    def on_validation_start(self, trainer, pl_module):
        self.start = time.perf_counter()

    def on_validation_end(self, trainer, pl_module):
        self.seconds = time.perf_counter() - self.start


def loader(shape: tuple[int, ...], num_batches: int, batch_size: int, num_classes: int) -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(num_classes, (num_batches * batch_size,), generator=generator)
    inputs = torch.randn(len(target), *shape, generator=generator)
    return DataLoader(TensorDataset(inputs, target), batch_size)


def trainer(stopwatch: Stopwatch, callback: list[pl.Callback], device: str) -> pl.Trainer:
    return pl.Trainer(
        max_epochs=1,
        accelerator="gpu" if device == "cuda" else device,
        callbacks=[stopwatch, *callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def fit(module: Classifier, data: DataLoader, callback: list[pl.Callback], device: str) -> float:
    stopwatch = Stopwatch()
    trainer(stopwatch, callback, device).fit(module, data)
    return stopwatch.seconds


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("source", ["train", "training_steps"])
def test_training_step_of_resnet18(ratio, source, device):
    data, module = loader((3, 32, 32), 60, 32, 10), Classifier(timm.create_model("resnet18", num_classes=NUM_CLASSES))
    assert ratio(
        lambda: fit(module, data, [AbsentClassCalibration(list(range(10)), source=source)], device),
        lambda: fit(module, data, [], device),
        rounds=9,
        budget="1.01",
    )


@pytest.mark.parametrize("device", DEVICES)
def test_training_step_of_a_tiny_network(ratio, device):
    data, module = loader((16,), 2000, 8, 10), Classifier(nn.Linear(16, NUM_CLASSES))
    assert ratio(
        lambda: fit(module, data, [AbsentClassCalibration()], device),
        lambda: fit(module, data, [], device),
        rounds=9,
        budget="1.01",
    )


@pytest.mark.parametrize("device", DEVICES)
def test_validation_of_resnet18(ratio, device):
    data, module = loader((3, 64, 64), 20, 64, NUM_CLASSES), Classifier(timm.create_model("resnet18", num_classes=20))

    def validate(callback):
        stopwatch = Stopwatch()
        trainer(stopwatch, callback, device).validate(module, data, verbose=False)
        return stopwatch.seconds

    assert ratio(
        lambda: validate([AbsentClassCalibration(seen_classes=list(range(10)))]),
        lambda: validate([]),
        rounds=7,
        budget="1.03",
    )


@pytest.mark.parametrize("device", DEVICES)
def test_pass_over_resnet18(ratio, device):
    data = loader((3, 64, 64), 40, 64, 10)
    model = attach(timm.create_model("resnet18", num_classes=NUM_CLASSES)).to(device).eval()

    def bare():
        with torch.no_grad():
            for inputs, target in data:
                model(inputs.to(device)), target.to(device)

    assert ratio(lambda: calibrate(model, data, list(range(10)), progress=False), bare, rounds=5, budget="1.05")
