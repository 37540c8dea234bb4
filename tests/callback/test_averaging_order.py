"""Where weight averaging would miss gamma: the order of the callbacks, and heads that are built late."""

from __future__ import annotations

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging, WeightAveraging
from torch import nn

from lightning_calibft import AbsentClassCalibration
from lightning_calibft.head.offset import attached_heads
from tests.callback.averaging import BuiltInConfigureModel, BuiltInSetup, WithoutBatchNorm, copies, marks, stochastic
from tests.helpers.runs import OFFSET, SEEN, VAL, Plain, assert_calibrated, loader, pretrained, read, trainer_of

pytestmark = marks


@stochastic
def test_stochastic_averaging_without_batch_norm_and_with_a_late_head(tmp_path):
    for name, make in (("early", WithoutBatchNorm), ("late", BuiltInConfigureModel)):
        module, swa = make(), StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=2)
        checkpoint = ModelCheckpoint(tmp_path / name, save_top_k=-1)
        trainer_of(tmp_path, AbsentClassCalibration(head="fc"), swa, checkpoint, max_epochs=4).fit(module, loader())
        assert_calibrated(module.state_dict(), make=make)
        assert_calibrated(read(checkpoint.best_model_path)["state_dict"], make=make)


@copies
def test_the_wrong_order_is_an_error(tmp_path, make):
    module, averages = Plain(), make()
    trainer = trainer_of(tmp_path, averages, AbsentClassCalibration())
    remedy = rf"{type(averages).__name__} comes before AbsentClassCalibration .* Put AbsentClassCalibration first"
    with pytest.raises(RuntimeError, match=remedy):
        trainer.fit(module, loader())
    assert not attached_heads(module)
    assert trainer.global_step == 0


def test_the_order_matters_for_fitting_only(tmp_path):
    trainer = trainer_of(tmp_path, WeightAveraging(), AbsentClassCalibration(SEEN))
    trainer.test(pretrained(), loader(VAL, shuffle=False), verbose=False)
    assert "test_ausuc" in trainer.callback_metrics


@pytest.mark.parametrize("head", [None, "fc"])
@pytest.mark.parametrize(("make", "lacks"), [(BuiltInSetup, "fc.weight"), (BuiltInConfigureModel, f"fc.{OFFSET}")])
def test_a_late_head_is_an_error(tmp_path, make, lacks, head):
    module = make()
    if head is None:  # no other linear layer that could be the head
        del module.body
        module.body = nn.ReLU()
        module.forward = None
    callbacks = (AbsentClassCalibration(SEEN, head=head), WeightAveraging())
    trainer = trainer_of(tmp_path, *callbacks)
    with pytest.raises(
        RuntimeError, match=rf"copied the model before .*{lacks}.* existed. Build the .* in .*`__init__`"
    ):
        trainer.fit(module, loader())
    assert trainer.global_step == 0


def test_a_late_head_is_no_error_without_fitting(tmp_path):
    trainer = trainer_of(tmp_path, AbsentClassCalibration(SEEN, head="fc"), WeightAveraging())
    trainer.test(BuiltInSetup(), loader(VAL, shuffle=False), verbose=False)
    assert "test_ausuc" in trainer.callback_metrics
