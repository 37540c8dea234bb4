"""Estimators that compare with the model from before fine-tuning."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lightning_calibft import calibrate, get_gamma
from lightning_calibft.estimators import PseudoAbsent
from lightning_calibft.functional import pseudo_absent_gamma
from tests.helpers.runs import SEEN, TRAIN, loader, pretrained, quiet

pytestmark = quiet


def fine_tuned():
    """A model before and after training on the seen classes."""
    before = pretrained()
    after = copy.deepcopy(before)
    optimizer = torch.optim.SGD(after.parameters(), 0.1)
    x, y = TRAIN.tensors
    for _ in range(20):
        optimizer.zero_grad()
        nn.functional.cross_entropy(after(x), y).backward()
        optimizer.step()
    return before, after


def expected(before, after):
    x, y = TRAIN.tensors
    with torch.no_grad():
        logits = copy.deepcopy(after).eval()(x)
        return pseudo_absent_gamma(logits, y, copy.deepcopy(before).eval()(x), SEEN)


@pytest.mark.parametrize("kind", ["model", "state dict"])
def test_gamma(kind):
    before, after = fine_tuned()
    gamma, error = expected(before, after)
    state = {key: value.clone() for key, value in after.state_dict().items()}
    given = before if kind == "model" else before.state_dict()
    result = calibrate(after, loader(), estimator="pseudo_absent", pretrained=given, progress=False)
    assert (result.gamma, result.standard_error) == pytest.approx((gamma.item(), error.item()), rel=1e-5)
    assert (result.num_samples, result.estimator) == (len(TRAIN), "pseudo_absent")
    assert get_gamma(after) == pytest.approx(result.gamma)
    assert all(torch.equal(after.state_dict()[key], value) for key, value in state.items())
    assert get_gamma(before) is None


def test_it_is_not_the_average_logit_gap_and_both_models_count():
    before, after = fine_tuned()
    alg = calibrate(copy.deepcopy(after), loader(), progress=False).gamma
    first = calibrate(copy.deepcopy(after), loader(), estimator="pseudo_absent", pretrained=before, progress=False)
    other = calibrate(copy.deepcopy(after), loader(), estimator="pseudo_absent", pretrained=after, progress=False)
    assert len({round(gamma, 6) for gamma in (alg, first.gamma, other.gamma)}) == 3


def test_an_estimator_object():
    before, after = fine_tuned()
    gamma = expected(before, after)[0].item()
    result = calibrate(after, loader(), estimator=PseudoAbsent(6, SEEN), pretrained=before, progress=False)
    assert result.gamma == pytest.approx(gamma, rel=1e-5)
    assert result.estimator == "PseudoAbsent"


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"estimator": "pseudo_absent"}, "`pretrained` to be the model before fine-tuning for .*'pseudo_absent'"),
        ({"pretrained": nn.Linear(2, 3)}, "`pretrained` to be None for the estimator 'alg', but got weights"),
        ({"estimator": "pseudo_absent", "pretrained": nn.Linear(2, 3)}, "the same model .*'.*' is missing or has anot"),
    ],
)
def test_wrong_arguments(arguments, match):
    model = pretrained()
    with pytest.raises(ValueError, match=match):
        calibrate(model, loader(), progress=False, **arguments)
    assert get_gamma(model) is None


@pytest.mark.parametrize("kind", ["model", "state dict"])
def test_modules_with_extra_state(kind):
    """Not all that a state dict holds is a tensor."""

    class Extra(nn.Identity):
        def get_extra_state(self):
            return {"version": 3}

        def set_extra_state(self, state):
            pass

    before, after = fine_tuned()
    gamma = expected(before, after)[0].item()
    before, after = nn.Sequential(before, Extra()), nn.Sequential(after, Extra())
    given = before if kind == "model" else before.state_dict()
    result = calibrate(after, loader(), estimator="pseudo_absent", pretrained=given, progress=False)
    assert result.gamma == pytest.approx(gamma, rel=1e-5)
