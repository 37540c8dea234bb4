"""Score the models of a benchmark, and print the scores of several seeds as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from methods import Setting
from torch import Tensor, nn

from lightning_calibft import ClassSplit
from lightning_calibft.estimators import make_estimator, needs_pretrained_logits
from lightning_calibft.functional import (
    ausuc,
    best_gamma,
    calibrate_logits,
    class_means,
    harmonic_mean_accuracy,
    nearest_class_mean_accuracy,
    split_accuracy,
)

Scores = dict[str, float]
Rows = dict[str, Scores]


@dataclass(frozen=True)
class Outputs:
    """What a model makes of the images, in float64.

    Args:
        test: Logits of the test images, ``(N, C)``.
        train: Logits of the fine-tuning images.
        held_out: Logits of the few other labeled images, of all classes.
        features: Features of the test images, ``(N, D)``.
        means: Class means ``(C, D)`` of the features of target training images of all classes.
    """

    test: Tensor
    train: Tensor
    held_out: Tensor
    features: Tensor
    means: Tensor


@torch.no_grad()
def run(module: nn.Module, setting: Setting) -> Outputs:
    """Run a module, which is in eval mode, over the images."""
    data = setting.data
    parts = (data.target_test, data.target_train, data.held_out)
    test, train, held_out = (
        torch.cat([module.backbone(images) for images in part.tensors[0].split(500)]) for part in parts
    )
    target = data.target_train.tensors[1]
    seen = torch.isin(target, torch.tensor(setting.seen))
    means = class_means(train.double(), target, setting.num_classes)
    logits = [module.head(features).double() for features in (test, train[seen], held_out)]
    return Outputs(*logits, test.double(), means)


def score(outputs: Outputs, setting: Setting, gamma: float = 0.0, cost: float = 1.0) -> Scores:
    """Score the test images with one gamma. ``Acc_S/Y``: samples of seen classes, predicted among all classes."""
    target, seen = setting.data.target_test.tensors[1], setting.seen
    logits = calibrate_logits(outputs.test, gamma, seen)
    ncm = outputs.features, target, outputs.means, seen
    fractions = {
        "Acc_Y/Y": split_accuracy(logits, target, seen),
        "Acc_S/Y": split_accuracy(logits, target, seen, samples="seen"),
        "Acc_U/Y": split_accuracy(logits, target, seen, samples="absent"),
        "Acc_S/S": split_accuracy(logits, target, seen, samples="seen", candidates="seen"),
        "Acc_U/U": split_accuracy(logits, target, seen, samples="absent", candidates="absent"),
        "AUSUC": ausuc(outputs.test, target, seen),
        "harmonic mean": harmonic_mean_accuracy(logits, target, seen),
        "NCM_S/Y": nearest_class_mean_accuracy(*ncm, samples="seen"),
        "NCM_U/Y": nearest_class_mean_accuracy(*ncm, samples="absent"),
    }
    return {**{name: 100 * value.item() for name, value in fractions.items()}, "gamma": gamma, "cost": cost}


def estimate(name: str, outputs: Outputs, before: Outputs, setting: Setting) -> float:
    """Gamma by one of the package's estimators: from the fine-tuning images, or from labeled held-out images."""
    estimator = make_estimator(name, ClassSplit(setting.num_classes, setting.seen))
    if name == "operating_point":
        estimator.update(outputs.held_out, setting.data.held_out.tensors[1])
    else:
        pretrained = (before.train,) if needs_pretrained_logits(name) else ()
        estimator.update(outputs.train, setting.seen_data.tensors[1], *pretrained)
    return estimator.compute().item()


def oracle(outputs: Outputs, setting: Setting) -> float:
    """Return the gamma that is best on the test images."""
    return best_gamma(outputs.test, setting.data.target_test.tensors[1], setting.seen).item()


def markdown(title: str, runs: Sequence[Rows]) -> Iterator[str]:
    """One line a row, one column a score: mean ± standard deviation over the runs."""
    columns = list(next(iter(runs[0].values())))
    yield f"| {title} | " + " | ".join(columns) + " |"
    yield "| :-- |" + " --: |" * len(columns)
    for name in runs[0]:
        yield f"| {name} | " + " | ".join(spread(runs, name, column) for column in columns) + " |"


def side_by_side(title: str, tables: dict[str, Sequence[Rows]], column: str) -> Iterator[str]:
    """One line a row, one column a table: the same score in all of them, and its mean over the tables."""
    yield f"| {title} | " + " | ".join(tables) + " | mean |"
    yield "| :-- |" + " --: |" * (len(tables) + 1)
    for name in next(iter(tables.values()))[0]:
        means = [statistics.mean(rows[name][column] for rows in runs) for runs in tables.values()]
        cells = [spread(runs, name, column) for runs in tables.values()]
        yield f"| {name} | " + " | ".join(cells) + f" | **{statistics.mean(means):.1f}** |"


def spread(runs: Sequence[Rows], row: str, column: str) -> str:
    """Format the mean and the standard deviation (0 for a single value)."""
    values = [rows[row][column] for rows in runs]
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    digits = 2 if column.startswith("gamma") else 1
    return f"{statistics.mean(values):.{digits}f} ± {deviation:.{digits}f}"
