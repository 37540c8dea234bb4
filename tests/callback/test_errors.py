"""What cannot work is said with a remedy, before training where it can be known, and leaves nothing behind."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import pytorch_lightning
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_calibft import AbsentClassCalibration, fold_checkpoint, get_gamma
from lightning_calibft.metrics import AverageLogitGap
from tests.runs import (
    ABSENT,
    MASK,
    NUM_CLASSES,
    OFFSET,
    SEEN,
    TRAIN,
    VAL,
    Plain,
    assert_calibrated,
    blobs,
    loader,
    pretrained,
    quiet,
    read,
    split_state,
    trainer_of,
)

pytestmark = quiet
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"estimator": "platt"}, ValueError, "`estimator` to be one of 'alg' or a metric, but got 'platt'"),
        ({"estimator": 3}, TypeError, "`estimator` to be a name or a torchmetrics Metric"),
        ({"absent_classes": ABSENT}, ValueError, "`seen_classes` beside `absent_classes`, but got None. Give both"),
        ({"max_samples": 0}, ValueError, "`max_samples` to be at least 1, but got 0"),
        ({"unpack_batch": "no.such.function"}, ValueError, "`unpack_batch` to be the import path of a function"),
        ({"unpack_batch": "function"}, ValueError, "`unpack_batch` to be the import path of a function"),
        ({"unpack_batch": 3}, TypeError, "`unpack_batch` to be a function, but got 3"),
        (
            {"estimator": AverageLogitGap(6, SEEN), "seen_classes": SEEN},
            ValueError,
            "`absent_classes` to be None beside an `estimator`",
        ),
    ],
)
def test_arguments(arguments, error, text):
    with pytest.raises(error, match=text):
        AbsentClassCalibration(**arguments)


def assert_refused(folder, callback, error, text, make=Plain, data=None):
    """Fitting raises before a step is done; return whether the module has the keys that it had."""
    module = make()
    keys = list(module.state_dict())
    trainer = trainer_of(folder, callback)
    with pytest.raises(error, match=text):
        trainer.fit(module, data or loader())
    assert trainer.global_step == 0
    assert get_gamma(module) is None
    return keys == list(module.state_dict())


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"seen_classes": [0, 6]}, ValueError, r"`seen_classes` to hold class ids in \[0, 6\), but got 6"),
        ({"seen_classes": [0, -1]}, ValueError, r"`seen_classes` to hold class ids in \[0, 6\), but got -1"),
        ({"seen_classes": [0, 2, 0]}, ValueError, "`seen_classes` to hold each class once, but 0 repeat"),
        ({"seen_classes": [True, False]}, TypeError, "`seen_classes` to hold integers, but got True"),
        ({"seen_classes": [0.0, 1.0]}, TypeError, "`seen_classes` to hold integers, but got 0.0"),
        ({"seen_classes": list(range(6))}, ValueError, "`seen_classes` to leave out at least one of the 6 classes"),
        ({"seen_classes": [2]}, ValueError, "`seen_classes` to hold at least 2 classes, but got 1"),
        ({"seen_classes": []}, ValueError, "`seen_classes` to name at least one class"),
        ({"seen_classes": [0, 2], "absent_classes": [2, 3]}, ValueError, "share no class, but both hold 2"),
        ({"seen_classes": [0, 2], "absent_classes": []}, ValueError, "`absent_classes` to name at least one class"),
        ({"estimator": AverageLogitGap(7, SEEN)}, ValueError, "`estimator` to be made for the 6 classes of the head"),
    ],
)
def test_classes_are_checked_against_the_head(arguments, error, text, tmp_path):
    assert assert_refused(tmp_path, AbsentClassCalibration(**arguments), error, text)


class Auxiliary(Plain):
    """What is called fc is not what decides."""

    def build(self, dropout):
        super().build(dropout)
        self.real = nn.Linear(16, NUM_CLASSES)

    def forward(self, x):
        return self.real(self.body(x)) + 0 * self.fc(self.body(x))


class TwoHeads(Plain):
    def build(self, dropout):
        self.body, self.head, self.fc = nn.Linear(5, 16), nn.Linear(16, 6), nn.Linear(16, 6)

    def forward(self, x):
        return self.head(self.body(x))


class Scaled(Plain):
    def forward(self, x):
        return super().forward(x) / 2


class InTheModule(Plain):
    """Neither ``forward`` nor one part of it maps inputs to logits."""

    forward = LightningModule.forward

    def loss(self, batch):
        return F.cross_entropy(self.fc(self.body(batch[0])), batch[1])


class NoHead(Plain):
    def build(self, dropout):
        self.body = nn.Conv1d(1, 6, 5)

    def forward(self, x):
        return self.body(x[:, None]).flatten(1)


@pytest.mark.parametrize(
    ("make", "arguments", "text"),
    [
        (Auxiliary, {}, r"head 'fc' of Auxiliary to give the logits.*The head is 'real': pass `head=\"real\"`"),
        (TwoHeads, {}, "several modules that could be the classification head: .*'head'"),
        (TwoHeads, {"head": "fc"}, r"The head is 'head': pass `head=\"head\"`"),
        (Scaled, {}, "moves them by 0.5 times"),
        (InTheModule, {}, "Expected InTheModule to define `forward`"),
        (NoHead, {}, "Found no classification head in NoHead"),
        (Plain, {"head": "net.fc"}, "`head` to name a module of Plain, but got 'net.fc'"),
        (Plain, {"head": "body.1"}, "`head` to be a Linear, a 1x1 Conv2d"),
    ],
)
def test_the_head(make, arguments, text, tmp_path):
    assert_refused(tmp_path, AbsentClassCalibration(**arguments), ValueError, text, make)


@pytest.mark.parametrize("arguments", [{}, {"seen_classes": SEEN}], ids=["inferred", "given"])
@pytest.mark.parametrize(
    ("data", "error", "text"),
    [
        (
            TensorDataset(TRAIN.tensors[0], F.one_hot(TRAIN.tensors[1], 6).float()),
            TypeError,
            r"class ids, but got dtype torch.float32 with shape \(8, 6\): soft .*calibration_dataloader\(\)",
        ),
        (TensorDataset(TRAIN.tensors[0], F.one_hot(TRAIN.tensors[1], 6) > 0), TypeError, "got dtype torch.bool"),
        (TensorDataset(TRAIN.tensors[0], F.one_hot(TRAIN.tensors[1], 6)), ValueError, r"shape \(N,\), .* got \(8, 6\)"),
        (TensorDataset(*TRAIN.tensors, TRAIN.tensors[1]), ValueError, "got a list of 3 items. Pass `unpack_batch`"),
        (TRAIN.tensors[0], ValueError, "a pair .inputs, target. or a mapping, but got a Tensor. Pass `unpack_batch`"),
        ([{"x": x, "class": y} for x, y in TRAIN], ValueError, "under one of the keys label, labels, .* keys x, class"),
        ([(x, str(y)) for x, y in TRAIN], TypeError, "target of a batch to be a tensor, but got a"),
    ],
    ids=["soft", "multi_label", "one_hot", "triple", "no_pair", "no_target_key", "strings"],
)
def test_batches(data, error, text, arguments, tmp_path):
    assert_refused(tmp_path, AbsentClassCalibration(**arguments), error, text, data=loader(data))


class Hinge(Plain):
    """A loss that takes any label."""

    def loss(self, batch):
        return (self(batch[0]).square().sum(1) * batch[1]).mean()


@pytest.mark.parametrize("arguments", [{}, {"seen_classes": SEEN}], ids=["inferred", "given"])
@pytest.mark.parametrize("label", [6, -1])
def test_labels_outside_of_the_head(label, arguments, tmp_path):
    x, y = TRAIN.tensors
    data = loader(TensorDataset(x, torch.where(y == 3, label, y)))
    with pytest.raises(ValueError, match=r"class ids in \[0, 6\), rows of the classification head, but") as error:
        trainer_of(tmp_path, AbsentClassCalibration(**arguments), max_epochs=1).fit(module := pretrained(Hinge), data)
    assert "calibration_dataloader()" in str(error.value)
    assert get_gamma(module) is None


def test_labels_that_the_loss_ignores(tmp_path):
    x, y = TRAIN.tensors
    module, callback = pretrained(), AbsentClassCalibration()
    keep = torch.arange(len(y)) % 5 > 0
    trainer_of(tmp_path, callback).fit(module, loader(TensorDataset(x, torch.where(keep, y, -100))))
    assert callback.result.num_samples == keep.sum()
    assert_calibrated(module.state_dict(), TensorDataset(x[keep], y[keep]))


def test_labels_of_classes_that_were_not_named(tmp_path):
    module, callback = pretrained(), AbsentClassCalibration(seen_classes=[0, 2], absent_classes=ABSENT)
    with pytest.warns(UserWarning, match="15 of 45 samples .* not of the `seen_classes` and were left out"):
        trainer_of(tmp_path, callback).fit(module, loader())
    keep = TRAIN.tensors[1] != 3
    assert_calibrated(module.state_dict(), TensorDataset(*(part[keep] for part in TRAIN.tensors)), seen=[0, 2])


@pytest.mark.parametrize(
    ("classes", "count"), [([*SEEN, *ABSENT], "6 of the 6"), ([2], "1 of the 6")], ids=["all_classes", "one_class"]
)
def test_nothing_to_calibrate(classes, count, tmp_path):
    module, callback = pretrained(), AbsentClassCalibration()
    checkpoints = ModelCheckpoint(tmp_path)
    with pytest.warns(UserWarning, match=f"holds {count} classes: .* so the model is not calibrated"):
        trainer_of(tmp_path, callback, checkpoints).fit(module, loader(blobs(classes)), loader(VAL, shuffle=False))
    assert callback.result is None
    assert split_state(module.state_dict())[1:] == (0.0, [])
    assert split_state(read(checkpoints.best_model_path)["state_dict"])[1:] == (0.0, [])


def test_training_that_diverged(tmp_path):
    class Diverges(Plain):
        def on_train_epoch_end(self):
            if self.current_epoch == 1:
                self.fc.bias.data[3] = float("nan")

    module, checkpoints = pretrained(Diverges), ModelCheckpoint(tmp_path, save_top_k=-1)
    with pytest.raises(ValueError, match=r"finite logits .* batch 0 has NaN.*Gamma stays unset"):
        trainer_of(tmp_path, AbsentClassCalibration(), checkpoints).fit(module, loader())
    assert get_gamma(module) is None
    assert split_state(read(checkpoints.best_model_path)["state_dict"])[1:] == (0.0, [])


def test_an_earlier_checkpoint_that_diverged_does_not_spoil_the_others(tmp_path):
    class Recovers(Plain):
        def on_train_epoch_start(self):
            if self.current_epoch > 0:
                self.fc.bias.data[3] = float("nan") if self.current_epoch == 1 else 0.0

        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) if self.current_epoch != 1 else None

    module, checkpoints = pretrained(Recovers), ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    trainer = trainer_of(tmp_path, AbsentClassCalibration(), checkpoints, max_epochs=3)
    with pytest.raises(RuntimeError, match=r"Could not calibrate the checkpoints .*epoch=1.ckpt.*batch 0 has NaN"):
        trainer.fit(module, loader())
    assert_calibrated(module.state_dict())
    for epoch in (0, 2):
        assert_calibrated(read(tmp_path / f"epoch={epoch}.ckpt")["state_dict"])
    assert split_state(read(tmp_path / "epoch=1.ckpt")["state_dict"])[1:] == (0.0, [])


def test_no_training_data(tmp_path):
    module = pretrained()
    with pytest.warns(UserWarning, match="found no training data: the model is not calibrated"):
        trainer_of(tmp_path, AbsentClassCalibration(), limit_train_batches=0).fit(module, loader())
    assert get_gamma(module) is None

    with pytest.raises(ValueError, match="data to hold samples of the seen classes, but got none"):
        trainer_of(tmp_path, AbsentClassCalibration()).fit(module, DataLoader([]))
    assert get_gamma(module) is None


@pytest.mark.parametrize("data", [[], DataLoader([])], ids=["no_batches", "no_samples"])
def test_an_empty_calibration_dataloader(data, tmp_path):
    class Module(Plain):
        def calibration_dataloader(self):
            return data

    text = "data to hold samples of the seen classes, but got none. Check the loader"
    assert_refused(tmp_path, AbsentClassCalibration(), ValueError, text, Module)


def test_the_other_lightning(tmp_path):
    trainer = pytorch_lightning.Trainer(
        default_root_dir=tmp_path, accelerator="cpu", logger=False, callbacks=[AbsentClassCalibration()], max_epochs=1
    )

    class Module(pytorch_lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(5, 6)

        training_step = Plain.training_step
        configure_optimizers = Plain.configure_optimizers

    with pytest.raises(TypeError, match=r"a trainer of the package `lightning`, but got pytorch_lightning\."):
        trainer.fit(Module(), loader())


def test_sharded_weights_are_refused(tmp_path, monkeypatch):
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK", "WORLD_SIZE", "NODE_RANK"):
        monkeypatch.setenv(name, "0")  # so that they are put back
        monkeypatch.delenv(name)
    try:
        text = r"does not support ModelParallelStrategy, which shards .* call `lightning_calibft.calibrate\("
        with pytest.raises(RuntimeError, match=text):
            trainer_of(tmp_path, AbsentClassCalibration(), strategy=ModelParallelStrategy()).fit(Plain(), loader())
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def test_a_folded_checkpoint_is_not_resumed(tmp_path):
    checkpoints = ModelCheckpoint(tmp_path)
    trainer_of(tmp_path, AbsentClassCalibration(), checkpoints).fit(pretrained(), loader())
    fold_checkpoint(checkpoints.best_model_path, tmp_path / "folded.ckpt")
    module = pretrained()
    with pytest.raises(ValueError, match=r"gamma is folded into the bias .* Resume from the checkpoint that it was"):
        trainer_of(tmp_path, AbsentClassCalibration(), max_epochs=3).fit(
            module, loader(), ckpt_path=tmp_path / "folded.ckpt"
        )
    # Testing it is fine.
    trainer = trainer_of(tmp_path, AbsentClassCalibration())
    trainer.test(module, loader(VAL, shuffle=False), ckpt_path=tmp_path / "folded.ckpt", verbose=False)


@pytest.mark.parametrize("thing", ["truncated", "foreign"])
def test_a_kept_file_that_cannot_be_read(thing, tmp_path):
    class Breaks(Callback):
        def on_fit_end(self, trainer, pl_module):
            path = tmp_path / "epoch=0.ckpt"
            path.write_bytes(path.read_bytes()[:-999] if thing == "truncated" else b"hello")

    module, checkpoints = pretrained(), ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    with pytest.raises(RuntimeError, match=r"Could not calibrate the checkpoints '[^']*epoch=0.ckpt': "):
        trainer_of(tmp_path, AbsentClassCalibration(), checkpoints, Breaks()).fit(module, loader())
    assert_calibrated(module.state_dict())
    assert_calibrated(read(tmp_path / "epoch=1.ckpt")["state_dict"])


def test_a_full_disk(tmp_path):
    """Files may not grow beyond a size that one of two checkpoints has."""
    script = """
        import resource, signal, sys, warnings
        from pathlib import Path
        warnings.simplefilter("ignore")
        from lightning.pytorch import Callback, LightningModule
        from tests.runs import *
        from lightning_calibft import AbsentClassCalibration

        folder = Path(sys.argv[1])

        class Full(Callback):
            def on_fit_end(self, trainer, pl_module):
                self.before = {path.name: path.read_bytes() for path in folder.iterdir()}
                small, large = len(self.before["small.ckpt"]), len(self.before["large.ckpt"])
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, ((small + large) // 2, resource.RLIM_INFINITY))

        full, module = Full(), pretrained()
        small = ModelCheckpoint(folder, "small", save_weights_only=True)
        large = ModelCheckpoint(folder, "large", "train_loss")
        trainer = trainer_of(folder, AbsentClassCalibration(), small, large, full)
        try:
            trainer.fit(module, loader())
        except RuntimeError as error:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            assert f"Could not calibrate the checkpoints '{folder}/large.ckpt': " in str(error), error
            assert "small.ckpt" not in str(error), error
            assert "`trainer.save_checkpoint` saves it with its gamma" in str(error), error
        else:
            raise AssertionError("nothing was raised")
        assert {path.name for path in folder.iterdir()} == {"small.ckpt", "large.ckpt"}
        assert (folder / "large.ckpt").read_bytes() == full.before["large.ckpt"]
        assert_calibrated(read(folder / "small.ckpt")["state_dict"])
        assert_calibrated(module.state_dict())
        trainer.save_checkpoint(folder / "remedy.ckpt")
        assert_calibrated(read(folder / "remedy.ckpt")["state_dict"])
        print("as expected")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), tmp_path], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert "as expected" in done.stdout, done.stderr


