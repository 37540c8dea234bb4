"""How the processes of a group work together while they read data."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, distributed

from lightning_calibft.calibration.batch_reader import batch_to_device

Made = TypeVar("Made")

OUT_OF_MEMORY = (
    "Out of memory in the calibration pass. Gamma stays unset. Give it smaller batches, from a `calibration_dataloader`"
    " or as the `loader` of `calibrate`. If the estimator keeps all samples, set `max_samples`, too."
)


def rank_and_world_size() -> tuple[int, int]:
    """Return the rank of this process and the number of processes, ``(0, 1)`` without a process group."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def all_reduce(tensor: Tensor, maximum: bool = False) -> Tensor:
    """Return the sum or the maximum over the processes. With one process, this is ``tensor`` itself."""
    if rank_and_world_size()[1] > 1:
        distributed.all_reduce(tensor, distributed.ReduceOp.MAX if maximum else distributed.ReduceOp.SUM)
    return tensor


class SharedErrors:
    """Stops all processes when one of them fails, so that none waits for it forever.

    Whichever method a process calls next, all processes meet in the same collective call, and so does the one that has
    failed. After a failure, no process waits again.
    """

    def __init__(self) -> None:
        self._failed = 0  # 1: a ValueError, after which a caller may go on, on all processes; 2: another error

    def agree(self) -> None:
        """Wait for the other processes.

        Raises:
            ValueError: If another process has failed with one.
            RuntimeError: If another process has failed with any other error.
        """
        self.gather(lambda: None)

    def gather(self, make: Callable[[], Made]) -> list[Made]:
        """Wait for the other processes and return what ``make`` returns on each of them, by rank.

        Args:
            make: Returns something that can be pickled.

        Raises:
            ValueError: If another process has failed with one.
            RuntimeError: If another process has failed with any other error.
        """
        alone = rank_and_world_size()[1] == 1
        with self.shared():
            made = make()
            # Pickling a view of a large tensor would include the whole tensor.
            packed = b"" if alone else pickle.dumps(apply_to_collection(made, Tensor, Tensor.clone))
        parts = [] if self._failed else self._exchange(packed)
        if self._failed:
            kind = ValueError if self._failed == 1 else RuntimeError
            raise kind("The calibration pass failed on another process. See the error there. Gamma stays unset.")
        return [made] if alone else [pickle.loads(part) for part in parts]

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Report an error in the block to the other processes, which receive it where they wait next.

        Raises:
            torch.OutOfMemoryError: If the block ran out of memory. The text then names a remedy.
        """
        try:
            yield
        except Exception as error:
            if self._failed:  # the others know already
                raise
            self._failed = 1 if isinstance(error, ValueError) else 2
            self._exchange(self._failed)
            if isinstance(error, torch.OutOfMemoryError) and error.__cause__ is None:
                raise torch.OutOfMemoryError(f"{OUT_OF_MEMORY} The error was: {error}") from error
            raise

    def _exchange(self, part: bytes | int) -> list[Any]:
        parts: list[Any] = [part] * rank_and_world_size()[1]
        if len(parts) > 1:
            distributed.all_gather_object(parts, part)
        self._failed = max(part if isinstance(part, int) else 0 for part in parts)
        return parts


class ShardedReading(NamedTuple):
    """Which samples this process reads if each process holds only a part of the model.

    Attributes:
        rank: Number of this process's share of the samples.
        size: Number of shares. There are fewer shares than processes if several processes compute a forward together.
        counts: Whether the logits of this process count. If several processes have the same logits, only those of the
            first one count.
    """

    rank: int
    size: int
    counts: bool

    def batches(self, batches: Iterable[Any], device: torch.device, errors: SharedErrors) -> Iterator[tuple[Any, bool]]:
        """Yield the same number of batches on all processes, each with a flag that says whether it counts.

        Each forward needs all processes. The first batch does not count. It is the same on all processes, so that they
        all draw the same conclusions from it. A process that has no batch left gets this batch again.

        Args:
            batches: The batches of this process. None of them may be ``None``.
            device: The device of the batches.
            errors: Makes the processes wait for each other before each forward.
        """
        own = iter(batches)
        batch = next(own, None)
        errors.agree()
        shared = first_batch_of_any(batch, device, errors)
        if shared is None:
            return
        yield shared, False
        while all_reduce(torch.tensor(int(batch is not None), device=device)):
            yield (shared, False) if batch is None else (batch, self.counts)
            batch = next(own, None)
            errors.agree()


def first_batch_of_any(batch: Any, device: torch.device, errors: SharedErrors | None = None) -> Any:
    """Return the batch of the first process that has one, on ``device``, or ``None`` if no process has one."""
    errors = errors or SharedErrors()
    has_one = errors.gather(lambda: batch is not None)
    if not any(has_one):
        return None
    first = has_one.index(True)
    sent = batch if rank_and_world_size()[0] == first else None
    return batch_to_device(errors.gather(lambda: batch_to_device(sent, torch.device("cpu")))[first], device)
