"""Fits with two processes that differ in what they meet, and tells what came out on each.

Usage: python -m tests.callback.decisions_script FOLDER PROCESSES
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import TensorDataset

from lightning_calibft import AbsentClassCalibration, get_gamma, inspect_checkpoint
from tests.helpers.processes import as_started_by_torchrun, hand_over
from tests.helpers.runs import SEEN, VAL, Plain, blobs, loader, trainer_of


class Normalized(Plain):
    """Running statistics of BatchNorm are those of each process's own samples."""

    def build(self, dropout: float) -> None:
        super().build(dropout)
        self.body = nn.Sequential(self.body, nn.BatchNorm1d(16), nn.Dropout(0.3))


class FailsToLoadOnce(Plain):
    """On the second process, weights that are not its own cannot be loaded the first time."""

    failed = False

    def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        ended = self.trainer.state.fn == "fit" and self.trainer.fit_loop.done
        other = not torch.equal(state_dict["fc.weight"], self.fc.weight)
        if ended and other and not self.failed and self.trainer.global_rank == 1:
            self.failed = True
            raise torch.OutOfMemoryError("out of memory")
        return super().load_state_dict(state_dict, *args, **kwargs)


class HasNoTraffic(Plain):
    """On the second process, the unlabeled samples cannot be opened."""

    def unlabeled_dataloader(self) -> Any:
        if self.trainer.global_rank == 1:
            raise RuntimeError("no such camera")
        return [torch.randn(8, 5)]


def fit(folder: Path, module: Plain, validation: bool, estimator: str = "alg", **options: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    callback, checkpoints = (
        AbsentClassCalibration(estimator=estimator, source="train"),
        ModelCheckpoint(folder, "{epoch}", save_top_k=-1),
    )
    trainer = trainer_of(folder, callback, checkpoints, devices=2, strategy="ddp", **{"max_epochs": 2, **options})
    error = None
    try:
        trainer.fit(module, loader(blobs(SEEN, each=14)), loader(VAL, shuffle=False) if validation else None)
    except RuntimeError as raised:
        error = str(raised)
    gammas = {path.name: inspect_checkpoint(path).get("gamma") for path in sorted(folder.glob("*.ckpt"))}
    return {"gamma": get_gamma(module), "files": gammas, "error": error, "rank": trainer.global_rank}


class Splits(Callback):
    """Keeps the seen classes of each validation."""

    def __init__(self, calibration: AbsentClassCalibration) -> None:
        self.calibration, self.met = calibration, []

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            self.met.append(self.calibration._monitor.split.seen_classes)


def splits(folder: Path) -> list[list[int]]:
    """Fit with data of some other classes on each process, which only one of them meets first."""
    calibration = AbsentClassCalibration()
    spy, rank = Splits(calibration), int(os.environ.get("LOCAL_RANK", 0))
    x, y = blobs(SEEN[1:] if rank else SEEN[:2], each=16).tensors
    order = y.argsort()
    options = {"max_epochs": 1, "val_check_interval": 1, "use_distributed_sampler": False}
    trainer = trainer_of(folder, spy, calibration, devices=2, strategy="ddp", **options)
    trainer.fit(Plain(), loader(TensorDataset(x[order], y[order]), shuffle=False), loader(VAL, shuffle=False))
    return spy.met


def main(folder: Path) -> None:
    results = {
        "splits": splits(folder / "splits"),
        "no_validation": fit(folder / "no_validation", Normalized(), validation=False),
        "stopped_in_an_epoch": fit(folder / "stopped", Normalized(), validation=True, max_steps=3, max_epochs=None),
        "no_traffic_on_one": fit(folder / "traffic", HasNoTraffic(), validation=False, estimator="pseudo_absent"),
        "loading_fails_on_one": fit(folder / "loading", FailsToLoadOnce(), validation=False),
    }
    hand_over(json.dumps(results), folder, int(os.environ.get("LOCAL_RANK", 0)))


if __name__ == "__main__":
    as_started_by_torchrun(lambda: main(Path(sys.argv[1])), int(sys.argv[2]))
