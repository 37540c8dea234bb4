"""Calibrate the checkpoint files that ``ModelCheckpoint`` keeps, each with the gamma of its own weights."""

from __future__ import annotations

import copy
import inspect
import math
import os
import pickle
import shutil
import tempfile
import traceback
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from fsspec.core import url_to_fs
from lightning_utilities.core.apply_func import apply_to_collection
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lightning_calibft._format import METADATA_KEY
from lightning_calibft.calibration.distributed import SharedErrors
from lightning_calibft.calibration.result import CalibrationResult
from lightning_calibft.callback.lightning_package import LightningModule, Trainer, lightning_of
from lightning_calibft.checkpoint.files import ReplacedError, Signature, read_checkpoint, signature, write_atomically
from lightning_calibft.checkpoint.state import calibration_entries, put_calibration, state_dict_of
from lightning_calibft.head.attach import get_gamma, set_attached_gamma
from lightning_calibft.head.evaluation import unchanged
from lightning_calibft.split import ClassSplit


class KeptFile(NamedTuple):
    """A file that a ``ModelCheckpoint`` callback keeps.

    Attributes:
        path: Its path, with links resolved, or its address.
        own: Whether this run wrote it. If not, it is from the run that this one resumes.
    """

    path: str
    own: bool


class KeptCheckpoints:
    """The files that the ``ModelCheckpoint`` callbacks of a run keep.

    Args:
        trainer: The Trainer at the start of a fit, with its callbacks restored. Files that the callbacks know by then
            are from an earlier run.

    Attributes:
        forgetful: The callbacks that keep all files but remember only the latest one.
    """

    def __init__(self, trainer: Trainer) -> None:
        kind = lightning_of(trainer).callbacks.ModelCheckpoint
        self._callbacks: list[Any] = [each for each in trainer.checkpoint_callbacks if isinstance(each, kind)]
        self.forgetful = [each for each in self._callbacks if each.save_top_k == -1 and each.monitor is None]
        self._plain = _is_plain(trainer)
        self._noted: set[str] = set()
        self._earlier = {path: signature(path) for path in self._paths()}

    def note(self) -> None:
        """Remember the latest file of each forgetful callback. Call this before such a callback writes another file."""
        for callback in self.forgetful:
            self._noted.add(callback.best_model_path)

    def files(self) -> list[KeptFile]:
        """Return the files of this run that still exist, in the order in which they were written.

        A file of the run that this one resumes is among them if a callback could still return it as its best or last
        one. Warns about files of this run that are missing.
        """
        found, missing = dict[str, KeptFile](), []
        for path in sorted(self._paths()):
            own = path not in self._earlier or signature(path) != self._earlier[path]
            if not self._exists(path):
                missing += [path] if path not in self._earlier else []
            elif own or path in self._referred():
                real = path if _is_remote(path) else os.path.realpath(path)
                found[real] = KeptFile(real, own or (real in found and found[real].own))
        if missing:
            rank_zero_warn(
                f"AbsentClassCalibration does not find {', '.join(missing)}, which this run has saved. What was moved"
                " or deleted stays without gamma. Load a moved file and calibrate it with `calibrate(model, loader)`."
            )
        return sorted(found.values(), key=lambda file: signature(file.path) or ())

    def _exists(self, path: str) -> bool:
        if _is_remote(path):
            filesystem, inside = url_to_fs(path)
            return bool(filesystem.exists(inside))
        return os.path.isfile(path) or not self._plain  # a custom `CheckpointIO` may write to another name

    def _referred(self) -> set[str]:
        """Return the files that a callback could return as its best or last one."""
        named = ((each.best_model_path, each.last_model_path, *each.best_k_models) for each in self._callbacks)
        return set(chain.from_iterable(named)) - {""}

    def _paths(self) -> set[str]:
        self.note()
        return (self._noted | self._referred()) - {""}


