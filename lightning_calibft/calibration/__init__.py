"""Find gamma in one eval-mode pass over the fine-tuning data."""

from lightning_calibft.calibration.batch import BatchReader, UnpackBatch
from lightning_calibft.calibration.checks import head_width
from lightning_calibft.calibration.faults import empty_error, target_error, warn_if_positions
from lightning_calibft.calibration.joined import JoinedBatches
from lightning_calibft.calibration.loaders import calibration_loaders, check_max_samples, sample_indices
from lightning_calibft.calibration.lockstep import Lockstep, same_for_all
from lightning_calibft.calibration.one_pass import Pass, check_head
from lightning_calibft.calibration.result import CalibrationResult, result_of
from lightning_calibft.calibration.run import calibrate
from lightning_calibft.calibration.stopping import check_tolerance

__all__ = [
    "BatchReader",
    "CalibrationResult",
    "JoinedBatches",
    "Lockstep",
    "Pass",
    "UnpackBatch",
    "calibrate",
    "calibration_loaders",
    "check_head",
    "check_max_samples",
    "check_tolerance",
    "empty_error",
    "head_width",
    "result_of",
    "same_for_all",
    "sample_indices",
    "target_error",
    "warn_if_positions",
]
