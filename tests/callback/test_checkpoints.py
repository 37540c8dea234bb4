"""Each kept checkpoint gets the gamma of its own weights, and nothing else in the folder changes."""

from __future__ import annotations

import os
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from lightning_calibft import AbsentClassCalibration, get_gamma, inspect_checkpoint
from tests.helpers.runs import (
    MASK,
    OFFSET,
    VAL,
    Nervous,
    Plain,
    assert_calibrated,
    assert_same,
    loader,
    pretrained,
    quiet,
    read,
    trainer_of,
    without_calibration,
)

pytestmark = quiet


class Before(Callback):
    """Keeps what is in the folder when the callback has not yet touched the files, and the weights in memory."""

    def on_fit_end(self, trainer, pl_module):
        assert trainer.callbacks.index(self) < next(
            i for i, other in enumerate(trainer.callbacks) if isinstance(other, AbsentClassCalibration)
        )
        files = [path for path in Path(trainer.default_root_dir).glob("**/*.ckpt") if path.is_file()]
        self.files = {str(path): read(path) for path in files if not path.is_symlink()}
        self.bytes = {str(path): path.read_bytes() for path in files}
        self.state = {key: value.clone() for key, value in pl_module.state_dict().items()}


def fit(folder, *checkpoints, module=None, others=(), ckpt_path=None, callback=None, **kwargs):
    """Run; return the callback, what was there before it wrote, and the module."""
    module = pretrained(Nervous) if module is None else module
    callback, before = callback or AbsentClassCalibration(), Before()
    trainer = trainer_of(folder, callback, *checkpoints, before, *others, **kwargs)
    trainer.fit(module, loader(), loader(VAL, shuffle=False), ckpt_path=ckpt_path)
    return callback, before, module


def check(folder, callback, before, module, make=Nervous):
    """Every file is calibrated for its own weights; all else in it is what was written; so are the live weights."""
    files = {str(path) for path in Path(folder).glob("**/*.ckpt") if not path.is_symlink()}
    assert files == set(before.files) == set(callback.checkpoint_results)
    gammas = set()
    for file in files:
        after = read(file)
        gammas.add(assert_calibrated(after["state_dict"], make=make))
        metadata = after.pop("lightning_calibft")
        result = callback.checkpoint_results[file]
        versions = {"version": version("lightning-calibft"), "torch_version": str(torch.__version__)}
        assert metadata == {**result.as_dict(), **versions}
        assert metadata["gamma"] == pytest.approx(after["state_dict"][f"fc.{OFFSET}"].item(), rel=1e-6)
        assert_plain(metadata)
        expected = before.files[file]
        if not expected.pop("lightning_calibft", None):  # there when it was saved after the last step
            assert expected["state_dict"][f"fc.{OFFSET}"] == 0
            assert not expected["state_dict"][f"fc.{MASK}"].any()
        for key in (f"fc.{OFFSET}", f"fc.{MASK}"):
            expected["state_dict"][key] = after["state_dict"][key]
        assert_same(after, expected)
    assert_same(dict(module.state_dict()), before.state)
    assert_calibrated(module.state_dict(), make=make)
    return gammas


def assert_plain(value):
    assert type(value) in (str, int, float, bool, list, dict)
    for item in value if isinstance(value, list) else value.values() if isinstance(value, dict) else ():
        assert_plain(item)


KINDS = {
    "best": ({"monitor": "val_ausuc", "mode": "max"}, {}, 1),
    "best_and_last": ({"monitor": "val_ausuc", "mode": "max", "save_last": True}, {}, 2),
    "last": ({"save_top_k": 0, "save_last": True}, {}, 1),
    "top_2": ({"monitor": "val_loss", "save_top_k": 2, "mode": "max"}, {"max_epochs": 4}, 2),
    "every_4_steps": ({"every_n_train_steps": 4, "save_top_k": -1}, {}, 3),
    "every_step": ({"every_n_train_steps": 1, "save_top_k": -1, "save_last": True}, {"max_epochs": 1}, 7),
    "all_with_monitor": ({"monitor": "val_loss", "save_top_k": -1}, {"max_epochs": 3}, 3),
    "all_without_monitor": ({"save_top_k": -1}, {"max_epochs": 3}, 3),
    "all_in_validation": (
        {"save_top_k": -1, "save_on_train_epoch_end": False},
        {"max_epochs": 2, "val_check_interval": 2},
        6,
    ),
    "weights_only": ({"save_weights_only": True, "save_top_k": -1}, {}, 2),
    "max_steps": ({"save_last": True, "save_top_k": -1}, {"max_steps": 8, "max_epochs": -1}, 3),
    "link": ({"monitor": "val_loss", "mode": "max", "save_top_k": 2, "save_last": "link"}, {}, 2),
}


