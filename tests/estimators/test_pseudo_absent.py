"""The pseudo-absent estimator as a metric: over batches, processes and copies."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
import torch.distributed as dist

from lightning_calibft.estimators import PseudoAbsent
from lightning_calibft.functional import pseudo_absent_gamma
from tests.helpers.estimator_references import _reference_pseudo_absent
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
    # The leads of the state are float32.
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


@pytest.mark.parametrize("share", [0.02, 0.3, 0.9])
def test_what_gamma_is_expected_to_change(share):
    logits, target, before, seen, absent = case()
    metric = PseudoAbsent(logits.shape[1], seen, absent, absent_share=share)
    metric.update(logits, target, before)
    gamma, samples = _reference_pseudo_absent(logits, target, seen, absent, before, share)
    margins, right, copies, weights, slope = samples
    assert metric.compute().item() == pytest.approx(gamma, rel=1e-5)
    seen_change = np.mean(right * (margins > gamma)) - np.mean(right * (margins > 0))
    absent_change = np.mean(weights * (copies < gamma)) - np.mean(weights * (copies < 0))
    assert list(map(float, metric.expected_change)) == pytest.approx([seen_change, absent_change], rel=1e-5)
    between = np.linspace(0, gamma, 20_001)[:, None]
    lost = np.mean(right / (1 + np.exp(slope * (margins - between)))) * gamma
    won = np.mean(weights / (1 + np.exp((between - copies) / 2))) * gamma
    assert metric.break_even_share.item() == pytest.approx(lost / (lost + won), rel=1e-4)


def test_the_share_at_which_no_gamma_is_needed_is_where_none_pays():
    logits, target, before, seen, absent = case()
    shares = []
    for share in (0.2, 0.8):
        for _ in range(40):  # where gamma is 0, both sides are equal, and so they are at the break-even share
            metric = PseudoAbsent(logits.shape[1], seen, absent, absent_share=share)
            metric.update(logits, target, before)
            share = metric.break_even_share.item()
        assert metric.compute().item() == pytest.approx(0, abs=1e-4)
        shares.append(share)
    assert shares[0] == pytest.approx(shares[1], abs=1e-5)


def test_state():
    logits, target, before, seen, absent = case()
    metric = PseudoAbsent(logits.shape[1], seen, absent)
    metric.update(logits, target, before)
    metric.compute()
    assert sum(part.nbytes for part in metric.leads) == 12 * len(target)


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
