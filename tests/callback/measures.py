"""An independent measurement of what the callback logs."""

from __future__ import annotations

import torch
from torch.utils.data import TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from tests.helpers.references import _reference_ausuc
from tests.helpers.runs import (
    ABSENT,
    NUM_CLASSES,
    SEEN,
    VAL,
    Plain,
    loader,
)

# Between the classes, so that gamma decides.
HARD = TensorDataset(VAL.tensors[0] / 2, VAL.tensors[1])


class Measures(Plain):
    """Measures for itself, with torchmetrics on its own logits; the last evaluation stands."""

    def start(self):
        self.parts = {}

    on_validation_epoch_start = on_test_epoch_start = start

    def step(self, batch, dataloader_idx=0):
        logits = self(batch[0])
        self.parts.setdefault(dataloader_idx, []).append((logits.clone(), batch[1].clone()))

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.step(batch, dataloader_idx)

    def test_step(self, batch, batch_idx, dataloader_idx=0):
        self.step(batch, dataloader_idx)

    def expected(self, prefix, index=0, suffix=""):
        logits, target = (torch.cat(part) for part in zip(*self.parts[index], strict=True))
        return {f"{prefix}_{name}{suffix}": value for name, value in measured(logits, target).items()}


def accuracy(logits, target, classes):
    chosen = torch.isin(target, torch.tensor(classes))
    return MulticlassAccuracy(NUM_CLASSES, average="micro")(logits[chosen], target[chosen]).item()


def measured(logits, target):
    """The logged numbers, by torchmetrics and by the definition of the area."""
    seen, absent = accuracy(logits, target, SEEN), accuracy(logits, target, ABSENT)
    return {
        "acc_all": MulticlassAccuracy(NUM_CLASSES, average="micro")(logits, target).item(),
        "acc_seen": seen,
        "acc_absent": absent,
        "acc_harmonic": 2 * seen * absent / (seen + absent) if seen + absent else 0.0,
        "ausuc": _reference_ausuc(logits, target, SEEN, ABSENT),
    }


def logged(trainer, prefix):
    return {name: value.item() for name, value in trainer.callback_metrics.items() if name.startswith(f"{prefix}_")}


def val_loader():
    return loader(HARD, batch_size=7, shuffle=False)
