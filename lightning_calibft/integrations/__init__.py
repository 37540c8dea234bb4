"""Calibration at the end of trainings with other trainers. Their packages are optional."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_calibft.integrations.hugging_face import (
        AbsentClassCalibrationCallback as AbsentClassCalibrationCallback,
    )


def __getattr__(name: str) -> Any:
    if name == "AbsentClassCalibrationCallback":
        from lightning_calibft.integrations import hugging_face

        return hugging_face.AbsentClassCalibrationCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
