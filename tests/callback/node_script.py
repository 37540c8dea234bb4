"""The processes of two nodes, each with a folder of its own; started from outside, as a cluster does.

Usage: python -m tests.callback.node_script FOLDER DEVICES
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from lightning_calibft import AbsentClassCalibration, get_gamma
from tests.helpers.processes import as_started_by_torchrun, hand_over, record_writes
from tests.helpers.runs import trainer_of
from tests.helpers.scheduled_runs import TRAIN, VAL, Scheduled

NODES = 2


def fit(folder: Path, name: str, devices: int, nodes: int) -> dict:
    local = folder / f"node_{os.environ.get('NODE_RANK', 0)}" / name
    local.mkdir(parents=True, exist_ok=True)
    refresh = name == "refreshed"
    calibration, module = AbsentClassCalibration(refresh_on_validation=refresh), Scheduled()
    checkpoint = ModelCheckpoint(local, "{step}", save_top_k=-1, monitor="val_acc_all")
    strategy = "ddp" if devices * nodes > 1 else "auto"
    limits = {"max_epochs": -1, "max_steps": 6, "val_check_interval": 2, "check_val_every_n_epoch": None}
    trainer = trainer_of(local, calibration, checkpoint, devices=devices, num_nodes=nodes, strategy=strategy, **limits)
    trainer.fit(module, DataLoader(TRAIN, 16), DataLoader(VAL, 16))
    return {
        "place": [trainer.global_rank, trainer.world_size, trainer.node_rank, trainer.local_rank],
        "result": calibration.result.as_dict(),
        "files": {Path(file).name: result.as_dict() for file, result in calibration.checkpoint_results.items()},
        "live": get_gamma(module),
        "here": sorted(path.name for path in local.iterdir()),
    }


def hide(folder: Path) -> None:
    """From now on, no file below it can be opened by this process."""

    def audit(event: str, arguments: tuple) -> None:
        if event == "open" and str(arguments[0]).startswith(str(folder)):
            raise FileNotFoundError(arguments[0])

    sys.addaudithook(audit)


def run(folder: Path, devices: int, nodes: int = NODES) -> dict:
    return {name: fit(folder, name, devices, nodes) for name in ("end", "refreshed")}


def main(folder: Path, devices: int) -> None:
    written = record_writes()
    if int(os.environ["NODE_RANK"]) > 0:
        hide(folder / "node_0")  # as if it were on another machine
    outcome = run(folder, devices)
    outcome["written"] = [path for path in written if path.endswith(".ckpt")]
    hand_over(json.dumps(outcome), folder, outcome["end"]["place"][0], NODES * devices)


if __name__ == "__main__":
    folder, devices = Path(sys.argv[1]), int(sys.argv[2])
    as_started_by_torchrun(lambda: main(folder, devices), NODES * devices, devices)
