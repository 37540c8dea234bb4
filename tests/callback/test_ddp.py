"""Two and four real processes give what one gives."""

from __future__ import annotations

import json

import pytest
from torch.utils.data import TensorDataset

from tests.callback import ddp_script
from tests.helpers.processes import outcomes
from tests.helpers.runs import SEEN, assert_calibrated, quiet, read
from tests.helpers.scheduled_runs import SUBSET, TRAIN, WEIGHTS, Scheduled

pytestmark = [quiet, pytest.mark.filterwarnings('ignore:`.test.ckpt_path="best".` is called with Trainer configured')]

# What a pass reads in each scenario.
SAMPLES = {
    "given": range(101),
    "inferred": range(101),
    "refreshed": range(101),
    "subset": SUBSET,
    "weighted": [index for index, weight in enumerate(WEIGHTS) if weight],
}
scenarios = pytest.mark.parametrize("name", SAMPLES)
# Each logit is computed in float64 with the same weights, so only the order of summation differs: 101 numbers of one
# magnitude lose at most 101 * 2^-53 = 1e-14 of it, and gamma is not smaller by more than a factor of 10.
EXACT = {"rel": 1e-12}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return tmp_path_factory.mktemp("processes_1")


@pytest.fixture(scope="module")
def one(alone):
    return json.loads(json.dumps(ddp_script.run(alone, devices=1)))


@pytest.fixture(scope="module", params=[2, 4])
def together(request, tmp_path_factory):
    return tmp_path_factory.mktemp(f"processes_{request.param}"), request.param


@pytest.fixture(scope="module")
def ranks(together):
    """What came out in each process."""
    ranks = outcomes("tests.callback.ddp_script", *together)
    assert [rank["given"]["world_size"] for rank in ranks] == [len(ranks)] * len(ranks)
    return ranks


@scenarios
def test_all_processes_end_alike(ranks, name):
    outcomes = [{**rank[name], "rank": None} for rank in ranks]
    assert all(outcome == outcomes[0] for outcome in outcomes)
    assert outcomes[0]["state"]["fc.absent_class_calibration.mask"] == [0, 1, 0, 0, 1, 1]


@scenarios
def test_gamma_is_that_of_one_process(one, ranks, name):
    pairs = [(ranks[0][name]["result"], one[name]["result"])]
    assert one[name]["files"].keys() == ranks[0][name]["files"].keys()
    assert len(one[name]["files"]) == 4
    pairs += [(ranks[0][name]["files"][file], result) for file, result in one[name]["files"].items()]
    for result, expected in pairs:
        assert result["num_samples"] == expected["num_samples"] == len(SAMPLES[name])
        assert result["seen_classes"] == expected["seen_classes"] == SEEN  # one of them in a single sample
        assert result["absent_classes"] == expected["absent_classes"]
        assert result["gamma"] == pytest.approx(expected["gamma"], **EXACT)
        assert result["standard_error"] == pytest.approx(expected["standard_error"], **EXACT)
    assert len({result["gamma"] for result, _ in pairs}) >= 3  # different weights in the files
    assert ranks[0][name]["training"] == one[name]["training"]
    assert ranks[0][name]["state"]["fc.weight"] == one[name]["state"]["fc.weight"]
    assert ranks[0][name]["gamma_after_test"] == pytest.approx(one[name]["gamma_after_test"])


@pytest.mark.parametrize("name", ["given", "inferred", "refreshed"])
def test_the_logged_metrics_are_those_of_one_process(one, ranks, name):
    assert list(one[name]["logged"]) == ["2", "4", "6"]
    assert ranks[0][name]["logged"].keys() == one[name]["logged"].keys()
    for step, metrics in one[name]["logged"].items():
        names = {"val_ausuc", "val_acc_all", "val_acc_seen", "val_acc_absent", "val_acc_harmonic"}
        assert metrics.keys() == names | ({"val_gamma"} if name == "refreshed" else set())
        assert ranks[0][name]["logged"][step] == pytest.approx(metrics, **EXACT)
    assert ranks[0][name]["test"] == pytest.approx(one[name]["test"], **EXACT)
    assert one[name]["gamma_after_test"] != pytest.approx(one[name]["result"]["gamma"])  # a test of other weights


@scenarios
def test_kept_files_hold_the_gamma_of_their_weights(one, ranks, alone, together, name):
    kept = TensorDataset(*(tensor[list(SAMPLES[name])] for tensor in TRAIN.tensors))
    for folder in (alone, together[0]):
        files = sorted((folder / name).iterdir())
        assert [file.name for file in files] == ["best.ckpt", "last.ckpt", "step=2.ckpt", "step=4.ckpt", "step=6.ckpt"]
        assert (folder / name / "last.ckpt").is_symlink()
        for file in files:
            assert_calibrated(read(file)["state_dict"], kept, make=Scheduled)


def test_gamma_of_the_steps_of_all_processes(ranks):
    first, *others = (rank["steps"] for rank in ranks)
    gaps = [*first["gaps"], *(gap for other in others for gap in other["gaps"])]
    for other in others:
        assert first["gaps"] != other["gaps"]
        assert (first["result"], first["live"]) == (other["result"], other["live"])
    assert first["result"]["gamma"] == pytest.approx(sum(gaps) / len(gaps), **EXACT)
    # The sampler gives some of the 101 twice.
    assert first["result"]["num_samples"] == len(gaps) == {2: 102, 4: 104}[len(ranks)]
    assert first["live"] == pytest.approx(first["result"]["gamma"])


def test_a_fit_with_samples_on_one_process_alone(one, ranks):
    for rank in ranks:
        assert rank["one_sample"]["samples"] == 1
        assert rank["one_sample"]["files"] == [rank["one_sample"]["gamma"]]
        assert rank["one_sample"]["gamma"] == pytest.approx(one["one_sample"]["gamma"], **EXACT)


def test_the_first_process_alone_writes(ranks):
    first, *others = (rank["written"] for rank in ranks)
    assert not any(others)
    assert any(path.endswith("step=4.ckpt") for path in first)
