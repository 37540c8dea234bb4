"""The split that validations measure, from the labels that datasets list, before training has met them."""

from __future__ import annotations

import warnings

import pytest
import torch
from lightning.pytorch import Callback
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Sampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from lightning_calibft import AbsentClassCalibration, get_gamma
from tests.callback.measures import HARD, val_loader
from tests.callback.test_class_map import ROWS, Folders, folders
from tests.helpers.runs import (
    ABSENT,
    SEEN,
    TRAIN,
    Plain,
    Unlisted,
    assert_calibrated,
    blobs,
    loader,
    pretrained,
    quiet,
    split_state,
    trainer_of,
)

pytestmark = quiet

ORDER = TRAIN.tensors[1].argsort(stable=True)
SORTED = TensorDataset(*(part[ORDER] for part in TRAIN.tensors))  # 15 of each class


class Steps(Callback):
    """How many warnings there were before the first step, and what each validation measured."""

    def __init__(self, calibration, met):
        self.calibration, self.met, self.splits, self.values, self.before = calibration, met, [], [], None

    def on_train_batch_start(self, *_):
        if self.before is None:
            self.before = len(told(self.met))

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            split = self.calibration._monitor.split
            self.splits.append(split and list(split.seen_classes))
            self.values.append(trainer.callback_metrics.get("val_ausuc"))


def told(met):
    return [str(each.message) for each in met if "cannot be compared" in str(each.message)]


def fit(folder, data, module=None, val=None, options=None, **arguments):
    """Validate after every second batch. Return the measurements, what was said, and the module."""
    calibration, module = AbsentClassCalibration(**arguments), module or pretrained()
    with warnings.catch_warnings(record=True) as met:
        warnings.simplefilter("always")
        steps = Steps(calibration, met)
        trainer = trainer_of(folder, steps, calibration, **{"val_check_interval": 2, **(options or {})})
        trainer.fit(module, data, val or val_loader())
    return steps, [str(each.message) for each in met], module


def in_order(data, **kwargs):
    return loader(data, shuffle=False, **kwargs)


@pytest.mark.parametrize(
    "make",
    [
        lambda: in_order(SORTED),
        lambda: in_order(SORTED, drop_last=True),
        lambda: in_order(Subset(SORTED, range(1, 45))),
        lambda: in_order(ConcatDataset([SORTED, SORTED])),
        lambda: [in_order(SORTED), in_order(TRAIN)],
        lambda: DataLoader(SORTED, batch_sampler=BatchSampler(SequentialSampler(SORTED), 8, False)),
    ],
)
def test_all_validations_measure_the_same_split(make, tmp_path):
    class Several(Plain):
        def training_step(self, batch, batch_idx):
            batches = [batch] if isinstance(batch[0], torch.Tensor) else batch
            return sum(self.loss(each) for each in batches if each is not None)

    steps, said, module = fit(tmp_path, make(), pretrained(Several))
    given, _, other = fit(tmp_path, make(), pretrained(Several), seen_classes=SEEN)
    assert steps.splits == given.splits == [SEEN] * len(steps.splits)
    assert torch.equal(torch.stack(steps.values), torch.stack(given.values))
    assert get_gamma(module) == get_gamma(other)
    assert not [text for text in said if "AbsentClass" in text or "compared" in text]


def test_gamma_before_a_validation_is_for_that_split(tmp_path):
    class Masks(Steps):
        def on_validation_start(self, trainer, pl_module):
            masks.append(split_state(pl_module.state_dict())[2])

    masks, met = [], []
    calibration = AbsentClassCalibration(refresh_on_validation=True)
    steps = Masks(calibration, met)
    trainer = trainer_of(tmp_path, calibration, steps, val_check_interval=2, num_sanity_val_steps=0)
    module = pretrained()
    trainer.fit(module, in_order(SORTED), val_loader())
    assert masks[1:] == [ABSENT] * (len(masks) - 1)  # the first hook ran before the first gamma
    assert_calibrated(module.state_dict(), SORTED)


