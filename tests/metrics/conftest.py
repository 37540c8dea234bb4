from __future__ import annotations

import pytest
import torch

from tests.helpers.references import random_case
from tests.metrics.cases import METRICS


@pytest.fixture(params=METRICS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    return random_case(0)[:2]
