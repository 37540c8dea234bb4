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
from torchmetrics import MeanMetric

from lightning_calibft import AbsentClassCalibration
from lightning_calibft.callback.metric_log import _names_of_others
from lightning_calibft.metrics import absent_class_metrics
from tests.callback.measures import Measures, logged, val_loader
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


def keys_of(logs):
    """What Lightning calls the names that a user logs: of each step and epoch, and of each loader."""
    names = [f"{name}{fork}" for name in (logs.name, "other") for fork in ("", "_step", "_epoch")]
    at_end = logs.hook.endswith("epoch_end")
    return {*names, *(f"{name}/dataloader_idx_{index}" for name in names for index in range(2) if not at_end)}


class Spy(Callback):
    """What other callbacks and loggers see of the names that the user logs."""

    def __init__(self, names, first):
        self.names, self.first, self.met = names, first, []

    def note(self, trainer, pl_module):
        if trainer.current_epoch < self.first:
            return
        for metrics in (trainer.callback_metrics, trainer.logged_metrics, trainer.progress_bar_metrics):
            self.met.append({key: value for key, value in metrics.items() if key in self.names})
        self.met.append([group["lr"] for group in trainer.optimizers[0].param_groups])

    on_validation_end = on_train_epoch_end = on_train_end = note


def values_of(logger):
    with open(logger.experiment.metrics_file_path) as file:
        return list(csv.DictReader(file))


def run(folder, callback, logs, by="module", loaders=1, monitor=None, **kwargs):
    """Fit, validate and read everything that the user's names decide."""
    monitor = monitor or logs.name
    module = pretrained(Module)
    module.name = monitor
    module.logs = logs if by == "module" else None
    first = logs.first + (logs.hook == "on_train_epoch_end")  # of the validations whose names are known
    spy = Spy(keys_of(logs), first)
    others = [] if by == "module" else [Other(logs)]
    calibration = [] if callback is None else [callback]
    checkpoint = ModelCheckpoint(folder, "{epoch}", monitor=monitor, mode="max", save_top_k=2)
    stop = EarlyStopping(monitor, mode="max", patience=3, strict=False, check_on_train_epoch_end=False)
    order = [*others, *calibration] if by == "callback before" else [*calibration, *others]
    logger = CSVLogger(folder / "log")
    options = {"max_epochs": 4, "logger": logger, "log_every_n_steps": 1, **kwargs}
    trainer = trainer_of(folder, spy, *order, stop, checkpoint, **options)
    torch.manual_seed(0)
    data = [val_loader(), loader(blobs([*SEEN, 1, 4], each=5, seed=7), shuffle=False)][:loaders]
    trainer.fit(module, loader(), data)
    files = {path.name: without_calibration(read(path)) for path in sorted(folder.glob("*.ckpt"))}
    names, rows = spy.names, [row for row in values_of(logger) if int(row["epoch"] or 9) >= first]
    table = [{key: row[key] for key in row if key in names and row[key]} for row in rows]
    returned = trainer.validate(module, data, verbose=False)
    returned = [{key: value for key, value in each.items() if key in names} for each in returned]
    best = checkpoint.best_model_path.removeprefix(str(folder)), checkpoint.best_model_score
    return [
        spy.met,
        files.keys(),
        [(dict(each["state_dict"]), each["lr_schedulers"]) for each in files.values()],
        best,
        trainer.current_epoch,
        [row for row in table if row],
        returned,
    ], trainer


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
HOOKS = [("validation_step", "module")]
HOOKS += [(hook, by) for hook in Logs.hooks for by in BY if (hook, by) != ("on_validation_start", "module")]


@pytest.mark.parametrize(("hook", "by"), HOOKS)
def test_a_name_is_theirs_in_every_hook(hook, by, tmp_path):
    monitor = "val_loss" if hook == "on_train_epoch_end" else None  # it comes after the first validation
    trainer = compare(tmp_path, Logs("val_acc_seen", hook), by, monitor=monitor, num_sanity_val_steps=0)
    assert {"val_ausuc", "val_acc_all", "val_acc_absent"} < trainer.callback_metrics.keys()


