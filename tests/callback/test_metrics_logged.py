"""AUSUC and accuracies of the user's own evaluation loop, and what is told at the end of fitting."""

from __future__ import annotations

import csv
import logging
import warnings

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_calibft import AbsentClassCalibration, get_gamma
from tests.references import _reference_ausuc
from tests.runs import (
    ABSENT,
    NUM_CLASSES,
    SEEN,
    TRAIN,
    VAL,
    Plain,
    assert_calibrated,
    blobs,
    loader,
    pretrained,
    quiet,
    raw_logits,
    read,
    trainer_of,
)

pytestmark = quiet
NAMES = ["ausuc", "acc", "acc_seen", "acc_absent", "acc_harmonic"]
# Between the classes, so that gamma decides.
HARD = TensorDataset(VAL.tensors[0] / 2, VAL.tensors[1])


class Measures(Plain):
    """Measures for itself, with torchmetrics on its own logits; the last evaluation stands."""

    def start(self):
        self.parts = {}

    on_validation_epoch_start = on_test_epoch_start = start

    def step(self, batch, dataloader_idx=0):
        logits = self(batch[0])
        self.parts.setdefault(dataloader_idx, []).append((logits.clone(), batch[1].clone()))

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.step(batch, dataloader_idx)

    def test_step(self, batch, batch_idx, dataloader_idx=0):
        self.step(batch, dataloader_idx)

    def expected(self, prefix, index=0, suffix=""):
        logits, target = (torch.cat(part) for part in zip(*self.parts[index], strict=True))
        return {f"{prefix}_{name}{suffix}": value for name, value in measured(logits, target).items()}


def accuracy(logits, target, classes):
    chosen = torch.isin(target, torch.tensor(classes))
    return MulticlassAccuracy(NUM_CLASSES, average="micro")(logits[chosen], target[chosen]).item()


def measured(logits, target):
    """The logged numbers, by torchmetrics and by the definition of the area."""
    seen, absent = accuracy(logits, target, SEEN), accuracy(logits, target, ABSENT)
    return {
        "acc": MulticlassAccuracy(NUM_CLASSES, average="micro")(logits, target).item(),
        "acc_seen": seen,
        "acc_absent": absent,
        "acc_harmonic": 2 * seen * absent / (seen + absent) if seen + absent else 0.0,
        "ausuc": _reference_ausuc(logits, target, SEEN, ABSENT),
    }


def logged(trainer, prefix):
    return {name: value.item() for name, value in trainer.callback_metrics.items() if name.startswith(f"{prefix}_")}


def val_loader():
    return loader(HARD, batch_size=7, shuffle=False)


@pytest.mark.parametrize("arguments", [{}, {"seen_classes": SEEN}], ids=["inferred", "given"])
def test_validation_and_test(arguments, tmp_path):
    module = pretrained(Measures)
    checkpoints = ModelCheckpoint(tmp_path, monitor="val_ausuc", mode="max", filename="{val_ausuc:.3f}")
    trainer = trainer_of(tmp_path, AbsentClassCalibration(**arguments), checkpoints)
    trainer.fit(module, loader(), val_loader())
    assert logged(trainer, "val") == pytest.approx(module.expected("val"), abs=1e-6)
    # What was measured is what was saved: the raw model.
    best = max(checkpoints.best_k_models, key=lambda path: checkpoints.best_k_models[path])
    state = read(best)["state_dict"]
    area = _reference_ausuc(raw_logits(state, HARD.tensors[0], make=Measures), HARD.tensors[1], SEEN, ABSENT)
    assert checkpoints.best_model_score.item() == pytest.approx(area, abs=1e-6)
    assert f"val_ausuc={area:.3f}" in best

    trainer.test(module, val_loader(), verbose=False)
    assert logged(trainer, "test") == pytest.approx(module.expected("test"), abs=1e-6)
    predicted = torch.cat([logits for logits, _ in module.parts[0]]).argmax(1)
    calibrated = module.eval()(HARD.tensors[0]).argmax(1)
    assert torch.equal(predicted, calibrated)
    assert not torch.equal(calibrated, raw_logits(module.state_dict(), HARD.tensors[0], make=Measures).argmax(1))

    trainer.validate(module, val_loader(), verbose=False)
    assert logged(trainer, "val") == pytest.approx(module.expected("val"), abs=1e-6)


def test_a_fresh_trainer_tests_with_the_classes_of_the_checkpoint(tmp_path):
    checkpoints = ModelCheckpoint(tmp_path)
    trainer_of(tmp_path, AbsentClassCalibration(), checkpoints).fit(pretrained(), loader())
    module = pretrained(Measures)
    trainer = trainer_of(tmp_path, AbsentClassCalibration())
    trainer.test(module, val_loader(), ckpt_path=checkpoints.best_model_path, verbose=False)
    assert logged(trainer, "test") == pytest.approx(module.expected("test"), abs=1e-6)


