"""Two real processes; one process group for all checks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.helpers.processes import hand_over
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


def _work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
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
    hand_over(results, Path(folder), rank)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    mp.spawn(_work, args=(str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


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
