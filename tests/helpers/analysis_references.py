"""Slow and plain versions of the analyses: one sample, one class, one pair at a time."""

from __future__ import annotations

import math

from torch import Tensor


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _norm(row: list[float]) -> float:
    return math.sqrt(sum(value * value for value in row))


def _reference_norms(weight: Tensor, classes: list[int]) -> tuple[float, float]:
    rows = weight.double().tolist()
    norms = [_norm(rows[c]) for c in classes]
    mean = _mean(norms)
    return mean, math.sqrt(_mean([(norm - mean) ** 2 for norm in norms]))


def _reference_cosine(before: Tensor, after: Tensor, a: int, b: int) -> float:
    one, other = (
        [y - x for x, y in zip(before.double()[c].tolist(), after.double()[c].tolist(), strict=True)] for c in (a, b)
    )
    lengths = _norm(one) * _norm(other)
    return sum(x * y for x, y in zip(one, other, strict=True)) / lengths if lengths else math.nan


def _reference_similarity(before: Tensor, after: Tensor, seen: list[int], absent: list[int]) -> list[float]:
    means = []
    for one, other in ((seen, seen), (absent, absent), (seen, absent)):
        cosines = [_reference_cosine(before, after, a, b) for a in one for b in other if a != b]
        means.append(_mean([cosine for cosine in cosines if not math.isnan(cosine)]))
    return means


def _reference_levels(
    logits: Tensor, target: Tensor, samples: list[int], seen: list[int], absent: list[int]
) -> tuple[float, float, float, int]:
    true, other_seen, other_absent = [], [], []
    for row, label in zip(logits.double().tolist(), target.tolist(), strict=True):
        if label in samples:
            true.append(row[label])
            other_seen.extend([max(row[c] for c in seen if c != label)] if set(seen) - {label} else [])
            other_absent.extend([max(row[c] for c in absent if c != label)] if set(absent) - {label} else [])
    return _mean(true), _mean(other_seen), _mean(other_absent), len(true)


def _reference_ncm(features: Tensor, target: Tensor, test: Tensor, num_classes: int) -> list[list[float]]:
    """Cosines of test features to the mean of the normalized features of each class."""

    def unit(row: list[float]) -> list[float]:
        return [value / _norm(row) for value in row]

    units = [unit(row) for row in features.double().tolist()]
    means = []
    for c in range(num_classes):
        rows = [row for row, label in zip(units, target.tolist(), strict=True) if label == c]
        means.append(unit([_mean(list(column)) for column in zip(*rows, strict=True)]))
    return [
        [sum(x * y for x, y in zip(unit(row), mean, strict=True)) for mean in means] for row in test.double().tolist()
    ]
