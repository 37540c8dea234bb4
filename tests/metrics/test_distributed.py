"""Two real processes; one process group for all checks."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from tests.helpers.processes import in_group
from tests.helpers.references import random_case
from tests.metrics.cases import METRICS, make, same

# Where the 60 samples are cut between the two processes; at 60 the second has none, and never calls update.
CUTS = [30, 53, 60]


def _compute(name, metric):
    result = {"value": metric.compute()}
    if name == "gap":
        result["value"] = (result["value"], metric.standard_error, torch.tensor(metric.num_samples).double())
    if name in ("ausuc", "curve"):
        result["value"] = (*metric.accuracies(0.25).values(), metric.best_gamma())
    return result["value"]


def _work():
    rank = dist.get_rank()
    logits, target, *_ = random_case(0)
    results = {}
    for name in METRICS:
        for cut in CUTS:
            mine = slice(0, cut) if rank == 0 else slice(cut, None)
            metric = make(name)
            if len(target[mine]):
                for part in zip(logits[mine].split(11), target[mine].split(11), strict=True):
                    metric.update(*part)
            results[name, cut] = _compute(name, metric)
            # Going on after a sync: each process still has its own samples, and only those.
            metric.update(logits[:3], target[:3])
            results[name, cut, "more"] = _compute(name, metric)
    if rank == 0:  # after `compute` on all processes, one may read on by itself
        metric.compute()
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return in_group(_work, tmp_path_factory.mktemp("distributed"))


@pytest.mark.parametrize("cut", CUTS)
def test_equals_one_process(results, name, cut):
    logits, target, *_ = random_case(0)
    metric = make(name)
    metric.update(logits, target)
    expected = _compute(name, metric)
    for rank in range(2):
        assert same(results[rank][name, cut], expected)
    for _ in range(2):
        metric.update(logits[:3], target[:3])
    expected = _compute(name, metric)
    for rank in range(2):
        assert same(results[rank][name, cut, "more"], expected)