def calibrate_files(
    files: Iterable[KeptFile],
    trainer: Trainer,
    model: LightningModule,
    split: ClassSplit,
    *,
    run: Callable[[bool], CalibrationResult],
    attach: Callable[[], None],
    is_foreign: Callable[[dict[str, Any]], bool],
) -> dict[str, CalibrationResult]:
    """Load each file into ``model``, find its gamma, and write gamma into the file. Then restore the live model.

    Args:
        files: Full checkpoints. The list is the same on every process.
        trainer: The Trainer, whose strategy connects the processes and reads and writes the files.
        model: The module that wrote the files. It is calibrated.
        split: The seen and the absent classes.
        run: Called while ``model`` has the weights of a file. Returns the result for these weights. The argument says
            whether the weights are all that a file brings into the model.
        attach: Called when ``model`` may have built a new head to load a file into.
        is_foreign: Returns whether a checkpoint is of another run. It is left as it is, with a warning.

    Returns:
        The result for each file. Files that something else changed in the meantime are left out, with a warning.

    Raises:
        RuntimeError: If a file of this run could not be read, calibrated or written. It is unchanged, and the others
            are done.
    """
    results: dict[str, CalibrationResult] = {}
    failed: dict[str, str] = {}
    left: dict[str, str] = {}
    cause: Exception | None = None
    hooks = _load_hooks(trainer, model)
    for path, own in files:
        found = signature(path)
        try:
            checkpoint = _read_by_first(path, trainer, whole=bool(hooks))
            if SharedErrors().gather(lambda: trainer.is_global_zero and is_foreign(checkpoint))[0]:  # noqa: B023
                left[path] = "another run has written it in the meantime, with other classes"
                continue
            before = checkpoint["state_dict"], checkpoint.get(METADATA_KEY)
            with _loaded(checkpoint, trainer, model, hooks, attach):
                result = run(not hooks)
                set_attached_gamma(model, result.gamma, split, result.as_dict())
                checkpoint["state_dict"] = copy.copy(before[0])
                put_calibration(checkpoint, calibration_entries(model.state_dict()), result)
            _write_by_first(checkpoint, before, path, trainer, found)
            results[path] = result
        except ReplacedError:
            rank_zero_warn(
                f"AbsentClassCalibration leaves {path} as it is: something else has written or deleted it while its"
                " gamma was being found. Load the new file and calibrate it with `calibrate(model, loader)`."
            )
        except Exception as error:  # the user's data and model can raise anything
            _free(error)
            (failed if own else left)[path] = message_of(error)
            cause = cause or (error if own else None)
    if left:
        rank_zero_warn(
            f"AbsentClassCalibration leaves checkpoints of other runs as they are, {_listed(left)}. If one of them is"
            " to be calibrated, load it and call `calibrate(model, loader)`."
        )
    if failed:
        raise RuntimeError(
            f"Could not calibrate the checkpoints {_listed(failed)}. These files are unchanged, and the model in memory"
            " is calibrated: `trainer.save_checkpoint` saves it with its gamma."
        ) from cause
    return results


def _listed(reasons: Mapping[str, str]) -> str:
    return "; ".join(f"{path!r}: {reason.removesuffix('.')}" for path, reason in reasons.items())


def _load_hooks(trainer: Any, model: LightningModule) -> list[Any]:
    """Return the module and the callbacks that do more than Lightning does when a checkpoint is loaded."""
    lightning = lightning_of(trainer)
    ours = (f"{lightning.__name__}.", "lightning_calibft.")
    hooked = [each for each in trainer.callbacks if not _hook(each).__module__.startswith(ours)]
    return [model] * (_hook(model) is not lightning.LightningModule.on_load_checkpoint) + hooked


def _hook(owner: Any) -> Any:
    return getattr(owner.on_load_checkpoint, "__func__", owner.on_load_checkpoint)


