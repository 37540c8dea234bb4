"""Gamma of each validation's own weights."""

from __future__ import annotations

import fsspec
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, StochasticWeightAveraging, WeightAveraging
from torch.utils.data import TensorDataset

from lightning_calibft import AbsentClassCalibration, get_gamma, inspect_checkpoint
from lightning_calibft.functional import calibrate_logits, split_accuracy
from tests.callback.measures import HARD
from tests.callback.test_sources import Counted
from tests.helpers.runs import (
    ABSENT,
    SEEN,
    TRAIN,
    Nervous,
    _reference_alg,
    assert_calibrated,
    loader,
    no_warnings,
    pretrained,
    quiet,
    raw_logits,
    read,
    split_state,
    trainer_of,
)

pytestmark = quiet


def refreshing(seen=SEEN, **kwargs):
    return AbsentClassCalibration(seen, refresh_on_validation=True, **kwargs)


def val():
    return loader(HARD, shuffle=False)


class Look(Callback):
    """What the model was in each validation, and what was logged."""

    def __init__(self):
        self.states, self.logged = {}, {}

    def on_validation_batch_start(self, trainer, pl_module, *_):
        if not trainer.sanity_checking:
            state = {key: value.clone() for key, value in pl_module.state_dict().items()}
            self.states.setdefault(trainer.global_step, state)

    def on_validation_end(self, trainer, pl_module):
        self.logged[trainer.global_step] = {key: value.item() for key, value in trainer.callback_metrics.items()}


@pytest.mark.parametrize("seen", [SEEN, None])
def test_each_validation_has_its_own_gamma(tmp_path, seen):
    look, data = Look(), Counted(TRAIN)
    module, callback = pretrained(Nervous), refreshing(seen)
    with no_warnings():
        trainer_of(tmp_path, callback, look, max_epochs=3).fit(module, loader(data), val())
    inputs, target = HARD.tensors
    assert [*look.states] == [6, 12, 18]
    gammas = [assert_calibrated(state) for state in look.states.values()]
    assert len({round(gamma, 3) for gamma in gammas}) == 3
    for gamma, state, logged in zip(gammas, look.states.values(), [*look.logged.values()][1:], strict=True):
        logits = calibrate_logits(raw_logits(state, inputs, make=Nervous), gamma, SEEN)
        for name in ("seen", "absent"):
            expected = split_accuracy(logits, target, SEEN, samples=name).item()
            assert logged[f"val_acc_{name}"] == pytest.approx(expected)
        assert logged["val_gamma"] == pytest.approx(gamma, rel=1e-5)
    assert get_gamma(module) == pytest.approx(gammas[-1])
    assert callback.result.gamma == pytest.approx(gammas[-1])
    assert data.read == 6 * len(TRAIN)  # three epochs, three passes: none at the end, where the weights are the same


def test_files_have_their_gamma_as_soon_as_they_are_written(tmp_path):
    checkpoints = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, monitor="val_acc_absent", mode="max")
    callback = refreshing(calibrate_checkpoints=False)
    trainer_of(tmp_path, callback, checkpoints, max_epochs=3).fit(pretrained(Nervous), loader(), val())
    for epoch in range(3):
        file = tmp_path / f"epoch={epoch}.ckpt"
        gamma = assert_calibrated(read(file)["state_dict"])
        assert inspect_checkpoint(file)["gamma"] == pytest.approx(gamma)
        assert inspect_checkpoint(file)["num_samples"] == len(TRAIN)


def test_files_between_validations_have_the_last_gamma_and_in_the_end_their_own(tmp_path):
    class Early(Callback):
        def on_train_end(self, trainer, pl_module):
            self.gammas = [split_state(read(tmp_path / f"step={step}.ckpt")["state_dict"])[1] for step in (8, 12, 16)]

    early = Early()
    checkpoints = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=4)
    callback, look = refreshing(), Look()
    trainer_of(tmp_path, callback, early, look, checkpoints, max_epochs=3).fit(pretrained(Nervous), loader(), val())
    at = {step: split_state(state)[1] for step, state in look.states.items()}
    assert early.gammas == pytest.approx([at[6], at[6], at[12]])  # the file of step 12 is older than its validation
    for step in (4, 8, 12, 16):
        assert_calibrated(read(tmp_path / f"step={step}.ckpt")["state_dict"])


def test_training_goes_on_as_without(tmp_path):
    states = []
    for callbacks in ([], [refreshing(max_samples=16)]):
        torch.manual_seed(0)
        module = pretrained()
        trainer_of(tmp_path, *callbacks, max_epochs=3).fit(module, loader(), val())
        states.append({key: value for key, value in module.state_dict().items() if "absent_class" not in key})
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key])


def test_some_samples_only(tmp_path):
    data, callback = Counted(TRAIN), refreshing(max_samples=16)
    trainer_of(tmp_path, callback).fit(pretrained(), loader(data), val())
    assert callback.result.num_samples == 16
    assert data.read == 2 * (len(TRAIN) + 16)


def test_weights_from_before_are_compared_with(tmp_path):
    found = {}
    for name, callback in {
        "end": AbsentClassCalibration(SEEN, estimator="pseudo_absent", source="train"),
        "each": None,
    }.items():
        callback = callback or refreshing(estimator="pseudo_absent", source="train")
        torch.manual_seed(0)
        trainer_of(tmp_path, callback).fit(pretrained(), loader(), val())
        found[name] = callback.result.gamma
    assert found["each"] == pytest.approx(found["end"], rel=1e-5)


