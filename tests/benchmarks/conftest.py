"""Costs against a floor measured in the same run: rows that fail over their budget.

They are printed as a table at the end, and kept in the JSON of pytest-benchmark.
"""

from __future__ import annotations

import gc
import inspect
import statistics
import time
from collections.abc import Callable, Iterator

import pytest
import torch

from tests.benchmarks.page import is_over

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


def seconds(function: Callable[[], object], threads: int = 1) -> float:
    """Time a call; a function that returns a float has timed the part that counts by itself."""
    now = clock if threads == 1 else time.perf_counter  # the time of a process counts that of all its threads
    gc.disable()
    try:
        start = now()
        value = function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return value if isinstance(value, float) else now() - start
    finally:
        gc.enable()


def in_turns(ours: Callable[[], object], floor: Callable[[], object], rounds: int) -> Iterator[tuple[float, float]]:
    """Time both sides in turns, so that a drift of the machine meets both."""
    floor(), ours()  # warm up
    for turn in range(rounds):
        if turn % 2:
            yield seconds(ours), seconds(floor)
        else:
            below = seconds(floor)
            yield seconds(ours), below


@pytest.fixture
def ratio(report):
    """Keep how many times as long as the floor something takes: the median of some rounds."""

    def measure(ours: Callable[[], object], floor: Callable[[], object], *, rounds: int, budget: str) -> None:
        low, median, high = statistics.quantiles((a / b for a, b in in_turns(ours, floor, rounds)), n=4)
        report(f"{median:.3f}", budget, f"{low:.3f} to {high:.3f}")

    return measure


@pytest.fixture
def own_share(report):
    """Keep how many microseconds a step something takes beyond the floor.

    It is the difference of the fastest rounds: a median of differences as small as these would measure the machine,
    and what else it does only adds time.
    """

    def measure(
        ours: Callable[[], object], floor: Callable[[], object], *, steps: int, rounds: int, budget: str
    ) -> None:
        pairs = [(1e6 * a / steps, 1e6 * b / steps) for a, b in in_turns(ours, floor, rounds)]
        low, _, high = statistics.quantiles((a - b for a, b in pairs), n=4)
        fastest, least = (min(times) for times in zip(*pairs, strict=True))
        report(f"{fastest - least:.1f} µs", budget, f"{low:.1f} to {high:.1f}")

    return measure


@pytest.fixture
def report(request, benchmark):
    """Keep a row: of which section, the docstring of the test; of what, its parameters; and the value.

    A value over its budget fails the test, after the row is kept.
    """
    benchmark.pedantic(lambda: None)  # the plugin writes no JSON without a call

    def keep(value: str, budget: str = "none", quartiles: str = "", what: str = "") -> None:
        section = inspect.getdoc(request.function).splitlines()[0]
        what = ", ".join([request.node.callspec.id.replace("-", ", "), *([what] if what else [])])
        row = {"section": section, "what": what, "value": value, "quartiles": quartiles, "budget": budget}
        benchmark.extra_info.setdefault("rows", []).append(row)
        _ROWS.append((f"{section} {what}", value, quartiles, budget))
        assert not is_over(row), f"{section} {what}: {value} is over the budget of {budget}"

    return keep


def pytest_terminal_summary(terminalreporter):
    if not _ROWS:
        return
    lines = [("what", "measured", "quartiles", "budget"), *_ROWS]
    widths = [max(len(line[column]) for line in lines) for column in range(4)]
    terminalreporter.section(f"costs (torch {torch.__version__})")
    for line in lines:
        terminalreporter.write_line("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)))
