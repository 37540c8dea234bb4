"""Training goes as it would without the callback, and the pass at the end reads what the training read."""

from __future__ import annotations

import copy
import itertools
import pickle
import random
import time
import warnings

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import LearningRateFinder, ModelCheckpoint, ProgressBar
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from lightning_calibft import AbsentClassCalibration, get_gamma
from tests.references import _reference_gap
from tests.runs import (
    ABSENT,
    NUM_CLASSES,
    OFFSET,
    SEEN,
    TRAIN,
    VAL,
    Plain,
    assert_calibrated,
    assert_same,
    blobs,
    loader,
    no_warnings,
    pretrained,
    quiet,
    raw_logits,
    read,
    split_state,
    trainer_of,
    without_calibration,
)

pytestmark = quiet


class Dropout(Plain):
    def __init__(self):
        super().__init__(dropout=0.5)


class Noisy(Dataset):
    """Draws from every random stream, as augmentations do."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        x, y = self.dataset[index]
        return x + 0.1 * (torch.randn(()) + np.random.randn() + random.gauss(0, 1)), y


def seed():
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)


def streams():
    return torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()


def run(folder, *callbacks, make=Dropout, data=TRAIN, module=None, **kwargs):
    """Fit with fixed seeds; return the weights, the random states and the checkpoints' contents."""
    seed()
    module = pretrained(make) if module is None else module
    options = {key: kwargs.pop(key) for key in ("num_workers", "persistent_workers") if key in kwargs}
    checkpoints = ModelCheckpoint(folder, save_top_k=-1, every_n_train_steps=3)
    trainer = trainer_of(folder, *callbacks, checkpoints, **kwargs)
    trainer.fit(module, loader(Noisy(data), **options), loader(VAL, shuffle=False))
    files = {path.name: without_calibration(read(path)) for path in sorted(folder.glob("*.ckpt"))}
    return {"model": dict(module.state_dict()), "streams": streams(), "files": files}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_workers": 2},
        {"num_workers": 2, "persistent_workers": True},
        {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5},
        {"val_check_interval": 2, "limit_train_batches": 5},
    ],
    ids=["plain", "workers", "persistent_workers", "accumulate", "often"],
)
def test_the_trajectory_is_bit_identical(options, tmp_path):
    (tmp_path / "with").mkdir()
    (tmp_path / "without").mkdir()
    without = run(tmp_path / "without", **options)
    calibrated = run(tmp_path / "with", AbsentClassCalibration(), **options)
    own, gamma, _ = split_state(calibrated.pop("model"))
    assert gamma != 0
    assert_same(own, without.pop("model"))
    assert_same(calibrated["streams"][0], without["streams"][0])
    assert calibrated["streams"][1:] == without["streams"][1:]
    assert len(without["files"]) >= 2
    for name in without["files"]:
        one, other = calibrated["files"][name], without["files"][name]
        for checkpoint in (one, other):
            checkpoint["callbacks"] = None  # they hold the name of the folder
            checkpoint["loops"] = None if "num_workers" in options else checkpoint["loops"]
            vars(checkpoint["state_dict"])["_metadata"] = None  # names the calibration's module
        assert_same(one, other)


def test_frozen_layers_and_modes(tmp_path):
    class Frozen(Dropout):
        def on_train_epoch_start(self):
            self.body[1].eval()  # a frozen BatchNorm, as in fine-tuning recipes

    class Watch(Callback):
        def __init__(self):
            self.modes, self.buffers = [], []

        def note(self, module):
            own = [name for name, _ in module.named_modules() if "absent_class" not in name]
            self.modes.append({name: module.get_submodule(name).training for name in own})
            self.buffers.append({name: value.clone() for name, value in module.named_buffers() if "absent" not in name})

        def on_train_batch_end(self, trainer, pl_module, *_):
            self.note(pl_module)

        def on_train_end(self, trainer, pl_module):
            self.note(pl_module)

        def on_fit_end(self, trainer, pl_module):
            self.note(pl_module)

        def teardown(self, trainer, pl_module, stage):
            self.note(pl_module)

    watch, module = Watch(), pretrained(Frozen)
    start = {name: value.clone() for name, value in module.named_buffers()}
    trainer_of(tmp_path, AbsentClassCalibration(), watch, ModelCheckpoint(tmp_path)).fit(module, loader())
    # Eval mode was left behind, and what the user had put into it stayed there, also over the passes.
    assert len(watch.modes) == 12 + 3
    expected = dict.fromkeys(("", "body", "body.0", "body.2", "body.3", "fc"), True) | {"body.1": False}
    assert all(modes == expected for modes in watch.modes)
    for buffers in watch.buffers:
        assert_same(buffers, start)
    assert_calibrated(module.state_dict(), make=Frozen)


