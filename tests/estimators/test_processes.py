"""Every estimator in two real processes."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from tests.estimators.cases import CASES, inputs, make, whole
from tests.helpers.processes import in_group
from tests.helpers.references import random_case

_, _, SEEN, ABSENT = random_case(0)
CUTS = [30, 53, 60]  # where the 60 samples are cut between two processes; at 60 the second has none


def _work():
    rank = dist.get_rank()
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
    return results


def test_two_processes(tmp_path):
    first, second = in_group(_work, tmp_path)
    for case in CASES:
        for cut in CUTS:
            assert first[case, cut] == pytest.approx(whole(case), rel=1e-12, abs=1e-12)
            assert second[case, cut] == first[case, cut][0]
