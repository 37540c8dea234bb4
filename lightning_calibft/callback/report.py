"""What the callback tells at the end of fitting."""

from __future__ import annotations

from collections.abc import Mapping

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from lightning_calibft.calibration import CalibrationResult


def report(
    trainer: Trainer,
    result: CalibrationResult,
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    step: int,
    files: Mapping[str, CalibrationResult],
) -> None:
    """Tell gamma and the accuracies without and with it, by step ``step``, on the console and to the loggers."""
    note = f"validation data, weights of step {step} of {trainer.global_step}"
    rank_zero_info(summary(result, before, after, note, files))
    for logger in trainer.loggers:
        logger.log_metrics(logged_values(result, before, after), step=trainer.global_step)


def summary(
    result: CalibrationResult,
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    note: str,
    files: Mapping[str, CalibrationResult],
) -> str:
    """Return a plain text table of gamma, the accuracies without and with it, and the calibrated files."""
    split = result.split
    lines = [
        f"Absent-class calibration ({result.estimator}): gamma = {result.gamma:.3f} ± {result.standard_error:.3f}"
        f" from {result.num_samples:,} samples; {len(split.seen_classes)} classes seen,"
        f" {len(split.absent_classes)} absent"
    ]
    if before:
        width = max(map(len, before))
        lines += [f"  {'':{width}}  gamma 0  calibrated"]
        lines += [f"  {name:{width}}  {float(before[name]):7.4f}  {float(after[name]):10.4f}" for name in before]
        lines += [f"  ({note})"]
    lines += [f"  {file}: gamma = {of_file.gamma:.3f}" for file, of_file in files.items()]
    return "\n".join(lines)


def logged_values(
    result: CalibrationResult, before: Mapping[str, Tensor], after: Mapping[str, Tensor]
) -> dict[str, float]:
    """Return the same numbers for loggers."""
    return {
        "gamma": result.gamma,
        "gamma_standard_error": result.standard_error,
        **{f"{name}_uncalibrated": float(value) for name, value in before.items()},
        **{f"{name}_calibrated": float(value) for name, value in after.items()},
    }