def test_the_pass_leaves_batch_norm_alone(tmp_path):
    class Watch(Callback):
        def on_train_end(self, trainer, pl_module):  # before the callback
            self.before = {name: value.clone() for name, value in pl_module.body.state_dict().items()}
            self.mode = pl_module.training

    watch, module = Watch(), pretrained()
    trainer_of(tmp_path, watch, AbsentClassCalibration(), ModelCheckpoint(tmp_path, save_top_k=-1)).fit(
        module, loader()
    )
    assert_same(watch.before, {name: value.clone() for name, value in module.body.state_dict().items()})
    assert module.training == watch.mode is True


def test_training_sees_raw_logits_and_a_second_fit_does_not_add_gamma_twice(tmp_path):
    callback, module = AbsentClassCalibration(), pretrained()
    trainer_of(tmp_path, callback).fit(module, loader())
    first = assert_calibrated(module.state_dict())
    weights = copy.deepcopy(split_state(module.state_dict())[0])

    seed()
    trainer_of(tmp_path, AbsentClassCalibration()).fit(module, loader())
    second = assert_calibrated(module.state_dict())
    assert second != first
    plain = Plain()
    plain.load_state_dict(weights)
    seed()
    trainer_of(tmp_path).fit(plain, loader())
    assert_same(split_state(module.state_dict())[0], dict(plain.state_dict()))

    third = trainer_of(tmp_path, callback)  # the same callback again
    third.fit(module, loader())
    assert_calibrated(module.state_dict())


