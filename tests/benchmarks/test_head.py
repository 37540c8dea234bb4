"""What the attached and the folded head cost at inference, against the bare one."""

from __future__ import annotations

from copy import deepcopy

import pytest
import timm
import torch
from torch import nn

from lightning_calibft import fold, set_gamma
from tests.benchmarks.conftest import DEVICES

SEEN = list(range(500))


def linear() -> tuple[nn.Module, torch.Tensor, int]:
    return nn.Linear(2048, 1000), torch.randn(1, 2048), 300


def resnet18() -> tuple[nn.Module, torch.Tensor, int]:
    return timm.create_model("resnet18", num_classes=1000), torch.randn(1, 3, 224, 224), 5


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("make", [linear, resnet18])
@pytest.mark.parametrize(
    ("kind", "budget"), [("attached", "none"), ("compiled", "1.02"), ("folded", "1.00")], ids=lambda x: x
)
def test_inference(ratio, make, kind, budget, device):
    """Inference of one sample, with gamma against the bare model."""
    bare, inputs, calls = make()
    bare = bare.to(device).eval()
    ours = set_gamma(deepcopy(bare), 1.0, SEEN)
    if kind == "folded":
        ours = fold(ours)
    if kind == "compiled":
        bare, ours = torch.compile(bare), torch.compile(ours)
    inputs = inputs.to(device)

    def run(model):
        with torch.inference_mode():
            for _ in range(calls):
                model(inputs)

    ratio(lambda: run(ours), lambda: run(bare), rounds=21, budget=budget)
