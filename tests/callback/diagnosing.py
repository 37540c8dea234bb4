"""Runs with CalibrationDiagnostics, and its numbers by the definitions."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback

from lightning_calibft.analysis.history import Snapshot
from tests.helpers.analysis_references import _reference_levels, _reference_norms, _reference_similarity
from tests.helpers.references import _reference_at_gamma, _reference_ausuc, _reference_split_accuracy
from tests.helpers.runs import (
    ABSENT,
    SEEN,
    VAL,
    loader,
    pretrained,
    trainer_of,
)

HARD = torch.utils.data.TensorDataset(VAL.tensors[0] / 2, VAL.tensors[1])  # between the classes


def val(dataset=HARD, **kwargs):
    return loader(dataset, batch_size=7, shuffle=False, **kwargs)


class Keep(Callback):
    """Keeps the module as it was at each validation, and in the beginning."""

    def __init__(self):
        self.modules = {}

    def on_train_start(self, trainer, pl_module):
        self.modules[trainer.global_step] = self.copy(pl_module)

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            self.modules[trainer.global_step] = self.copy(pl_module)

    def copy(self, module):
        plain = pretrained()  # draws no random numbers
        plain.load_state_dict({k: v for k, v in module.state_dict().items() if "absent_class" not in k})
        return plain.eval()


def check_levels(found: Snapshot, logits, target):
    for group, samples in ((found.levels.seen, SEEN), (found.levels.absent, ABSENT)):
        numbers = (group.true, group.other_seen, group.other_absent, group.num_samples)
        assert numbers == pytest.approx(_reference_levels(logits, target, samples, SEEN, ABSENT), rel=1e-5)


def check_evaluation(found: Snapshot, logits, target):
    now = found.evaluation
    of_seen, of_absent, overall = _reference_at_gamma(logits, target, SEEN, ABSENT, 0.0)
    assert (now.groups.seen_among_all, now.groups.absent_among_all, now.overall) == pytest.approx(
        (of_seen, of_absent, overall)
    )
    assert now.groups.absent_among_absent == pytest.approx(_reference_split_accuracy(logits, target, ABSENT, ABSENT))
    assert now.ausuc == pytest.approx(_reference_ausuc(logits, target, SEEN, ABSENT))
    at_best = _reference_at_gamma(logits, target, SEEN, ABSENT, now.best_gamma)
    assert (now.best_seen, now.best_absent, now.best_overall) == pytest.approx(at_best)


def check_weights(found: Snapshot, first, now):
    assert (found.norms.seen_mean, found.norms.seen_std) == pytest.approx(_reference_norms(now, SEEN), rel=1e-6)
    assert (found.norms.absent_mean, found.norms.absent_std) == pytest.approx(_reference_norms(now, ABSENT), rel=1e-6)
    if found.updates is not None:
        updates = (found.updates.within_seen, found.updates.within_absent, found.updates.between)
        assert updates == pytest.approx(_reference_similarity(first, now, SEEN, ABSENT), abs=1e-6)


def fit(folder, *callbacks, module=None, data=None, train=None, **kwargs):
    module = pretrained() if module is None else module
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    trainer = trainer_of(folder, *callbacks, **kwargs)
    trainer.fit(module, loader() if train is None else train, val() if data is None else data)
    return trainer, module
