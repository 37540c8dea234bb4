"""Fits the same modules with one process or, started as a script, with several, and tells what came out on each.

Usage: python -m tests.callback.ddp_script FOLDER PROCESSES
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn
from torch.utils.data import (
    DataLoader,
    DistributedSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from lightning_calibft import AbsentClassCalibration, get_gamma
from tests.helpers.processes import hand_over
from tests.helpers.runs import ABSENT, NUM_CLASSES, SEEN, blobs, trainer_of

RARE = SEEN[-1]


def data(classes: list[int], size: int, each: int = 51) -> TensorDataset:
    """In float64: in float32 the last bits of a logit depend on the batch that the sample is in."""
    inputs, target = blobs(classes, each=each, seed=4).tensors
    return TensorDataset(inputs[:size].double(), target[:size])


VAL = data([*SEEN, *ABSENT], 40)
TRAIN = data(SEEN[:-1], 101)
TRAIN.tensors[1][1] = RARE  # the only sample of its class
SUBSET = [1, *range(0, 101, 3)]  # 35 samples
WEIGHTS = [float(index % 2 == 0 or index == 1) for index in range(101)]  # 52 samples


def centres() -> torch.Tensor:
    inputs, target = blobs([*range(NUM_CLASSES)], each=51).tensors
    return torch.stack([inputs[target == label].double().mean(0) for label in range(NUM_CLASSES)])


class Scheduled(LightningModule):
    """Its weights depend on the number of steps alone: they are the same for any number of processes."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Dropout(0.5))
        self.fc = nn.Linear(5, NUM_CLASSES, dtype=torch.float64)
        self.schedule(0)

    def schedule(self, step: int) -> None:
        """Nearest centres, with more and more noise, and less and less of the absent classes."""
        noise = torch.randn(NUM_CLASSES, 5, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        weight = centres() + 0.1 * step * noise
        with torch.no_grad():
            self.fc.weight.copy_(weight)
            self.fc.bias.copy_(-weight.square().sum(1) / 2)
            self.fc.bias[ABSENT] -= 2 + step

    def forward(self, x):
        return self.fc(self.body(x))

    def on_train_batch_start(self, batch, batch_idx):
        self.schedule(self.trainer.global_step)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self(batch[0])

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


class Logged(Callback):
    def __init__(self) -> None:
        self.metrics: dict[int, dict[str, float]] = {}

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            self.metrics[trainer.global_step] = numbers(trainer.callback_metrics)


def numbers(metrics):
    return {name: value.item() for name, value in metrics.items()}


def loaders(name: str, rank: int, world_size: int):
    """The data of a scenario, and what the Trainer must know of it."""
    if name in ("given", "refreshed"):
        return DataLoader(TRAIN, 16, shuffle=True), DataLoader(VAL, 16), {}
    if name == "inferred":  # sharded by the user: class RARE is on the second process only, which validates few of 40
        sampler = DistributedSampler(TRAIN, world_size, rank, shuffle=False)
        bounds = {1: [0, 40], 2: [0, 33, 40], 4: [0, 33, 38, 39, 40]}[world_size]
        val = Subset(VAL, range(bounds[rank], bounds[rank + 1]))
        return DataLoader(TRAIN, 16, sampler=sampler), DataLoader(val, 16), {"use_distributed_sampler": False}
    sampler = SubsetRandomSampler(SUBSET) if name == "subset" else WeightedRandomSampler(WEIGHTS, 101)
    return DataLoader(TRAIN, 16, sampler=sampler), DataLoader(VAL, 16), {}


def fit(folder: Path, name: str, devices: int) -> dict:
    rank = int(os.environ.get("LOCAL_RANK", 0)) if devices > 1 else 0
    torch.manual_seed(rank)  # samplers of the user draw other samples in each process
    train, val, arguments = loaders(name, rank, devices)
    refresh = "validation" if name == "refreshed" else None
    calibration = AbsentClassCalibration(SEEN if name == "given" else None, refresh=refresh)
    logged, module = Logged(), Scheduled()
    checkpoints = [
        ModelCheckpoint(folder / name, "best", monitor="val_acc", mode="max"),
        ModelCheckpoint(folder / name, "{step}", save_top_k=-1, every_n_train_steps=2, save_last="link"),
    ]
    trainer = trainer_of(
        folder,
        calibration,
        logged,
        *checkpoints,
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        max_epochs=-1,
        max_steps=6,
        val_check_interval=2,
        check_val_every_n_epoch=None,
        **arguments,
    )
    trainer.fit(module, train, val)
    state = {key: value.tolist() for key, value in module.state_dict().items()}
    training = [name for name, part in module.named_modules() if part.training]
    trainer.test(module, val, ckpt_path="best", verbose=False)
    return {
        "rank": trainer.global_rank,
        "world_size": trainer.world_size,
        "result": calibration.result.as_dict(),
        "files": {Path(file).name: result.as_dict() for file, result in calibration.checkpoint_results.items()},
        "classes": calibration.state_dict(),
        "logged": logged.metrics,
        "test": numbers(trainer.callback_metrics),
        "gamma_after_test": get_gamma(module),
        "state": state,
        "training": training,
    }


class Watched(Scheduled):
    """Keeps the gaps of the samples that this process' steps saw in the last epoch."""

    def on_train_epoch_start(self):
        self.gaps = []

    def training_step(self, batch, batch_idx):
        logits = self(batch[0])
        for row, label in zip(logits.tolist(), batch[1].tolist(), strict=True):
            others, absent = [row[c] for c in SEEN if c != label], [row[c] for c in ABSENT]
            self.gaps.append(sum(others) / len(others) - sum(absent) / len(absent))
        return nn.functional.cross_entropy(logits, batch[1])


def fit_steps(folder: Path, devices: int) -> dict:
    """With gamma of the training steps, half of which each process makes."""
    module, calibration = Watched(), AbsentClassCalibration(SEEN, source="training_steps")
    strategy = "ddp" if devices > 1 else "auto"
    trainer = trainer_of(folder, calibration, devices=devices, strategy=strategy, max_epochs=2)
    trainer.fit(module, DataLoader(TRAIN, 16, shuffle=True), DataLoader(VAL, 16))
    return {"result": calibration.result.as_dict(), "gaps": module.gaps, "live": get_gamma(module)}


class OneSample(Scheduled):
    """Gamma is found on one sample, so that all processes but the first have none."""

    def calibration_dataloader(self):
        return DataLoader(Subset(TRAIN, [0]), 4)


def fit_one_sample(folder: Path, devices: int) -> dict:
    module, calibration = OneSample(), AbsentClassCalibration(SEEN)
    checkpoint = ModelCheckpoint(folder / "one_sample", "{step}", every_n_train_steps=3)
    strategy = "ddp" if devices > 1 else "auto"
    trainer = trainer_of(
        folder, calibration, checkpoint, devices=devices, strategy=strategy, max_epochs=-1, max_steps=3
    )
    trainer.fit(module, DataLoader(TRAIN, 16), DataLoader(VAL, 16))
    files = [result.gamma for result in calibration.checkpoint_results.values()]
    return {"gamma": calibration.result.gamma, "files": files, "samples": calibration.result.num_samples}


def run(folder: Path, devices: int) -> dict:
    """Fit all, and return what came out in this process."""
    outcomes = {name: fit(folder, name, devices) for name in ("given", "inferred", "refreshed", "subset", "weighted")}
    return {**outcomes, "steps": fit_steps(folder, devices), "one_sample": fit_one_sample(folder, devices)}


def record_writes() -> list[str]:
    """From now on, collect the paths of all files that this process writes, renames or removes."""
    paths: list[str] = []

    def audit(event: str, arguments: tuple) -> None:
        writes = event == "open" and set(str(arguments[1])) & set("wxa+")
        if writes or event in ("os.rename", "os.remove", "os.symlink"):
            paths.extend(map(str, arguments[:2]))

    sys.addaudithook(audit)
    return paths


if __name__ == "__main__":
    folder, devices = Path(sys.argv[1]), int(sys.argv[2])
    written = record_writes()
    outcome = run(folder, devices)
    outcome["written"] = [path for path in written if str(folder) in path]
    hand_over(json.dumps(outcome), folder, outcome["given"]["rank"], devices)
