"""Bring back the classes that fine-tuning made a classifier forget."""

from lightning_calibft.calibration import CalibrationResult, calibrate
from lightning_calibft.head import attach, detach, find_head, fold, get_gamma, set_gamma
from lightning_calibft.split import ClassSplit

__all__ = [
    "CalibrationResult",
    "ClassSplit",
    "attach",
    "calibrate",
    "detach",
    "find_head",
    "fold",
    "get_gamma",
    "set_gamma",
]
