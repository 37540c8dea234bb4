"""`estimator="pcv"`: nested fits of the user's own module, data and Trainer settings."""

from __future__ import annotations

import copy
import json
import math
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import BaseFinetuning, Callback, GradientAccumulationScheduler, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, RandomSampler, SubsetRandomSampler, TensorDataset, WeightedRandomSampler

from lightning_calibft import AbsentClassCalibration, get_gamma, inspect_checkpoint
from lightning_calibft.calibration import BatchReader
from lightning_calibft.callback.restricted import RestrictedData
from lightning_calibft.functional import best_gamma, split_accuracy
from tests.runs import (
    VAL,
    Plain,
    Stream,
    blobs,
    build,
    loader,
    pretrained,
    pretrained_weights,
    quiet,
    read,
    split_state,
    trainer_of,
)

pytestmark = quiet

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


@pytest.fixture(autouse=True)
def fits():
    Watched.fits = []
    return Watched.fits


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


def test_a_fit(tmp_path, fits):
    module, callback = pretrained(Watched), pcv()
    checkpoints = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    trainer = trainer_of(tmp_path, callback, checkpoints, max_epochs=3)
    trainer.fit(module, loader(DATA), loader(VAL, shuffle=False))
    assert module.trainer is trainer
    first, *nested = fits
    assert len(nested) == 3
    for fit in nested:
        assert all(torch.equal(fit["weights"][key], value) for key, value in pretrained_weights().items())
        assert len(fit["labels"]) == 2
        assert (fit["max_epochs"], fit["batches"], fit["validates"]) == (3, 9, 0)
        assert split_state(fit["after"])[1:] == (0.0, [])
    assert len({tuple(sorted(fit["labels"])) for fit in nested}) > 1
    gammas = _reference(nested)
    assert callback.result.gamma == pytest.approx(sum(gammas) / 3, abs=1e-4)
    assert (callback.result.estimator, callback.result.num_samples) == ("pcv", 48)
    # The weights that training made, with gamma; and likewise in each file.
    state = module.state_dict()
    assert all(torch.equal(state[key], value) for key, value in weights(first["after"]).items())
    assert get_gamma(module) == pytest.approx(callback.result.gamma)
    assert split_state(state)[2] == ABSENT
    for epoch in range(3):
        info = inspect_checkpoint(tmp_path / f"epoch={epoch}.ckpt")
        assert info["gamma"] == pytest.approx(callback.result.gamma)
        assert (info["estimator"], info["absent_classes"]) == ("pcv", ABSENT)
    assert len({str(read(tmp_path / f"epoch={epoch}.ckpt")["state_dict"]["fc.weight"]) for epoch in range(3)}) == 3


@pytest.mark.filterwarnings("ignore:Pseudo cross-validation leaves out")
def test_all_candidates(tmp_path, fits):
    callback = pcv(candidates="all", num_splits=4, seed=1)
    trainer_of(tmp_path, callback).fit(pretrained(Watched), loader(DATA))
    gammas = [gamma for gamma in _reference(fits[1:], "all") if gamma is not None]
    assert callback.result.gamma == pytest.approx(sum(gammas) / len(gammas), abs=1e-4)


def test_gamma_from_validation_data(tmp_path, fits):
    """Trained on the training data, chosen on the seen classes of the validation data."""
    callback = AbsentClassCalibration(estimator="pcv", source="validation")
    trainer_of(tmp_path, callback).fit(pretrained(Watched), loader(DATA), loader(VAL, shuffle=False))
    assert callback.result.gamma == pytest.approx(sum(_reference(fits[1:], data=VAL)) / 3, abs=1e-4)
    assert callback.result.num_samples == 32


class Finetuning(BaseFinetuning):
    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.body)

    def finetune_function(self, pl_module, epoch, optimizer):
        pass


