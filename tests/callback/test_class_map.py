"""Runs whose batches have the numbers of folders as labels, and whose loss maps them to rows."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import TensorDataset

from lightning_calibft import AbsentClassCalibration
from lightning_calibft.metrics import AverageLogitGap
from tests.helpers.runs import (
    SEEN,
    TRAIN,
    VAL,
    Plain,
    assert_calibrated,
    assert_same,
    loader,
    pretrained,
    quiet,
    read,
    trainer_of,
)

pytestmark = quiet

ROWS = [3, 0, 2, 5, 1, 4]  # of folders 0 to 5; the fine-tuning data has the first three
NAMES = ["ant", "bee", "cat", "cow", "dog", "eel"]


def folders(dataset):
    """The same samples, labeled as ``ImageFolder`` numbers them."""
    x, rows = dataset.tensors
    return TensorDataset(x, torch.tensor(ROWS).argsort()[rows])


class Folders(Plain):
    """Maps labels itself, as everybody has to whose head has more rows than the data has folders."""

    def loss(self, batch):
        x, y = batch
        return F.cross_entropy(self(x), torch.tensor(ROWS)[y])


def fit(folder, module, train, val=None, callbacks=(), trainer_arguments=None, **arguments):
    callback = AbsentClassCalibration(**arguments)
    trainer = trainer_of(folder, callback, *callbacks, **(trainer_arguments or {}))
    trainer.fit(module, loader(train, shuffle=False), None if val is None else loader(val, shuffle=False))
    return trainer, callback


@pytest.mark.parametrize("seen", [None, SEEN], ids=["inferred", "given"])
@pytest.mark.parametrize(
    "arguments",
    [
        {"class_map": ROWS},
        {"class_map": {str(target): row for target, row in enumerate(ROWS)}},
        {"class_map": [NAMES[row] for row in ROWS], "label_names": "names.txt"},
        {"class_map": "map.json", "label_names": NAMES},
    ],
    ids=["list", "dict", "names", "file"],
)
def test_all_is_as_with_labels_that_are_rows(arguments, seen, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "names.txt").write_text("\n".join(NAMES))
    (tmp_path / "map.json").write_text(json.dumps([NAMES[row] for row in ROWS]))
    runs = []
    for name, make, data, given in (("rows", Plain, lambda x: x, {}), ("folders", Folders, folders, arguments)):
        module, checkpoints = pretrained(make), ModelCheckpoint(tmp_path / name, monitor="val_ausuc", mode="max")
        given = {**given, "seen_classes": seen}
        trainer, callback = fit(tmp_path, module, data(TRAIN), data(VAL), [checkpoints], **given)
        logged = dict(trainer.callback_metrics)
        trainer.test(module, loader(data(VAL), shuffle=False), verbose=False)
        runs.append((module.state_dict(), callback.result, logged, dict(trainer.callback_metrics)))
        assert_calibrated(read(checkpoints.best_model_path)["state_dict"], make=make)
    (state, result, *metrics), (other_state, other_result, *other_metrics) = runs
    assert_same(dict(state), dict(other_state))
    assert result == other_result
    assert result.split.seen_classes == tuple(SEEN)
    assert metrics == other_metrics
    assert {"val_acc_absent", "val_ausuc"} < metrics[0].keys()
    assert_calibrated(other_state, make=Folders)


def test_an_estimator_that_is_a_metric(tmp_path):
    module = pretrained(Folders)
    fit(tmp_path, module, folders(TRAIN), class_map=ROWS, estimator=AverageLogitGap(6, SEEN))
    assert_calibrated(module.state_dict(), make=Folders)
    with pytest.raises(ValueError, match="`estimator` to take rows of the head, but got a metric with a `class_map`"):
        AbsentClassCalibration(estimator=AverageLogitGap(6, SEEN, class_map=ROWS))


def test_ignored_labels(tmp_path):
    class Module(Plain):
        def loss(self, batch):
            x, y = batch
            return F.cross_entropy(self(x), torch.where(y == -100, y, torch.tensor(ROWS)[y.clamp(0)]))

    x, y = folders(TRAIN).tensors
    keep = torch.arange(len(y)) % 5 > 0
    module = pretrained(Module)
    _, callback = fit(tmp_path, module, TensorDataset(x, torch.where(keep, y, -100)), class_map=ROWS)
    assert callback.result.num_samples == keep.sum()
    assert_calibrated(module.state_dict(), TensorDataset(x[keep], TRAIN.tensors[1][keep]), make=Module)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"class_map": 3}, TypeError, "`class_map` to be a list or dict of rows or names"),
        ({"class_map": ["ant", "bat"], "label_names": NAMES}, ValueError, "but got 'bat'. Did you mean 'cat'"),
        ({"class_map": "imagenet-x"}, ValueError, "but got 'imagenet-x'"),
        ({"label_names": NAMES}, ValueError, "`class_map` to be given with `label_names`, but got None"),
    ],
)
def test_arguments(arguments, error, text):
    with pytest.raises(error, match=text):
        AbsentClassCalibration(**arguments)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"class_map": [0, 6]}, r"rows of the classification head, in \[0, 6\), but got 6"),
        ({"class_map": "imagenette"}, "the WordNet ids of a head of 6 rows"),
        ({"class_map": ["ant"], "label_names": NAMES[:3]}, "name each of the 6 rows of the head, but got 3 names"),
        ({"class_map": ROWS[:2]}, r"to give the row of every target, but 2 is missing\. Add it"),
        ({"class_map": ROWS[:2], "seen_classes": SEEN}, r"to give the row of every target, but 2 is missing\. Add it"),
    ],
)
def test_what_does_not_fit_is_told_before_training(arguments, text, tmp_path):
    callback = AbsentClassCalibration(**arguments)
    trainer, module = trainer_of(tmp_path, callback), pretrained(Folders)
    with pytest.raises(ValueError, match=text):
        trainer.fit(module, loader(folders(TRAIN), shuffle=False))
    assert trainer.global_step == 0


@pytest.mark.parametrize("seen", [None, SEEN], ids=["inferred", "given"])
def test_a_target_without_a_row_in_a_later_batch(seen, tmp_path):
    x, y = folders(TRAIN).tensors
    order = y.argsort()
    data = TensorDataset(x[order], y[order])
    with pytest.raises(ValueError, match=r"to give the row of every target, but 2 is missing\. Add it"):
        fit(tmp_path, pretrained(Folders), data, class_map=ROWS[:2], seen_classes=seen)


def test_evaluation_targets_without_a_row_are_not_counted(tmp_path):
    with pytest.warns(UserWarning, match="no metrics for some samples. .* of every target, but 5 is missing") as met:
        trainer, _ = fit(tmp_path, pretrained(Folders), folders(TRAIN), folders(VAL), class_map=ROWS[:5])
    assert sum("5 is missing" in str(warning.message) for warning in met) == 1
    keep = VAL.tensors[1] != ROWS[5]
    kept = TensorDataset(*(part[keep] for part in VAL.tensors))
    expected, _ = fit(tmp_path, pretrained(), TRAIN, kept)
    for name in ("val_acc_all", "val_acc_seen", "val_acc_absent", "val_acc_harmonic", "val_ausuc"):
        assert trainer.callback_metrics[name] == expected.callback_metrics[name]


@pytest.mark.parametrize(
    ("text", "class_map"),
    [
        ("[3, 0, 2]", [3, 0, 2]),
        ("[cow, ant]", ["cow", "ant"]),
        ("{0: 3, 1: 0}", {0: 3, 1: 0}),
        ('{"0": 3, "1": 0}', {0: 3, 1: 0}),
        ("{0: cow, 1: ant}", {0: "cow", 1: "ant"}),
        ("imagenet-r", "imagenet-r"),
        ("null", None),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*deprecated in v4")
def test_yaml_and_command_line(text, class_map, tmp_path, monkeypatch):
    pytest.importorskip("jsonargparse")
    from lightning.pytorch.cli import LightningCLI

    names = None if class_map in (None, "imagenet-r") else NAMES
    path = "lightning_calibft.AbsentClassCalibration"
    arguments = f"{{class_map: {text}, label_names: {json.dumps(names)}}}"
    (tmp_path / "run.yaml").write_text(
        f"trainer:\n  callbacks:\n    - {{class_path: {path}, init_args: {arguments}}}\n"
    )
    words = [f"--trainer.callbacks={path}", f"--trainer.callbacks.class_map={text}"]
    words += [] if names is None else [f"--trainer.callbacks.label_names={json.dumps(names)}"]
    for args in ([f"--config={tmp_path / 'run.yaml'}"], words):
        monkeypatch.setattr("sys.argv", ["run.py", *args])
        cli = LightningCLI(Plain, run=False, save_config_callback=None, seed_everything_default=False)
        (callback,) = [one for one in cli.trainer.callbacks if isinstance(one, AbsentClassCalibration)]
        assert callback.class_map == class_map
        assert callback.label_names == names