def test_several_loaders_and_steps(tmp_path):
    module = pretrained(Measures)
    other = blobs([*SEEN, *ABSENT], each=5, seed=7)
    trainer = trainer_of(
        tmp_path,
        AbsentClassCalibration(),
        ModelCheckpoint(tmp_path, monitor="val_ausuc/dataloader_idx_1", mode="max"),
        EarlyStopping("val_acc_absent/dataloader_idx_0", patience=10),
        val_check_interval=2,
    )
    trainer.fit(module, loader(), [val_loader(), loader(other, shuffle=False)])
    expected = module.expected("val", 0, "/dataloader_idx_0") | module.expected("val", 1, "/dataloader_idx_1")
    assert logged(trainer, "val") == pytest.approx(expected, abs=1e-6)
    assert len(expected) == 10


def test_logging_can_be_turned_off(tmp_path):
    module = pretrained(Measures)
    trainer = trainer_of(tmp_path, AbsentClassCalibration(log_metrics=False))
    trainer.fit(module, loader(), val_loader())
    assert logged(trainer, "val") == {}
    assert_calibrated(module.state_dict(), make=Measures)


def test_ignored_labels_are_not_counted(tmp_path):
    """Those that the loss leaves out."""
    x, y = HARD.tensors
    some = TensorDataset(torch.cat([x, x[:9]]), torch.cat([y, torch.full((9,), -100)]))
    module = pretrained(Measures)
    trainer = trainer_of(tmp_path, AbsentClassCalibration())
    trainer.fit(module, loader(), loader(some, shuffle=False))
    for index, (logits, target) in enumerate(module.parts[0]):
        module.parts[0][index] = logits[target >= 0], target[target >= 0]
    assert logged(trainer, "val") == pytest.approx(module.expected("val"), abs=1e-6)


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
    for name in ("acc", "acc_seen", "acc_absent", "acc_harmonic"):
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


def with_warnings(run):
    with warnings.catch_warnings(record=True) as met:
        warnings.simplefilter("always")
        run()
    return [str(warning.message) for warning in met if "AbsentClassCalibration" in str(warning.message)]


class Twice(Plain):
    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        self(batch[0].flip(1))


class Crops(Plain):
    """Two rows a sample."""

    def validation_step(self, batch, batch_idx):
        self(torch.cat([batch[0], batch[0]]))


class Triples(Plain):
    def validation_step(self, batch, batch_idx):
        x, y, _ = batch
        super().validation_step((x, y), batch_idx)


@pytest.mark.parametrize(
    ("make", "data", "says"),
    [
        (Twice, HARD, "Run the model once on a batch, or log `lightning_calibft.metrics.absent_class_metrics`"),
        (Crops, HARD, "Run the model once on a batch, or log `lightning_calibft.metrics.absent_class_metrics`"),
        (Triples, TensorDataset(*HARD.tensors, HARD.tensors[1]), "Pass `unpack_batch`"),
    ],
)
def test_one_warning_where_rows_and_labels_do_not_match(make, data, says, tmp_path):
    module = pretrained(make)
    trainer = trainer_of(tmp_path, AbsentClassCalibration())
    met = with_warnings(lambda: trainer.fit(module, loader(), loader(data, batch_size=7, shuffle=False)))
    assert len(met) == 1  # not one for each shape, batch or epoch
    assert says in met[0]
    assert "val_ausuc" not in trainer.callback_metrics
    assert_calibrated(module.state_dict(), make=make)


def test_recording_stops_after_an_error_in_evaluation(tmp_path):
    class Fails(Plain):
        def validation_step(self, batch, batch_idx):
            self(batch[0])
            raise RuntimeError("mine")

    module = pretrained(Fails)
    trainer = trainer_of(tmp_path, AbsentClassCalibration(seen_classes=SEEN), num_sanity_val_steps=0)
    with pytest.raises(RuntimeError, match="mine"):
        trainer.fit(module, loader(), val_loader())
    assert not module.fc.absent_class_calibration.recording


def test_validation_without_absent_samples(tmp_path):
    """NaN and a warning of the metric's own, but no crash."""
    module = pretrained()
    trainer = trainer_of(tmp_path, AbsentClassCalibration(), max_epochs=1)
    with pytest.warns(UserWarning, match="no samples|no absent|met no"):
        trainer.fit(module, loader(), loader(TRAIN, shuffle=False))
    values = logged(trainer, "val")
    assert values["val_acc_seen"] > 0
    assert values["val_acc_absent"] != values["val_acc_absent"]
    assert get_gamma(module) == pytest.approx(assert_calibrated(module.state_dict()))
