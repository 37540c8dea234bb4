"""`calibrate` with each estimator."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from lightning_calibft import ClassSplit, calibrate, get_gamma
from lightning_calibft.estimators import (
    ESTIMATORS,
    PseudoAbsent,
    make_estimator,
    needs_absent_samples,
    needs_pretrained_logits,
)
from tests.helpers.runs import NUM_CLASSES, SEEN, TRAIN, VAL, loader, pretrained, quiet

pytestmark = quiet
OPTIONS = {"fixed": {"gamma": 1.25}, "operating_point": {"min_seen_accuracy": 0.5}}


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


@pytest.mark.parametrize("name", ["alg", "pseudo_absent", "operating_point"])
def test_a_told_share(name):
    """It reaches the metric, and fewer absent samples need a smaller gamma."""
    dataset = VAL if needs_absent_samples(name) else TRAIN
    more = {"pretrained": pretrained()} if needs_pretrained_logits(name) else {}
    results = {}
    for share in (0.01, 0.99):
        results[share] = calibrate(
            pretrained(), loader(dataset), SEEN, estimator=name, absent_share=share, progress=False, **more
        )
        assert results[share].absent_share == results[share].as_dict()["absent_share"] == share
    assert results[0.01].gamma < results[0.99].gamma
    result = calibrate(pretrained(), loader(dataset), SEEN, estimator=name, progress=False, **more)
    assert "absent_share" not in result.as_dict()
    if name == "alg":
        assert results[0.99].gamma - result.gamma == pytest.approx(math.log(0.99 / 0.01 * len(SEEN) / (6 - len(SEEN))))


def test_what_gamma_is_expected_to_change():
    model, before = pretrained(), pretrained()
    result = calibrate(model, loader(), SEEN, estimator="pseudo_absent", pretrained=before, progress=False)
    metric = make_estimator("pseudo_absent", ClassSplit(NUM_CLASSES, SEEN))
    x, y = TRAIN.tensors
    with torch.no_grad():
        logits = pretrained().eval()(x)
    metric.update(logits, y, logits)
    changes = [result.seen_change, result.absent_change]
    assert changes == pytest.approx(list(map(float, metric.expected_change)), abs=1e-6)
    assert result.break_even_share == pytest.approx(metric.break_even_share.item(), rel=1e-4)
    assert result.as_dict()["break_even_share"] == result.break_even_share
    assert calibrate(model, loader(), SEEN, progress=False).break_even_share is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"estimator": "fixed", "estimator_kwargs": {"gamma": 1.0}},
            "with the estimator 'fixed', which does not depend",
        ),
        (
            {"estimator": ESTIMATORS["alg"](6, SEEN), "seen_classes": None},
            "an `estimator` that is a metric, but got",
        ),
        ({"estimator_kwargs": {"absent_share": 0.2}}, "with `estimator_kwargs` that hold it as well, but got 0.1"),
        ({"estimator": "operating_point", "estimator_kwargs": {"criterion": "harmonic_mean"}}, "does not depend on it"),
    ],
)
def test_a_share_that_has_no_place(options, message):
    with pytest.raises(ValueError, match=f"Expected argument `absent_share` to be None .*{message}"):
        calibrate(pretrained(), loader(), **{"seen_classes": SEEN, **options}, absent_share=0.1, progress=False)


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


class TooFar(PseudoAbsent):
    """Finds a gamma far above the best one, and tells what it is expected to do."""

    def compute(self):
        return super().compute() + 12


def test_a_gamma_that_is_expected_to_do_harm():
    """It is in the model all the same, and the caller is warned."""
    model, before = pretrained(), pretrained()
    metric = TooFar(NUM_CLASSES, SEEN, absent_share=0.1)
    with pytest.warns(UserWarning, match=r"is expected to do harm: .* told, 10.0%, .* It pays above") as told:
        result = calibrate(model, loader(), estimator=metric, pretrained=before, progress=False)
    assert told[0].filename == __file__
    assert get_gamma(model) == pytest.approx(result.gamma, rel=1e-6)


def test_seen_accuracy():
    """Among the seen classes alone; here, for labels that are mostly wrong."""
    x, y = VAL.tensors
    seen = torch.isin(y, torch.tensor(SEEN))
    x, y = x[seen], y[seen].flip(0)
    with torch.no_grad():
        logits = pretrained().eval()(x)
    right = torch.tensor(SEEN)[logits[:, SEEN].argmax(1)] == y
    options = {"estimator": "pseudo_absent", "pretrained": pretrained(), "progress": False}
    result = calibrate(pretrained(), [(x, y)], SEEN, **options)
    assert result.seen_accuracy == pytest.approx(right.double().mean().item())
    assert 0.1 < result.seen_accuracy < 0.7


def test_a_result_of_a_wide_head_fits_a_screen():
    head, seen = torch.nn.Linear(4, 1000), torch.arange(60) * 2
    absent = sorted(set(range(1000)) - set(seen.tolist()))
    result = calibrate(head, [(torch.randn(60, 4), seen)], absent_classes=absent, progress=False)
    assert len(repr(result)) < 800
    assert len(result.split.seen_classes) == 60
