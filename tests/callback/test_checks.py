"""Trainers that the callback refuses."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy

from lightning_calibft import AbsentClassCalibration, CalibrationDiagnostics
from tests.helpers.runs import (
    SEEN,
    Plain,
    loader,
    quiet,
    trainer_of,
)

pytestmark = quiet


@pytest.fixture
def group(monkeypatch):
    """What a strategy changes in this process is put back."""
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK", "WORLD_SIZE", "NODE_RANK"):
        monkeypatch.setenv(name, "0")
        monkeypatch.delenv(name)
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


class OnCPU(FSDPStrategy):
    """Lightning itself refuses the strategy without a GPU, but not a class made of it."""


class WithoutItsPackage(DeepSpeedStrategy):
    """As far as it goes without a GPU and the package of that name."""

    __init__ = DDPStrategy.__init__
    setup_environment = DDPStrategy.setup_environment
    setup_distributed = DDPStrategy.setup_distributed


@pytest.mark.parametrize("strategy", [OnCPU, WithoutItsPackage])
@pytest.mark.parametrize("callback", [AbsentClassCalibration, CalibrationDiagnostics])
def test_strategies_that_are_refused(tmp_path, group, strategy, callback):
    text = rf"{strategy.__name__} is not supported: .* Use DDP, .*ModelParallelStrategy.* call `lightning_calibft.calib"
    with pytest.raises(RuntimeError, match=text):
        trainer_of(tmp_path, callback(), strategy=strategy()).fit(Plain(), loader())


class Sharding(Plain):
    def configure_model(self):
        raise AssertionError("it must not come to this")


@pytest.mark.parametrize(
    ("arguments", "validation", "message"),
    [
        (
            {},
            True,
            r"`refresh_on_validation` to be True with ModelParallelStrategy.* got False.*`calibrate_checkpoints=False`",
        ),
        ({"refresh_on_validation": True}, False, "got True without validation data: .*`source='training_steps'`"),
        ({"estimator": "pseudo_absent"}, True, "`estimator` to use the fine-tuned model alone .* 'pseudo_absent'"),
        ({"estimator": "pcv"}, True, "`estimator` to use the fine-tuned model alone .* 'pcv'"),
    ],
)
def test_what_sharded_weights_do_not_go_with(tmp_path, group, arguments, validation, message):
    callback, checkpoint = AbsentClassCalibration(SEEN, **arguments), ModelCheckpoint(tmp_path)
    trainer = trainer_of(tmp_path, callback, checkpoint, strategy=ModelParallelStrategy())
    with pytest.raises(ValueError, match=message):
        trainer.fit(Sharding(), loader(), loader() if validation else None)
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize(
    ("arguments", "checkpoints"),
    [
        ({"calibrate_checkpoints": False}, [ModelCheckpoint()]),
        ({"source": "training_steps"}, [ModelCheckpoint()]),
        ({"refresh_on_validation": True}, [ModelCheckpoint()]),
        ({}, []),
    ],
)
def test_what_sharded_weights_go_with(tmp_path, group, arguments, checkpoints):
    callback = AbsentClassCalibration(SEEN, **arguments)
    trainer = trainer_of(tmp_path, callback, *checkpoints, strategy=ModelParallelStrategy())
    with pytest.raises(AssertionError, match="it must not come to this"):
        trainer.fit(Sharding(), loader(), loader())