def test_the_settings_of_the_trainer(tmp_path, fits):
    """Those that shape the training are the user's."""
    trainer = trainer_of(
        tmp_path,
        pcv(epochs=0.5),
        Finetuning(),
        ModelCheckpoint(tmp_path),
        max_epochs=4,
        accumulate_grad_batches=2,
        gradient_clip_val=0.1,
        gradient_clip_algorithm="value",
        limit_train_batches=4,
        precision="bf16-mixed",
    )
    trainer.fit(pretrained(Watched), loader(DATA))
    for fit in fits[1:]:
        assert (fit["max_epochs"], fit["max_steps"], fit["accumulate"]) == (2, -1, 2)
        assert (fit["clip"], fit["limit"], fit["precision"]) == ((0.1, "value"), 2, "bf16-mixed")
        assert fit["callbacks"] == ["Finetuning", "Progress"]
        assert torch.equal(fit["after"]["body.0.weight"], fit["weights"]["body.0.weight"])
        assert not torch.equal(fit["after"]["fc.weight"], fit["weights"]["fc.weight"])


def test_a_fit_that_is_limited_by_steps(tmp_path, fits):
    trainer_of(tmp_path, pcv(), max_epochs=-1, max_steps=20).fit(pretrained(Watched), loader(DATA))
    assert [fit["steps"] for fit in fits] == [20, 10, 10, 10]  # half of the samples


def test_a_schedule_of_the_accumulation(tmp_path, fits):
    """Nested fits begin with what the user's began with."""
    schedule = GradientAccumulationScheduler({0: 1, 1: 4})
    trainer_of(tmp_path, pcv(num_splits=1), schedule, max_epochs=2).fit(pretrained(Watched), loader(DATA))
    assert [fit["accumulate"] for fit in fits] == [1, 1]
    assert [fit["steps"] for fit in fits] == [6 + 2, 3 + 1]


class OnPlateau(Watched):
    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.01)
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": "val_loss"}}


@pytest.mark.parametrize("datamodule", [False, True])
def test_a_schedule_that_watches_validation(tmp_path, fits, datamodule):
    """And then the user's validation data are used."""

    class Data(LightningDataModule):
        def train_dataloader(self):
            return loader(DATA)

        def val_dataloader(self):
            return loader(VAL, shuffle=False)

    OnPlateau.fits = fits
    data = {"datamodule": Data()} if datamodule else {"train_dataloaders": loader(DATA), "val_dataloaders": loader(VAL)}
    trainer_of(tmp_path, pcv(num_splits=1)).fit(pretrained(OnPlateau), **data)
    assert fits[1]["validates"] == 1.0


class Mapped(LightningDataModule):
    """Numbers its classes, scales its inputs on the device, and may be set up once."""

    def setup(self, stage):
        assert not hasattr(self, "data")
        self.data = TensorDataset(DATA.tensors[0] / 100, torch.searchsorted(torch.tensor(SEEN), DATA.tensors[1]))

    def train_dataloader(self):
        return loader(self.data)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return batch[0] * 100, batch[1]

    def teardown(self, stage):
        self.torn_down = getattr(self, "torn_down", 0) + 1


class MappedModule(Watched):
    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), torch.tensor(SEEN)[batch[1]])


def test_a_datamodule_and_a_class_map(tmp_path, fits):
    MappedModule.fits = fits
    plain, mapped, data = pcv(), pcv(), Mapped()
    torch.manual_seed(0)
    trainer_of(tmp_path, plain).fit(pretrained(Watched), loader(DATA))
    mapped.__init__(estimator="pcv", class_map=SEEN)
    torch.manual_seed(0)
    trainer_of(tmp_path, mapped).fit(pretrained(MappedModule), datamodule=data)
    assert mapped.result.gamma == pytest.approx(plain.result.gamma, abs=1e-3)
    assert data.torn_down == 1
    assert isinstance(data.train_dataloader(), DataLoader)


def test_nothing_is_written_or_logged_and_training_is_as_without(tmp_path):
    outcomes = []
    for name, callbacks in (("without", []), ("with", [pcv()])):
        torch.manual_seed(3)
        module, folder = pretrained(), tmp_path / name
        logger = CSVLogger(folder, name="log", version="")
        kept = ModelCheckpoint(folder, save_last=True)
        options = {"logger": logger, "log_every_n_steps": 1}
        trainer = trainer_of(folder, *callbacks, kept, **options)
        trainer.fit(module, loader(DATA), loader(VAL, shuffle=False))
        files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
        lines = (folder / "log" / "metrics.csv").read_text().splitlines()
        own = [line for line in lines if "gamma" not in line]
        state = weights(module.state_dict())
        losses = [trainer.logged_metrics["train_loss"], trainer.callback_metrics["val_loss"]]
        outcomes.append((files, state, torch.get_rng_state(), losses, module.training, len(own)))
    without, with_pcv = outcomes
    assert without[0] == with_pcv[0]
    assert all(torch.equal(without[1][key], with_pcv[1][key]) for key in without[1])
    assert torch.equal(without[2], with_pcv[2])
    assert (without[3], without[4]) == (with_pcv[3], with_pcv[4])


