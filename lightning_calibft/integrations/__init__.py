"""Calibration at the end of trainings with other trainers. Their packages are optional."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_calibft.integrations.hugging_face import AbsentClassCalibrationCallback

__all__ = ["AbsentClassCalibrationCallback"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from lightning_calibft.integrations import hugging_face

        return getattr(hugging_face, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
