"""What the metrics cost: time against the floor of reading the logits, and bytes of state a sample."""

from __future__ import annotations

import pytest
import torch
from torchmetrics.classification import MulticlassAccuracy

from lightning_calibft.estimators import ESTIMATORS, needs_absent_samples, needs_pretrained_logits
from lightning_calibft.metrics import (
    AUSUC,
    AverageLogitGap,
    HarmonicMeanAccuracy,
    SeenUnseenCurve,
    SplitAccuracy,
    absent_class_metrics,
)
from tests.benchmarks.conftest import DEVICES

SEEN = list(range(0, 1000, 2))
ABSENT = list(range(1, 1000, 2))


def logits_and_target(num_samples: int, num_classes: int, device: str):
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(num_classes, (num_samples,), generator=generator)
    logits = torch.randn(num_samples, num_classes, generator=generator)
    logits[torch.arange(num_samples), target] += 3
    return logits.to(device), target.to(device)


@pytest.mark.parametrize("device", DEVICES)
def test_ausuc_against_one_max_per_group(ratio, device):
    logits, target = logits_and_target(50_000, 1000, device)
    seen, absent = torch.tensor(SEEN, device=device), torch.tensor(ABSENT, device=device)
    metric = AUSUC(1000, SEEN, ABSENT, validate_args=False).to(device)

    def ours():
        metric.reset()
        metric.update(logits, target)
        return metric.compute()

    def floor():
        return logits[:, seen].max(1), logits[:, absent].max(1)

    assert ratio(ours, floor, rounds=9, budget="2") > 0


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ESTIMATORS)
def test_estimator_against_one_max_per_group(ratio, name, device):
    """The update alone: what it costs beside the forward that the logits come from."""
    logits, target = logits_and_target(20_000, 1000, device)
    seen, absent = torch.tensor(SEEN, device=device), torch.tensor(ABSENT, device=device)
    options = {"gamma": 1.0} if name == "fixed" else {}
    metric = ESTIMATORS[name](1000, SEEN, ABSENT, validate_args=False, **options).to(device)
    target = seen[target // 2] if not needs_absent_samples(name) else target
    before = [logits.flip(0)] if needs_pretrained_logits(name) else []

    def ours():
        metric.reset()
        metric.update(logits, target, *before)

    def floor():
        return logits[:, seen].max(1), logits[:, absent].max(1)

    assert ratio(ours, floor, rounds=5, budget="none") > 0


@pytest.mark.parametrize("device", DEVICES)
def test_collection_against_torchmetrics_accuracy(ratio, device):
    logits, target = logits_and_target(20_000, 1000, device)
    metrics = absent_class_metrics(1000, SEEN, ABSENT, validate_args=False).to(device)
    accuracy = MulticlassAccuracy(1000, average="micro", validate_args=False).to(device)
    assert ratio(
        lambda: metrics.update(logits, target), lambda: accuracy.update(logits, target), rounds=9, budget="none"
    )


@pytest.mark.parametrize("cls", [AUSUC, SeenUnseenCurve, SplitAccuracy, HarmonicMeanAccuracy, AverageLogitGap])
@pytest.mark.parametrize("num_classes", [10, 1000])
def test_bytes_of_state_a_sample(benchmark, report, cls, num_classes):
    metric = cls(num_classes, list(range(num_classes // 2)))

    def size() -> int:
        states = [getattr(metric, name) for name in metric._defaults]
        tensors = [tensor for state in states for tensor in (state if isinstance(state, list) else [state])]
        return sum(tensor.nbytes for tensor in tensors)

    empty, samples = size(), 4096
    benchmark.pedantic(metric.update, args=logits_and_target(samples, num_classes, "cpu"), rounds=1)
    bytes_a_sample = (size() - empty) / samples
    report(f"{bytes_a_sample:g} bytes", "8 bytes")
    assert bytes_a_sample <= 8
