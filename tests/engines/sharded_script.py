"""Fits modules whose weights are shared out among processes, and with one process the same ones whole.

Usage: python -m tests.engines.sharded_script FOLDER PROCESSES
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import DataLoader, Dataset, Subset

from lightning_calibft import AbsentClassCalibration, get_gamma
from tests.helpers.processes import as_started_by_torchrun, hand_over
from tests.helpers.runs import ABSENT, NUM_CLASSES, SEEN, blobs, trainer_of
from tests.helpers.scheduled_runs import TRAIN, VAL, Logged, numbers


def plain(logits):
    return logits.full_tensor() if isinstance(logits, DTensor) else logits


class Whole(LightningModule):
    """Its weights depend on the number of steps alone: they are the same for any number of processes."""

    def __init__(self) -> None:
        super().__init__()
        self.gaps: list[float] = []
        self.build()

    def build(self) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.body = nn.Sequential(nn.Linear(5, 8, dtype=torch.float64), nn.ReLU(), nn.Dropout(0.5))
            self.fc = nn.Linear(8, NUM_CLASSES, dtype=torch.float64)
            inputs, target = blobs([*range(NUM_CLASSES)], each=51).tensors
            optimizer = torch.optim.Adam(self.parameters(), lr=0.05)
            for _ in range(30):
                optimizer.zero_grad()
                nn.functional.cross_entropy(self.fc(self.body(inputs.double())), target).backward()
                optimizer.step()
        with torch.no_grad():
            self.fc.bias[ABSENT] -= 3

    def forward(self, x):
        return self.fc(self.body(x))

    def on_train_batch_start(self, batch, batch_idx):
        with torch.no_grad():
            self.fc.weight.mul_(1.2)
            self.fc.bias.mul_(1.3)

    def on_train_epoch_start(self):
        self.gaps = []

    def training_step(self, batch, batch_idx):
        logits = plain(self(batch[0]))
        for row, label in zip(logits.tolist(), batch[1].tolist(), strict=True):
            others, absent = [row[c] for c in SEEN if c != label], [row[c] for c in ABSENT]
            self.gaps.append(sum(others) / len(others) - sum(absent) / len(absent))
        return nn.functional.cross_entropy(logits, batch[1])

    def validation_step(self, batch, batch_idx):
        self(batch[0])

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0, momentum=0.9)  # without a state, Lightning cannot resume it


class Sharded(Whole):
    """With data parallelism, tensor parallelism, or both."""

    def configure_model(self) -> None:
        if isinstance(self.fc.weight, DTensor):  # it is called anew by each Trainer
            return
        data, tensor = self.device_mesh["data_parallel"], self.device_mesh["tensor_parallel"]
        if tensor.size() > 1:
            rows = data.size() == 1  # else the six rows would be divided by four
            body = ColwiseParallel(output_layouts=Replicate()) if rows else ColwiseParallel()
            fc = ColwiseParallel(use_local_output=False) if rows else RowwiseParallel()
            parallelize_module(self, tensor, {"body.0": body, "fc": fc})
        if data.size() > 1:
            for module in (self.body, self.fc, self):
                fully_shard(module, mesh=data)


class Late(Sharded):
    """Has no head until `configure_model`."""

    def build(self) -> None:
        """Later."""

    def configure_model(self) -> None:
        if not hasattr(self, "fc"):
            super().build()
        super().configure_model()


class Bad(Dataset):
    """Raises where only the last process reads."""

    def __len__(self):
        return 20

    def __getitem__(self, index):
        if index == 19:
            raise OSError("unreadable")
        return TRAIN[index]


class Clean(Sharded):
    """With data of its own to find gamma on."""

    data: Dataset

    def calibration_dataloader(self):
        return DataLoader(self.data, 4)


class WholeClean(Whole):
    calibration_dataloader = Clean.calibration_dataloader


def trainer_in(folder, calibration, *callbacks, devices, tensor=1, distributed=True, **kwargs):
    strategy = "auto"
    if devices > 1:
        strategy = ModelParallelStrategy(devices // tensor, tensor, save_distributed_checkpoint=distributed)
    arguments = {"max_epochs": -1, "max_steps": 6, "val_check_interval": 2, "check_val_every_n_epoch": None}
    arguments = {**arguments, "devices": devices, "strategy": strategy, **kwargs}
    return trainer_of(folder, calibration, *callbacks, **arguments)


def fit(folder: Path, name: str, devices: int, make=Sharded, tensor=1, distributed=True) -> dict:
    """Fit, then test two checkpoints and fit on from one, each in a new module."""
    make = make if devices > 1 else Whole
    options = {"devices": devices, "tensor": tensor, "distributed": distributed}
    best = ModelCheckpoint(folder / name, "best", monitor="val_acc_all", mode="max", save_weights_only=True)
    each = ModelCheckpoint(folder / name, "{step}", save_top_k=-1, monitor="val_gamma")
    calibration, logged, module = AbsentClassCalibration(refresh_on_validation=True), Logged(), make()
    trainer = trainer_in(folder, calibration, logged, best, each, **options)
    trainer.fit(module, DataLoader(TRAIN, 16), DataLoader(VAL, 16))
    outcome = {"first": told(calibration, module, logged, trainer)}

    for file in ("best.ckpt", "step=4.ckpt"):
        module = make()
        trainer = trainer_in(folder, AbsentClassCalibration(SEEN), **options)
        trainer.test(module, DataLoader(VAL, 16), ckpt_path=folder / name / file, verbose=False)
        outcome[file] = {"gamma": get_gamma(module), **numbers(trainer.callback_metrics)}

    calibration, logged, module = AbsentClassCalibration(refresh_on_validation=True), Logged(), make()
    start = AtStart()
    trainer = trainer_in(folder, calibration, logged, start, **options, max_steps=10)
    rest = Subset(TRAIN, [0, *range(2, 101)])  # without the only sample of a class
    trainer.fit(module, DataLoader(rest, 16), DataLoader(VAL, 16), ckpt_path=folder / name / "step=4.ckpt")
    outcome["resumed"] = {**told(calibration, module, logged, trainer), "at_start": start.gamma}
    return outcome


class AtStart(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if not hasattr(self, "gamma"):
            self.gamma = get_gamma(pl_module)


def told(calibration, module, logged, trainer) -> dict:
    buffers = [type(buffer).__name__ for buffer in module.fc.absent_class_calibration.buffers()]
    return {
        "rank": trainer.global_rank,
        "result": calibration.result.as_dict(),
        "classes": calibration.state_dict(),
        "live": get_gamma(module),
        "logged": logged.metrics,
        "gaps": module.gaps,
        "parts": [name for name, value in module.named_parameters() if isinstance(value, DTensor)],
        "buffers": buffers,
        "training": [name for name, part in module.named_modules() if part.training],
    }


def fit_once(folder: Path, devices: int, calibration, make=Sharded, tensor=1) -> dict:
    """Without files."""
    module, logged = (make if devices > 1 else Whole)(), Logged()
    torch.manual_seed(1)
    trainer = trainer_in(folder, calibration, logged, devices=devices, tensor=tensor)
    trainer.fit(module, DataLoader(TRAIN, 16), DataLoader(VAL, 16))
    return {**told(calibration, module, logged, trainer), "random": torch.rand(()).item()}


def fit_clean(folder: Path, devices: int, data: Dataset) -> dict | str:
    module, calibration = (Clean if devices > 1 else WholeClean)(), AbsentClassCalibration(SEEN)
    module.data = data
    trainer = trainer_in(folder, calibration, devices=devices, max_steps=1, val_check_interval=1)
    try:
        trainer.fit(module, DataLoader(TRAIN, 16))
    except (OSError, RuntimeError, ValueError) as error:
        return repr(error)
    return told(calibration, module, Logged(), trainer)


def spoilt() -> Dataset:
    data = [TRAIN[index] for index in range(21)]
    data[-2] = (data[-2][0] * torch.nan, data[-2][1])  # which not all processes read
    return data


def run(folder: Path, devices: int) -> dict:
    tensor = min(devices, 2)
    scenarios = {
        "sharded": lambda: fit(folder, "sharded", devices),
        "consolidated": lambda: fit(folder, "consolidated", devices, make=Late, distributed=False),
        "tensors": lambda: fit(folder, "tensors", devices, tensor=tensor),
        "live": lambda: fit_once(folder, devices, AbsentClassCalibration()),
        "some": lambda: fit_once(
            folder,
            devices,
            AbsentClassCalibration(SEEN, max_samples=50, estimator="alg", estimator_kwargs={"absent_share": 0.1}),
        ),
        "sure": lambda: fit_once(folder, devices, AbsentClassCalibration(SEEN, tolerance=1e-9), tensor=tensor),
        "validation": lambda: fit_once(
            folder, devices, AbsentClassCalibration(SEEN, source="validation", estimator="operating_point")
        ),
        "steps": lambda: fit_once(folder, devices, AbsentClassCalibration(SEEN, source="training_steps")),
        "steps_tensors": lambda: fit_once(
            folder, devices, AbsentClassCalibration(SEEN, source="training_steps"), tensor=tensor
        ),
        "one_sample": lambda: fit_clean(folder, devices, [TRAIN[0]]),
        "nan": lambda: fit_clean(folder, devices, spoilt()),
        "unreadable": lambda: fit_clean(folder, devices, Bad()),
    }
    few = ("sharded", "tensors", "live", "sure", "steps_tensors", "one_sample", "unreadable")
    return {name: scenario() for name, scenario in scenarios.items() if devices < 4 or name in few}


def main(folder: Path, devices: int) -> None:
    hand_over(json.dumps(run(folder, devices)), folder, int(os.environ.get("LOCAL_RANK", 0)), devices)


if __name__ == "__main__":
    folder, devices = Path(sys.argv[1]), int(sys.argv[2])
    as_started_by_torchrun(lambda: main(folder, devices), devices)
