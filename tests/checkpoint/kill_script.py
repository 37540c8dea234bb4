"""Fits, and calibrates the kept checkpoints in a child process, again and again, each of which is killed meanwhile.

Usage: python -m tests.checkpoint.kill_script FOLDER KILLS
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
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


class AtTheEnd(Callback):
    """Does something when the files are about to be calibrated."""

    def __init__(self, action: Callable[[], None]) -> None:
        self.action = action

    def on_fit_end(self, trainer, pl_module):
        self.action()


def fit(folder: Path, at_the_end: Callable[[], None]) -> None:
    torch.manual_seed(0)
    checkpoint = ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=1, save_last="link")
    callbacks = (AtTheEnd(at_the_end), AbsentClassCalibration(SEEN), checkpoint)
    trainer_of(folder, *callbacks, max_steps=FILES).fit(pretrained(Wide), loader())


def watch(process: int, folder: Path, kill_after: int | None = None, delay: float | None = None) -> float:
    """Wait until a process has calibrated the files, and return how long it took.

    Given a number of files, kill it when so many are calibrated and then ``delay`` seconds have passed, or, without
    one, when the next is being written. (Without a look at the files a busy machine would kill too early or late.)
    """
    before, begin = versions(folder.with_name("fitted")), time.monotonic()
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


def calibrate_in_children(folder: Path, kills: int) -> None:
    """Fork for each calibration of the files, which are put back each time; return in the children alone."""
    run, fitted, durations = folder / "run", folder / "fitted", []
    shutil.copytree(run, fitted, symlinks=True)
    for index in range(-2, kills):
        if (process := os.fork()) == 0:
            return
        if index < 0:
            durations.append(watch(process, run))
        else:
            delay = None if index % 2 else random.random() * min(durations) / FILES
            watch(process, run, index * FILES // kills, delay)
        run.rename(folder / (f"whole_{index + 2}" if index < 0 else f"killed_{index}"))
        shutil.copytree(fitted, run, symlinks=True)
    os._exit(0)


def versions(folder: Path) -> set[tuple[str, int]]:
    return {(file.name, file.stat().st_mtime_ns) for file in folder.glob("*.ckpt") if not file.is_symlink()}


if __name__ == "__main__":
    folder, kills = Path(sys.argv[1]), int(sys.argv[2])
    random.seed(0)
    fit(folder / "run", lambda: calibrate_in_children(folder, kills))
    os._exit(0)
