"""Find gamma in one eval-mode pass over the fine-tuning data."""

from lightning_calibft.calibration.calibrate import calibrate
from lightning_calibft.calibration.result import CalibrationResult

__all__ = ["CalibrationResult", "calibrate"]
