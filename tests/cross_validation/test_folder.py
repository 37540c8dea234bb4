"""Splits that are kept in a folder, and arguments that are refused."""

from __future__ import annotations

import signal

import pytest
import torch
from torch.utils.data import TensorDataset

from lightning_calibft import pseudo_cross_validation
from tests.cross_validation.test_plain import DATA, SEEN, Fit
from tests.helpers.processes import run_python
from tests.helpers.runs import Plain, Stream, blobs, pretrained, quiet

pytestmark = quiet


def test_finished_splits_are_read(tmp_path):
    whole = pseudo_cross_validation(pretrained(), DATA, Fit(), folder=tmp_path / "new" / "one", progress=False)
    fit = Fit()
    (tmp_path / "new" / "one" / "split_1.json").write_text('{"gamma": 1')  # torn
    assert pseudo_cross_validation(pretrained(), DATA, fit, folder=tmp_path / "new" / "one", progress=False) == whole
    assert len(fit.models) == 1
    nothing = pseudo_cross_validation(pretrained(), DATA, print, folder=tmp_path / "new" / "one", progress=False)
    assert nothing == whole


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"seed": 3}, "seed"),
        ({"candidates": "all"}, "candidates"),
        ({"absent_classes": [5]}, "absent_classes"),
        ({"dataset": blobs(SEEN, each=10)}, "num_samples"),
        ({"model": Plain()}, "weights"),
    ],
)
def test_the_folder_of_another_run(tmp_path, change, name):
    arguments = {"model": pretrained(), "dataset": DATA, "fit_fn": Fit(), "folder": tmp_path, "progress": False}
    pseudo_cross_validation(**arguments)
    with pytest.raises(ValueError, match=f"`folder` to be empty or from the same run, but .* another `{name}`"):
        pseudo_cross_validation(**{**arguments, **change})


def test_killed_and_resumed(tmp_path):
    """A real process dies in its third training; the next goes on there, to the same end."""
    script = (
        "from tests.cross_validation.test_folder import *\n"
        f"pseudo_cross_validation(pretrained(), DATA, Fit(stop_at=2), folder={str(tmp_path)!r}, progress=False)"
    )
    run_python("-c", script, status=-signal.SIGKILL)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["split_0.json", "split_1.json"]
    fit = Fit()
    resumed = pseudo_cross_validation(pretrained(), DATA, fit, folder=tmp_path, progress=False)
    assert len(fit.models) == 1
    whole = pseudo_cross_validation(pretrained(), DATA, Fit(), progress=False)
    assert resumed.gamma == pytest.approx(whole.gamma, rel=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_splits": 1.5}, "`num_splits` to be an integer, but got 1.5"),
        ({"seed": None}, "`seed` to be an integer, but got None"),
        ({"dataset": Stream(DATA)}, "`dataset` to be map-style, .* but got a Stream"),
        ({"fit_fn": None}, "`fit_fn` to be a function, but got None"),
        ({"fit_fn": lambda model, dataset: 0.5}, "`fit_fn` to return a model or None, but got 0.5"),
    ],
)
def test_wrong_types(arguments, message):
    with pytest.raises(TypeError, match=message):
        pseudo_cross_validation(
            **{"model": pretrained(), "dataset": DATA, "fit_fn": Fit(), "progress": False, **arguments}
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seen_classes": [0, 1, 5], "dataset": blobs([0])}, "each half has samples in the fine-tuning data"),
        ({"num_splits": 0}, "`num_splits` to be at least 1, but got 0"),
        ({"candidates": "both"}, "`candidates` to be one of 'seen', 'all', but got 'both'"),
        ({"seen_classes": [0, 2]}, "`seen_classes` to hold at least 3 classes, .* but got 2"),
        ({"dataset": TensorDataset(torch.ones(0, 5), torch.ones(0).long())}, "got none"),
        ({"dataset": TensorDataset(torch.ones(3, 5), torch.tensor([0, 1, 6]))}, r"class ids in \[0, 6\).* but got 6"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        pseudo_cross_validation(
            **{"model": pretrained(), "dataset": DATA, "fit_fn": Fit(), "progress": False} | arguments
        )