def test_checkpoints_written_while_a_calibrated_model_is_trained_again_are_not_calibrated_before_the_end(tmp_path):
    class Watch(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.save_checkpoint(tmp_path / "during.ckpt")

    module = pretrained()
    trainer_of(tmp_path, AbsentClassCalibration()).fit(module, loader())
    assert get_gamma(module) is not None
    trainer_of(tmp_path, AbsentClassCalibration(), Watch()).fit(module, loader())
    during = read(tmp_path / "during.ckpt")
    assert split_state(during["state_dict"])[1:] == (0, [])
    assert "lightning_calibft" not in during


@pytest.mark.parametrize("kind", ["with", "without", "weights_only"])
def test_resume(kind, tmp_path):
    checkpoints = ModelCheckpoint(tmp_path, save_last=True, save_weights_only=kind == "weights_only")
    callbacks = [] if kind == "without" else [AbsentClassCalibration()]
    trainer_of(tmp_path, *callbacks, checkpoints).fit(pretrained(), loader())
    has_gamma = f"fc.{OFFSET}" in read(checkpoints.last_model_path)["state_dict"]
    assert has_gamma == (kind != "without")

    module = pretrained()
    callback = AbsentClassCalibration()
    trainer = trainer_of(tmp_path, callback, max_epochs=3)
    if kind == "weights_only":
        weights = read(checkpoints.last_model_path)["state_dict"]
        module.load_state_dict(split_state(weights)[0], strict=True)
        trainer.fit(module, loader())
    else:
        trainer.fit(module, loader(), ckpt_path=checkpoints.last_model_path)
        assert trainer.global_step == 18
    assert_calibrated(module.state_dict())
    assert module.strict_loading


def test_labels_of_the_resumed_run_count(tmp_path):
    """The second half of the training meets two classes only."""
    checkpoints = ModelCheckpoint(tmp_path, save_last=True)
    trainer_of(tmp_path, AbsentClassCalibration(), checkpoints).fit(pretrained(), loader())
    module, callback = pretrained(), AbsentClassCalibration()
    half = blobs(SEEN[:2], seed=5)
    trainer_of(tmp_path, callback, max_epochs=3).fit(module, loader(half), ckpt_path=checkpoints.last_model_path)
    assert list(callback.result.split.seen_classes) == SEEN
    assert_calibrated(module.state_dict(), half)


def test_best_is_tested_calibrated(tmp_path):
    callback = AbsentClassCalibration()
    checkpoints = ModelCheckpoint(tmp_path, monitor="val_loss")
    trainer, module = trainer_of(tmp_path, callback, checkpoints), pretrained()
    trainer.fit(module, loader(), loader(VAL, shuffle=False))
    best = read(checkpoints.best_model_path)["state_dict"]
    gamma = split_state(best)[1]
    assert gamma != pytest.approx(callback.result.gamma, rel=1e-3)
    raw = raw_logits(best, VAL.tensors[0])
    shifted = raw + gamma * torch.isin(torch.arange(NUM_CLASSES), torch.tensor(ABSENT))
    expected = torch.nn.functional.cross_entropy(shifted, VAL.tensors[1]).item()
    uncalibrated = torch.nn.functional.cross_entropy(raw, VAL.tensors[1]).item()
    assert abs(expected - uncalibrated) > 1e-3

    def loss(trainer, module, path="best"):
        return trainer.test(module, loader(VAL, shuffle=False), ckpt_path=path, verbose=False)[0]["test_loss"]

    assert loss(trainer, module) == pytest.approx(expected, rel=1e-5)
    fresh = trainer_of(tmp_path, AbsentClassCalibration())
    assert loss(fresh, pretrained(), checkpoints.best_model_path) == pytest.approx(expected, rel=1e-5)
    predicts = trainer_of(tmp_path, AbsentClassCalibration())
    predictions = predicts.predict(pretrained(), DataLoader(VAL.tensors[0], 16), ckpt_path=checkpoints.best_model_path)
    torch.testing.assert_close(torch.cat(predictions), shifted)


class Stream(IterableDataset):
    def __init__(self, dataset, endless=False):
        self.dataset, self.endless = dataset, endless

    def __iter__(self):
        return itertools.cycle(self.dataset) if self.endless else iter(self.dataset)


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
    "many_steps": (lambda: loader(blobs(SEEN, each=50), batch_size=2), {"max_epochs": 1}, blobs(SEEN, each=50)),
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


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [
        ("bf16-mixed", torch.bfloat16),
        ("bf16-true", torch.bfloat16),
        ("16-true", torch.float16),
        ("64-true", torch.float64),
    ],
)
def test_precisions(precision, dtype, tmp_path):
    module = pretrained()
    checkpoints = ModelCheckpoint(tmp_path, monitor="val_ausuc", mode="max", save_top_k=-1)
    trainer = trainer_of(tmp_path, AbsentClassCalibration(), checkpoints, precision=precision)
    trainer.fit(module, loader(), loader(VAL, shuffle=False))

    def logits(state):
        plain = Plain()
        plain.to(torch.float32 if precision == "bf16-mixed" else dtype)
        plain.load_state_dict(split_state(state)[0])
        x = TRAIN.tensors[0] if precision == "bf16-mixed" else TRAIN.tensors[0].to(dtype)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
            out = plain.eval()(x)
        assert out.dtype == dtype
        return out

    states = [dict(module.state_dict()), *(read(path)["state_dict"] for path in checkpoints.best_k_models)]
    assert len(states) == 3
    for state in states:
        assert state[f"fc.{OFFSET}"].dtype == torch.float32
        expected = _reference_gap(logits(state), TRAIN.tensors[1], SEEN, ABSENT)[0]
        # Half precision rounds differently in batches of another length.
        tolerance = 1e-5 if dtype == torch.float64 else 2e-2
        assert state[f"fc.{OFFSET}"].item() == pytest.approx(expected, rel=tolerance)