@pytest.mark.parametrize(
    ("make", "seen"),
    [
        (lambda: loader(SORTED, shuffle=False, sampler=SubsetRandomSampler(range(30))), SEEN[:2]),
        (lambda: loader(SORTED, shuffle=False, sampler=WeightedRandomSampler([1.0] * 30 + [0.0] * 15, 90)), SEEN[:2]),
    ],
    ids=["subset", "weighted"],
)
def test_a_sampler_of_some_classes(make, seen, tmp_path):
    steps, said, _ = fit(tmp_path, make())
    assert steps.splits == [seen] * len(steps.splits)
    assert not told_in(said)


def told_in(said):
    return [text for text in said if "compared" in text]


@pytest.mark.parametrize("limit", [4, 0.7])
def test_a_limit_of_batches_in_order(limit, tmp_path):
    steps, said, _ = fit(tmp_path, in_order(SORTED), options={"limit_train_batches": limit})
    assert steps.splits == [[0, 2, 3]] * 4  # four batches of 8 have two samples of the third class
    steps, _, _ = fit(tmp_path, in_order(SORTED), options={"limit_train_batches": 3, "val_check_interval": 1})
    assert steps.splits == [[0, 2]] * 6
    assert not told_in(said)


class Renumbered(Unlisted):
    """Lists other labels than its samples have."""

    def __init__(self, dataset, targets):
        super().__init__(dataset)
        self.targets = targets