@pytest.mark.parametrize("name", KINDS)
def test_each_kept_file_has_the_gamma_of_its_own_weights(name, tmp_path):
    arguments, options, count = KINDS[name]
    checkpoints = ModelCheckpoint(tmp_path, **arguments)
    gammas = check(tmp_path, *fit(tmp_path, checkpoints, **options))
    assert len(list(tmp_path.glob("**/*.ckpt"))) == count + (name == "link")
    if count > 1 and name != "best_and_last":  # those two are saved together
        assert len(gammas) > 1  # else one gamma would do for all
    if name == "link":
        assert (tmp_path / "last.ckpt").is_symlink()
        assert_calibrated(read(tmp_path / "last.ckpt")["state_dict"], make=Nervous)


def test_early_stopping_keeps_the_best(tmp_path):
    checkpoints = ModelCheckpoint(tmp_path, monitor="val_ausuc", mode="max", save_last=True)
    stop = EarlyStopping("val_loss", mode="max", patience=1, min_delta=100)
    run = fit(tmp_path, checkpoints, others=[stop], max_epochs=9)
    assert stop.stopped_epoch == 1
    check(tmp_path, *run)


def test_several_checkpoint_callbacks(tmp_path):
    kinds = [
        ModelCheckpoint(tmp_path / "best", monitor="val_loss", mode="max"),
        ModelCheckpoint(tmp_path / "steps", every_n_train_steps=5, save_top_k=-1),
    ]
    check(tmp_path, *fit(tmp_path, *kinds))


def test_a_run_that_is_resumed_leaves_the_files_of_the_first_alone(tmp_path):
    def checkpoints():
        return ModelCheckpoint(tmp_path, save_top_k=-1, save_last=True, filename="{epoch}")

    fit(tmp_path, checkpoints())
    first = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.glob("epoch*")}
    assert len(first) == 2
    module = pretrained(Nervous)
    callback, before, _ = fit(tmp_path, checkpoints(), module=module, ckpt_path=tmp_path / "epoch=1.ckpt", max_epochs=4)
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in first} == first
    assert {Path(path).name for path in callback.checkpoint_results} == {"epoch=2.ckpt", "epoch=3.ckpt", "last.ckpt"}
    for path in callback.checkpoint_results:
        assert_calibrated(read(path)["state_dict"], make=Nervous)
        assert before.files[path]["state_dict"][f"fc.{OFFSET}"] == 0
    assert read(tmp_path / "last.ckpt")["global_step"] == 24


def test_a_resumed_run_whose_epochs_are_over_calibrates_what_the_first_has_kept(tmp_path):
    plain = trainer_of(tmp_path, ModelCheckpoint(tmp_path, save_last=True))
    plain.fit(pretrained(Nervous), loader())
    module = pretrained(Nervous)
    callback, before, _ = fit(
        tmp_path,
        ModelCheckpoint(tmp_path, save_last=True),
        module=module,
        ckpt_path=plain.checkpoint_callback.last_model_path,
    )
    gamma = assert_calibrated(module.state_dict(), make=Nervous)
    assert {Path(path).name for path in callback.checkpoint_results} == {"epoch=1-step=12.ckpt", "last.ckpt"}
    for path, expected in before.files.items():
        after = read(path)
        assert assert_calibrated(after["state_dict"], make=Nervous) == gamma
        assert_same(without_calibration(after), expected)


class Worse(Nervous):
    """The first epoch stays the best one."""

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        self.log("epoch", float(self.current_epoch), batch_size=8)


class Preempted(Callback):
    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 2:
            raise RuntimeError("preempted")


