"""The Lightning callback."""

from lightning_calibft.callback.callback import AbsentClassCalibration

__all__ = ["AbsentClassCalibration"]
