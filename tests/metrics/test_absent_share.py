"""The share of absent samples in traffic: against the definition, one sample at a time, and what a stream needs."""

from __future__ import annotations

import copy
import math
import pickle
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn

from lightning_calibft import calibrate, fold, set_absent_share, set_gamma
from lightning_calibft.estimators import PseudoAbsent
from lightning_calibft.functional.absent_share import estimate_share
from lightning_calibft.functional.share_table import ShareTable
from lightning_calibft.metrics import AbsentShare
from tests.helpers.processes import in_group

SEEN, ABSENT = [0, 1, 2, 5], [3, 4, 6]
CLASSES = 8  # one of them is neither


def drawn(number, share, seed=0):
    """Logits of unlabeled samples, and the group of each."""
    generator = torch.Generator().manual_seed(seed)
    is_absent = torch.rand(number, generator=generator) < share
    target = torch.where(
        is_absent,
        torch.tensor(ABSENT)[torch.randint(len(ABSENT), (number,), generator=generator)],
        torch.tensor(SEEN)[torch.randint(len(SEEN), (number,), generator=generator)],
    )
    logits = torch.randn(number, CLASSES, generator=generator)
    logits[:, SEEN] += 3
    logits[torch.arange(number), target] += 4
    logits[:, 7] += 20  # the class that never competes
    return logits, target


def calibrated():
    metric = PseudoAbsent(CLASSES, SEEN, ABSENT)
    logits, target = drawn(300, 0.0, seed=1)
    before = logits.clone()
    before[:, SEEN] -= 3
    metric.update(logits, target, before)
    return metric.share_table


TABLE = calibrated()


def make(**options):
    return AbsentShare(CLASSES, SEEN, ABSENT, share_table=TABLE, **options)


def reference(logits, half_life=None, before=None):
    """The mean of the posterior distribution and its 90 % interval, in plain loops."""
    ways = [(logits, TABLE, (1, 2))] + ([] if before is None else [(*before, (1,))])
    found = [log_likelihoods(*way, half_life, 70 / len(ways)) for way in ways]
    weight = [
        math.exp(sum(rows[row] for rows, _ in found)) * (p * (1 - p)) ** 0.5 for row, p in enumerate(TABLE.absent_share)
    ]
    cumulated, low, high = 0.0, None, None
    for w, p in zip(weight, TABLE.absent_share, strict=True):
        cumulated += w / sum(weight)
        low = p if low is None and cumulated >= 0.05 else low
        high = p if high is None and cumulated >= 0.95 else high
    mean = sum(w * p for w, p in zip(weight, TABLE.absent_share, strict=True)) / sum(weight)
    return mean, low, high, max(misfit for _, misfit in found)


def log_likelihoods(logits, table, numbers, half_life, most):
    """The log-likelihood of each share, and the misfit."""
    edges = table.gamma[::3]
    weights, bins = [], []
    for place, row in enumerate(logits.double().tolist()):
        margin = max(row[c] for c in SEEN) - max(row[c] for c in ABSENT)
        bins.append(sum(edge <= margin for edge in edges))
        weights.append(1.0 if half_life is None else 0.5 ** ((len(logits) - 1 - place) / half_life))
    total = sum(weights)
    size = total**2 / sum(weight**2 for weight in weights)
    frequency = [sum(w for w, b in zip(weights, bins, strict=True) if b == k) / total for k in range(len(edges) + 1)]

    def fractions(below):
        ends = [0.0, *below, 1.0]
        return [0.97 * (ends[k + 1] - ends[k]) + 0.03 / len(frequency) for k in range(len(frequency))]

    absent = fractions(table.absent_below[::3])
    log_likelihood = {}
    for row, share in enumerate(table.absent_share):
        for number in numbers:
            seen = fractions([1 - (1 - below) ** number for below in table.seen_below[::3]])
            mixture = [share * u + (1 - share) * s for s, u in zip(seen, absent, strict=True)]
            told = size / (1 + size / most)
            log_likelihood[row, number] = told * sum(
                f * math.log(q / f) for f, q in zip(frequency, mixture, strict=True) if f
            )
    misfit = -2 * max(log_likelihood.values()) / (len(frequency) - 1)
    rows = [
        math.log(sum(math.exp(log_likelihood[row, number] / max(1.0, misfit)) for number in numbers))
        for row in range(len(table.absent_share))
    ]
    return rows, misfit


