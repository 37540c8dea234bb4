"""Gamma of an operating point of one's choice, over batches, processes and copies."""

from __future__ import annotations

import pickle
import warnings

import pytest
import torch
import torch.distributed as dist
from torchmetrics import MetricCollection

from lightning_calibft.estimators import OperatingPoint
from lightning_calibft.metrics import AUSUC, SeenUnseenCurve
from tests.functional.test_best_gamma import CONSTRAINTS, CRITERIA, SHARES, _reference_best_gamma
from tests.helpers.processes import in_group
from tests.helpers.references import random_case

CUTS = [30, 53, 60]  # where the 60 samples are cut between two processes; at 60 the second has none
POINTS = {
    "accuracy": {},
    "macro": {"criterion": "harmonic_mean", "average": "macro"},
    "constrained": {"criterion": "equal_accuracies", "min_seen_accuracy": 0.35, "min_absent_accuracy": 0.1},
}


def make(**kwargs):
    return OperatingPoint(9, *random_case(0)[2:], **kwargs)


def report(metric):
    return metric.compute().item(), metric.standard_error.item(), metric.num_samples


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("average", ["micro", "macro"])
@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("constraints", CONSTRAINTS, ids=str)
def test_gamma_equals_brute_force(seed, average, criterion, constraints):
    case, config = random_case(seed), {"criterion": criterion, "average": average, **constraints}
    dtype = [torch.float32, torch.float64, torch.bfloat16, torch.float16][seed]
    metric = OperatingPoint(9, *case[2:], **config)
    for part in zip(case[0].to(dtype).split(13), case[1].split(13), strict=True):
        metric.update(*part)
    expected, message = _reference_best_gamma(case, **config)
    if message:
        with pytest.raises(ValueError, match="to be an accuracy that some gamma reaches"):
            metric.compute()
    else:
        assert metric.compute() == expected
        assert metric.compute().dtype == metric.standard_error.dtype == torch.float64
        assert metric.num_samples == sum(label in case[2] + case[3] for label in case[1].tolist())


@pytest.mark.parametrize("share", SHARES)
def test_a_told_share(share):
    case = random_case(1)
    metric = OperatingPoint(9, *case[2:], absent_share=share)
    metric.update(*case[:2])
    assert metric.compute() == _reference_best_gamma(case, absent_share=share)[0]
    assert metric.compute() == metric.best_gamma(absent_share=share)
    assert metric.standard_error.isfinite()


@pytest.mark.parametrize("config", POINTS.values(), ids=POINTS)
def test_batches_and_order_do_not_matter(config):
    logits, target, *_ = random_case(0)
    whole = make(**config)
    whole.update(logits, target)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(1))
    for size in (1, 7, 60):
        metric = make(**config)
        for part in zip(logits[order].split(size), target[order].split(size), strict=True):
            metric.update(*part)
        assert report(metric) == report(whole)


def test_copies_reset_and_the_random_state():
    logits, target, *_ = random_case(0)
    metric = make(criterion="harmonic_mean")
    metric.update(logits, target)
    before = torch.get_rng_state()
    values = report(metric)
    assert torch.equal(torch.get_rng_state(), before)
    assert not metric.state_dict()
    for twin in (pickle.loads(pickle.dumps(metric)), metric.clone()):
        assert report(twin) == values
        twin.update(logits[:9], target[:9])
        assert twin.num_samples > values[2]
    assert report(metric) == values
    metric.reset()
    assert metric._samples is None
    metric.update(logits, target)
    assert report(metric) == values


def test_mapped_and_ignored_targets():
    logits, target, *_ = random_case(0)
    metric, mapped = make(), make(class_map=list(range(8, -1, -1)), ignore_index=-100)
    metric.update(logits, target)
    mapped.update(logits, 8 - target)
    mapped.update(torch.randn(3, 9), torch.full((3,), -100))
    assert report(mapped) == report(metric)


