"""Processes that Lightning spawns or forks: gamma comes back to where the user's code runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightning_calibft.functional import calibrate_logits, split_accuracy
from tests.callback.spawn_script import METHODS
from tests.helpers.processes import run_script
from tests.helpers.runs import SEEN, assert_calibrated, raw_logits, read, split_state
from tests.helpers.scheduled_runs import TRAIN, VAL, Scheduled

methods = pytest.mark.parametrize("method", METHODS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("spawned")


@pytest.fixture(scope="module")
def outcomes(folder):
    run_script("tests.callback.spawn_script", folder)
    return torch.load(folder / "outcomes.pt")


@methods
def test_the_live_module_has_gamma_where_the_users_code_runs(outcomes, method):
    gamma = assert_calibrated(outcomes[method]["state"], TRAIN, make=Scheduled)
    assert outcomes[method]["live"] == gamma


@methods
def test_kept_checkpoints_have_theirs(outcomes, folder, method):
    files = sorted((folder / method).iterdir())
    assert [file.name for file in files] == ["epoch=0.ckpt", "epoch=1.ckpt"]
    gammas = [assert_calibrated(read(file)["state_dict"], TRAIN, make=Scheduled) for file in files]
    assert gammas[0] != pytest.approx(gammas[1])
    assert Path(outcomes[method]["best"]) in files


def test_what_is_tested_and_logged_is_calibrated(outcomes):
    outcome = outcomes["ddp_notebook"]
    file = read(outcome["best"])["state_dict"]
    logits = calibrate_logits(raw_logits(file, VAL.tensors[0], make=Scheduled), split_state(file)[1], SEEN)
    for name in ("seen", "absent"):
        expected = split_accuracy(logits, VAL.tensors[1], SEEN, samples=name).item()
        assert outcome["test"][f"test_acc_{name}"] == pytest.approx(expected)
    outcome = outcomes["ddp_spawn"]  # whose last validation had the last gamma
    assert outcome["metrics"]["val_gamma"] == pytest.approx(outcome["live"])


def test_a_module_that_would_lose_gamma_is_refused(outcomes):
    assert "Call `lightning_calibft.attach(model)` before `fit`, or use the strategy 'ddp'." in outcomes["refused"]
