"""The one eval-mode pass over the fine-tuning data, with or without Lightning."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial, wraps
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.func import functional_call
from torchmetrics import Metric, MetricCollection
from tqdm.auto import tqdm

from lightning_calibft.calibration.batch import BatchReader, call_forward
from lightning_calibft.calibration.checks import check_pretrained, head_width
from lightning_calibft.calibration.faults import AbsentSamples, Faults, empty_error, target_error, warn_if_positions
from lightning_calibft.calibration.joined import JoinedBatches
from lightning_calibft.calibration.loaders import all_reduce, batches_of, rank_and_world_size
from lightning_calibft.calibration.lockstep import Lockstep
from lightning_calibft.calibration.processes import Processes
from lightning_calibft.calibration.result import CalibrationResult, result_of
from lightning_calibft.calibration.stopping import is_settled, when_to_look
from lightning_calibft.estimators import (
    Estimator,
    check_estimator_width,
    make_estimator,
    needs_absent_samples,
    needs_pretrained_logits,
)
from lightning_calibft.head import CHILD_NAME, attached_heads, evaluation, is_layer, probe, record_logits
from lightning_calibft.head.probe import NotFiniteError, gives_output, is_proved
from lightning_calibft.head.record import LogitRecorder, one_forward
from lightning_calibft.labels.class_map import IGNORE_INDEX
from lightning_calibft.split import ClassSplit

PROBE_ROWS = 4
UNPACK_OR_HEAD_REMEDY = "Pass the `unpack_batch` that fits this model, or another `head`."


@dataclass
class Pass:
    """One reading of the fine-tuning data; see :func:`calibrate` for the fields that the two share."""

    model: nn.Module
    loaders: list[Iterable[Any]]
    estimator: str | Estimator = "alg"
    estimator_kwargs: Mapping[str, Any] | None = None
    reader: BatchReader = field(default_factory=BatchReader)
    max_samples: int | None = None
    max_batches: int | None = None  # of each loader
    tolerance: float | None = None  # stop when the standard error of gamma is no larger
    validation: bool = False  # whether these are samples of all classes
    progress: bool = True
    pretrained: Mapping[str, Tensor] | None = None  # the weights from before fine-tuning, as a state dict of `model`
    transfer: Callable[[Any], Any] | None = None  # moves a batch to the model's device
    context: Callable[[], AbstractContextManager[Any]] = nullcontext  # around each forward: autocast and the like
    lockstep: Lockstep | None = None  # of processes that hold parts of one model
    device: torch.device = field(init=False)
    num_classes: int = field(init=False)

    def __post_init__(self) -> None:
        head = next(iter(attached_heads(self.model).values()))
        self.device = next(head.buffers()).device  # the calibration's own, if it has no others
        self.num_classes = head_width(self.model)
        check_estimator_width(self.estimator, self.num_classes)
        check_pretrained(self.estimator, self.pretrained, self.model)

    def read_classes(self) -> list[int]:
        """Return the classes in the data. The standard error needs them before the first sample.

        Raises:
            ValueError: If a label is no row of the head, or there are none; or as in :meth:`feed`.
        """
        met, others = torch.zeros(self.num_classes, dtype=torch.long), Processes(self.device)
        with others.told_to_others(), evaluation(self.model):  # transfer hooks may mix labels while training
            for batch in self._batches("Reading labels"):
                target = self.reader.rows(batch).cpu()
                target = target[target != IGNORE_INDEX]
                if len(outside := target[(target < 0) | (target >= self.num_classes)]):
                    raise target_error(self.num_classes, int(outside[0]))
                met[target] = 1
        others.meet()
        met = all_reduce(met.to(self.device))
        if not met.any():
            raise empty_error()
        classes = met.nonzero().flatten().tolist()
        if not self.reader.maps:
            warn_if_positions(classes, self.num_classes)
        return classes

    def run(self, split: ClassSplit) -> CalibrationResult:
        """Run the model over the data and return the result; nothing about the model changes."""
        estimator = make_estimator(self.estimator, split, self.estimator_kwargs).to(self.device)
        self.feed(estimator, split)
        return result_of(estimator, self.estimator)

    def _batches(self, what: str) -> Iterator[Any]:
        """Yield this process' batches on the device, of each loader up to its share of ``max_samples``."""
        rank, size, *_ = self.lockstep or rank_and_world_size()
        share = math.inf if self.max_samples is None else self.max_samples / len(self.loaders) / size
        for loader in self.loaders:
            total, read = _length(loader, self.max_batches), 0
            bar = tqdm(total=total, desc=what, unit="batch", leave=False, disable=not self.progress or rank > 0)
            with bar:
                for batch in batches_of(loader, self.max_batches):
                    if read >= share:
                        break
                    batch = move_data_to_device(batch, self.device) if self.transfer is None else self.transfer(batch)
                    read += len(self.reader.rows(batch))
                    yield batch
                    bar.update()

    def feed(self, estimator: Estimator | Metric | MetricCollection, split: ClassSplit) -> None:
        """Run the model over the data and update ``estimator`` with what it gives.

        Raises:
            ValueError: If the head does not give the logits, one is not finite, a label is no row of it, or there are
                no samples of the seen classes.
            torch.OutOfMemoryError: If a batch does not fit, with a remedy.
            ValueError, RuntimeError: If another process has failed, whose error says why.
        """
        forward, faults = forward_of(self.model), Faults(split, self.device, self.reader.maps, self._absent_samples())
        forwards_before = [self._forward_before(forward)] if needs_pretrained_logits(self.estimator) else []

        def count(logits: Tensor, target: Tensor, batch: Tensor, *logits_before: Tensor) -> None:
            faults.count(target, batch, logits, *logits_before)
            estimator.update(logits, target, *logits_before)

        recorder, joined = record_logits(self.model), JoinedBatches(count)
        looks, checked = self._looks(), False
        with faults.told_to_others(), evaluation(self.model):
            for index, batch, counts in self._numbered_batches(faults):
                target = self.reader.rows(batch).clone()  # the loader may write over it
                if checked or len(target) == 0:
                    logits, _ = self._run(recorder, forward, batch, target)
                else:
                    logits, checked = self._checked_logits(recorder, forward, batch, target), True
                before = [self._run(recorder, each, batch, target)[0] for each in forwards_before]
                rows = (logits, target, torch.full_like(target, index), *before)
                joined.add(*(each if counts else each[:0] for each in rows))
                if self.tolerance is not None and index + 1 in looks:
                    joined.flush()
                    faults.meet()
                    if is_settled(estimator, self.tolerance):
                        break
            joined.flush()
        faults.raise_or_warn()

    def _numbered_batches(self, faults: Faults) -> Iterator[tuple[int, Any, bool]]:
        """Yield the batches with their numbers and whether they count."""
        batches = self._batches("Calibrating")
        if self.lockstep is not None:
            return self.lockstep.batches(batches, self.device, faults.meet)
        return ((index, batch, True) for index, batch in enumerate(batches))

    def _looks(self) -> set[int]:
        if self.tolerance is None or not self.loaders:
            return set()
        return when_to_look(_length(self.loaders[0], self.max_batches), self.device)

    def _absent_samples(self) -> AbsentSamples:
        if needs_absent_samples(self.estimator):
            return "needed"
        return "expected" if self.validation else "accident"

    def _forward_before(self, forward: nn.Module) -> Callable[..., Any]:
        """Return the forward with the weights from before fine-tuning."""
        assert self.pretrained is not None
        prefix = next(f"{name}." if name else "" for name, module in self.model.named_modules() if module is forward)
        weights = {
            key.removeprefix(prefix): value.to(self.device)
            for key, value in self.pretrained.items()
            if key.startswith(prefix) and CHILD_NAME not in key and isinstance(value, Tensor)
        }

        @wraps(forward.forward)  # by whose arguments the inputs are found in a batch
        def forward_before(*args: Any, **kwargs: Any) -> Any:
            return functional_call(forward, weights, args, kwargs)

        return forward_before

    def _run(
        self, recorder: LogitRecorder, forward: Callable[..., Any], batch: Any, target: Tensor
    ) -> tuple[Tensor, Any]:
        """Return the raw logits of a batch and what the model returned."""
        with recorder as records, self.context():
            output = call_forward(forward, self.reader.inputs(batch, forward))
        return one_forward(records, len(target), self.num_classes, UNPACK_OR_HEAD_REMEDY), output

    def _checked_logits(self, recorder: LogitRecorder, forward: nn.Module, batch: Any, target: Tensor) -> Tensor:
        """Return the raw logits of a batch, for which the head is probed unless it is proved and still gives them."""
        if is_proved(self.model):
            logits, output = self._run(recorder, forward, batch, target)
            if gives_output(self.model, logits, output):
                return logits
        with self.context():
            check_head(self.model, batch, self.reader)
        return self._run(recorder, forward, batch, target)[0]  # the probe may have weighed the heads anew


