"""Going on from a checkpoint, and testing one."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import (
    DataLoader,
)

from lightning_calibft import AbsentClassCalibration
from tests.helpers.runs import (
    ABSENT,
    NUM_CLASSES,
    OFFSET,
    SEEN,
    VAL,
    assert_calibrated,
    blobs,
    loader,
    pretrained,
    quiet,
    raw_logits,
    read,
    split_state,
    trainer_of,
)

pytestmark = quiet


@pytest.mark.parametrize("kind", ["with", "without", "weights_only"])
def test_resume(kind, tmp_path):
    checkpoints = ModelCheckpoint(tmp_path, save_last=True, save_weights_only=kind == "weights_only")
    callbacks = [] if kind == "without" else [AbsentClassCalibration()]
    trainer_of(tmp_path, *callbacks, checkpoints).fit(pretrained(), loader())
    has_gamma = f"fc.{OFFSET}" in read(checkpoints.last_model_path)["state_dict"]
    assert has_gamma == (kind != "without")

    module = pretrained()
    callback = AbsentClassCalibration()
    trainer = trainer_of(tmp_path, callback, max_epochs=3)
    if kind == "weights_only":
        weights = read(checkpoints.last_model_path)["state_dict"]
        module.load_state_dict(split_state(weights)[0], strict=True)
        trainer.fit(module, loader())
    else:
        trainer.fit(module, loader(), ckpt_path=checkpoints.last_model_path)
        assert trainer.global_step == 18
    assert_calibrated(module.state_dict())
    assert module.strict_loading


def test_labels_of_the_resumed_run_count(tmp_path):
    """The second half of the training meets two classes only."""
    checkpoints = ModelCheckpoint(tmp_path, save_last=True)
    trainer_of(tmp_path, AbsentClassCalibration(), checkpoints).fit(pretrained(), loader())
    module, callback = pretrained(), AbsentClassCalibration()
    half = blobs(SEEN[:2], seed=5)
    trainer_of(tmp_path, callback, max_epochs=3).fit(module, loader(half), ckpt_path=checkpoints.last_model_path)
    assert list(callback.result.split.seen_classes) == SEEN
    assert_calibrated(module.state_dict(), half)


def test_best_is_tested_calibrated(tmp_path):
    callback = AbsentClassCalibration()
    checkpoints = ModelCheckpoint(tmp_path, monitor="val_loss")
    trainer, module = trainer_of(tmp_path, callback, checkpoints), pretrained()
    trainer.fit(module, loader(), loader(VAL, shuffle=False))
    best = read(checkpoints.best_model_path)["state_dict"]
    gamma = split_state(best)[1]
    assert gamma != pytest.approx(callback.result.gamma, rel=1e-3)
    raw = raw_logits(best, VAL.tensors[0])
    shifted = raw + gamma * torch.isin(torch.arange(NUM_CLASSES), torch.tensor(ABSENT))
    expected = torch.nn.functional.cross_entropy(shifted, VAL.tensors[1]).item()
    uncalibrated = torch.nn.functional.cross_entropy(raw, VAL.tensors[1]).item()
    assert abs(expected - uncalibrated) > 1e-3

    def loss(trainer, module, path="best"):
        return trainer.test(module, loader(VAL, shuffle=False), ckpt_path=path, verbose=False)[0]["test_loss"]

    assert loss(trainer, module) == pytest.approx(expected, rel=1e-5)
    fresh = trainer_of(tmp_path, AbsentClassCalibration())
    assert loss(fresh, pretrained(), checkpoints.best_model_path) == pytest.approx(expected, rel=1e-5)
    predicts = trainer_of(tmp_path, AbsentClassCalibration())
    predictions = predicts.predict(pretrained(), DataLoader(VAL.tensors[0], 16), ckpt_path=checkpoints.best_model_path)
    torch.testing.assert_close(torch.cat(predictions), shifted)


def test_a_trainer_that_goes_on(tmp_path):
    checkpoints = ModelCheckpoint(tmp_path, save_top_k=-1)
    callback, module = AbsentClassCalibration(), pretrained()
    trainer = trainer_of(tmp_path, callback, checkpoints)
    trainer.fit(module, loader())
    first = {path: path.read_bytes() for path in tmp_path.glob("*.ckpt")}
    trainer.fit_loop.max_epochs = 3
    trainer.fit(module, loader())
    assert trainer.global_step == 18
    assert_calibrated(module.state_dict())
    files = list(tmp_path.glob("*.ckpt"))
    assert len(files) == 3
    assert all(path.read_bytes() == content for path, content in first.items())
    for path in files:
        assert_calibrated(read(path)["state_dict"])
