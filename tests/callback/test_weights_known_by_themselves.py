"""Gamma belongs to the weights and buffers that made it, whoever has put them there, and when."""

from __future__ import annotations

import copy

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn

from lightning_calibft import AbsentClassCalibration, calibrate, get_gamma
from tests.helpers.runs import (
    NUM_CLASSES,
    SEEN,
    TRAIN,
    VAL,
    Nervous,
    assert_calibrated,
    assert_same,
    loader,
    no_warnings,
    pretrained,
    quiet,
    read,
    split_state,
    trainer_of,
)

pytestmark = quiet
WAYS = {
    "pass": {},
    "refreshed": {"refresh_on_validation": True},
    "steps": {"source": "training_steps"},
}
ways = pytest.mark.parametrize("way", WAYS)


class Worse(Nervous):
    """The first epoch stays the best one."""

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        self.log("epoch", float(self.current_epoch), batch_size=8)


class LoadsTheBest(Callback):
    """As early stopping recipes do: with the whole state dict, or with what the module itself has."""

    def __init__(self, hook, own):
        self.hook, self.own = hook, own

    def load(self, trainer, pl_module):
        self.gamma = get_gamma(pl_module)
        state = read(trainer.checkpoint_callback.best_model_path)["state_dict"]
        pl_module.load_state_dict(split_state(state)[0] if self.own else state)

    def on_train_end(self, trainer, pl_module):
        if self.hook == "on_train_end":
            self.load(trainer, pl_module)

    def on_fit_end(self, trainer, pl_module):
        if self.hook == "on_fit_end":
            self.load(trainer, pl_module)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("hook", ["on_train_end", "on_fit_end"])
@ways
def test_a_callback_loads_the_best_weights(way, hook, own, tmp_path):
    checkpoints = ModelCheckpoint(tmp_path, "{epoch}", monitor="epoch", save_last=True)
    callback, module = AbsentClassCalibration(SEEN, **WAYS[way]), pretrained(Worse)
    loads = LoadsTheBest(hook, own)
    trainer = trainer_of(tmp_path, callback, loads, checkpoints, max_epochs=3)
    trainer.fit(module, loader(), loader(VAL, shuffle=False))
    best = read(tmp_path / "epoch=0.ckpt")["state_dict"]
    assert_same(split_state(dict(module.state_dict()))[0], split_state(dict(best))[0])
    if way == "steps":  # gamma of the steps of the first epoch, which led to these weights
        assert get_gamma(module) == split_state(best)[1] != loads.gamma
    else:
        assert assert_calibrated(module.state_dict(), make=Worse) == pytest.approx(split_state(best)[1])
        assert_calibrated(best, make=Worse)
        assert_calibrated(read(tmp_path / "last.ckpt")["state_dict"], make=Worse)


class Changes(Nervous):
    """Its own hooks run after those of the callbacks."""

    def on_train_end(self):
        with torch.no_grad():
            self.fc.weight.mul_(2)


class ChangesABuffer(Nervous):
    def on_train_end(self):
        self.body[1].running_mean += 1


@pytest.mark.parametrize("make", [Changes, ChangesABuffer])
@pytest.mark.parametrize("way", ["pass", "refreshed"])
def test_the_module_changes_its_weights_when_training_ends(make, way, tmp_path):
    checkpoints = ModelCheckpoint(tmp_path, "{epoch}", save_last=True)
    callback, module = AbsentClassCalibration(**WAYS[way]), pretrained(make)
    trainer_of(tmp_path, callback, checkpoints).fit(module, loader(), loader(VAL, shuffle=False))
    gamma = assert_calibrated(module.state_dict(), make=make)
    assert callback.result.gamma == pytest.approx(gamma)
    saved = assert_calibrated(read(tmp_path / "last.ckpt")["state_dict"], make=make)
    assert saved != pytest.approx(gamma, rel=1e-3)


class LoadsTheBestAtLast(Worse):
    """In its own last hook, when the callbacks have run."""

    def on_fit_end(self):
        state = read(self.trainer.checkpoint_callback.best_model_path)["state_dict"]
        self.load_state_dict(split_state(state)[0])


@pytest.mark.parametrize("way", ["pass", "refreshed"])
def test_the_module_loads_the_best_weights_at_last(way, tmp_path):
    checkpoints = ModelCheckpoint(tmp_path, "{epoch}", monitor="epoch")
    callback, module = AbsentClassCalibration(SEEN, **WAYS[way]), pretrained(LoadsTheBestAtLast)
    with no_warnings("on_fit_end"):
        trainer_of(tmp_path, callback, checkpoints).fit(module, loader(), loader(VAL, shuffle=False))
    assert_calibrated(module.state_dict(), make=LoadsTheBestAtLast)
    assert get_gamma(module) == pytest.approx(split_state(read(tmp_path / "epoch=0.ckpt")["state_dict"])[1])


class ChangesAtLast(Nervous):
    def on_fit_end(self):
        with torch.no_grad():
            self.fc.weight.mul_(2)


def test_weights_that_change_at_last_are_told(tmp_path):
    with pytest.warns(UserWarning, match="`on_fit_end` of ChangesAtLast has changed the weights after gamma was found"):
        trainer_of(tmp_path, AbsentClassCalibration(SEEN)).fit(pretrained(ChangesAtLast), loader())


