"""Each estimator with its reference."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_calibft.estimators import ESTIMATORS, Estimator, needs_pretrained_logits
from tests.helpers.estimator_references import _reference_told_gap, pretrained_logits
from tests.helpers.references import _reference_gap, random_case

CASES: dict[str, tuple[str, dict[str, Any], Any]] = {
    "alg": ("alg", {}, lambda *args: _reference_gap(*args)[:2]),
    "alg_told": ("alg", {"absent_share": 0.1}, _reference_told_gap),
    "fixed": ("fixed", {"gamma": 2.1}, lambda *args, gamma: (gamma, 0.0)),
}


def make(case: str, num_classes: int, seen: list[int], absent: list[int] | None = None, **kwargs: Any) -> Estimator:
    name, options, _ = CASES[case]
    return ESTIMATORS[name](num_classes, seen, absent, **options, **kwargs)


def inputs(case: str, seed: int = 0, num_samples: int = 60) -> tuple[Tensor, ...]:
    logits, target, *_ = random_case(seed, num_samples)
    return (logits, target, pretrained_logits(logits)) if needs_pretrained_logits(CASES[case][0]) else (logits, target)


def reference(case: str, batch: tuple[Tensor, ...], seen: list[int], absent: list[int]) -> tuple[float, float | None]:
    _, options, function = CASES[case]
    return function(*batch[:2], seen, absent, *batch[2:], **options)


def statistics(metric: Estimator) -> tuple[float, float, int]:
    return metric.compute().item(), metric.standard_error.item(), metric.num_samples


def whole(case: str) -> tuple[float, float, int]:
    """The statistics of all samples at once."""
    *_, seen, absent = random_case(0)
    metric = make(case, 9, seen, absent)
    metric.update(*inputs(case))
    return statistics(metric)
