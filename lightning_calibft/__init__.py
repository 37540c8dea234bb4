"""Bring back the classes that fine-tuning made a classifier forget."""

from lightning_calibft.calibration import CalibrationResult, calibrate
from lightning_calibft.callback import AbsentClassCalibration, CalibrationDiagnostics
from lightning_calibft.checkpoint.export import export
from lightning_calibft.checkpoint.load import fold_checkpoint, inspect_checkpoint, load_calibrated
from lightning_calibft.cross_validation import pseudo_cross_validation
from lightning_calibft.head import ZeroShotHead, attach, detach, find_head, fold, get_gamma, set_gamma
from lightning_calibft.labels.class_map import resolve_class_map
from lightning_calibft.split import ClassSplit

__all__ = [
    "AbsentClassCalibration",
    "CalibrationDiagnostics",
    "CalibrationResult",
    "ClassSplit",
    "ZeroShotHead",
    "attach",
    "calibrate",
    "detach",
    "export",
    "find_head",
    "fold",
    "fold_checkpoint",
    "get_gamma",
    "inspect_checkpoint",
    "load_calibrated",
    "pseudo_cross_validation",
    "resolve_class_map",
    "set_gamma",
]
