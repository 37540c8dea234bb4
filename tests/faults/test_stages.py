"""Whatever fails in the calibration, and at whichever stage: the run leaves what it leaves without the callback."""

from __future__ import annotations

import functools
import re

import pytest
import torch

from tests.faults.checks import assert_whole
from tests.faults.stages import STAGES, Fault, fit, left
from tests.helpers.runs import assert_same, quiet

pytestmark = [
    quiet,
    pytest.mark.filterwarnings(
        "ignore:AbsentClassCalibration logs no metrics for some batches",
        "ignore:.*leaves step 12 without gamma",
        "ignore:The metric received no absent samples",
    ),
]
ERRORS = [ValueError, TypeError, KeyError, OSError, RuntimeError, torch.OutOfMemoryError, StopIteration]
# Where the fault is over before gamma is found for good, nothing is wrong in the end.
RECOVERS = {"labels", "labels_of_validation", "loader_before_validation", "data_before_validation"}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    @functools.cache
    def run(stage):
        folder = tmp_path_factory.mktemp("plain")
        _, module, _ = fit(folder, stage, None)
        return left(folder), module.state_dict()

    return run


@pytest.mark.parametrize(
    ("stage", "error"),
    # Torch takes a dataset that raises `StopIteration` for one that has ended.
    [(stage, error) for stage in STAGES for error in ERRORS if error is not StopIteration or "data" not in stage],
)
def test_the_run_is_the_plain_one(stage, error, plain, tmp_path):
    files, state = plain(stage)
    assert {"late/last.ckpt", "fit_end", "teardown", "logs/0/metrics.csv"} <= files, files

    def fails():
        raise error("the share is gone")

    fault, kept = Fault(fails), {}
    raised = None
    try:
        _, kept["module"], _ = fit(tmp_path, stage, fault)
    except Exception as met:
        raised = met
    assert fault.met
    assert left(tmp_path) == files
    if stage in RECOVERS:
        assert raised is None
    else:
        assert re.search("the share is gone|generator raised StopIteration", f"{raised} {raised.__cause__}")
    for path in tmp_path.rglob("*.ckpt"):
        done = assert_whole(path) if stage != "labels_of_steps" else True
        assert done or stage not in RECOVERS
        if path.name == "last.ckpt":
            own = torch.load(path, weights_only=True)["state_dict"]
            assert_same({key: own[key] for key in state}, dict(state))
