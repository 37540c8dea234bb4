"""What the import of the functions and metrics loads: torch and torchmetrics, and nothing that trains or draws."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = (
    "lightning",
    "pytorch_lightning",
    "lightning_fabric",
    "timm",
    "torchvision",
    "matplotlib",
    "onnx",
    "transformers",
)
SCRIPT = """
import sys
import torch, torchmetrics
before = set(sys.modules)
import lightning_calibft.{room}
print(*{heavy!r} & ({{name.split(".")[0] for name in set(sys.modules) - before}}))
"""


@pytest.mark.parametrize("room", ["functional", "metrics"])
def test_light_imports(room):
    """What torchmetrics itself loads, where it is installed, is not ours."""
    script = SCRIPT.format(room=room, heavy=HEAVY)
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.split() == []
