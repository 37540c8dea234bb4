"""What a calibration knows of other shares, against fresh calibrations at these shares."""

from __future__ import annotations

import json
import math
import warnings

import pytest
import torch
import torch.distributed as dist

from lightning_calibft.estimators import OperatingPoint, PseudoAbsent, make_estimator, needs_pretrained_logits
from lightning_calibft.functional import split_accuracy
from lightning_calibft.functional.share_table import ABSENT_SHARES, ShareTable
from lightning_calibft.split import ClassSplit
from tests.helpers.estimator_references import _reference_pseudo_absent
from tests.helpers.processes import in_group
from tests.helpers.references import random_case

SHARES = [0.001, 0.0137, 0.05, 0.31, 0.5, 0.77, 0.9842, 0.999]
LOGITS, TARGET, SEEN, ABSENT = random_case(0)
BEFORE = torch.randn(LOGITS.shape, generator=torch.Generator().manual_seed(0))
SPLIT = ClassSplit(LOGITS.shape[1], SEEN, ABSENT)


def fed(name, **options):
    metric = make_estimator(name, SPLIT, options)
    metric.update(LOGITS, TARGET, *([BEFORE] if needs_pretrained_logits(name) else []))
    return metric


@pytest.mark.parametrize(("name", "error"), [("alg", 1e-5), ("pseudo_absent", 0.01)])
@pytest.mark.parametrize("told", [None, 0.03])
def test_gamma_is_that_of_a_fresh_calibration(name, error, told):
    table = fed(name, absent_share=told).share_table
    for share in SHARES:
        assert table.at(share)["gamma"] == pytest.approx(fed(name, absent_share=share).compute().item(), abs=error)
    for share, gamma in zip(table.absent_share, table.gamma, strict=True):
        assert gamma == pytest.approx(fed(name, absent_share=share).compute().item(), abs=2e-6)


def test_the_best_gamma_of_labeled_samples():
    table = fed("operating_point", min_seen_accuracy=0.1).share_table
    margin = LOGITS[:, SEEN].amax(1) - LOGITS[:, ABSENT].amax(1)
    is_seen, is_absent = (torch.isin(TARGET, torch.tensor(classes)) for classes in (SEEN, ABSENT))
    for row in range(0, len(ABSENT_SHARES), 6):
        share, gamma, seen, absent, seen_below, absent_below, pays = (
            column[row] for column in list(table.as_dict().values())[:7]
        )
        fresh = fed("operating_point", min_seen_accuracy=0.1, absent_share=share)
        assert gamma == pytest.approx(fresh.compute().item(), abs=1e-6)
        logits = LOGITS.double()
        logits[:, ABSENT] += gamma
        for accuracy, samples in ((seen, "seen"), (absent, "absent")):
            expected = split_accuracy(logits, TARGET, SEEN, ABSENT, samples=samples)
            assert accuracy == pytest.approx(expected.item(), abs=1e-6)
        assert seen_below == pytest.approx((margin[is_seen] < gamma).double().mean().item(), abs=1e-6)
        assert absent_below == pytest.approx((margin[is_absent] < gamma).double().mean().item(), abs=1e-6)
        changes = [table.at(share)[f"{side}_change"] for side in ("seen", "absent")]
        assert (1 - pays) * changes[0] + pays * changes[1] == pytest.approx(0, abs=1e-5)


