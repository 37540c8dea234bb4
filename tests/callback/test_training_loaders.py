"""Whatever loader it is, the Trainer's own epochs go on as they would without the callback."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, Sampler

from lightning_calibft import AbsentClassCalibration
from tests.callback.test_training_untouched import Dropout, seed
from tests.helpers.runs import TRAIN, assert_same, pretrained, quiet, trainer_of

# The classes that a stream or a sampler of its own will draw are not known before the first epoch has ended.
pytestmark = [quiet, pytest.mark.filterwarnings("ignore:AbsentClassCalibration cannot read from the dataset")]


class Drawn(Sampler):
    """Draws from random numbers of its own."""

    def __init__(self, number):
        self.number, self.generator = number, torch.Generator().manual_seed(5)

    def __iter__(self):
        return iter(torch.randperm(self.number, generator=self.generator).tolist())

    def __len__(self):
        return self.number


class DrawnBatches(Drawn):
    def __iter__(self):
        return iter(torch.randperm(self.number, generator=self.generator).view(-1, 5).tolist())

    def __len__(self):
        return self.number // 5


class OwnLoader(DataLoader):
    """What the callback cannot build anew."""


class Stream(IterableDataset):
    def __iter__(self):
        return iter(TRAIN)


LOADERS = {
    "own sampler": lambda: DataLoader(TRAIN, 5, sampler=Drawn(len(TRAIN))),
    "own batches": lambda: DataLoader(TRAIN, batch_sampler=DrawnBatches(len(TRAIN))),
    "generator": lambda: DataLoader(TRAIN, 5, shuffle=True, generator=torch.Generator().manual_seed(5)),
    "own loader": lambda: OwnLoader(TRAIN, 5, shuffle=True, generator=torch.Generator().manual_seed(5)),
    "own loader, workers": lambda: OwnLoader(TRAIN, 5, shuffle=True, num_workers=1, persistent_workers=True),
    "stream": lambda: DataLoader(Stream(), 5),
    "stream, workers": lambda: DataLoader(Stream(), 5, num_workers=1, persistent_workers=True),
}


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize(
    "options",
    [{}, {"tolerance": 0.05}, {"refresh_on_validation": True}, {"refresh_on_validation": True, "max_samples": 12}],
)
def test_each_kind_of_loader_goes_on_as_without(kind, options, tmp_path):
    """In the middle of an epoch, and of a validation: the same batches, all of them."""

    class Noted(Dropout):
        def training_step(self, batch, batch_idx):
            noted.append(batch[1].tolist())
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch, batch_idx):
            noted.append(batch[1].tolist())
            return super().validation_step(batch, batch_idx)

    outcomes = []
    for callbacks in ([], [AbsentClassCalibration(**options, calibrate_checkpoints=False)]):
        seed()
        noted = []
        trainer = trainer_of(tmp_path, *callbacks, max_epochs=2, val_check_interval=4, num_sanity_val_steps=0)
        module = pretrained(Noted)
        trainer.fit(module, LOADERS[kind](), LOADERS[kind]())
        outcomes.append(
            (noted, {key: value for key, value in module.state_dict().items() if "absent_class" not in key})
        )
    assert len(outcomes[0][0]) == 2 * (9 + 2 * 9)
    assert outcomes[0][0] == outcomes[1][0]
    assert_same(outcomes[0][1], outcomes[1][1])
