from __future__ import annotations

import pytest
import torch
from torchmetrics import MetricCollection

from lightning_calibft import functional as F
from lightning_calibft.estimators import FixedGamma, OperatingPoint
from lightning_calibft.metrics import (
    AUSUC,
    AverageLogitGap,
    HarmonicMeanAccuracy,
    NearestClassMeanAccuracy,
    SeenUnseenCurve,
    SplitAccuracy,
    absent_class_metrics,
)
from tests.helpers.references import random_case

# Right for every configuration, so that all states are equal after it.
EASY = torch.eye(4)[:2] * 20, torch.tensor([0, 1])
HARD = torch.randn(50, 4, generator=torch.Generator().manual_seed(1)), torch.arange(50) % 4
MEANS = torch.eye(4)


def _group_of(metrics, name):
    return next(set(group) for group in metrics.compute_groups.values() if name in group)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lambda: SplitAccuracy(4, [0, 1]), lambda: SplitAccuracy(4, [0, 1], samples="seen")),
        (lambda: SplitAccuracy(4, [0, 1]), lambda: SplitAccuracy(4, [0, 1], candidates="seen")),
        (lambda: SplitAccuracy(4, [0, 1]), lambda: SplitAccuracy(4, [0, 1], top_k=2)),
        (lambda: SplitAccuracy(4, [0, 1]), lambda: SplitAccuracy(4, [0, 1], ignore_index=3)),
        (lambda: SplitAccuracy(4, [0, 1]), lambda: SplitAccuracy(4, [0, 1], class_map=[0, 1, 3, 2])),
        (lambda: AUSUC(4, [0, 1]), lambda: AUSUC(4, [0, 1], class_map=[0, 1, 3, 2])),
        (lambda: AUSUC(4, [0, 1]), lambda: AUSUC(4, [0, 1, 2])),
        (lambda: AUSUC(4, [0, 1]), lambda: OperatingPoint(4, [0, 1], criterion="harmonic_mean")),
        (lambda: AverageLogitGap(4, [0, 1]), lambda: FixedGamma(4, [0, 1], gamma=1.0)),
        (lambda: FixedGamma(4, [0, 1], gamma=0.0), lambda: FixedGamma(4, [0, 1], gamma=1.0)),
        (lambda: SplitAccuracy(4, [0, 1]), lambda: SplitAccuracy(4, [0, 1], [2])),
        (lambda: SplitAccuracy(4, [0, 1]), lambda: SplitAccuracy(4, [0, 1, 2])),
        (lambda: SplitAccuracy(2, [0]), lambda: SplitAccuracy(2, [0], average="macro")),
        (lambda: SplitAccuracy(4, [0, 1]), lambda: HarmonicMeanAccuracy(4, [0, 1])),
        (lambda: AUSUC(4, [0, 1]), lambda: SeenUnseenCurve(4, [0, 1])),
        (lambda: AUSUC(4, [0, 1]), lambda: AUSUC(4, [0, 1], average="macro")),
        (lambda: AUSUC(4, [0, 1]), lambda: AUSUC(4, [0, 1], ignore_index=3)),
        (lambda: AUSUC(4, [0, 1]), lambda: AUSUC(4, [0, 1], [2])),
        (lambda: AverageLogitGap(4, [0, 1]), lambda: AverageLogitGap(4, [0, 1], ignore_index=1)),
        (
            lambda: NearestClassMeanAccuracy(4, [0, 1], class_means=MEANS),
            lambda: NearestClassMeanAccuracy(4, [0, 1], class_means=MEANS[[0, 1, 3, 2]]),
        ),
        (
            lambda: SplitAccuracy(4, [0, 1]),
            lambda: NearestClassMeanAccuracy(4, [0, 1], class_means=MEANS[[0, 1, 3, 2]]),
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:The metric received no")
def test_two_configurations_in_one_collection_stay_right(one, other):
    width = one().split.num_classes
    easy, hard = ((logits[:, :width], target % width) for logits, target in (EASY, HARD))
    metrics = MetricCollection({"one": one(), "other": other()})
    for _ in range(2):  # groups formed in the first epoch are kept after a reset
        alone = one(), other()
        for batch in (easy, hard, hard):
            metrics.update(*batch)
            for metric in alone:
                metric.update(*batch)
        for value, metric in zip(metrics.compute().values(), alone, strict=True):
            expected = metric.compute()
            for a, b in zip(*((v if isinstance(v, tuple) else (v,)) for v in (value, expected)), strict=True):
                assert torch.equal(a, b)
        metrics.reset()


def test_same_update_shares_one_state():
    alike = MetricCollection({"ausuc": AUSUC(4, [0, 1]), "curve": SeenUnseenCurve(4, [0, 1], average="macro")})
    # In a collection of the user's own, too, which forms the groups by itself.
    own = MetricCollection({"val": absent_class_metrics(4, [0, 1])})
    for metrics in (alike, own):
        metrics.update(*HARD)
    assert _group_of(alike, "ausuc") == {"ausuc", "curve"}
    accuracies = {"val_acc_all", "val_acc_seen", "val_acc_absent", "val_acc_harmonic"}
    assert _group_of(own, "val_acc_all") == accuracies
    assert _group_of(own, "val_ausuc") == {"val_ausuc"}


def test_the_groups_of_absent_class_metrics_are_told():
    """Before any batch has been seen; the first of them alone is updated, and reduces each batch once."""
    metrics = absent_class_metrics(4, [0, 1], prefix="val_")
    assert metrics.compute_groups == {0: ["ausuc", "acc_all", "acc_absent", "acc_harmonic", "acc_seen"]}
    updated = []
    for name, metric in metrics.items(keep_base=True, copy_state=False):
        metric.update = lambda *args, name=name: updated.append(name)
    metrics.update(*HARD)
    assert updated == ["ausuc"]


def test_absent_class_metrics():
    logits, target, seen, absent = random_case(0)
    metrics = absent_class_metrics(9, torch.tensor(seen), iter(absent), prefix="val_", average="macro")
    for part in zip(logits.split(25), target.split(25), strict=True):
        metrics.update(*part)
    args, kwargs = (logits, target, seen, absent), {"average": "macro"}
    expected = {
        "val_ausuc": F.ausuc(*args, **kwargs),
        "val_acc_all": F.split_accuracy(*args, **kwargs),
        "val_acc_seen": F.split_accuracy(*args, samples="seen", **kwargs),
        "val_acc_absent": F.split_accuracy(*args, samples="absent", **kwargs),
        "val_acc_harmonic": F.harmonic_mean_accuracy(*args, **kwargs),
    }
    assert {key: value.item() for key, value in metrics.compute().items()} == pytest.approx(
        {key: value.item() for key, value in expected.items()}, rel=1e-12
    )
    assert set(absent_class_metrics(9, seen, postfix="_t").keys()) == {
        f"{key}_t" for key in ("ausuc", "acc_all", "acc_seen", "acc_absent", "acc_harmonic")
    }


def test_forward_of_a_collection():
    logits, target, seen, absent = random_case(0)
    metrics = absent_class_metrics(9, seen, absent)
    for part in zip(logits.split(30), target.split(30), strict=True):
        values = metrics(*part)
        assert values["ausuc"] == F.ausuc(*part, seen, absent)
        assert values["acc_absent"] == F.split_accuracy(*part, seen, absent, samples="absent")
    assert metrics.compute()["ausuc"] == F.ausuc(logits, target, seen, absent)
    assert metrics.clone().state_dict() == {}


def test_reading_between_updates():
    """Values, copies of the metrics and metrics that were added follow each batch, and so does a reset."""
    logits, target, seen, absent = random_case(0)
    metrics = absent_class_metrics(9, seen, absent)
    for end in (20, 40, 60):
        metrics.update(preds=logits[end - 20 : end], target=target[end - 20 : end])
        args = logits[:end], target[:end], seen, absent
        assert metrics["acc_seen"].compute() == F.split_accuracy(*args, samples="seen")
        assert metrics.compute()["acc_harmonic"] == F.harmonic_mean_accuracy(*args)
        assert {name: metric.compute() for name, metric in metrics.items()} == metrics.compute()
    metrics.reset()
    metrics.add_metrics({"gap": AverageLogitGap(9, seen, absent)})
    metrics.update(logits, target)
    values = metrics.compute()
    assert values["acc_all"] == F.split_accuracy(logits, target, seen, absent)
    if len(metrics.compute_groups) > 1:  # torchmetrics 1.6.0 does not update metrics that are added to given groups
        assert values["gap"].item() == pytest.approx(F.average_logit_gap(logits, target, seen, absent).gamma.item())
