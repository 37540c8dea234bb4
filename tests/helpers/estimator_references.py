"""Slow and plain versions of the estimators, one sample at a time, from their definitions."""

from __future__ import annotations

import itertools
import math

import numpy as np
import torch
from scipy.optimize import brentq
from scipy.stats import nbinom


def _mean_and_error(gaps):
    return np.mean(gaps), np.std(gaps, ddof=1) / math.sqrt(len(gaps)) if len(gaps) > 1 else math.nan


def _seen_samples(logits, target, seen):
    return [(z, y) for z, y in zip(logits.double().tolist(), target.tolist(), strict=True) if y in seen]


def _reference_matched_maxima(logits, target, seen, absent):
    def expected(values, size):
        return np.mean([max(subset) for subset in itertools.combinations(values, size)])

    size, gaps = min(len(seen) - 1, len(absent)), []
    for z, y in _seen_samples(logits, target, seen):
        gaps.append(expected([z[c] for c in seen if c != y], size) - expected([z[c] for c in absent], size))
    return _mean_and_error(gaps)


def _reference_quantile_gap(logits, target, seen, absent, quantile=0.9):
    gaps = []
    for z, y in _seen_samples(logits, target, seen):
        others, rest = [z[c] for c in seen if c != y], [z[c] for c in absent]
        gaps.append(np.quantile(others, quantile) - np.quantile(rest, quantile))
    return _mean_and_error(gaps)


def _reference_log_sum_exp_gap(logits, target, seen, absent, temperature=1.0):
    gaps = []
    for z, y in _seen_samples(logits, target, seen):
        others, rest = (
            [math.exp(z[c] / temperature) for c in classes] for classes in ([c for c in seen if c != y], absent)
        )
        gaps.append(temperature * (math.log(np.mean(others)) - math.log(np.mean(rest))))
    return _mean_and_error(gaps)


def _reference_margins(logits, target, before, seen, absent):
    """Margins of the seen samples and of their pseudo-absent copies."""
    margins = []
    for z, label, z0 in zip(logits.double().tolist(), target.tolist(), before.double().tolist(), strict=True):
        if label not in seen:
            continue
        mean, mean0 = (sum(row[c] for c in absent) / len(absent) for row in (z, z0))
        std = math.sqrt(sum((z[c] - mean) ** 2 for c in absent) / len(absent))
        std0 = math.sqrt(sum((z0[c] - mean0) ** 2 for c in absent) / len(absent))
        scale = std / std0 if std > 0 and std0 > 0 else 1.0
        own = mean + scale * (z0[label] - mean0)
        highest = max(z[c] for c in absent)
        others = max(z[c] for c in seen if c != label)
        margins.append((max(z[c] for c in seen) - highest, others - max(own, highest)))
    return margins


def _reference_midpoint(logits, target, seen, absent, before):
    return _mean_and_error([(m + m2) / 2 for m, m2 in _reference_margins(logits, target, before, seen, absent)])


def _reference_confusion_matched(logits, target, seen, absent):
    samples = _seen_samples(logits, target, seen)
    above = [sum(z[c] > z[y] for c in seen) for z, y in samples]
    lead = [z[y] - max(z[c] for c in absent) for z, y in samples]
    mean, none = np.mean(above), np.mean(np.equal(above, 0))
    factor = len(absent) / (len(seen) - 1)
    if mean == 0:
        rate = 0.0
    elif math.exp(-mean) >= none:  # they spread less than a Poisson distribution's
        rate = 1 - math.exp(-factor * mean)
    else:
        shape = math.exp(brentq(lambda s: nbinom.pmf(0, math.exp(s), 1 / (1 + mean / math.exp(s))) - none, -14, 14))
        rate = 1 - nbinom.pmf(0, shape, 1 / (1 + factor * mean / shape))
    return np.quantile(lead, rate), None


def pretrained_logits(logits):
    return torch.randn(logits.shape, generator=torch.Generator().manual_seed(7)).mul(4).round() / 4
