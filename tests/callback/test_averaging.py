"""Weight averaging beside the callback: gamma is that of the averaged weights, wherever these are."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, WeightAveraging

from lightning_calibft import AbsentClassCalibration, get_gamma, load_calibrated
from tests.callback.averaging import averaging, copies, marks
from tests.helpers.references import _reference_ausuc
from tests.helpers.runs import (
    ABSENT,
    SEEN,
    VAL,
    Plain,
    assert_calibrated,
    loader,
    pretrained,
    raw_logits,
    read,
    split_state,
    trainer_of,
)

pytestmark = marks


class Predicting(Plain):
    """Logs for itself what it predicts."""

    def validation_step(self, batch, batch_idx):
        logits, size = self(batch[0]), len(batch[1])
        self.log("own_acc", (logits.argmax(1) == batch[1]).float().mean(), batch_size=size)
        self.log("own_absent", logits[:, ABSENT].mean(), batch_size=size)

    test_step = validation_step


class Agreement(Callback):
    """After each validation, what the module predicted and what was logged about it are the same."""

    count = 0

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            self.count += 1
            metrics = trainer.callback_metrics
            assert metrics["val_acc_all"].item() == pytest.approx(metrics["own_acc"].item(), abs=1e-6)


def _fit(folder, make, module=None, ckpt_path=None, max_epochs=3, **kwargs):
    module = pretrained(Predicting) if module is None else module
    calibration, checkpoint = (
        AbsentClassCalibration(**kwargs),
        ModelCheckpoint(
            folder,
            "{epoch}",
            monitor="val_ausuc",
            mode="max",
            save_top_k=-1,
            save_last=True,
            auto_insert_metric_name=False,
        ),
    )
    agreement = Agreement()
    trainer = trainer_of(folder, calibration, make(), agreement, checkpoint, max_epochs=max_epochs)
    torch.manual_seed(0)
    trainer.fit(module, loader(), loader(VAL, shuffle=False), ckpt_path=ckpt_path)
    assert agreement.count
    return trainer, module, calibration, checkpoint


def _assert_logged(trainer, prefix, state):
    """The evaluation just run was that of the calibrated weights in ``state``."""
    logits, gamma = raw_logits(state, VAL.tensors[0], make=Predicting), split_state(state)[1]
    logits[:, ABSENT] += gamma
    accuracy = (logits.argmax(1) == VAL.tensors[1]).float().mean().item()
    metrics = trainer.callback_metrics
    assert abs(gamma) > 0.01
    assert metrics["own_absent"].item() == pytest.approx(logits[:, ABSENT].mean().item(), abs=1e-4)
    assert metrics["own_acc"].item() == pytest.approx(accuracy, abs=1e-6)
    assert metrics[f"{prefix}_acc_all"].item() == pytest.approx(accuracy, abs=1e-6)


@averaging
def test_gamma_is_that_of_the_averaged_weights(tmp_path, make):
    _, module, calibration, checkpoint = _fit(tmp_path, make)
    gamma = assert_calibrated(module.state_dict(), make=Predicting)
    assert gamma == get_gamma(module) == pytest.approx(calibration.result.gamma, rel=1e-6)

    files = [*checkpoint.best_k_models, checkpoint.last_model_path]
    assert len(files) >= 4
    gammas = set()
    for file in files:
        saved = read(file)
        gammas.add(assert_calibrated(saved["state_dict"], make=Predicting))
        assert saved["lightning_calibft"]["gamma"] == pytest.approx(split_state(saved["state_dict"])[1], rel=1e-6)
        if isinstance(make(), WeightAveraging):
            current = saved["current_model_state"]
            assert not torch.equal(current["fc.weight"], saved["state_dict"]["fc.weight"])
    assert len(gammas) >= 3  # the files differ, so each was calibrated for itself


@averaging
def test_what_is_saved_after_fitting_carries_gamma(tmp_path, make):
    trainer, module, *_ = _fit(tmp_path, make)
    for weights_only in (False, True):
        path = tmp_path / "after" / f"{weights_only}.ckpt"
        trainer.save_checkpoint(path, weights_only=weights_only)
        saved = read(path)
        assert assert_calibrated(saved["state_dict"], make=Predicting) == get_gamma(module)
        assert ("lightning_calibft" in saved) is not weights_only
        loaded, inputs = load_calibrated(Predicting, path), VAL.tensors[0]
        torch.testing.assert_close(loaded(inputs), module.eval()(inputs))


@averaging
def test_validation_metrics_are_those_of_the_averaged_weights(tmp_path, make):
    *_, checkpoint = _fit(tmp_path, make)
    for file, logged in checkpoint.best_k_models.items():
        logits = raw_logits(read(file)["state_dict"], VAL.tensors[0], make=Predicting)
        assert logged.item() == pytest.approx(_reference_ausuc(logits, VAL.tensors[1], SEEN, ABSENT), abs=1e-6)


@averaging
def test_evaluation_with_the_trainer_of_the_fit_is_calibrated(tmp_path, make):
    trainer, module, _, checkpoint = _fit(tmp_path, make)
    data, live = loader(VAL, shuffle=False), {key: value.clone() for key, value in module.state_dict().items()}
    trainer.validate(module, data, verbose=False)
    _assert_logged(trainer, "val", live)
    torch.testing.assert_close(module.state_dict(), live, rtol=0, atol=0)

    path = sorted(checkpoint.best_k_models)[1]  # not the weights that the module has now
    saved = read(path)
    for evaluate, prefix in ((trainer.test, "test"), (trainer.validate, "val")):
        evaluate(module, data, ckpt_path=path, verbose=False)
        _assert_logged(trainer, prefix, saved["state_dict"])
        torch.testing.assert_close(module.state_dict(), saved["state_dict"], rtol=0, atol=0)
        module.load_state_dict(live)

    trainer.test(module, data, ckpt_path=path, verbose=False)
    trainer.save_checkpoint(tmp_path / "tested.ckpt")
    again = read(tmp_path / "tested.ckpt")
    assert_calibrated(again["state_dict"], make=Predicting)
    assert again["lightning_calibft"] == saved["lightning_calibft"]


@averaging
def test_a_run_resumed_from_a_calibrated_file_begins_without_gamma(tmp_path, make):
    *_, checkpoint = _fit(tmp_path / "first", make)
    path = min(checkpoint.best_k_models)
    assert get_gamma(load_calibrated(Predicting, path))

    _, module, _, checkpoint = _fit(
        tmp_path / "second", make, Predicting(), path, max_epochs=4, calibrate_checkpoints=False
    )
    assert_calibrated(module.state_dict(), make=Predicting)
    *early, _ = sorted(checkpoint.best_k_models)
    assert len(early) >= 2
    for file in early:  # as they were written while training: of gamma not a trace
        saved = read(file)
        assert "lightning_calibft" not in saved
        for state in (saved["state_dict"], saved.get("current_model_state", saved["state_dict"])):
            assert split_state(state)[1:] == (0.0, [])


@averaging
def test_a_finished_run_that_is_resumed(tmp_path, make):
    *_, checkpoint = _fit(tmp_path / "first", make)
    module, calibration = Predicting(), AbsentClassCalibration()
    trainer = trainer_of(tmp_path, calibration, make(), max_epochs=3)
    trainer.fit(module, loader(), ckpt_path=checkpoint.last_model_path)
    assert_calibrated(module.state_dict(), make=Predicting)
    trainer.save_checkpoint(tmp_path / "resumed.ckpt")
    assert_calibrated(read(tmp_path / "resumed.ckpt")["state_dict"], make=Predicting)


@averaging
def test_a_run_without_the_callback_is_resumed_with_it(tmp_path, make):
    checkpoint = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    trainer_of(tmp_path, make(), checkpoint, max_epochs=2).fit(pretrained(Predicting), loader())
    path = checkpoint.best_model_path
    assert not [key for key in read(path)["state_dict"] if "calibration" in key]
    _, module, _, checkpoint = _fit(tmp_path / "second", make, Predicting(), path, max_epochs=4)
    assert_calibrated(module.state_dict(), make=Predicting)
    for file in checkpoint.best_k_models:
        assert_calibrated(read(file)["state_dict"], make=Predicting)


@copies
def test_a_second_fit_with_the_same_trainer(tmp_path, make):
    trainer, module, _, checkpoint = _fit(tmp_path, make)
    trainer.fit_loop.max_epochs = 5
    trainer.fit(module, loader(), loader(VAL, shuffle=False))
    assert_calibrated(module.state_dict(), make=Predicting)
    for file in checkpoint.best_k_models:
        assert_calibrated(read(file)["state_dict"], make=Predicting)


def test_weights_without_gamma_are_saved_without_it(tmp_path):
    module = pretrained()
    trainer = trainer_of(tmp_path, AbsentClassCalibration())
    trainer.fit(module, loader())
    module.load_state_dict(pretrained().state_dict())  # by the user
    trainer.save_checkpoint(tmp_path / "other.ckpt")
    saved = read(tmp_path / "other.ckpt")
    assert split_state(saved["state_dict"])[1:] == (0.0, [])
    assert "lightning_calibft" not in saved
