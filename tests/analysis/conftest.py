from __future__ import annotations

import matplotlib
import pytest
import torch


@pytest.fixture(autouse=True)
def _same_random_numbers_each_time() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _close_figures():
    matplotlib.use("Agg")
    yield
    matplotlib.pyplot.close("all")