@pytest.mark.parametrize("half_life", [None, 0.5, 20, 1000.0])
@pytest.mark.parametrize("sizes", [[90], [1, 40, 0, 49], [7] * 12 + [6]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_equals_the_definition_however_the_stream_is_cut(half_life, sizes, dtype):
    logits = drawn(90, 0.3)[0].to(dtype)
    metric = make(half_life=half_life)
    for part in logits.split(sizes):
        metric.update(part)
    mean, low, high, misfit = reference(logits, half_life)
    assert metric.compute().item() == pytest.approx(mean, rel=1e-9)
    assert metric.interval.tolist() == pytest.approx([low, high])
    assert metric.misfit.item() == pytest.approx(misfit, rel=1e-9)
    assert metric.compute().dtype == torch.float64


@pytest.mark.parametrize("share", [0.02, 0.4])
def test_two_models_tell_together(share):
    logits, target = drawn(90, 0.0, seed=2)
    estimator = PseudoAbsent(CLASSES, SEEN, ABSENT)
    before = logits.clone()
    before[:, SEEN] -= 3
    estimator.update(before, target, before)
    table = estimator.share_table
    now = drawn(200, share)[0]
    then = now.clone()
    then[:, SEEN] -= 3
    metrics = make(half_life=None), AbsentShare(CLASSES, SEEN, ABSENT, share_table=table, half_life=None)
    for metric, rows in zip(metrics, (now, then), strict=True):
        metric.update(rows)
    found = estimate_share(*(metric.counted for metric in metrics))
    mean, low, high, misfit = reference(now, before=(then, table))
    assert found.share.item() == pytest.approx(mean, rel=1e-9)
    assert found.interval.tolist() == pytest.approx([low, high])
    assert found.misfit.item() == pytest.approx(misfit, rel=1e-9)


@pytest.mark.parametrize("share", [0.02, 0.3, 0.9])
def test_the_share_is_found(share):
    inside = 0
    for seed in range(10):
        metric = make(half_life=None)
        metric.update(drawn(400, share, seed=10 + seed)[0])
        low, high = metric.interval.tolist()
        inside += low <= share <= high
        assert metric.compute().item() == pytest.approx(share, abs=0.12)
    assert inside >= 9


def test_gamma_in_the_logits_is_taken_out():
    logits, _ = drawn(200, 0.4)
    raw, with_gamma = make(), make(gamma=2.5)
    raw.update(logits)
    shifted = logits.clone()
    shifted[:, ABSENT] += 2.5
    with_gamma.update(shifted)
    assert with_gamma.compute().item() == pytest.approx(raw.compute().item(), abs=1e-6)


def test_a_jump_is_followed_and_the_past_is_forgotten():
    metric = make()
    metric.update(drawn(2000, 0.05)[0])
    before = metric.compute().item()
    metric.update(drawn(200, 0.7, seed=3)[0])
    after = metric.compute().item()
    assert before < 0.15
    assert after == pytest.approx(0.7, abs=0.15)
    lasting = make(half_life=None)
    lasting.update(drawn(2000, 0.05)[0])
    lasting.update(drawn(200, 0.7, seed=3)[0])
    assert lasting.compute() < 0.3


def test_samples_of_a_third_kind_are_told_and_the_interval_becomes_wide():
    metric = make()
    metric.update(drawn(300, 0.1)[0])
    narrow = metric.interval.diff().item()
    assert metric.misfit < 2
    lens = torch.zeros(CLASSES)  # covered: each sample has the same logits, with a margin between both groups
    lens[SEEN] = TABLE.gamma[30] + 0.01
    metric.update(lens.expand(300, -1))
    with pytest.warns(UserWarning, match="samples that are like neither"):
        metric.compute()
    assert metric.interval.diff().item() > 2 * narrow
    assert 0.001 < metric.compute() < 0.999
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # told once, until the traffic has fitted again
        metric.update(lens.expand(10, -1))
        metric.compute()
        metric.update(drawn(500, 0.1, seed=5)[0])
        metric.compute()
    assert metric.interval.diff().item() < 1.5 * narrow


def test_samples_with_nan_are_left_out():
    logits, _ = drawn(60, 0.5)
    broken = torch.cat([logits[:30], torch.full((7, CLASSES), math.nan), logits[30:], logits[:3] * math.nan])
    metric, clean = make(), make()
    metric.update(broken)
    clean.update(logits)
    assert metric.compute().item() == pytest.approx(clean.compute().item(), rel=1e-12)


def test_no_samples():
    metric = make()
    metric.update(torch.randn(0, CLASSES))
    with pytest.warns(UserWarning, match="received no samples"):
        assert metric.compute().isnan()
    assert metric.interval.isnan().all()


def test_forward_gives_the_batch_and_keeps_the_stream():
    logits, _ = drawn(80, 0.5)
    metric, whole, second = make(), make(), make()
    metric(logits[:40])
    of_batch = metric(logits[40:])
    whole.update(logits)
    second.update(logits[40:])
    assert of_batch.item() == pytest.approx(second.compute().item(), rel=1e-12)
    assert metric.compute().item() == pytest.approx(whole.compute().item(), rel=1e-12)


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda metric: pickle.loads(pickle.dumps(metric))])
def test_copies_go_on_by_themselves(twin):
    logits, _ = drawn(80, 0.5)
    metric = make()
    metric.update(logits[:40])
    first = metric.compute().item()
    other = twin(metric)
    other.update(logits[40:])
    metric_of_all = make()
    metric_of_all.update(logits)
    assert other.compute().item() == pytest.approx(metric_of_all.compute().item(), rel=1e-12)
    assert metric.compute().item() == first


