"""A module that tells of every fit, and what pseudo cross-validation should make of it."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import torch

from lightning_calibft import AbsentClassCalibration
from lightning_calibft.functional import best_gamma, split_accuracy
from tests.helpers.runs import (
    Plain,
    blobs,
    build,
    pretrained_weights,
)

SEEN, ABSENT = [0, 2, 3, 4], [1, 5]
DATA = blobs(SEEN, each=12)
ROOT = Path(__file__).parents[2]


class Watched(Plain):
    """Tells of every fit: its Trainer's settings, its first weights, its labels; those of copies too."""

    fits: ClassVar[list[dict]] = []

    def on_train_start(self):
        trainer = self.trainer
        type(self).fits.append(
            {
                "max_epochs": trainer.max_epochs,
                "max_steps": trainer.max_steps,
                "accumulate": trainer.accumulate_grad_batches,
                "clip": (trainer.gradient_clip_val, trainer.gradient_clip_algorithm),
                "limit": trainer.limit_train_batches,
                "precision": trainer.precision,
                "folder": trainer.default_root_dir,
                "callbacks": [type(callback).__name__ for callback in trainer.callbacks],
                "validates": trainer.limit_val_batches,
                "weights": {key: value.clone() for key, value in self.state_dict().items()},
                "labels": set(),
                "batches": 0,
                "steps": 0,
            }
        )

    def on_train_batch_start(self, batch, batch_idx):
        fit = type(self).fits[-1]
        fit["batches"] += 1
        fit["labels"] |= set(batch[1].tolist())

    def on_train_end(self):
        self.logger and self.logger.experiment  # noqa: B018  as modules do
        fit = type(self).fits[-1]
        fit["steps"] = self.trainer.global_step
        fit["after"] = {key: value.clone() for key, value in self.state_dict().items()}


def pcv(**kwargs):
    return AbsentClassCalibration(estimator="pcv", estimator_kwargs=kwargs)


def weights(state):
    return {key: value for key, value in state.items() if "absent_class" not in key}


def raw(state, x):
    module = build()
    module.load_state_dict(weights(state))
    module.eval()
    with torch.no_grad():
        return module(x)


def _reference(fits, candidates="seen", data=DATA):
    """Gamma of each nested fit from the weights it ended with."""
    x, y = data.tensors
    gammas = []
    for fit in fits:
        kept = sorted(fit["labels"])
        left_out = [c for c in SEEN if c not in kept] + (ABSENT if candidates == "all" else [])
        least = split_accuracy(raw(pretrained_weights(), x), y, kept, left_out, samples="absent").item()
        try:
            gammas.append(best_gamma(raw(fit["after"], x), y, kept, left_out, min_absent_accuracy=least).item())
        except ValueError:
            gammas.append(None)
    return gammas
