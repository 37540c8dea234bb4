"""Loggers that upload a checkpoint when it is saved: it has no gamma yet, and that is said when the fit starts."""

from __future__ import annotations

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.utilities import _scan_checkpoints

from lightning_calibft import AbsentClassCalibration, inspect_checkpoint
from tests.helpers.runs import SEEN, VAL, loader, no_warnings, pretrained, quiet, trainer_of

pytestmark = quiet


class Uploads(CSVLogger):
    """Uploads as the loggers of Weights & Biases and MLflow do, and notes whether the files are calibrated."""

    def __init__(self, folder, log_model):
        super().__init__(folder)
        self._log_model, self.times, self.kept, self.uploaded = log_model, {}, [], []

    def upload(self, callback):
        for time, path, *_ in _scan_checkpoints(callback, self.times):
            self.times[path] = time
            self.uploaded.append(inspect_checkpoint(path)["calibrated"])

    def after_save_checkpoint(self, checkpoint_callback):
        if self._log_model == "all" or checkpoint_callback.save_top_k == -1:
            self.upload(checkpoint_callback)
        else:
            self.kept.append(checkpoint_callback)

    def finalize(self, status):
        super().finalize(status)
        for callback in self.kept[-1:] if status == "success" else []:
            self.upload(callback)


# As the two loggers, which call their server, stand in Lightning.
Uploads.after_save_checkpoint.__module__ = "lightning.pytorch.loggers.wandb"


class Custom(Uploads):
    """A logger of the user: nothing says when it uploads."""

    def after_save_checkpoint(self, checkpoint_callback):
        super().after_save_checkpoint(checkpoint_callback)


def fit(folder, logger, callback, save_top_k=1):
    checkpoints = ModelCheckpoint(folder / "kept", "{epoch}", monitor="val_loss", save_top_k=save_top_k)
    trainer = trainer_of(folder, callback, checkpoints, logger=logger)
    trainer.fit(pretrained(), loader(), loader(VAL, shuffle=False))
    return logger.uploaded


@pytest.mark.parametrize(
    ("kind", "log_model", "save_top_k"),
    [(Uploads, "all", 1), (Uploads, True, -1), (Custom, "all", 1), (Custom, True, 1)],
)
def test_what_is_uploaded_too_early_is_told(kind, log_model, save_top_k, tmp_path):
    text = rf"{kind.__name__} may upload checkpoints as soon as they are saved, .* `refresh_on_validation=True`"
    with pytest.warns(UserWarning, match=text):
        uploaded = fit(tmp_path, kind(tmp_path, log_model), AbsentClassCalibration(SEEN), save_top_k)
    assert set(uploaded) == {log_model is True and save_top_k == 1}


@pytest.mark.parametrize("arguments", [{"refresh_on_validation": True}, {"source": "training_steps"}])
@pytest.mark.parametrize("log_model", ["all", True])
def test_with_the_remedy_all_is_calibrated(log_model, arguments, tmp_path):
    with no_warnings():
        uploaded = fit(tmp_path, Custom(tmp_path, log_model), AbsentClassCalibration(SEEN, **arguments))
    assert set(uploaded) == {True}


@pytest.mark.parametrize("log_model", [True, False])
def test_what_is_uploaded_in_the_end_is_calibrated(log_model, tmp_path):
    with no_warnings():
        uploaded = fit(tmp_path, Uploads(tmp_path, log_model), AbsentClassCalibration(SEEN))
    assert set(uploaded) <= {True}


def test_a_failed_calibration_does_not_keep_the_rest_from_the_server(tmp_path):
    class Fails(AbsentClassCalibration):
        def _report(self, trainer, result):
            raise OSError("the share is gone")

    logger = Uploads(tmp_path, True)
    with pytest.raises(OSError, match="the share is gone"):
        fit(tmp_path, logger, Fails(SEEN))
    assert set(logger.uploaded) == {True}
