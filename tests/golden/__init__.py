from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

_FOLDER = Path(__file__).parent
EXPECTED: dict[str, dict[str, Any]] = json.loads((_FOLDER / "expected.json").read_text())


def load(name: str) -> dict[str, torch.Tensor]:
    with np.load(_FOLDER / f"{name}.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file}
