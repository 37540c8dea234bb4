"""A small network, and gamma for it by the definition."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lightning_calibft import detach, get_gamma
from tests.helpers.references import _reference_gap
from tests.helpers.runs import ABSENT, NUM_CLASSES, SEEN, TRAIN

X, Y = TRAIN.tensors
ALL = list(range(NUM_CLASSES))


class Net(nn.Module):
    def __init__(self, dropout=0.5):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(dropout))
        self.fc = nn.Linear(16, NUM_CLASSES)

    def forward(self, x):
        return self.fc(self.body(x))


def net(make=Net):
    torch.manual_seed(0)
    return make()


def raw(model, x=X):
    """The logits of a copy that has no calibration."""
    with torch.no_grad():
        return detach(copy.deepcopy(model)).eval()(x)


def reference(model, x=X, y=Y, seen=SEEN, absent=ABSENT):
    return _reference_gap(raw(model, x), y, seen, absent)


def assert_calibrated(model, result, **kwargs):
    gamma, error, count = reference(model, **kwargs)
    assert result.gamma == pytest.approx(gamma, rel=1e-5)
    assert result.standard_error == pytest.approx(error, rel=1e-4)
    assert result.num_samples == count
    assert get_gamma(model) == pytest.approx(result.gamma, rel=1e-6)
