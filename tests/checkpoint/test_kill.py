"""Killed at any instant, a run leaves each checkpoint file wholly calibrated or wholly not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lightning_calibft import inspect_checkpoint
from tests.checkpoint.kill_script import FILES, Wide
from tests.helpers.processes import run_script
from tests.helpers.runs import ABSENT, SEEN, assert_calibrated, read, split_state

KILLS = 20


def _is_calibrated(file: Path) -> bool:
    """Whether a file is calibrated; fails if it is so by half, or not a file that loads."""
    checkpoint = read(file)
    _, gamma, absent = split_state(checkpoint["state_dict"])
    told = checkpoint.get("lightning_calibft")
    assert inspect_checkpoint(file)["calibrated"] is (told is not None)
    if told is None:
        assert (gamma, absent) == (0.0, [])
        return False
    assert gamma == pytest.approx(told["gamma"], rel=1e-6)
    assert (told["seen_classes"], told["absent_classes"]) == (SEEN, ABSENT)
    assert_calibrated(checkpoint["state_dict"], make=Wide)
    return True


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks, so that 20 runs need not start Python anew")
def test_killed_while_checkpoints_are_calibrated(tmp_path):
    run_script("tests.checkpoint.kill_script", tmp_path, KILLS)

    calibrated = []
    for index in range(KILLS):
        files = list((tmp_path / f"killed_{index}").glob("*.ckpt"))
        assert len(files) == FILES + 1  # one is a link
        calibrated.append(sum(map(_is_calibrated, files)))
    assert all(map(_is_calibrated, tmp_path.glob("whole_*/*.ckpt")))
    # The kills did meet what they were meant for: some files done, others not, and some in the middle of writing one.
    assert sum(0 < count < FILES for count in calibrated) >= KILLS // 2
    assert list(tmp_path.glob("killed_*/.*.tmp"))
