"""What nested fits ask of the data, the module and the arguments."""

from __future__ import annotations

import math
import threading

import pytest
import torch
from torch.utils.data import DataLoader, RandomSampler, SubsetRandomSampler, WeightedRandomSampler

from lightning_calibft import AbsentClassCalibration, attach, get_gamma
from lightning_calibft.calibration.batch_reader import BatchReader
from lightning_calibft.callback.class_subset import ClassSubset
from tests.callback.retraining import DATA, SEEN, pcv
from tests.helpers.runs import (
    VAL,
    Plain,
    Stream,
    loader,
    pretrained,
    quiet,
    trainer_of,
)

pytestmark = quiet


class Uncopyable(Plain):
    def __init__(self):
        super().__init__()
        self.lock = threading.Lock()


def test_a_module_that_cannot_be_copied(tmp_path):
    module = pretrained(Uncopyable)
    with pytest.raises(TypeError, match=r"`copy.deepcopy` can copy .* 'pcv'.*Uncopyable gives TypeError"):
        trainer_of(tmp_path, pcv()).fit(module, loader(DATA))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (DataLoader(Stream(DATA), 8), "but got a Stream"),
        (type("Own", (DataLoader,), {})(DATA, 8), "but got a TensorDataset"),
        (DataLoader(DATA, batch_sampler=[[0, 1], [2, 3]]), "but got a SequentialSampler in a list"),
        ([loader(DATA), DataLoader(Stream(DATA), 8)], "but got a Stream"),
    ],
)
def test_data_that_have_no_classes_to_leave_out(tmp_path, data, message):
    """Met before the first step."""

    class NoStep(Plain):
        def training_step(self, batch, batch_idx):
            raise AssertionError

    with pytest.raises(ValueError, match=message):
        trainer_of(tmp_path, pcv()).fit(pretrained(NoStep), data)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"splits": 2}, "`estimator_kwargs` to hold 'num_splits' or .* for the estimator 'pcv', but got 'splits'"),
        ({"num_splits": 0}, "`num_splits` to be at least 1"),
        ({"epochs": True}, "`epochs` to be a positive share, but got True"),
        ({"epochs": 0}, "`epochs` to be a positive share, but got 0"),
        ({"epochs": math.inf}, "`epochs` to be a positive share, but got inf"),
        ({"candidates": "some"}, "`candidates` to be one of"),
    ],
)
def test_options(options, message):
    with pytest.raises(ValueError, match=message):
        pcv(**options)


def test_too_few_classes(tmp_path):
    callback = AbsentClassCalibration([0, 2], estimator="pcv")
    with pytest.raises(ValueError, match="`seen_classes` to hold at least 3 classes"):
        trainer_of(tmp_path, callback).fit(pretrained(), loader(DATA))


def test_not_from_training_steps():
    with pytest.raises(ValueError, match="for the estimator 'pcv', but got 'training_steps'"):
        AbsentClassCalibration(SEEN, estimator="pcv", source="training_steps")


class Watching(Plain):
    monitor = "val_ausuc"

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.01)
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": self.monitor}}


def test_a_scheduler_that_watches_what_the_callback_logs(tmp_path):
    with pytest.raises(ValueError, match=r"to monitor values that the module itself logs .* but got 'val_ausuc'"):
        trainer_of(tmp_path, pcv()).fit(pretrained(Watching), loader(DATA), loader(VAL, shuffle=False))


def test_a_scheduler_that_watches_what_the_module_logs_under_the_same_name(tmp_path):
    class Logging(Watching):
        def validation_step(self, batch, batch_idx):
            self.log("val_ausuc", self.loss(batch))

    module = pretrained(Logging)
    with pytest.warns(UserWarning, match="does not log 'val_ausuc'"):
        trainer_of(tmp_path, pcv(num_splits=1)).fit(module, loader(DATA), loader(VAL, shuffle=False))
    assert get_gamma(module) is not None


def test_a_scheduler_that_watches_a_name_with_a_prefix(tmp_path):
    class Prefixed(Watching):
        monitor = "own_val_acc_seen"

    callback = AbsentClassCalibration(estimator="pcv", metric_prefix="own_")
    with pytest.raises(ValueError, match=r"that the module itself logs .* but got 'own_val_acc_seen'"):
        trainer_of(tmp_path, callback).fit(pretrained(Prefixed), loader(DATA), loader(VAL, shuffle=False))


def test_several_processes(tmp_path):
    trainer = trainer_of(tmp_path, pcv(), devices=2, strategy="ddp_spawn")
    assert trainer.world_size == 2
    with pytest.raises(RuntimeError, match=r"with one device for the estimator 'pcv'.* but got 2"):
        trainer.callbacks[0].setup(trainer, attach(pretrained()), "fit")


WEIGHTS = torch.arange(48.0)


@pytest.mark.parametrize(
    ("make", "number"),
    [
        (lambda: DataLoader(DATA, 8, shuffle=True), 24),
        (lambda: DataLoader(DATA, 8), 24),
        (lambda: DataLoader(DATA, 5, shuffle=True, drop_last=True), 20),
        (lambda: DataLoader(DATA, 40, shuffle=True, drop_last=True), 24),
        (lambda: DataLoader(DATA, 23, shuffle=True), 23),  # batch normalization refuses batches of one
        (lambda: DataLoader(DATA, 8, sampler=SubsetRandomSampler(range(0, 48, 2))), None),
        (lambda: DataLoader(DATA, 8, sampler=RandomSampler(DATA, replacement=True, num_samples=96)), 48),
        (lambda: DataLoader(DATA, 8, sampler=WeightedRandomSampler(WEIGHTS.tolist(), 40)), "by weight"),
        (lambda: DataLoader(DATA, None, shuffle=True, collate_fn=lambda item: (item[0][None], item[1][None])), 24),
    ],
)
def test_restricted_loaders(make, number):
    """Samples of the classes, as many and drawn as the loader draws them."""
    data = ClassSubset({"a": make(), "b": [make()]}, BatchReader())
    loaders, share = data.of_classes([0, 4])
    assert loaders.keys() == {"a", "b"}
    assert isinstance(loaders["b"], list)
    (restricted,) = loaders["b"]
    torch.manual_seed(0)
    epochs = [torch.cat([y for _, y in restricted]) for _ in range(2)]
    assert set(epochs[0].tolist()) == {0, 4}
    if number == "by weight":
        kept = torch.isin(DATA.tensors[1], torch.tensor([0, 4]))
        number = round(40 * float(WEIGHTS[kept].sum() / WEIGHTS.sum()))
    if number is not None:
        assert [len(epoch) for epoch in epochs] == [number, number]
        assert share == pytest.approx(0.5, abs=0.02)
    shuffles = not isinstance(make().sampler, torch.utils.data.SequentialSampler)
    assert torch.equal(*epochs) is not shuffles
    inputs = torch.cat([x for x, _ in restricted])
    assert all((row == DATA.tensors[0]).all(1).any() for row in inputs)


def test_batches_that_the_dataset_makes():
    pairs = [(DATA.tensors[0][k : k + 2], DATA.tensors[1][k : k + 2]) for k in range(0, 48, 2)]
    with pytest.raises(ValueError, match=r"one sample per index .* but 24 indices give 48 labels"):
        ClassSubset(DataLoader(pairs, None), BatchReader())