class Scaled(Nervous):
    """What decides its logits is in the checkpoint, but not in the state dict."""

    scale = 1.0

    def build(self, dropout):
        super().build(dropout)
        self.seen = {"epochs": []}

    def forward(self, x):
        return self.fc(self.body(x) * self.scale)

    def on_train_epoch_start(self):
        self.scale = 1.0 + 3.0 * self.current_epoch

    def on_save_checkpoint(self, checkpoint):
        checkpoint["scale"] = self.scale

    def on_load_checkpoint(self, checkpoint):
        self.scale = checkpoint.pop("scale")
        self.seen["epochs"].append(checkpoint["epoch"])
        checkpoint["state_dict"]["body.0.bias"].add_(0)


class ScaleOfACallback(Callback):
    """The same, by a callback."""

    def __init__(self):
        self.loaded = []

    def on_train_epoch_start(self, trainer, pl_module):
        pl_module.scale = 1.0 + 3.0 * trainer.current_epoch

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        checkpoint["scale"] = pl_module.scale

    def on_load_checkpoint(self, trainer, pl_module, checkpoint):
        self.loaded.append(checkpoint["epoch"])
        pl_module.scale = checkpoint["scale"]


class Scalable(Nervous):
    scale = 1.0
    forward = Scaled.forward


class Widened(Nervous):
    """Builds the network that a checkpoint names."""

    def build(self, dropout, width=16):
        super().build(dropout)
        self.width = width
        self.body = nn.Sequential(nn.Linear(5, width), nn.ReLU())
        self.fc = nn.Linear(width, NUM_CLASSES)

    def on_save_checkpoint(self, checkpoint):
        checkpoint["width"] = self.width

    def on_load_checkpoint(self, checkpoint):
        self.build(0.0, checkpoint["width"])


class ExtraState(Nervous):
    """Torch's own way to store what is no tensor."""

    def build(self, dropout):
        super().build(dropout)
        self.extra = {"of": {"epochs": []}}

    def get_extra_state(self):
        return self.extra

    def set_extra_state(self, state):
        self.extra["of"]["epochs"][:] = state["of"]["epochs"]

    def on_train_epoch_start(self):
        self.extra["of"]["epochs"].append(self.current_epoch)

    def forward(self, x):
        return self.fc(self.body(x) * (1 + len(self.extra["of"]["epochs"])))


def own_gamma(module, checkpoint, callbacks=()) -> float:
    """Gamma of a checkpoint, found by a module that Lightning would have loaded it into."""
    checkpoint = copy.deepcopy(checkpoint)
    fresh = pretrained(type(module))
    fresh.on_load_checkpoint(checkpoint)
    fresh.load_state_dict(split_state(checkpoint["state_dict"])[0])
    for callback in callbacks:
        callback.on_load_checkpoint(None, fresh, checkpoint)
    return calibrate(fresh, loader(TRAIN), SEEN, progress=False).gamma


@pytest.mark.parametrize("refresh", [False, True])
@pytest.mark.parametrize("make", [Scaled, Scalable, Widened, ExtraState])
def test_files_are_loaded_with_their_hooks(make, refresh, tmp_path):
    checkpoints, module = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1), make()
    others = [ScaleOfACallback()] if make is Scalable else []
    callback = AbsentClassCalibration(SEEN, refresh_on_validation=refresh)
    live = {}

    class Before(Callback):
        def on_fit_end(self, trainer, pl_module):
            live.update(pl_module.state_dict(), modules=list(pl_module.modules()), own=copy.deepcopy(vars(pl_module)))

    trainer_of(tmp_path, callback, *others, Before(), checkpoints, max_epochs=3).fit(
        module, loader(), loader(VAL, shuffle=False)
    )
    gammas = []
    for epoch in range(3):
        checkpoint = torch.load(tmp_path / f"epoch={epoch}.ckpt", weights_only=False)
        gammas.append(split_state({k: v for k, v in checkpoint["state_dict"].items() if "extra" not in k})[1])
        assert gammas[-1] == pytest.approx(own_gamma(module, checkpoint, others and [ScaleOfACallback()]), rel=1e-5)
        assert ("scale" in checkpoint) == (make in (Scaled, Scalable))
    assert len({round(gamma, 3) for gamma in gammas}) == 3
    assert callback.result.gamma == pytest.approx(gammas[-1]) == get_gamma(module)
    # The live model is the object that it was, with all that it had.
    assert list(module.modules()) == live.pop("modules")
    own = live.pop("own")
    assert [vars(module).get(name) for name in ("scale", "seen", "width", "extra")] == [
        own.get(name) for name in ("scale", "seen", "width", "extra")
    ]
    for name, value in module.state_dict().items():
        assert torch.equal(value, live[name]) if isinstance(value, torch.Tensor) else value == live[name]
    assert all(other.loaded == [] for other in others)


class LoadsOnce(Nervous):
    def on_load_checkpoint(self, checkpoint):
        if checkpoint["epoch"] == 0:
            raise KeyError("ema")


def test_a_hook_that_fails_spoils_no_other_file(tmp_path):
    checkpoints, module = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1), pretrained(LoadsOnce)
    with pytest.raises(RuntimeError, match=r"Could not calibrate the checkpoints '\S*epoch=0.ckpt': KeyError: 'ema'\."):
        trainer_of(tmp_path, AbsentClassCalibration(), checkpoints).fit(module, loader())
    assert split_state(read(tmp_path / "epoch=0.ckpt")["state_dict"])[1:] == (0.0, [])
    assert_calibrated(read(tmp_path / "epoch=1.ckpt")["state_dict"], make=LoadsOnce)
    assert_calibrated(module.state_dict(), make=LoadsOnce)
