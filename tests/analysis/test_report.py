"""Snapshots, what is said about them, and the page."""

from __future__ import annotations

import base64
import io
import json
import math
import re
from dataclasses import replace

import pytest
import torch
from matplotlib import pyplot as plt

from lightning_calibft import ClassSplit
from lightning_calibft.analysis import calibration_report
from lightning_calibft.analysis.accuracy_gain import GroupAccuracies
from lightning_calibft.analysis.history import Evaluation, History, Snapshot, evaluation_of
from lightning_calibft.analysis.logit_levels import GroupLevels, LogitLevels
from lightning_calibft.analysis.verdict import degraded, verdict
from lightning_calibft.analysis.weights import MeanSimilarity, RowNorms
from lightning_calibft.metrics import AUSUC
from tests.helpers.analysis_references import _reference_norms, _reference_similarity
from tests.helpers.references import (
    _reference_at_gamma,
    _reference_ausuc,
    _reference_gammas,
    _reference_split_accuracy,
    random_case,
)


def snapshot(step, ausuc=0.8, own=0.9, overall=0.5, best=0.75, count=400, within_absent=0.9):
    evaluation = Evaluation(overall, GroupAccuracies(0.96, 0.04, 0.97, own), ausuc, 3.25, best, 0.71, 0.79)
    group = GroupLevels(1.5, 2.25, 0.5, count)
    norms, updates = RowNorms(1.0, 0.1, 2.0, 0.2), MeanSimilarity(0.1, within_absent, -0.5)
    return Snapshot(step // 10, step, norms, updates, LogitLevels(group, group), evaluation)


def test_snapshots_become_plain_numbers_and_back():
    for original in (snapshot(10), Snapshot(0, 0)):
        assert Snapshot.from_dict(json.loads(json.dumps(original.as_dict()))) == original


@pytest.mark.parametrize("seed", range(3))
def test_an_evaluation_is_what_the_definitions_say(seed):
    logits, target, seen, absent = random_case(seed)
    metric = AUSUC(logits.shape[1], seen, absent)
    metric.update(logits, target)
    found = evaluation_of(metric)
    of_seen, of_absent, overall = _reference_at_gamma(logits, target, seen, absent, 0.0)
    assert (found.groups.seen_among_all, found.groups.absent_among_all) == pytest.approx((of_seen, of_absent))
    assert found.overall == pytest.approx(overall)
    assert found.groups.seen_among_seen == pytest.approx(_reference_split_accuracy(logits, target, seen, seen))
    assert found.groups.absent_among_absent == pytest.approx(_reference_split_accuracy(logits, target, absent, absent))
    assert found.ausuc == pytest.approx(_reference_ausuc(logits, target, seen, absent))
    at_best = _reference_at_gamma(logits, target, seen, absent, found.best_gamma)
    assert (found.best_seen, found.best_absent, found.best_overall) == pytest.approx(at_best)
    others = [_reference_at_gamma(logits, target, seen, absent, g)[2] for g in _reference_gammas(logits, seen, absent)]
    assert found.best_overall == pytest.approx(max(others))


def test_a_history():
    first, second, third = torch.randn(5, 4), torch.randn(5, 4), torch.randn(5, 4)
    seen, absent, split = [0, 3], [1, 2], ClassSplit(5, [0, 3], [1, 2])
    history = History(1, 10, first)
    history.add(split, 2, 20, second)
    history.add(split, 3, 30, third)
    history.add(split, 3, 30, second)  # in place of the last
    begun, *rest = history.snapshots
    assert (begun.epoch, begun.step, begun.updates) == (1, 10, None)
    assert (begun.norms.seen_mean, begun.norms.seen_std) == pytest.approx(_reference_norms(first, seen))
    assert [(each.epoch, each.step) for each in rest] == [(2, 20), (3, 30)]
    for each in rest:
        assert each.norms.absent_mean == pytest.approx(_reference_norms(second, absent)[0])
        found = (each.updates.within_seen, each.updates.within_absent, each.updates.between)
        assert found == pytest.approx(_reference_similarity(first, second, seen, absent))

    again = History.from_state_dict(history.state_dict())
    assert again.snapshots == history.snapshots
    assert again.split == split
    assert again.begins_with(first)
    assert not again.begins_with(second)
    again.add(ClassSplit(5, [0, 3, 4], [1, 2]), 4, 40, third)  # other classes: what was before does not compare
    assert [each.step for each in again.snapshots] == [10, 40]
    assert again.snapshots[0].norms.seen_mean == pytest.approx(_reference_norms(first, [0, 3, 4])[0])


def test_features_that_held_and_gamma_that_helps():
    features, gamma, *_, updates = verdict([snapshot(0), snapshot(10, ausuc=0.82)])
    assert features.startswith("The features of absent classes have held up.")
    assert "AUSUC went from 0.800 to 0.820" in features
    assert "from 90.0% to 90.0%" in features
    assert "trainer.validate" not in features
    assert gamma.startswith("Gamma helps: without it, 50.0% of the samples are classified correctly")
    assert "(96.0% of seen and 4.0% of absent ones)." in gamma
    assert "gamma = 3.25, the same weights reach 75.0% (71.0% and 79.0%)" in gamma
    assert "the logits of absent classes are too low" in gamma
    assert "mean cosine between their updates: 0.90" in updates
    assert "pushed in much the same direction" in updates


@pytest.mark.parametrize(
    ("change", "fallen"),
    [({"ausuc": 0.7}, ["AUSUC"]), ({"own": 0.8}, ["Acc_U/U"]), ({"ausuc": 0.7, "own": 0.8}, ["AUSUC", "Acc_U/U"])],
)
def test_calibration_cannot_help_where_features_are_degraded(change, fallen):
    first, middle, last = snapshot(10), snapshot(20, ausuc=0.83), snapshot(30, **change)
    assert degraded(first, last) == fallen
    text = verdict([first, middle, last])[0]
    assert text.startswith("CALIBRATION CANNOT HELP")
    assert f"({' and '.join(fallen)} fell)" in text
    assert "AUSUC was best, 0.830, at step 20 (epoch 2)" in text


def test_what_chance_explains_is_no_degradation():
    # 0.9 of 400: a standard error of 0.015.
    for own, count, fallen in ((0.875, 400, []), (0.86, 400, ["Acc_U/U"]), (0.86, 40, []), (0.5, 40, ["Acc_U/U"])):
        assert degraded(snapshot(0, count=count), snapshot(10, own=own, count=count)) == fallen
    assert degraded(snapshot(0, own=1.0), snapshot(10, own=0.9975)) == []  # one sample of 400


def test_gamma_with_little_to_win():
    gamma = verdict([snapshot(0), snapshot(10, overall=0.74)])[1]
    assert gamma.startswith("Gamma has little to gain here: without it, 74.0% of the samples")


def test_one_validation_and_none():
    (features, _, *_) = verdict([snapshot(10)])
    assert "A single validation (AUSUC 0.800, Acc_U/U 90.0%) cannot show" in features
    assert "`trainer.validate` before `trainer.fit`" in features
    nothing, updates = verdict([Snapshot(0, 0), replace(snapshot(10, within_absent=0.2), evaluation=None)])
    assert nothing.startswith("No validation had labeled samples of both")
    assert "pushed in different directions" in updates
    assert len(verdict([Snapshot(0, 0)])) == 1


def pictures(text):
    found = [base64.b64decode(code) for code in re.findall(r"data:image/png;base64,([A-Za-z0-9+/=]+)", text)]
    assert all(plt.imread(io.BytesIO(picture)).std() > 0.01 for picture in found)  # something is drawn
    return len(found)


@pytest.mark.parametrize("format", ["markdown", "html"])
def test_the_page(format):
    before, after = torch.randn(6, 4), torch.randn(6, 4)
    split, snapshots = ClassSplit(6, [0, 2, 3], [1, 4]), [snapshot(0), snapshot(10), snapshot(20, ausuc=0.4)]
    text = calibration_report(snapshots, split, (before, after), format=format)
    assert pictures(text) == 6
    assert "http" not in text  # nothing is loaded from elsewhere
    assert "CALIBRATION CANNOT HELP" in text
    assert "3 seen and 2 absent of 6 classes" in text
    numbers = ["2", "20", "0.500", "0.960", "0.040", "0.970", "0.900", "0.400", "3.250", "0.750", "0.710", "0.790"]
    if format == "markdown":
        assert f"| {' | '.join(numbers)} |" in text
        assert text.startswith("# Calibration report\n")
    else:
        assert "".join(f"<td>{number}</td>" for number in numbers) in text
        assert text.startswith("<!DOCTYPE html>")
        for tag in ("html", "body", "h1", "h2", "p", "ul", "li", "table", "tr", "td", "th"):
            assert len(re.findall(f"<{tag}[ >]", text)) == text.count(f"</{tag}>") > 0
    assert plt.get_fignums() == []  # the user's figures are left alone


def test_a_page_without_validations_and_weights():
    weights_only = [replace(each, levels=None, evaluation=None) for each in (snapshot(0), snapshot(10))]
    assert pictures(calibration_report(weights_only, ClassSplit(3, [0, 1]))) == 2
    levels_only = [replace(snapshot(10), norms=None, updates=None, evaluation=None)]
    assert pictures(calibration_report(levels_only, ClassSplit(3, [0, 1]))) == 2
    nan = replace(snapshot(10), updates=MeanSimilarity(math.nan, math.nan, math.nan))
    assert pictures(calibration_report([nan], ClassSplit(3, [0, 1]))) == 5


def test_many_classes_are_thinned_out_for_the_picture():
    weights = torch.randn(1501, 3), torch.randn(1501, 3)
    text = calibration_report([Snapshot(1, 10)], ClassSplit(1501, range(500)), weights)
    assert "for 167 seen and 167 absent classes" in text
    assert pictures(text) == 1
