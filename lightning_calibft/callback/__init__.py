"""The Lightning callbacks."""

from lightning_calibft.callback.absent_class_calibration import AbsentClassCalibration
from lightning_calibft.callback.calibration_diagnostics import CalibrationDiagnostics

__all__ = ["AbsentClassCalibration", "CalibrationDiagnostics"]
