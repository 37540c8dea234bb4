"""The table at the end of a fit."""

from __future__ import annotations

import re

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_calibft import AbsentClassCalibration
from tests.callback.diagnosing import HARD
from tests.helpers.references import _reference_at_gamma, _reference_ausuc
from tests.helpers.runs import ABSENT, SEEN, loader, pretrained, quiet, raw_logits, read, split_state, trainer_of

pytestmark = quiet


class Prefers(Callback):
    """Logs a number that is largest after one training step."""

    def __init__(self, step):
        self.step = step

    def on_validation_epoch_end(self, trainer, pl_module):
        pl_module.log("chosen", -float(abs(trainer.global_step - self.step)))


def fit(folder, caplog, *callbacks, callback=None, **options):
    caplog.set_level("INFO")
    callback = AbsentClassCalibration() if callback is None else callback
    trainer, module = trainer_of(folder, *callbacks, callback, **{"max_epochs": 4, **options}), pretrained()
    trainer.fit(module, loader(), loader(HARD, batch_size=7, shuffle=False))
    (text,) = [record.message for record in caplog.records if "Absent-class calibration" in record.message]
    return module, text


def rows(text):
    """The rows of each table: the names with their two numbers."""
    tables = re.split(r"gamma 0  calibrated\n", text)[1:]
    found = [re.findall(r"^  (val_\w+) +([\d.]+) +([\d.]+)$", table, re.MULTILINE) for table in tables]
    return [{name: (float(one), float(other)) for name, one, other in table} for table in found]


def check(table, state):
    """The numbers are those of these weights, without and with their gamma."""
    logits, target = raw_logits(state, HARD.tensors[0]), HARD.tensors[1]
    area, gamma = _reference_ausuc(logits, target, SEEN, ABSENT), split_state(state)[1]
    assert table["val_ausuc"] == pytest.approx((area, area), abs=6e-5)
    for column, at in enumerate((0.0, gamma)):
        accuracies = _reference_at_gamma(logits, target, SEEN, ABSENT, at)
        for name, accuracy in zip(("seen", "absent", "all"), accuracies, strict=True):
            assert table[f"val_acc_{name}"][column] == pytest.approx(accuracy, abs=6e-5)


@pytest.mark.parametrize("step", [6, 12, 18])
@pytest.mark.parametrize("options", [{}, {"enable_version_counter": False, "filename": "best"}])
def test_the_best_file_is_in_the_table(step, options, tmp_path, caplog):
    """Measured by the validation of its weights, whether it was replaced or has a new name."""
    checkpoints = ModelCheckpoint(tmp_path, monitor="chosen", mode="max", **options)
    module, text = fit(tmp_path, caplog, Prefers(step), checkpoints)
    last, best = rows(text)
    check(last, module.state_dict())
    check(best, read(checkpoints.best_model_path)["state_dict"])
    assert f"(the best file, {checkpoints.best_model_path}: validation data, weights of step {step})" in text
    assert last != best


def test_one_gamma_for_all_weights(tmp_path, caplog):
    checkpoints = ModelCheckpoint(tmp_path, monitor="chosen", mode="max")
    callback = AbsentClassCalibration(estimator="pcv")
    _, text = fit(tmp_path, caplog, Prefers(6), checkpoints, callback=callback, max_epochs=2)
    check(rows(text)[1], read(checkpoints.best_model_path)["state_dict"])


@pytest.mark.parametrize(
    ("checkpoints", "arguments"),
    [
        (None, {}),
        ({"monitor": "chosen", "mode": "min"}, {}),  # the last one
        ({"every_n_train_steps": 5, "save_on_train_epoch_end": False}, {}),  # no validation after these steps
        ({"monitor": "chosen", "mode": "max"}, {"calibrate_checkpoints": False}),
        ({"monitor": "chosen", "mode": "max"}, {"log_metrics": False}),
    ],
)
def test_no_second_table_without_other_numbers(checkpoints, arguments, tmp_path, caplog):
    callbacks = [] if checkpoints is None else [ModelCheckpoint(tmp_path, **checkpoints)]
    callback = AbsentClassCalibration(**arguments)
    module, text = fit(tmp_path, caplog, Prefers(6), *callbacks, callback=callback)
    assert len(rows(text)) == arguments.get("log_metrics", True)
    for table in rows(text):
        check(table, module.state_dict())
