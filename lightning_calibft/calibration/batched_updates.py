"""Update a metric with several small batches at once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class BatchedUpdates:
    """Collects small batches and updates with all of them at once, since each update has a fixed cost.

    Args:
        update: Called with the arguments of :meth:`add`, concatenated over several batches.
    """

    # The most logits that wait: as many as a metric reads at a time, so that they fit into a CPU's cache.
    limit = 2**18

    def __init__(self, update: Callable[..., None]) -> None:
        self._update = update
        self.clear()

    def add(self, logits: Tensor, *others: Tensor) -> None:
        """Add logits ``(N, C)`` and tensors that go with them, ``(N, ...)`` each. Do not change them in place later."""
        self._waiting.append((logits, *others))
        self._elements += logits.numel()
        if self._elements >= self.limit:
            self.flush()

    def flush(self) -> None:
        """Update with the waiting batches."""
        waiting = self._waiting
        self.clear()
        if len(waiting) == 1:
            self._update(*waiting[0])
        elif waiting:
            self._update(*map(torch.cat, zip(*waiting, strict=True)))

    def clear(self) -> None:
        """Drop the waiting batches."""
        self._waiting: list[tuple[Tensor, ...]] = []
        self._elements = 0
