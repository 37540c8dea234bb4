"""A tiny fine-tuning run: blobs of six classes of which three are seen, a plain module, a quiet Trainer."""

from __future__ import annotations

import copy
import functools
import itertools
import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from tests.helpers.references import _reference_gap

NUM_CLASSES, SEEN, ABSENT = 6, [0, 2, 3], [1, 4, 5]
OFFSET, MASK = "absent_class_calibration.offset", "absent_class_calibration.mask"

# What Lightning says about runs as small as these.
quiet = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers",
    "ignore:You defined a `validation_step` but have no `val_dataloader`",
    "ignore:Be aware that when using `ckpt_path`",
    "ignore:.*smaller than the logging interval",
    "ignore:.*Checkpoint directory .* exists and is not empty",
    "ignore:.*`isinstance.treespec, LeafSpec.` is deprecated",
)


def blobs(classes: list[int], shape: tuple[int, ...] = (5,), each: int = 15, seed: int = 0) -> TensorDataset:
    """Samples around one center a class, in random order."""
    generator = torch.Generator().manual_seed(1)
    centres = 2 * torch.randn(NUM_CLASSES, *shape, generator=generator)
    generator = torch.Generator().manual_seed(seed)
    target = torch.tensor(classes * each)[torch.randperm(len(classes) * each, generator=generator)]
    return TensorDataset(centres[target] + torch.randn(len(target), *shape, generator=generator), target)


TRAIN, VAL = blobs(SEEN), blobs([*SEEN, *ABSENT], each=8, seed=2)


def loader(dataset: TensorDataset = TRAIN, batch_size: int = 8, shuffle: bool = True, **kwargs) -> DataLoader:
    return DataLoader(dataset, batch_size, shuffle, **kwargs)


class Plain(LightningModule):
    """What a user writes: nothing in it knows of the calibration."""

    def __init__(self, dropout: float = 0.0, lr: float = 0.02) -> None:
        super().__init__()
        self.lr = lr
        self.build(dropout)

    def build(self, dropout: float) -> None:
        self.body = nn.Sequential(nn.Linear(5, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(dropout))
        self.fc = nn.Linear(16, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(x))

    def loss(self, batch) -> Tensor:
        x, y = batch
        return F.cross_entropy(self(x), y)

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.log("train_loss", loss, batch_size=8)
        return loss

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.log("val_loss", self.loss(batch), batch_size=8)

    def test_step(self, batch, batch_idx):
        self.log("test_loss", self.loss(batch), batch_size=8)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


class Nervous(Plain):
    """With weights that are only one step's."""

    def __init__(self) -> None:
        super().__init__(lr=0.05)


class Unlisted(Dataset):
    """Has no list of its labels."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        return self.dataset[index]


class Noisy(Dataset):
    """Draws from every random stream, as augmentations do."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        x, y = self.dataset[index]
        return x + 0.1 * (torch.randn(()) + np.random.randn() + random.gauss(0, 1)), y


class Stream(IterableDataset):
    def __init__(self, dataset, endless=False):
        self.dataset, self.endless = dataset, endless

    def __iter__(self):
        return itertools.cycle(self.dataset) if self.endless else iter(self.dataset)


def trainer_of(folder, *callbacks, **kwargs) -> Trainer:
    defaults = {
        "max_epochs": 2,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
    }
    return Trainer(default_root_dir=folder, callbacks=list(callbacks), **{**defaults, **kwargs})


def build(make: Callable[[], LightningModule] = Plain) -> LightningModule:
    """A new module, its late parts built as well, always with the same weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = make()
        module.setup("fit")
        module.configure_model()
    return module


@functools.cache
def pretrained_weights(make=Plain, forward=None) -> dict[str, Tensor]:
    """Weights trained on all classes, where a fine-tuning run begins."""
    module, (inputs, target) = build(make), blobs([*SEEN, *ABSENT], seed=3).tensors
    optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
    with torch.random.fork_rng():
        for _ in range(30):
            optimizer.zero_grad()
            F.cross_entropy(module(inputs) if forward is None else forward(module, inputs), target).backward()
            optimizer.step()
    return module.state_dict()


def pretrained(make=Plain, **kwargs) -> LightningModule:
    """A module as a user has it before fine-tuning."""
    module = build(make)
    module.load_state_dict(pretrained_weights(make, **kwargs))
    return module


def split_state(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], float, list[int]]:
    """The user's own entries of a state dict, gamma and the absent classes."""
    own = {key: value for key, value in state.items() if not key.endswith((OFFSET, MASK))}
    (gamma,) = (value.item() for key, value in state.items() if key.endswith(OFFSET))
    (mask,) = (value for key, value in state.items() if key.endswith(MASK))
    return own, gamma, mask.nonzero().flatten().tolist()


def raw_logits(state: dict[str, Tensor], inputs, make=Plain, forward=None) -> Tensor:
    """The logits of a module that never met this package, strictly loaded with the user's own entries."""
    module = build(make)
    module.load_state_dict(split_state(state)[0], strict=True)
    module.eval()
    with torch.no_grad():
        return module(inputs) if forward is None else forward(module, inputs)


def _reference_alg(state: dict[str, Tensor], dataset=TRAIN, seen=SEEN, absent=ABSENT, **kwargs) -> float:
    """The average logit gap of the weights in a state dict, by the definition, sample for sample, in float64."""
    inputs, target = dataset.tensors
    return _reference_gap(raw_logits(state, inputs, **kwargs), target, seen, absent)[0]


def assert_calibrated(state: dict[str, Tensor], dataset=TRAIN, seen=SEEN, absent=ABSENT, **kwargs) -> float:
    """Gamma in a state dict is that of the weights beside it."""
    _, gamma, classes = split_state(state)
    assert classes == absent
    expected = _reference_alg(state, dataset, seen, absent, **kwargs)
    assert abs(expected) > 1e-3  # else the next line says nothing
    assert gamma == pytest.approx(expected, rel=1e-5)
    return gamma


def read(path) -> dict:
    return torch.load(path, map_location="cpu", weights_only=True)


def assert_same(one, other) -> None:
    """Two checkpoints, or parts of them, are equal bit for bit and in their types."""
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            assert_same(one[key], other[key])
        assert_same(vars(one), vars(other)) if hasattr(one, "__dict__") else None
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    elif isinstance(one, Tensor):
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        assert one.contiguous().view(-1).numpy().tobytes() == other.contiguous().view(-1).numpy().tobytes()
    else:
        assert one == other or (one != one and other != other)


def without_calibration(checkpoint: dict) -> dict:
    """A Lightning checkpoint less what the callback adds to it."""
    checkpoint = copy.copy(checkpoint)
    checkpoint.pop("lightning_calibft", None)
    state = copy.copy(checkpoint["state_dict"])
    for key in [key for key in state if key.endswith((OFFSET, MASK))]:
        del state[key]
    checkpoint["state_dict"] = state
    callbacks = checkpoint.get("callbacks", {})
    checkpoint["callbacks"] = {key: value for key, value in callbacks.items() if key != "AbsentClassCalibration"}
    return checkpoint


@contextmanager
def no_warnings(text: str = "AbsentClass") -> Iterator[None]:
    """No warning that contains ``text``."""
    with warnings.catch_warnings(record=True) as met:
        warnings.simplefilter("always")
        yield
    assert not [str(warning.message) for warning in met if text in str(warning.message)]
