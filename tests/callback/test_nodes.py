"""Two nodes, each with a disk of its own, give what one process gives."""

from __future__ import annotations

import json

import pytest
import torch

from tests.callback import node_script
from tests.callback.node_script import NODES
from tests.helpers.processes import run_script
from tests.helpers.runs import assert_calibrated, quiet, read
from tests.helpers.scheduled_runs import TRAIN, Scheduled

pytestmark = quiet

EXACT = {"rel": 1e-12}  # only the order of summation differs: see test_ddp.py


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return json.loads(json.dumps(node_script.run(tmp_path_factory.mktemp("alone"), devices=1, nodes=1)))


@pytest.fixture(scope="module", params=[1, 2])
def place(request, tmp_path_factory):
    return tmp_path_factory.mktemp(f"nodes_of_{request.param}"), request.param


@pytest.fixture(scope="module")
def ranks(place):
    """What came out in each process on the nodes."""
    folder, devices = place
    run_script("tests.callback.node_script", folder, devices)
    return [json.loads(torch.load(folder / f"{rank}.pt")) for rank in range(NODES * devices)]


@pytest.mark.parametrize("name", ["end", "refreshed"])
def test_gamma_is_that_of_one_process(one, ranks, place, name):
    expected = one[name]
    for rank, outcome in enumerate(ranks):
        node, local = divmod(rank, place[1])
        assert outcome[name]["place"] == [rank, len(ranks), node, local]
        assert outcome[name]["result"] == ranks[0][name]["result"]
        assert outcome[name]["files"] == ranks[0][name]["files"]
        assert outcome[name]["live"] == pytest.approx(outcome[name]["result"]["gamma"])
    for key in ("gamma", "standard_error"):
        assert ranks[0][name]["result"][key] == pytest.approx(expected["result"][key], **EXACT)
        for file, result in ranks[0][name]["files"].items():
            assert result[key] == pytest.approx(expected["files"][file][key], **EXACT)
    assert ranks[0][name]["result"]["num_samples"] == 101


def test_the_first_process_alone_writes_and_the_other_node_lacks_its_files(ranks, place):
    folder, devices = place
    for rank, outcome in enumerate(ranks):
        node = rank // devices
        assert bool(outcome["written"]) == (rank == 0)
        assert all(f"node_{node}" in path for path in outcome["written"])
    for name in ("end", "refreshed"):
        files = sorted((folder / "node_0" / name).glob("*.ckpt"))
        assert len(files) == 3
        assert len({assert_calibrated(read(file)["state_dict"], TRAIN, make=Scheduled) for file in files}) == 3
        assert not [*(folder / "node_1" / name).glob("**/*.ckpt")]
