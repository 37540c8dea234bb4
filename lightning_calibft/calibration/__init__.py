"""Find gamma in one eval-mode pass over the fine-tuning data."""

from lightning_calibft.calibration.batch_reader import BatchReader, UnpackBatch
from lightning_calibft.calibration.batched_updates import BatchedUpdates
from lightning_calibft.calibration.calibrate import calibrate
from lightning_calibft.calibration.data_check import empty_error, target_error, warn_if_positions
from lightning_calibft.calibration.distributed import ShardedReading, first_batch_of_any
from lightning_calibft.calibration.evaluation_pass import EvaluationPass, check_head, check_tolerance, head_width
from lightning_calibft.calibration.loaders import calibration_loaders, check_max_samples, sample_indices
from lightning_calibft.calibration.result import CalibrationResult, result_of

__all__ = [
    "BatchReader",
    "BatchedUpdates",
    "CalibrationResult",
    "EvaluationPass",
    "ShardedReading",
    "UnpackBatch",
    "calibrate",
    "calibration_loaders",
    "check_head",
    "check_max_samples",
    "check_tolerance",
    "empty_error",
    "first_batch_of_any",
    "head_width",
    "result_of",
    "sample_indices",
    "target_error",
    "warn_if_positions",
]
