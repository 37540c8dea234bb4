"""Which data gamma is found on with ``source="auto"``, and what is told of samples that were learned by heart."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from lightning_calibft import AbsentClassCalibration, calibrate
from lightning_calibft.estimators import PseudoAbsent
from lightning_calibft.functional import pseudo_absent_gamma
from tests.helpers.runs import (
    ABSENT,
    NUM_CLASSES,
    SEEN,
    TRAIN,
    Plain,
    Stream,
    Unlisted,
    blobs,
    loader,
    no_warnings,
    pretrained,
    quiet,
    raw_logits,
    trainer_of,
)

pytestmark = quiet

HELD_OUT = blobs([*SEEN, *ABSENT], each=20, seed=7)  # 60 samples of seen classes
WARNING = "'pseudo_absent' finds gamma on the training data, since {}.*by heart"
FEW = r"the validation data has {} samples of seen classes"


def gamma_on(data, module, before):
    """That of the samples of seen classes alone."""
    x, y = data.tensors
    first = Plain()
    first.load_state_dict(before)
    with torch.no_grad():
        after, first = raw_logits(module.state_dict(), x), first.eval()(x)
    seen = torch.isin(y, torch.tensor(SEEN))
    return pseudo_absent_gamma(after[seen], y[seen], first[seen], SEEN).gamma.item()


def fitted(folder, callback, data=TRAIN, val=HELD_OUT, make=Plain, **kwargs):
    module = pretrained(make)
    before = copy.deepcopy(module.state_dict())
    val = (
        None if val is None else val if isinstance(val, (list, torch.utils.data.DataLoader)) else loader(val, 8, False)
    )
    trainer_of(folder, callback, **kwargs).fit(module, loader(data), val)
    return module, before


def pseudo(**kwargs):
    return AbsentClassCalibration(estimator="pseudo_absent", **kwargs)


@pytest.mark.parametrize("wrap", [lambda data: data, Unlisted, Stream])
def test_validation_data_for_an_estimator_that_looks_at_margins(tmp_path, wrap):
    """Of the seen classes only, whether or not the dataset lists its labels."""
    callback = pseudo()
    with no_warnings():
        module, before = fitted(tmp_path, callback, val=wrap(HELD_OUT))
    assert callback.result.num_samples == 60
    assert callback.result.gamma == pytest.approx(gamma_on(HELD_OUT, module, before), rel=1e-5)


def test_training_data_for_others(tmp_path):
    callback = AbsentClassCalibration()
    with no_warnings():
        fitted(tmp_path, callback)
    assert callback.result.num_samples == len(TRAIN)


def test_training_data_on_request(tmp_path):
    callback = pseudo(source="train")
    with no_warnings():
        module, before = fitted(tmp_path, callback)
    assert callback.result.gamma == pytest.approx(gamma_on(TRAIN, module, before), rel=1e-5)


@pytest.mark.parametrize(
    ("val", "reason", "kwargs"),
    [
        (None, "there is no validation data", {}),
        (blobs(ABSENT, each=60, seed=7), FEW.format(0), {}),
        (blobs([*SEEN, *ABSENT], each=16, seed=7), FEW.format(48), {}),
        (
            HELD_OUT,
            FEW.format(int(torch.isin(HELD_OUT.tensors[1][:16], torch.tensor(SEEN)).sum())),
            {"limit_val_batches": 2},
        ),
        (HELD_OUT, "there is no validation data", {"limit_val_batches": 0}),
    ],
)
def test_too_few_held_out_samples_are_told_before_training(tmp_path, val, reason, kwargs):
    class Refuses(Plain):
        def training_step(self, batch, batch_idx):
            raise RuntimeError("training begins")

    with pytest.warns(UserWarning, match=WARNING.format(reason)), pytest.raises(RuntimeError, match="training begins"):
        fitted(tmp_path, pseudo(), val=val, make=Refuses, **kwargs)
    callback = pseudo()
    with pytest.warns(UserWarning, match=WARNING.format(reason)) as told:
        module, before = fitted(tmp_path, callback, val=val, **kwargs)
    assert sum("by heart" in str(warning.message) for warning in told) == 1
    assert callback.result.gamma == pytest.approx(gamma_on(TRAIN, module, before), rel=1e-5)


def test_too_few_samples_in_a_dataset_that_does_not_list_them(tmp_path):
    callback = pseudo()
    data = Unlisted(blobs([SEEN[0], *(6 * ABSENT)], each=3, seed=7))
    with pytest.warns(UserWarning, match=WARNING.format(FEW.format(3))):
        module, before = fitted(tmp_path, callback, val=data)
    assert callback.result.gamma == pytest.approx(gamma_on(TRAIN, module, before), rel=1e-5)


def test_validation_data_that_cannot_be_used(tmp_path):
    """Nobody has asked for it, so the fit does not fail."""

    class TwoTargets(Plain):
        def validation_step(self, batch, batch_idx):
            pass

    x, y = HELD_OUT.tensors
    callback = pseudo()
    with pytest.warns(UserWarning, match="since the validation data cannot be used: .*"):
        module, before = fitted(tmp_path, callback, val=TensorDataset(x, y.double() / 2), make=TwoTargets)
    assert callback.result.gamma == pytest.approx(gamma_on(TRAIN, module, before), rel=1e-5)


def test_calibration_data_comes_first(tmp_path):
    held_out = blobs(SEEN, each=5, seed=9)

    class WithClean(Plain):
        def calibration_dataloader(self):
            return loader(held_out, shuffle=False)

    callback = pseudo()
    with no_warnings():
        module, before = fitted(tmp_path, callback, make=WithClean)
    assert callback.result.gamma == pytest.approx(gamma_on(held_out, module, before), rel=1e-5)


def test_few_samples_because_few_are_asked_for(tmp_path):
    callback = pseudo(max_samples=40)
    with no_warnings():
        fitted(tmp_path, callback)
    assert callback.result.num_samples < 40


def test_classes_that_only_the_calibration_pass_shows(tmp_path):
    """Labels are mixed from the second step on: the seen classes are those that a pass over the training data finds."""

    class Mixes(Plain):
        batches = 0

        def on_after_batch_transfer(self, batch, dataloader_idx):
            x, y = batch
            self.batches += self.trainer.training
            mixes = self.trainer.training and self.batches > 1
            return (x, nn.functional.one_hot(y, NUM_CLASSES) * 0.9 + 0.02) if mixes else batch

    callback = pseudo()
    module, before = fitted(tmp_path, callback, data=Unlisted(TRAIN), make=Mixes)
    assert list(callback.result.split.seen_classes) == SEEN
    assert callback.result.gamma == pytest.approx(gamma_on(TRAIN, module, before), rel=1e-5)


def test_an_operating_point(tmp_path):
    callback = AbsentClassCalibration(estimator="operating_point")
    with no_warnings():
        fitted(tmp_path, callback)
    assert callback.result.num_samples == len(HELD_OUT)


def test_a_metric_that_says_so(tmp_path):
    callback = AbsentClassCalibration(estimator=PseudoAbsent(NUM_CLASSES, SEEN))
    fitted(tmp_path, callback)
    assert callback.result.num_samples == 60


def learned_by_heart():
    """Random labels that a wide network can only memorize."""
    generator = torch.Generator().manual_seed(5)
    x, _ = blobs(SEEN, each=4, seed=3).tensors
    return TensorDataset(x, torch.tensor(SEEN * 4)[torch.randperm(12, generator=generator)])


class Wide(Plain):
    def build(self, dropout):
        self.body = nn.Sequential(nn.Linear(5, 512), nn.ReLU())
        self.fc = nn.Linear(512, NUM_CLASSES)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


@pytest.mark.parametrize(("source", "told"), [("train", True), ("validation", False)])
def test_a_model_that_has_learned_its_data_by_heart_is_told(tmp_path, caplog, source, told):
    caplog.set_level(logging.INFO, logger="lightning.pytorch")
    callback, module, data = pseudo(source=source), Wide(), learned_by_heart()
    trainer_of(tmp_path, callback, max_epochs=100).fit(module, loader(data), loader(HELD_OUT, shuffle=False))
    if told:
        assert callback.result.seen_accuracy == 1
    (text,) = [message for message in caplog.messages if "Absent-class calibration" in message]
    val, target = HELD_OUT.tensors
    seen = torch.isin(target, torch.tensor(SEEN))
    with torch.no_grad():
        logits = module.eval().body(val[seen]) @ module.fc.weight.T + module.fc.bias
    right = (torch.tensor(SEEN)[logits[:, SEEN].argmax(1)] == target[seen]).float().mean().item()
    assert right < 0.9
    sentence = f"100.0% of the samples behind gamma are right, but {right:.1%} in validation: the model has learned"
    assert (sentence in text) == told


def test_features_of_a_frozen_backbone_need_the_head_alone(tmp_path):
    """The head of a LightningModule, and a bare one, give the gamma of the whole model."""
    module, _ = fitted(tmp_path, AbsentClassCalibration(SEEN))
    x, y = HELD_OUT.tensors
    keep = torch.isin(y, torch.tensor(SEEN))
    x, y = x[keep], y[keep]
    whole, frozen = copy.deepcopy(module), copy.deepcopy(module)
    first = Plain()
    first.load_state_dict({key: value for key, value in module.state_dict().items() if "absent_class" not in key})
    with torch.no_grad():
        first.fc.weight.add_(0.1 * torch.randn_like(first.fc.weight))
        features = frozen.eval().body(x)
    options = {"estimator": "pseudo_absent", "progress": False}
    expected = calibrate(whole, [(x, y)], SEEN, pretrained=first, **options).gamma
    bare = nn.Linear(16, NUM_CLASSES)
    bare.load_state_dict({key: getattr(module.fc, key).detach() for key in ("weight", "bias")})
    for head in (module.fc, bare):
        result = calibrate(head, [(features, y)], SEEN, pretrained=first.fc, **options)
        assert result.gamma == pytest.approx(expected, rel=1e-6)
        assert calibrate(head, [(features, y)], SEEN, progress=False).gamma != pytest.approx(expected, rel=1e-3)
    assert module.fc.absent_class_calibration.offset.item() != 0
