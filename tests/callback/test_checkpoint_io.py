"""Checkpoints are read and written as the run does it: by its own ``CheckpointIO``, and where it puts them."""

from __future__ import annotations

import gzip
import io
from pathlib import Path

import fsspec
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO, CheckpointIO, TorchCheckpointIO

from lightning_calibft import AbsentClassCalibration, get_gamma
from tests.helpers.runs import (
    SEEN,
    VAL,
    Nervous,
    assert_calibrated,
    assert_same,
    blobs,
    loader,
    pretrained,
    quiet,
    split_state,
    trainer_of,
    without_calibration,
)

pytestmark = quiet


def packed(checkpoint) -> bytes:
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    return buffer.getvalue()


def unpacked(content: bytes) -> dict:
    return torch.load(io.BytesIO(content), weights_only=False)


class Compressed(TorchCheckpointIO):
    """What is on the disk is not what ``torch.save`` writes."""

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(gzip.compress(packed(checkpoint)))

    def load_checkpoint(self, path, map_location=None, weights_only=None):
        return unpacked(gzip.decompress(Path(path).read_bytes()))


class WithSuffix(CheckpointIO):
    """Writes to another name, and knows no ``weights_only``."""

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(f"{path}.part").write_bytes(packed(checkpoint))

    def load_checkpoint(self, path, map_location=None):
        return unpacked(Path(f"{path}.part").read_bytes())

    def remove_checkpoint(self, path):
        Path(f"{path}.part").unlink()


class InFolders(WithSuffix):
    """Writes a folder."""

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        Path(path).mkdir(parents=True, exist_ok=True)
        Path(path, "weights").write_bytes(packed(checkpoint))

    def load_checkpoint(self, path, map_location=None, weights_only=None):
        return unpacked(Path(path, "weights").read_bytes())


class Later(Compressed):
    """Writes when it is torn down."""

    def __init__(self):
        self.waiting = []

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        self.waiting.append((packed(checkpoint), path))

    def teardown(self):
        while self.waiting:
            content, path = self.waiting.pop(0)
            super().save_checkpoint(unpacked(content), path)


class Before(Callback):
    """Reads the kept files when nothing is calibrated yet."""

    def on_fit_end(self, trainer, pl_module):
        self.files = contents(trainer)


def contents(trainer) -> dict[str, dict]:
    kept = trainer.checkpoint_callback
    reader = trainer.strategy.checkpoint_io
    return {path: reader.load_checkpoint(path) for path in (kept.last_model_path, *kept.best_k_models)}


KINDS = {
    "compressed": Compressed,
    "with_suffix": WithSuffix,
    "in_folders": InFolders,
    "later": Later,
    "async": lambda: AsyncCheckpointIO(TorchCheckpointIO()),
    "async_compressed": lambda: AsyncCheckpointIO(Compressed()),
}


