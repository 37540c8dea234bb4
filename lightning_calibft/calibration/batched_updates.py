"""Updates with several small batches at once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class BatchedUpdates:
    """Passes batches on together: an update has a fixed cost, which fast steps with few classes feel.

    Args:
        update: Takes what is given to :meth:`add`, the batches behind one another.
    """

    # Logits that wait. They take as much of a CPU's cache as a metric does at a time.
    limit = 2**18

    def __init__(self, update: Callable[..., None]) -> None:
        self._update = update
        self.clear()

    def add(self, logits: Tensor, *others: Tensor) -> None:
        """Take logits ``(N, C)`` and what belongs to them, ``(N, ...)`` each, that nothing changes in place later."""
        self._waiting.append((logits, *others))
        self._elements += logits.numel()
        if self._elements >= self.limit:
            self.flush()

    def flush(self) -> None:
        """Pass on what waits."""
        waiting = self._waiting
        self.clear()
        if len(waiting) == 1:
            self._update(*waiting[0])
        elif waiting:
            self._update(*map(torch.cat, zip(*waiting, strict=True)))

    def clear(self) -> None:
        """Forget what waits."""
        self._waiting: list[tuple[Tensor, ...]] = []
        self._elements = 0
