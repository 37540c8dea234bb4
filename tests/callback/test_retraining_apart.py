"""Nested fits leave no trace, and go on where they were stopped."""

from __future__ import annotations

import copy
import json
import os
import signal
import threading
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from lightning_calibft import get_gamma, inspect_checkpoint
from tests.callback.retraining import DATA, Watched, _reference, pcv, weights
from tests.helpers.processes import run_python
from tests.helpers.runs import (
    VAL,
    Plain,
    loader,
    pretrained,
    pretrained_weights,
    quiet,
    trainer_of,
)

pytestmark = quiet


class Logging(Plain):
    def on_train_end(self):
        self.logger.experiment.log_metrics({"trained": 1.0}, step=0)


def test_nothing_is_written_or_logged_and_training_is_as_without(tmp_path):
    outcomes = []
    for name, callbacks in (("without", []), ("with", [pcv()])):
        torch.manual_seed(3)
        module, folder = pretrained(Logging), tmp_path / name
        logger = CSVLogger(folder, name="log", version="")
        kept = ModelCheckpoint(folder, save_last=True)
        options = {"logger": logger, "log_every_n_steps": 1}
        trainer = trainer_of(folder, *callbacks, kept, **options)
        trainer.fit(module, loader(DATA), loader(VAL, shuffle=False))
        files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
        lines = (folder / "log" / "metrics.csv").read_text().splitlines()
        own = [line for line in lines if "gamma" not in line]
        state = weights(module.state_dict())
        losses = [trainer.logged_metrics["train_loss"], trainer.callback_metrics["val_loss"]]
        outcomes.append((files, state, torch.get_rng_state(), losses, module.training, len(own)))
    without, with_pcv = outcomes
    assert without[0] == with_pcv[0]
    assert all(torch.equal(without[1][key], with_pcv[1][key]) for key in without[1])
    assert torch.equal(without[2], with_pcv[2])
    assert (without[3], without[4]) == (with_pcv[3], with_pcv[4])


def test_finished_splits_are_kept(tmp_path, fits):
    module, callback = pretrained(Watched), pcv(folder=str(tmp_path / "splits"))
    torch.manual_seed(0)
    trainer_of(tmp_path, callback).fit(module, loader(DATA))
    assert len(fits) == 4
    assert sorted(path.name for path in (tmp_path / "splits").iterdir()) == [f"split_{k}.json" for k in range(3)]
    again = pcv(folder=str(tmp_path / "splits"))
    trainer_of(tmp_path, again).fit(pretrained(Watched), loader(DATA))
    assert len(fits) == 5
    assert again.result == callback.result
    with pytest.raises(ValueError, match=r"`folder` to be empty or from the same run, but .* another `max_epochs`"):
        trainer_of(tmp_path, pcv(folder=str(tmp_path / "splits")), max_epochs=1).fit(pretrained(), loader(DATA))


def run_and_die(folder: Path) -> None:
    """Die in the second nested fit; everything the fit saves is there by then."""

    class Dying(Plain):
        fits = 0

        def on_train_start(self):
            Dying.fits += 1
            if Dying.fits == 3:
                os.kill(os.getpid(), signal.SIGKILL)

    torch.manual_seed(0)
    checkpoints = ModelCheckpoint(folder, save_last=True)
    trainer_of(folder, pcv(folder=str(folder / "splits")), checkpoints).fit(pretrained(Dying), loader(DATA))


