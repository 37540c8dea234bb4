"""Killed wherever it is, a run leaves files that load, each calibrated or not, and goes on from them."""

from __future__ import annotations

import os

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_calibft import AbsentClassCalibration
from tests.faults.checks import assert_sound, assert_whole, calibrated
from tests.faults.kill_script import PLACES
from tests.helpers.processes import run_script
from tests.helpers.runs import SEEN, loader, pretrained, quiet, trainer_of

pytestmark = [
    quiet,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="forks, so that Python need not start anew"),
    pytest.mark.filterwarnings("ignore:Found 1 module.s. in eval mode at the start of training"),
]


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("killed")
    run_script("tests.faults.kill_script", folder)
    return folder


@pytest.mark.parametrize("place", PLACES)
def test_killed(place, killed):
    folder, (expected, hidden) = killed / place, PLACES[place]
    left = list(folder.glob(".*"))
    assert len(left) == hidden
    assert all(path.suffix == ".tmp" for path in left)
    files = sorted(set(folder.iterdir()) - set(left))
    assert [file.name for file in files] == [f"epoch={epoch}.ckpt" for epoch in range(len(expected))]
    assert [assert_whole(file) for file in files] == expected
    for path in left:
        path.unlink()

    before = {file.name: file.read_bytes() for file in files}
    module = pretrained()
    module.body[1].eval()
    checkpoints = ModelCheckpoint(folder, "{epoch}", save_top_k=-1)
    trainer = trainer_of(folder, AbsentClassCalibration(SEEN), checkpoints, max_epochs=3)
    trainer.fit(module, loader(), ckpt_path=files[-1])
    assert_sound(module, is_calibrated=True)
    # What the killed run has left stays as it was, except for the file that could still be the best one.
    kept = {os.path.basename(checkpoints.best_model_path)}
    assert all(file.read_bytes() == before[file.name] for file in files if file.name not in kept)
    assert calibrated(folder) == {**dict(zip(before, expected, strict=True)), **dict.fromkeys(new(before) | kept, True)}


def new(before):
    return {f"epoch={epoch}.ckpt" for epoch in range(3)} - before.keys()