def test_the_state_is_small_and_not_in_the_state_dict():
    metric = make()
    for _ in range(3):
        metric.update(drawn(500, 0.2)[0])
    assert sum(state.nbytes for state in metric.metric_state.values()) < 250
    assert metric.state_dict() == {}
    nn.ModuleDict({"share": metric}).half()
    assert metric.count.dtype == metric._constants["edges"].dtype == torch.float64


def test_an_update_never_waits_for_the_device():
    metric = make(validate_args=False).to("meta")
    metric.update(drawn(10, 0.2)[0].to("meta"))


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"half_life": 0}, ValueError, "`half_life` to be None or a positive number of samples, but got 0"),
        ({"half_life": math.inf}, ValueError, "`half_life`"),
        ({"half_life": "50"}, TypeError, "`half_life` to be a number"),
        ({"gamma": None}, TypeError, "`gamma` to be a number"),
        ({"share_table": None}, TypeError, "`share_table` to be a ShareTable"),
        (
            {"share_table": ShareTable((0.1, 0.9), (0.0, 1.0))},
            ValueError,
            "but got a table of gammas alone. Calibrate with the estimator 'pseudo_absent'",
        ),
        ({"normalize": True}, ValueError, "Unexpected keyword arguments: `normalize`"),
    ],
)
def test_wrong_arguments(wrong, error, message):
    with pytest.raises(error, match=message):
        AbsentShare(CLASSES, SEEN, ABSENT, **{"share_table": TABLE, **wrong})


def test_wrong_batches_leave_no_trace():
    metric = make()
    for preds, error, message in (
        (torch.randn(4, 3), ValueError, "to have 8 columns"),
        (torch.zeros(4, CLASSES, dtype=torch.long), TypeError, "floating point"),
        (torch.randn(CLASSES), ValueError, "two-dimensional"),
    ):
        with pytest.raises(error, match=message):
            metric.update(preds)
    assert metric.count.sum() == 0
    with pytest.warns(UserWarning, match="look like probabilities"):
        metric.update(torch.randn(4, CLASSES).softmax(1))


def _share_of_two():
    rank, metric = dist.get_rank(), make(half_life=None)
    logits, _ = drawn(90, 0.3)
    if rank == 0:
        metric.update(logits[:70])
    else:
        metric.update(logits[70:])
    return metric.compute(), metric.interval


def test_processes_add_up(tmp_path):
    metric = make(half_life=None)
    metric.update(drawn(90, 0.3)[0])
    for share, interval in in_group(_share_of_two, tmp_path):
        assert share.item() == pytest.approx(metric.compute().item(), rel=1e-12)
        assert interval.tolist() == metric.interval.tolist()


class Shipped(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(CLASSES, CLASSES)
        with torch.no_grad():
            self.fc.weight.copy_(torch.eye(CLASSES))
            self.fc.bias.zero_()

    def forward(self, x):
        return self.fc(x)


def shipped():
    """A calibrated model that gives its inputs as logits."""
    before, model = Shipped(), Shipped().eval()
    with torch.no_grad():
        before.fc.bias[SEEN] = -3.0
    held_out, target = drawn(300, 0.0, seed=1)
    options = {"seen_classes": SEEN, "absent_classes": ABSENT, "estimator": "pseudo_absent", "pretrained": before}
    calibrate(model, [(held_out, target)], progress=False, **options)
    return model


@pytest.mark.parametrize("folded", [False, True])
def test_it_follows_the_gamma_of_a_model(folded):
    logits, _ = drawn(150, 0.4)
    raw = make(half_life=None)
    raw.update(logits)
    model = shipped()
    if folded:
        fold(model)
    metric = AbsentShare.from_model(model, half_life=None)
    metric.update(model(logits[:50]))
    twin = metric.clone()
    set_absent_share(model, metric.compute())
    for each in (metric, twin):
        each.update(model(logits[50:100]))
    set_absent_share(model, 0.9)
    for each in (metric, twin):
        each.update(model(logits[100:]))
        assert each.compute().item() == pytest.approx(raw.compute().item(), rel=1e-6)
    if not folded:
        model.train()
        metric.reset()
        metric.update(model(logits))
        assert metric.compute().item() == pytest.approx(raw.compute().item(), rel=1e-6)
    assert len(list(metric.parameters())) == 0
    assert metric.state_dict() == {}


def test_a_copy_of_a_model_and_its_metric_belong_together():
    model = shipped()
    both = copy.deepcopy(nn.ModuleDict({"model": model, "share": AbsentShare.from_model(model, half_life=None)}))
    set_absent_share(model, 0.9)
    logits, _ = drawn(150, 0.4)
    both["share"].update(both["model"](logits))
    raw = make(half_life=None)
    raw.update(logits)
    assert both["share"].compute().item() == pytest.approx(raw.compute().item(), rel=1e-6)


@pytest.mark.parametrize("model", [Shipped(), set_gamma(Shipped(), 1.0, SEEN)])
def test_a_model_without_a_table(model):
    with pytest.raises(ValueError, match="calibrated, with a table of gammas over shares, but got a Shipped without"):
        AbsentShare.from_model(model)