@contextmanager
def _loaded(
    checkpoint: dict[str, Any],
    trainer: Trainer,
    model: LightningModule,
    hooks: Sequence[Any],
    attach: Callable[[], None],
) -> Iterator[None]:
    """Load a checkpoint as the Trainer does, with the hooks of the module and the callbacks; then restore the model.

    A callback is copied, since only the model can be restored. Loading may fail on one process only, but the pass that
    follows needs all of them.
    """
    given = checkpoint
    if hooks:  # they may change what they are given
        given = apply_to_collection(checkpoint, Tensor, lambda tensor: tensor, allow_frozen=True)
        given["state_dict"] = copy.copy(checkpoint["state_dict"])
        given["state_dict"].update(apply_to_collection(dict(given["state_dict"]), Tensor, Tensor.clone))
    errors = SharedErrors()
    with _restored(model):
        with errors.shared():
            if model in hooks:
                model.on_load_checkpoint(given)
                attach()
            model.load_state_dict(given["state_dict"], strict=model.strict_loading)
            for callback in hooks:
                if callback is not model:
                    copied = copy.deepcopy(callback, {id(trainer): trainer, id(model): model})
                    copied.on_load_checkpoint(trainer, model, given)
        try:
            errors.agree()
        except (ValueError, RuntimeError):
            raise RuntimeError("Its weights could not be loaded on another process. See the error there.") from None
        yield


@contextmanager
def _restored(model: LightningModule) -> Iterator[None]:
    """Put the parameters, buffers, submodules and attributes of a model back as they were, without its load hooks."""
    containers = _containers([vars(module) for module in model.modules()])  # those of parameters and submodules, too
    contents = [copy.copy(container) for container in containers]
    values = [(tensor, tensor.detach().to("cpu", copy=True)) for tensor in (*model.parameters(), *model.buffers())]
    extra = [
        (module, copy.deepcopy(module.get_extra_state()))
        for module in model.modules()
        if type(module).get_extra_state is not nn.Module.get_extra_state
    ]
    with unchanged(model):
        try:
            yield
        finally:
            for container, content in zip(containers, contents, strict=True):
                container.clear()
                container.update(content) if hasattr(container, "update") else container.extend(content)
            with torch.no_grad():
                for tensor, value in values:
                    tensor.copy_(value)
            for module, state in extra:
                module.set_extra_state(state)


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


def _containers(values: Iterable[Any]) -> list[Any]:
    """Return the containers in containers, and in each other."""
    found: dict[int, Any] = {}
    waiting = list(values)
    while waiting:
        outer = waiting.pop()
        for value in outer.values() if isinstance(outer, dict) else outer:
            if type(value) in (dict, list, set, deque, OrderedDict, defaultdict) and id(value) not in found:
                found[id(value)] = value
                waiting.append(value)
    return list(found.values())


def _read_by_first(path: str, trainer: Trainer, whole: bool) -> dict[str, Any]:
    """Read a checkpoint on the first process. The disk of another node may not have the file.

    Args:
        path: The file.
        trainer: The Trainer.
        whole: Whether the other processes get the whole checkpoint. Otherwise they only get the weights.

    Raises:
        ValueError, OSError: If the first process cannot read it.
        RuntimeError: If another process cannot.
    """
    errors, checkpoint, packed = SharedErrors(), dict[str, Any](), b""
    with errors.shared():
        if trainer.is_global_zero:
            checkpoint = _read(path, trainer)
            if trainer.world_size > 1:
                packed = pickle.dumps(checkpoint if whole else {"state_dict": checkpoint["state_dict"]})
    errors.agree()
    packed = trainer.strategy.broadcast(packed)
    return checkpoint or pickle.loads(packed)


