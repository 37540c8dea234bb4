"""What an update of each metric and estimator costs: time against the floor, bytes while it runs and bytes it keeps."""

from __future__ import annotations

import statistics
from functools import partial

import pytest
import torch
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassAUROC

from lightning_calibft.estimators import ESTIMATORS, needs_absent_samples, needs_pretrained_logits
from lightning_calibft.functional import class_means
from lightning_calibft.metrics import (
    AUSUC,
    HarmonicMeanAccuracy,
    NearestClassMeanAccuracy,
    SeenUnseenCurve,
    SplitAccuracy,
    absent_class_metrics,
)
from tests.benchmarks.conftest import DEVICES, seconds
from tests.benchmarks.samples import bytes_at_most, logits_and_target, seen_classes, two_maxima

METRICS = {
    "AUSUC": AUSUC,
    "AUSUC, validate_args": lambda *args, validate_args: AUSUC(*args),
    "SeenUnseenCurve": SeenUnseenCurve,
    "SplitAccuracy": SplitAccuracy,
    "SplitAccuracy, seen candidates": lambda *args, **kw: SplitAccuracy(*args, candidates="seen", **kw),
    "SplitAccuracy, top 5": lambda *args, **kw: SplitAccuracy(*args, top_k=5, **kw),
    "HarmonicMeanAccuracy": HarmonicMeanAccuracy,
    "absent_class_metrics": absent_class_metrics,
    **ESTIMATORS,
}

# How many times as long as something on the same batches an update with default arguments may take: as reading the
# logits once by `amax`, as metrics of torchmetrics, or as AUSUC. Three goals are not reached everywhere: 6 and 4
# `amax`, and 1.3 AUSUC for few classes. The budgets of these rows keep what is reached.
FLOORS = {
    "MulticlassAccuracy": MulticlassAccuracy,
    "MulticlassAccuracy, micro": lambda num_classes: MulticlassAccuracy(num_classes, average="micro"),
    "MulticlassAUROC": MulticlassAUROC,
}
BUDGETS = [
    ("AUSUC", (512, 1000), "amax", 13.0),
    ("AUSUC", (512, 1000), "MulticlassAccuracy", 1.0),
    ("AUSUC", (512, 1000), "MulticlassAccuracy, micro", 1.0),
    ("AUSUC", (512, 1000), "MulticlassAUROC", 1.0),
    ("AUSUC", (64, 10), "MulticlassAccuracy", 1.2),
    ("alg", (512, 1000), "amax", 8.0),
    ("alg", (64, 10), "MulticlassAccuracy", 1.3),
    ("absent_class_metrics", (512, 1000), "AUSUC", 1.3),
    ("absent_class_metrics", (64, 10), "AUSUC", 1.6),
]

SIZES = {(256, 10): 40, (256, 1000): 5, (5000, 1000): 1}  # and how many updates to time at once
DEFAULTS = {(64, 10): 40, (64, 1000): 10, (512, 1000): 5, (64, 21_841): 3}  # the same


def make(name: str, logits, target):
    """Return a metric and an update of it with a batch that it takes."""
    num_classes = logits.shape[1]
    options = {"gamma": 1.0} if name == "fixed" else {}
    metric = METRICS[name](num_classes, seen_classes(num_classes), validate_args=False, **options).to(logits.device)
    if name in ESTIMATORS and not needs_absent_samples(name):
        target = target // 2 * 2
    before = [logits.flip(0)] if needs_pretrained_logits(name) else []
    return metric, lambda: metric.update(logits, target, *before)


