"""Calibrate the checkpoint files that ``ModelCheckpoint`` keeps, each with the gamma of its own weights."""

from __future__ import annotations

import math
import os
import traceback
from collections.abc import Callable, Iterable
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_calibft.calibration.result import CalibrationResult
from lightning_calibft.callback.lightning_package import LightningModule, Trainer, lightning_of
from lightning_calibft.checkpoint.files import ReplacedError, Signature, read_checkpoint, signature, write_atomically
from lightning_calibft.checkpoint.state import MASK, OFFSET, calibration_entries, put_calibration, state_dict_of
from lightning_calibft.head.attach import get_gamma, set_attached_gamma


class KeptCheckpoints:
    """The files that the ``ModelCheckpoint`` callbacks of a run keep.

    Args:
        trainer: The Trainer at the start of a fit, with its callbacks restored. Files that the callbacks know by then
            are from an earlier run. They are left out, unless this run writes them again.

    Attributes:
        forgetful: The callbacks that keep all files but remember only the latest one.
    """

    def __init__(self, trainer: Trainer) -> None:
        kind = lightning_of(trainer).callbacks.ModelCheckpoint
        self._callbacks: list[Any] = [each for each in trainer.checkpoint_callbacks if isinstance(each, kind)]
        self.forgetful = [each for each in self._callbacks if each.save_top_k == -1 and each.monitor is None]
        self._noted: set[str] = set()
        self._earlier = {path: signature(path) for path in self._paths()}

    def note(self) -> None:
        """Remember the latest file of each forgetful callback. Call this before such a callback writes another file."""
        for callback in self.forgetful:
            self._noted.add(callback.best_model_path)

    def files(self, refreshed: bool) -> list[str]:
        """Return the real paths of this run's files that still exist, in the order in which they were written.

        Warns about files that are missing, and about remote files, which cannot be calibrated.

        Args:
            refreshed: Whether the files had a gamma when they were written. Remote files then need no warning.
        """
        paths = self._paths()
        found = {
            os.path.realpath(path)
            for path in paths
            if os.path.isfile(path) and signature(path) != self._earlier.get(path)
        }
        remote = [path for path in paths if "://" in path]
        if remote and not refreshed:
            rank_zero_warn(
                f"AbsentClassCalibration writes local files only: {', '.join(remote)} stay without gamma. The model in"
                " memory is calibrated, so save it again with `trainer.save_checkpoint`. Or train with"
                " `refresh_on_validation=True`, so that checkpoints have their gamma when they are written."
            )
        missing = [path for path in paths - self._earlier.keys() if path and path not in remote]
        if missing := sorted(path for path in missing if not os.path.exists(path)):
            rank_zero_warn(
                f"AbsentClassCalibration does not find {', '.join(missing)}, which this run has saved. What was moved"
                " or deleted stays without gamma. Load a moved file and calibrate it with `calibrate(model, loader)`."
            )
        return sorted(found, key=os.path.getmtime)

    def _paths(self) -> set[str]:
        self.note()
        return self._noted.union(
            *((each.best_model_path, each.last_model_path, *each.best_k_models) for each in self._callbacks)
        )


def calibrate_files(
    files: Iterable[str],
    trainer: Trainer,
    model: LightningModule,
    live: CalibrationResult,
    run: Callable[[dict[str, Any]], CalibrationResult],
) -> dict[str, CalibrationResult]:
    """Load each file into ``model``, find its gamma, and write gamma into the file. Then restore the live weights.

    Args:
        files: Full checkpoints. The list is the same on every process.
        trainer: The Trainer, whose strategy connects the processes.
        model: The module that wrote the files. It is calibrated.
        live: The result for ``model``. Files with the same weights get it, too.
        run: Called with a checkpoint while ``model`` has its weights. Returns the result for these weights.

    Returns:
        The result for each file. Files that something else changed in the meantime are left out, with a warning.

    Raises:
        RuntimeError: If a file could not be read, calibrated or written. It is unchanged, and the others are done.
    """
    weights = {
        key: value.detach().cpu().clone() if isinstance(value, Tensor) else value
        for key, value in model.state_dict().items()
    }
    results: dict[str, CalibrationResult] = {}
    failed: dict[str, str] = {}
    cause: Exception | None = None
    try:
        for file in files:
            found = signature(file)
            checkpoint, error_text = _read_by_first(file, trainer)
            if error_text is not None:
                failed[file] = error_text
                continue
            try:
                results[file] = _result_of_file(checkpoint, trainer, model, weights, live, run)
            except Exception as error:  # the user's data and model can raise anything
                _free(error)
                failed[file], cause = _message_of(error), cause or error
                continue
            set_attached_gamma(model, results[file].gamma, live.split)
            put_calibration(checkpoint, calibration_entries(model.state_dict()), results[file])
            error_text = _write(checkpoint, file, found) if trainer.is_global_zero else None
            if (error_text := trainer.strategy.broadcast(error_text)) is not None:
                del results[file]
                if error_text:
                    failed[file] = error_text
    finally:
        model.load_state_dict(weights, strict=model.strict_loading)
    if failed:
        reasons = "; ".join(f"{file!r}: {reason}" for file, reason in failed.items())
        raise RuntimeError(
            f"Could not calibrate the checkpoints {reasons}. These files are unchanged, and the model in memory is"
            " calibrated: `trainer.save_checkpoint` saves it with its gamma."
        ) from cause
    return results


