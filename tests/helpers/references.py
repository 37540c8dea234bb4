"""Slow and plain versions of the definitions: one sample, one class, one gamma at a time."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor


def random_case(seed: int, num_samples: int = 60, num_classes: int = 9) -> tuple[Tensor, Tensor, list[int], list[int]]:
    """Logits in quarters, exact in every dtype and full of ties; two other classes; labels of all classes."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(-12, 13, (num_samples, num_classes), generator=generator) / 4
    target = torch.randint(num_classes, (num_samples,), generator=generator)
    logits[torch.arange(num_samples), target] += 2  # so that some are right
    order = torch.randperm(num_classes, generator=generator).tolist()
    return logits, target, sorted(order[:4]), sorted(order[4:-2])


def _argmax(row: list[float], classes: list[int]) -> int:
    best = classes[0]
    for c in classes:
        if row[c] > row[best]:
            best = c
    return best


def _average(rights: dict[int, list[bool]], average: str) -> float:
    if not any(rights.values()):
        return math.nan
    if average == "micro":
        flat = [right for values in rights.values() for right in values]
        return sum(flat) / len(flat)
    means = [sum(values) / len(values) for values in rights.values() if values]
    return sum(means) / len(means)


def _reference_split_accuracy(
    logits: Tensor,
    target: Tensor,
    samples: list[int],
    candidates: list[int],
    average: str = "micro",
    top_k: int = 1,
) -> float:
    rights: dict[int, list[bool]] = {c: [] for c in samples}
    for row, label in zip(logits.double().tolist(), target.tolist(), strict=True):
        if label not in samples:
            continue
        if top_k == 1:
            rights[label].append(_argmax(row, candidates) == label)
        else:
            above = sum(row[c] > row[label] for c in candidates)
            rights[label].append(label in candidates and above < top_k)
    return _average(rights, average)


def _reference_at_gamma(
    logits: Tensor, target: Tensor, seen: list[int], absent: list[int], gamma: float, average: str = "micro"
) -> tuple[float, float, float]:
    """Accuracies of seen, absent and all samples; a tie between the two groups is right for neither."""
    rights: dict[int, list[bool]] = {c: [] for c in seen + absent}
    for row, label in zip(logits.double().tolist(), target.tolist(), strict=True):
        if label not in rights:
            continue
        moved = [z + gamma * (c in absent) for c, z in enumerate(row)]
        own, others = (seen, absent) if label in seen else (absent, seen)
        rights[label].append(_argmax(moved, own) == label and all(moved[label] > moved[c] for c in others))
    return (
        _average({c: rights[c] for c in seen}, average),
        _average({c: rights[c] for c in absent}, average),
        _average(rights, average),
    )


def _reference_margins(logits: Tensor, seen: list[int], absent: list[int]) -> list[float]:
    rows = logits.double().tolist()
    return sorted({max(row[c] for c in seen) - max(row[c] for c in absent) for row in rows})


def _reference_gammas(logits: Tensor, seen: list[int], absent: list[int]) -> list[float]:
    """One gamma inside each interval between the margins of all samples, right or wrong."""
    margins = _reference_margins(logits, seen, absent)
    inside = [(low + high) / 2 for low, high in itertools.pairwise(margins)]
    return [margins[0] - 1, *inside, margins[-1] + 1]


def _reference_ausuc(
    logits: Tensor, target: Tensor, seen: list[int], absent: list[int], average: str = "micro"
) -> float:
    gammas = _reference_gammas(logits, seen, absent)
    points = [_reference_at_gamma(logits, target, seen, absent, gamma, average) for gamma in gammas]
    return sum((a[0] + b[0]) / 2 * (b[1] - a[1]) for a, b in itertools.pairwise(points))


def _reference_gap(logits: Tensor, target: Tensor, seen: list[int], absent: list[int]) -> tuple[float, float, int]:
    gaps = []
    for row, label in zip(logits.double().tolist(), target.tolist(), strict=True):
        if label in seen:
            others = [row[c] for c in seen if c != label]
            gaps.append(sum(others) / len(others) - sum(row[c] for c in absent) / len(absent))
    mean = sum(gaps) / len(gaps)
    deviation = math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / (len(gaps) - 1))
    return mean, deviation / math.sqrt(len(gaps)), len(gaps)
