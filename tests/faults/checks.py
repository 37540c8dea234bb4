"""A run that meets a fault in its calibration pass, and what must hold of it afterwards."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from torch.utils.data import DataLoader, Dataset

from lightning_calibft import attach, get_gamma, inspect_checkpoint
from lightning_calibft.head.offset import attached_heads, offset_of
from tests.helpers.runs import (
    ABSENT,
    SEEN,
    TRAIN,
    VAL,
    Plain,
    assert_calibrated,
    pretrained,
    raw_logits,
    read,
    split_state,
)

AT = 29  # the sample that has the fault: in the fourth batch of eight, and of two processes the second reads it


class Armed(Dataset):
    """The training data, with a fault at one sample from the moment that it is armed."""

    def __init__(self, fault=lambda: None) -> None:
        self.fault = fault
        self.armed = False

    def __len__(self):
        return len(TRAIN)

    def __getitem__(self, index):
        x, y = TRAIN[index]
        if self.armed and index == AT and (spoiled := self.fault()) is not None:
            x = spoiled
        return x, y


class Arms(Callback):
    """Arms the data before the pass for a validation or for the model, or after it, before those for the files."""

    def __init__(self, data: Armed, place: str) -> None:
        self.data = data
        self.place = place

    def on_train_epoch_start(self, trainer, pl_module):
        self.data.armed = self.place == "validation" and trainer.current_epoch == 1

    def on_train_epoch_end(self, trainer, pl_module):
        self.data.armed = self.place == "model" and trainer.current_epoch == trainer.max_epochs - 1

    def on_fit_end(self, trainer, pl_module):
        self.data.armed = self.place == "file"


class Faulty(Plain):
    """Reads what has the fault in the calibration pass alone."""

    def calibration_dataloader(self):
        return self.loader


def faulty(data: Dataset, batch_size: int = 8, num_workers: int = 0) -> LightningModule:
    """A module with a part that is frozen in eval mode, and with data of its own for the pass."""
    module = pretrained(Faulty)
    module.body[1].eval()
    module.loader = DataLoader(data, batch_size, num_workers=num_workers)
    return module


def assert_whole(file: Path) -> bool:
    """A file loads strictly and is calibrated with the gamma of its own weights, or not at all; return which."""
    checkpoint = read(file)
    state, gamma, absent = split_state(checkpoint["state_dict"])
    Plain().load_state_dict(state, strict=True)
    told = checkpoint.get("lightning_calibft")
    assert inspect_checkpoint(file)["calibrated"] is (told is not None)
    if told is None:
        assert (gamma, absent) == (0.0, [])
        return False
    assert gamma == pytest.approx(told["gamma"], rel=1e-6)
    assert (told["seen_classes"], told["absent_classes"]) == (SEEN, ABSENT)
    assert_calibrated(checkpoint["state_dict"])
    return True


def calibrated(folder: Path) -> dict[str, bool]:
    """Which of the files of a run are calibrated; nothing else is in the folder."""
    return {file.name: assert_whole(file) for file in sorted(folder.iterdir())}


def assert_sound(module: LightningModule, is_calibrated: bool) -> None:
    """The live model is calibrated or untouched; no mode is changed, nothing listens to it any more."""
    frozen = module.get_submodule("body.1")
    assert all(part.training for part in module.modules() if part is not frozen)
    assert not frozen.training
    for name, part in attach(pretrained()).named_modules():
        own = module.get_submodule(name)
        assert len(own._forward_hooks) == len(part._forward_hooks)
        assert len(own._forward_pre_hooks) == len(part._forward_pre_hooks)
    assert not any(offset_of(head).recording for head in attached_heads(module).values())
    state, x = module.state_dict(), VAL.tensors[0]
    expected = raw_logits(state, x)
    if is_calibrated:
        assert get_gamma(module) == pytest.approx(assert_calibrated(state), rel=1e-6)
        expected[:, ABSENT] += get_gamma(module)
    else:
        assert get_gamma(module) is None
        assert split_state(state)[1:] == (0.0, [])
    with torch.no_grad():
        torch.testing.assert_close(module.eval()(x), expected)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@contextmanager
def interruptible() -> Iterator[None]:
    """Let SIGINT interrupt, also where the suite runs in the background of a shell and it is ignored."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
