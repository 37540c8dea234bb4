"""Which tests are thorough: they run in `make test-all` and in continuous integration, but not in `make test`.

The quick tests check each room in this process, with small data in memory and runs of seconds. The thorough ones start
Python anew, kill processes, compile and export, train for many epochs, or try all that can be combined.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch import distributed

from tests.helpers.processes import OF_A_GROUP

HERE = Path(__file__).parent
THOROUGH = {
    # Folders.
    "engines",
    "examples",
    "faults",
    "integrations",
    "properties",
    "shipping",
    # Files.
    "callback/test_ddp.py",
    "callback/test_decisions_together.py",
    "callback/test_diagnostics_ddp.py",
    "callback/test_diagnostics_loggers.py",
    "callback/test_nodes.py",
    "callback/test_spawn.py",
    "checkpoint/test_kill.py",
    "cli/test_killed.py",
    "cli/test_terminal.py",
    "estimators/test_operating_point_error.py",
    "head/test_tools.py",
    "head/test_whole_model_tools.py",
    "head/test_zoo.py",
    # Tests.
    "callback/test_file_errors.py::test_a_full_disk",
    "callback/test_packages.py::test_a_script_that_imports_lightning_first",
    "callback/test_packages.py::test_a_script_that_imports_one",
    "callback/test_retraining_apart.py::test_killed_and_resumed",
    "cli/test_bad_files.py::test_a_full_disk",
    "cli/test_calibrate.py::test_interrupted",
    "cross_validation/test_folder.py::test_killed_and_resumed",
    "test_imports.py",
    "docs/test_pages.py::test_scripts",
}


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Do not even import what will not run."""
    if "not thorough" in config.option.markexpr and collection_path.is_relative_to(HERE):
        return collection_path.relative_to(HERE).as_posix() in THOROUGH or None
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(HERE):
            file = item.path.relative_to(HERE).as_posix()
            name = getattr(item, "originalname", item.name)
            if not THOROUGH.isdisjoint({file.split("/")[0], file, f"{file}::{name}"}):
                item.add_marker(pytest.mark.thorough)


@pytest.fixture(autouse=True, scope="module")
def _no_process_group_is_left() -> Iterator[None]:
    """A forked process would inherit the group and could not join another, and a new one would look for it."""
    yield
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
    for name in OF_A_GROUP:
        os.environ.pop(name, None)
