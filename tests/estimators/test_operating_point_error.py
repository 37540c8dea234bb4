"""The standard error of an operating point: the bootstrap, against a plain one and against new samples."""

from __future__ import annotations

import math
import statistics

import pytest
import torch

from lightning_calibft.estimators import OperatingPoint
from lightning_calibft.functional import best_gamma
from tests.estimators.test_operating_point import POINTS
from tests.helpers.references import random_case


def _reference_error(logits, target, seen, absent, **kwargs):
    """Plain bootstrap with the same draws: the whole estimate anew from the drawn rows."""
    counted = [i for i, label in enumerate(target.tolist()) if label in seen + absent]
    keys = {}
    for i in counted:
        row, label = logits[i].tolist(), target[i].item()
        right = row[label] == max(row[c] for c in (seen if label in seen else absent))
        keys[i] = (max(row[c] for c in seen) - max(row[c] for c in absent), 2 * label + right)
    counted.sort(key=keys.get)
    draws, gammas = torch.Generator().manual_seed(0), []
    for _ in range(200):
        rows = [counted[k] for k in torch.randint(len(counted), (len(counted),), generator=draws)]
        try:
            gamma = best_gamma(logits[rows], target[rows], seen, absent, **kwargs).item()
        except ValueError:
            continue
        gammas += [] if math.isnan(gamma) else [gamma]
    return statistics.stdev(gammas) if len(gammas) > 1 else math.nan


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("config", [*POINTS.values(), {"min_seen_accuracy": 0.3, "min_absent_accuracy": 0.15}], ids=str)
@pytest.mark.filterwarnings("ignore:The metric received no")
def test_standard_error_equals_a_plain_bootstrap(seed, config):
    case = random_case(seed, num_samples=25)
    case[0][0, case[2][0]], case[0][1, case[3][0]] = math.inf, math.inf
    metric = OperatingPoint(9, *case[2:], **config)
    metric.update(*case[:2])
    assert metric.compute() == best_gamma(*case, **config)
    assert metric.standard_error.item() == pytest.approx(_reference_error(*case, **config), rel=1e-9)


@pytest.mark.filterwarnings("ignore:The metric received no")
def test_resamples_without_a_gamma_are_left_out():
    # One absent sample: 37 % of the resamples lack it. Nothing less than all is enough for the seen ones.
    logits = torch.tensor([[3.0, 0.0, 0.0], [2.0, 0.0, 0.0], [1.0, 5.0, 0.0], [0.0, 0.0, 1.0]])
    case = logits, torch.tensor([0, 0, 1, 2]), [0, 1], [2]
    for config in ({}, {"min_seen_accuracy": 1.0}, {"min_absent_accuracy": 1.0}):
        metric = OperatingPoint(3, [0, 1], **config)
        metric.update(*case[:2])
        assert metric.standard_error.item() == pytest.approx(_reference_error(*case, **config), rel=1e-9)
        assert metric.standard_error > 0
    # Resamples in which the wrong one is drawn twice reach 1/3 at most.
    case = torch.cat([logits, logits[:1]]), torch.tensor([0, 0, 1, 2, 1]), [0, 1], [2]
    metric = OperatingPoint(3, [0, 1], min_seen_accuracy=0.75)
    metric.update(*case[:2])
    assert metric.standard_error.item() == pytest.approx(_reference_error(*case, min_seen_accuracy=0.75), rel=1e-9)


def _draw(seed: int, num_samples: int = 400):
    """One seen and one absent class, whose margins are Gaussian around 3 and 1."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(2, (num_samples,), generator=generator)
    margin = torch.randn(num_samples, generator=generator) + 3 - 2 * target
    return torch.stack([margin, torch.zeros(num_samples)], 1), target


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, 2.0),
        ({"criterion": "harmonic_mean"}, 2.0),
        ({"criterion": "equal_accuracies"}, 2.0),
        ({"min_seen_accuracy": 0.9}, 3 - 1.2816),  # quantiles of the Gaussian
        ({"min_absent_accuracy": 0.9}, 1 + 1.2816),
    ],
)
def test_standard_error_is_that_of_new_samples(config, expected):
    gammas, errors = [], []
    for seed in range(300):
        metric = OperatingPoint(2, [0], validate_args=False, **config)
        metric.update(*_draw(seed))
        gammas.append(metric.compute().item())
        if seed < 20:
            errors.append(metric.standard_error.item())
    assert statistics.mean(gammas) == pytest.approx(expected, abs=0.05)
    assert statistics.mean(errors) == pytest.approx(statistics.stdev(gammas), rel=0.2)
