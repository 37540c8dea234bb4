"""Find gamma in one eval-mode pass over the fine-tuning data."""

from lightning_calibft.calibration.batch import UnpackBatch, get_target, resolve_unpack_batch
from lightning_calibft.calibration.faults import IGNORE_INDEX, empty_error, target_error
from lightning_calibft.calibration.loaders import calibration_loaders, check_max_samples
from lightning_calibft.calibration.one_pass import Pass, check_head
from lightning_calibft.calibration.result import CalibrationResult
from lightning_calibft.calibration.run import calibrate

__all__ = [
    "IGNORE_INDEX",
    "CalibrationResult",
    "Pass",
    "UnpackBatch",
    "calibrate",
    "calibration_loaders",
    "check_head",
    "check_max_samples",
    "empty_error",
    "get_target",
    "resolve_unpack_batch",
    "target_error",
]
