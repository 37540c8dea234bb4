"""The eval-mode pass over the fine-tuning data, with or without Lightning."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torchmetrics import Metric, MetricCollection
from tqdm.auto import tqdm

from lightning_calibft._format import CHILD_NAME
from lightning_calibft.calibration.batch_calls import REMEDY, STEPS, BatchCall, logits_of_first_batch
from lightning_calibft.calibration.batch_reader import BatchReader, batch_to_device, check_rows
from lightning_calibft.calibration.batched_updates import BatchedUpdates
from lightning_calibft.calibration.data_check import (
    AbsentSamples,
    DataCheck,
    empty_error,
    warn_if_positions,
)
from lightning_calibft.calibration.distributed import (
    ShardedReading,
    SharedErrors,
    all_reduce,
    rank_and_world_size,
)
from lightning_calibft.calibration.loaders import batches_of, length_of
from lightning_calibft.calibration.result import CalibrationResult, result_of
from lightning_calibft.calibration.unlabeled_reader import UnlabeledReader
from lightning_calibft.estimators import (
    Estimator,
    PseudoAbsent,
    check_estimator_width,
    make_estimator,
    needs_absent_samples,
    needs_pretrained_logits,
)
from lightning_calibft.functional.absent_share import estimate_share
from lightning_calibft.head.evaluation import evaluation
from lightning_calibft.head.layers import num_classes
from lightning_calibft.head.offset import attached_heads, offset_of
from lightning_calibft.head.record import one_forward, record_logits
from lightning_calibft.labels.class_map import IGNORE_INDEX
from lightning_calibft.labels.dataset_labels import class_names_of_loaders
from lightning_calibft.labels.label_names import row_names_of
from lightning_calibft.metrics import AbsentShare
from lightning_calibft.split import ClassSplit

LEAST_SAMPLES = 100  # from fewer samples, the standard error itself is a guess
_LAST_LOOK = torch.iinfo(torch.long).max  # the last batch, if a loader does not know its length

MakeBar = Callable[[str, int | None], Any]  # from what is going on and its number of steps, a bar like those of tqdm

_LabeledBatch = tuple[int, Any, Tensor]  # its number, the batch on the device, and the head's row of each sample


def plain_bar(what: str, total: int | None) -> Any:
    """Return a bar for the terminal or the notebook that this process runs in."""
    return tqdm(total=total, desc=what, unit="batch", leave=False)


class EvaluatedBatch(NamedTuple):
    """The logits and labels of one batch.

    Attributes:
        number: Number of the batch among the batches of this process.
        logits: Logits without gamma, of shape ``(N, C)``.
        target: The head's row of each sample, of shape ``(N,)``.
        pretrained_logits: The logits before fine-tuning, if the estimator needs them. Otherwise empty.
    """

    number: int
    logits: Tensor
    target: Tensor
    pretrained_logits: list[Tensor]


@dataclass
class EvaluationPass:
    """One pass over the fine-tuning data; see :func:`calibrate` for the fields that both have."""

    model: nn.Module
    loaders: list[Iterable[Any]]
    estimator: str | Estimator = "alg"
    estimator_kwargs: Mapping[str, Any] | None = None
    reader: BatchReader = field(default_factory=BatchReader)
    max_samples: int | None = None
    max_batches: int | None = None  # of each loader
    tolerance: float | None = None  # stop when the standard error of gamma is at most this
    validation: bool = False  # whether it reads validation data, of all classes
    bar: MakeBar | None = plain_bar  # makes the progress bar of the first process
    pretrained: Mapping[str, Tensor] | None = None  # the weights before fine-tuning, as a state dict of `model`
    transfer: Callable[[Any], Any] | None = None  # moves a batch to the model's device
    context: Callable[[], AbstractContextManager[Any]] = nullcontext  # around each forward: autocast and the like
    sharded: ShardedReading | None = None  # if each process holds only a part of the model
    unlabeled: list[Iterable[Any]] | None = None  # loaders of samples from where the model will be used
    device: torch.device = field(init=False)
    num_classes: int = field(init=False)
    _before: PseudoAbsent | None = field(init=False, default=None)  # the margins of the model before fine-tuning

    def __post_init__(self) -> None:
        head = next(iter(attached_heads(self.model).values()))
        self.device = next(head.buffers()).device  # those of the calibration, if the head has no others
        self.num_classes = num_classes(head)
        check_estimator_width(self.estimator, self.num_classes)
        check_pretrained(self.estimator, self.pretrained, self.model)

    def read_classes(self) -> list[int]:
        """Return the classes in the data. The standard error needs them before the first sample.

        Raises:
            ValueError: If a label is not a row of the head, if there are no labels, or if another process has failed.
            RuntimeError: If another process has failed.
        """
        present, errors = torch.zeros(self.num_classes, dtype=torch.long), SharedErrors()
        with errors.shared(), evaluation(self.model):  # in train mode, transfer hooks may mix labels
            for _, _, target in self._batches("Reading labels"):
                target = target[target != IGNORE_INDEX].cpu()
                check_rows(target, self.num_classes)
                present[target] = 1
        errors.agree()
        present = all_reduce(present.to(self.device))
        if not present.any():
            raise empty_error()
        classes = present.nonzero().flatten().tolist()
        if not self.reader.maps:
            names = class_names_of_loaders(self.loaders)
            warn_if_positions(classes, self.num_classes, names, row_names_of(self.model))
        return classes

    def run(self, split: ClassSplit) -> CalibrationResult:
        """Run the model over the data and return the result. The model does not change."""
        with SharedErrors().shared():
            estimator = make_estimator(self.estimator, split, self.estimator_kwargs).to(self.device)
        self.feed(estimator, split)
        return result_of(estimator, self.estimator, held_out=self.validation)

    def for_unlabeled(self, result: CalibrationResult) -> CalibrationResult:
        """Return the result for the share of absent samples in the unlabeled data, or as it is if there is none.

        Raises:
            ValueError: If the result does not know the margins of both groups, there are no samples, or a logit is not
                finite.
            ValueError, RuntimeError: If another process has failed.
        """
        if self.unlabeled is None:
            return result
        reader = cast(BatchReader, UnlabeledReader(self.reader))
        return replace(self, loaders=self.unlabeled, reader=reader)._for_share(result, self._before)

    def feed(self, estimator: Estimator | Metric | MetricCollection, split: ClassSplit) -> None:
        """Run the model over the data and update ``estimator`` with its logits.

        Raises:
            ValueError: If the output of the head is not the logits, a logit is not finite, a label is not a row of the
                head, or samples that the estimator needs are missing.
            torch.OutOfMemoryError: If a batch does not fit into memory. The text names a remedy.
            ValueError, RuntimeError: If another process has failed. The error there says why.
        """
        check = DataCheck(split, self.device, self.reader.maps, self._absent_samples())
        if self.unlabeled is not None and self.pretrained is not None:
            classes = split.num_classes, split.seen_classes, split.absent_classes
            self._before = PseudoAbsent(*classes, validate_args=False).to(self.device)

        def update(logits: Tensor, target: Tensor, number: Tensor, *pretrained_logits: Tensor) -> None:
            check.count(target, number, logits, *pretrained_logits)
            estimator.update(logits, target, *pretrained_logits)
            if self._before is not None:  # as if it were its own fine-tuned model
                self._before.update(pretrained_logits[0], target, pretrained_logits[0])

        updates = BatchedUpdates(update)

        def is_settled() -> bool:
            updates.flush()
            check.errors.agree()
            return self.tolerance is not None and _is_within(self.tolerance, estimator)

        with check.errors.shared(), closing(self.evaluate(check.errors)) as batches:
            looks = iter(self._looks(check.errors))
            look = next(looks, None)
            for step, batch in enumerate(batches, 1):
                number = torch.full_like(batch.target, batch.number)
                updates.add(batch.logits, batch.target, number, *batch.pretrained_logits)
                if step == look:
                    if is_settled():
                        break
                    look = next(looks, None)
            else:
                # A process without any batches left still joins the looks of the others, which would wait for it.
                while look is not None and rank_and_world_size()[1] > 1 and not is_settled():
                    look = next(looks, None)
            updates.flush()
        check.raise_or_warn()

    def _for_share(self, result: CalibrationResult, margins_before: PseudoAbsent | None) -> CalibrationResult:
        errors, counted = SharedErrors(), torch.zeros(2, dtype=torch.long, device=self.device)
        tables: list[Any] = [result.share_table]  # the metric checks them
        if margins_before is not None:
            tables.append(margins_before.share_table)
        with errors.shared(), proofs_kept(self.model):
            split = result.split
            classes = split.num_classes, split.seen_classes, split.absent_classes
            shares = [
                AbsentShare(*classes, share_table=table, half_life=None, validate_args=False).to(self.device)
                for table in tables
            ]
            check_runs_by_forward(self.model)
            with closing(self.evaluate(errors)) as batches:
                for batch in batches:
                    logits = batch.logits, *batch.pretrained_logits
                    finite = torch.stack([each.isfinite().all(1) for each in logits]).all(0)
                    counted += torch.stack([torch.ones_like(finite).sum(), (~finite).sum()])
                    for share, of_model in zip(shares, logits, strict=True):
                        share.update(of_model)
        errors.agree()
        number, bad = all_reduce(counted).tolist()
        if bad or not number:
            found = f"{bad} of {number} samples have NaN or infinite logits" if bad else "got none"
            raise ValueError(
                "Expected argument `unlabeled` to hold samples from where the model will be used, with finite logits,"
                f" but {found}. Gamma stays unset. Check the loader."
            )
        estimate = estimate_share(*(share.counted for share in shares))
        return result.for_share(float(estimate.share), estimate.interval.tolist())

    def evaluate(self, errors: SharedErrors | None = None) -> Generator[EvaluatedBatch, None, None]:
        """Run the model over the data and yield the logits of each batch that has samples.

        The model is in eval mode, and gradients are off, until the iterator ends. If it may not be read to the end,
        close it with ``contextlib.closing``.

        Args:
            errors: Reports errors to the other processes. A sharded model needs this before each forward.

        Raises:
            ValueError: If a batch cannot be split, or the output of the head is not the logits.
            TypeError: If a target does not hold class ids.
        """
        recorder, call = record_logits(self.model), None
        pretrained: list[Callable[[Any], Any]] = []
        batches: Iterator[tuple[_LabeledBatch, bool]] = ((batch, True) for batch in self._batches("Calibrating"))
        if self.sharded is not None:
            errors = errors or SharedErrors()
            batches = self.sharded.batches(self._batches("Calibrating"), self.device, errors)
        with evaluation(self.model), recorder as records:
            for (number, batch, target), counts in batches:
                if call is not None:
                    logits = self._run(records, call, batch, target)
                else:
                    call, logits = logits_of_first_batch(self.model, batch, target, self.reader, self.context)
                    if needs_pretrained_logits(self.estimator):
                        pretrained = [self._with_pretrained_weights(call)]
                rows = [target, logits, *(self._run(records, each, batch, target) for each in pretrained)]
                target, logits, *pretrained_logits = rows if counts else [each[:0] for each in rows]
                yield EvaluatedBatch(number, logits, target, pretrained_logits)

    def _batches(self, what: str) -> Iterator[_LabeledBatch]:
        """Yield the batches of this process, from each loader up to its share of ``max_samples``."""
        rank, size, *_ = self.sharded or rank_and_world_size()
        share = math.inf if self.max_samples is None else self.max_samples / max(1, len(self.loaders)) / size
        numbers = count()
        for loader in self.loaders:
            total, read = _length(loader, self.max_batches), 0
            with self.bar(what, total) if self.bar is not None and rank == 0 else tqdm(disable=True) as bar:
                for batch in batches_of(loader, self.max_batches):
                    if read >= share:
                        break
                    batch = batch_to_device(batch, self.device) if self.transfer is None else self.transfer(batch)
                    self.reader.find_target(batch, self.num_classes)
                    target = self.reader.rows(batch).clone()  # the loader may overwrite it
                    read += len(target)
                    number = next(numbers)
                    if len(target) > 0:
                        yield number, batch, target
                    bar.update()

    def _looks(self, errors: SharedErrors) -> list[int]:
        """Return after which batches to check the standard error of gamma. Each number is a quarter above the last.

        Each check costs time, and the processes must check together.
        """
        if self.tolerance is None:
            return []
        lengths = errors.gather(lambda: _length(self.loaders[0], self.max_batches) if self.loaders else 0)
        unknown = math.inf if len(lengths) == 1 else 0
        shortest = min(unknown if length is None else length for length in lengths)
        looks = [1]
        while (later := looks[-1] + math.ceil(looks[-1] / 4)) <= min(shortest, _LAST_LOOK):
            looks.append(later)
        return [look for look in looks if look <= shortest]

    def _absent_samples(self) -> AbsentSamples:
        if needs_absent_samples(self.estimator):
            return "needed"
        return "expected" if self.validation else "accident"

    def _with_pretrained_weights(self, call: BatchCall) -> Callable[[Any], Any]:
        """Return the call with the weights before fine-tuning."""
        assert self.pretrained is not None
        # Each module once: torch would restore one that has two names with the weights of its second.
        names = [
            f"{name}.{key}".removeprefix(".")
            for name, module in self.model.named_modules()
            for key, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
            if CHILD_NAME not in name
        ]
        given = {f"model.{name}": self.pretrained.get(name) for name in names}
        weights = {name: value.to(self.device) for name, value in given.items() if value is not None}
        return lambda batch: functional_call(call, weights, (batch,), tie_weights=False)

    def _run(self, records: list[Tensor], call: Callable[[Any], Any], batch: Any, target: Tensor) -> Tensor:
        """Return the raw logits of a batch."""
        records.clear()  # something else may have run the model in the meantime
        with self.context():
            call(batch)
        return one_forward(records, len(target), self.num_classes, REMEDY)


def _length(loader: Iterable[Any], max_batches: int | None) -> int | None:
    return min((n for n in (length_of(loader), max_batches) if n is not None), default=None)


@contextmanager
def preserve_random_state() -> Iterator[None]:
    """Restore the random state of PyTorch, NumPy and Python after the block."""
    of_python, of_numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        try:
            yield
        finally:
            random.setstate(of_python)
            np.random.set_state(of_numpy)


@contextmanager
def proofs_kept(model: nn.Module) -> Iterator[None]:
    """Put back, after unlabeled batches were read, how the labeled ones are run."""
    children = map(offset_of, attached_heads(model).values())
    proved = [(child, child.proved_structure, child.proved_call) for child in children]
    try:
        yield
    finally:
        for child, structure, call in proved:
            child.proved_structure, child.proved_call = structure, call


def check_runs_by_forward(model: nn.Module) -> None:
    """Check that unlabeled batches can be read: the labeled ones of ``model`` are run by its ``forward``.

    Raises:
        ValueError: If they are run by a step, which needs labels.
    """
    if any(offset_of(module).proved_call in STEPS for module in attached_heads(model).values()):
        raise ValueError(
            f"Expected argument `unlabeled` to be None for a {type(model).__name__}, whose `forward` does not map the"
            " inputs of a batch to logits: its steps, which do, need labels. Define such a `forward`, or pass"
            " `absent_share`."
        )


def head_width(model: nn.Module) -> int:
    """Return the number of rows of the attached head of ``model``."""
    return num_classes(next(iter(attached_heads(model).values())))


def check_pretrained(estimator: str | Estimator, pretrained: Mapping[str, Tensor] | None, model: nn.Module) -> None:
    """Check that the weights before fine-tuning are given if the estimator needs them, and fit the model.

    Raises:
        ValueError: If they are missing, not needed, or do not fit the model.
    """
    name = estimator if isinstance(estimator, str) else type(estimator).__name__
    if needs_pretrained_logits(estimator) != (pretrained is not None):
        needed = "the model before fine-tuning" if pretrained is None else "None"
        raise ValueError(
            f"Expected argument `pretrained` to be {needed} for the estimator {name!r}, but got"
            f" {'None' if pretrained is None else 'weights'}."
        )
    if pretrained is None:
        return
    # Besides tensors, a state dict may hold the extra state of modules.
    tensors = {key: value for key, value in model.state_dict().items() if isinstance(value, Tensor)}
    shapes = {key: value.shape for key, value in tensors.items() if CHILD_NAME not in key}
    if wrong := [key for key, shape in shapes.items() if key not in pretrained or pretrained[key].shape != shape]:
        raise ValueError(
            f"Expected argument `pretrained` to hold the weights of the same model before fine-tuning, but {wrong[0]!r}"
            " is missing or has another shape."
        )


def check_tolerance(tolerance: float | None) -> None:
    """Check that ``tolerance`` is a standard error that can be reached.

    Raises:
        ValueError: If it is neither ``None`` nor a positive, finite number.
    """
    if tolerance is not None and not (
        isinstance(tolerance, (int, float)) and not isinstance(tolerance, bool) and 0 < tolerance < math.inf
    ):
        raise ValueError(
            f"Expected argument `tolerance` to be a positive number, a standard error in logits, but got {tolerance!r}."
        )


def _is_within(tolerance: float, estimator: Any) -> bool:
    """Return whether the standard error of gamma is at most ``tolerance``. All processes get the same answer."""
    # With its cache, a metric without another batch would return this value at the end and not wait for a process that
    # had one more batch and waits for all.
    use_cache, estimator.compute_with_cache = estimator.compute_with_cache, False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about classes that have no samples yet
            return float(estimator.standard_error) <= tolerance and int(estimator.num_samples) >= LEAST_SAMPLES
    except ValueError:  # there is no gamma yet
        return False
    finally:
        estimator.compute_with_cache = use_cache