@pytest.mark.parametrize(
    ("make", "options", "arguments"),
    [
        (lambda: in_order(Unlisted(SORTED)), {}, {}),
        (lambda: loader(TRAIN), {"limit_train_batches": 2, "val_check_interval": 1.0}, {}),
        (
            lambda: loader(Unlisted(TRAIN), shuffle=False, sampler=WeightedRandomSampler([1.0] * 45, 45)),
            {"val_check_interval": 1.0},
            {},
        ),
        (
            lambda: loader(TensorDataset(*TRAIN.tensors, TRAIN.tensors[1] // 2)),
            {},
            {"unpack_batch": "tests.callback.test_listed_classes.first_two"},
        ),
        (lambda: loader(TRAIN), {"reload_dataloaders_every_n_epochs": 1}, {}),
        (lambda: loader(TRAIN, sampler=list(range(45)), shuffle=False), {}, {}),
    ],
    ids=["no list", "shuffled and limited", "weighted", "unpacked", "reloaded", "own sampler"],
)
def test_what_cannot_be_compared_is_said_once_before_the_first_step(make, options, arguments, tmp_path):
    class Pairs(Plain):
        def loss(self, batch):
            return super().loss(batch[:2])

    steps, said, _ = fit(tmp_path, make(), pretrained(Pairs), options=options, **arguments)
    assert len(told_in(said)) == steps.before == 1
    assert "`seen_classes=[...]`" in told_in(said)[0]


def first_two(batch):
    return tuple(batch[:2])


@pytest.mark.parametrize(
    ("options", "arguments"),
    [
        ({"val_check_interval": 1.0}, {}),
        ({"limit_val_batches": 0}, {}),
        ({}, {"log_metrics": False}),
        ({}, {"seen_classes": SEEN}),
        ({"fast_dev_run": True}, {}),
    ],
)
def test_what_can_be_compared_all_the_same(options, arguments, tmp_path):
    _, said, _ = fit(tmp_path, in_order(Unlisted(SORTED)), options=options, **arguments)
    assert not told_in(said)


@pytest.mark.parametrize("targets", [[0] * 45, [5] * 45, (SORTED.tensors[1] // 2).tolist()])
def test_lists_of_other_labels_are_given_up(targets, tmp_path):
    data = Renumbered(SORTED, targets)
    steps, said, module = fit(tmp_path, in_order(data))
    assert steps.splits[-1] == SEEN
    (text,) = told_in(said)
    assert "list labels of the classes" in text
    assert_calibrated(module.state_dict(), SORTED)


def test_lists_of_more_classes_than_an_epoch_has(tmp_path):
    """As fine labels are listed, and coarse ones are trained on."""
    targets = [0, 2, 3, 4, 5] * 9
    steps, said, module = fit(tmp_path, loader(Renumbered(TRAIN, targets)), options={"val_check_interval": 1.0})
    assert steps.splits == [SEEN, SEEN]
    (text,) = told_in(said)
    assert "the classes 0, 2, 3, 4, 5, but the training batches have the classes 0, 2, 3" in text
    assert_calibrated(module.state_dict())


def test_a_rare_class_that_an_epoch_leaves_out_is_seen(tmp_path):
    x, y = TRAIN.tensors
    rare = TensorDataset(torch.cat([x, x[:1]]), torch.cat([y, torch.tensor([5])]))
    steps, said, _ = fit(tmp_path, in_order(rare, drop_last=True), options={"val_check_interval": 1.0})
    assert steps.splits == [[*SEEN, 5]] * 2
    assert any("ended before it met a sample of the classes 5" in text for text in said)


def test_classes_that_training_did_not_come_to_are_absent(tmp_path):
    steps, said, module = fit(tmp_path, in_order(SORTED), options={"max_steps": 3, "max_epochs": -1})
    assert steps.splits == [SEEN]
    assert any("ended before it met a sample of the classes 3" in text for text in said)
    assert split_state(module.state_dict())[2] == sorted([*ABSENT, 3])


def test_new_classes_in_a_later_epoch_are_told(tmp_path):
    class Growing(Sampler):
        def __init__(self):
            self.epoch = 0

        def __len__(self):
            return 30

        def __iter__(self):
            self.epoch += 1
            return iter(range(30) if self.epoch < 2 else range(15, 45))

    data = loader(SORTED, shuffle=False, sampler=Growing())
    steps, said, _ = fit(tmp_path, data, options={"val_check_interval": 1.0, "max_epochs": 3})
    assert steps.splits == [[0, 2], SEEN, SEEN]
    (text,) = told_in(said)
    assert "new classes: 3." in text


def test_labels_are_mapped(tmp_path):
    steps, said, module = fit(
        tmp_path, in_order(folders(SORTED)), pretrained(Folders), in_order(folders(HARD)), class_map=ROWS
    )
    assert steps.splits == [SEEN] * len(steps.splits)
    assert not told_in(said)
    assert_calibrated(module.state_dict(), SORTED, make=Folders)


def test_ignored_labels_are_of_no_class(tmp_path):
    x, y = SORTED.tensors
    steps, said, _ = fit(tmp_path, in_order(TensorDataset(x, torch.where(torch.arange(45) % 5 > 0, y, -100))))
    assert steps.splits == [SEEN] * len(steps.splits)
    assert not told_in(said)


def test_no_sample_is_loaded(tmp_path):
    class Counts(Unlisted):
        def __init__(self, dataset):
            super().__init__(dataset)
            self.targets, self.loaded = dataset.tensors[1], 0

        def __getitem__(self, index):
            self.loaded += 1
            return super().__getitem__(index)

    class AtFirst(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 0:
                counts.append(data.loaded)

    counts, data = [], Counts(SORTED)
    for callbacks in ([], [AbsentClassCalibration()]):
        data.loaded = 0
        trainer = trainer_of(tmp_path, *callbacks, AtFirst())
        trainer.fit(pretrained(), in_order(data), val_loader())
    assert counts[0] == counts[1]


def test_a_test_of_another_run_measures_the_split_of_its_head(tmp_path):
    """Its absent classes were seen in the fit before."""
    other, path = pretrained(), tmp_path / "other.ckpt"
    saver = trainer_of(tmp_path, AbsentClassCalibration(), max_epochs=1)
    saver.fit(other, loader(blobs(ABSENT)))
    saver.save_checkpoint(path)
    assert split_state(other.state_dict())[2] == SEEN

    module, calibration = pretrained(), AbsentClassCalibration()
    trainer = trainer_of(tmp_path, calibration)
    trainer.fit(module, loader(), val_loader())
    (values,) = trainer.test(module, val_loader(), ckpt_path=path, verbose=False)
    logits, target = other.eval()(HARD.tensors[0]), HARD.tensors[1]
    for name, classes in {"seen": ABSENT, "absent": SEEN}.items():
        chosen = torch.isin(target, torch.tensor(classes))
        accuracy = (logits.argmax(1) == target)[chosen].double().mean().item()
        assert values[f"test_acc_{name}"] == pytest.approx(accuracy)
