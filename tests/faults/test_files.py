"""Kept files that are gone, are others by now, or may not be written: they stay as they are, and the rest is done."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from lightning_calibft import AbsentClassCalibration, inspect_checkpoint
from tests.faults.checks import Armed, Arms, assert_sound, assert_whole, calibrated, faulty
from tests.helpers.runs import SEEN, loader, pretrained, quiet, read, trainer_of

pytestmark = [
    quiet,
    pytest.mark.filterwarnings(
        "ignore:Found 1 module.s. in eval mode at the start of training", "ignore:The metric received no absent samples"
    ),
]


class AtTheEnd(Callback):
    """Does something when the files are kept and not calibrated yet."""

    def __init__(self, action) -> None:
        self.action = action

    def on_fit_end(self, trainer, pl_module):
        self.action()


def fit(folder, *callbacks, module=None, refresh=False, calibration=None):
    """Fit, and leave ``epoch=0.ckpt`` with weights of its own and ``epoch=1.ckpt`` with the last ones."""
    module = module or faulty(Armed())
    checkpoints = ModelCheckpoint(folder, "{epoch}", save_top_k=-1)
    calibration = calibration or AbsentClassCalibration(SEEN, refresh_on_validation=refresh)
    trainer = trainer_of(folder, calibration, checkpoints, *callbacks)
    data = (loader(), loader(shuffle=False)) if refresh else (loader(),)
    trainer.fit(module, *data)
    return module


@pytest.mark.parametrize("epoch", [0, 1])
def test_deleted_before_the_files_are_calibrated(epoch, tmp_path):
    path = tmp_path / f"epoch={epoch}.ckpt"
    with pytest.warns(UserWarning, match=rf"does not find {path}, which this run has saved. What was moved or deleted"):
        module = fit(tmp_path, AtTheEnd(path.unlink))
    assert calibrated(tmp_path) == {f"epoch={1 - epoch}.ckpt": True}
    assert_sound(module, is_calibrated=True)


def test_deleted_while_the_files_are_calibrated(tmp_path):
    data = Armed((tmp_path / "epoch=1.ckpt").unlink)  # in the pass of the other
    module = faulty(data)
    with pytest.raises(RuntimeError, match=r"Could not calibrate .*epoch=1.ckpt': Expected .* does not exist"):
        fit(tmp_path, Arms(data, "file"), module=module)
    assert calibrated(tmp_path) == {"epoch=0.ckpt": True}
    assert_sound(module, is_calibrated=True)


@pytest.mark.parametrize("deleted", [False, True])
def test_replaced_or_deleted_in_its_own_pass(deleted, tmp_path):
    """What lies there by now is newer: it is left alone."""
    path, other = tmp_path / "mine" / "epoch=0.ckpt", fit_another(tmp_path / "other") / "epoch=0.ckpt"
    expected = [] if deleted else [other.read_bytes()]
    data = Armed(path.unlink if deleted else lambda: os.replace(other, path) if other.exists() else None)
    module, callback = faulty(data), AbsentClassCalibration(SEEN)
    with pytest.warns(UserWarning, match=rf"leaves {path} as it is: something else has written or deleted it while"):
        fit(path.parent, Arms(data, "file"), module=module, calibration=callback)
    assert [path.read_bytes() for path in [path] if path.exists()] == expected
    assert list(callback.checkpoint_results) == [str(path.with_name("epoch=1.ckpt"))]
    assert calibrated(path.parent) == {**dict.fromkeys(["epoch=0.ckpt"] * (not deleted), True), "epoch=1.ckpt": True}
    assert_sound(module, is_calibrated=True)


def becomes_a_lambda():
    return lambda: 0


class Once:
    """Can be pickled, but what it is unpickled to cannot."""

    def __reduce__(self):
        return becomes_a_lambda, ()


class SavesOnce(Callback):
    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        if trainer.current_epoch == 0:
            checkpoint["once"] = Once()


def test_a_file_that_cannot_be_pickled_again(tmp_path):
    module = faulty(Armed())
    with pytest.raises(RuntimeError, match=r"Could not calibrate .*epoch=0.ckpt.: .*([pP]ickle|local obj)") as raised:
        fit(tmp_path, SavesOnce(), module=module)
    assert "epoch=1.ckpt" not in str(raised.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["epoch=0.ckpt", "epoch=1.ckpt"]
    assert not inspect_checkpoint(tmp_path / "epoch=0.ckpt", weights_only=False)["calibrated"]
    assert assert_whole(tmp_path / "epoch=1.ckpt")
    assert_sound(module, is_calibrated=True)


def another_model(path):
    torch.save({"state_dict": torch.nn.Linear(3, 4).state_dict()}, path)


def no_checkpoint_of_lightning(path):
    torch.save({"model": pretrained().state_dict(), "epoch": 3}, path)


def no_state_dict(path):
    torch.save({"losses": [0.3, 0.2]}, path)


@pytest.mark.parametrize(
    ("replace", "reason"),
    [
        (another_model, "Missing key"),
        (no_checkpoint_of_lightning, "it is no longer a Lightning checkpoint"),
        (no_state_dict, "holds no named tensors"),
    ],
)
@pytest.mark.parametrize("epoch", [0, 1])
def test_replaced_by_another_file(replace, reason, epoch, tmp_path):
    path, module, other = tmp_path / f"epoch={epoch}.ckpt", faulty(Armed()), []

    def replaces():
        replace(path)
        other.append(path.read_bytes())

    with pytest.raises(RuntimeError, match=r"Could not calibrate the checkpoints") as raised:
        fit(tmp_path, AtTheEnd(replaces), module=module)
    assert reason in str(raised.value)
    assert f"epoch={1 - epoch}.ckpt" not in str(raised.value)
    assert [path.read_bytes()] == other
    path.unlink()
    assert calibrated(tmp_path) == {f"epoch={1 - epoch}.ckpt": True}
    assert_sound(module, is_calibrated=True)


@pytest.mark.parametrize("refresh", [False, True])
@pytest.mark.parametrize("epoch", [0, 1])
def test_replaced_by_a_checkpoint_of_another_run(epoch, refresh, tmp_path):
    """Of the same step: it gets the gamma of the weights that it holds, not what this run found for its own."""
    other, mine = tmp_path / "other", tmp_path / "mine"
    shutil.copytree(fit_another(other), tmp_path / "kept")
    name = f"epoch={epoch}.ckpt"
    module = fit(mine, AtTheEnd(lambda: shutil.copy(other / name, mine / name)), refresh=refresh)
    assert calibrated(mine) == {"epoch=0.ckpt": True, "epoch=1.ckpt": True}  # each with its own gamma
    weights = [read(folder / name)["state_dict"]["fc.weight"] for folder in (mine, tmp_path / "kept")]
    assert torch.equal(*weights)
    assert_sound(module, is_calibrated=True)


def fit_another(folder):
    module = pretrained()
    module.fc.weight.data += 0.3 * torch.randn(6, 16)
    trainer = trainer_of(folder, AbsentClassCalibration(SEEN), ModelCheckpoint(folder, "{epoch}", save_top_k=-1))
    trainer.fit(module, loader())
    return folder


@pytest.fixture
def open_folder():
    """A folder that all users may look into: that of pytest belongs to one alone."""
    with tempfile.TemporaryDirectory() as parent:
        os.chmod(parent, 0o755)
        folder = Path(parent, "run")
        folder.mkdir()
        yield folder
        folder.chmod(0o755)


def others_may_read(folder: Path) -> bool:
    return all(each.stat().st_mode & 0o5 == 0o5 for each in (folder, *folder.parents))


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="needs the rights of POSIX")
@pytest.mark.skipif(
    not others_may_read(Path(sys.prefix).resolve()), reason="needs packages in folders that others may read"
)
def test_a_read_only_folder(open_folder):
    """Root may write anywhere: as root, the process gives up its rights before the files are calibrated."""
    user, before, module = os.geteuid(), {}, faulty(Armed())

    def close():
        assert calibrated(open_folder) == {"epoch=0.ckpt": False, "epoch=1.ckpt": False}
        before.update({path: path.read_bytes() for path in open_folder.iterdir()})
        open_folder.chmod(0o555)
        if user == 0:
            os.seteuid(65534)

    try:
        with pytest.raises(RuntimeError, match="Could not calibrate the checkpoints") as raised:
            fit(open_folder, AtTheEnd(close), module=module)
    finally:
        os.seteuid(user)
    for name in ("epoch=0", "epoch=1"):
        assert f"'{open_folder}/{name}.ckpt': [Errno 13] Permission denied" in str(raised.value)
    assert "`trainer.save_checkpoint` saves it with its gamma" in str(raised.value)
    assert {path: path.read_bytes() for path in open_folder.iterdir()} == before
    assert_sound(module, is_calibrated=True)
