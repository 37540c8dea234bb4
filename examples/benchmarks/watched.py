"""Fine-tune under ``CalibrationDiagnostics``: the weights are those of the benchmark's own fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from methods import Classifier, Setting
from torch.utils.data import DataLoader

from lightning_calibft import CalibrationDiagnostics


class Validated(Classifier):
    """The classifier, which looks at test images of all classes: to draw what happens, not to choose anything by."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Run the model; the callback listens."""
        self(batch[0])


@dataclass(frozen=True)
class Watched:
    """A fine-tuned model, and what was measured on its way."""

    module: Validated
    diagnostics: CalibrationDiagnostics


def watch(setting: Setting, report: Path) -> Watched:
    """Fine-tune once, write the report, and return the model in eval mode with its diagnostics."""
    module = Validated(setting.pretrained(), setting.optimizer, setting.learning_rate)
    diagnostics = CalibrationDiagnostics(setting.seen, output=str(report.resolve()))
    trainer = pl.Trainer(
        max_epochs=setting.epochs,
        accelerator=setting.accelerator,
        devices=1,
        barebones=True,
        callbacks=[diagnostics],
    )
    # With a generator of its own the loader leaves the order of the training batches as it is without it.
    test = DataLoader(setting.data.target_test, 256, generator=torch.Generator())
    trainer.validate(module, test, verbose=False)
    torch.manual_seed(setting.seed)
    trainer.fit(module, DataLoader(setting.seen_data, 32, shuffle=True), test)
    return Watched(module.eval(), diagnostics)
