"""The pseudo-absent estimator as a metric: over batches, processes and copies."""

from __future__ import annotations

import pickle

import pytest
import torch
import torch.distributed as dist

from lightning_calibft.estimators import PseudoAbsent
from lightning_calibft.functional import pseudo_absent_gamma
from tests.helpers.processes import in_group
from tests.helpers.references import random_case

CUTS = [30, 53, 60]  # where the 60 samples are cut between two processes; at 60 the second has none


def case():
    logits, target, seen, absent = random_case(0)
    before = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
    return logits, target, before, seen, absent


def statistics(metric):
    return metric.compute().item(), metric.standard_error.item(), metric.num_samples


def expected():
    logits, target, before, seen, absent = case()
    gamma, error = pseudo_absent_gamma(logits, target, before, seen, absent)
    return gamma.item(), error.item(), int(torch.isin(target, torch.tensor(seen)).sum())


def test_batches_copies_and_reset():
    logits, target, before, seen, absent = case()
    metric = PseudoAbsent(logits.shape[1], seen, absent)
    for part in zip(logits.split(7), target.split(7), before.split(7), strict=True):
        metric.update(*part)
    assert not metric.state_dict()
    # The margins of the state are float32.
    assert statistics(pickle.loads(pickle.dumps(metric))) == pytest.approx(expected(), rel=1e-6)
    assert statistics(metric.clone()) == pytest.approx(expected(), rel=1e-6)
    metric.reset()
    with pytest.warns(UserWarning, match="gamma is NaN"):
        assert metric.compute().isnan()


def test_targets_that_are_mapped():
    logits, target, before, seen, absent = case()
    metric = PseudoAbsent(logits.shape[1], seen, absent, class_map=list(range(8, -1, -1)))
    metric.update(logits, 8 - target, before)
    assert statistics(metric) == pytest.approx(expected(), rel=1e-6)


def _work():
    rank = dist.get_rank()
    logits, target, before, seen, absent = case()
    results = {}
    for cut in CUTS:
        mine = slice(0, cut) if rank == 0 else slice(cut, None)
        metric = PseudoAbsent(logits.shape[1], seen, absent)
        if len(target[mine]):
            metric.update(logits[mine], target[mine], before[mine])
        results[cut] = statistics(metric)
    return results


def test_two_processes(tmp_path):
    for results in in_group(_work, tmp_path):
        for cut in CUTS:
            assert results[cut] == pytest.approx(expected(), rel=1e-6)
