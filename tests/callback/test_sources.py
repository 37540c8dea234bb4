"""Gamma from the training steps themselves."""

from __future__ import annotations

import math

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, StochasticWeightAveraging, WeightAveraging
from torch import nn
from torch.utils.data import Dataset

from lightning_calibft import AbsentClassCalibration, get_gamma, inspect_checkpoint
from lightning_calibft.functional import split_accuracy
from lightning_calibft.metrics import AverageLogitGap
from tests.helpers.references import _reference_gap
from tests.helpers.runs import (
    ABSENT,
    NUM_CLASSES,
    SEEN,
    TRAIN,
    VAL,
    Plain,
    loader,
    pretrained,
    quiet,
    raw_logits,
    read,
    split_state,
    trainer_of,
)

pytestmark = quiet


class Watched(Plain):
    """Keeps what its own training steps saw."""

    def __init__(self):
        super().__init__(dropout=0.5)
        self.steps = []

    def training_step(self, batch, batch_idx):
        x, y = batch
        logits = self(x)
        self.steps.append((self.current_epoch, logits.detach().clone(), y.clone()))
        return nn.functional.cross_entropy(logits, y)

    def of_epoch(self, epoch, first=0):
        steps = [step for step in self.steps if step[0] == epoch][first:]
        return torch.cat([step[1] for step in steps]), torch.cat([step[2] for step in steps])


def gap(logits, target):
    return _reference_gap(logits, target, SEEN, ABSENT)


def steps(**kwargs):
    return AbsentClassCalibration(SEEN, source="training_steps", **kwargs)


class Counted(Dataset):
    """How many samples are read."""

    def __init__(self, data):
        self.data, self.read = data, 0

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        self.read += 1
        return self.data[index]


@pytest.mark.parametrize("weights_only", [False, True])
def test_training_steps(tmp_path, weights_only):
    """Model and files have the gamma of their own epoch's steps, dropout and all, and no sample is read again."""
    module, callback, data = pretrained(Watched), steps(), Counted(TRAIN)
    checkpoints = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_weights_only=weights_only)
    trainer_of(tmp_path, callback, checkpoints, max_epochs=3).fit(module, loader(data), loader(VAL, shuffle=False))
    assert data.read == 3 * len(TRAIN)
    gamma, error, count = gap(*module.of_epoch(2))
    result = callback.result
    assert (result.gamma, result.standard_error, result.num_samples) == pytest.approx((gamma, error, count), rel=1e-9)
    assert result.estimator == "alg"
    assert get_gamma(module) == pytest.approx(gamma, rel=1e-6)
    gammas = []
    for epoch in range(3):
        info = inspect_checkpoint(tmp_path / f"epoch={epoch}.ckpt")
        gammas.append(info["gamma"])
        gamma, error, count = gap(*module.of_epoch(epoch))
        assert info["gamma"] == pytest.approx(gamma, rel=1e-6)
        assert info["standard_error"] == pytest.approx(error, rel=1e-6)
        assert (info["num_samples"], info["absent_classes"]) == (count, ABSENT)
    assert len(set(gammas)) == 3


def test_validation_has_the_gamma_of_the_steps_before_it(tmp_path):
    module, met = pretrained(Watched), []

    class Logged(Callback):
        def on_validation_end(self, trainer, pl_module):
            met.append(
                (len(pl_module.steps), trainer.callback_metrics["val_acc_all"].item(), dict(module.state_dict()))
            )

    trainer = trainer_of(tmp_path, steps(), Logged(), max_epochs=1, val_check_interval=2, num_sanity_val_steps=0)
    trainer.fit(module, loader(), loader(VAL, shuffle=False))
    assert [number for number, *_ in met] == [2, 4, 6]
    x, y = VAL.tensors
    for number, accuracy, state in met[-1:]:  # the state dicts share the memory of the weights, which went on
        logits, target = (torch.cat([step[i] for step in module.steps[:number]]) for i in (1, 2))
        assert split_state(state)[1] == pytest.approx(gap(logits, target)[0], rel=1e-6)
        logits = raw_logits(state, x, make=Watched)
        logits[:, ABSENT] += gap(*(torch.cat([step[i] for step in module.steps[:number]]) for i in (1, 2)))[0]
        assert accuracy == pytest.approx(split_accuracy(logits, y, SEEN, ABSENT).item())


def test_files_from_before_the_first_gamma_are_calibrated_by_a_pass(tmp_path):
    module = pretrained(Watched)
    checkpoints = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=2)
    trainer_of(tmp_path, steps(), checkpoints, max_epochs=2).fit(module, loader())
    state = read(tmp_path / "step=2.ckpt")["state_dict"]
    x, y = TRAIN.tensors
    assert split_state(state)[1] == pytest.approx(gap(raw_logits(state, x, make=Watched), y)[0], rel=1e-5)
    # In the second epoch, until its end, files have the gamma of the first.
    for step in (8, 10):
        assert split_state(read(tmp_path / f"step={step}.ckpt")["state_dict"])[1] == pytest.approx(
            gap(*module.of_epoch(0))[0], rel=1e-6
        )


def test_training_goes_as_it_would_without(tmp_path):
    weights = []
    for callbacks in ((), (steps(),)):
        torch.manual_seed(3)
        module = pretrained(Watched)
        trainer_of(tmp_path, *callbacks).fit(module, loader(), loader(VAL, shuffle=False))
        state = module.state_dict()
        weights.append([state[key] for key in pretrained(Plain).state_dict()] + [torch.get_rng_state()])
    assert all(torch.equal(one, other) for one, other in zip(*weights, strict=True))


