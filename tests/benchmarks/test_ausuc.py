"""AUSUC by its size: against the floor, the way by a loop over thresholds, and metrics of torchmetrics."""

from __future__ import annotations

import statistics

import pytest
import torch
from torchmetrics.classification import MulticlassAccuracy, MulticlassAUROC

from lightning_calibft.functional import ausuc
from lightning_calibft.functional.seen_unseen_curve import curve_compute
from lightning_calibft.metrics import AUSUC
from tests.benchmarks.conftest import DEVICES, seconds
from tests.benchmarks.samples import logits_and_target, seen_classes, two_maxima

SIZES = [
    *[(num_samples, 10) for num_samples in (1000, 10_000, 100_000, 1_000_000)],
    *[(num_samples, 100) for num_samples in (1000, 10_000, 100_000, 1_000_000)],
    *[(num_samples, 1000) for num_samples in (1000, 10_000, 50_000)],
    *[(num_samples, 21_843) for num_samples in (1000, 4000)],
]


def area(form: str, num_classes: int, logits, target):
    seen = seen_classes(num_classes)
    if form == "function":
        return lambda: ausuc(logits, target, seen, validate_args=False)
    metric = AUSUC(num_classes, seen, validate_args=False).to(logits.device)

    def run():
        metric.reset()
        for batch in zip(logits.split(1024), target.split(1024), strict=True):
            metric.update(*batch)
        return metric.compute()

    return run


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]:,} x {size[1]:,}")
@pytest.mark.parametrize("form", ["function", "metric"])
def test_ausuc(ratio, size, form, device):
    """AUSUC from logits, against two maxima over them."""
    logits, target = logits_and_target(*size, device)
    rounds = 3 if logits.numel() > 10**7 else 7
    budget = "2" if size == (50_000, 1000) else "none"
    ratio(area(form, size[1], logits, target), two_maxima(logits), rounds=rounds, budget=budget)


def slope(sizes: list[int], times: list[float]) -> float:
    x, y = torch.tensor(sizes).double().log(), torch.tensor(times).double().log()
    return float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


@pytest.mark.parametrize("part", ["from logits of 10 classes", "from margins"])
def test_growth(report, part):
    """Growth with the number of samples N: the exponent of time, fitted from N = 10,000 on."""
    sizes, times = [10_000, 100_000, 1_000_000], []
    if part == "from margins":
        sizes.append(10_000_000)
    for size in sizes:
        if part == "from margins":
            generator = torch.Generator().manual_seed(0)
            margin = torch.randn(size, generator=generator)
            code, of_class = torch.randint(20, (size,), generator=generator).int(), torch.arange(10) % 2
            run = lambda margin=margin, code=code, of=of_class: curve_compute(margin, code, of, "micro")  # noqa: E731
        else:
            run = area("function", 10, *logits_and_target(size, 10))
        run()
        times.append(statistics.median(seconds(run) for _ in range(3)))
        report(f"{1e9 * times[-1] / size:.0f} ns a sample", what=f"N = {size:,}")
    report(f"{slope(sizes, times):.2f}", "1 to 1.2", what="exponent")


@pytest.mark.parametrize(("num_samples", "num_classes"), [(300, 10), (1000, 100), (50_000, 1000)])
def test_loop_over_thresholds(report, num_samples, num_classes):
    """How many times as long a loop over all thresholds takes, each with the logits of all samples."""
    logits, target = logits_and_target(num_samples, num_classes)
    absent = torch.arange(num_classes) % 2 == 1
    is_absent = absent[target]

    def loop(thresholds) -> None:
        for gamma in thresholds:
            right = (logits + gamma * absent).argmax(1) == target
            right[~is_absent].double().mean(), right[is_absent].double().mean()

    few, all_of_them = min(num_samples, 3 if num_samples > 1000 else 1000), num_samples
    thresholds = torch.linspace(-5, 5, few)
    loop(thresholds[:2])
    ours = area("function", num_classes, logits, target)
    ours()
    theirs = statistics.median(seconds(lambda: loop(thresholds)) for _ in range(3)) * all_of_them / few
    time = statistics.median(seconds(ours) for _ in range(5))
    how = "measured" if few == all_of_them else f"extrapolated from {few} thresholds: {theirs / 3600:.1f} hours"
    report(f"{theirs / time:,.0f}", what=how)


@pytest.mark.parametrize("num_classes", [10, 100, 1000])
@pytest.mark.parametrize(
    "other",
    [
        lambda c: MulticlassAccuracy(c, average="micro", validate_args=False),
        lambda c: MulticlassAUROC(c, validate_args=False),
        lambda c: MulticlassAUROC(c, thresholds=200, validate_args=False),
    ],
    ids=["MulticlassAccuracy", "MulticlassAUROC", "MulticlassAUROC with 200 thresholds"],
)
@pytest.mark.filterwarnings("ignore:.*samples in target:UserWarning")
def test_ausuc_against_torchmetrics(ratio, other, num_classes):
    """AUSUC against metrics of torchmetrics, on the same 20 batches of 256 samples, with `compute`."""
    logits, target = logits_and_target(20 * 256, num_classes)
    batches = list(zip(logits.split(256), target.split(256), strict=True))

    def run(metric):
        metric.reset()
        for batch in batches:
            metric.update(*batch)
        metric.compute()

    ours, theirs = AUSUC(num_classes, seen_classes(num_classes), validate_args=False), other(num_classes)
    ratio(lambda: run(ours), lambda: run(theirs), rounds=3, budget="none")
