"""Compare the ways to find gamma on recorded fine-tuning runs.

    python examples/benchmarks/estimators.py

``runs`` holds the logits of 32 fine-tuned classifiers, each ``{data}_{network}_{optimizer}_{% of classes
seen}_{seed}.npz``: of their fine-tuning samples and of held-out samples of the same classes, before and after
fine-tuning, and of test samples of all classes. The loss of a gamma is the best overall test accuracy that any gamma
has, less that of this one, in points. Test labels serve for nothing else.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lightning_calibft.functional import (
    average_logit_gap,
    best_gamma,
    calibrate_logits,
    pseudo_absent_gamma,
    split_accuracy,
)

RUNS = Path(__file__).with_name("runs")
Run = dict[str, Tensor]
DATA = {"digits": "digits", "glyphs": "157 glyphs"}
NETWORKS = {"gn": "CNN with GroupNorm", "bn": "CNN with BatchNorm", "resnet": "ResNet"}


def _alg(run: Run, part: str) -> float:
    return average_logit_gap(run[f"{part}_logits"], run[f"{part}_target"], run["seen_classes"]).item()


def _pseudo_absent(run: Run, part: str) -> float:
    before = run[f"pretrained_{part}_logits"]
    return pseudo_absent_gamma(run[f"{part}_logits"], run[f"{part}_target"], before, run["seen_classes"]).item()


ESTIMATORS: dict[str, Callable[[Run], float]] = {
    "gamma 0": lambda run: 0.0,
    "ALG": lambda run: _alg(run, "train"),
    "pseudo-absent": lambda run: _pseudo_absent(run, "train"),
    "ALG, held-out samples": lambda run: _alg(run, "heldout"),
    "pseudo-absent, held-out samples": lambda run: _pseudo_absent(run, "heldout"),
}


def main() -> None:
    print(page())


def page() -> str:
    """Return the tables as Markdown."""
    losses = {file.stem: _losses(file) for file in sorted(RUNS.glob("*.npz"))}
    rows: dict[str, list[dict[str, float]]] = defaultdict(list)
    for name, of_run in losses.items():
        data, network, _, percent, _ = name.split("_")
        rows[f"{DATA[data]}, {NETWORKS[network]}, {percent} % of the classes seen"].append(of_run)
    lines = [f"| loss in points, mean ± sd | runs | {' | '.join(ESTIMATORS)} |", "| :-- | --: |" + " --: |" * 5]
    for name, of_row in rows.items():
        cells = (_spread([of_run[kind] for of_run in of_row]) for kind in ESTIMATORS)
        lines.append(f"| {name} | {len(of_row)} | {' | '.join(cells)} |")
    lines.extend(_summary(rows, list(losses.values())))
    return "\n".join(lines)


def _losses(file: Path) -> dict[str, float]:
    with np.load(file) as arrays:
        run = {key: torch.from_numpy(arrays[key]) for key in arrays.files}
    run = {key: value.float() if value.is_floating_point() else value.long() for key, value in run.items()}
    logits, target, seen = run["test_logits"], run["test_target"], run["seen_classes"]

    def accuracy(gamma: float) -> float:
        return 100 * split_accuracy(calibrate_logits(logits, gamma, seen), target, seen).item()

    best = accuracy(best_gamma(logits, target, seen).item())
    return {kind: best - accuracy(estimate(run)) for kind, estimate in ESTIMATORS.items()}


def _summary(rows: dict[str, list[dict[str, float]]], losses: list[dict[str, float]]) -> Iterator[str]:
    means = {
        kind: [statistics.mean(of_run[kind] for of_run in of_row) for of_row in rows.values()] for kind in ESTIMATORS
    }
    yield "| mean of the rows | | " + " | ".join(f"{statistics.mean(values):.1f}" for values in means.values()) + " |"
    yield "| worst row | | " + " | ".join(f"{max(values):.1f}" for values in means.values()) + " |"
    worst = (max(of_run[kind] for of_run in losses) for kind in ESTIMATORS)
    yield "| worst run | | " + " | ".join(f"{loss:.1f}" for loss in worst) + " |"


def _spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


if __name__ == "__main__":
    main()