def forward_of(model: nn.Module) -> nn.Module:
    """Return what maps inputs to logits: the model, or in a LightningModule without ``forward`` the part with the head.

    Raises:
        ValueError: If a LightningModule has no ``forward`` and its head no ``forward`` around it.
    """
    if not isinstance(model, LightningModule) or is_overridden("forward", model):
        return model
    name, head = next(iter(attached_heads(model).items()))
    part = model.get_submodule(name.split(".")[0])
    if part is head and (part is model or is_layer(part)):
        raise ValueError(
            f"Expected {type(model).__name__} to define `forward`, which maps inputs to logits: its head"
            f" {name!r} does not see the inputs. Add `forward` and call `self(inputs)` in `training_step`."
        )
    return part


def check_head(model: nn.Module, batch: Any, reader: BatchReader) -> None:
    """Probe the attached head of ``model``, which is in eval mode, with a few rows of a batch on its device.

    Raises:
        ValueError: If the head is not what decides the logits.
    """
    forward = forward_of(model)
    inputs = reader.inputs(batch, forward)
    run = partial(call_forward, forward, inputs[:PROBE_ROWS] if isinstance(inputs, Tensor) else inputs)
    with suppress(NotFiniteError):  # of a model that has diverged the probe can say nothing; the pass names the batch
        probe(run, model)


def _length(loader: Iterable[Any], max_batches: int | None) -> int | None:
    return min((n for n in (sized_len(loader), max_batches) if n is not None), default=None)
