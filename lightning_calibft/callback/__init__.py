"""The Lightning callbacks."""

from lightning_calibft.callback.calibration_diagnostics import CalibrationDiagnostics
from lightning_calibft.callback.callback import AbsentClassCalibration

__all__ = ["AbsentClassCalibration", "CalibrationDiagnostics"]
