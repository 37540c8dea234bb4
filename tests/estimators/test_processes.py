"""Every estimator in two real processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.estimators.cases import CASES, inputs, make, whole
from tests.helpers.processes import hand_over
from tests.helpers.references import random_case

_, _, SEEN, ABSENT = random_case(0)
CUTS = [30, 53, 60]  # where the 60 samples are cut between two processes; at 60 the second has none


def _work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    results = {}
    for case in CASES:
        for cut in CUTS:
            mine = slice(0, cut) if rank == 0 else slice(cut, None)
            metric = make(case, 9, SEEN, ABSENT)
            batch = [part[mine] for part in inputs(case)]
            if len(batch[0]):
                metric.update(*batch)
            gamma = metric.compute().item()
            if rank == 0:  # after `compute` on all processes, one may read on by itself
                results[case, cut] = gamma, metric.standard_error.item(), metric.num_samples
            else:
                results[case, cut] = gamma
    hand_over(results, Path(folder), rank)


def test_two_processes(tmp_path):
    mp.spawn(_work, args=(str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for case in CASES:
        for cut in CUTS:
            assert first[case, cut] == pytest.approx(whole(case), rel=1e-12, abs=1e-12)
            assert second[case, cut] == first[case, cut][0]
