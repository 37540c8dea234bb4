"""`calibrate` with each estimator."""

from __future__ import annotations

import copy

import pytest
import torch

from lightning_calibft import ClassSplit, calibrate, get_gamma
from lightning_calibft.estimators import ESTIMATORS, make_estimator, needs_absent_samples, needs_pretrained_logits
from tests.helpers.runs import NUM_CLASSES, SEEN, TRAIN, VAL, loader, pretrained, quiet

pytestmark = quiet
OPTIONS = {"fixed": {"gamma": 1.25}, "quantile_gap": {"quantile": 0.75}}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_each(name):
    """Gamma in the head is what the metric gives of the logits that the model gives."""
    model, before = pretrained(), pretrained()
    before.fc.weight.data *= 1.5
    dataset = VAL if needs_absent_samples(name) else TRAIN
    more = {"pretrained": before} if needs_pretrained_logits(name) else {}
    options = OPTIONS.get(name)
    result = calibrate(model, loader(dataset), SEEN, estimator=name, estimator_kwargs=options, progress=False, **more)
    x, y = dataset.tensors
    metric = make_estimator(name, ClassSplit(NUM_CLASSES, SEEN), options)
    with torch.no_grad():
        logits = [copy.deepcopy(net).eval()(x) for net in (pretrained(), *([before] if more else []))]
    metric.update(logits[0], y, *logits[1:])
    assert result.gamma == pytest.approx(float(metric.compute()), rel=1e-5)
    assert result.standard_error == pytest.approx(float(metric.standard_error), rel=1e-3)
    assert result.num_samples == metric.num_samples == len(dataset)
    assert result.estimator == name
    assert get_gamma(model) == pytest.approx(result.gamma)


def test_options_of_a_metric_are_its_own():
    with pytest.raises(ValueError, match="`estimator_kwargs` to be None with an `estimator` that is a metric"):
        calibrate(
            pretrained(), loader(), estimator=ESTIMATORS["alg"](6, SEEN), estimator_kwargs={"a": 1}, progress=False
        )


def test_a_procedure_that_trains_is_no_estimator():
    with pytest.raises(ValueError, match="Call `pseudo_cross_validation` and pass its result to `set_gamma`"):
        calibrate(pretrained(), loader(), estimator="pcv", progress=False)


def test_an_estimator_that_finds_no_number():
    class Broken(ESTIMATORS["alg"]):
        def compute(self):
            return super().compute() * torch.nan

    model = pretrained()
    with pytest.raises(ValueError, match="'Broken' to find a finite gamma, but got nan from 45 samples"):
        calibrate(model, loader(), estimator=Broken(6, SEEN), progress=False)
    assert get_gamma(model) is None


def test_an_operating_point_needs_to_know_and_to_meet_the_classes():
    model = pretrained()
    with pytest.raises(ValueError, match=r"`seen_classes` to name .* 'operating_point', whose `loader`"):
        calibrate(model, loader(VAL), estimator="operating_point", progress=False)
    with pytest.raises(ValueError, match="to hold labeled samples of the absent classes"):
        calibrate(model, loader(TRAIN), SEEN, estimator="operating_point", progress=False)
    assert get_gamma(model) is None
