"""Options and other callbacks of the Trainer."""

from __future__ import annotations

import copy
import pickle
import time
import warnings

import pytest
import torch
from lightning.pytorch.callbacks import LearningRateFinder, ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO
from torch.utils.data import (
    TensorDataset,
)

from lightning_calibft import AbsentClassCalibration, CalibrationDiagnostics, get_gamma
from lightning_calibft.estimators import PseudoAbsent
from tests.helpers.references import _reference_gap
from tests.helpers.runs import (
    ABSENT,
    OFFSET,
    SEEN,
    TRAIN,
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


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [
        ("bf16-mixed", torch.bfloat16),
        ("bf16-true", torch.bfloat16),
        ("16-true", torch.float16),
        ("64-true", torch.float64),
    ],
)
def test_precisions(precision, dtype, tmp_path):
    module = pretrained()
    checkpoints = ModelCheckpoint(tmp_path, monitor="val_ausuc", mode="max", save_top_k=-1)
    trainer = trainer_of(tmp_path, AbsentClassCalibration(), checkpoints, precision=precision)
    trainer.fit(module, loader(), loader(VAL, shuffle=False))

    def logits(state):
        plain = Plain()
        plain.to(torch.float32 if precision == "bf16-mixed" else dtype)
        plain.load_state_dict(split_state(state)[0])
        x = TRAIN.tensors[0] if precision == "bf16-mixed" else TRAIN.tensors[0].to(dtype)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
            out = plain.eval()(x)
        assert out.dtype == dtype
        return out

    states = [dict(module.state_dict()), *(read(path)["state_dict"] for path in checkpoints.best_k_models)]
    assert len(states) == 3
    for state in states:
        assert state[f"fc.{OFFSET}"].dtype == torch.float32
        expected = _reference_gap(logits(state), TRAIN.tensors[1], SEEN, ABSENT)[0]
        # Half precision rounds differently in batches of another length.
        tolerance = 1e-5 if dtype == torch.float64 else 2e-2
        assert state[f"fc.{OFFSET}"].item() == pytest.approx(expected, rel=tolerance)


def test_half_precision_data_under_autocast(tmp_path):
    """Such a forward fails outside of autocast, so all of ours must run inside."""
    dataset = TensorDataset(TRAIN.tensors[0].bfloat16(), TRAIN.tensors[1])
    module = pretrained()
    trainer_of(tmp_path, AbsentClassCalibration(), precision="bf16-mixed").fit(module, loader(dataset))
    assert get_gamma(module)


def test_an_asynchronous_writer(tmp_path):
    class Slow(TorchCheckpointIO):
        def save_checkpoint(self, *args, **kwargs):
            time.sleep(0.1)
            super().save_checkpoint(*args, **kwargs)

    module, checkpoints = pretrained(), ModelCheckpoint(tmp_path, save_top_k=-1)
    plugin = AsyncCheckpointIO(Slow())
    trainer_of(tmp_path, AbsentClassCalibration(), checkpoints, plugins=[plugin]).fit(module, loader())
    files = list(tmp_path.glob("*.ckpt"))
    assert len(files) == 2
    for state in (module.state_dict(), *(read(path)["state_dict"] for path in files)):
        assert_calibrated(state)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("first", [True, False])
def test_a_learning_rate_finder(first, tmp_path):
    module, finder = pretrained(), LearningRateFinder(num_training_steps=5, early_stop_threshold=None)
    callbacks = [finder, AbsentClassCalibration()] if first else [AbsentClassCalibration(), finder]
    trainer = trainer_of(tmp_path, *callbacks, ModelCheckpoint(tmp_path), enable_checkpointing=True)
    trainer.fit(module, loader(), loader(VAL, shuffle=False))
    assert trainer.global_step == 12
    assert_calibrated(module.state_dict())


def test_copies_of_the_callback(tmp_path):
    callback = AbsentClassCalibration(seen_classes=SEEN)
    for twin in (copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):
        module = pretrained()
        trainer_of(tmp_path, twin).fit(module, loader(), loader(VAL, shuffle=False))
        assert_calibrated(module.state_dict())
        again = pickle.loads(pickle.dumps(twin))
        assert again.result == twin.result


@pytest.mark.parametrize(
    ("callback", "text"),
    [
        (AbsentClassCalibration(), "AbsentClassCalibration()"),
        (
            CalibrationDiagnostics([0, 1], output="a.html"),
            "CalibrationDiagnostics(seen_classes=[0, 1], output='a.html')",
        ),
        (
            AbsentClassCalibration(estimator=PseudoAbsent(6, [0, 1]), log_metrics=False, max_samples=5000),
            "AbsentClassCalibration(estimator=PseudoAbsent(), max_samples=5000, log_metrics=False)",
        ),
        (
            AbsentClassCalibration(
                [*range(900)], estimator="operating_point", estimator_kwargs={"min_seen_accuracy": 0.9}
            ),
            "AbsentClassCalibration(seen_classes=[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, ...], estimator='operating_point',"
            " estimator_kwargs={'min_seen_accuracy': 0.9})",
        ),
    ],
)
def test_a_callback_shows_its_settings(callback, text):
    assert repr(callback) == text
    assert callback.state_key == type(callback).__name__  # by which checkpoints know it


def test_the_callback_is_quiet_about_itself(tmp_path):
    with warnings.catch_warnings(record=True) as met:
        warnings.simplefilter("always")
        trainer = trainer_of(tmp_path, AbsentClassCalibration(), ModelCheckpoint(tmp_path, monitor="val_ausuc"))
        trainer.fit(pretrained(), loader(), loader(VAL, shuffle=False))
    assert not [str(warning.message) for warning in met if "lightning_calibft" in warning.filename]