@pytest.mark.parametrize("threads", [1, 2], ids=["1 thread", "2 threads"])
@pytest.mark.parametrize("classes", ["in a block", "every other"])
@pytest.mark.parametrize(
    ("name", "size", "floor", "budget"),
    [pytest.param(*row, id=f"{row[0]} at {row[1][0]} x {row[1][1]:,}, against {row[2]}") for row in BUDGETS],
)
def test_budget(report, name, size, floor, budget, classes, threads):
    """Update with default arguments, against its budget."""
    num_samples, num_classes = size
    logits, target = logits_and_target(num_samples, num_classes)
    seen = range(num_classes // 2) if classes == "in a block" else seen_classes(num_classes)
    if name == "alg":
        target = torch.tensor(seen)[target % len(seen)]
    metric = METRICS[name](num_classes, seen)
    other = AUSUC(num_classes, seen) if floor == "AUSUC" else FLOORS.get(floor, MulticlassAccuracy)(num_classes)
    torch.set_num_threads(threads)  # the fixture sets them back

    def update(each):
        each.reset()
        return seconds(lambda: [each.update(logits, target) for _ in range(20)], threads)

    ratios = []
    for _ in range(25):
        below = seconds(lambda: [logits.amax(1) for _ in range(20)], threads) if floor == "amax" else update(other)
        ratios.append(update(metric) / below)
    low, middle, high = statistics.quantiles(ratios[1:], n=4)  # the first warms up
    report(f"{middle:.2f}", f"{budget}", f"{low:.2f} to {high:.2f}")


@pytest.mark.parametrize("threads", [1, 2], ids=["1 thread", "2 threads"])
@pytest.mark.parametrize("size", DEFAULTS, ids=lambda size: f"{size[0]:,} x {size[1]:,}")
def test_default_arguments(report, size, threads):
    """Update with default arguments, in microseconds."""
    num_classes, times = size[1], DEFAULTS[size]
    logits, target = logits_and_target(*size)
    functions = {"`amax`": lambda: logits.amax(1), "`max`": lambda: logits.max(1)}
    metrics = {"MulticlassAccuracy": MulticlassAccuracy(num_classes, average="micro")}
    for classes, seen in (("block", range(num_classes // 2)), ("every other", seen_classes(num_classes))):
        for name in ("alg", "AUSUC", "absent_class_metrics"):
            metrics[f"{name}, {classes}"] = METRICS[name](num_classes, seen)
    functions |= {name: partial(metric.update, logits, target) for name, metric in metrics.items()}
    torch.set_num_threads(threads)  # the fixture sets them back
    found: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(16):
        for name, function in functions.items():
            found[name].append(
                1e6 / times * seconds(lambda function=function: [function() for _ in range(times)], threads)
            )
        for metric in metrics.values():
            metric.reset()
    for name, each in found.items():
        low, middle, high = statistics.quantiles(each[1:], n=4)  # the first warms up
        report(f"{middle:.0f}", quartiles=f"{low:.0f} to {high:.0f}", what=name)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]:,} x {size[1]:,}")
@pytest.mark.parametrize("name", METRICS)
def test_update(ratio, name, size, device):
    """Update with one batch, against two maxima over its logits."""
    logits, target = logits_and_target(*size, device)
    metric, update = make(name, logits, target)
    floor, times = two_maxima(logits), SIZES[size]

    def ours():
        for _ in range(times):
            update()
        metric.reset()

    ratio(ours, lambda: [floor() for _ in range(times)], rounds=5, budget="none")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", METRICS)
def test_bandwidth(ratio, name, device):
    """Update with 50,000 x 1,000 logits, against a copy of them: to read them once at that bandwidth would be 0.5."""
    logits, target = logits_and_target(50_000, 1000, device)
    metric, update = make(name, logits, target)
    copy = torch.empty_like(logits)

    def ours():
        update()
        metric.reset()

    ratio(ours, lambda: copy.copy_(logits), rounds=5, budget="none")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]:,} x {size[1]:,}")
def test_collection(ratio, size, device):
    """Update of absent_class_metrics, five metrics, against the MulticlassAccuracy of torchmetrics."""
    logits, target = logits_and_target(*size, device)
    metrics, update = make("absent_class_metrics", logits, target)
    accuracy = MulticlassAccuracy(size[1], average="micro", validate_args=False).to(device)
    times = SIZES[size]

    def ours():
        for _ in range(times):
            update()
        metrics.reset()

    ratio(ours, lambda: [accuracy.update(logits, target) for _ in range(times)], rounds=5, budget="none")


@pytest.mark.parametrize("name", METRICS)
def test_bytes_while_it_runs(report, tmp_path, name):
    """Most bytes allocated at once by an update with 10,000 x 1000 logits, as a share of their own 40 MB."""
    logits, target = logits_and_target(10_000, 1000)
    metric, update = make(name, logits, target)
    update()
    metric.reset()
    share = bytes_at_most(update, tmp_path) / logits.nbytes
    report(f"{share:.3f}", "below 1")
    assert 0 < share < 1


def size_of(metric: Metric | MetricCollection) -> int:
    members = metric.values() if isinstance(metric, MetricCollection) else [metric]
    states = {id(state): state for member in members for state in member.metric_state.values()}
    return sum(tensor.nbytes for state in states.values() for tensor in (state if isinstance(state, list) else [state]))


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("num_classes", [10, 1000])
def test_bytes_of_state(report, name, num_classes):
    """Bytes of state for each sample."""
    samples = 4096
    metric, update = make(name, *logits_and_target(samples, num_classes))
    update()
    size = size_of(metric)
    update()
    bytes_a_sample = (size_of(metric) - size) / samples
    budget = 12 if name == "pseudo_absent" else 8  # it keeps three numbers: of the sample, its rival and its copy
    report(f"{bytes_a_sample:g}", str(budget))
    assert bytes_a_sample <= budget


@pytest.mark.parametrize("device", DEVICES)
def test_nearest_class_mean(ratio, device):
    """Update of NearestClassMeanAccuracy, 256 x 512 features of 1000 classes, against their product with the means."""
    features, target = torch.randn(256, 512, device=device), torch.randint(1000, (256,), device=device)
    means = class_means(torch.randn(4000, 512, device=device), torch.arange(4000, device=device) % 1000, 1000)
    metric = NearestClassMeanAccuracy(1000, seen_classes(1000), class_means=means, validate_args=False).to(device)
    ratio(lambda: metric.update(features, target), lambda: features @ means.T, rounds=31, budget="none")
