"""`estimator="pcv"`: nested fits of the user's own module, data and Trainer settings."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import BaseFinetuning, GradientAccumulationScheduler, ModelCheckpoint
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_calibft import AbsentClassCalibration, get_gamma, inspect_checkpoint
from tests.callback.retraining import ABSENT, DATA, SEEN, Watched, _reference, pcv, weights
from tests.helpers.runs import (
    VAL,
    blobs,
    loader,
    pretrained,
    pretrained_weights,
    quiet,
    read,
    split_state,
    trainer_of,
)

pytestmark = quiet


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
        # Else a job of SLURM would resume from the user's own file, and save over it.
        assert fit["folder"] != first["folder"]
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


def test_steps_that_did_not_limit_the_fit(tmp_path, fits):
    trainer_of(tmp_path, pcv(num_splits=1), max_epochs=2, max_steps=1000).fit(pretrained(Watched), loader(DATA))
    assert [fit["max_epochs"] for fit in fits] == [2, 2]


@pytest.mark.parametrize(("mode", "number"), [("min_size", 2), ("max_size", 6), ("max_size_cycle", 6)])
def test_the_mode_of_several_loaders(tmp_path, fits, mode, number):
    class Two(Watched):
        def on_train_batch_start(self, batch, batch_idx):
            parts = [part for part in batch.values() if part is not None]
            super().on_train_batch_start((None, torch.cat([y for _, y in parts])), batch_idx)

        def training_step(self, batch, batch_idx):
            return sum(self.loss(part) for part in batch.values() if part is not None)

    Two.fits = fits
    loaders = CombinedLoader({"a": loader(DATA, 8), "b": loader(blobs(SEEN, each=4, seed=5), 8)}, mode)
    trainer_of(tmp_path, pcv(num_splits=1), max_epochs=1).fit(pretrained(Two), loaders)
    assert [fit["batches"] for fit in fits] == [number, number // 2]


def test_a_compiled_module(tmp_path):
    """Its copies are trained, not the module itself."""
    states = []
    for callbacks in ([], [pcv(num_splits=1)]):
        torch.manual_seed(0)
        module = pretrained()
        trainer_of(tmp_path, *callbacks).fit(torch.compile(module, backend="eager"), loader(DATA))
        states.append(weights(module.state_dict()))
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


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
