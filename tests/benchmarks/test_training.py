"""What the callback and the pass cost, against the same Trainer and the same loop without them."""

from __future__ import annotations

from collections.abc import Callable

import lightning.pytorch as pl
import pytest
import timm
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_calibft import AbsentClassCalibration, CalibrationDiagnostics, attach, calibrate
from tests.benchmarks.conftest import DEVICES, clock
from tests.benchmarks.samples import bytes_at_most

NUM_CLASSES = 20
SKIPPED = 10  # training steps before the time starts


class Classifier(pl.LightningModule):
    """Stops the time itself: its hooks come after those of all callbacks."""

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

    def on_train_epoch_end(self):
        self.stopped = clock()

    def on_validation_end(self):
        self.stopped = clock()


class Start(pl.Callback):
    """Starts the time where something begins that repeats: after a few training steps, or with an evaluation."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == SKIPPED:
            self.time = clock()

    def on_validation_start(self, trainer, pl_module):
        self.time = clock()


def loader(shape: tuple[int, ...], num_batches: int, batch_size: int, num_classes: int) -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(num_classes, (num_batches * batch_size,), generator=generator)
    inputs = torch.randn(len(target), *shape, generator=generator)
    return DataLoader(TensorDataset(inputs, target), batch_size)


def run(
    what: str, module: Classifier, data: DataLoader, callbacks: list[pl.Callback], device: str, *val: DataLoader
) -> float:
    """Fit or validate and return the seconds between start and stop."""
    start = Start()
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="gpu" if device == "cuda" else device,
        callbacks=[start, *callbacks],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    getattr(trainer, what)(module, data, *val)
    return module.stopped - start.time


def resnet18(num_classes: int = NUM_CLASSES) -> Classifier:
    return Classifier(timm.create_model("resnet18", num_classes=num_classes))


@pytest.fixture
def callback(request, tmp_path):
    """A callback with its classes given, or without, when it reads the labels of each step."""
    name, _, how = request.param.partition(", ")
    options = {"output": str(tmp_path / "report.md")} if name == "CalibrationDiagnostics" else {}
    if how == "source=training_steps":
        options["source"] = "training_steps"
    kind = {"AbsentClassCalibration": AbsentClassCalibration, "CalibrationDiagnostics": CalibrationDiagnostics}[name]
    classes = [] if how == "classes not given" else [list(range(10))]
    return lambda: [kind(*classes, **options)]


EACH_WAY = [
    "AbsentClassCalibration",
    "AbsentClassCalibration, classes not given",
    "AbsentClassCalibration, source=training_steps",
    "CalibrationDiagnostics",
    "CalibrationDiagnostics, classes not given",
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("callback", EACH_WAY, indirect=True)
def test_training_step_of_resnet18(ratio, callback, device):
    """Training steps of resnet18 (32 images of 32 x 32), with a callback against without."""
    data, module = loader((3, 32, 32), 25, 32, 10), resnet18()
    ratio(
        lambda: run("fit", module, data, callback(), device),
        lambda: run("fit", module, data, [], device),
        rounds=8,
        budget="1.01",
    )


# At 1,000 steps a second, 1 % of a step; at more, 3 µs.
SMALL = {
    "two layers": (lambda: nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, NUM_CLASSES)), 256, 32, "10"),
    "one layer": (lambda: nn.Linear(16, NUM_CLASSES), 16, 8, "3"),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("callback", EACH_WAY, indirect=True)
@pytest.mark.parametrize("network", SMALL)
def test_training_step_of_a_small_network(own_share, network, callback, device):
    """Our own share of a training step of a small network: microseconds beyond a callback that does nothing."""
    make, features, batch_size, budget = SMALL[network]
    data, module = loader((features,), 1000, batch_size, 10), Classifier(make())
    own_share(
        lambda: run("fit", module, data, callback(), device),
        lambda: run("fit", module, data, [pl.Callback()], device),
        steps=1000 - SKIPPED,
        rounds=9,
        budget=budget,
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("callback", ["AbsentClassCalibration", "CalibrationDiagnostics"], indirect=True)
@pytest.mark.parametrize("num_classes", [20, 1000])
def test_validation_of_resnet18(ratio, callback, num_classes, device):
    """Validation of resnet18 (10 batches of 64 images of 32 x 32), with the metrics of a callback against without."""
    data, module = loader((3, 32, 32), 10, 64, num_classes), resnet18(num_classes)
    ratio(
        lambda: run("validate", module, data, callback(), device),
        lambda: run("validate", module, data, [], device),
        rounds=15,
        budget="1.03",
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("estimator", ["alg"])
@pytest.mark.parametrize("num_batches", [20, 100])
def test_pass_over_resnet18(ratio, num_batches, estimator, device):
    """The calibration pass (20 or 100 batches of 64 images of 32 x 32), against a bare loop in eval mode."""
    ours, bare = passes(num_batches, estimator, device)
    ratio(ours, bare, rounds=7, budget="1.05")


def passes(num_batches: int, estimator: str, device: str) -> tuple[Callable[[], None], Callable[[], None]]:
    """Return a calibration of resnet18 with 1000 classes, and the bare loop."""
    data = loader((3, 32, 32), num_batches, 64, 10)
    model = attach(resnet18(1000).net).to(device).eval()

    def bare() -> None:
        with torch.no_grad():
            for inputs, target in data:
                model(inputs.to(device)), target.to(device)

    def ours() -> None:
        calibrate(model, data, list(range(10)), absent_classes=range(10, 1000), estimator=estimator, progress=False)

    return ours, bare


@pytest.mark.parametrize("estimator", ["alg"])
def test_bytes_of_a_pass(report, tmp_path, estimator):
    """Most bytes allocated at once by the pass over 20 batches of 64 images of 32 x 32, against a bare loop."""
    ours, bare = passes(20, estimator, "cpu")
    ours(), bare()
    share = bytes_at_most(ours, tmp_path) / bytes_at_most(bare, tmp_path)
    report(f"{share:.3f}")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("max_samples", [128, 640])
def test_refresh(ratio, max_samples, device):
    """Validation of resnet18 in a fit (640 images), with gamma found before it from max_samples, against without."""
    train, val, module = loader((3, 32, 32), 20, 32, 10), loader((3, 32, 32), 10, 64, NUM_CLASSES), resnet18()

    def validation(**options) -> float:
        callback = AbsentClassCalibration(list(range(10)), calibrate_checkpoints=False, **options)
        return run("fit", module, train, [callback], device, val)

    ratio(lambda: validation(refresh_on_validation=True, max_samples=max_samples), validation, rounds=4, budget="none")
