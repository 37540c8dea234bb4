"""AUSUC and accuracies of the user's own evaluation loop, and what is told at the end of fitting."""

from __future__ import annotations

import warnings

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch.utils.data import TensorDataset

from lightning_calibft import AbsentClassCalibration, get_gamma
from tests.callback.measures import HARD, Measures, logged, val_loader
from tests.helpers.references import _reference_ausuc
from tests.helpers.runs import (
    ABSENT,
    SEEN,
    TRAIN,
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
        (Triples, TensorDataset(*HARD.tensors, HARD.tensors[1] // 2), "Pass `unpack_batch`"),
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
    with pytest.warns(UserWarning, match="no samples|no absent|received no"):
        trainer.fit(module, loader(), loader(TRAIN, shuffle=False))
    values = logged(trainer, "val")
    assert values["val_acc_seen"] > 0
    assert values["val_acc_absent"] != values["val_acc_absent"]
    assert get_gamma(module) == pytest.approx(assert_calibrated(module.state_dict()))


def test_a_batch_of_an_evaluation_that_failed_is_not_counted_in_the_next(tmp_path):
    class Fails(Plain):
        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            raise ArithmeticError

    callback = AbsentClassCalibration(SEEN)
    with pytest.raises(ArithmeticError):
        trainer_of(tmp_path, callback).validate(pretrained(Fails), val_loader(), verbose=False)

    class Triples(Plain):
        def validation_step(self, batch, batch_idx):
            self.log("val_loss", self.loss(batch[:2]))

    data = TensorDataset(*HARD.tensors, HARD.tensors[1] // 2)
    trainer = trainer_of(tmp_path, callback)
    with pytest.warns(UserWarning, match="logs no metrics for some batches"):
        trainer.validate(pretrained(Triples), loader(data), verbose=False)
    assert trainer.callback_metrics.keys() == {"val_loss"}
