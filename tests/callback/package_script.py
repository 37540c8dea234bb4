"""Uses the callback with one package of Lightning, which is imported after it, as in a script with sorted imports.

Usage: python -m tests.callback.package_script PACKAGE REFUSED FOLDER

REFUSED is the name of a package that is as if it were not installed, or "nothing".
"""

from __future__ import annotations

import copy
import pickle
import sys
from importlib import import_module

import torch.nn.functional as F
from torch import nn, optim, randn, tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_calibft import AbsentClassCalibration, CalibrationDiagnostics, get_gamma, load_calibrated

NAMES = {"lightning": "lightning.pytorch", "pytorch_lightning": "pytorch_lightning"}


class Own(AbsentClassCalibration):
    """Derives before there is a package to derive from."""


class Refuse:
    def __init__(self, refused):
        self.refused = refused

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == self.refused:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def make_module_class(pl):
    class Net(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 6)

        def forward(self, x):
            return self.fc(x)

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self(batch[0]), batch[1])

        def validation_step(self, batch, batch_idx):
            self.log("val_loss", self.training_step(batch, batch_idx))

        def configure_optimizers(self):
            return optim.SGD(self.parameters(), 0.1)

    return Net


def fit_with(callback, pl, folder):
    inputs = randn(24, 4)
    train = DataLoader(TensorDataset(inputs, tensor([0, 1, 2] * 8)), 8)
    val = DataLoader(TensorDataset(inputs, tensor([0, 1, 2, 3] * 6)), 8)
    module_class = make_module_class(pl)
    module = module_class()
    assert isinstance(callback, pl.Callback)
    trainer = pl.Trainer(
        callbacks=callback, accelerator="cpu", max_epochs=1, enable_progress_bar=False, default_root_dir=folder
    )
    trainer.fit(module, train, val)
    if isinstance(callback, AbsentClassCalibration):
        loaded = load_calibrated(module_class, trainer.checkpoint_callback.best_model_path)
        assert get_gamma(loaded) == get_gamma(module) == tensor(callback.result.gamma).item()


def run_command_lines(package, module_class):
    cli = import_module(f"{package}.cli")

    class CLI(cli.LightningCLI):
        def add_arguments_to_parser(self, parser):
            parser.add_lightning_class_args(AbsentClassCalibration, "calibration")

    def callbacks(kind, word):
        sys.argv = ["run.py", word]
        return kind(module_class, run=False, save_config_callback=None).trainer.callbacks

    ours = ("lightning_calibft.AbsentClassCalibration", "lightning_calibft.callback.CalibrationDiagnostics")
    for path in (*ours, "__main__.Own"):
        made = callbacks(cli.LightningCLI, f"--trainer.callbacks={path}")
        assert path.split(".")[-1] in [type(each).__name__ for each in made]
    made = callbacks(CLI, "--calibration.max_samples=9")
    assert [each.max_samples for each in made if isinstance(each, AbsentClassCalibration)] == [9]


def main(package, refused, folder):
    sys.meta_path.insert(0, Refuse(refused))
    early = AbsentClassCalibration([0, 1, 2], estimator="pcv", estimator_kwargs={"num_splits": 2})
    pickled = pickle.loads(pickle.dumps(early))
    assert not [name for name in NAMES if name in sys.modules]

    pl = import_module(package)
    for callback in (early, pickled, copy.deepcopy(early), Own(), CalibrationDiagnostics([0, 1, 2])):
        fit_with(callback, pl, folder)
    run_command_lines(package, make_module_class(pl))

    (other,) = {*NAMES} - {package.split(".")[0]}
    assert other not in sys.modules
    if refused != other:  # and then there are both
        fit_with(early, import_module(NAMES[other]), folder)
        fit_with(early, pl, folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
