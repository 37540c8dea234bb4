"""A pass over a model of which each process holds a part, so that every forward needs all processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import count
from typing import Any, NamedTuple

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import distributed

from lightning_calibft.calibration.loaders import all_reduce, rank_and_world_size


class Lockstep(NamedTuple):
    """Which samples this process reads.

    Attributes:
        rank: Number of its share of the samples.
        size: Number of shares: fewer than processes where several compute one forward together.
        counts: Whether its logits count. Of the processes that have the same, those of the first do.
    """

    rank: int
    size: int
    counts: bool

    def batches(
        self, batches: Iterable[Any], device: torch.device, meet: Callable[[], None]
    ) -> Iterator[tuple[int, Any, bool]]:
        """Yield equally many batches on all processes, with their numbers and whether they count.

        The first, number -1, does not count and is the same on all, so that what is made of it is decided alike. A
        process that has no batch left gets it again.

        Args:
            batches: This process' own, none of which is ``None``.
            device: Where they are.
            meet: Waits for the others, before each forward; raises if one has failed.
        """
        own = iter(batches)
        batch = next(own, None)
        meet()
        shared = same_for_all(batch, device)
        if shared is None:
            return
        yield -1, shared, False
        for index in count():
            if not all_reduce(torch.tensor(int(batch is not None), device=device)):
                return
            yield (index, shared, False) if batch is None else (index, batch, self.counts)
            batch = next(own, None)
            meet()


def same_for_all(batch: Any, device: torch.device) -> Any:
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
