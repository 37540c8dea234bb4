"""Fits with one process or two, one of which meets a fault at a stage of the calibration, and keeps how each ends.

As in ``ddp_script``, the processes are forked, with the variables that ``torchrun`` sets.

Usage: python -m tests.faults.stages_script FOLDER
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.faults.ddp_script import PATIENCE, wait
from tests.faults.stages import Fault, fit
from tests.helpers.processes import free_port

RAISES = ("labels", "data_before_validation", "loader_of_the_model", "data_of_the_model", "loading_of_a_file", "report")
SIGNALS = {"killed": signal.SIGKILL, "terminated": signal.SIGTERM, "interrupted": signal.SIGINT}
# The stage, the process that meets the fault, how many there are, and what happens there.
FAULTS = [(stage, rank, 2, "raises") for stage in RAISES for rank in range(2)]
FAULTS += [
    (stage, *place, name)
    for stage in ("forward_of_the_model", "forward_of_a_file")
    for place in ((0, 1), (0, 2), (1, 2))
    for name in SIGNALS
]


def name_of(stage: str, rank: int, processes: int, what: str) -> str:
    return f"{stage}_{rank}_of_{processes}_{what}"


def action(what: str) -> Callable[[], Any]:
    def raises() -> None:
        raise OSError("the share is gone")

    return raises if what == "raises" else lambda: os.kill(os.getpid(), SIGNALS[what])


def start(folder: Path, stage: str, faulty: int | None, devices: int, what: str, rank: int, port: int) -> int:
    """Fork a process that writes what it tells into a file; return its id. Without ``faulty``, fit without callback."""
    child = os.fork()
    if child != 0:
        return child
    os.environ.update(LOCAL_RANK=str(rank), NODE_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    with open(f"{folder}_{rank}.log", "w") as file:
        status = 0
        try:
            warnings.simplefilter("ignore")
            fault = Fault(action(what) if faulty == rank else lambda: None)
            strategy = "ddp" if devices > 1 else "auto"
            fit(folder, stage, None if faulty is None else fault, strategy=strategy, devices=devices)
        except BaseException:
            traceback.print_exc(file=file)
            status = 1
        file.flush()
        os._exit(status)


def main(folder: Path) -> None:
    runs = [(name_of(*fault), *fault) for fault in FAULTS] + [("plain", "labels", None, 2, "raises")]
    for name, stage, faulty, devices, what in runs:
        port = free_port()
        children = [start(folder / name, stage, faulty, devices, what, rank, port) for rank in range(devices)]
        until = time.monotonic() + PATIENCE
        (folder / f"{name}.codes").write_text(" ".join(wait(child, until) for child in children))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
