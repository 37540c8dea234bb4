"""The pass at the end reads the samples that training read, each once."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from lightning_calibft import AbsentClassCalibration, get_gamma
from tests.helpers.runs import (
    ABSENT,
    SEEN,
    TRAIN,
    VAL,
    Noisy,
    Plain,
    Stream,
    assert_calibrated,
    blobs,
    loader,
    no_warnings,
    pretrained,
    quiet,
    trainer_of,
)

pytestmark = quiet


class Batches(Dataset):
    """A dataset that gives whole batches."""

    def __init__(self, dataset):
        x, y = dataset.tensors
        self.parts = list(zip(x.split(8), y.split(8), strict=True))

    def __len__(self):
        return len(self.parts)

    def __getitem__(self, index):
        return self.parts[index]


class Chosen:
    """A batch sampler of the user's own, over some samples, in batches of different lengths."""

    def __init__(self, indices):
        self.indices = indices

    def __len__(self):
        return 2

    def __iter__(self):
        order = torch.randperm(len(self.indices)).tolist()
        yield [self.indices[i] for i in order[:7]]
        yield [self.indices[i] for i in order[7:]]


HALF = list(range(0, 45, 2))
SOME = TensorDataset(*(tensor[HALF] for tensor in TRAIN.tensors))
FIRST = TensorDataset(*(tensor[:16] for tensor in TRAIN.tensors))
MANY = blobs(SEEN, each=50)
SORTED = TensorDataset(*(tensor[MANY.tensors[1].argsort()] for tensor in MANY.tensors))
WEIGHTS = [1.0 if index in HALF else 0.0 for index in range(45)]
BAREBONES = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), None)
BAREBONES["barebones"] = True
LOADERS = {
    "drop_last": (lambda: loader(drop_last=True), {}, TRAIN),
    "workers": (lambda: loader(num_workers=1, persistent_workers=True, prefetch_factor=1), {}, TRAIN),
    "subset": (lambda: loader(shuffle=False, sampler=SubsetRandomSampler(HALF)), {}, SOME),
    "weighted": (lambda: loader(shuffle=False, sampler=WeightedRandomSampler(WEIGHTS, 90)), {}, SOME),
    "with_replacement": (lambda: loader(shuffle=False, sampler=RandomSampler(TRAIN, True, 99)), {}, TRAIN),
    "list_of_indices": (lambda: loader(shuffle=False, sampler=HALF), {}, SOME),
    "subset_of_dataset": (lambda: loader(torch.utils.data.Subset(TRAIN, HALF)), {}, SOME),
    "batch_sampler": (lambda: DataLoader(TRAIN, batch_sampler=Chosen(HALF)), {}, SOME),
    "torch_batch_sampler": (
        lambda: DataLoader(TRAIN, batch_sampler=BatchSampler(SubsetRandomSampler(HALF), 8, True)),
        {},
        SOME,
    ),
    "torch_batch_sampler_of_all": (
        lambda: DataLoader(TRAIN, batch_sampler=BatchSampler(SequentialSampler(TRAIN), 8, True)),
        {},
        TRAIN,
    ),
    "no_batching": (lambda: DataLoader(Batches(TRAIN), batch_size=None, shuffle=True), {}, TRAIN),
    "limit_in_order": (lambda: loader(shuffle=False), {"limit_train_batches": 2}, FIRST),
    "limit_fraction_in_order": (lambda: loader(shuffle=False), {"limit_train_batches": 0.4}, FIRST),
    "overfit": (lambda: loader(), {"overfit_batches": 2, "limit_val_batches": 0}, FIRST),
    "stream": (lambda: DataLoader(Stream(TRAIN), 8), {}, TRAIN),
    "limit_stream": (lambda: DataLoader(Stream(TRAIN), 8), {"limit_train_batches": 2}, FIRST),
    "endless_stream": (lambda: DataLoader(Stream(TRAIN, endless=True), 8), {"max_steps": 2, "max_epochs": -1}, FIRST),
    "many_steps": (lambda: loader(SORTED, batch_size=2, shuffle=False), {"max_epochs": 1}, SORTED),
    "reload": (lambda: loader(), {"reload_dataloaders_every_n_epochs": 1}, TRAIN),
    "accumulate": (lambda: loader(), {"accumulate_grad_batches": 4}, TRAIN),
    "no_validation": (lambda: loader(), {"limit_val_batches": 0}, TRAIN),
    "no_sanity": (lambda: loader(), {"num_sanity_val_steps": 0}, TRAIN),
    "max_epochs_0": (lambda: loader(), {"max_epochs": 0}, TRAIN),
    "barebones": (lambda: loader(), BAREBONES, TRAIN),
    "max_time": (lambda: loader(), {"max_time": {"seconds": 0}}, TRAIN),
}


