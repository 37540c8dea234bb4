"""Logits to measure with, and the least that anything could do with them."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=1)
def logits_and_target(num_samples: int, num_classes: int, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Draw normal logits, the true one 3 larger, and labels."""
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(num_classes, (num_samples,), generator=generator)
    logits = torch.randn(num_samples, num_classes, generator=generator)
    logits[torch.arange(num_samples), target] += 3
    return logits.to(device), target.to(device)


def seen_classes(num_classes: int) -> list[int]:
    """Every other class, so that neither group is a block of columns."""
    return list(range(0, num_classes, 2))


def two_maxima(logits: Tensor) -> Callable[[], object]:
    """The floor: one plain maximum for each group, as if the columns of a group already stood together."""
    half = (logits.shape[1] + 1) // 2
    return lambda: (logits[:, :half].max(1), logits[:, half:].max(1))
