"""Bring back the classes that fine-tuning made a classifier forget."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_calibft import analysis, estimators, functional, metrics  # noqa: F401
    from lightning_calibft.calibration import CalibrationResult, calibrate
    from lightning_calibft.callback import AbsentClassCalibration, CalibrationDiagnostics
    from lightning_calibft.checkpoint.export import export
    from lightning_calibft.checkpoint.fold_checkpoint import fold_checkpoint
    from lightning_calibft.checkpoint.inspect import inspect_checkpoint
    from lightning_calibft.checkpoint.load import load_calibrated
    from lightning_calibft.checkpoint.set_absent_share import set_absent_share
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
    "set_absent_share",
    "set_gamma",
]

# Where each name is. It is imported when it is first used, so that `calibft --version` need not wait for torch.
_MODULE_OF = {
    "AbsentClassCalibration": "callback",
    "CalibrationDiagnostics": "callback",
    "CalibrationResult": "calibration",
    "ClassSplit": "split",
    "ZeroShotHead": "head",
    "attach": "head",
    "calibrate": "calibration",
    "detach": "head",
    "export": "checkpoint.export",
    "find_head": "head",
    "fold": "head",
    "fold_checkpoint": "checkpoint.fold_checkpoint",
    "get_gamma": "head",
    "inspect_checkpoint": "checkpoint.inspect",
    "load_calibrated": "checkpoint.load",
    "pseudo_cross_validation": "cross_validation",
    "resolve_class_map": "labels.class_map",
    "set_absent_share": "checkpoint.set_absent_share",
    "set_gamma": "head",
}
_SUBPACKAGES = ("analysis", "estimators", "functional", "metrics")


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    if name in _SUBPACKAGES:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_SUBPACKAGES})