@pytest.mark.parametrize("name", LOADERS)
def test_the_pass_reads_the_samples_of_the_training(name, tmp_path):
    make, options, expected = LOADERS[name]
    module, callback = pretrained(), AbsentClassCalibration()
    with no_warnings():
        trainer_of(tmp_path, callback, **options).fit(module, make(), loader(VAL, shuffle=False))
    assert callback.result.num_samples == len(expected)
    assert_calibrated(module.state_dict(), expected)


@pytest.mark.parametrize("limit", [1, 2, 0.4])
def test_limited_batches_of_a_shuffled_loader(limit, tmp_path):
    """Each epoch reads others: a fixed random subset of that size stands for them."""
    module, callback = pretrained(), AbsentClassCalibration(seen_classes=SEEN)
    trainer_of(tmp_path, callback, limit_train_batches=limit).fit(module, loader())
    assert callback.result.num_samples == 8 * (limit if isinstance(limit, int) else 2)
    again = AbsentClassCalibration(seen_classes=SEEN)
    trainer_of(tmp_path, again, limit_train_batches=limit, max_epochs=0).fit(module, loader())
    assert again.result == callback.result


def test_fast_dev_run(tmp_path):
    module, callback = pretrained(), AbsentClassCalibration(seen_classes=SEEN)
    trainer = trainer_of(tmp_path, callback, fast_dev_run=True)
    trainer.fit(module, loader(), loader(VAL, shuffle=False))
    assert trainer.global_step == 1
    assert callback.result.num_samples == 8
    assert get_gamma(module) == pytest.approx(callback.result.gamma)


def test_max_samples(tmp_path):
    def num_samples(data):
        callback = AbsentClassCalibration(max_samples=20)
        trainer_of(tmp_path, callback, max_epochs=0).fit(pretrained(), data)
        return callback.result.num_samples

    assert num_samples(loader(batch_size=6)) == 20
    assert num_samples([loader(), loader(blobs(SEEN, seed=8), batch_size=3)]) == 20  # ten of each
    assert num_samples(DataLoader(Stream(TRAIN), 8)) == 24  # whole batches
    assert num_samples(loader(SOME)) == 20
    assert num_samples(loader(FIRST)) == 16


def test_the_last_reloaded_data_is_read(tmp_path):
    class Reloads(Plain):
        def train_dataloader(self):
            return loader(blobs(SEEN, seed=10 + self.current_epoch))

    module = pretrained(Reloads)
    trainer_of(tmp_path, AbsentClassCalibration(), reload_dataloaders_every_n_epochs=1).fit(module)
    assert_calibrated(module.state_dict(), blobs(SEEN, seed=11), make=Reloads)


def test_random_data_is_read_with_the_same_random_numbers_each_time(tmp_path):
    module, callback = pretrained(), AbsentClassCalibration()
    trainer_of(tmp_path, callback, ModelCheckpoint(tmp_path)).fit(module, loader(Noisy(TRAIN), num_workers=1))
    (result,) = callback.checkpoint_results.values()
    assert result == callback.result


def test_labels_that_the_step_writes_over(tmp_path):
    class Overwrites(Plain):
        def training_step(self, batch, batch_idx):
            x, y = batch
            loss = super().training_step((x, y.clone()), batch_idx)
            y.fill_(ABSENT[0])
            return loss

    module, callback = pretrained(Overwrites), AbsentClassCalibration()
    trainer_of(tmp_path, callback).fit(module, loader(), loader(VAL, shuffle=False))
    assert_calibrated(module.state_dict(), make=Overwrites)
