"""Pseudo cross-validation with a plain PyTorch training loop."""

from __future__ import annotations

import copy
import json
import math
import os
import random
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_calibft import get_gamma, pseudo_cross_validation, set_gamma
from lightning_calibft.head.offset import attached_heads
from tests.helpers.references import _reference_at_gamma, _reference_gammas, _reference_split_accuracy
from tests.helpers.runs import blobs, pretrained, quiet

pytestmark = quiet

SEEN, ABSENT = [0, 2, 3, 4], [1, 5]
DATA = blobs(SEEN, each=12)
ROOT = Path(__file__).parents[2]


class Fit:
    """A plain training loop that keeps what it was given and what it made."""

    def __init__(self, steps=6, stop_at=None):
        self.steps, self.stop_at, self.models, self.classes = steps, stop_at, [], []

    def __call__(self, model, dataset):
        if len(self.models) == self.stop_at:
            os.kill(os.getpid(), 9)
        assert get_gamma(model) is None
        self.classes.append(sorted({int(y) for _, y in dataset}))
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
        for x, y in DataLoader(dataset, 8, shuffle=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        self.models.append(model)
        return model if len(self.models) % 2 else None  # both are allowed


@torch.no_grad()
def logits_of(model):
    model = copy.deepcopy(model).eval()
    for head in attached_heads(model).values():
        set_gamma(head, 0.0, SEEN)
    return model(DATA.tensors[0])


def _reference_best(before, model, kept, left_out):
    """Best overall accuracy with the pseudo-absent accuracy of before, by trying a gamma in each interval."""
    target, logits = DATA.tensors[1], logits_of(model)
    least = _reference_split_accuracy(logits_of(before), target, left_out, sorted([*kept, *left_out]))
    points = [
        _reference_at_gamma(logits, target, kept, left_out, gamma)
        for gamma in _reference_gammas(logits, kept, left_out)
    ]
    return least, max((overall for _, absent, overall in points if absent >= least), default=None)


@pytest.mark.filterwarnings("ignore:Pseudo cross-validation leaves out")
@pytest.mark.parametrize("candidates", ["seen", "all"])
def test_gamma(tmp_path, candidates):
    """The gamma of each split is as good as any on its own model; the result is their mean."""
    before, fit = pretrained(), Fit()
    result = pseudo_cross_validation(
        before, DATA, fit, candidates=candidates, num_splits=5, seed=2, folder=tmp_path, progress=False
    )
    outcomes = [json.loads((tmp_path / f"split_{index}.json").read_text()) for index in range(5)]
    assert [outcome["pseudo_seen"] for outcome in outcomes] == fit.classes
    assert len(set(map(tuple, fit.classes))) > 1
    for model, kept, outcome in zip(fit.models, fit.classes, outcomes, strict=True):
        assert len(kept) == 2
        left_out = [c for c in SEEN if c not in kept] + (ABSENT if candidates == "all" else [])
        least, best = _reference_best(before, model, kept, left_out)
        assert outcome["pretrained_accuracy"] == pytest.approx(least)
        if best is None:
            assert outcome["gamma"] is None
            continue
        points = _reference_at_gamma(logits_of(model), DATA.tensors[1], kept, left_out, outcome["gamma"])
        assert points[1] >= least
        assert points[2] == pytest.approx(best)
    gammas = [outcome["gamma"] for outcome in outcomes if outcome["gamma"] is not None]
    assert len(gammas) >= 2
    assert result.gamma == pytest.approx(sum(gammas) / len(gammas))
    deviation = math.sqrt(sum((gamma - result.gamma) ** 2 for gamma in gammas) / (len(gammas) - 1))
    assert result.standard_error == pytest.approx(deviation / math.sqrt(len(gammas)))
    assert (result.split.seen_classes, result.split.absent_classes) == (tuple(SEEN), tuple(ABSENT))
    assert (result.num_samples, result.estimator) == (48, "pcv")


def test_nothing_of_the_callers_changes():
    before = pretrained()
    set_gamma(before, 1.5, SEEN, ABSENT)  # calibrated earlier: the copies are not
    state = copy.deepcopy(before.state_dict())
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    streams = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    fit = Fit()
    first = pseudo_cross_validation(before, DATA, fit, progress=False)
    assert all(torch.equal(value, state[key]) for key, value in before.state_dict().items())
    assert get_gamma(before) == 1.5
    assert torch.equal(torch.get_rng_state(), streams[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == streams[1:]
    torch.manual_seed(6)
    assert pseudo_cross_validation(before, DATA, Fit(), progress=False) == first  # the seed alone decides
    assert pseudo_cross_validation(before, DATA, Fit(), seed=1, progress=False).gamma != first.gamma
    assert not attached_heads(pretrained())
    assert pseudo_cross_validation(pretrained(), DATA, Fit(), progress=False).gamma == first.gamma


def test_modes_are_those_of_the_model():
    """What is frozen stays so."""
    before = pretrained()
    before.body[1].eval()

    def fit(model, dataset):
        modes = {name: module.training for name, module in model.named_modules()}
        assert modes.items() >= {name: module.training for name, module in before.named_modules()}.items()
        return Fit()(model, dataset)

    pseudo_cross_validation(before, DATA, fit, progress=False)
    assert not before.body[1].training
    assert before.training


def test_a_model_that_the_fit_has_calibrated():
    """Gamma is found on the raw logits."""

    def fit(model, dataset):
        return set_gamma(Fit()(model, dataset), 3.0, SEEN)

    expected = pseudo_cross_validation(pretrained(), DATA, Fit(), progress=False)
    assert pseudo_cross_validation(pretrained(), DATA, fit, progress=False) == expected


@pytest.mark.parametrize("num_splits", [6, 7])
def test_each_split_is_another_as_long_as_there_are_any(num_splits):
    fit = Fit()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pseudo_cross_validation(pretrained(), DATA, fit, num_splits=num_splits, progress=False)
    assert len(fit.classes) == num_splits
    assert len(set(map(tuple, fit.classes))) == 6


def test_what_it_will_cost_is_said_first(caplog, capsys):
    caplog.set_level("INFO")

    def fit(model, dataset):
        assert "3 more trainings, on 50 %, 50 %, 50 % of the 48 samples." in caplog.text

    pseudo_cross_validation(pretrained(), DATA, fit)
    assert "Cross-validating: 100%" in capsys.readouterr().err
    pseudo_cross_validation(pretrained(), DATA, Fit(), progress=False)
    assert "Cross-validating" not in capsys.readouterr().err


def forgetful(model, dataset):
    """What no gamma brings back: the pseudo-absent classes are never right."""
    classes = sorted({int(y) for _, y in dataset})
    with torch.no_grad():
        model.fc.weight[[c for c in SEEN if c not in classes]] *= -1


def test_splits_without_a_gamma_are_left_out():
    calls = []

    def fit(model, dataset):
        calls.append(1)
        return forgetful(model, dataset) if len(calls) == 2 else Fit()(model, dataset)

    with pytest.warns(UserWarning, match="leaves out split 1 of 3, because no gamma brings the pseudo-absent"):
        result = pseudo_cross_validation(pretrained(), DATA, fit, progress=False)
    assert math.isfinite(result.gamma)
    with pytest.raises(ValueError, match="no gamma in any of 3 splits brings the pseudo-absent classes back"):
        pseudo_cross_validation(pretrained(), DATA, forgetful, progress=False)


def test_folders_that_number_their_classes():
    rows = torch.tensor(SEEN)
    numbered = TensorDataset(DATA.tensors[0], torch.searchsorted(rows, DATA.tensors[1]))

    def fit(model, dataset):
        mapped = TensorDataset(*(torch.stack(part) for part in zip(*dataset, strict=True)))
        return Fit()(model, TensorDataset(mapped.tensors[0], rows[mapped.tensors[1]]))

    result = pseudo_cross_validation(pretrained(), numbered, fit, class_map=SEEN, progress=False)
    assert result == pseudo_cross_validation(pretrained(), DATA, Fit(), progress=False)