def _read(path: str, trainer: Trainer) -> dict[str, Any]:
    if _is_plain(trainer) and not _is_remote(path):
        checkpoint = read_checkpoint(path, weights_only=False)  # this run wrote it
    else:
        checkpoint_io = _checkpoint_io(trainer)
        accepted = inspect.signature(checkpoint_io.load_checkpoint).parameters
        options = {"weights_only": False} if "weights_only" in accepted else {}
        checkpoint = checkpoint_io.load_checkpoint(path, **options)
    state_dict_of(checkpoint, path)
    if "state_dict" not in checkpoint:
        raise ValueError("it is no longer a Lightning checkpoint")
    return checkpoint


def _write_by_first(
    checkpoint: dict[str, Any],
    before: tuple[Mapping[str, Any], Any],
    path: str,
    trainer: Trainer,
    replaces: Signature | None,
) -> None:
    """Write a checkpoint on the first process, unless it has the calibration already.

    Raises:
        ReplacedError: On all processes, if something else has written or deleted the file.
        Exception: If the first process cannot write it. All processes raise an error.
    """
    error: Exception | None = None
    if trainer.is_global_zero:
        try:
            if not _is_same(before, (checkpoint["state_dict"], checkpoint[METADATA_KEY])):
                _write(checkpoint, path, trainer, replaces)
        except Exception as raised:  # pickling can raise anything
            error = raised
    text = trainer.strategy.broadcast(None if error is None else message_of(error))
    replaced = trainer.strategy.broadcast(isinstance(error, ReplacedError))
    if replaced:
        raise ReplacedError(path)
    if text is not None:
        raise error or RuntimeError(text)


def _write(checkpoint: dict[str, Any], path: str, trainer: Trainer, replaces: Signature | None) -> None:
    checkpoint_io = _checkpoint_io(trainer)
    if _is_remote(path):
        checkpoint_io.save_checkpoint(checkpoint, path)
        checkpoint_io.teardown()  # it may write later, until it is torn down
        return
    if _is_plain(trainer):
        write_atomically(checkpoint, path, replaces)
        return
    target = Path(path)
    with tempfile.TemporaryDirectory(prefix=".", suffix=".tmp", dir=target.parent) as folder:
        checkpoint_io.save_checkpoint(checkpoint, os.path.join(folder, target.name))
        checkpoint_io.teardown()
        if replaces is not None and signature(path) != replaces:
            raise ReplacedError(path)
        for written in Path(folder).iterdir():  # it may have added a suffix, or written a folder
            former = target.with_name(written.name)
            if former.is_dir():  # a folder cannot be replaced at once
                former.rename(f"{written}.former")
            elif former.exists():
                shutil.copymode(former, written)
            os.replace(written, former)


def _checkpoint_io(trainer: Trainer) -> Any:
    """Return what reads and writes the checkpoints of a Trainer, without the wrapper that writes in the background."""
    checkpoint_io: Any = trainer.strategy.checkpoint_io
    asynchronous = lightning_of(trainer).plugins.io.AsyncCheckpointIO
    return checkpoint_io.checkpoint_io if type(checkpoint_io) is asynchronous else checkpoint_io


def _is_plain(trainer: Trainer) -> bool:
    """Return whether files are written with ``torch.save`` alone."""
    return type(_checkpoint_io(trainer)) is lightning_of(trainer).plugins.io.TorchCheckpointIO


def _is_remote(path: str) -> bool:
    return "://" in path


def _is_same(one: tuple[Mapping[str, Any], Any], other: tuple[Mapping[str, Any], Any]) -> bool:
    """Return whether two checkpoints have the same calibration."""
    entries, others = calibration_entries(one[0]), calibration_entries(other[0])
    same = entries.keys() == others.keys() and all(torch.equal(entries[key], others[key]) for key in entries)
    return same and one[1] == other[1]


def _free(error: BaseException | None) -> None:
    """Free the memory that the frames of an error hold. The next file may need it."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def message_of(error: Exception) -> str:
    """Return what is wrong, with the type of the error where its text alone may not say it."""
    text = str(error)
    return text if isinstance(error, (OSError, RuntimeError, ValueError)) else f"{type(error).__name__}: {text}"
