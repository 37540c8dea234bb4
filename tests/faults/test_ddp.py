"""Of two processes one is killed or fails: the other ends too, and the files are whole."""

from __future__ import annotations

import os
import re

import pytest

from tests.faults.checks import assert_whole
from tests.helpers.processes import run_script

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks, so that Python need not start anew")
GONE = "closed by peer|reset by peer|Broken pipe"  # what gloo says of a process that has ended


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    run_script("tests.faults.ddp_script", folder)
    return folder


def ended(folder, fault):
    """Return the exit codes of both, what each told, which files are calibrated, and the number of hidden ones."""
    told = [(folder / f"{fault}_{rank}.log").read_text() for rank in range(2)]
    left = list((folder / fault).glob(".*.tmp"))
    files = sorted(set((folder / fault).iterdir()) - set(left))
    assert [file.name for file in files] == ["epoch=0.ckpt", "epoch=1.ckpt", "epoch=2.ckpt"]
    return (folder / f"{fault}.codes").read_text(), told, [assert_whole(file) for file in files], len(left)


def test_the_second_dies_in_the_pass(folder):
    codes, told, calibrated, hidden = ended(folder, "second_dies")
    assert codes == "1 -9"
    assert re.search(f"RuntimeError: .*({GONE})", told[0])
    assert "AssertionError" not in told[0]  # its model is as training left it
    assert (calibrated, hidden) == ([False, False, False], 0)


def test_the_first_dies_before_it_replaces_a_file(folder):
    codes, told, calibrated, hidden = ended(folder, "first_dies")
    assert codes == "-9 1"
    assert re.search(f"RuntimeError: .*({GONE})", told[1])
    assert "AssertionError" not in told[1]  # its model is calibrated
    assert (calibrated, hidden) == ([True, False, False], 1)


def test_the_second_fails_in_the_pass_of_a_file(folder):
    """Both give up this file alone, and go on together."""
    codes, told, calibrated, hidden = ended(folder, "second_raises")
    assert codes == "1 1"
    texts = ("The calibration pass failed on another process. See the error there.", "the share is gone")
    for log, text in zip(told, texts, strict=True):
        assert re.search(rf"RuntimeError: Could not calibrate the checkpoints '\S*epoch=0.ckpt': {text}", log)
        assert "epoch=1" not in log
        assert "AssertionError" not in log
    assert (calibrated, hidden) == ([False, True, True], 0)


def test_the_second_fails_in_the_pass_before_a_validation(folder):
    """Both go on with the training, and find gamma later."""
    codes, told, calibrated, hidden = ended(folder, "second_raises_while_training")
    assert codes == "0 0"
    texts = ("The calibration pass failed on another process. See the error there.", "the share is gone")
    for log, text in zip(told, texts, strict=True):
        assert re.search(f"leaves step [0-9]+ without gamma. {text}", log)
    assert (calibrated, hidden) == ([True, True, True], 0)
