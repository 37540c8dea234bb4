"""Why partial softmax fails on one of five seeds of the digits: the loss of its training tells.

    python examples/benchmarks/partial_softmax.py

Half of the classes are seen. Each seed is trained with SGD at the learning rate of the benchmark and at half of it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))

import lightning.pytorch as pl
from compare import before, prepare
from digits import FINE_TUNING, DigitSetting
from methods import Setting, fit, start
from table import estimate, run, score

LOSSES = {"all classes": False, "seen classes": True}


class LossRecorder(pl.Callback):
    """Keeps the loss of each step."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Read the loss."""
        self.losses.append(outputs["loss"].item())


def cells(setting: Setting, partial: bool) -> Iterator[float]:
    """Return the mean losses of the first and of the last epoch, and the scores of the model."""
    recorder = LossRecorder()
    module = start(setting, setting.seen if partial else None)
    fit(module, setting.seen_data, setting.epochs, setting.seed, callbacks=[recorder])
    steps = len(recorder.losses) // setting.epochs
    yield statistics.mean(recorder.losses[:steps])
    yield statistics.mean(recorder.losses[-steps:])
    outputs = run(module, setting)
    scores = score(outputs, setting)
    yield from (scores[column] for column in ("Acc_S/S", "Acc_U/U", "AUSUC", "Acc_Y/Y"))
    yield score(outputs, setting, estimate("pseudo_absent", outputs, before(setting), setting))["Acc_Y/Y"]


def lines(args: argparse.Namespace) -> Iterator[str]:
    """One line for each learning rate, loss and seed."""
    columns = "loss of the first epoch | of the last | Acc_S/S | Acc_U/U | AUSUC | Acc_Y/Y | + pseudo_absent"
    yield f"| learning rate | loss over | seed | {columns} |"
    yield "| --: | :-- |" + " --: |" * 8
    name, rate = FINE_TUNING["sgd"]
    for seed in range(args.seeds):
        setting = DigitSetting(seed, 50, name, rate, args.epochs)
        for factor in (1.0, 0.5):
            for loss, partial in LOSSES.items():
                values = [*cells(replace(setting, learning_rate=factor * rate), partial)]
                shown = [*(f"{value:.2f}" for value in values[:2]), *(f"{value:.1f}" for value in values[2:])]
                yield f"| {factor * rate:g} | {loss} | {seed} | {' | '.join(shown)} |"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="number of runs (default: 5)")
    parser.add_argument("--epochs", type=int, default=20, help="epochs of each training (default: 20)")
    args = parser.parse_args(arguments)
    prepare()
    for line in lines(args):
        print(line, flush=True)


if __name__ == "__main__":
    main()
