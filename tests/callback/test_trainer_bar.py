"""The passes of the callback show in the Trainer's own progress bar."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar, RichProgressBar, TQDMProgressBar

from lightning_calibft import AbsentClassCalibration
from tests.helpers.runs import TRAIN, VAL, Stream, assert_calibrated, loader, pretrained, quiet, trainer_of

pytestmark = quiet


class Recorded(TQDMProgressBar):
    """Keeps the bars that it has made, as users do who want a look of their own."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.made = []

    def init_validation_tqdm(self):
        bar = super().init_validation_tqdm()
        bar.colour = "green"
        self.made.append(bar)
        return bar

    def shown(self):
        """The description of each bar, with how far it has come."""
        return [(bar.desc.removesuffix(": "), bar.n, bar.total) for bar in self.made if "Validation" not in bar.desc]


class Rich(RichProgressBar):
    def shown(self):
        tasks = [
            task for task in self.progress.tasks if task.description.split()[0] in ("Calibrating", "Cross-validating")
        ]
        assert not any(task.visible for task in tasks)
        return [(task.description, task.completed, task.total) for task in tasks]


KINDS = [Recorded, *([Rich] if find_spec("rich") else [])]


def fit(folder, bar, callback=None, train=None, **options):
    callbacks = [AbsentClassCalibration() if callback is None else callback, *([] if bar is None else [bar])]
    options = {"enable_progress_bar": bar is not None, **options}
    trainer, module = trainer_of(folder, *callbacks, **options), pretrained()
    trainer.fit(module, loader() if train is None else train, loader(VAL, shuffle=False))
    return module


@pytest.mark.parametrize("kind", KINDS)
def test_the_pass_is_in_the_own_bar(kind, tmp_path, capsys):
    assert_calibrated(fit(tmp_path, bar := kind()).state_dict())
    assert bar.shown() == [("Calibrating", 6, 6)]
    out, err = capsys.readouterr()
    assert "Calibrating" not in err
    if kind is Recorded:
        assert "Calibrating:   0%|\x1b[32m" in out  # in the look of the user


@pytest.mark.parametrize("kind", KINDS)
def test_each_pass(kind, tmp_path):
    """Of a refresh and of a file, with a total where it is known."""
    bar, callback = kind(), AbsentClassCalibration([0, 2, 3], refresh_on_validation=True, max_samples=16)
    fit(tmp_path, bar, callback, max_epochs=2)
    assert bar.shown() == [("Calibrating", 2, 2)] * 2  # gamma of the last validation is that of the end
    bar, checkpoints = kind(), ModelCheckpoint(tmp_path, save_top_k=-1)
    callbacks = [AbsentClassCalibration([0, 2, 3]), bar, checkpoints]
    trainer = trainer_of(tmp_path, *callbacks, enable_progress_bar=True)
    trainer.fit(pretrained(), loader(Stream(TRAIN), shuffle=None), loader(VAL, shuffle=False))
    assert [(what, done) for what, done, _ in bar.shown()] == [("Calibrating", 6)] * 2


@pytest.mark.parametrize("kind", KINDS)
def test_cross_validation(kind, tmp_path, capsys):
    fit(tmp_path, bar := kind(), AbsentClassCalibration(estimator="pcv"))
    ((what, done, total),) = bar.shown()
    assert (what, done) == ("Cross-validating", total)
    assert total == 24  # three fits of two epochs of four batches
    assert "Cross-validating" not in capsys.readouterr().err


@pytest.mark.parametrize("bar", [None, *(kind(refresh_rate=0) for kind in KINDS)])
@pytest.mark.parametrize("estimator", ["alg", "pcv"])
def test_no_bar_where_the_user_has_disabled_it(bar, estimator, tmp_path, capsys):
    fit(tmp_path, bar, AbsentClassCalibration(estimator=estimator))
    assert not [text for text in capsys.readouterr() if "Calibrating" in text or "Cross-validating" in text]
    assert getattr(bar, "progress", None) is None


def test_a_bar_of_another_kind_is_joined_by_a_plain_one(tmp_path, capsys):
    fit(tmp_path, ProgressBar())
    assert "Calibrating" in capsys.readouterr().err


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_left_to_train(kind, tmp_path):
    """No training has put the bar on the screen."""
    assert_calibrated(fit(tmp_path, kind(), AbsentClassCalibration([0, 2, 3]), max_epochs=0).state_dict())
