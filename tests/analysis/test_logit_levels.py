"""Mean logits of the true and of the largest other classes."""

from __future__ import annotations

import math
import pickle
from dataclasses import astuple

import pytest
import torch

from lightning_calibft.analysis.logit_levels import LogitLevelsMetric, logit_levels
from tests.helpers.analysis_references import _reference_levels
from tests.helpers.references import random_case


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("seed", [0, 1])
def test_levels(seed, dtype):
    logits, target, seen, absent = random_case(seed)
    levels = logit_levels(logits.to(dtype), target, seen, absent)
    for found, samples in ((levels.seen, seen), (levels.absent, absent)):
        assert astuple(found) == pytest.approx(_reference_levels(logits, target, samples, seen, absent), rel=1e-12)


@pytest.mark.parametrize("batch_size", [1, 7, 60])
def test_the_metric_over_batches_is_the_function(batch_size):
    logits, target, seen, absent = random_case(2)
    metric = pickle.loads(pickle.dumps(LogitLevelsMetric(logits.shape[1], seen, absent)))
    for part in zip(logits.split(batch_size), target.split(batch_size), strict=True):
        metric.update(*part)
    expected = logit_levels(logits, target, seen, absent)
    assert metric.compute().flatten().tolist() == pytest.approx(
        [*astuple(expected.seen)[:3], *astuple(expected.absent)[:3]]
    )
    assert metric.levels().absent.num_samples == expected.absent.num_samples
    assert metric.state_dict() == {}


def test_what_is_not_there_is_nan():
    logits, target = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([0])
    levels = logit_levels(logits, target, [0])
    assert (levels.seen.true, levels.seen.other_absent) == (1, 3)
    assert math.isnan(levels.seen.other_seen)  # the one seen class is the true one
    assert math.isnan(levels.absent.true)
    assert levels.absent.num_samples == 0


def test_ignored_and_unknown_labels_do_not_count():
    logits, target, seen, absent = random_case(3)
    metric = LogitLevelsMetric(logits.shape[1], seen, absent, validate_args=False, ignore_index=seen[0])
    other = target.clone()
    other[::5] = -100
    metric.update(logits, other)
    rest = (other != -100) & (other != seen[0])
    metric_of_rest = LogitLevelsMetric(logits.shape[1], seen, absent)
    metric_of_rest.update(logits[rest], other[rest])
    assert metric.levels() == metric_of_rest.levels()
