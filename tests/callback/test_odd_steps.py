"""Gamma from training steps that are left out, that others disturb, and that go into pickles."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from lightning_calibft import AbsentClassCalibration
from tests.callback.test_sources import Watched, gap, steps
from tests.runs import SEEN, VAL, Plain, loader, pretrained, quiet, trainer_of

pytestmark = [quiet, pytest.mark.filterwarnings("ignore:`training_step` returned `None`")]


def of(steps):
    return gap(*(torch.cat([step[i] for step in steps]) for i in (1, 2)))


@pytest.mark.parametrize("before_the_forward", [True, False])
def test_a_batch_that_the_module_skips_is_not_counted(tmp_path, before_the_forward):
    class Skips(Watched):
        def training_step(self, batch, batch_idx):
            if batch_idx == 2 and before_the_forward:
                return None
            loss = super().training_step((batch[0] * (torch.nan if batch_idx == 2 else 1), batch[1]), batch_idx)
            if batch_idx == 2:
                self.steps.pop()
                return None
            return loss

    module, callback = pretrained(Skips), steps()
    module.body = torch.nn.Sequential(torch.nn.Linear(5, 16), torch.nn.ReLU())  # no running statistics for the NaN
    trainer_of(tmp_path, callback, max_epochs=1).fit(module, loader())
    assert len(module.steps) == 5
    result = callback.result
    assert (result.gamma, result.standard_error, result.num_samples) == pytest.approx(of(module.steps), rel=1e-9)


def test_a_manual_step_that_leaves_its_batch_out(tmp_path):
    class Manual(Watched):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            if batch_idx == 2:
                return
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()

    module, callback = pretrained(Manual), steps()
    trainer_of(tmp_path, callback, max_epochs=1).fit(module, loader())
    assert len(module.steps) == 5
    assert callback.result.gamma == pytest.approx(of(module.steps)[0], rel=1e-9)


def test_a_module_whose_first_step_runs_no_head(tmp_path):
    class Headless(Plain):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            pass

    with pytest.raises(ValueError, match=r"shape \(8, 6\) for a batch of 8 labels, but got \[\]"):
        trainer_of(tmp_path, steps()).fit(pretrained(Headless), loader())


def test_a_forward_of_another_callback_is_not_the_steps(tmp_path):
    class Pictures(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            pl_module(batch[0][:3])

    module, callback = pretrained(Watched), steps()
    trainer_of(tmp_path, callback, Pictures(), max_epochs=1).fit(module, loader())
    assert callback.result.gamma == pytest.approx(of(module.steps)[0], rel=1e-9)


def test_nothing_is_recorded_in_validation(tmp_path):
    class Look(Callback):
        def on_validation_batch_end(self, trainer, pl_module, *_):
            recording.append(pl_module.fc.absent_class_calibration.recording)

    recording = []
    callback = AbsentClassCalibration(SEEN, source="training_steps", log_metrics=False)
    trainer_of(tmp_path, callback, Look(), max_epochs=2).fit(pretrained(), loader(), loader(VAL, shuffle=False))
    assert recording == [False] * len(recording) != []


def test_the_callback_goes_into_pickles_and_copies_in_the_middle_and_at_the_end(tmp_path):
    class Copy(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 2:
                self.copy = copy.deepcopy(callback)
                pickle.loads(pickle.dumps(callback))

    taken, callback = Copy(), steps()
    trainer_of(tmp_path, callback, taken, max_epochs=1).fit(pretrained(Watched), loader())
    assert pickle.loads(pickle.dumps(callback)).result == callback.result
    copied = taken.copy._steps
    copied._joined.add(torch.randn(300, 6), torch.tensor([0] * 300))
    assert copied.result().num_samples > 300 - 1  # fed into the copy's own estimator
    assert callback.result.num_samples == 45
