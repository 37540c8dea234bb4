"""What is saved by other ways than keeping a checkpoint while training."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_calibft import AbsentClassCalibration, get_gamma
from tests.helpers.runs import (
    VAL,
    Nervous,
    Plain,
    assert_calibrated,
    loader,
    pretrained,
    quiet,
    read,
    trainer_of,
)

pytestmark = quiet


def test_what_is_saved_when_training_ends_has_gamma_already(tmp_path):
    """The callback comes before those that save, wherever it stands in the list."""
    checkpoints = ModelCheckpoint(tmp_path, save_top_k=0, save_last=True)
    callback = AbsentClassCalibration(calibrate_checkpoints=False)
    module = pretrained(Nervous)
    trainer = trainer_of(tmp_path, checkpoints, callback)
    trainer.fit(module, loader())
    assert [type(other).__name__ for other in trainer.callbacks][-2:] == ["AbsentClassCalibration", "ModelCheckpoint"]
    saved = read(tmp_path / "last.ckpt")
    assert saved["lightning_calibft"]["gamma"] == callback.result.gamma
    assert_calibrated(saved["state_dict"], make=Nervous)


def test_saved_after_fitting(tmp_path):
    checkpoints = ModelCheckpoint(tmp_path / "kept", monitor="val_loss", mode="max", save_top_k=2)
    callback, module = AbsentClassCalibration(), pretrained(Nervous)
    trainer = trainer_of(tmp_path, callback, checkpoints)
    trainer.fit(module, loader(), loader(VAL, shuffle=False))

    def saved():
        trainer.save_checkpoint(tmp_path / "saved.ckpt")
        checkpoint = read(tmp_path / "saved.ckpt")
        gamma = assert_calibrated(checkpoint["state_dict"], make=Nervous)
        assert checkpoint["lightning_calibft"]["gamma"] == pytest.approx(gamma, rel=1e-6)
        return gamma, checkpoint["lightning_calibft"]["standard_error"]

    last = saved()
    assert last == (pytest.approx(callback.result.gamma, rel=1e-6), callback.result.standard_error)
    first = min(checkpoints.best_k_models)
    trainer.test(module, loader(VAL, shuffle=False), ckpt_path=first, verbose=False)
    result = callback.checkpoint_results[first]
    assert saved() == (pytest.approx(result.gamma, rel=1e-6), result.standard_error)
    assert result.standard_error != last[1]


class Slim(Plain):
    """Saves its head alone, as those do whose backbone is frozen."""

    strict_loading = False

    def configure_optimizers(self):
        self.body.requires_grad_(False).eval()
        return torch.optim.SGD(self.fc.parameters(), lr=0.05)

    def on_save_checkpoint(self, checkpoint):
        for key in [key for key in checkpoint["state_dict"] if key.startswith("body.")]:
            del checkpoint["state_dict"][key]


def test_a_module_that_saves_a_part_of_itself(tmp_path):
    torch.manual_seed(0)
    module = pretrained(Slim)
    module.body.eval()
    checkpoints = ModelCheckpoint(tmp_path, save_top_k=-1)
    trainer_of(tmp_path, AbsentClassCalibration(), checkpoints).fit(module, loader())
    body = {key: value for key, value in module.state_dict().items() if key.startswith("body.")}
    for path in tmp_path.glob("*.ckpt"):
        state = read(path)["state_dict"]
        assert not any(key.startswith("body.") for key in state)
        assert_calibrated({**body, **state}, make=Slim)
    assert get_gamma(module) == pytest.approx(assert_calibrated(module.state_dict(), make=Slim))