@pytest.mark.parametrize("name", NAMES)
def test_each_name(name, tmp_path):
    compare(tmp_path, Logs(name, "on_validation_epoch_end"))


def test_the_name_of_gamma(tmp_path):
    callback = AbsentClassCalibration(refresh_on_validation=True)
    compare(tmp_path, Logs("val_gamma", "validation_step"), callback=callback)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"prog_bar": True, "on_step": True, "on_epoch": True},
        {"on_step": True, "on_epoch": False},
        {"logger": False},
    ],
    ids=str,
)
def test_each_way_of_logging(kwargs, tmp_path):
    monitor = None if kwargs.get("on_epoch", True) else "val_loss"
    logs = Logs("val_acc_seen", "on_validation_batch_end", **kwargs)
    compare(tmp_path, logs, monitor=monitor, num_sanity_val_steps=0)


def test_a_metric_object(tmp_path):
    class Scores(Module):
        def __init__(self):
            super().__init__()
            self.score = MeanMetric()

        def validation_step(self, batch, batch_idx):
            self.score(self.loss(batch))
            self.log("val_ausuc", self.score)

    met = []
    for callback in ([], [AbsentClassCalibration()]):
        module = pretrained(Scores)
        trainer = trainer_of(tmp_path, *callback, num_sanity_val_steps=0)
        torch.manual_seed(0)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            trainer.fit(module, loader(), val_loader())
        met.append(trainer.callback_metrics["val_ausuc"])
    assert len(told(said)) == 1
    assert torch.equal(*met)


@pytest.mark.parametrize("by", BY)
@pytest.mark.parametrize("hook", ["validation_step", "on_validation_epoch_end"])
def test_a_name_that_is_logged_only_later(hook, by, tmp_path):
    hook = "on_validation_batch_end" if by != "module" and hook == "validation_step" else hook
    compare(tmp_path, Logs("val_acc_seen", hook, first=2), by, monitor="val_loss")


@pytest.mark.parametrize(
    ("hook", "left_out"),
    [
        ("validation_step", "val_acc_seen/dataloader_idx_0', 'val_acc_seen/dataloader_idx_1"),
        ("on_validation_epoch_end", ""),  # ours have other names
    ],
)
def test_several_loaders(hook, left_out, tmp_path):
    logs = Logs("val_acc_seen", hook)
    monitor = "val_acc_seen/dataloader_idx_1" if left_out else "val_acc_seen"
    trainer = compare(tmp_path, logs, left_out=left_out, loaders=2, monitor=monitor, num_sanity_val_steps=0)
    assert "val_acc_absent/dataloader_idx_1" in trainer.callback_metrics


def test_a_name_that_is_logged_in_training(tmp_path):
    trainer = compare(tmp_path, Logs("val_acc_seen", "training_step"))
    assert "val_acc_absent" in trainer.callback_metrics


def test_val_acc_is_not_ours(tmp_path):
    for hook in ("validation_step", "on_validation_epoch_end"):
        compare(tmp_path / hook, Logs("val_acc", hook), left_out="", num_sanity_val_steps=0)


class Scored(Measures):
    """Logs the collection by itself, as the README shows."""

    def build(self, dropout):
        super().build(dropout)
        self.metrics = absent_class_metrics(NUM_CLASSES, SEEN, prefix="val_")

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.metrics.update(self(batch[0]), batch[1])

    def on_validation_epoch_end(self):
        self.log_dict(self.metrics.compute())
        self.metrics.reset()


def test_with_a_prefix_both_are_logged(tmp_path):
    module, logger = pretrained(Scored), CSVLogger(tmp_path)
    callback = AbsentClassCalibration(metric_prefix="calibft_", refresh_on_validation=True)
    trainer = trainer_of(tmp_path, callback, logger=logger, log_every_n_steps=1)
    with warnings.catch_warnings(record=True) as met:
        warnings.simplefilter("always")
        trainer.fit(module, loader(), val_loader())
    assert not told(met)
    values = logged(trainer, "val")
    assert values.keys() == set(NAMES)
    assert logged(trainer, "calibft") == pytest.approx(
        {f"calibft_{name}": value for name, value in values.items()} | {"calibft_val_gamma": callback.result.gamma}
    )
    last = values_of(logger)[-1]
    assert {"calibft_gamma", "calibft_gamma_standard_error", "calibft_val_acc_seen_calibrated"} < last.keys()
    assert not {"gamma", "val_acc_seen_calibrated"} & last.keys()


