"""Logits to measure with, the least that anything could do with them, and how much memory something takes."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile


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


def bytes_at_most(function: Callable[[], object], folder: Path) -> int:
    """How many bytes more than before are allocated at the worst moment of a call."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    profiler.export_chrome_trace(str(folder / "trace.json"))
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    memory = sorted((e for e in events if e["name"] == "[memory]"), key=lambda e: e["ts"])
    totals = [e["args"]["Total Allocated"] for e in memory]
    return max(totals) - (totals[0] - memory[0]["args"]["Bytes"])
