"""Fits in processes that Lightning spawns or forks, and tells what is left in the one in which the user's code runs.

Usage: python -m tests.callback.spawn_script FOLDER
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from lightning_calibft import AbsentClassCalibration, attach, get_gamma
from tests.helpers.runs import trainer_of
from tests.helpers.scheduled_runs import TRAIN, VAL, Scheduled

METHODS = ("ddp_notebook", "ddp_spawn")  # to fork, and to spawn


def trainer_in(folder: Path, method: str, checkpoint: ModelCheckpoint) -> Trainer:
    calibration = AbsentClassCalibration(refresh_on_validation=method == "ddp_spawn")
    os.environ.pop("MASTER_PORT", None)  # that of the Trainer before, which may still be taken
    return trainer_of(folder, calibration, checkpoint, devices=2, strategy=method, max_epochs=2)


def fit(folder: Path, method: str) -> dict:
    checkpoint, module = ModelCheckpoint(folder / method, "{epoch}", monitor="val_acc_all", save_top_k=2), Scheduled()
    trainer = trainer_in(folder, method, checkpoint)
    trainer.fit(attach(module), DataLoader(TRAIN, 16), DataLoader(VAL, 16))
    outcome = {
        "state": {key: value.clone() for key, value in module.state_dict().items()},
        "metrics": {key: value.item() for key, value in trainer.callback_metrics.items()},
        "best": trainer.checkpoint_callback.best_model_path,
    }
    if method == "ddp_notebook":  # to spawn takes long
        (outcome["test"],) = trainer.test(module, DataLoader(VAL, 16), ckpt_path="best", verbose=False)
    return {**outcome, "live": get_gamma(module)}


def refused(folder: Path) -> str:
    try:
        trainer_in(folder, "ddp_notebook", ModelCheckpoint(folder)).fit(Scheduled(), DataLoader(TRAIN, 16))
    except Exception as raised:  # of another type than in the process where it was raised
        return str(raised)
    return "nothing"


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    outcomes = {"refused": refused(folder), **{method: fit(folder, method) for method in METHODS}}
    torch.save(outcomes, folder / "outcomes.pt")