def test_killed_and_resumed(tmp_path, fits):
    """The fit is resumed with nothing left to train: the other splits are made from the weights that it began with."""
    script = f"from tests.callback.test_retraining_apart import *\nrun_and_die(Path({str(tmp_path)!r}))"
    run_python("-c", script, status=-signal.SIGKILL)
    assert [path.name for path in (tmp_path / "splits").iterdir()] == ["split_0.json"]
    assert inspect_checkpoint(tmp_path / "last.ckpt")["calibrated"] is False
    module, callback = pretrained(Watched), pcv(folder=str(tmp_path / "splits"))
    trainer_of(tmp_path, callback).fit(module, loader(DATA), ckpt_path=tmp_path / "last.ckpt")
    assert len(fits) == 2  # nested, both
    for fit in fits:
        assert all(torch.equal(fit["weights"][key], value) for key, value in pretrained_weights().items())
    whole = pcv()
    torch.manual_seed(0)
    trainer_of(tmp_path, whole).fit(pretrained(), loader(DATA))
    assert callback.result.gamma == pytest.approx(whole.result.gamma, rel=1e-5)
    assert get_gamma(module) == pytest.approx(whole.result.gamma, rel=1e-5)


class Interrupting(Plain):
    fits = 0

    def on_train_start(self):
        Interrupting.fits += 1
        if Interrupting.fits == 2:
            signal.raise_signal(signal.SIGINT)


def test_interrupted(tmp_path):
    """Ctrl-C ends all of it, and leaves the model as training made it."""
    module, callback = pretrained(Interrupting), pcv()
    # Where the suite runs in the background of a shell, SIGINT is ignored from the start.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with (
            pytest.warns(UserWarning, match="interrupted: the model and its checkpoints are not calibrated"),
            pytest.raises(SystemExit),
        ):
            trainer_of(tmp_path, callback).fit(module, loader(DATA))
    finally:
        signal.signal(signal.SIGINT, handler)
    assert (callback.result, get_gamma(module), Interrupting.fits) == (None, None, 2)
    assert callback._search.retraining._module is None


def test_what_it_will_cost_is_said(tmp_path, caplog):
    caplog.set_level("INFO")
    trainer = trainer_of(tmp_path, pcv(), enable_progress_bar=True)
    trainer.fit(pretrained(), loader(DATA))
    assert (
        "3 more trainings, on 50 %, 50 %, 50 % of the 48 samples. Each trains for 2 epochs of its samples"
        in caplog.text
    )
    assert caplog.text.count("GPU available") == 1
    before, _ = caplog.text.split("`Trainer.fit` stopped")
    assert "'pcv') will train 3 more models after this fit" in before
    assert "about 1.5 times as long as this fit" in before


class SetUpOnce(Watched):
    """Builds its head anew whenever it is set up."""

    def setup(self, stage):
        self.fc = nn.Linear(16, 6)
        self.load_state_dict(pretrained_weights())

    def teardown(self, stage):
        assert self.trainer is not None
        type(self).torn_down = getattr(type(self), "torn_down", 0) + 1


def test_a_module_is_set_up_and_torn_down_once(tmp_path, fits):
    SetUpOnce.fits = fits
    module, callback = SetUpOnce(), pcv()
    trainer_of(tmp_path, callback).fit(module, loader(DATA))
    assert callback.result.gamma == pytest.approx(sum(_reference(fits[1:])) / 3, abs=1e-4)
    assert SetUpOnce.torn_down == 1


def test_frozen_modules_stay_frozen(tmp_path, fits):
    module = pretrained(Watched)
    module.body[1].eval()
    trainer_of(tmp_path, pcv()).fit(module, loader(DATA))
    assert all(fit["after"]["body.1.num_batches_tracked"] == 30 for fit in fits)  # those of pre-training


class Spy(Callback):
    """What the user's own callbacks see of a fit."""

    def __init__(self):
        self.starts = 0
        self.lock = threading.Lock()  # cannot be copied, nor could a Trainer that knows of it

    def on_train_start(self, trainer, pl_module):
        self.starts += 1


def test_the_users_callbacks_see_one_fit(tmp_path):
    spy = Spy()
    trainer = trainer_of(tmp_path, pcv(), spy)
    state = copy.copy(trainer.callbacks)
    trainer.fit(pretrained(), loader(DATA))
    assert spy.starts == 1
    assert set(map(id, trainer.callbacks)) == set(map(id, state))
    assert json.dumps(trainer.current_epoch) == "2"
