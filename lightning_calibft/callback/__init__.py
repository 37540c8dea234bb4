"""The Lightning callbacks."""

from lightning_calibft.callback.callback import AbsentClassCalibration
from lightning_calibft.callback.diagnostics import CalibrationDiagnostics

__all__ = ["AbsentClassCalibration", "CalibrationDiagnostics"]
