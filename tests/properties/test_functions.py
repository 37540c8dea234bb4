"""Every function on logits equals its slow reference, whatever the values, dtypes and classes."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, strategies as st

from lightning_calibft.functional import (
    ausuc,
    average_logit_gap,
    best_gamma,
    class_means,
    harmonic_mean_accuracy,
    nearest_class_mean_accuracy,
    seen_unseen_curve,
    split_accuracy,
)
from lightning_calibft.functional.seen_unseen_curve import point_at
from tests.helpers.nonfinite_references import (
    _reference_accuracy,
    _reference_point,
    _reference_point_by_margins,
    close,
    groups,
    harmonic,
    plain,
)
from tests.helpers.references import _reference_ausuc, _reference_gammas, _reference_gap, _reference_margins
from tests.properties.strategies import FLOATS, INTEGERS, ODD, QUARTERS, cases, cases_without_ties

GROUPS = st.sampled_from(["all", "seen", "absent"])
AVERAGES = st.sampled_from(["micro", "macro"])
VALUES = QUARTERS | ODD
HUGE = st.sampled_from([0.0, 1.0, 3e38, -3e38, 1e30, -1e20, 2.0**60])
CRITERIA = {
    "accuracy": lambda seen, absent, overall: overall,
    "harmonic_mean": lambda seen, absent, overall: harmonic(seen, absent),
    "equal_accuracies": lambda seen, absent, overall: -abs(seen - absent),
}


@given(cases(VALUES), GROUPS, GROUPS, AVERAGES, st.sampled_from(FLOATS), st.sampled_from(INTEGERS))
def test_split_accuracy(case, samples, candidates, average, dtype, integer):
    value = split_accuracy(
        case.logits.to(dtype),
        case.target.to(integer),
        case.seen,
        case.absent,
        samples=samples,
        candidates=candidates,
        average=average,
    )
    expected = _reference_accuracy(case, groups(case)[samples], groups(case)[candidates], average)
    assert value.item() == close(expected)


@given(cases_without_ties(), GROUPS, GROUPS, AVERAGES, st.data())
def test_top_k(case, samples, candidates, average, data):
    top_k = data.draw(st.integers(1, len(groups(case)[candidates])))
    value = split_accuracy(*case, samples=samples, candidates=candidates, average=average, top_k=top_k)
    expected = _reference_accuracy(case, groups(case)[samples], groups(case)[candidates], average, top_k)
    assert value.item() == close(expected)


@given(cases(VALUES), AVERAGES, st.sampled_from(FLOATS), st.sampled_from(INTEGERS))
def test_harmonic_mean_accuracy(case, average, dtype, integer):
    value = harmonic_mean_accuracy(
        case.logits.to(dtype), case.target.to(integer), case.seen, case.absent, average=average
    )
    both = (_reference_accuracy(case, group, groups(case)["all"], average) for group in (case.seen, case.absent))
    assert value.item() == close(harmonic(*both))


@given(cases(VALUES), AVERAGES, st.sampled_from(FLOATS), st.sampled_from(INTEGERS))
def test_curve(case, average, dtype, integer):
    arguments = case.logits.to(dtype), case.target.to(integer), case.seen, case.absent
    seen, absent, gamma = seen_unseen_curve(*arguments, average=average)
    edges = [-math.inf, *gamma.tolist(), math.inf]
    assert len(seen) == len(absent) == len(edges) - 1
    assert gamma.tolist() == sorted(set(gamma.tolist()))
    for k, (low, high) in enumerate(itertools.pairwise(edges)):
        if low == high:
            continue  # an infinite margin: no gamma lies beyond
        between = (max(low, -1e6) + min(high, 1e6)) / 2
        expected = _reference_point(case, between, average)
        assert (seen[k].item(), absent[k].item()) == close(expected[:2])
        assert [value.item() for value in point_at(seen, absent, gamma, between)] == close(list(expected[:2]))
    for at in gamma[gamma.isfinite()].tolist():
        expected = _reference_point(case, at, average)
        assert [value.item() for value in point_at(seen, absent, gamma, at)] == close(list(expected[:2]))


@given(cases(), AVERAGES)
def test_ausuc(case, average):
    value = ausuc(*case, average=average).item()
    both = all(torch.isin(case.target, torch.tensor(group)).any() for group in (case.seen, case.absent))
    assert value == close(_reference_ausuc(*case, average) if both else math.nan)


@given(cases(VALUES), AVERAGES, st.sampled_from(FLOATS))
def test_ausuc_is_a_share(case, average, dtype):
    value = ausuc(case.logits.to(dtype), *case[1:], average=average).item()
    assert math.isnan(value) or 0 <= value <= 1 + 1e-12


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize(("values", "point"), [(VALUES, _reference_point), (HUGE, _reference_point_by_margins)])
@given(st.data(), AVERAGES, st.lists(QUARTERS, max_size=5))
def test_no_gamma_is_better_than_the_best(criterion, values, point, data, average, gammas):
    case = data.draw(cases(values))
    best = best_gamma(*case, criterion=criterion, average=average).item()
    both = all(torch.isin(case.target, torch.tensor(group)).any() for group in (case.seen, case.absent))
    assert math.isnan(best) != both
    if not both:
        return
    finite = case.logits.nan_to_num(0, 0, 0), case.seen, case.absent
    # At a margin both accuracies leave the curve, and may be equal without any worth.
    tried = {*gammas, *_reference_gammas(*finite)}.difference(_reference_margins(*finite))
    score = CRITERIA[criterion]
    reached = score(*point(case, best, average))
    for gamma in tried:
        assert reached >= score(*point(case, gamma, average)) - 1e-9


@given(cases(min_seen=2), st.sampled_from(FLOATS), st.sampled_from(INTEGERS))
def test_average_logit_gap(case, dtype, integer):
    gamma, error = average_logit_gap(case.logits.to(dtype), case.target.to(integer), case.seen, case.absent)
    count = int(torch.isin(case.target, torch.tensor(case.seen)).sum())
    if count < 2:
        assert error.isnan()
        assert gamma.isnan() == (count == 0)
        return
    assert (gamma.item(), error.item(), count) == close(_reference_gap(*case), 1e-6)


@given(cases(ODD, min_seen=2, min_samples=1))
def test_no_gap_comes_of_what_is_no_number(case):
    counted = torch.isin(case.target, torch.tensor(case.seen))
    others = case.logits[:, case.seen + case.absent].clone()
    own = torch.tensor(case.seen + case.absent) == case.target[:, None]
    finite = bool(others.masked_fill(own, 0)[counted].isfinite().all() and case.logits[counted].isfinite().all())
    gamma = average_logit_gap(*case).gamma
    assert gamma.isfinite() if finite and counted.any() else True


@given(cases(min_samples=1), AVERAGES)
def test_nearest_class_mean(case, average):
    means = class_means(case.logits, case.target, case.num_classes)
    unit = case.logits.double() / case.logits.double().norm(dim=1, keepdim=True).clamp(min=1e-12)
    for c in range(case.num_classes):
        rows = unit[case.target == c]
        expected = rows.mean(0) if len(rows) else torch.full((case.num_classes,), math.nan, dtype=torch.float64)
        torch.testing.assert_close(means[c].double(), expected, rtol=0, atol=1e-6, equal_nan=True)
    cosine = unit @ torch.nn.functional.normalize(means.double()).T
    similar = case._replace(logits=cosine.masked_fill(means.isnan().any(1), -math.inf))
    value = nearest_class_mean_accuracy(
        case.logits.double(), case.target, means.double(), case.seen, case.absent, average=average
    )
    assert value.item() == close(_reference_accuracy(similar, groups(case)["all"], groups(case)["all"], average))


FUNCTIONS = {
    "accuracy": split_accuracy,
    "harmonic": harmonic_mean_accuracy,
    "curve": seen_unseen_curve,
    "ausuc": ausuc,
    "gap": lambda *args, **kwargs: average_logit_gap(*args, **kwargs).gamma,
    "best_gamma": best_gamma,
}


@pytest.mark.parametrize("name", FUNCTIONS)
@given(cases(min_seen=2), st.data())
def test_samples_to_leave_out(name, case, data):
    """By a label that is no class, by one that is, or without validation by any label out of range."""
    function = FUNCTIONS[name]
    ignored = data.draw(st.sampled_from([-100, 255, *range(case.num_classes)]))
    drawn = data.draw(st.lists(st.booleans(), min_size=len(case.target), max_size=len(case.target)))
    marked = torch.tensor(drawn, dtype=torch.bool)
    target = case.target.masked_fill(marked, ignored)
    rest = case.take(target != ignored)
    expected = plain(function(*rest))
    assert plain(function(case.logits, target, *case[2:], ignore_index=ignored)) == close(expected)
    if not 0 <= ignored < case.num_classes:
        assert plain(function(case.logits, target, *case[2:], validate_args=False)) == close(expected)
