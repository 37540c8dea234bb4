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


def gather(make: Callable[[], Made]) -> list[Made]:
    """Return what each process makes; what fails in one of them fails in all.

    Args:
        make: Returns something that can be pickled.

    Raises:
        ValueError: If another process has failed with one.
        RuntimeError: If another process has failed with any other error.
    """
    world_size = rank_and_world_size()[1]
    if world_size == 1:
        return [make()]
    failed = None
    try:
        # A row of a large tensor would take all of it along.
        made: bytes | int = pickle.dumps(apply_to_collection(make(), Tensor, Tensor.clone))
    except Exception as error:
        failed, made = error, _failure_code(error)
    parts: list[Any] = [None] * world_size
    distributed.all_gather_object(parts, made)
    if failed is not None:
        raise failed
    if codes := [part for part in parts if isinstance(part, int)]:
        raise _failed_elsewhere(max(codes))
    return [pickle.loads(part) for part in parts]


def _failure_code(error: Exception | None) -> int:
    return 0 if error is None else 1 if isinstance(error, ValueError) else 2


def _failed_elsewhere(code: int) -> Exception:
    kind = ValueError if code == 1 else RuntimeError
    return kind("The calibration pass has failed on another process, which says why. Gamma stays unset.")


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
            code = torch.tensor(_failure_code(failed), device=self._device)
            self._failed = int(all_reduce(code, maximum=True))
        if self._failed and failed is None:
            raise _failed_elsewhere(self._failed)

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
    ) -> Iterator[tuple[Any, bool]]:
        """Yield equally many batches on all processes, each with whether it counts.

        Each forward needs all processes. The first batch does not count and is the same on all, so that what is made of
        it is decided alike. A process that has no batch left gets it again.

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
        yield shared, False
        while all_reduce(torch.tensor(int(batch is not None), device=device)):
            yield (shared, False) if batch is None else (batch, self.counts)
            batch = next(own, None)
            agree()


def first_batch_of_any(batch: Any, device: torch.device) -> Any:
    """Return the batch of the first process whose own is not ``None``, on ``device``; ``None`` if there is none."""
    has_one = gather(lambda: batch is not None)
    if not any(has_one):
        return None
    first = has_one.index(True)
    own = batch if rank_and_world_size()[0] == first else None
    return batch_to_device(gather(lambda: batch_to_device(own, torch.device("cpu")))[first], device)
