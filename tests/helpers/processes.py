"""How the processes of a group are started, and how one hands over its results and leaves."""

from __future__ import annotations

import functools
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

ROOT = Path(__file__).parents[2]
# By these variables Lightning and torch tell a process its place in a group.
OF_A_GROUP = ("MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK", "WORLD_SIZE", "NODE_RANK")


def run_python(*words: Any, cwd: Path = ROOT, status: int = 0, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run Python with these words and environment variables, on one thread, and see that it ends with this status.

    Most scripts take less time than to import what they use. So it is forked from a process that has imported the large
    packages, and nothing else: neither this one, nor a package of Lightning.
    """
    # What a fit with several processes has left in this one would make the new process wait for others.
    inherited = {name: value for name, value in os.environ.items() if name not in OF_A_GROUP}
    environment = {**inherited, "OMP_NUM_THREADS": "1", **variables}
    words = tuple(map(str, words))
    if not hasattr(os, "fork"):
        command = [sys.executable, *words]
        done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=500)
    else:
        with tempfile.NamedTemporaryFile("r") as output, tempfile.NamedTemporaryFile("r") as errors:
            files = {"output": output.name, "errors": errors.name}
            server = _python_server()
            request = json.dumps({"words": words, "folder": str(cwd), "variables": environment, **files})
            print(request, file=server.stdin, flush=True)
            done = subprocess.CompletedProcess(words, int(server.stdout.readline()), output.read(), errors.read())
    assert done.returncode == status, done.stderr
    return done


@functools.cache
def _python_server() -> subprocess.Popen[str]:
    """Start it once for all tests of this process; when this one ends, so does its input, and with it the server."""
    inherited = {name: value for name, value in os.environ.items() if name not in OF_A_GROUP}
    return subprocess.Popen(
        [sys.executable, "-m", "tests.helpers.python_server"],
        cwd=ROOT,
        env={**inherited, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def run_script(script: str, *arguments: Any) -> None:
    """Run a module of the tests in a process of its own."""
    run_python("-m", script, *arguments)


def outcomes(script: str, folder: Path, processes: int) -> list[Any]:
    """Run a script that starts so many processes, and return what each has handed over, as JSON."""
    run_script(script, folder, processes)
    return [json.loads(torch.load(folder / f"{rank}.pt")) for rank in range(processes)]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def fork(work: Callable[[int], object], processes: int) -> None:
    """Call a function with each rank, in processes forked from this one, so that nothing is imported anew."""
    children = []
    for rank in range(processes):
        child = os.fork()
        if child == 0:
            try:
                work(rank)
            except BaseException:
                traceback.print_exc()
                sys.stderr.flush()
                os._exit(1)
            os._exit(0)
        children.append(child)
    failed = [rank for rank, child in enumerate(children) if os.waitpid(child, 0)[1]]
    assert not failed, f"processes {failed} have failed: see what they have written"


def in_group(work: Callable[[], Any], folder: Path) -> list[Any]:
    """Call a function in each of two processes of a group, and return what it returned in each."""
    if not hasattr(os, "fork"):
        pytest.skip("forks")

    def join(rank: int) -> None:
        torch.set_num_threads(1)
        store, patience = f"file://{folder}/store", timedelta(minutes=2)  # else code that is wrong hangs
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=patience)
        hand_over(work(), folder, rank)

    fork(join, 2)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def as_started_by_torchrun(work: Callable[[], object], processes: int, devices: int | None = None) -> None:
    """Call a function in so many processes, ``devices`` on each node, with the variables that torchrun sets."""
    port, devices = free_port(), devices or processes

    def start(rank: int) -> None:
        node, local = divmod(rank, devices)
        os.environ.update(NODE_RANK=str(node), LOCAL_RANK=str(local), WORLD_SIZE=str(processes))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        work()

    fork(start, processes)


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
