"""Training goes as it would without the callback."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_calibft import AbsentClassCalibration, get_gamma
from tests.helpers.runs import (
    TRAIN,
    VAL,
    Noisy,
    Plain,
    assert_calibrated,
    assert_same,
    loader,
    pretrained,
    quiet,
    read,
    split_state,
    trainer_of,
    without_calibration,
)

# The noisy data lists no labels.
pytestmark = [quiet, pytest.mark.filterwarnings("ignore:AbsentClassCalibration cannot read from the dataset")]


class Dropout(Plain):
    def __init__(self):
        super().__init__(dropout=0.5)


def seed():
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)


def streams():
    return torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()


def run(folder, *callbacks, make=Dropout, data=TRAIN, module=None, **kwargs):
    """Fit with fixed seeds; return the weights, the random states and the checkpoints' contents."""
    seed()
    module = pretrained(make) if module is None else module
    options = {key: kwargs.pop(key) for key in ("num_workers", "persistent_workers") if key in kwargs}
    checkpoints = ModelCheckpoint(folder, save_top_k=-1, every_n_train_steps=3)
    trainer = trainer_of(folder, *callbacks, checkpoints, **kwargs)
    trainer.fit(module, loader(Noisy(data), **options), loader(VAL, shuffle=False))
    files = {path.name: without_calibration(read(path)) for path in sorted(folder.glob("*.ckpt"))}
    return {"model": dict(module.state_dict()), "streams": streams(), "files": files}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_workers": 2},
        {"num_workers": 2, "persistent_workers": True},
        {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5},
        {"val_check_interval": 2, "limit_train_batches": 5},
    ],
    ids=["plain", "workers", "persistent_workers", "accumulate", "often"],
)
def test_the_trajectory_is_bit_identical(options, tmp_path):
    (tmp_path / "with").mkdir()
    (tmp_path / "without").mkdir()
    without = run(tmp_path / "without", **options)
    calibrated = run(tmp_path / "with", AbsentClassCalibration(), **options)
    own, gamma, _ = split_state(calibrated.pop("model"))
    assert gamma != 0
    assert_same(own, without.pop("model"))
    assert_same(calibrated["streams"][0], without["streams"][0])
    assert calibrated["streams"][1:] == without["streams"][1:]
    assert len(without["files"]) >= 2
    for name in without["files"]:
        one, other = calibrated["files"][name], without["files"][name]
        for checkpoint in (one, other):
            checkpoint["callbacks"] = None  # they hold the name of the folder
            checkpoint["loops"] = None if "num_workers" in options else checkpoint["loops"]
            vars(checkpoint["state_dict"])["_metadata"] = None  # names the calibration's module
        assert_same(one, other)


def test_frozen_layers_and_modes(tmp_path):
    class Frozen(Dropout):
        def on_train_epoch_start(self):
            self.body[1].eval()  # a frozen BatchNorm, as in fine-tuning recipes

    class Watch(Callback):
        def __init__(self):
            self.modes, self.buffers = [], []

        def note(self, module):
            own = [name for name, _ in module.named_modules() if "absent_class" not in name]
            self.modes.append({name: module.get_submodule(name).training for name in own})
            self.buffers.append({name: value.clone() for name, value in module.named_buffers() if "absent" not in name})

        def on_train_batch_end(self, trainer, pl_module, *_):
            self.note(pl_module)

        def on_train_end(self, trainer, pl_module):
            self.note(pl_module)

        def on_fit_end(self, trainer, pl_module):
            self.note(pl_module)

        def teardown(self, trainer, pl_module, stage):
            self.note(pl_module)

    watch, module = Watch(), pretrained(Frozen)
    start = {name: value.clone() for name, value in module.named_buffers()}
    trainer_of(tmp_path, AbsentClassCalibration(), watch, ModelCheckpoint(tmp_path)).fit(module, loader())
    # Eval mode was left behind, and what the user had put into it stayed there, also over the passes.
    assert len(watch.modes) == 12 + 3
    expected = dict.fromkeys(("", "body", "body.0", "body.2", "body.3", "fc"), True) | {"body.1": False}
    assert all(modes == expected for modes in watch.modes)
    for buffers in watch.buffers:
        assert_same(buffers, start)
    assert_calibrated(module.state_dict(), make=Frozen)


def test_the_pass_leaves_batch_norm_alone(tmp_path):
    class Watch(Callback):
        def on_train_end(self, trainer, pl_module):  # before the callback
            self.before = {name: value.clone() for name, value in pl_module.body.state_dict().items()}
            self.mode = pl_module.training

    watch, module = Watch(), pretrained()
    trainer_of(tmp_path, watch, AbsentClassCalibration(), ModelCheckpoint(tmp_path, save_top_k=-1)).fit(
        module, loader()
    )
    assert_same(watch.before, {name: value.clone() for name, value in module.body.state_dict().items()})
    assert module.training == watch.mode is True


def test_training_sees_raw_logits_and_a_second_fit_does_not_add_gamma_twice(tmp_path):
    callback, module = AbsentClassCalibration(), pretrained()
    trainer_of(tmp_path, callback).fit(module, loader())
    first = assert_calibrated(module.state_dict())
    weights = copy.deepcopy(split_state(module.state_dict())[0])

    seed()
    trainer_of(tmp_path, AbsentClassCalibration()).fit(module, loader())
    second = assert_calibrated(module.state_dict())
    assert second != first
    plain = Plain()
    plain.load_state_dict(weights)
    seed()
    trainer_of(tmp_path).fit(plain, loader())
    assert_same(split_state(module.state_dict())[0], dict(plain.state_dict()))

    third = trainer_of(tmp_path, callback)  # the same callback again
    third.fit(module, loader())
    assert_calibrated(module.state_dict())


def test_checkpoints_written_while_a_calibrated_model_is_trained_again_are_not_calibrated_before_the_end(tmp_path):
    class Watch(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.save_checkpoint(tmp_path / "during.ckpt")

    module = pretrained()
    trainer_of(tmp_path, AbsentClassCalibration()).fit(module, loader())
    assert get_gamma(module) is not None
    trainer_of(tmp_path, AbsentClassCalibration(), Watch()).fit(module, loader())
    during = read(tmp_path / "during.ckpt")
    assert split_state(during["state_dict"])[1:] == (0, [])
    assert "lightning_calibft" not in during