def fit_worse(folder, *others, **kwargs):
    checkpoints = ModelCheckpoint(folder, "{epoch}", monitor="epoch", save_last=True)
    module, callback = pretrained(Worse), AbsentClassCalibration()
    trainer = trainer_of(folder, callback, checkpoints, *others, max_epochs=4)
    trainer.fit(module, loader(), loader(VAL, shuffle=False), **kwargs)
    assert checkpoints.best_model_path == str(folder / "epoch=0.ckpt")
    return trainer, module


def test_the_best_file_of_an_interrupted_run_is_calibrated_when_it_goes_on(tmp_path):
    """It stays the best one, so `test(ckpt_path="best")` takes it."""
    with pytest.raises(RuntimeError, match="preempted"):
        fit_worse(tmp_path, Preempted())
    assert not inspect_checkpoint(tmp_path / "epoch=0.ckpt")["calibrated"]
    trainer, module = fit_worse(tmp_path, ckpt_path=tmp_path / "last.ckpt")
    gamma = assert_calibrated(read(tmp_path / "epoch=0.ckpt")["state_dict"], make=Worse)
    trainer.test(module, loader(VAL, shuffle=False), ckpt_path="best", verbose=False)
    assert get_gamma(module) == pytest.approx(gamma)


@pytest.mark.parametrize("content", ["another_model", "no_checkpoint"])
def test_a_file_of_an_interrupted_run_that_does_not_load_is_named(content, tmp_path):
    with pytest.raises(RuntimeError, match="preempted"):
        fit_worse(tmp_path, Preempted())
    best, foreign = tmp_path / "epoch=0.ckpt", tmp_path / "foreign"
    stat = best.stat()
    foreign.write_bytes(b"hello")
    if content == "another_model":
        torch.save({"state_dict": torch.nn.Linear(3, 4).state_dict()}, foreign)
    best.write_bytes(foreign.read_bytes())
    os.utime(best, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.warns(UserWarning, match=rf"leaves checkpoints of other runs as they are, '{best}': "):
        _, module = fit_worse(tmp_path, ckpt_path=tmp_path / "last.ckpt")
    assert best.read_bytes() == foreign.read_bytes()
    assert_calibrated(module.state_dict(), make=Worse)
    assert_calibrated(read(tmp_path / "last.ckpt")["state_dict"], make=Worse)


def test_foreign_and_deleted_files(tmp_path):
    foreign = tmp_path / "epoch=9.ckpt"
    torch.save({"state_dict": Plain().state_dict()}, foreign)
    stat = foreign.stat()

    class Deletes(Callback):
        def on_fit_end(self, trainer, pl_module):
            os.remove(trainer.checkpoint_callback.best_model_path)

    checkpoints = ModelCheckpoint(tmp_path, save_top_k=-1, save_last=True)
    with pytest.warns(UserWarning, match=r"does not find \S*epoch=1-step=12.ckpt, which this run has saved"):
        callback, _, _ = fit(tmp_path, checkpoints, others=[Deletes()])
    assert {Path(path).name for path in callback.checkpoint_results} == {"epoch=0-step=6.ckpt", "last.ckpt"}
    assert {path.name for path in tmp_path.iterdir()} == {"epoch=0-step=6.ckpt", "last.ckpt", "epoch=9.ckpt"}
    assert (foreign.stat().st_ino, foreign.stat().st_mtime_ns) == (stat.st_ino, stat.st_mtime_ns)


def test_files_stay_as_they_are_on_request(tmp_path):
    callback, before, module = fit(
        tmp_path,
        ModelCheckpoint(tmp_path, save_last=True),
        callback=AbsentClassCalibration(calibrate_checkpoints=False),
    )
    assert {str(path): path.read_bytes() for path in tmp_path.glob("*.ckpt")} == before.bytes
    assert not callback.checkpoint_results
    assert_calibrated(module.state_dict(), make=Nervous)


def test_the_mode_of_a_file_stays(tmp_path):
    class Private(Callback):
        def on_fit_end(self, trainer, pl_module):
            os.chmod(trainer.checkpoint_callback.best_model_path, 0o640)

    checkpoints = ModelCheckpoint(tmp_path)
    fit(tmp_path, checkpoints, others=[Private()])
    assert os.stat(checkpoints.best_model_path).st_mode & 0o777 == 0o640
    assert inspect_checkpoint(checkpoints.best_model_path)["calibrated"]
