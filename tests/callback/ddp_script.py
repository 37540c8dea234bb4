"""Fits the same modules with one process or, started as a script, with several, and tells what came out on each.

Usage: python -m tests.callback.ddp_script FOLDER PROCESSES
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import (
    DataLoader,
    Subset,
)

from lightning_calibft import AbsentClassCalibration, get_gamma
from tests.helpers.processes import as_started_by_torchrun, hand_over, record_writes
from tests.helpers.runs import SEEN, trainer_of
from tests.helpers.scheduled_runs import TRAIN, VAL, Logged, Scheduled, Watched, loaders, numbers


def fit(folder: Path, name: str, devices: int) -> dict:
    rank = int(os.environ.get("LOCAL_RANK", 0)) if devices > 1 else 0
    torch.manual_seed(rank)  # samplers of the user draw other samples in each process
    train, val, arguments = loaders(name, rank, devices)
    refresh = name == "refreshed"
    calibration = AbsentClassCalibration(SEEN if name == "given" else None, refresh_on_validation=refresh)
    logged, module = Logged(), Scheduled()
    checkpoints = [
        ModelCheckpoint(folder / name, "best", monitor="val_acc_all", mode="max"),
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


def main(folder: Path, devices: int) -> None:
    written = record_writes()
    outcome = run(folder, devices)
    outcome["written"] = [path for path in written if str(folder) in path]
    hand_over(json.dumps(outcome), folder, outcome["given"]["rank"], devices)


if __name__ == "__main__":
    folder, devices = Path(sys.argv[1]), int(sys.argv[2])
    if devices > 2:  # two are started by Lightning, which takes Python and all imports anew for each
        as_started_by_torchrun(lambda: main(folder, devices), devices)
    else:
        main(folder, devices)
