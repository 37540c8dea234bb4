"""Checkpoints that cannot be calibrated: the others are, and what was there stays."""

from __future__ import annotations

import textwrap

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_calibft import AbsentClassCalibration, fold_checkpoint
from tests.helpers.processes import run_python
from tests.helpers.runs import (
    VAL,
    Plain,
    assert_calibrated,
    loader,
    pretrained,
    quiet,
    read,
    split_state,
    trainer_of,
)

pytestmark = quiet


def test_an_earlier_checkpoint_that_diverged_does_not_spoil_the_others(tmp_path):
    class Recovers(Plain):
        def on_train_epoch_start(self):
            if self.current_epoch > 0:
                self.fc.bias.data[3] = float("nan") if self.current_epoch == 1 else 0.0

        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) if self.current_epoch != 1 else None

    module, checkpoints = pretrained(Recovers), ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    trainer = trainer_of(tmp_path, AbsentClassCalibration(), checkpoints, max_epochs=3)
    with pytest.raises(RuntimeError, match=r"Could not calibrate the checkpoints .*epoch=1.ckpt.*batch 0 has NaN"):
        trainer.fit(module, loader())
    assert_calibrated(module.state_dict())
    for epoch in (0, 2):
        assert_calibrated(read(tmp_path / f"epoch={epoch}.ckpt")["state_dict"])
    assert split_state(read(tmp_path / "epoch=1.ckpt")["state_dict"])[1:] == (0.0, [])


def test_a_folded_checkpoint_is_not_resumed(tmp_path):
    checkpoints = ModelCheckpoint(tmp_path)
    trainer_of(tmp_path, AbsentClassCalibration(), checkpoints).fit(pretrained(), loader())
    fold_checkpoint(checkpoints.best_model_path, tmp_path / "folded.ckpt")
    module = pretrained()
    with pytest.raises(ValueError, match=r"gamma is folded into the bias .* Resume from the checkpoint that it was"):
        trainer_of(tmp_path, AbsentClassCalibration(), max_epochs=3).fit(
            module, loader(), ckpt_path=tmp_path / "folded.ckpt"
        )
    # Testing it is fine.
    trainer = trainer_of(tmp_path, AbsentClassCalibration())
    trainer.test(module, loader(VAL, shuffle=False), ckpt_path=tmp_path / "folded.ckpt", verbose=False)


@pytest.mark.parametrize("thing", ["truncated", "foreign"])
def test_a_kept_file_that_cannot_be_read(thing, tmp_path):
    class Breaks(Callback):
        def on_fit_end(self, trainer, pl_module):
            path = tmp_path / "epoch=0.ckpt"
            path.write_bytes(path.read_bytes()[:-999] if thing == "truncated" else b"hello")

    module, checkpoints = pretrained(), ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    with pytest.raises(RuntimeError, match=r"Could not calibrate the checkpoints '[^']*epoch=0.ckpt': "):
        trainer_of(tmp_path, AbsentClassCalibration(), checkpoints, Breaks()).fit(module, loader())
    assert_calibrated(module.state_dict())
    assert_calibrated(read(tmp_path / "epoch=1.ckpt")["state_dict"])


def test_a_full_disk(tmp_path):
    """Files may not grow beyond a size that one of two checkpoints has."""
    script = """
        import resource, signal, sys, warnings
        from pathlib import Path
        warnings.simplefilter("ignore")
        from lightning.pytorch import Callback, LightningModule
        from tests.helpers.runs import *
        from lightning_calibft import AbsentClassCalibration

        folder = Path(sys.argv[1])

        class Full(Callback):
            def on_fit_end(self, trainer, pl_module):
                self.before = {path.name: path.read_bytes() for path in folder.iterdir()}
                small, large = len(self.before["small.ckpt"]), len(self.before["large.ckpt"])
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, ((small + large) // 2, resource.RLIM_INFINITY))

        full, module = Full(), pretrained()
        small = ModelCheckpoint(folder, "small", save_weights_only=True)
        large = ModelCheckpoint(folder, "large", "train_loss")
        trainer = trainer_of(folder, AbsentClassCalibration(), small, large, full)
        try:
            trainer.fit(module, loader())
        except RuntimeError as error:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            assert f"Could not calibrate the checkpoints '{folder}/large.ckpt': " in str(error), error
            assert "small.ckpt" not in str(error), error
            assert "`trainer.save_checkpoint` saves it with its gamma" in str(error), error
        else:
            raise AssertionError("nothing was raised")
        assert {path.name for path in folder.iterdir()} == {"small.ckpt", "large.ckpt"}
        assert (folder / "large.ckpt").read_bytes() == full.before["large.ckpt"]
        assert_calibrated(read(folder / "small.ckpt")["state_dict"])
        assert_calibrated(module.state_dict())
        trainer.save_checkpoint(folder / "remedy.ckpt")
        assert_calibrated(read(folder / "remedy.ckpt")["state_dict"])
        print("as expected")
    """
    done = run_python("-c", textwrap.dedent(script), tmp_path)
    assert "as expected" in done.stdout, done.stderr
