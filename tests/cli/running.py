"""Running the command."""

from __future__ import annotations

import timm
import torch

from lightning_calibft.cli import main
from tests.shipping.consumer import NUM_CLASSES

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
READ = ["--num-workers", "0", "--img-size", "32", "--no-progress", "--device", "cpu"]


def run(*words):
    return main([str(word) for word in words])


def plain(path):
    return timm.create_model("test_resnet", num_classes=NUM_CLASSES, checkpoint_path=str(path)).eval()
