"""What is told and logged at the end of fitting."""

from __future__ import annotations

import csv
import logging

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import TensorDataset

from lightning_calibft import AbsentClassCalibration
from lightning_calibft.estimators import PseudoAbsent
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


def told_at_the_end(folder, caplog, callback, val):
    caplog.set_level(logging.INFO, logger="lightning.pytorch")
    module = pretrained()
    trainer_of(folder, callback).fit(module, loader(), val)
    (told,) = [message for message in caplog.messages if "Absent-class calibration" in message]
    return told


def test_what_gamma_is_expected_to_do(tmp_path, caplog):
    callback = AbsentClassCalibration(estimator="pseudo_absent", absent_share=0.3)
    data = blobs([*SEEN, *ABSENT], each=40, seed=7)
    told = told_at_the_end(tmp_path, caplog, callback, loader(data, shuffle=False))
    result = callback.result
    assert f"{result.gamma:.3f} ± {result.standard_error:.3f} (sampling error only) from 120 samples" in told
    seen, absent = 100 * result.seen_change, 100 * result.absent_change
    assert f"  expected change in accuracy: {seen:+.1f} points on seen samples, {absent:+.1f} on absent ones\n" in told
    limit = f"{result.break_even_share:.1%}"
    assert f"  gamma pays if more than {limit} of the samples are of absent classes (it is for 30.0%)" in told
    assert "negative" not in told


class TooFar(PseudoAbsent):
    """Finds a gamma far above or below the best one, and tells what it is expected to do."""

    shift = 12.0

    def compute(self):
        return super().compute() + self.shift


class TooLow(TooFar):
    shift = -12.0


@pytest.mark.parametrize(("kind", "share", "side"), [(TooFar, 0.05, "above"), (TooLow, 0.95, "below")])
def test_a_gamma_that_is_expected_to_do_harm(tmp_path, caplog, kind, share, side):
    callback = AbsentClassCalibration(estimator=kind(6, SEEN, absent_share=share))
    data = blobs([*SEEN, *ABSENT], each=40, seed=7)
    text = rf"Gamma \(.*\) is expected to do harm: at the share of absent samples that was told, {share:.1%}, .* {side}"
    with pytest.warns(UserWarning, match=text):
        told = told_at_the_end(tmp_path, caplog, callback, loader(data, shuffle=False))
    assert ("gamma is negative: the model predicts absent classes even less often" in told) == (kind is TooLow)
    assert "  val_acc_all falls: on this data, gamma does harm" in told
    assert callback.result.gamma != 0


def test_a_fall_on_data_without_absent_classes(tmp_path, caplog):
    callback = AbsentClassCalibration(estimator="fixed", estimator_kwargs={"gamma": 30.0})
    told = told_at_the_end(tmp_path, caplog, callback, loader(blobs(SEEN, seed=7)))
    assert "  val_acc_all falls: this data has no samples of absent classes" in told


def test_nothing_falls(tmp_path, caplog):
    callback = AbsentClassCalibration(estimator="fixed", estimator_kwargs={"gamma": 0.0})
    assert "falls" not in told_at_the_end(tmp_path, caplog, callback, loader(blobs(SEEN, seed=7)))
