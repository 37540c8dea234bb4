"""Weights shared out among two and four processes give the gamma that one process finds with whole ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from lightning_calibft import fold_checkpoint, get_gamma, inspect_checkpoint, load_calibrated
from tests.engines import sharded_script
from tests.engines.sharded_script import Whole
from tests.helpers.processes import outcomes, run_python
from tests.helpers.runs import SEEN, assert_calibrated, quiet, read
from tests.helpers.scheduled_runs import TRAIN

pytestmark = [quiet, pytest.mark.filterwarnings("ignore:.*was configured so validation will run after every batch")]

FITS = ("sharded", "consolidated", "tensors")
ONCE = ("live", "some", "sure", "validation")
# All is in float64, and only the order of summation differs: some hundred numbers of one magnitude lose at most some
# 1e-14 of it, and gamma is not smaller by more than a factor of 100.
EXACT = {"rel": 1e-11}


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return json.loads(json.dumps(sharded_script.run(tmp_path_factory.mktemp("processes_1"), devices=1)))


@pytest.fixture(scope="module", params=[2, 4])
def together(request, tmp_path_factory):
    return tmp_path_factory.mktemp(f"processes_{request.param}"), request.param


@pytest.fixture(scope="module")
def ranks(together):
    """What came out in each process."""
    return outcomes("tests.engines.sharded_script", *together)


def fits(outcome: dict) -> dict[str, dict]:
    """What each fit told, less those whose steps depend on the number of processes."""
    parts = {f"{name} {part}": outcome[name][part] for name in FITS for part in ("first", "resumed") if name in outcome}
    return {**{name: outcome[name] for name in (*ONCE, "one_sample") if name in outcome}, **parts}


def met(ranks: list[dict]) -> list[tuple[dict, str]]:
    """Each process with each of the fits that it has made."""
    return [(rank, name) for rank in ranks for name in FITS if name in rank]


def test_gamma_is_that_of_whole_weights(one, ranks):
    for rank in ranks:
        for name, told in fits(rank).items():
            result, expected = told["result"], fits(one)[name]["result"]
            for key in ("gamma", "standard_error"):
                assert result[key] == pytest.approx(expected[key], nan_ok=True, **EXACT)
            assert {**result, "gamma": 0, "standard_error": 0} == {**expected, "gamma": 0, "standard_error": 0}
            assert told["live"] == pytest.approx(result["gamma"])
            assert told["training"] == fits(one)[name]["training"]
    assert [one[name]["result"]["num_samples"] for name in (*ONCE, "one_sample")] == [101, 50, 101, 40, 1]
    assert all(one[name]["first"]["result"]["seen_classes"] == SEEN for name in FITS)


def test_weights_are_shared_out_and_the_calibration_is_not(ranks):
    for rank in ranks:
        for told in fits(rank).values():
            assert set(told["parts"]) == {"body.0.weight", "body.0.bias", "fc.weight", "fc.bias"}
            assert told["buffers"] == ["Tensor", "Tensor"]


def test_the_logged_metrics_are_those_of_whole_weights(one, ranks):
    for rank, name in met(ranks):
        for part, steps in (("first", ["2", "4", "6"]), ("resumed", ["6", "8", "10"])):
            logged, expected = rank[name][part]["logged"], one[name][part]["logged"]
            assert [*logged] == [*expected] == steps
            for step in steps:
                assert logged[step] == pytest.approx(expected[step], **EXACT)
                assert {"val_gamma", "val_ausuc", "val_acc_absent"} < logged[step].keys()
    assert all(metrics["val_acc_absent"] > 0 for metrics in one["sharded"]["first"]["logged"].values())


def test_a_checkpoint_brings_its_gamma_into_a_new_module(one, ranks):
    logged = one["sharded"]["first"]["logged"]
    assert len({round(metrics["val_gamma"], 3) for metrics in logged.values()}) == 3
    for rank, name in met(ranks):
        for file in ("best.ckpt", "step=4.ckpt"):
            assert rank[name][file] == pytest.approx(one[name][file], **EXACT)
        assert rank[name]["step=4.ckpt"]["gamma"] == pytest.approx(logged["4"]["val_gamma"])
        assert rank[name]["step=4.ckpt"]["test_acc_all"] == pytest.approx(logged["4"]["val_acc_all"])


def test_a_resumed_fit_begins_without_gamma_and_knows_the_classes(ranks):
    for rank, name in met(ranks):
        assert rank[name]["resumed"]["at_start"] is None
        assert rank[name]["resumed"]["classes"] == {"seen_classes": SEEN}


def test_every_file_has_the_gamma_of_its_weights_as_it_is_written(ranks, together, tmp_path):
    for name in FITS:
        for step in (2, 4, 6) if name in ranks[0] else ():
            path = together[0] / name / f"step={step}.ckpt"
            assert path.is_dir() == (name != "consolidated")
            if path.is_dir():
                dcp_to_torch_save(path, path := tmp_path / "consolidated.ckpt")
            assert_calibrated(torch.load(path)["state_dict"], TRAIN, make=Whole)


def test_a_folder_can_be_used_when_it_is_consolidated(ranks, together, tmp_path):
    folder, file, folded = together[0] / "sharded" / "step=4.ckpt", tmp_path / "whole.ckpt", tmp_path / "folded.ckpt"
    with pytest.raises(ValueError, match=r"is a directory.*`python -m lightning\.fabric\.utilities\.consolidate_check"):
        inspect_checkpoint(folder)
    module = "lightning.fabric.utilities.consolidate_checkpoint"
    run_python("-m", module, folder, "--output_file", file)
    assert_usable(file, folded)
    if "consolidated" in ranks[0]:
        assert_usable(together[0] / "consolidated" / "step=4.ckpt", folded)


def assert_usable(file: Path, folded: Path) -> None:
    gamma = assert_calibrated(read(file)["state_dict"], TRAIN, make=Whole)
    facts, module, inputs = inspect_checkpoint(file), load_calibrated(Whole, file), TRAIN.tensors[0]
    assert facts["gamma"] == pytest.approx(gamma)
    assert (facts["num_samples"], facts["seen_classes"]) == (101, SEEN)
    assert get_gamma(module) == gamma
    fold_checkpoint(file, folded)
    # Gamma is kept in float32.
    torch.testing.assert_close(Whole.load_from_checkpoint(folded).eval()(inputs), module(inputs), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("name", ["steps", "steps_tensors"])
def test_gamma_of_the_steps_of_all_processes(ranks, name):
    ranks = [rank for rank in ranks if name in rank]
    # With tensor parallelism, pairs of processes see the same samples.
    counted = ranks[:: 2 if name == "steps_tensors" else 1]
    gaps = [gap for rank in counted for gap in rank[name]["gaps"]]
    for rank in ranks:
        assert rank[name]["result"] == ranks[0][name]["result"]
        assert rank[name]["result"]["gamma"] == pytest.approx(sum(gaps) / len(gaps), **EXACT)
        assert rank[name]["result"]["num_samples"] == len(gaps)
        assert rank[name]["live"] == pytest.approx(rank[name]["result"]["gamma"])


def test_all_processes_end_when_one_meets_an_error(one, ranks):
    assert "finite logits in the calibration pass" in one["nan"]
    assert one["unreadable"] == "OSError('unreadable')"
    for rank in ranks:
        assert "finite logits in the calibration pass" in rank.get("nan", one["nan"])
    *others, last = (rank["unreadable"] for rank in ranks)
    assert last == "OSError('unreadable')"
    assert all("failed on another process" in other for other in others)