def test_remote_checkpoints_stay_without_gamma(tmp_path):
    checkpoints = ModelCheckpoint("memory://kept")
    module, callback = pretrained(), AbsentClassCalibration()
    with pytest.warns(UserWarning, match="local files only: memory://kept/.* `trainer.save_checkpoint`"):
        trainer_of(tmp_path, callback, checkpoints).fit(module, loader())
    assert not callback.checkpoint_results
    assert_calibrated(module.state_dict())


def test_an_interrupted_run_is_not_calibrated(tmp_path):
    class Interrupts(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                raise KeyboardInterrupt

    module = pretrained()
    text = "interrupted: the model and its checkpoints are not calibrated"
    with pytest.warns(UserWarning, match=text), pytest.raises((KeyboardInterrupt, SystemExit)):
        trainer_of(tmp_path, AbsentClassCalibration(), Interrupts()).fit(module, loader())
    assert get_gamma(module) is None


def test_an_error_of_the_user_leaves_the_module_usable(tmp_path):
    class Fails(Plain):
        def training_step(self, batch, batch_idx):
            raise RuntimeError("mine")

    module, callback = Fails(), AbsentClassCalibration()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="mine"):
            trainer_of(tmp_path, callback).fit(module, loader())
    assert get_gamma(module) is None
    assert list(module.state_dict())[-2:] == [f"fc.{OFFSET}", f"fc.{MASK}"]