@pytest.mark.parametrize(("target", "count"), [([], 0), ([0, 1], 2), ([2, 2], 2), ([3, 3], 0)])
def test_a_group_without_samples_gives_nan_with_one_warning(target, count):
    metric = OperatingPoint(4, [0, 1], [2], min_seen_accuracy=1.0, min_absent_accuracy=1.0)
    metric.update(torch.randn(len(target), 4), torch.tensor(target, dtype=torch.long))
    with pytest.warns(UserWarning, match="received no .*samples") as caught:
        assert metric.compute().isnan()
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert metric.standard_error.isnan()
        assert metric.num_samples == count


def test_an_accuracy_out_of_reach_is_said_and_more_samples_may_reach_it():
    logits = torch.tensor([[3.0, 0.0, 0.0], [1.0, 0.0, 2.0], [9.0, 5.0, 0.0]])
    metric = OperatingPoint(3, [0, 1], min_seen_accuracy=0.75)
    metric.update(logits, torch.tensor([0, 2, 1]))
    for _ in range(2):
        with pytest.raises(ValueError, match=r"`min_seen_accuracy` .* but got 0\.75, and the best is 0\.5\. Ask"):
            metric.compute()
    metric.update(logits[[0, 0]], torch.tensor([0, 0]))
    assert metric.compute() == 1.0


def test_arguments_are_validated():
    with pytest.raises(ValueError, match="`criterion` to be one of 'accuracy', 'harmonic_mean', 'equal_accuracies'"):
        make(criterion="f1")
    for name in ("min_seen_accuracy", "min_absent_accuracy"):
        with pytest.raises(ValueError, match=rf"`{name}` to be a number in \[0, 1\], but got 80"):
            make(**{name: 80})
    with pytest.raises(ValueError, match="`average` to be one of"):
        make(average="weighted")


def test_points_share_one_state_with_the_curve():
    logits, target, seen, absent = random_case(0)
    points = {name: make(**config) for name, config in POINTS.items()}
    alone = {name: make(**config) for name, config in POINTS.items()}
    metrics = MetricCollection({"area": AUSUC(9, seen, absent), "curve": SeenUnseenCurve(9, seen, absent), **points})
    for _ in range(2):
        for part in zip(logits.split(25), target.split(25), strict=True):
            metrics.update(*part)
            for metric in alone.values():
                metric.update(*part)
        assert len(metrics.compute_groups) == 1
        values = metrics.compute()
        for name, metric in alone.items():
            assert values[name] == metric.compute()
            assert report(metrics[name]) == report(metric)
            metric.reset()
        metrics.reset()


def test_plot_shows_gamma():
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("Agg")
    metric = make()
    metric.update(*random_case(0)[:2])
    figure, ax = metric.plot()
    assert ax.get_lines()[0].get_ydata()[0] == metric.compute()
    pyplot.close(figure)


def _work():
    rank = dist.get_rank()
    logits, target, *_ = random_case(0)
    results = {}
    for cut in CUTS:
        mine = slice(0, cut) if rank == 0 else slice(cut, None)
        for name, config in POINTS.items():
            metric = make(**config)
            if len(target[mine]):
                metric.update(logits[mine], target[mine])
            results[name, cut] = report(metric)
        metric = make(min_seen_accuracy=1.0)
        metric.update(logits[mine], target[mine])
        for _ in range(2):
            with pytest.raises(ValueError, match="`min_seen_accuracy` to be an accuracy"):
                metric.compute()
        # Each process still has its own samples, and only those.
        assert sum(map(len, metric.metric_state["code"])) == len(target[mine])
    metric = make()
    metric.update(logits[rank::2], target[rank::2])
    metric.compute()
    if rank == 0:  # after `compute` on all processes, one may read on by itself
        results["alone"] = report(metric)
    return results


def test_two_processes(tmp_path):
    for rank, results in enumerate(in_group(_work, tmp_path)):
        for name, config in POINTS.items():
            metric = make(**config)
            metric.update(*random_case(0)[:2])
            for cut in CUTS:
                assert results[name, cut] == report(metric)
        if rank == 0:
            assert results["alone"] == results["accuracy", 30]
