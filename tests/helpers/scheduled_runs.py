"""Fits whose weights depend on the step alone, so that any number of processes gives the same ones."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.utils.data import (
    DataLoader,
    DistributedSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from tests.helpers.runs import ABSENT, NUM_CLASSES, SEEN, blobs

RARE = SEEN[-1]


def data(classes: list[int], size: int, each: int = 51) -> TensorDataset:
    """In float64: in float32 the last bits of a logit depend on the batch that the sample is in."""
    inputs, target = blobs(classes, each=each, seed=4).tensors
    return TensorDataset(inputs[:size].double(), target[:size])


VAL = data([*SEEN, *ABSENT], 40)
TRAIN = data(SEEN[:-1], 101)
TRAIN.tensors[1][1] = RARE  # the only sample of its class
SUBSET = [1, *range(0, 101, 3)]  # 35 samples
WEIGHTS = [float(index % 2 == 0 or index == 1) for index in range(101)]  # 52 samples


def centres() -> torch.Tensor:
    inputs, target = blobs([*range(NUM_CLASSES)], each=51).tensors
    return torch.stack([inputs[target == label].double().mean(0) for label in range(NUM_CLASSES)])


class Scheduled(LightningModule):
    """Its weights depend on the number of steps alone: they are the same for any number of processes."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Dropout(0.5))
        self.fc = nn.Linear(5, NUM_CLASSES, dtype=torch.float64)
        self.schedule(0)

    def schedule(self, step: int) -> None:
        """Nearest centres, with more and more noise, and less and less of the absent classes."""
        noise = torch.randn(NUM_CLASSES, 5, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        weight = centres() + 0.1 * step * noise
        with torch.no_grad():
            self.fc.weight.copy_(weight)
            self.fc.bias.copy_(-weight.square().sum(1) / 2)
            self.fc.bias[ABSENT] -= 2 + step

    def forward(self, x):
        return self.fc(self.body(x))

    def on_train_batch_start(self, batch, batch_idx):
        self.schedule(self.trainer.global_step)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self(batch[0])

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


class Logged(Callback):
    def __init__(self) -> None:
        self.metrics: dict[int, dict[str, float]] = {}

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            self.metrics[trainer.global_step] = numbers(trainer.callback_metrics)


def numbers(metrics):
    return {name: value.item() for name, value in metrics.items()}


def loaders(name: str, rank: int, world_size: int):
    """The data of a scenario, and what the Trainer must know of it."""
    if name in ("given", "refreshed"):
        return DataLoader(TRAIN, 16, shuffle=True), DataLoader(VAL, 16), {}
    if name == "inferred":  # sharded by the user: class RARE is on the second process only, which validates few of 40
        sampler = DistributedSampler(TRAIN, world_size, rank, shuffle=False)
        bounds = {1: [0, 40], 2: [0, 33, 40], 4: [0, 33, 38, 39, 40]}[world_size]
        val = Subset(VAL, range(bounds[rank], bounds[rank + 1]))
        return DataLoader(TRAIN, 16, sampler=sampler), DataLoader(val, 16), {"use_distributed_sampler": False}
    sampler = SubsetRandomSampler(SUBSET) if name == "subset" else WeightedRandomSampler(WEIGHTS, 101)
    return DataLoader(TRAIN, 16, sampler=sampler), DataLoader(VAL, 16), {}


class Watched(Scheduled):
    """Keeps the gaps of the samples that this process' steps saw in the last epoch."""

    def on_train_epoch_start(self):
        self.gaps = []

    def training_step(self, batch, batch_idx):
        logits = self(batch[0])
        for row, label in zip(logits.tolist(), batch[1].tolist(), strict=True):
            others, absent = [row[c] for c in SEEN if c != label], [row[c] for c in ABSENT]
            self.gaps.append(sum(others) / len(others) - sum(absent) / len(absent))
        return nn.functional.cross_entropy(logits, batch[1])
