"""What a module or another callback logs is theirs, under whatever name, in whatever hook and order."""

from __future__ import annotations

import csv
import warnings

import lightning.pytorch
import pytest
import pytorch_lightning
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torchmetrics import MeanMetric

from lightning_calibft import AbsentClassCalibration
from lightning_calibft.callback.metric_log import _names_of_others
from lightning_calibft.metrics import absent_class_metrics
from tests.callback.measures import HARD, Measures, logged, val_loader
from tests.helpers.runs import (
    NUM_CLASSES,
    SEEN,
    Plain,
    assert_same,
    blobs,
    loader,
    pretrained,
    quiet,
    read,
    trainer_of,
    without_calibration,
)

pytestmark = quiet

NAMES = ["val_ausuc", "val_acc_all", "val_acc_seen", "val_acc_absent", "val_acc_harmonic"]
SCORES = [0.3, 0.9, 0.5, 0.2, 0.1, 0.1]  # of the epochs; the second is the best


class Logs:
    """Logs a score of its own in one hook of validation (or training), from one epoch on, by one way."""

    hooks = (
        "on_validation_start",
        "on_validation_epoch_start",
        "on_validation_batch_start",
        "on_validation_batch_end",
        "on_validation_epoch_end",
        "on_train_epoch_end",
    )

    def __init__(self, name, hook, first=0, **kwargs):
        self.name, self.hook, self.first, self.kwargs = name, hook, first, kwargs

    def log(self, hook, trainer, module):
        if hook == self.hook and trainer.current_epoch >= self.first:
            score = SCORES[min(trainer.current_epoch, 5)]
            module.log_dict({self.name: score, "other": score}, batch_size=8, **self.kwargs)


class Module(Plain):
    """Its learning rate follows its score."""

    def __init__(self, logs=None, name="val_loss"):
        super().__init__()
        self.logs, self.name = logs, name

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        super().validation_step(batch, batch_idx)
        self.say("validation_step")

    def training_step(self, batch, batch_idx):
        self.say("training_step")
        return super().training_step(batch, batch_idx)

    def say(self, hook):
        if self.logs is not None:
            self.logs.log(hook, self.trainer, self)

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode="max", patience=0, factor=0.1)
        config = {"scheduler": schedule, "monitor": self.name, "strict": False}
        return {"optimizer": optimizer, "lr_scheduler": config}


class Other(Callback):
    def __init__(self, logs):
        self.logs = logs


def _hook_of(hook):
    def call_module(self, *args, **kwargs):
        self.say(hook)

    def call_callback(self, trainer, pl_module, *args, **kwargs):
        self.logs.log(hook, trainer, pl_module)

    setattr(Module, hook, call_module)
    setattr(Other, hook, call_callback)


for each in Logs.hooks[1:]:
    _hook_of(each)
Other.on_validation_start = lambda self, trainer, pl_module: self.logs.log("on_validation_start", trainer, pl_module)


class Spy(Callback):
    """What other callbacks and loggers see of the names that the user logs."""

    def __init__(self, names):
        self.names, self.met = names, []

    def note(self, trainer, pl_module):
        for metrics in (trainer.callback_metrics, trainer.logged_metrics, trainer.progress_bar_metrics):
            self.met.append({key: value for key, value in metrics.items() if key.split("/")[0] in self.names})
        self.met.append([group["lr"] for group in trainer.optimizers[0].param_groups])

    on_validation_end = on_train_epoch_end = on_train_end = note


def values_of(logger):
    with open(logger.experiment.metrics_file_path) as file:
        return [row for row in csv.DictReader(file)]