@pytest.mark.parametrize("hook", ["test_step", "on_test_epoch_end"])
def test_the_names_of_a_test(hook, tmp_path):
    class Tests(Plain):
        def test_step(self, batch, batch_idx):
            self.loss(batch)
            if hook == "test_step":
                self.log("test_ausuc", 0.25, batch_size=8)

        def on_test_epoch_end(self):
            if hook == "on_test_epoch_end":
                self.log("test_ausuc", 0.25)

    module, callback = pretrained(Tests), AbsentClassCalibration(SEEN)
    with warnings.catch_warnings(record=True) as met:
        warnings.simplefilter("always")
        (values,) = trainer_of(tmp_path, callback).test(module, val_loader(), verbose=False)
    assert values["test_ausuc"] == 0.25
    assert {"test_acc_all", "test_acc_seen", "test_acc_absent", "test_acc_harmonic"} < values.keys()
    assert len(told(met)) == 1


def test_the_names_of_the_last_values(tmp_path):
    class Focal(Plain):
        def training_step(self, batch, batch_idx):
            self.log("gamma", 2.0)
            return super().training_step(batch, batch_idx)

    logger = CSVLogger(tmp_path)
    trainer = trainer_of(tmp_path, AbsentClassCalibration(), logger=logger, log_every_n_steps=1)
    with pytest.warns(UserWarning, match="does not log 'gamma', because"):
        trainer.fit(pretrained(Focal), loader(), val_loader())
    assert {row["gamma"] for row in values_of(logger)} <= {"2.0", ""}
    assert values_of(logger)[-1]["gamma_standard_error"]


def test_an_evaluation_after_one_that_failed_in_a_later_loader(tmp_path):
    class Fails(Plain):
        fails = False

        def validation_step(self, batch, batch_idx, dataloader_idx):
            super().validation_step(batch, batch_idx)
            if self.fails and dataloader_idx == 1:
                raise ArithmeticError

    module, data = pretrained(Fails), [val_loader(), val_loader()]
    trainer = trainer_of(tmp_path, AbsentClassCalibration(SEEN))
    first = trainer.validate(module, data, verbose=False)
    module.fails = True
    with pytest.raises(ArithmeticError):
        trainer.validate(module, data, verbose=False)
    module.fails = False
    assert trainer.validate(module, data, verbose=False) == first
    assert "val_ausuc/dataloader_idx_1" in first[0]


@pytest.mark.parametrize("package", [lightning.pytorch, pytorch_lightning])
def test_what_lightning_keeps_of_what_is_logged(package, tmp_path):
    """The names are read from a private collection of Lightning's."""

    class Module(package.LightningModule):
        def __init__(self):
            super().__init__()
            self.fc = torch.nn.Linear(5, NUM_CLASSES)
            self.score = MeanMetric()

        def validation_step(self, batch, batch_idx, dataloader_idx):
            self.score(batch[1])
            self.log("object", self.score)
            self.log("in_step", 1.0, on_step=True, on_epoch=True)
            self.log(f"without_{dataloader_idx}", 1.0, add_dataloader_idx=False)

        def on_validation_epoch_end(self):
            self.log("at_end", 1.0)

    trainer = package.Trainer(
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        accelerator="cpu",
        default_root_dir=tmp_path,
    )
    trainer.validate(Module(), [val_loader(), val_loader()], verbose=False)
    names = {f"{name}/dataloader_idx_{index}" for name in ("object", "in_step") for index in range(2)}
    assert _names_of_others((trainer.validate_loop._results,)) == {*names, "without_0", "without_1", "at_end"}
