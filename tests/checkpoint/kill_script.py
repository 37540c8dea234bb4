"""Fits in a child process, again and again, and kills each while it calibrates its kept checkpoints.

Usage: python -m tests.checkpoint.kill_script FOLDER KILLS
"""

from __future__ import annotations

import os
import random
import signal
import socket
import sys
import time
from pathlib import Path

import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn

from lightning_calibft import AbsentClassCalibration
from tests.helpers.runs import NUM_CLASSES, SEEN, Plain, loader, pretrained, trainer_of

FILES = 10
STEP = 0.0002  # seconds from one look at the files to the next


class Wide(Plain):
    """Half a megabyte a file, so that writing one takes a while."""

    def build(self, dropout):
        self.body = nn.Sequential(nn.Linear(5, 10_000), nn.ReLU())
        self.fc = nn.Linear(10_000, NUM_CLASSES)


class Begin(Callback):
    """Tells that the files are about to be calibrated, and waits until the other side knows them."""

    def __init__(self, other: socket.socket) -> None:
        self.other = other

    def on_fit_end(self, trainer, pl_module):
        self.other.send(b".")
        self.other.recv(1)


def fit(folder: Path, parent: socket.socket) -> None:
    torch.manual_seed(0)
    checkpoint = ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=1, save_last="link")
    trainer = trainer_of(folder, Begin(parent), AbsentClassCalibration(SEEN), checkpoint, max_steps=FILES)
    trainer.fit(pretrained(Wide), loader())


def fit_in_child(folder: Path, kill_after: int | None = None, delay: float | None = None) -> float:
    """Fit, and return how long it took to calibrate the files.

    Given a number of files, kill it when so many are calibrated and then ``delay`` seconds have passed, or, without
    one, when the next is being written. (Without a look at the files a busy machine would kill too early or late.)
    """
    parent, child = socket.socketpair()
    process = os.fork()
    if process == 0:
        fit(folder, parent)
        os._exit(0)
    parent.close()
    child.recv(1)
    before = versions(folder)
    begin = time.monotonic()
    child.send(b".")
    if kill_after is not None:
        while len(versions(folder) - before) < kill_after:
            time.sleep(STEP)
        while delay is None and not list(folder.glob(".*.tmp")) and len(versions(folder) - before) < FILES:
            time.sleep(STEP)
        time.sleep(delay or 0)
        os.kill(process, signal.SIGKILL)
    _, status = os.waitpid(process, 0)
    assert os.waitstatus_to_exitcode(status) in (0, -signal.SIGKILL)
    return time.monotonic() - begin


def versions(folder: Path) -> set[tuple[str, int]]:
    return {(file.name, file.stat().st_mtime_ns) for file in folder.glob("*.ckpt") if not file.is_symlink()}


if __name__ == "__main__":
    folder, kills = Path(sys.argv[1]), int(sys.argv[2])
    random.seed(0)
    duration = min(fit_in_child(folder / f"whole_{index}") for index in range(2)) / FILES
    for index in range(kills):
        delay = None if index % 2 else random.random() * duration
        fit_in_child(folder / f"killed_{index}", index * FILES // kills, delay)
