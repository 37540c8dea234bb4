"""What is told and logged at the end of fitting."""

from __future__ import annotations

import csv
import logging

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import TensorDataset

from lightning_calibft import AbsentClassCalibration
from tests.callback.measures import HARD, Measures, measured, val_loader
from tests.helpers.runs import (
    ABSENT,
    SEEN,
    TRAIN,
    Unlisted,
    blobs,
    loader,
    pretrained,
    quiet,
    raw_logits,
    trainer_of,
)

pytestmark = quiet


def rows(logger):
    with open(logger.experiment.metrics_file_path) as file:
        return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]


@pytest.mark.parametrize("loaders", [1, 2])
def test_what_is_told_at_the_end(loaders, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="lightning.pytorch")
    logger, module, callback = CSVLogger(tmp_path), pretrained(Measures), AbsentClassCalibration()
    checkpoints = ModelCheckpoint(tmp_path, save_top_k=-1)
    trainer = trainer_of(tmp_path, callback, checkpoints, logger=logger, log_every_n_steps=1)
    data = [HARD, blobs([*SEEN, *ABSENT], each=25, seed=7)][:loaders]
    trainer.fit(module, loader(), [loader(dataset, batch_size=7, shuffle=False) for dataset in data])

    expected = {"gamma": callback.result.gamma, "gamma_standard_error": callback.result.standard_error}
    for index, dataset in enumerate(data):
        suffix = f"/dataloader_idx_{index}" if loaders > 1 else ""
        raw = raw_logits(module.state_dict(), dataset.tensors[0], make=Measures)
        calibrated = module.eval()(dataset.tensors[0])
        for when, logits in (("uncalibrated", raw), ("calibrated", calibrated)):
            values = measured(logits, dataset.tensors[1])
            values.pop("ausuc")
            expected |= {f"val_{name}{suffix}_{when}": value for name, value in values.items()}
        assert expected[f"val_acc_absent{suffix}_calibrated"] > expected[f"val_acc_absent{suffix}_uncalibrated"]
    (last,) = [row for row in rows(logger) if "gamma" in row]
    assert last.pop("step") == trainer.global_step == 12
    assert last == pytest.approx(expected, abs=1e-6)

    (told,) = [message for message in caplog.messages if "Absent-class calibration" in message]
    assert f"gamma = {callback.result.gamma:.3f}" in told
    for name in ("acc_all", "acc_seen", "acc_absent", "acc_harmonic"):
        suffix = "/dataloader_idx_1" if loaders > 1 else ""
        (line,) = [line.split() for line in told.splitlines() if line.split()[:1] == [f"val_{name}{suffix}"]]
        before, after = (expected[f"val_{name}{suffix}_{when}"] for when in ("uncalibrated", "calibrated"))
        assert line[1:] == [f"{before:.4f}", f"{after:.4f}"]
    for path, result in callback.checkpoint_results.items():
        assert f"{path}: gamma = {result.gamma:.3f}" in told


def test_a_second_fit_without_validation_tells_no_numbers_of_the_first(tmp_path):
    callback = AbsentClassCalibration()
    logger = CSVLogger(tmp_path)
    module = pretrained()
    trainer_of(tmp_path, callback).fit(module, loader(), val_loader())
    trainer_of(tmp_path, callback, logger=logger, log_every_n_steps=1).fit(module, loader())
    (last,) = [row for row in rows(logger) if "gamma" in row]
    assert set(last) == {"gamma", "gamma_standard_error", "step"}


def test_accuracies_among_fewer_classes_are_not_told(tmp_path):
    """Validation came before the last class was met, so its numbers are not those of the final gamma."""
    inputs, target = TRAIN.tensors
    order = target.argsort(stable=True)
    logger = CSVLogger(tmp_path)
    options = {"log_every_n_steps": 1, "max_epochs": 1, "limit_train_batches": 5, "val_check_interval": 3}
    trainer = trainer_of(tmp_path, AbsentClassCalibration(), logger=logger, **options)
    data = Unlisted(TensorDataset(inputs[order], target[order]))
    with pytest.warns(UserWarning, match="cannot be compared between the validations of this run"):
        trainer.fit(pretrained(), loader(data, shuffle=False), val_loader())
    (last,) = [row for row in rows(logger) if "gamma" in row]
    assert set(last) == {"gamma", "gamma_standard_error", "step"}
