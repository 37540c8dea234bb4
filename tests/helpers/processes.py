"""How the processes of a group are started, and how one hands over its results and leaves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]


def run_script(script: str, *arguments: Any) -> None:
    """Run a module of the tests in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", script, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr


def outcomes(script: str, folder: Path, processes: int) -> list[Any]:
    """Run a script that starts so many processes, and return what each has handed over, as JSON."""
    run_script(script, folder, processes)
    return [json.loads(torch.load(folder / f"{rank}.pt")) for rank in range(processes)]


def hand_over(results: Any, folder: Path, rank: int, world_size: int = 2) -> None:
    """Save the results as ``{rank}.pt``, wait for those of the others, and end the process on the spot.

    Taking a gloo group down can hang or abort in torch where one process is ahead of the other; no test is about that.
    """
    partial = folder / f"{rank}.part"
    torch.save(results, partial)
    partial.rename(folder / f"{rank}.pt")
    for _ in range(600):
        if all((folder / f"{other}.pt").exists() for other in range(world_size)):
            break
        time.sleep(0.05)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