@pytest.mark.parametrize("refresh", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_io_of_the_user(kind, refresh, tmp_path):
    checkpoints = ModelCheckpoint(tmp_path, "{epoch}", monitor="val_loss", mode="max", save_top_k=2, save_last=True)
    callback, before = AbsentClassCalibration(refresh_on_validation=refresh), Before()
    module = pretrained(Nervous)
    trainer = trainer_of(tmp_path, callback, before, checkpoints, plugins=[KINDS[kind]()])
    trainer.fit(module, loader(), loader(VAL, shuffle=False))
    names = {path.name for path in tmp_path.iterdir()}
    after = contents(trainer)
    assert len(after) == 3
    assert after.keys() == callback.checkpoint_results.keys()
    for path, checkpoint in after.items():
        gamma = assert_calibrated(checkpoint["state_dict"], make=Nervous)
        assert checkpoint["lightning_calibft"]["gamma"] == pytest.approx(gamma)
        assert_same(without_calibration(checkpoint), without_calibration(before.files[path]))
    suffix = ".part" if kind == "with_suffix" else ""
    assert names == {f"{name}.ckpt{suffix}" for name in ("epoch=0", "epoch=1", "last")}
    if kind == "with_suffix":  # Lightning itself cannot read its files
        return
    trainer.test(module, loader(VAL, shuffle=False), ckpt_path=checkpoints.best_model_path, verbose=False)
    assert get_gamma(module) == pytest.approx(callback.checkpoint_results[checkpoints.best_model_path].gamma)


@pytest.mark.parametrize("refresh", [False, True])
def test_remote_files(refresh, tmp_path):
    checkpoints = ModelCheckpoint(f"memory://{tmp_path.name}", "{epoch}", save_top_k=-1)
    module, callback = pretrained(Nervous), AbsentClassCalibration(refresh_on_validation=refresh)
    trainer_of(tmp_path, callback, checkpoints).fit(module, loader(), loader(VAL, shuffle=False))
    paths = [f"memory://{tmp_path.name}/epoch={epoch}.ckpt" for epoch in range(2)]
    assert sorted(callback.checkpoint_results) == paths
    for path in paths:
        with fsspec.open(path) as file:
            assert_calibrated(torch.load(file, weights_only=True)["state_dict"], make=Nervous)
    assert_calibrated(module.state_dict(), make=Nervous)


def test_a_remote_file_that_is_gone(tmp_path):
    class Deletes(Callback):
        def on_fit_end(self, trainer, pl_module):
            fsspec.filesystem("memory").rm(f"/{tmp_path.name}/epoch=0.ckpt")

    checkpoints = ModelCheckpoint(f"memory://{tmp_path.name}", "{epoch}", save_top_k=-1)
    callback = AbsentClassCalibration()
    with pytest.warns(UserWarning, match=r"does not find memory://\S*epoch=0.ckpt, which this run has saved"):
        trainer_of(tmp_path, callback, checkpoints, Deletes()).fit(pretrained(Nervous), loader())
    assert [path.rsplit("/", 1)[1] for path in callback.checkpoint_results] == ["epoch=1.ckpt"]


class FailsLater(Compressed):
    """The storage is full when training is over."""

    full = False

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        if self.full:
            Path(path).write_bytes(b"half of it")
            raise OSError("no space left")
        super().save_checkpoint(checkpoint, path)

    def teardown(self):
        self.full = True


def test_what_cannot_be_written_again_stays_whole(tmp_path):
    checkpoints, module = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1), pretrained(Nervous)
    plugin = FailsLater()
    trainer = trainer_of(tmp_path, AbsentClassCalibration(), checkpoints, plugins=[plugin])
    with pytest.raises(RuntimeError, match=r"Could not calibrate the checkpoints '\S*epoch=0.ckpt': no space left"):
        trainer.fit(module, loader())
    assert {path.name for path in tmp_path.iterdir()} == {"epoch=0.ckpt", "epoch=1.ckpt"}
    for path in tmp_path.iterdir():
        assert split_state(plugin.load_checkpoint(path)["state_dict"])[1:] == (0.0, [])
    assert_calibrated(module.state_dict(), make=Nervous)


@pytest.mark.parametrize("seen", [[0, 2], [1, 4, 5]], ids=["fewer_classes", "other_classes"])
@pytest.mark.parametrize("finished", [True, False])
def test_a_file_that_another_run_has_written_under_the_same_name(finished, seen, tmp_path):
    """Its classes are not those of this run, so neither is its gamma."""

    class Other(Callback):
        def on_train_end(self, trainer, pl_module):
            callback = AbsentClassCalibration(calibrate_checkpoints=finished)
            data = loader(blobs(seen, seed=3))
            trainer_of(tmp_path, callback, kept()).fit(pretrained(Nervous), data)
            self.content = (tmp_path / "best.ckpt").read_bytes()

    def kept():
        return ModelCheckpoint(tmp_path, "best", enable_version_counter=False)

    other, module, callback = Other(), pretrained(Nervous), AbsentClassCalibration()
    if not finished and set(seen) < set(SEEN):
        pytest.skip("this run may have met its last class after it was saved")
    with pytest.warns(UserWarning, match=r"leaves checkpoints of other runs as they are, '\S*best.ckpt': another run"):
        trainer_of(tmp_path, callback, other, kept()).fit(module, loader())
    assert (tmp_path / "best.ckpt").read_bytes() == other.content
    assert not callback.checkpoint_results
    assert_calibrated(module.state_dict(), make=Nervous)