def test_what_pseudo_absent_expects():
    """Its accuracies are those of the changes that it tells, and margins are counted, whoever is right."""
    metric = fed("pseudo_absent", absent_share=0.5)
    row = metric.share_table.at(0.5)
    for share in ABSENT_SHARES[::10]:
        fresh, told = fed("pseudo_absent", absent_share=share), metric.share_table.at(share)
        for side in ("seen", "absent"):
            assert told[f"{side}_change"] == pytest.approx(getattr(fresh.expected_change, side).item(), abs=1e-5)
        assert told["break_even_share"] == pytest.approx(fresh.break_even_share.item(), abs=1e-5)
    counted = torch.isin(TARGET, torch.tensor(SEEN))
    margin = (LOGITS[:, SEEN].amax(1) - LOGITS[:, ABSENT].amax(1))[counted]
    _, (_, _, copies, _, _) = _reference_pseudo_absent(LOGITS, TARGET, SEEN, ABSENT, BEFORE, 0.5)
    slope = 12.5 / margin.std(correction=0).double()  # the fractions are smoothed
    for name, margins in (("seen_below", margin.double()), ("absent_below", torch.as_tensor(copies).double())):
        below = torch.sigmoid(slope * (row["gamma"] - margins))
        assert row[name] == pytest.approx(below.mean().item(), abs=1e-5)
        assert row[name] == pytest.approx((margins < row["gamma"]).double().mean().item(), abs=0.05)
    columns = metric.share_table
    for column in (columns.gamma, columns.absent_accuracy, columns.seen_below, columns.absent_below):
        assert list(column) == sorted(column)
    assert list(columns.seen_accuracy) == sorted(columns.seen_accuracy, reverse=True)


def test_nothing_to_tell():
    assert not hasattr(fed("fixed", gamma=1.0), "share_table")
    assert fed("operating_point", criterion="harmonic_mean").share_table is None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no samples
        for name in ("alg", "pseudo_absent", "operating_point"):
            assert make_estimator(name, SPLIT).share_table is None


def test_plain_and_small():
    table = fed("pseudo_absent").share_table
    text = json.dumps(table.as_dict())
    assert ShareTable.from_dict(json.loads(text)) == table
    assert len(text) < 6000
    assert set(fed("alg").share_table.as_dict()) == {"absent_share", "gamma"}


@pytest.mark.parametrize("share", [0.0, 0.0009, 0.9991, 1.0, math.nan])
def test_shares_outside(share):
    with pytest.raises(ValueError, match=r"`absent_share` to be in \[0.001, 0.999\].* Calibrate again"):
        fed("alg").share_table.at(share)


def test_interpolates_in_log_odds():
    table = ShareTable(absent_share=(0.1, 0.5, 0.9), gamma=(1.0, 2.0, 4.0), seen_accuracy=(1.0, 0.8, 0.4))
    assert table.at(0.9) == {"absent_share": 0.9, "gamma": 4.0, "seen_accuracy": 0.4}
    assert table.at(0.25) == pytest.approx({"absent_share": 0.25, "gamma": 1.5, "seen_accuracy": 0.9})


@pytest.mark.parametrize("margin", [1e-12, 1e4])
def test_margins_of_any_size(margin):
    metric = PseudoAbsent(SPLIT.num_classes, SEEN, ABSENT)
    metric.update(LOGITS * margin, TARGET, BEFORE)
    gammas = metric.share_table.gamma
    assert list(gammas) == sorted(gammas)
    assert all(map(math.isfinite, gammas))


def test_a_group_without_samples():
    metric = OperatingPoint(SPLIT.num_classes, SEEN, ABSENT)
    seen = torch.isin(TARGET, torch.tensor(SEEN))
    metric.update(LOGITS[seen], TARGET[seen])
    with pytest.warns(UserWarning, match="absent"):
        assert metric.share_table is None


def _of_half():
    """The tables of this process, which has half of the samples."""
    half, tables = slice(dist.get_rank(), None, 2), {}
    for name in ("alg", "pseudo_absent", "operating_point"):
        metric = make_estimator(name, SPLIT)
        metric.update(LOGITS[half], TARGET[half], *([BEFORE[half]] if needs_pretrained_logits(name) else []))
        tables[name] = metric.share_table.gamma
    return tables


def test_processes_have_one_table(tmp_path):
    for tables in in_group(_of_half, tmp_path):
        for name, gammas in tables.items():
            assert gammas == pytest.approx(fed(name).share_table.gamma, abs=1e-5)