def test_finished_splits_are_kept(tmp_path, fits):
    module, callback = pretrained(Watched), pcv(folder=str(tmp_path / "splits"))
    torch.manual_seed(0)
    trainer_of(tmp_path, callback).fit(module, loader(DATA))
    assert len(fits) == 4
    assert sorted(path.name for path in (tmp_path / "splits").iterdir()) == [f"split_{k}.json" for k in range(3)]
    again = pcv(folder=str(tmp_path / "splits"))
    trainer_of(tmp_path, again).fit(pretrained(Watched), loader(DATA))
    assert len(fits) == 5
    assert again.result == callback.result
    with pytest.raises(ValueError, match=r"`folder` to be empty or of the same run, but .* another `max_epochs`"):
        trainer_of(tmp_path, pcv(folder=str(tmp_path / "splits")), max_epochs=1).fit(pretrained(), loader(DATA))


def run_and_die(folder: Path) -> None:
    """Die in the second nested fit; everything the fit saves is there by then."""

    class Dying(Plain):
        fits = 0

        def on_train_start(self):
            Dying.fits += 1
            if Dying.fits == 3:
                os.kill(os.getpid(), signal.SIGKILL)

    torch.manual_seed(0)
    checkpoints = ModelCheckpoint(folder, save_last=True)
    trainer_of(folder, pcv(folder=str(folder / "splits")), checkpoints).fit(pretrained(Dying), loader(DATA))


def test_killed_and_resumed(tmp_path, fits):
    """The fit is resumed with nothing left to train: the other splits are made from the weights that it began with."""
    script = f"from tests.callback.test_retraining import *\nrun_and_die(Path({str(tmp_path)!r}))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [path.name for path in (tmp_path / "splits").iterdir()] == ["split_0.json"]
    assert inspect_checkpoint(tmp_path / "last.ckpt")["calibrated"] is False
    module, callback = pretrained(Watched), pcv(folder=str(tmp_path / "splits"))
    trainer_of(tmp_path, callback).fit(module, loader(DATA), ckpt_path=tmp_path / "last.ckpt")
    assert len(fits) == 2  # nested, both
    for fit in fits:
        assert all(torch.equal(fit["weights"][key], value) for key, value in pretrained_weights().items())
    whole = pcv()
    torch.manual_seed(0)
    trainer_of(tmp_path, whole).fit(pretrained(), loader(DATA))
    assert callback.result.gamma == pytest.approx(whole.result.gamma, rel=1e-5)
    assert get_gamma(module) == pytest.approx(whole.result.gamma, rel=1e-5)


class Interrupting(Plain):
    fits = 0

    def on_train_start(self):
        Interrupting.fits += 1
        if Interrupting.fits == 2:
            signal.raise_signal(signal.SIGINT)


def test_interrupted(tmp_path):
    """Ctrl-C ends all of it, and leaves the model as training made it."""
    module, callback = pretrained(Interrupting), pcv()
    handler = signal.getsignal(signal.SIGINT)
    try:
        with (
            pytest.warns(UserWarning, match="interrupted: the model and its checkpoints are not calibrated"),
            pytest.raises(SystemExit),
        ):
            trainer_of(tmp_path, callback).fit(module, loader(DATA))
    finally:
        signal.signal(signal.SIGINT, handler)
    assert (callback.result, get_gamma(module), Interrupting.fits) == (None, None, 2)
    assert callback._retraining._module is None


def test_what_it_will_cost_is_said(tmp_path, caplog, capsys):
    caplog.set_level("INFO")
    trainer = trainer_of(tmp_path, pcv(), enable_progress_bar=True)
    trainer.fit(pretrained(), loader(DATA))
    assert "3 more trainings, on 50 %, 50 %, 50 % of the 48 samples. Each trains as long as 2 epochs" in caplog.text
    assert "/18 [" in capsys.readouterr().err  # three fits of two epochs of three batches
    assert caplog.text.count("GPU available") == 1
    before, _ = caplog.text.split("`Trainer.fit` stopped")
    assert "'pcv') will train 3 more models when this fit has ended" in before
    assert "about 1.5 times as long as this fit again" in before


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


