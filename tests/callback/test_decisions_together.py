"""Two processes that differ in what they meet decide together, and neither waits for the other for ever."""

from __future__ import annotations

import pytest

from tests.helpers.processes import outcomes
from tests.helpers.runs import SEEN, quiet

pytestmark = quiet


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return outcomes("tests.callback.decisions_script", tmp_path_factory.mktemp("decisions"), 2)


@pytest.mark.parametrize("name", ["no_validation", "stopped_in_an_epoch"])
def test_running_statistics_that_differ(ranks, name):
    first, second = (rank[name] for rank in ranks)
    assert [first["rank"], second["rank"]] == [0, 1]
    assert first["error"] is second["error"] is None
    assert first["gamma"] == second["gamma"] != 0
    assert first["files"] == second["files"] != {}
    assert None not in first["files"].values()
    # The last file has the model of the first process, and gamma in memory is that of this model on all of them.
    assert list(first["files"].values())[-1] == pytest.approx(first["gamma"], rel=1e-6)


def test_the_listed_classes_of_all_processes_are_seen_from_the_start(ranks):
    assert ranks[0]["splits"] == ranks[1]["splits"] == [SEEN] * 4


def test_weights_that_load_on_one_process_alone(ranks):
    first, second = (rank["loading_fails_on_one"] for rank in ranks)
    assert "could not be loaded on another process" in first["error"]
    assert "out of memory" in second["error"]
    assert first["gamma"] == second["gamma"] != 0
    # The file that could not be loaded stays as it was, and the other is calibrated.
    assert first["files"] == second["files"]
    assert [gamma is None for gamma in first["files"].values()] == [True, False]


def test_unlabeled_samples_that_one_process_cannot_open(ranks):
    """Both end before the first step, and one of them says why."""
    errors = [ranks[rank]["no_traffic_on_one"]["error"] for rank in range(2)]
    assert "no such camera" in errors[1]
    assert "failed on another process" in errors[0]
    assert not any(outcome["no_traffic_on_one"]["files"] for outcome in ranks)
