"""Which tests are thorough: they run in `make test-all` and in continuous integration, but not in `make test`.

Quick tests check each room with data in memory and runs of seconds. Thorough ones are all tests in the folders below,
and, elsewhere, those marked with ``@pytest.mark.thorough``: what they start is a group of processes, a process that is
killed, a compiler or an exporter, or a training of many epochs.
"""

from __future__ import annotations

from pathlib import Path

import pytest

THOROUGH = ("engines", "examples", "faults", "properties", "shipping")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent) and item.path.parent.name in THOROUGH:
            item.add_marker(pytest.mark.thorough)
