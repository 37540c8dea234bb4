"""What the processes of a group agree on while they read data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any, NamedTuple

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor, distributed

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
    """Ends a pass on all processes when one of them fails, so that none waits for it.

    Args:
        device: The device of the communication.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._failed = 0

    def agree(self, failed: Exception | None = None) -> None:
        """Wait for the other processes, and tell them if this one has ``failed``.

        Raises:
            ValueError: If another process has failed with one, after which a caller may go on: then all of them do.
            RuntimeError: If another process has failed with any other error.
        """
        if not self._failed:  # after a failure, no process waits for another
            code = 0 if failed is None else 1 if isinstance(failed, ValueError) else 2
            self._failed = int(all_reduce(torch.tensor(code, device=self._device), maximum=True))
        if self._failed and failed is None:
            kind = ValueError if self._failed == 1 else RuntimeError
            raise kind("The calibration pass has failed on another process, which says why. Gamma stays unset.")

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Tell the other processes of an error in the block.

        Raises:
            torch.OutOfMemoryError: If that was the error, now with a remedy.
        """
        try:
            yield
        except Exception as error:
            self.agree(error)
            if isinstance(error, torch.OutOfMemoryError):
                raise torch.OutOfMemoryError(f"{OUT_OF_MEMORY} The error was: {error}") from error
            raise


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

    def batches(
        self, batches: Iterable[Any], device: torch.device, agree: Callable[[], None]
    ) -> Iterator[tuple[int, Any, bool]]:
        """Yield equally many batches on all processes, with their numbers and whether they count.

        Each forward needs all processes. The first batch, number -1, does not count and is the same on all, so that
        what is made of it is decided alike. A process that has no batch left gets it again.

        Args:
            batches: This process' own, none of which is ``None``.
            device: Where they are.
            agree: Waits for the others before each forward; raises if one has failed.
        """
        own = iter(batches)
        batch = next(own, None)
        agree()
        shared = first_batch_of_any(batch, device)
        if shared is None:
            return
        yield -1, shared, False
        for index in count():
            if not all_reduce(torch.tensor(int(batch is not None), device=device)):
                return
            yield (index, shared, False) if batch is None else (index, batch, self.counts)
            batch = next(own, None)
            agree()


def first_batch_of_any(batch: Any, device: torch.device) -> Any:
    """Return the batch of the first process whose own is not ``None``, on ``device``; ``None`` if there is none."""
    rank, world_size = rank_and_world_size()
    has_one = [False] * world_size
    distributed.all_gather_object(has_one, batch is not None)
    if not any(has_one):
        return None
    first = has_one.index(True)
    shared = [move_data_to_device(batch, torch.device("cpu")) if rank == first else None]
    distributed.broadcast_object_list(shared, first)
    return move_data_to_device(shared[0], device)
