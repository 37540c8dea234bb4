"""Fits in child processes, each of which kills itself at a place of its own, or is killed there.

Usage: python -m tests.faults.kill_script FOLDER
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from lightning_calibft import AbsentClassCalibration
from tests.faults.checks import Armed, Arms, die, faulty
from tests.helpers.runs import SEEN, VAL, loader, trainer_of

# The place, and what has been done in the folder by then: calibrated files of three, and hidden files.
PLACES = {
    "training": ([False, False], 0),
    "pass_of_a_validation": ([True], 0),
    "pass_of_the_model": ([False, False, False], 0),
    "pass_of_a_file": ([False, False, False], 0),
    "between_two_writes": ([True, False, False], 0),
    "before_replace": ([True, False, False], 1),
    "after_replace": ([True, True, False], 0),
}


def die_at_the_second(event: str, matches: Callable[[str], bool]) -> None:
    """End this process when it is about to do something to a file for the second time."""
    met = 0

    def audit(name: str, arguments: tuple) -> None:
        nonlocal met
        if name == event and matches(str(arguments[0])):
            met += 1
            if met == 2:
                die()

    sys.addaudithook(audit)


class Kills(Callback):
    def __init__(self, folder: Path, place: str) -> None:
        self.folder = str(folder)
        self.place = place

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if self.place == "training" and trainer.current_epoch == 2 and batch_idx == 1:
            die()

    def on_fit_end(self, trainer, pl_module):
        if self.place == "between_two_writes":
            die_at_the_second("open", lambda path: path.endswith(".tmp"))
        if self.place == "before_replace":
            die_at_the_second("os.rename", lambda path: path.endswith(".tmp"))
        if self.place == "after_replace":
            die_at_the_second("open", lambda path: path == self.folder)  # to bring the renaming to the disk


def run(folder: Path, place: str, **options) -> None:
    torch.manual_seed(0)
    data = Armed(die)
    passes = {"pass_of_a_validation": "validation", "pass_of_the_model": "model", "pass_of_a_file": "file"}
    arms = Arms(data, passes.get(place, "nowhere"))
    refresh = "validation" in place
    validation = loader(VAL, shuffle=False) if refresh else None
    checkpoints = ModelCheckpoint(folder, "{epoch}", save_top_k=-1)
    callbacks = [AbsentClassCalibration(SEEN, refresh_on_validation=refresh), checkpoints, arms, Kills(folder, place)]
    trainer_of(folder, *callbacks, max_epochs=3, **options).fit(faulty(data), loader(), validation)


if __name__ == "__main__":
    for place in PLACES:
        child = os.fork()  # so that Python need not start anew
        if child == 0:
            run(Path(sys.argv[1], place), place)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL, place
