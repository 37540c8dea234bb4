"""Store finished splits on disk, so that a run that was stopped can continue."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_calibft._format import StrPath
from lightning_calibft.checkpoint.files import replace_atomically


class SplitStore:
    """Stores one small JSON file for each finished split, or nothing if there is no folder.

    Args:
        folder: The folder of the files. It is created if necessary.
        settings: The settings that the outcomes depend on, in plain types.
    """

    def __init__(self, folder: StrPath | None, settings: Mapping[str, Any]) -> None:
        self._folder = None if folder is None else Path(folder)
        self._settings = json.loads(json.dumps(settings))  # as it will be read again

    def read(self, index: int) -> dict[str, Any] | None:
        """Return the outcome of a split, or ``None`` if it is not finished.

        Raises:
            ValueError: If the file is from a run with other settings.
        """
        if self._folder is None or not (path := self._path(index)).exists():
            return None
        try:
            outcome: dict[str, Any] = json.loads(path.read_text())
            settings, gamma, _ = outcome.pop("settings"), outcome["gamma"], outcome["num_samples"]
        except (AttributeError, KeyError, TypeError, ValueError):  # not our file, or damaged
            return None
        if not isinstance(gamma, (float, type(None))) or not isinstance(settings, dict):
            return None
        if other := [key for key in self._settings if settings.get(key) != self._settings[key]]:
            raise ValueError(
                f"Expected argument `folder` to be empty or from the same run, but {str(self._folder)!r} is from a run"
                f" with another `{other[0]}`. Name another folder, or remove this one."
            )
        return outcome

    def write(self, index: int, outcome: Mapping[str, Any]) -> None:
        """Store the outcome of a split."""
        if self._folder is None:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps({**outcome, "settings": self._settings}, indent=1)
        replace_atomically(self._path(index), lambda file: file.write(text.encode()))

    def _path(self, index: int) -> Path:
        assert self._folder is not None
        return self._folder / f"split_{index}.json"


def digest(model: nn.Module) -> str:
    """Return a short hash of the weights of a model."""
    hashed = hashlib.sha256()
    for key, value in model.state_dict().items():
        if isinstance(value, Tensor):
            hashed.update(key.encode())
            hashed.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()[:16]
