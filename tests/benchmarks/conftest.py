"""Ratios of two costs measured in one run, printed as a table at its end."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable

import pytest
import torch

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
_ROWS: list[tuple[str, str, str, str]] = []


def seconds(function: Callable[[], object]) -> float:
    """Time a call; a function that returns a float has timed the part that counts by itself."""
    gc.disable()
    try:
        start = time.perf_counter()
        value = function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return value if isinstance(value, float) else time.perf_counter() - start
    finally:
        gc.enable()


@pytest.fixture
def ratio(benchmark, request):
    """Run both sides in turns, so that a drift of the machine meets both, and keep the median of the ratios."""

    def measure(ours: Callable[[], object], floor: Callable[[], object], *, rounds: int, budget: str) -> float:
        floor(), ours()  # warm up
        pairs = []
        for turn in range(rounds):
            if turn % 2:
                pairs.append((seconds(ours), seconds(floor)))
            else:
                below = seconds(floor)
                pairs.append((seconds(ours), below))
        value = statistics.median(a / b for a, b in pairs)
        quartiles = statistics.quantiles([a / b for a, b in pairs], n=4)
        benchmark.extra_info.update(ratio=value, quartiles=quartiles, floor_seconds=min(b for _, b in pairs))
        benchmark.pedantic(ours, rounds=1)
        _ROWS.append((request.node.name, f"{value:.3f}", f"{quartiles[0]:.3f} to {quartiles[2]:.3f}", budget))
        return value

    return measure


@pytest.fixture
def report(request):
    """Add a row that is no ratio of times."""
    return lambda value, budget: _ROWS.append((request.node.name, value, "", budget))


def pytest_terminal_summary(terminalreporter):
    if not _ROWS:
        return
    lines = [("what", "measured", "quartiles", "budget"), *_ROWS]
    widths = [max(len(line[column]) for line in lines) for column in range(4)]
    terminalreporter.section(f"costs (torch {torch.__version__}, {torch.get_num_threads()} threads)")
    for line in lines:
        terminalreporter.write_line("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)))