def test_a_step_that_cannot_be_calibrated_does_not_end_the_training(tmp_path):
    class Spoils(Callback):
        """Training recovers from what it was in the first validation."""

        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                pl_module.fc.bias.data.copy_(self.bias)

        def on_train_batch_end(self, trainer, pl_module, *_):
            if trainer.global_step == 6:
                self.bias = pl_module.fc.bias.data.clone()
                pl_module.fc.bias.data[1] = torch.nan

    look, module, callback = Look(), pretrained(), refreshing()
    with pytest.warns(UserWarning, match="leaves step 6 without gamma. Expected finite logits in the calibration pass"):
        trainer_of(tmp_path, Spoils(), callback, look).fit(module, loader(), val())
    assert split_state(look.states[6])[1:] == (0.0, [])
    assert_calibrated(module.state_dict())


def test_without_validation_gamma_is_found_at_the_end(tmp_path):
    module, callback = pretrained(), refreshing()
    trainer_of(tmp_path, callback).fit(module, loader())
    assert callback.result.gamma == pytest.approx(_reference_alg(module.state_dict()), rel=1e-5)


def test_a_validation_apart_leaves_gamma_alone(tmp_path):
    module, callback, look = pretrained(), refreshing(), Look()
    trainer = trainer_of(tmp_path, callback, look)
    trainer.validate(module, val(), verbose=False)
    assert split_state(look.states[0])[1:] == (0.0, [])
    assert "val_gamma" not in trainer.callback_metrics


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"source": "training_steps"}, "`refresh_on_validation` to be False with `source='training_steps'`"),
        ({"estimator": "pcv"}, "`refresh_on_validation` to be False with `estimator='pcv'`"),
    ],
)
def test_what_does_not_go_together(arguments, message):
    with pytest.raises(ValueError, match=message):
        AbsentClassCalibration(SEEN, **{"refresh_on_validation": True, **arguments})


def test_it_is_a_switch():
    with pytest.raises(TypeError, match="`refresh_on_validation` to be a bool, but got a str"):
        AbsentClassCalibration(refresh_on_validation="validation")


@pytest.mark.parametrize("averaging", [WeightAveraging, lambda: StochasticWeightAveraging(1e-2)])
def test_averaged_weights_are_refused(tmp_path, averaging):
    with pytest.raises(RuntimeError, match=r"`refresh_on_validation=True` is not supported with .*Averaging"):
        trainer_of(tmp_path, refreshing(), averaging()).fit(pretrained(), loader(), val())


def test_a_tolerance_that_does_not_go_with_the_data_is_met_before_training(tmp_path):
    data, callback = Counted(TRAIN), AbsentClassCalibration(SEEN, tolerance=0.1)
    with pytest.raises(ValueError, match="`tolerance` to be None with several loaders, but got 2"):
        trainer_of(tmp_path, callback).fit(pretrained(), {"a": loader(data), "b": loader(data)})
    assert data.read == 0


def test_a_tolerance(tmp_path):
    module, callback = pretrained(), AbsentClassCalibration(SEEN, ABSENT, tolerance=1e-9)
    trainer_of(tmp_path, callback).fit(module, loader())
    assert callback.result.num_samples == len(TRAIN)
    assert_calibrated(module.state_dict())


def test_files_elsewhere_have_the_gamma_of_their_validation(tmp_path):
    """Nothing is written there a second time."""
    checkpoints = ModelCheckpoint("memory://refreshed")
    with no_warnings():
        trainer_of(tmp_path, refreshing(), checkpoints).fit(pretrained(Nervous), loader(), val())
    with fsspec.open(checkpoints.best_model_path) as file:
        assert_calibrated(torch.load(file, weights_only=True)["state_dict"])


@pytest.mark.filterwarnings("ignore:15 of 45 samples in the calibration pass are not of")
def test_a_class_that_is_met_late(tmp_path):
    """What was found with fewer classes does not stand in a file beside the mask of all."""
    inputs, target = TRAIN.tensors
    order = target.argsort(stable=True)
    data = TensorDataset(inputs[order], target[order])
    checkpoints = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, monitor="val_acc_all")
    trainer = trainer_of(
        tmp_path, refreshing(None), checkpoints, max_epochs=1, val_check_interval=2, num_sanity_val_steps=0
    )
    trainer.fit(pretrained(), loader(data, shuffle=False), val())
    for step in (2, 4, 6):
        file = tmp_path / f"step={step}.ckpt"
        gamma = assert_calibrated(read(file)["state_dict"])
        facts = inspect_checkpoint(file)
        assert (facts["seen_classes"], facts["num_samples"]) == (SEEN, len(TRAIN))
        assert facts["gamma"] == pytest.approx(gamma)


def test_steps_that_lightning_does_not_count(tmp_path):
    """The weights have changed since the last validation, though the number of steps says that they have not."""

    class Raw(Nervous):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers(use_pl_optimizer=False)
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()

    module = pretrained(Raw)
    trainer = trainer_of(tmp_path, refreshing(), max_epochs=3, check_val_every_n_epoch=2)
    trainer.fit(module, loader(), val())
    assert trainer.global_step == 0
    assert_calibrated(module.state_dict())
