"""What the processes of a group agree on while they read data."""

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
    " or as the `loader` of `calibrate`; an estimator that keeps all samples can do with fewer: `max_samples`."
)


def rank_and_world_size() -> tuple[int, int]:
    """Return the rank of this process and the number of processes, ``(0, 1)`` without a process group."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def all_reduce(tensor: Tensor, maximum: bool = False) -> Tensor:
    """Return the sum, or the maximum, over the processes; with one process ``tensor`` itself."""
    if rank_and_world_size()[1] > 1:
        distributed.all_reduce(tensor, distributed.ReduceOp.MAX if maximum else distributed.ReduceOp.SUM)
    return tensor


class SharedErrors:
    """Ends what the processes do together on all of them when one of them fails, so that none waits for it.

    Each waits for the others in the same call, whatever it comes to next: the one that has failed, too. After a
    failure, none waits any more.
    """

    def __init__(self) -> None:
        self._failed = 0  # 1 for a ValueError, after which a caller may go on: then all of them do; 2 for any other

    def agree(self) -> None:
        """Wait for the other processes.

        Raises:
            ValueError: If another process has failed with one.
            RuntimeError: If another process has failed with any other error.
        """
        self.gather(lambda: None)

    def gather(self, make: Callable[[], Made]) -> list[Made]:
        """Wait for the other processes and return what each makes, by rank.

        Args:
            make: Returns something that can be pickled.

        Raises:
            ValueError: If another process has failed with one.
            RuntimeError: If another process has failed with any other error.
        """
        alone = rank_and_world_size()[1] == 1
        with self.shared():
            made = make()
            # A row of a large tensor would take all of it along.
            packed = b"" if alone else pickle.dumps(apply_to_collection(made, Tensor, Tensor.clone))
        parts = [] if self._failed else self._exchange(packed)
        if self._failed:
            kind = ValueError if self._failed == 1 else RuntimeError
            raise kind("The calibration pass has failed on another process, which says why. Gamma stays unset.")
        return [made] if alone else [pickle.loads(part) for part in parts]

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Tell the other processes of an error in the block, where they wait next.

        Raises:
            torch.OutOfMemoryError: If that was the error, now with a remedy.
        """
        try:
            yield
        except Exception as error:
            if self._failed:  # they know
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
    """Which samples a process reads for a model of which each process holds a part.

    Attributes:
        rank: Number of its share of the samples.
        size: Number of shares: fewer than processes where several compute one forward together.
        counts: Whether its logits count. Of the processes that have the same logits, those of the first do.
    """

    rank: int
    size: int
    counts: bool

    def batches(self, batches: Iterable[Any], device: torch.device, errors: SharedErrors) -> Iterator[tuple[Any, bool]]:
        """Yield equally many batches on all processes, each with whether it counts.

        Each forward needs all processes. The first batch does not count and is the same on all, so that what is made of
        it is decided alike. A process that has no batch left gets it again.

        Args:
            batches: This process' own, none of which is ``None``.
            device: Where they are.
            errors: Waits for the others before each forward.
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
    """Return the batch of the first process whose own is not ``None``, on ``device``; ``None`` if there is none."""
    errors = errors or SharedErrors()
    has_one = errors.gather(lambda: batch is not None)
    if not any(has_one):
        return None
    first = has_one.index(True)
    sent = batch if rank_and_world_size()[0] == first else None
    return batch_to_device(errors.gather(lambda: batch_to_device(sent, torch.device("cpu")))[first], device)
