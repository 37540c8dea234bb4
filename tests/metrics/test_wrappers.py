"""The metrics by keyword, beside those of torchmetrics, and in its wrappers."""

from __future__ import annotations

import pytest
from torchmetrics import MetricCollection, MetricTracker
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError
from torchmetrics.wrappers import BootStrapper, ClasswiseWrapper, MinMaxMetric, Running

from lightning_calibft.estimators import ESTIMATORS, PseudoAbsent, make_estimator, needs_pretrained_logits
from lightning_calibft.metrics import AUSUC, AverageLogitGap, NearestClassMeanAccuracy, SplitAccuracy
from lightning_calibft.split import ClassSplit
from tests.helpers.references import random_case
from tests.metrics.cases import MEANS, METRICS, make, same

SEEN, ABSENT = random_case(0)[2:]
SCALARS = sorted(METRICS.keys() - {"curve"})
pytestmark = pytest.mark.filterwarnings("ignore:The metric received no")


def parts(batch, size=20):
    return list(zip(*(part.split(size) for part in batch), strict=True))


@pytest.fixture(params=SCALARS)
def scalar(request):
    return request.param


def test_by_keyword_beside_metrics_of_torchmetrics(batch):
    metrics = MetricCollection(
        {
            "top_1": MulticlassAccuracy(9, average="micro"),
            "ece": MulticlassCalibrationError(9),
            **{name: make(name) for name in METRICS if name != "nearest_mean"},
            "pseudo_absent": PseudoAbsent(9, SEEN, ABSENT),
            "nearest_mean": NearestClassMeanAccuracy(9, SEEN, ABSENT, class_means=MEANS),
        }
    )
    preds, target = batch
    features, before = preds.flip(1), preds.flip(0)
    for rows in (slice(0, 20), slice(20, 60)):
        metrics.update(preds=preds[rows], target=target[rows], features=features[rows], pretrained_preds=before[rows])
    values = metrics.compute()
    assert values["top_1"].item() == pytest.approx((preds.argmax(1) == target).double().mean().item())
    for name in METRICS.keys() - {"nearest_mean"}:
        alone = make(name)
        alone.update(preds, target)
        assert same(values[name], alone.compute())
    alone = NearestClassMeanAccuracy(9, SEEN, ABSENT, class_means=MEANS)
    alone.update(features, target)
    assert values["nearest_mean"] == alone.compute()
    alone = PseudoAbsent(9, SEEN, ABSENT)
    alone.update(preds, target, before)
    assert values["pseudo_absent"] == alone.compute()


def test_features_are_never_taken_for_logits(batch):
    metrics = MetricCollection([AUSUC(9, SEEN, ABSENT), NearestClassMeanAccuracy(9, SEEN, ABSENT, class_means=MEANS)])
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'features'"):
        metrics.update(preds=batch[0], target=batch[1])


@pytest.mark.parametrize("by_forward", [False, True])
def test_running(name, batch, by_forward):
    """The value of the last two batches."""
    running, batches = Running(make(name), window=2), parts(batch)
    for index, part in enumerate(batches):
        running(*part) if by_forward else running.update(*part)
        alone = make(name)
        for each in batches[max(0, index - 1) : index + 1]:
            alone.update(*each)
        assert same(running.compute(), alone.compute())
    running.reset()
    running.update(*batches[0])
    alone = make(name)
    alone.update(*batches[0])
    assert same(running.compute(), alone.compute())


@pytest.mark.parametrize("name", sorted(ESTIMATORS))
def test_running_estimators(name, batch):
    split, options = ClassSplit(9, SEEN, ABSENT), {"gamma": 1.5} if name == "fixed" else {}
    batches = [(*part, part[0].flip(1)) if needs_pretrained_logits(name) else part for part in parts(batch)]
    running = Running(make_estimator(name, split, options), window=2)
    for part in batches:
        running.update(*part)
    alone = make_estimator(name, split, options)
    for part in batches[1:]:
        alone.update(*part)
    assert running.compute().item() == pytest.approx(alone.compute().item(), rel=1e-12)


def test_bootstrapper(scalar, batch):
    bootstrap = BootStrapper(make(scalar), num_bootstraps=5, raw=True, sampling_strategy="multinomial")
    for part in parts(batch):
        bootstrap.update(*part)
    values = bootstrap.compute()
    assert values["raw"].shape == (5,)
    assert values["raw"].isfinite().all()
    assert len(set(values["raw"].tolist())) > 1
    assert values["mean"] == values["raw"].mean()


def test_bootstrapper_of_a_curve_is_refused(batch):
    bootstrap = BootStrapper(make("curve"), num_bootstraps=2)
    bootstrap.update(*batch)
    with pytest.raises(TypeError, match="expected Tensor"):
        bootstrap.compute()


def test_min_max(scalar, batch):
    metric, values = MinMaxMetric(make(scalar)), []
    for part in parts(batch):
        metric.update(*part)
        found = metric.compute()
        values.append(found["raw"])
        assert found["min"] == min(values)
        assert found["max"] == max(values)
        metric._base_metric.reset()


def test_min_max_of_a_curve_is_refused(batch):
    metric = MinMaxMetric(make("curve"))
    metric.update(*batch)
    with pytest.raises(RuntimeError, match="should be a float or scalar tensor"):
        metric.compute()


def test_tracker(scalar, batch):
    tracker = MetricTracker(make(scalar), maximize=True)
    values = []
    for part in parts(batch):
        tracker.increment()
        tracker.update(*part)
        values.append(tracker.compute())
    best, step = tracker.best_metric(return_step=True)
    assert best == max(values)
    assert values[step] == best


def test_tracker_of_a_collection_knows_what_is_better(batch):
    tracker = MetricTracker(MetricCollection([AUSUC(9, SEEN, ABSENT), SplitAccuracy(9, SEEN, ABSENT)]), maximize=None)
    for part in parts(batch):
        tracker.increment()
        tracker.update(preds=part[0], target=part[1])
    assert tracker.best_metric()["AUSUC"] == tracker.compute_all()["AUSUC"].max()


@pytest.mark.parametrize("metric", [lambda: make("curve"), lambda: AverageLogitGap(9, SEEN, ABSENT)])
def test_tracker_asks_what_is_better_where_nothing_is(metric):
    with pytest.raises(AttributeError, match="higher_is_better"):
        MetricTracker(metric(), maximize=None)


def test_classwise_wrapper_names_the_parts_of_a_curve(batch):
    metric = ClasswiseWrapper(make("curve"), labels=["seen", "absent", "gamma"], prefix="curve_")
    metric.update(*batch)
    alone = make("curve")
    alone.update(*batch)
    assert list(metric.compute()) == ["curve_seen", "curve_absent", "curve_gamma"]
    assert same(tuple(metric.compute().values()), alone.compute())


def test_classwise_wrapper_of_one_number_is_refused(scalar, batch):
    metric = ClasswiseWrapper(make(scalar))
    metric.update(*batch)
    with pytest.raises(TypeError, match="0-d tensor"):
        metric.compute()
