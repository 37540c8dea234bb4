"""The callback keeps the weights from before fine-tuning for the estimators that need them."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.tuner import Tuner

from lightning_calibft import AbsentClassCalibration, inspect_checkpoint
from lightning_calibft.functional import pseudo_absent_gamma
from tests.helpers.runs import SEEN, TRAIN, Plain, loader, pretrained, quiet, read, trainer_of

pytestmark = quiet


def logits_of(state, x):
    module = Plain().eval()
    module.load_state_dict({key: value for key, value in state.items() if "absent_class" not in key})
    with torch.no_grad():
        return module(x)


def expected(state, before):
    x, y = TRAIN.tensors
    return pseudo_absent_gamma(logits_of(state, x), y, logits_of(before, x), SEEN).gamma.item()


def test_gamma_of_the_model_and_of_each_file(tmp_path):
    module = pretrained()
    before = copy.deepcopy(module.state_dict())
    callback = AbsentClassCalibration(estimator="pseudo_absent", source="train")
    checkpoints = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    trainer_of(tmp_path, callback, checkpoints, max_epochs=2).fit(module, loader())
    assert callback.result.gamma == pytest.approx(expected(module.state_dict(), before), rel=1e-5)
    for name in ("epoch=0.ckpt", "epoch=1.ckpt"):
        state = read(tmp_path / name)["state_dict"]
        info = inspect_checkpoint(tmp_path / name)
        assert info["gamma"] == pytest.approx(expected(state, before), rel=1e-5)
        assert info["estimator"] == "pseudo_absent"
    assert callback._search.pretrained.weights is None  # the memory is free again


def test_a_resumed_fit_compares_with_the_weights_that_the_first_began_with(tmp_path):
    before = copy.deepcopy(pretrained().state_dict())
    first = AbsentClassCalibration(estimator="pseudo_absent", source="train")
    trainer = trainer_of(tmp_path, first, ModelCheckpoint(tmp_path, "first"), max_epochs=1)
    trainer.fit(pretrained(), loader())
    module, callback = pretrained(), AbsentClassCalibration(estimator="pseudo_absent", source="train")
    trainer = trainer_of(tmp_path, callback, max_epochs=2)
    trainer.fit(module, loader(), ckpt_path=tmp_path / "first.ckpt")
    assert callback.result.gamma == pytest.approx(expected(module.state_dict(), before), rel=1e-5)
    assert callback.result.gamma != pytest.approx(first.result.gamma, rel=1e-3)


def test_a_head_and_weights_that_come_in_setup(tmp_path):
    """The weights that count are those at the start of the fit, not those when the callback is set up."""
    before = copy.deepcopy(pretrained().state_dict())

    class Late(Plain):
        def build(self, dropout):
            pass

        def setup(self, stage):
            super().build(0.1)
            self.load_state_dict(before)

    module, callback = Late(), AbsentClassCalibration(estimator="pseudo_absent", source="train")
    trainer_of(tmp_path, callback, max_epochs=1).fit(module, loader())
    state = module.state_dict()
    assert callback.result.gamma == pytest.approx(expected(state, before), rel=1e-5)


def test_nothing_is_kept_for_others(tmp_path):
    class Watched(AbsentClassCalibration):
        def on_train_start(self, trainer, pl_module):
            self.kept = self._search.pretrained.weights

    callback = Watched()
    trainer_of(tmp_path, callback, max_epochs=1).fit(pretrained(), loader())
    assert callback.kept is None


def test_the_copy_goes_when_training_fails(tmp_path):
    class Fails(Plain):
        def training_step(self, batch, batch_idx):
            raise RuntimeError("no")

    module, callback = Fails(), AbsentClassCalibration(estimator="pseudo_absent", source="train")
    with pytest.raises(RuntimeError, match=r"^no$"):
        trainer_of(tmp_path, callback).fit(module, loader())
    assert callback._search.pretrained.weights is None


def test_a_model_that_was_fine_tuned_before_is_told(tmp_path):
    """The weights that the second fit begins with are not those of before fine-tuning."""
    module = pretrained()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "The estimator")
        trainer_of(tmp_path, AbsentClassCalibration(SEEN), max_epochs=1).fit(module, loader())
    with pytest.warns(
        UserWarning, match=r"'pseudo_absent' takes the weights that this fit begins .* estimator='pseudo"
    ):
        trainer_of(tmp_path, AbsentClassCalibration(estimator="pseudo_absent", source="train"), max_epochs=1).fit(
            module, loader()
        )


def test_a_tuner_leaves_nothing_behind(tmp_path):
    module, callback = pretrained(), AbsentClassCalibration(estimator="pseudo_absent", source="train")
    trainer = trainer_of(tmp_path, callback)
    Tuner(trainer).lr_find(module, loader(), num_training=5, update_attr=False)
    assert callback._search.pretrained.weights is None
    pickle.dumps(module)  # no hook of ours is on it