def test_several_processes(tmp_path):
    trainer = trainer_of(tmp_path, pcv(), devices=2, strategy="ddp_spawn")
    assert trainer.world_size == 2
    with pytest.raises(RuntimeError, match=r"with one device for the estimator 'pcv'.* but got 2"):
        trainer.callbacks[0].setup(trainer, pretrained(), "fit")


WEIGHTS = torch.arange(48.0)


@pytest.mark.parametrize(
    ("make", "number"),
    [
        (lambda: DataLoader(DATA, 8, shuffle=True), 24),
        (lambda: DataLoader(DATA, 8), 24),
        (lambda: DataLoader(DATA, 5, shuffle=True, drop_last=True), 20),
        (lambda: DataLoader(DATA, 40, shuffle=True, drop_last=True), 24),
        (lambda: DataLoader(DATA, 8, sampler=SubsetRandomSampler(range(0, 48, 2))), None),
        (lambda: DataLoader(DATA, 8, sampler=RandomSampler(DATA, replacement=True, num_samples=96)), 48),
        (lambda: DataLoader(DATA, 8, sampler=WeightedRandomSampler(WEIGHTS.tolist(), 40)), None),
        (lambda: DataLoader(DATA, None, shuffle=True, collate_fn=lambda item: (item[0][None], item[1][None])), 24),
    ],
)
def test_restricted_loaders(make, number):
    """Samples of the classes, as many and drawn as the loader draws them."""
    data = RestrictedData({"a": make(), "b": [make()]}, BatchReader())
    loaders, share = data.of_classes([0, 4])
    assert loaders.keys() == {"a", "b"}
    assert isinstance(loaders["b"], list)
    (restricted,) = loaders["b"]
    torch.manual_seed(0)
    epochs = [torch.cat([y for _, y in restricted]) for _ in range(2)]
    assert set(epochs[0].tolist()) == {0, 4}
    if number is not None:
        assert [len(epoch) for epoch in epochs] == [number, number]
        assert share == 0.5
    shuffles = not isinstance(make().sampler, torch.utils.data.SequentialSampler)
    assert torch.equal(*epochs) is not shuffles
    inputs = torch.cat([x for x, _ in restricted])
    assert all((row == DATA.tensors[0]).all(1).any() for row in inputs)


class SetUpOnce(Watched):
    """Builds its head anew whenever it is set up."""

    def setup(self, stage):
        self.fc = nn.Linear(16, 6)
        self.load_state_dict(pretrained_weights())

    def teardown(self, stage):
        assert self.trainer is not None
        type(self).torn_down = getattr(type(self), "torn_down", 0) + 1


def test_a_module_is_set_up_and_torn_down_once(tmp_path, fits):
    SetUpOnce.fits = fits
    module, callback = SetUpOnce(), pcv()
    trainer_of(tmp_path, callback).fit(module, loader(DATA))
    assert callback.result.gamma == pytest.approx(sum(_reference(fits[1:])) / 3, abs=1e-4)
    assert SetUpOnce.torn_down == 1


def test_frozen_modules_stay_frozen(tmp_path, fits):
    module = pretrained(Watched)
    module.body[1].eval()
    trainer_of(tmp_path, pcv()).fit(module, loader(DATA))
    assert all(fit["after"]["body.1.num_batches_tracked"] == 30 for fit in fits)  # those of pre-training


class Spy(Callback):
    """What the user's own callbacks see of a fit."""

    def __init__(self):
        self.starts = 0

    def on_train_start(self, trainer, pl_module):
        self.starts += 1


def test_the_users_callbacks_see_one_fit(tmp_path):
    spy = Spy()
    trainer = trainer_of(tmp_path, pcv(), spy)
    state = copy.copy(trainer.callbacks)
    trainer.fit(pretrained(), loader(DATA))
    assert spy.starts == 1
    assert set(map(id, trainer.callbacks)) == set(map(id, state))
    assert json.dumps(trainer.current_epoch) == "2"
