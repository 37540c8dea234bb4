"""Runs that meet a fault of the calibration at each stage, and what their users leave on the disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from lightning_calibft import AbsentClassCalibration
from lightning_calibft.metrics import AverageLogitGap
from tests.helpers.runs import ABSENT, NUM_CLASSES, SEEN, TRAIN, VAL, Plain, loader, pretrained, trainer_of


class Fault:
    """Happens while it is armed, where it is asked to happen."""

    def __init__(self, action: Callable[[], Any]) -> None:
        self.action, self.armed, self.met = action, False, 0

    def happen(self) -> None:
        if self.armed:
            self.met += 1
            self.action()


class Arms(Callback):
    """Arms a fault in the second epoch of two, from one hook to another."""

    def __init__(self, fault: Fault, start: str, stop: str) -> None:
        self.fault, self.hooks = fault, {start: True, stop: False}

    def at(self, hook: str, trainer: Trainer) -> None:
        # When training has ended, the number of the epoch is one more.
        if hook in self.hooks and (trainer.current_epoch >= 1 and not trainer.sanity_checking):
            self.fault.armed = self.hooks[hook]

    def on_train_epoch_start(self, trainer, pl_module):
        self.at("train_epoch_start", trainer)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 1:
            self.at("second_batch", trainer)

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.at("train_batch_end", trainer)

    def on_validation_epoch_start(self, trainer, pl_module):
        self.at("validation_epoch_start", trainer)

    def on_validation_epoch_end(self, trainer, pl_module):
        self.at("validation_epoch_end", trainer)

    def on_train_epoch_end(self, trainer, pl_module):
        self.at("train_epoch_end", trainer)

    def on_train_end(self, trainer, pl_module):
        self.at("train_end", trainer)

    def on_fit_end(self, trainer, pl_module):
        self.at("fit_end", trainer)


class Faulty(Plain):
    """Has clean data for gamma, and writes a file in each of its own last hooks."""

    fault = Fault(lambda: None)
    folder = Path()
    clean = False

    def note(self, name: str) -> None:
        if self.trainer.is_global_zero:
            (self.folder / name).write_text("done")

    def on_fit_end(self):
        self.note("fit_end")

    def teardown(self, stage):
        self.note("teardown")


class FaultyLoader(Faulty):
    def calibration_dataloader(self):
        self.fault.happen()
        return DataLoader(TRAIN, 8)


class FaultyData(Faulty):
    """Reads clean data for gamma in a loader that fails."""

    def calibration_dataloader(self):
        return DataLoader(FailingDataset(self.fault), 8)


class FailingDataset(torch.utils.data.Dataset):
    def __init__(self, fault):
        self.fault = fault

    def __len__(self):
        return len(TRAIN)

    def __getitem__(self, index):
        if index in (28, 29):  # each of two processes reads one of them
            self.fault.happen()
        return TRAIN[index]


class FaultyTransfer(Faulty):
    def on_after_batch_transfer(self, batch, dataloader_idx):
        if not self.training:
            self.fault.happen()
        return batch


class FaultyForward(Faulty):
    def forward(self, x):
        if not self.training:
            self.fault.happen()
        return super().forward(x)


class FaultyLoading(Faulty):
    def on_load_checkpoint(self, checkpoint):
        self.fault.happen()


class FailingMetric(AverageLogitGap):
    """An estimator of the user."""

    fault = Fault(lambda: None)

    def update(self, preds, target):
        type(self).fault.happen()
        super().update(preds, target)


class FailingLogger(CSVLogger):
    """Cannot be reached any more."""

    fault = Fault(lambda: None)

    def log_metrics(self, metrics, step=None):
        type(self).fault.happen()
        super().log_metrics(metrics, step)


# The module, the arguments of the callback, and between which hooks the fault happens.
ALWAYS: dict[str, Any] = {}
STAGES = {
    "labels": (Faulty, {"unpack_batch": True}, ("second_batch", "train_batch_end")),
    "labels_of_validation": (Faulty, {"unpack_batch": True}, ("validation_epoch_start", "validation_epoch_end")),
    "labels_of_steps": (
        Faulty,
        {"unpack_batch": True, "source": "training_steps", "seen_classes": SEEN},
        ("second_batch", "train_batch_end"),
    ),
    "loader_before_validation": (
        FaultyLoader,
        {"refresh_on_validation": True},
        ("train_epoch_start", "validation_epoch_start"),
    ),
    "data_before_validation": (
        FaultyData,
        {"refresh_on_validation": True},
        ("train_epoch_start", "validation_epoch_start"),
    ),
    "loader_of_the_model": (FaultyLoader, ALWAYS, ("train_epoch_end", "fit_end")),
    "data_of_the_model": (FaultyData, ALWAYS, ("train_epoch_end", "fit_end")),
    "transfer_of_the_model": (FaultyTransfer, ALWAYS, ("train_epoch_end", "fit_end")),
    "forward_of_the_model": (FaultyForward, ALWAYS, ("train_epoch_end", "fit_end")),
    "estimator_of_the_model": (Faulty, {"estimator": FailingMetric}, ("train_epoch_end", "fit_end")),
    "loader_of_the_files": (FaultyLoader, ALWAYS, ("fit_end", "never")),
    "data_of_a_file": (FaultyData, ALWAYS, ("fit_end", "never")),
    "forward_of_a_file": (FaultyForward, ALWAYS, ("fit_end", "never")),
    "loading_of_a_file": (FaultyLoading, ALWAYS, ("fit_end", "never")),
    "report": (Faulty, ALWAYS, ("fit_end", "never")),
}


class Unpack:
    def __init__(self, fault: Fault) -> None:
        self.fault = fault

    def __call__(self, batch):
        self.fault.happen()
        return batch


def fit(folder: Path, stage: str, fault: Fault | None, **options: Any) -> tuple[Trainer, LightningModule, Any]:
    """Fit, with a callback that meets ``fault``, or, with ``None``, without any callback of ours."""
    make, arguments, hooks = STAGES[stage]
    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    module = pretrained(make)
    module.folder = folder
    callbacks: list[Any] = [
        ModelCheckpoint(folder, "{epoch}", monitor="val_loss", save_top_k=2),
        # These two save when training has ended, and not before.
        ModelCheckpoint(folder / "late", save_last=True, every_n_epochs=50),
    ]
    logger = CSVLogger(folder, "logs", version="0") if stage != "report" else FailingLogger(folder, "logs", version="0")
    calibration = None
    if fault is not None:
        arguments = dict(arguments)
        module.fault = FailingMetric.fault = FailingLogger.fault = fault
        if "unpack_batch" in arguments:
            arguments["unpack_batch"] = Unpack(fault)
        if "estimator" in arguments:
            arguments["estimator"] = FailingMetric(NUM_CLASSES, SEEN, ABSENT)
        calibration = AbsentClassCalibration(**arguments)
        callbacks += [calibration, Arms(fault, *hooks)]
    trainer = trainer_of(folder, *callbacks, **{"logger": logger, "log_every_n_steps": 2, **options})
    try:
        trainer.fit(module, loader(), loader(VAL, shuffle=False))
    finally:
        module.fault = FailingMetric.fault = FailingLogger.fault = Fault(lambda: None)
    return trainer, module, calibration


def left(folder: Path) -> set[str]:
    """The names of all files, without the hidden ones."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.name[0] != "."}
