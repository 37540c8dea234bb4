"""Fits with two processes, one of which meets a fault, and keeps what each tells and how it ends.

The processes are forked, so that Python need not start anew, with the variables that ``torchrun`` sets: Lightning's own
launcher, which kills all when one has ended, does not come before what the processes do themselves.

Usage: python -m tests.faults.ddp_script FOLDER
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
import warnings
from pathlib import Path

import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_calibft import AbsentClassCalibration
from tests.faults.checks import Armed, Arms, assert_sound, die, faulty
from tests.faults.kill_script import Kills
from tests.helpers.processes import free_port
from tests.helpers.runs import SEEN, loader, trainer_of

# The process, the place, and what happens there.
FAULTS = {
    "second_dies": (1, "model", die),
    "first_dies": (0, "before_replace", die),
    "second_raises": (1, "file", OSError),
    "second_raises_while_training": (1, "validation", ValueError),
}
PATIENCE = 120  # seconds: who has not ended by then, hangs


def run(folder: Path, fault: str, rank: int) -> None:
    faulty_rank, place, action = FAULTS[fault]
    torch.manual_seed(0)
    data = Armed()

    def meet_fault() -> None:
        data.armed = False  # the next pass over the same data is fine
        if action is die:
            die()
        raise action("the share is gone")

    data.fault = meet_fault
    mine = place if rank == faulty_rank else "nowhere"
    checkpoints = ModelCheckpoint(folder, "{epoch}", save_top_k=-1)
    refresh = place == "validation"
    callbacks = [
        AbsentClassCalibration(SEEN, refresh_on_validation=refresh),
        checkpoints,
        Arms(data, mine),
        Kills(folder, mine),
    ]
    module, validation = faulty(data), loader(shuffle=False) if refresh else None
    try:
        trainer_of(folder, *callbacks, max_epochs=3, strategy="ddp", devices=2).fit(module, loader(), validation)
    except RuntimeError:
        assert_sound(module, is_calibrated=place != "model")
        raise


def start(folder: Path, fault: str, rank: int, port: int) -> int:
    """Fork a process that writes what it tells into a file; return its id."""
    child = os.fork()
    if child != 0:
        return child
    os.environ.update(LOCAL_RANK=str(rank), NODE_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    with open(folder / f"{fault}_{rank}.log", "w") as file:
        try:
            with warnings.catch_warnings(record=True) as met:
                warnings.simplefilter("always")
                run(folder / fault, fault, rank)
            file.writelines(f"{warning.message}\n" for warning in met)
            file.flush()
            os._exit(0)
        except BaseException:
            traceback.print_exc(file=file)
            file.flush()
            os._exit(1)


def wait(child: int, until: float) -> str:
    """Return the exit code of a process, or that it had to be killed."""
    while time.monotonic() < until:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return str(os.waitstatus_to_exitcode(status))
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "hangs"


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    for fault in FAULTS:
        port = free_port()
        children = [start(folder, fault, rank, port) for rank in range(2)]
        until = time.monotonic() + PATIENCE
        (folder / f"{fault}.codes").write_text(" ".join(wait(child, until) for child in children))
