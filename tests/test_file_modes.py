"""Each file that the package writes has the mode that the user's umask gives to new files."""

from __future__ import annotations

import os

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from lightning_calibft import AbsentClassCalibration, CalibrationDiagnostics, export, fold_checkpoint, set_gamma
from tests.helpers.runs import SEEN, VAL, Plain, loader, pretrained, quiet, trainer_of

pytestmark = quiet


@pytest.fixture(params=[0o027, 0o077])
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def check(paths, umask):
    for path in paths:
        assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~umask, path


class Renaming(TorchCheckpointIO):
    """Writes to a name of its own, as plugins do."""

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        torch.save(checkpoint, f"{path}.own")

    def load_checkpoint(self, path, map_location=None, **kwargs):
        return torch.load(f"{path}.own", map_location, weights_only=False)


@pytest.mark.parametrize("plugin", [TorchCheckpointIO, Renaming])
def test_what_a_fit_writes(plugin, umask, tmp_path):
    diagnostics, checkpoints = CalibrationDiagnostics(output="reports/a.html"), ModelCheckpoint(tmp_path / "kept")
    callbacks = [callback := AbsentClassCalibration(), diagnostics, checkpoints]
    trainer = trainer_of(tmp_path, *callbacks, plugins=[plugin()], max_epochs=1)
    trainer.fit(pretrained(), loader(), loader(VAL, shuffle=False))
    check([tmp_path / "reports", tmp_path / "reports" / "a.html"], umask)
    # Lightning asks for the umask once in a process, so what it writes shows what is right.
    trainer.save_checkpoint(tmp_path / "plain" / "plain.ckpt")
    (plain,), (kept,) = (tmp_path.glob(f"{folder}/*") for folder in ("plain", "kept"))
    assert callback.checkpoint_results
    assert kept.stat().st_mode == plain.stat().st_mode


def test_what_cross_validation_writes(umask, tmp_path):
    options = {"folder": str(tmp_path / "new" / "splits"), "num_splits": 2}
    callback = AbsentClassCalibration(estimator="pcv", estimator_kwargs=options)
    trainer_of(tmp_path, callback, max_epochs=1).fit(pretrained(), loader())
    assert len([*(tmp_path / "new" / "splits").iterdir()]) == 2
    check(tmp_path.rglob("*"), umask)


def test_what_is_made_from_a_file(umask, tmp_path):
    model = set_gamma(pretrained(Plain), 2.0, SEEN).eval()
    torch.save({"state_dict": model.state_dict(), "pytorch-lightning_version": "2.6.0"}, tmp_path / "given.ckpt")
    names = [f"folded{end}" for end in (".ckpt", ".pth", ".safetensors")]
    for name in names:
        fold_checkpoint(tmp_path / "given.ckpt", tmp_path / name)
    export(model, tmp_path / "model.pt2", torch.randn(2, 5))
    check([tmp_path / name for name in (*names, "model.pt2")], umask)


def test_a_file_that_is_replaced_keeps_its_mode(tmp_path):
    """Its owner has chosen it."""
    torch.save({"state_dict": set_gamma(pretrained(), 2.0, SEEN).state_dict()}, tmp_path / "given.ckpt")
    (tmp_path / "folded.ckpt").touch(0o640)
    (tmp_path / "folded.ckpt").chmod(0o640)
    fold_checkpoint(tmp_path / "given.ckpt", tmp_path / "folded.ckpt")
    assert (tmp_path / "folded.ckpt").stat().st_mode & 0o777 == 0o640
