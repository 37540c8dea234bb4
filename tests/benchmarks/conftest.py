"""Ratios of two costs measured in one run, printed as a table at its end and kept in the JSON of pytest-benchmark."""

from __future__ import annotations

import gc
import inspect
import statistics
import time
from collections.abc import Callable

import pytest
import torch

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
# On one thread, the time of this process alone: what else the machine does hardly matters then.
clock = time.perf_counter if torch.cuda.is_available() else time.process_time
_ROWS: list[tuple[str, str, str, str]] = []


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def seconds(function: Callable[[], object]) -> float:
    """Time a call; a function that returns a float has timed the part that counts by itself."""
    gc.disable()
    try:
        start = clock()
        value = function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return value if isinstance(value, float) else clock() - start
    finally:
        gc.enable()


@pytest.fixture
def ratio(report):
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
        ratios = [a / b for a, b in pairs]
        low, _, high = statistics.quantiles(ratios, n=4)
        report(f"{statistics.median(ratios):.3f}", budget, f"{low:.3f} to {high:.3f}")
        return statistics.median(a for a, _ in pairs)

    return measure


@pytest.fixture
def report(request, benchmark):
    """Keep a row: of which section, the docstring of the test; of what, its parameters; and the value."""
    benchmark.pedantic(lambda: None)  # the plugin writes no JSON without a call

    def keep(value: str, budget: str = "none", quartiles: str = "", what: str = "") -> None:
        section = inspect.getdoc(request.function).splitlines()[0]
        what = ", ".join([request.node.callspec.id.replace("-", ", "), *([what] if what else [])])
        row = {"section": section, "what": what, "value": value, "quartiles": quartiles, "budget": budget}
        benchmark.extra_info.setdefault("rows", []).append(row)
        _ROWS.append((f"{section} {what}", value, quartiles, budget))

    return keep


def pytest_terminal_summary(terminalreporter):
    if not _ROWS:
        return
    lines = [("what", "measured", "quartiles", "budget"), *_ROWS]
    widths = [max(len(line[column]) for line in lines) for column in range(4)]
    terminalreporter.section(f"costs (torch {torch.__version__})")
    for line in lines:
        terminalreporter.write_line("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)))
