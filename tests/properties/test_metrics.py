"""Every metric says of many batches what its function says of all samples at once, and keeps nothing of bad ones."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, strategies as st

from lightning_calibft.estimators import ESTIMATORS
from lightning_calibft.functional import (
    ausuc,
    average_logit_gap,
    harmonic_mean_accuracy,
    nearest_class_mean_accuracy,
    pseudo_absent_gamma,
    seen_unseen_curve,
    split_accuracy,
)
from lightning_calibft.metrics import (
    AUSUC,
    AverageLogitGap,
    HarmonicMeanAccuracy,
    NearestClassMeanAccuracy,
    SeenUnseenCurve,
    SplitAccuracy,
    absent_class_metrics,
)
from tests.estimators.cases import CASES, make, reference
from tests.helpers.nonfinite_references import close, plain
from tests.properties.strategies import INTEGERS, SEEDS, cases, generator, parts

FUNCTIONS = {
    AUSUC: ausuc,
    SeenUnseenCurve: seen_unseen_curve,
    SplitAccuracy: split_accuracy,
    HarmonicMeanAccuracy: harmonic_mean_accuracy,
    AverageLogitGap: lambda *args, **kwargs: average_logit_gap(*args, **kwargs).gamma,
}
each_metric = pytest.mark.parametrize(
    ("cls", "options"),
    [
        (AUSUC, {}),
        (AUSUC, {"average": "macro"}),
        (SeenUnseenCurve, {}),
        (SplitAccuracy, {"samples": "seen", "average": "macro"}),
        (SplitAccuracy, {"samples": "absent", "candidates": "absent"}),
        (HarmonicMeanAccuracy, {}),
        (AverageLogitGap, {}),
    ],
)


def fed(metric, case, batches, *more, dtype=torch.int64):
    for rows in batches:
        metric.update(case.logits[rows], case.target[rows].to(dtype), *(part[rows] for part in more))
    return metric


def values(metric):
    result = metric.compute()
    return (
        [number for part in result for number in part.flatten().tolist()]
        if isinstance(result, tuple)
        else plain(result)
    )


@each_metric
@given(data=st.data())
def test_however_the_samples_are_cut_and_ordered(cls, options, data):
    case = data.draw(cases(min_seen=2))
    batches = data.draw(parts(len(case.target)))
    dtype = data.draw(st.sampled_from(INTEGERS))
    metric = fed(cls(case.num_classes, case.seen, case.absent, **options), case, batches, dtype=dtype)
    expected = plain(FUNCTIONS[cls](*case, **options))
    assert values(metric) == close(expected)
    metric.reset()
    assert values(fed(metric, case, reversed(batches))) == close(expected)


@each_metric
@given(data=st.data())
def test_targets_that_are_mapped(cls, options, data):
    """Two targets may be one class, and those of samples to leave out may be the number of a row."""
    case = data.draw(cases(min_seen=2))
    numbers = data.draw(st.permutations(range(2 * case.num_classes)))
    ignored = data.draw(st.sampled_from([None, -100, numbers[0]]))
    class_map = {number: row % case.num_classes for row, number in enumerate(numbers)}
    twins = torch.tensor(data.draw(st.lists(st.booleans(), min_size=len(case.target), max_size=len(case.target))))
    target = torch.tensor(numbers)[case.target + case.num_classes * twins.long()]
    metric = cls(case.num_classes, case.seen, case.absent, class_map=class_map, ignore_index=ignored, **options)
    metric.update(case.logits, target)
    rest = case if ignored is None else case.take(target != ignored)
    assert values(metric) == close(plain(FUNCTIONS[cls](*rest, **options)))


@each_metric
@given(data=st.data())
def test_a_batch_that_is_refused_leaves_nothing_behind(cls, options, data):
    case = data.draw(cases(min_seen=2, min_samples=1))
    bad = data.draw(
        st.sampled_from(
            [
                (case.logits, case.target + case.num_classes),
                (case.logits, case.target - 100),
                (case.logits[:, 1:], case.target),
                (case.logits, case.target[1:]),
                (case.logits.long(), case.target),
                (case.logits, case.logits),
                (case.logits.tolist(), case.target),
            ]
        )
    )
    metric = cls(case.num_classes, case.seen, case.absent, **options)
    for good in (True, False, True):
        if good:
            metric.update(case.logits, case.target)
        else:
            with pytest.raises((TypeError, ValueError), match=r"^Expected argument `(preds|target)` to"):
                metric.update(*bad)
    twice = case.take(torch.arange(len(case.target)).repeat(2))
    assert values(metric) == close(plain(FUNCTIONS[cls](*twice, **options)))


@given(cases(), st.data())
def test_nearest_class_mean(case, data):
    means = torch.randn(case.logits.shape[1], case.num_classes, generator=generator(data.draw(SEEDS)))
    metric = NearestClassMeanAccuracy(case.num_classes, case.seen, case.absent, class_means=means)
    expected = nearest_class_mean_accuracy(case.logits, case.target, means, case.seen, case.absent)
    assert values(fed(metric, case, data.draw(parts(len(case.target))))) == close(plain(expected))


@given(cases(), st.data())
def test_collection(case, data):
    metrics = absent_class_metrics(case.num_classes, case.seen, case.absent)
    batches = data.draw(parts(len(case.target)))
    result = {name: value.item() for name, value in fed(metrics, case, batches).compute().items()}
    accuracies = {
        f"acc{suffix}": split_accuracy(*case, samples=group).item()
        for suffix, group in (("_all", "all"), ("_seen", "seen"), ("_absent", "absent"))
    }
    expected = {"ausuc": ausuc(*case).item(), "acc_harmonic": harmonic_mean_accuracy(*case).item(), **accuracies}
    assert result == close(expected)


@pytest.mark.parametrize("name", CASES)
@given(data=st.data())
def test_estimators(name, data):
    case = data.draw(cases(min_seen=2))
    batches = data.draw(parts(len(case.target)))
    before = [before_of(case, data)] if ESTIMATORS[CASES[name][0]].__name__ == "Midpoint" else []
    metric = fed(make(name, case.num_classes, case.seen, case.absent), case, batches, *before)
    gamma, count = metric.compute().item(), int(torch.isin(case.target, torch.tensor(case.seen)).sum())
    assert metric.num_samples == count
    if count > 1:
        assert gamma == close(reference(name, (*case[:2], *before), case.seen, case.absent)[0], 1e-6)
    elif count == 0 and name != "fixed":
        assert gamma != gamma


def before_of(case, data):
    return torch.randn(case.logits.shape, generator=generator(data.draw(SEEDS)))


@given(cases(min_seen=2), st.data())
def test_pseudo_absent(case, data):
    before = before_of(case, data)
    metric = ESTIMATORS["pseudo_absent"](case.num_classes, case.seen, case.absent)
    expected = pseudo_absent_gamma(*case[:2], before, case.seen, case.absent).gamma
    batches = data.draw(parts(len(case.target)))
    assert fed(metric, case, batches, before).compute().item() == close(expected.item(), 1e-5)
