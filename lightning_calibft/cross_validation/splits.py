"""The splits of pseudo cross-validation, and gamma from the models trained on them."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import nn
from torchmetrics import MetricCollection
from torchmetrics.utilities.prints import rank_zero_warn

from lightning_calibft._arguments import check_absent_share, check_choice, check_integer, check_path
from lightning_calibft._format import StrPath
from lightning_calibft.calibration.evaluation_pass import EvaluationPass
from lightning_calibft.calibration.result import CalibrationResult
from lightning_calibft.cross_validation.split_store import SplitStore, digest
from lightning_calibft.estimators import OperatingPoint
from lightning_calibft.functional.seen_unseen_curve import UnreachableAccuracyError
from lightning_calibft.metrics import SeenUnseenCurve
from lightning_calibft.split import ClassSplit

_MOST_SPLITS, _MOST_SEED = 1000, 2**32 - 1  # each split is a training; numpy takes no larger seed

Candidates = Literal["seen", "all"]


@dataclass(frozen=True)
class CrossValidationPlan:
    """How to cross-validate; see :func:`pseudo_cross_validation` for the fields.

    Raises:
        TypeError: If ``num_splits`` or ``seed`` is not an integer, ``folder`` is not a path, or ``absent_share`` is not
            a number.
        ValueError: If ``num_splits``, ``seed`` or ``absent_share`` is out of range, or ``candidates`` is neither
            ``"seen"`` nor ``"all"``.
    """

    num_splits: int = 3
    candidates: Candidates = "seen"
    seed: int = 0
    folder: StrPath | None = None
    absent_share: float | None = None

    def __post_init__(self) -> None:
        check_integer("num_splits", self.num_splits, least=1, most=_MOST_SPLITS)
        check_integer("seed", self.seed, least=0, most=_MOST_SEED - self.num_splits)
        if self.folder is not None:
            check_path("folder", self.folder)
        check_choice("candidates", self.candidates, get_args(Candidates))
        check_absent_share(self.absent_share)

    def pseudo_splits(self, split: ClassSplit) -> list[ClassSplit]:
        """Split the seen classes at random: one half stays seen, the other plays absent. Splits differ if possible.

        Raises:
            ValueError: If there are fewer than three seen classes.
        """
        seen = split.seen_classes
        if len(seen) < 3:
            raise ValueError(
                f"Expected argument `seen_classes` to hold at least 3 classes, so that some can play absent, but got"
                f" {len(seen)}. Choose another `estimator`."
            )
        draws, size = random.Random(self.seed), math.ceil(len(seen) / 2)
        rest = split.absent_classes if self.candidates == "all" else ()
        halves: list[list[int]] = []
        while len(halves) < self.num_splits:
            kept = sorted(draws.sample(seen, size))
            if kept not in halves or len(halves) >= math.comb(len(seen), size):
                halves.append(kept)
        return [ClassSplit(split.num_classes, kept, sorted({*seen, *rest}.difference(kept))) for kept in halves]


def cross_validate(
    plan: CrossValidationPlan,
    split: ClassSplit,
    before: nn.Module,
    fit: Callable[[int, ClassSplit], nn.Module],
    reading: Callable[[nn.Module], EvaluationPass],
    settings: Mapping[str, Any],
) -> CalibrationResult:
    """Fine-tune once for each pseudo split, and average the gammas that bring the pseudo-absent classes back.

    Args:
        plan: The number of splits, the candidates, the seed and the folder.
        split: The seen and the absent classes.
        before: The model before fine-tuning, with its head attached and gamma 0.
        fit: Called with the number of a pseudo split and the pseudo split. Fine-tunes a copy of the model on its seen
            classes and returns the copy, with its head attached.
        reading: Prepares a pass of a model over samples of all seen classes.
        settings: Other settings that the outcome depends on, as plain types.

    Returns:
        The mean gamma, and its standard error over the splits.

    Raises:
        ValueError: If there are too few seen classes, if no split has a gamma, or if ``plan.folder`` holds another run.
    """
    pseudo_splits = plan.pseudo_splits(split)
    all_settings = {
        "candidates": plan.candidates,
        "absent_share": plan.absent_share,
        "seed": plan.seed,
        "weights": digest(before),
        "seen_classes": list(split.seen_classes),
        "absent_classes": list(split.absent_classes),
        **settings,
    }
    store = SplitStore(plan.folder, all_settings)
    known = [store.read(index) for index in range(plan.num_splits)]
    _seed(plan.seed)  # the passes may augment the data, too
    needed = _accuracies_before(reading(before), split, pseudo_splits) if None in known else []
    for index, pseudo_split in enumerate(pseudo_splits):
        if known[index] is None:
            _seed(plan.seed + index)  # so that a resumed run gives the same result
            curve = SeenUnseenCurve(split.num_classes, pseudo_split.seen_classes, pseudo_split.absent_classes)
            read = reading(fit(index, pseudo_split))
            read.feed(curve.to(read.device), split)
            outcome = {**needed[index], "gamma": _gamma(curve, needed[index]["pretrained_accuracy"], plan)}
            store.write(index, {**outcome, "pseudo_seen": list(pseudo_split.seen_classes)})
            known[index] = outcome
    return _result([outcome for outcome in known if outcome is not None], split)


def _accuracies_before(
    reading: EvaluationPass, split: ClassSplit, pseudo_splits: list[ClassSplit]
) -> list[dict[str, Any]]:
    """Return the accuracy of the model before fine-tuning on the pseudo-absent samples of each split."""
    curves = [
        OperatingPoint(split.num_classes, pseudo_split.seen_classes, pseudo_split.absent_classes)
        for pseudo_split in pseudo_splits
    ]
    metrics = MetricCollection({str(index): curve for index, curve in enumerate(curves)}, compute_groups=False)
    reading.feed(metrics.to(reading.device), split)
    return [
        {"pretrained_accuracy": float(curve.accuracies(0.0)["absent"]), "num_samples": curve.num_samples}
        for curve in curves
    ]


def _gamma(curve: SeenUnseenCurve, least: float, plan: CrossValidationPlan) -> float | None:
    try:
        return float(curve.best_gamma(min_absent_accuracy=least, absent_share=plan.absent_share))
    except UnreachableAccuracyError:
        return None


def _result(outcomes: list[dict[str, Any]], split: ClassSplit) -> CalibrationResult:
    gammas = [outcome["gamma"] for outcome in outcomes]
    found = [gamma for gamma in gammas if gamma is not None]
    dropped = [str(index) for index, gamma in enumerate(gammas) if gamma is None]
    if not found:
        raise ValueError(
            f"Expected pseudo cross-validation to find a gamma, but no gamma in any of {len(gammas)} splits brings the"
            " pseudo-absent classes back to the accuracy that the model had before fine-tuning. Choose another"
            " `estimator`, or other `candidates`."
        )
    if dropped:
        rank_zero_warn(
            f"Pseudo cross-validation leaves out split {', '.join(dropped)} of {len(gammas)}, because no gamma brings"
            " the pseudo-absent classes back to the accuracy that the model had before fine-tuning."
        )
    error = statistics.stdev(found) / math.sqrt(len(found)) if len(found) > 1 else math.nan
    return CalibrationResult(statistics.mean(found), error, outcomes[0]["num_samples"], split, "pcv")


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
