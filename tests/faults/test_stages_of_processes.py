"""A process, alone or of two, fails or dies at each stage: all end, and leave what the plain run leaves."""

from __future__ import annotations

import os

import pytest

from tests.faults.checks import assert_whole
from tests.faults.stages import left
from tests.faults.stages_script import FAULTS, name_of
from tests.helpers.processes import run_script

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks, so that Python need not start anew")
RECOVERS = {"labels", "data_before_validation"}
ENDINGS = {"fit_end", "teardown"}  # written by the module in its last hooks, after a pass of which a process died


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stages")
    run_script("tests.faults.stages_script", folder)
    assert (folder / "plain.codes").read_text() == "0 0"
    return folder


@pytest.mark.parametrize(("stage", "rank", "processes", "what"), FAULTS)
def test_all_end_and_the_files_are_there(stage, rank, processes, what, folder):
    name = name_of(stage, rank, processes, what)
    codes = (folder / f"{name}.codes").read_text().split()
    told = [(folder / f"{name}_{process}.log").read_text() for process in range(processes)]
    assert "hangs" not in codes, told
    files = left(folder / name)
    if what == "raises":
        assert files == left(folder / "plain")
        assert codes == (["0", "0"] if stage in RECOVERS else ["1", "1"]), told
        assert stage in RECOVERS or "the share is gone" in told[rank]
        assert stage in RECOVERS or "on another process" in told[1 - rank]
    else:
        assert left(folder / "plain") - files <= ENDINGS
    for path in (folder / name).rglob("*.ckpt"):
        assert assert_whole(path) or stage not in RECOVERS
