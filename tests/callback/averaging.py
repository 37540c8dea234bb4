"""The kinds of weight averaging, and modules that build their heads late."""

from __future__ import annotations

import io
import pickle

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging, WeightAveraging
from torch import nn

from tests.helpers.runs import NUM_CLASSES, Plain, quiet

marks = [
    quiet,
    pytest.mark.filterwarnings(
        "ignore:The verbose parameter is deprecated",
        "ignore:.*`configure_model` hook is overridden",
        "ignore:You're using the WeightAveraging callback with a model that overrides",
    ),
]

COPIES = {
    "equal": WeightAveraging,
    "equal, own buffers": lambda: WeightAveraging(use_buffers=False),
    "exponential": lambda: EMAWeightAveraging(decay=0.9),
    "exponential, own buffers": lambda: EMAWeightAveraging(decay=0.9, use_buffers=False),
    "exponential, begins late": lambda: EMAWeightAveraging(decay=0.9, update_starting_at_step=8),
}


def _is_safe(state: dict) -> bool:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    try:
        return bool(torch.load(file, weights_only=True))
    except pickle.UnpicklingError:
        return False


SCHEDULER = torch.optim.swa_utils.SWALR(torch.optim.SGD([torch.zeros(1)], 0.1), 0.05).state_dict()
# In older torch the scheduler of StochasticWeightAveraging saves a function, so its runs cannot be resumed anyway.
stochastic = pytest.mark.skipif(not _is_safe(SCHEDULER), reason="torch does not load the state of its SWALR safely")
averaging = pytest.mark.parametrize(
    "make",
    [
        *(pytest.param(make, id=name) for name, make in COPIES.items()),
        pytest.param(
            lambda: StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=2), id="stochastic", marks=stochastic
        ),
    ],
)
copies = pytest.mark.parametrize("make", COPIES.values(), ids=COPIES)


class WithoutBatchNorm(Plain):
    def build(self, dropout):
        self.body = nn.Sequential(nn.Linear(5, 16), nn.ReLU())
        self.fc = nn.Linear(16, NUM_CLASSES)


class BuiltInSetup(Plain):
    def build(self, dropout):
        self.body = nn.Sequential(nn.Linear(5, 16), nn.ReLU())

    def setup(self, stage):
        self.fc = nn.Linear(16, NUM_CLASSES)


class BuiltInConfigureModel(BuiltInSetup):
    def setup(self, stage):
        pass

    def configure_model(self):
        if not hasattr(self, "fc"):
            self.fc = nn.Linear(16, NUM_CLASSES)
