"""Gamma from validation data: from the samples of seen classes, or for an operating point from all."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import TensorDataset

from lightning_calibft import AbsentClassCalibration, get_gamma
from lightning_calibft.functional import best_gamma, split_accuracy
from tests.helpers.references import _reference_gap
from tests.helpers.runs import (
    ABSENT,
    NUM_CLASSES,
    SEEN,
    VAL,
    Plain,
    blobs,
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


def gap(logits, target):
    return _reference_gap(logits, target, SEEN, ABSENT)


def validation_gap(module, data=VAL):
    x, y = data.tensors
    return gap(raw_logits(module.state_dict(), x), y)


def test_validation_data(tmp_path):
    """Their samples of seen classes, and no word about the others."""
    module, callback = pretrained(), AbsentClassCalibration(source="validation")
    with no_warnings():
        trainer_of(tmp_path, callback).fit(module, loader(), loader(VAL, shuffle=False))
    gamma, error, count = validation_gap(module)
    result = callback.result
    assert (result.gamma, result.standard_error, result.num_samples) == pytest.approx((gamma, error, count), rel=1e-5)
    assert count == 24


@pytest.mark.parametrize("limit", [2, 1 / 3])
def test_a_part_of_the_validation_data(tmp_path, limit):
    module, callback = pretrained(), AbsentClassCalibration(source="validation")
    trainer_of(tmp_path, callback, limit_val_batches=limit).fit(module, loader(), loader(VAL, shuffle=False))
    part = TensorDataset(*(part[:16] for part in VAL.tensors))
    assert callback.result.gamma == pytest.approx(validation_gap(module, part)[0], rel=1e-5)
    assert callback.result.num_samples == validation_gap(module, part)[2]


def test_several_validation_loaders(tmp_path):
    module, callback, more = (
        pretrained(),
        AbsentClassCalibration(source="validation"),
        blobs([*SEEN, *ABSENT], each=3, seed=9),
    )
    loaders = [loader(VAL, shuffle=False), loader(more, shuffle=False)]
    trainer_of(tmp_path, callback).fit(module, loader(), loaders)
    both = TensorDataset(*map(torch.cat, zip(VAL.tensors, more.tensors, strict=True)))
    assert callback.result.gamma == pytest.approx(validation_gap(module, both)[0], rel=1e-5)


def test_no_validation_data(tmp_path):
    with pytest.raises(ValueError, match="`source` to be 'train' without validation, but got 'validation'"):
        trainer_of(tmp_path, AbsentClassCalibration(source="validation")).fit(pretrained(), loader())


def operating_point(**kwargs):
    return AbsentClassCalibration(estimator="operating_point", estimator_kwargs=kwargs or None, source="validation")


def test_an_operating_point_on_validation_data(tmp_path):
    """It looks at the absent classes as well, and at those of the files' own weights."""
    module, callback, (x, y) = pretrained(), operating_point(min_seen_accuracy=0.8), VAL.tensors
    checkpoints = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    trainer = trainer_of(tmp_path, callback, checkpoints)
    with no_warnings():
        trainer.fit(module, loader(), loader(VAL, shuffle=False))
    for state in (module.state_dict(), *(read(tmp_path / f"epoch={epoch}.ckpt")["state_dict"] for epoch in range(2))):
        logits = raw_logits(state, x)
        expected = best_gamma(logits, y, SEEN, ABSENT, min_seen_accuracy=0.8).item()
        assert split_state(state)[1] == pytest.approx(expected, rel=1e-5)
        assert split_accuracy(logits, y, SEEN, ABSENT, samples="seen").item() >= 0.8
    assert callback.result.num_samples == len(VAL)
    assert trainer.callback_metrics["val_acc_seen"] >= 0.8


def test_an_operating_point_on_calibration_data(tmp_path):
    class WithClean(Plain):
        def calibration_dataloader(self):
            return loader(VAL, shuffle=False)

    module, callback, (x, y) = pretrained(WithClean), AbsentClassCalibration(estimator="operating_point"), VAL.tensors
    trainer_of(tmp_path, callback).fit(module, loader())
    assert callback.result.gamma == pytest.approx(best_gamma(raw_logits(module.state_dict(), x), y, SEEN).item(), 1e-5)


def test_an_operating_point_without_labels_of_absent_classes(tmp_path):
    callback = AbsentClassCalibration(estimator="operating_point")
    with pytest.raises(ValueError, match=r"`source` to be 'validation' for the estimator 'operating_point', but got"):
        trainer_of(tmp_path, callback).fit(pretrained(), loader())
    module = pretrained()
    with pytest.raises(ValueError, match=r"to hold labeled samples of the absent classes, .* but got none"):
        trainer_of(tmp_path, operating_point()).fit(module, loader(), loader(blobs(SEEN, seed=7)))
    assert get_gamma(module) is None


def test_an_operating_point_that_no_gamma_reaches(tmp_path):
    module = pretrained()
    point = operating_point(min_seen_accuracy=1.0, min_absent_accuracy=1.0)
    with pytest.raises(ValueError, match="to be an accuracy that some gamma reaches"):
        trainer_of(tmp_path, point).fit(module, loader(), loader(VAL, shuffle=False))
    assert get_gamma(module) is None


def test_mixed_labels_do_not_tell_which_classes_are_seen(tmp_path):
    class Mixed(Plain):
        def calibration_dataloader(self):
            return loader(VAL, shuffle=False)

        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def soft(samples):
        x, y = torch.utils.data.default_collate(samples)
        return x, nn.functional.one_hot(y, NUM_CLASSES).float()

    callback = AbsentClassCalibration(estimator="operating_point")
    with pytest.raises(ValueError, match="`seen_classes` to name the classes of the training data"):
        trainer_of(tmp_path, callback).fit(pretrained(Mixed), loader(collate_fn=soft))
    callback = AbsentClassCalibration(SEEN, estimator="operating_point")
    trainer_of(tmp_path, callback).fit(pretrained(Mixed), loader(collate_fn=soft))
    assert callback.result.num_samples == len(VAL)