def _result_of_file(
    checkpoint: dict[str, Any],
    trainer: Trainer,
    model: LightningModule,
    weights: dict[str, Any],
    live: CalibrationResult,
    run: Callable[[dict[str, Any]], CalibrationResult],
) -> CalibrationResult:
    """Return ``live`` if the file has the live weights. Otherwise load the weights of the file and make a pass.

    The processes decide together, since a pass needs all of them. They could come to different answers: the running
    statistics of BatchNorm differ between them, and loading may fail on one of them only.
    """
    decide = trainer.strategy.reduce_boolean_decision
    if decide(_same_weights(checkpoint["state_dict"], weights), all=True):
        return live
    error: Exception | None = None
    try:
        model.load_state_dict(checkpoint["state_dict"], strict=model.strict_loading)
    except Exception as raised:  # the user's hooks can raise anything
        error = raised
    if not decide(error is None, all=True):
        raise error or RuntimeError("Its weights could not be loaded on another process. See the error there.")
    return run(checkpoint)


def restore_calibration(trainer: Any, model: LightningModule) -> None:
    """Load gamma from the file that a model was restored from before its calibration was attached."""
    path = trainer.ckpt_path
    if trainer.state.fn != "fit" and path is not None and os.path.isfile(path):
        checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=False)  # the Trainer has loaded it
        model.load_state_dict(calibration_entries(checkpoint["state_dict"]), strict=False)


def put_calibration_of(
    model: LightningModule, results: Iterable[CalibrationResult], checkpoint: dict[str, Any]
) -> None:
    """Put the result whose gamma ``model`` has now into a checkpoint that is being saved, if there is one."""
    gamma = get_gamma(model)
    for result in results:
        if gamma is not None and math.isclose(result.gamma, gamma, rel_tol=1e-6):
            entries = calibration_entries(checkpoint["state_dict"])
            if not any(value.any() for value in entries.values()):
                # Another callback has put its own copy of the weights here, which has no gamma.
                entries = calibration_entries(model.state_dict())
            put_calibration(checkpoint, entries, result)
            return


def _read_by_first(file: str, trainer: Trainer) -> tuple[dict[str, Any], str | None]:
    """Read a checkpoint on the first process, and return it or the error text.

    The other processes get only the entries that a pass needs. The disk of another node may not have this file.
    """
    checkpoint, error_text = _read(file) if trainer.is_global_zero else ({}, None)
    needed = {key: checkpoint.get(key) for key in ("state_dict", "global_step")}
    needed, error_text = trainer.strategy.broadcast((needed, error_text))
    return checkpoint or needed, error_text


def _read(file: str) -> tuple[dict[str, Any], str | None]:
    """Return a checkpoint and ``None``, or an empty one and what is wrong with the file."""
    try:
        checkpoint = read_checkpoint(file, weights_only=False)  # this run wrote it
        state_dict_of(checkpoint, file)
    except Exception as error:  # unpickling can raise anything
        return {}, _message_of(error)
    return checkpoint, None if "state_dict" in checkpoint else "it is no longer a Lightning checkpoint"


def _write(checkpoint: dict[str, Any], file: str, replaces: Signature | None) -> str | None:
    """Write a checkpoint. Return an error text, ``""`` after a warning, or ``None`` if all went well."""
    try:
        write_atomically(checkpoint, file, replaces)
    except ReplacedError:
        rank_zero_warn(
            f"AbsentClassCalibration leaves {file} as it is: something else has written or deleted it while its gamma"
            " was being found. Load the new file and calibrate it with `calibrate(model, loader)`."
        )
        return ""
    except Exception as error:  # pickling can raise anything
        return _message_of(error)
    return None


def _free(error: BaseException | None) -> None:
    """Free the memory that the frames of an error hold. The next file may need it."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _message_of(error: Exception) -> str:
    text = str(error)
    return text if isinstance(error, (OSError, RuntimeError, ValueError)) else f"{type(error).__name__}: {text}"


def _same_weights(state: dict[str, Tensor], live: dict[str, Tensor]) -> bool:
    weights = {key: value for key, value in live.items() if not key.endswith((OFFSET, MASK))}
    # A module may save only a part of its weights. A state without any of them is that of another model.
    return not weights.keys().isdisjoint(state) and all(
        torch.equal(state[key], value) if isinstance(value, Tensor) and key in state else key not in state
        for key, value in weights.items()
    )
