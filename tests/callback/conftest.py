from __future__ import annotations

import pytest
import torch

from tests.callback.retraining import Watched


@pytest.fixture(autouse=True)
def _same_random_numbers_each_time() -> None:
    torch.manual_seed(0)


@pytest.fixture
def fits():
    Watched.fits = []
    return Watched.fits
