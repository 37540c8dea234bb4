"""Slow and plain versions of the estimators, one sample at a time, from their definitions."""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy.optimize import brentq

from tests.helpers.references import _reference_gap


def _reference_told_gap(logits, target, seen, absent, absent_share):
    """The average logit gap, and how much likelier an absent class is than a seen one."""
    gamma, error, _ = _reference_gap(logits, target, seen, absent)
    return gamma + math.log(absent_share / len(absent)) - math.log((1 - absent_share) / len(seen)), error


def _reference_pseudo_absent(logits, target, seen, absent, before, absent_share=0.5):
    """Gamma as a root of its equation, and the equation's samples: margin, right, copy's margin, copy's weight."""
    margins, right, right_before, copies, excesses, now, then = [], [], [], [], [], [], []
    for z, label, z0 in zip(logits.double().tolist(), target.tolist(), before.double().tolist(), strict=True):
        if label not in seen:
            continue
        others = [c for c in seen if c != label]
        absent_now, absent_then = np.array([z[c] for c in absent]), np.array([z0[c] for c in absent])
        scale = absent_now.std() / absent_then.std() if absent_now.std() > 0 and absent_then.std() > 0 else 1.0
        own = absent_now.mean() + scale * (z0[label] - np.mean([z0[c] for c in others]))
        rival, highest = max(z[c] for c in others), absent_now.max()
        margins.append(max(rival, z[label]) - highest)
        right.append(z[label] > rival)
        right_before.append(z0[label] > max(z0[c] for c in others))
        copies.append((own - highest, rival - max(own, highest)))
        excesses.append(math.log(np.exp(absent_now - highest).sum()))
        now.extend(absent_now - absent_now.mean())
        then.extend(absent_then - absent_then.mean())
    count, now, then = len(margins), np.array(now), np.array(then)
    spread = math.sqrt((now @ now) * (then @ then))
    changed = min(1.0, max(0.0, 1 - now @ then / spread)) if spread > 0 else 0.0
    accuracy, accuracy_before = ((sum(part) + 0.5) / (count + 1) for part in (right, right_before))
    odds, odds_before = accuracy / (1 - accuracy), accuracy_before / (1 - accuracy_before)
    gained = changed * max(0.0, math.log(odds / odds_before))
    weights = []
    for own, _ in copies:
        rivals = math.exp(np.mean(excesses)) * (len(absent) - 1) / len(absent)
        weights.append(1 / (1 + rivals * math.exp(-own - gained)))
    right = [(value * count + 0.5) / (count + 1) for value in right]
    slope = 2.5 / np.std(margins) if np.std(margins) > 0 else 1.0
    copies = [margin for _, margin in copies]

    def surplus(gamma):
        lost = np.mean([a / (1 + math.exp(slope * (m - gamma))) for m, a in zip(margins, right, strict=True)])
        missed = np.mean([b / (1 + math.exp((gamma - c) / 2)) for c, b in zip(copies, weights, strict=True)])
        return (1 - absent_share) * lost - absent_share * missed

    gamma = brentq(surplus, min(margins + copies) - 30, max(margins + copies) + 30, xtol=1e-13)
    return gamma, (np.array(margins), np.array(right), np.array(copies), np.array(weights), slope)


def pretrained_logits(logits):
    return torch.randn(logits.shape, generator=torch.Generator().manual_seed(7)).mul(4).round() / 4