def run(folder, callback, logs, by="module", loaders=1, monitor=None, **kwargs):
    """Fit, validate and read everything that the user's names decide."""
    monitor = monitor or logs.name
    module = pretrained(Module)
    module.name = monitor
    module.logs = logs if by == "module" else None
    spy = Spy({logs.name, "other"})
    others = [] if by == "module" else [Other(logs)]
    calibration = [] if callback is None else [callback]
    checkpoint = ModelCheckpoint(folder, "{epoch}", monitor=monitor, mode="max", save_top_k=2)
    stop = EarlyStopping(monitor, mode="max", patience=3, strict=False, check_on_train_epoch_end=False)
    order = [*others, *calibration] if by == "callback before" else [*calibration, *others]
    logger = CSVLogger(folder / "log")
    options = {"max_epochs": 6, "logger": logger, "log_every_n_steps": 1, **kwargs}
    trainer = trainer_of(folder, spy, *order, stop, checkpoint, **options)
    torch.manual_seed(0)
    data = [val_loader(), loader(blobs([*SEEN, 1, 4], each=5, seed=7), shuffle=False)][:loaders]
    trainer.fit(module, loader(), data)
    files = {path.name: without_calibration(read(path)) for path in sorted(folder.glob("*.ckpt"))}
    names = spy.names
    table = [{key: row[key] for key in row if key.split("/")[0] in names and row[key]} for row in values_of(logger)]
    returned = trainer.validate(module, data, verbose=False)
    returned = [{key: value for key, value in each.items() if key.split("/")[0] in names} for each in returned]
    best = checkpoint.best_model_path.removeprefix(str(folder)), checkpoint.best_model_score
    return [spy.met, files.keys(), [(dict(each["state_dict"]), each["lr_schedulers"]) for each in files.values()],
            best, trainer.current_epoch, [row for row in table if row], returned], trainer


def told(met):
    return [str(each.message) for each in met if "does not log" in str(each.message)]


def compare(tmp_path, logs, by="module", callback=None, left_out=None, **kwargs):
    """The run is the same with the callback, which says once that it leaves out the name."""
    plain, _ = run(tmp_path / "plain", None, logs, by, **kwargs)
    with warnings.catch_warnings(record=True) as met:
        warnings.simplefilter("always")
        calibrated, trainer = run(tmp_path / "with", callback or AbsentClassCalibration(), logs, by, **kwargs)
    assert_same(plain, calibrated)
    said = told(met)
    assert len(said) == (left_out is None or bool(left_out))
    if said:
        assert f"does not log '{left_out or logs.name}', because" in said[0]
        assert "metric_prefix" in said[0]
    return trainer


BY = ["module", "callback before", "callback after"]


@pytest.mark.parametrize("by", BY)
@pytest.mark.parametrize("hook", ["validation_step", *Logs.hooks])
@pytest.mark.parametrize("sanity", [0, 2])
def test_a_name_is_theirs_in_every_hook(hook, by, sanity, tmp_path):
    if hook == ("on_validation_start" if by == "module" else "validation_step"):
        pytest.skip("there is no such hook")
    trainer = compare(tmp_path, Logs("val_acc_seen", hook), by, num_sanity_val_steps=sanity)
    assert {"val_ausuc", "val_acc_all", "val_acc_absent"} < trainer.callback_metrics.keys()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("hook", ["validation_step", "on_validation_epoch_end"])
def test_each_name(name, hook, tmp_path):
    compare(tmp_path, Logs(name, hook), num_sanity_val_steps=0)


@pytest.mark.parametrize("by", BY)
@pytest.mark.parametrize("kwargs", [{"prog_bar": True}, {"on_step": True, "on_epoch": True}, {"on_step": True, "on_epoch": False}, {"logger": False}], ids=str)
def test_each_way_of_logging(kwargs, by, tmp_path):
    compare(tmp_path, Logs("val_acc_seen", "on_validation_batch_end", **kwargs), by, num_sanity_val_steps=0)


@pytest.mark.parametrize("by", BY)
@pytest.mark.parametrize("hook", ["on_validation_batch_end", "on_validation_epoch_end", "on_train_epoch_end"])
def test_a_name_that_is_logged_only_later(hook, by, tmp_path):
    compare(tmp_path, Logs("val_acc_seen", hook, first=2), by, monitor="val_loss")