def test_half_precision_data_under_autocast(tmp_path):
    """Such a forward fails outside of autocast, so all of ours must run inside."""
    dataset = TensorDataset(TRAIN.tensors[0].bfloat16(), TRAIN.tensors[1])
    module = pretrained()
    trainer_of(tmp_path, AbsentClassCalibration(), precision="bf16-mixed").fit(module, loader(dataset))
    assert get_gamma(module)


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


def test_a_trainer_that_goes_on(tmp_path):
    checkpoints = ModelCheckpoint(tmp_path, save_top_k=-1)
    callback, module = AbsentClassCalibration(), pretrained()
    trainer = trainer_of(tmp_path, callback, checkpoints)
    trainer.fit(module, loader())
    first = {path: path.read_bytes() for path in tmp_path.glob("*.ckpt")}
    trainer.fit_loop.max_epochs = 3
    trainer.fit(module, loader())
    assert trainer.global_step == 18
    assert_calibrated(module.state_dict())
    files = list(tmp_path.glob("*.ckpt"))
    assert len(files) == 3
    assert all(path.read_bytes() == content for path, content in first.items())
    for path in files:
        assert_calibrated(read(path)["state_dict"])


def test_an_asynchronous_writer(tmp_path):
    class Slow(TorchCheckpointIO):
        def save_checkpoint(self, *args, **kwargs):
            time.sleep(0.1)
            super().save_checkpoint(*args, **kwargs)

    module, checkpoints = pretrained(), ModelCheckpoint(tmp_path, save_top_k=-1)
    plugin = AsyncCheckpointIO(Slow())
    trainer_of(tmp_path, AbsentClassCalibration(), checkpoints, plugins=[plugin]).fit(module, loader())
    files = list(tmp_path.glob("*.ckpt"))
    assert len(files) == 2
    for state in (module.state_dict(), *(read(path)["state_dict"] for path in files)):
        assert_calibrated(state)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("first", [True, False])
def test_a_learning_rate_finder(first, tmp_path):
    module, finder = pretrained(), LearningRateFinder(num_training_steps=5, early_stop_threshold=None)
    callbacks = [finder, AbsentClassCalibration()] if first else [AbsentClassCalibration(), finder]
    trainer = trainer_of(tmp_path, *callbacks, ModelCheckpoint(tmp_path), enable_checkpointing=True)
    trainer.fit(module, loader(), loader(VAL, shuffle=False))
    assert trainer.global_step == 12
    assert_calibrated(module.state_dict())


def test_copies_of_the_callback(tmp_path):
    callback = AbsentClassCalibration(seen_classes=SEEN)
    for twin in (copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):
        module = pretrained()
        trainer_of(tmp_path, twin).fit(module, loader(), loader(VAL, shuffle=False))
        assert_calibrated(module.state_dict())
        again = pickle.loads(pickle.dumps(twin))
        assert again.result == twin.result


def test_a_progress_bar_of_the_user(tmp_path, capsys):
    module = pretrained()
    trainer = trainer_of(tmp_path, AbsentClassCalibration(), ProgressBar(), enable_progress_bar=True)
    trainer.fit(module, loader())
    assert "Calibrating" in capsys.readouterr().err
    assert_calibrated(module.state_dict())
    trainer_of(tmp_path, AbsentClassCalibration()).fit(module, loader())
    assert "Calibrating" not in capsys.readouterr().err


def test_the_callback_is_quiet_about_itself(tmp_path):
    with warnings.catch_warnings(record=True) as met:
        warnings.simplefilter("always")
        trainer = trainer_of(tmp_path, AbsentClassCalibration(), ModelCheckpoint(tmp_path, monitor="val_ausuc"))
        trainer.fit(pretrained(), loader(), loader(VAL, shuffle=False))
    assert not [str(warning.message) for warning in met if "lightning_calibft" in warning.filename]
