"""The checkpoint files that ``ModelCheckpoint`` keeps, each calibrated with the gamma of its own weights."""

from __future__ import annotations

import math
import os
import traceback
from collections.abc import Callable, Iterable
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_calibft.calibration.result import CalibrationResult
from lightning_calibft.callback.lightning_package import lightning_of
from lightning_calibft.checkpoint.files import ReplacedError, Signature, read_checkpoint, signature, write_atomically
from lightning_calibft.checkpoint.state import MASK, OFFSET, calibration_entries, put_calibration, state_dict_of
from lightning_calibft.head.attach import get_gamma, set_attached_gamma


class KeptCheckpoints:
    """The files that the checkpoint callbacks of a run keep.

    Args:
        trainer: The Trainer at the start of fitting, with its callbacks restored: the files they know by now are of
            an earlier run and stay as they are, unless this run writes them again.

    Attributes:
        forgetful: The callbacks that keep every file but know the latest alone.
    """

    def __init__(self, trainer: Trainer) -> None:
        kind = lightning_of(trainer).callbacks.ModelCheckpoint
        self._callbacks: list[Any] = [each for each in trainer.checkpoint_callbacks if isinstance(each, kind)]
        # These keep all files, but know the latest only.
        self.forgetful = [each for each in self._callbacks if each.save_top_k == -1 and each.monitor is None]
        self._noted: set[str] = set()
        self._earlier = {path: signature(path) for path in self._paths()}

    def note(self) -> None:
        """Remember the files of the forgetful callbacks; between any two that are written, this must be called."""
        for callback in self.forgetful:
            self._noted.add(callback.best_model_path)

    def files(self, refreshed: bool) -> list[str]:
        """Return the files of this run that still exist, without links and in the order they were written.

        Args:
            refreshed: Whether they got a gamma when they were written.
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
                f"AbsentClassCalibration writes local files only: {', '.join(remote)} stay without gamma. Save the"
                " model again with `trainer.save_checkpoint`: it is calibrated now. Or train with"
                " `refresh_on_validation=True`: then they are calibrated when they are written."
            )
        missing = [path for path in paths - self._earlier.keys() if path and path not in remote]
        if missing := sorted(path for path in missing if not os.path.exists(path)):
            rank_zero_warn(
                f"AbsentClassCalibration does not find {', '.join(missing)}, which this run has saved: moved or deleted"
                " since, they stay without gamma. Load what was moved and calibrate it with `calibrate(model, loader)`."
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
    """Load each file into ``model``, run the pass and write gamma into the file; then put the live weights back.

    Args:
        files: Full checkpoints, the same on every process.
        trainer: The trainer, for its processes.
        model: The module that wrote the files, calibrated.
        live: Its result, which serves files with the same weights too.
        run: Given the checkpoint, makes one pass with its weights, which ``model`` has at the time.

    Returns:
        The result of each file; without those, with a warning, that something else has written meanwhile.

    Raises:
        RuntimeError: If a file could not be read, calibrated or written. It is as it was, and the others are done.
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
            except Exception as error:  # the user's data and model can raise any
                _free(error)
                failed[file], cause = _told(error), cause or error
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
        told = "; ".join(f"{file!r}: {reason}" for file, reason in failed.items())
        raise RuntimeError(
            f"Could not calibrate the checkpoints {told}. These files are as they were, and the model in memory is"
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
    """Return ``live`` for the weights that the model had, else load those of the file and make a pass.

    The processes decide together, for a pass needs all of them: running statistics of BatchNorm differ between them,
    and so may what loading runs into.
    """
    decide = trainer.strategy.reduce_boolean_decision
    if decide(_same_weights(checkpoint["state_dict"], weights), all=True):
        return live
    error: Exception | None = None
    try:
        model.load_state_dict(checkpoint["state_dict"], strict=model.strict_loading)
    except Exception as raised:  # the user's hooks can raise any
        error = raised
    if not decide(error is None, all=True):
        raise error or RuntimeError("Its weights could not be loaded on another process, which says why.")
    return run(checkpoint)


def restore_calibration(trainer: Any, model: LightningModule) -> None:
    """Take gamma from the file that a model was restored from before its calibration was attached."""
    path = trainer.ckpt_path
    if trainer.state.fn != "fit" and path is not None and os.path.isfile(path):
        checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=False)  # the Trainer has loaded it
        model.load_state_dict(calibration_entries(checkpoint["state_dict"]), strict=False)


def put_calibration_of(
    model: LightningModule, results: Iterable[CalibrationResult], checkpoint: dict[str, Any]
) -> None:
    """Put into a checkpoint which of the results its weights have: those of training, of a kept file, or none."""
    gamma = get_gamma(model)
    for result in results:
        if gamma is not None and math.isclose(result.gamma, gamma, rel_tol=1e-6):
            entries = calibration_entries(checkpoint["state_dict"])
            if not any(value.any() for value in entries.values()):
                # Another callback has put its own copy of the weights here, which knows no gamma.
                entries = calibration_entries(model.state_dict())
            put_calibration(checkpoint, entries, result)
            return


def _read_by_first(file: str, trainer: Trainer) -> tuple[dict[str, Any], str | None]:
    """Return what the first process reads, on the others as much as a pass needs, or what went wrong.

    Another node may have no such file on its disk, or another one.
    """
    checkpoint, error_text = _read(file) if trainer.is_global_zero else ({}, None)
    needed = {key: checkpoint.get(key) for key in ("state_dict", "global_step")}
    needed, error_text = trainer.strategy.broadcast((needed, error_text))
    return checkpoint or needed, error_text


def _read(file: str) -> tuple[dict[str, Any], str | None]:
    """Return a checkpoint, or what is wrong with it."""
    try:
        checkpoint = read_checkpoint(file, weights_only=False)  # this run wrote it
        state_dict_of(checkpoint, file)
    except Exception as error:  # unpickling can raise any
        return {}, _told(error)
    return checkpoint, None if "state_dict" in checkpoint else "it is no checkpoint of Lightning any more"


def _write(checkpoint: dict[str, Any], file: str, replaces: Signature | None) -> str | None:
    """Return what went wrong, and nothing to tell if only a warning did; ``None`` if all went well."""
    try:
        write_atomically(checkpoint, file, replaces)
    except ReplacedError:
        rank_zero_warn(
            f"AbsentClassCalibration leaves {file} as it is: something else has written or deleted it while its gamma"
            " was found. Load what is there now and calibrate it with `calibrate(model, loader)`."
        )
        return ""
    except Exception as error:  # pickling can raise any
        return _told(error)
    return None


def _free(error: BaseException | None) -> None:
    """Let go of what the frames of an error hold: the next file may need the memory."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _told(error: Exception) -> str:
    text = str(error)
    return text if isinstance(error, (OSError, RuntimeError, ValueError)) else f"{type(error).__name__}: {text}"


def _same_weights(state: dict[str, Tensor], live: dict[str, Tensor]) -> bool:
    weights = {key: value for key, value in live.items() if not key.endswith((OFFSET, MASK))}
    # A module may save a part of itself; but what has no part of it is another model's.
    return not weights.keys().isdisjoint(state) and all(
        torch.equal(state[key], value) if isinstance(value, Tensor) and key in state else key not in state
        for key, value in weights.items()
    )
