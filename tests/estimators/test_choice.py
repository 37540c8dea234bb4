"""Ways to choose gamma, by name or as a metric."""

from __future__ import annotations

import warnings

import pytest
import torch
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy

from lightning_calibft import ClassSplit
from lightning_calibft.estimators import ESTIMATORS, check_estimator, check_estimator_width, make_estimator
from lightning_calibft.metrics import AverageLogitGap
from tests.helpers.references import _reference_gap, random_case

LOGITS, TARGET, SEEN, ABSENT = random_case(0)


class Constant(Metric):
    """An estimator of the user's own."""

    def __init__(self, split, gamma):
        super().__init__()
        self.split, self.gamma = split, gamma
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, logits, target):
        self.count += len(target)

    def compute(self):
        return torch.tensor(self.gamma)

    @property
    def standard_error(self):
        raise AssertionError("read too early")

    @property
    def num_samples(self):
        raise AssertionError("read too early")


def test_the_default_is_the_average_logit_gap():
    assert ESTIMATORS["alg"] is AverageLogitGap
    estimator = make_estimator("alg", ClassSplit(LOGITS.shape[1], SEEN, ABSENT))
    for logits, target in zip(LOGITS.split(7), TARGET.split(7), strict=True):
        estimator.update(logits, target)
    gamma, error, count = _reference_gap(LOGITS, TARGET, SEEN, ABSENT)
    assert estimator.compute().item() == pytest.approx(gamma, rel=1e-12)
    assert estimator.standard_error.item() == pytest.approx(error, rel=1e-9)
    assert estimator.num_samples == count


def test_a_metric_is_used_afresh():
    metric = AverageLogitGap(LOGITS.shape[1], SEEN, ABSENT)
    metric.update(LOGITS + 1, TARGET)
    assert make_estimator(metric, metric.split) is metric
    metric.update(LOGITS, TARGET)
    assert metric.compute().item() == pytest.approx(_reference_gap(LOGITS, TARGET, SEEN, ABSENT)[0], rel=1e-12)


def test_what_is_an_estimator():
    split = ClassSplit(6, [0, 1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is computed to find out
        for estimator in ("alg", AverageLogitGap(6, [0, 1]), Constant(split, 2.0)):
            check_estimator(estimator)
            check_estimator_width(estimator, 6)


@pytest.mark.parametrize("value", ["ALG", "", "median"])
def test_unknown_names(value):
    with pytest.raises(
        ValueError, match=f"`estimator` to be one of 'alg', 'pseudo_absent', .* or a metric, but got '{value}'"
    ):
        check_estimator(value)


@pytest.mark.parametrize("value", [None, 1.5, AverageLogitGap, MulticlassAccuracy(3), torch.nn.Linear(2, 2)])
def test_what_is_no_estimator(value):
    with pytest.raises(TypeError, match=r"a torchmetrics Metric with `split`, `standard_error` and `num_samples`"):
        check_estimator(value)


@pytest.mark.parametrize(("seen", "absent"), [([0, 1], None), (None, [2]), ([0, 1], [2])])
def test_classes_beside_a_metric(seen, absent):
    with pytest.raises(ValueError, match=r"`absent_classes` to be None with an `estimator` .* Leave them out"):
        check_estimator(AverageLogitGap(6, [0, 1]), None, seen, absent)
    check_estimator("alg", None, seen, absent)


def test_the_width():
    with pytest.raises(ValueError, match="made for the 5 classes of the head, but got one for 6"):
        check_estimator_width(AverageLogitGap(6, [0, 1]), 5)


def test_one_seen_class_is_too_few_for_the_average_logit_gap():
    with pytest.raises(ValueError, match="at least 2 classes, but got 1"):
        make_estimator("alg", ClassSplit(6, [0]))