def test_labels_that_the_step_writes_over(tmp_path):
    class Overwriting(Watched):
        def training_step(self, batch, batch_idx):
            loss = super().training_step((batch[0], batch[1].clone()), batch_idx)
            batch[1].fill_(-100)
            return loss

    module, callback = pretrained(Overwriting), steps()
    trainer_of(tmp_path, callback, max_epochs=1).fit(module, loader())
    assert callback.result.gamma == pytest.approx(gap(*module.of_epoch(0))[0], rel=1e-9)


def test_an_estimator_and_its_arguments(tmp_path):
    module = pretrained(Watched)
    callback = steps(estimator="fixed", estimator_kwargs={"gamma": 2.5})
    trainer_of(tmp_path, callback, max_epochs=1).fit(module, loader())
    assert (callback.result.gamma, callback.result.num_samples) == (2.5, len(module.of_epoch(0)[1]))
    metric = AverageLogitGap(NUM_CLASSES, SEEN)
    callback = AbsentClassCalibration(estimator=metric, source="training_steps")
    trainer_of(tmp_path, callback, max_epochs=1).fit(module := pretrained(Watched), loader())
    assert callback.result.gamma == pytest.approx(gap(*module.of_epoch(0))[0], rel=1e-9)


def test_a_told_share(tmp_path):
    module, callback = pretrained(Watched), steps(absent_share=0.1)
    trainer_of(tmp_path, callback, max_epochs=1).fit(module, loader())
    shift = math.log(0.1 / len(ABSENT)) - math.log(0.9 / len(SEEN))
    assert callback.result.gamma == pytest.approx(gap(*module.of_epoch(0))[0] + shift, rel=1e-9)
    assert callback.result.absent_share == 0.1


def test_a_share_reaches_pseudo_cross_validation():
    assert AbsentClassCalibration(estimator="pcv", absent_share=0.1)._search.retraining.plan.absent_share == 0.1


def test_a_resumed_fit_with_nothing_left_to_do(tmp_path):
    first = pretrained(Watched)
    trainer = trainer_of(tmp_path, steps(), ModelCheckpoint(tmp_path, save_last=True), max_epochs=1)
    trainer.fit(first, loader())
    module, callback = pretrained(Watched), steps()
    trainer_of(tmp_path, callback, max_epochs=1).fit(module, loader(), ckpt_path=tmp_path / "last.ckpt")
    x, y = TRAIN.tensors
    assert callback.result.gamma == pytest.approx(gap(raw_logits(module.state_dict(), x, make=Watched), y)[0], rel=1e-5)


def test_a_step_that_runs_the_model_twice(tmp_path):
    class Twice(Plain):
        def training_step(self, batch, batch_idx):
            return self.loss(batch) + self.loss(batch)

    with pytest.raises(ValueError, match=r"`source` to be 'train' .* 8 labels, but got \[\(8, 6\), \(8, 6\)\]"):
        trainer_of(tmp_path, steps()).fit(pretrained(Twice), loader())


def test_steps_that_diverge(tmp_path):
    """Training goes on; what is found at the end is no number."""

    class Diverged(Plain):
        def forward(self, x):
            return super().forward(x) * (torch.nan if self.training else 1.0)

    module, callback = pretrained(Diverged), steps()
    with pytest.raises(ValueError, match="'alg' to find a finite gamma, but got nan from 45 samples"):
        trainer_of(tmp_path, callback).fit(module, loader(), loader(VAL, shuffle=False))
    assert get_gamma(module) is None


@pytest.mark.parametrize("averaging", [WeightAveraging, lambda: StochasticWeightAveraging(0.01)])
def test_averaged_weights_are_in_no_step(tmp_path, averaging):
    with pytest.raises(RuntimeError, match=r"`source='training_steps'` is not supported with .*WeightAveraging"):
        trainer_of(tmp_path, steps(), averaging()).fit(pretrained(), loader())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"source": "steps"}, "`source` to be one of 'auto', 'train', 'validation', 'training_steps', but got 'steps'"),
        ({"source": "training_steps"}, "`seen_classes` to be given with `source='training_steps'`, but got None"),
        (
            {"source": "training_steps", "estimator": "pseudo_absent", "seen_classes": SEEN},
            "for the estimator 'pseudo_absent', but got 'training_steps'",
        ),
        ({"estimator": "fixed", "estimator_kwargs": {"g": 0.5}}, "to hold 'gamma' for .*, but got 'g'"),
        ({"estimator_kwargs": {"gamma": 0.5}}, "`estimator_kwargs` to hold nothing for the estimator 'alg'"),
        ({"absent_share": 1.5}, "`absent_share` to be None or a number in .0, 1., but got 1.5"),
        (
            {"estimator": "fixed", "estimator_kwargs": {"gamma": 1.0}, "absent_share": 0.5},
            "which does not depend on it",
        ),
        ({"estimator": "fixed"}, "`estimator_kwargs` to hold 'gamma' for the estimator 'fixed', but got {}"),
        ({"estimator": "fixed", "estimator_kwargs": {"gamma": float("inf")}}, "`gamma` to be finite, but got inf"),
        (
            {"estimator": AverageLogitGap(6, [0, 1]), "estimator_kwargs": {"gamma": 2}},
            "`estimator_kwargs` to be None with an `estimator` that is a metric",
        ),
    ],
)
def test_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        AbsentClassCalibration(**arguments)
