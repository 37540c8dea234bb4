"""Fits in a child process, again and again, and kills each while it calibrates its kept checkpoints.

Usage: python -m tests.kill_script FOLDER KILLS
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn

from lightning_calibft import AbsentClassCalibration
from tests.runs import NUM_CLASSES, SEEN, Plain, loader, pretrained, trainer_of

FILES = 10


class Wide(Plain):
    """Half a megabyte a file, so that writing one takes a while."""

    def build(self, dropout):
        self.body = nn.Sequential(nn.Linear(5, 10_000), nn.ReLU())
        self.fc = nn.Linear(10_000, NUM_CLASSES)


class Begin(Callback):
    """Tells that the files are about to be calibrated."""

    def __init__(self, pipe: int) -> None:
        self.pipe = pipe

    def on_fit_end(self, trainer, pl_module):
        os.write(self.pipe, b".")


def fit(folder: Path, pipe: int) -> None:
    torch.manual_seed(0)
    checkpoint = ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=1, save_last="link")
    trainer = trainer_of(folder, Begin(pipe), AbsentClassCalibration(SEEN), checkpoint, max_steps=FILES)
    trainer.fit(pretrained(Wide), loader())


def fit_in_child(folder: Path, delay: float | None) -> float:
    """Fit, and return how long it took to calibrate the files; kill it ``delay`` seconds after that began."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        fit(folder, writing)
        os._exit(0)
    os.close(writing)
    os.read(reading, 1)
    begin = time.monotonic()
    if delay is not None:
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    os.close(reading)
    assert os.waitstatus_to_exitcode(status) in (0, -signal.SIGKILL)
    return time.monotonic() - begin


if __name__ == "__main__":
    folder, kills = Path(sys.argv[1]), int(sys.argv[2])
    random.seed(0)
    duration = min(fit_in_child(folder / f"whole_{index}", delay=None) for index in range(2))
    for index in range(kills):
        fit_in_child(folder / f"killed_{index}", duration * (index + random.random()) / kills)
