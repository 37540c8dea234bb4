"""A process that has imported the large packages, and forks for each run of Python that it is asked for.

It reads requests from its standard input, a line of JSON each, and answers each with the exit status of the run.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import runpy
import sys
from types import ModuleType

import timm  # noqa: F401
import torchmetrics  # noqa: F401

LONGEST = 500  # seconds


def run(words: list[str], folder: str, variables: dict[str, str], output: str, errors: str) -> None:
    """Do what ``python`` does with these words, in this folder, with these environment variables."""
    for number, file, flags in ((0, os.devnull, os.O_RDONLY), (1, output, os.O_WRONLY), (2, errors, os.O_WRONLY)):
        opened = os.open(file, flags)
        os.dup2(opened, number)
        os.close(opened)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(variables)
    if words[0] == "-m":
        sys.path[0], sys.argv = folder, words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif words[0] == "-c":
        sys.path[0], sys.argv = "", ["-c", *words[2:]]
        main = sys.modules["__main__"] = ModuleType("__main__")
        exec(compile(words[1], "<string>", "exec"), vars(main))
    else:
        sys.path[0], sys.argv = os.path.dirname(words[0]), words
        runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    for line in sys.stdin:
        process = multiprocessing.get_context("fork").Process(target=run, kwargs=json.loads(line))
        process.start()
        process.join(LONGEST)
        if process.is_alive():
            process.kill()
            process.join()
        sys.stdout.write(f"{process.exitcode}\n")
        sys.stdout.flush()
