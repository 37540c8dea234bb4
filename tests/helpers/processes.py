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


def run_python(*words: Any, cwd: Path = ROOT, status: int = 0, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run Python with these words and environment variables, on one thread, and see that it ends with this status."""
    command, environment = [sys.executable, *map(str, words)], {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == status, done.stderr
    return done


def run_script(script: str, *arguments: Any) -> None:
    """Run a module of the tests in a process of its own."""
    run_python("-m", script, *arguments)


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


def record_writes() -> list[str]:
    """From now on, collect the paths of all files that this process writes, renames or removes."""
    paths: list[str] = []

    def audit(event: str, arguments: tuple) -> None:
        writes = event == "open" and set(str(arguments[1])) & set("wxa+")
        if writes or event in ("os.rename", "os.remove", "os.symlink"):
            paths.extend(map(str, arguments[:2]))

    sys.addaudithook(audit)
    return paths
