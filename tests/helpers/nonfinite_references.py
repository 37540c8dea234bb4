"""The slow references, for logits that may be infinite or NaN."""

from __future__ import annotations

import math

import pytest
import torch

from tests.helpers.references import _argmax, _average, _reference_at_gamma
from tests.properties.strategies import Case


def _reference_accuracy(case, samples, candidates, average="micro", top_k=1):
    """A NaN among the candidates is wrong, and a logit of minus infinity names no class."""
    rights = {c: [] for c in samples}
    for row, label in zip(case.logits.double().tolist(), case.target.tolist(), strict=True):
        if label not in rights:
            continue
        if label not in candidates or row[label] == -math.inf or any(math.isnan(row[c]) for c in candidates):
            rights[label].append(False)
        elif top_k == 1:
            rights[label].append(_argmax(row, candidates) == label)
        else:
            rights[label].append(sum(row[c] > row[label] for c in candidates) < top_k)
    return _average(rights, average)


def _reference_point(case, gamma, average="micro"):
    """Accuracies of seen, absent and all samples at gamma."""
    nan = case.logits[:, case.seen + case.absent].isnan().any(1, keepdim=True)
    return _reference_at_gamma(case.logits.masked_fill(nan, -math.inf), *case[1:], gamma, average)


def _reference_point_by_margins(case, gamma, average="micro"):
    """The same by the margins, for finite logits so large that adding gamma to one changes nothing."""
    rights = {c: [] for c in case.seen + case.absent}
    for row, label in zip(case.logits.double().tolist(), case.target.tolist(), strict=True):
        if label in rights:
            margin = max(row[c] for c in case.seen) - max(row[c] for c in case.absent)
            own, beyond = (case.seen, gamma < margin) if label in case.seen else (case.absent, gamma > margin)
            rights[label].append(beyond and _argmax(row, own) == label)
    chosen = (case.seen, case.absent, rights)
    return tuple(_average({c: rights[c] for c in group}, average) for group in chosen)


def groups(case: Case) -> dict[str, list[int]]:
    return {"all": sorted(case.seen + case.absent), "seen": case.seen, "absent": case.absent}


def harmonic(a: float, b: float) -> float:
    return 2 * a * b / (a + b) if a + b else a + b


def close(value, tolerance: float = 1e-12):
    return pytest.approx(value, rel=tolerance, abs=tolerance, nan_ok=True)


def plain(result):
    """A result as Python numbers."""
    if isinstance(result, tuple):
        return [number for part in result for number in part.tolist()]
    return result.tolist() if isinstance(result, torch.Tensor) else result
