"""Gamma for the share of absent samples that is estimated from unlabeled ones."""

from __future__ import annotations

import copy
import math
import random

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_calibft import calibrate, detach, get_gamma
from lightning_calibft.estimators import PseudoAbsent
from lightning_calibft.functional.absent_share import estimate_share
from lightning_calibft.metrics import AbsentShare
from tests.helpers.processes import in_group
from tests.helpers.runs import quiet

pytestmark = quiet

CLASSES, SEEN = 6, [0, 1, 2, 3]
CENTERS = 5 * torch.eye(CLASSES)


class Linear(nn.Module):
    """Adds its inputs up, where there are several."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(CLASSES)
        self.drop = nn.Dropout(0.2)
        self.fc = nn.Linear(CLASSES, CLASSES)

    def forward(self, x, y=None):
        return self.fc(self.drop(self.norm(x if y is None else x + y)))


def model(absent_bias=-4.0):
    net = Linear()
    with torch.no_grad():
        net.fc.weight.copy_(torch.eye(CLASSES))
        net.fc.bias.zero_()
        net.fc.bias[4:] = absent_bias
    return net


def points(number, share, seed=0):
    generator = torch.Generator().manual_seed(seed)
    absent = torch.rand(number, generator=generator) < share
    target = torch.where(absent, 4, 0) + (torch.rand(number, generator=generator) * torch.where(absent, 2, 4)).long()
    return CENTERS[target] + torch.randn(number, CLASSES, generator=generator), target


BEFORE = model(0.0)
HELD_OUT = TensorDataset(*points(200, 0.0))
X, Y = points(300, 0.3, seed=1)


def run(unlabeled, net=None, data=None, **options):
    net = model() if net is None else net
    options = {"estimator": "pseudo_absent", "pretrained": BEFORE, **options}
    return net, calibrate(net, data or DataLoader(HELD_OUT, 32), SEEN, unlabeled=unlabeled, progress=False, **options)


def counted(net, table):
    metric = AbsentShare(CLASSES, SEEN, share_table=table, half_life=None)
    metric.update(copy.deepcopy(net).eval()(X).detach())
    return metric.counted


def expected():
    """What both models say of the raw logits."""
    _, result = run(None)
    before, (x, y) = PseudoAbsent(CLASSES, SEEN), HELD_OUT.tensors
    logits = copy.deepcopy(BEFORE).eval()(x).detach()
    before.update(logits, y, logits)
    estimate = estimate_share(counted(model(), result.share_table), counted(BEFORE, before.share_table))
    return estimate.share.item(), tuple(estimate.interval.tolist()), result.share_table


FORMS = {
    "loader": lambda: DataLoader(TensorDataset(X, Y), 32, shuffle=True, drop_last=True),
    "tensors": lambda: list(X.split(32)),
    "a loader of tensors": lambda: DataLoader(X, 32),
    "tuples of one": lambda: DataLoader(TensorDataset(X), 32),
    "a generator": lambda: (x for x in X.split(50)),
    "mappings": lambda: [{"image": x} for x in X.split(50)],
    "mappings by name of the argument": lambda: [{"x": x, "id": "a"} for x in X.split(50)],
    "mappings with labels": lambda: [{"image": x, "label": y} for x, y in zip(X.split(50), Y.split(50), strict=True)],
    "wrong labels": lambda: [(x, torch.full((len(x),), 1000)) for x in X.split(50)],
    "with paths": lambda: [(x, ["a"] * len(x)) for x in X.split(50)],
    "an empty batch": lambda: [X[:0], *X.split(50)],
}


@pytest.mark.parametrize("form", FORMS)
def test_the_share_of_the_metric_in_every_form(form):
    share, interval, table = expected()
    net, result = run(FORMS[form]())
    assert result.absent_share == pytest.approx(share, rel=1e-6)
    assert result.absent_share_interval == pytest.approx(interval)
    assert result.gamma == pytest.approx(table.at(share)["gamma"], rel=1e-6)
    assert get_gamma(net) == pytest.approx(result.gamma, rel=1e-6)
    assert interval[0] < 0.3 < interval[1]
    assert result.as_dict()["absent_share_interval"] == list(result.absent_share_interval)


def test_a_tuple_of_inputs():
    share, *_ = expected()
    halves = [(x / 2, x / 2) for x in X.split(50)]
    labeled = [((x / 2, x / 2), y) for x, y in DataLoader(HELD_OUT, 32)]
    _, result = run(halves, data=labeled)
    assert result.absent_share == pytest.approx(share, abs=1e-4)


def test_the_users_function():
    share, *_ = expected()
    data = [{"a": {"b": x}, "c": y} for x, y in DataLoader(HELD_OUT, 32)]
    _, result = run([{"a": {"b": X}}], data=data, unpack_batch=lambda batch: (batch["a"]["b"], batch.get("c")))
    assert result.absent_share == pytest.approx(share, rel=1e-6)


def test_nothing_else_changes():
    net = model().train()
    net.norm.eval()
    before, states = (
        copy.deepcopy(net.state_dict()),
        (random.getstate(), np.random.get_state()[1], torch.get_rng_state()),
    )
    run(FORMS["loader"](), net)
    assert net.training
    assert not net.norm.training
    assert random.getstate() == states[0]
    assert (np.random.get_state()[1] == states[1]).all()
    assert torch.equal(torch.get_rng_state(), states[2])
    after = detach(net).state_dict()
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_the_best_gamma_of_labeled_samples():
    labeled = DataLoader(TensorDataset(*points(400, 0.5, seed=3)), 64)
    _, result = run([X], data=labeled, estimator="operating_point", pretrained=None)
    assert result.absent_share == pytest.approx(0.3, abs=0.1)
    assert result.absent_share == pytest.approx(estimate_share(counted(model(), result.share_table)).share.item())
    assert result.gamma == pytest.approx(result.share_table.at(result.absent_share)["gamma"])


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"absent_share": 0.1}, ValueError, "`absent_share` to be None with `unlabeled` samples"),
        ({"estimator_kwargs": {"absent_share": 0.1}}, ValueError, "`absent_share` to be None with `unlabeled`"),
        ({"estimator": "alg", "pretrained": None}, ValueError, "but got 'alg', which does not. Use 'pseudo_absent'"),
        (
            {"estimator": "operating_point", "estimator_kwargs": {"criterion": "harmonic_mean"}, "pretrained": None},
            ValueError,
            "but got 'operating_point'",
        ),
        ({"unlabeled": "folder"}, TypeError, "`unlabeled` to be a DataLoader or an iterable of batches, but got a str"),
        ({"unlabeled": X}, TypeError, "but got a Tensor"),
        ({"unlabeled": []}, ValueError, "`unlabeled` to hold samples from where the model will be used.* got none"),
        ({"unlabeled": [X * math.nan]}, ValueError, "but 300 of 300 samples have NaN or infinite logits"),
        ({"unlabeled": iter([{"path": ["a"]}])}, ValueError, "to hold a tensor of inputs, but got a dict without one"),
        ({"unlabeled": [X[:, :3]]}, ValueError, "Could not read the logits of Linear"),
    ],
)
def test_what_is_refused_leaves_the_model_alone(wrong, error, message):
    net = model()
    with pytest.raises(error, match=message):
        run(**{"unlabeled": [X], "net": net, **wrong})
    assert "fc.absent_class_calibration.offset" not in net.state_dict()


def test_the_model_before_tells_apart_what_the_fine_tuned_one_mixes_up():
    """Fine-tuning has made new absent samples more like seen ones than their pseudo-absent copies are."""
    net = model()
    with torch.no_grad():
        net.fc.weight[:4, 4:] = 0.7  # each absent class has become a bit of all seen ones
    _, result = run([X], net)
    alone = estimate_share(counted(net, result.share_table)).share.item()
    assert abs(result.absent_share - 0.3) < 0.5 * abs(alone - 0.3)


def test_the_weights_before_are_those_of_unlabeled_samples_as_well():
    """Those of a model that knows nothing tell nothing, and a bad one is noticed."""
    ignorant = model(0.0)
    with torch.no_grad():
        ignorant.fc.weight.zero_()
    _, result = run([X], pretrained=ignorant)
    assert result.absent_share_interval[0] < 0.3 < result.absent_share_interval[1]
    broken = copy.deepcopy(BEFORE)
    with torch.no_grad():
        broken.fc.weight[0] *= math.inf
    with pytest.raises(ValueError, match="batch 0 has NaN or infinite ones"):
        run([X], pretrained=broken)
    infinite = [X.clone()]
    infinite[0][7, 5] = 1e38  # beyond float32 in the model before alone
    large = copy.deepcopy(BEFORE)
    with torch.no_grad():
        large.fc.weight[5, 5] = 100.0
    with pytest.raises(ValueError, match="1 of 300 samples have NaN or infinite logits"):
        run(infinite, pretrained=large)


def test_a_metric_of_the_user_is_not_changed():
    metric = PseudoAbsent(CLASSES, SEEN)
    options = {"estimator": metric, "pretrained": BEFORE, "unlabeled": [X], "progress": False}
    result = calibrate(model(), DataLoader(HELD_OUT, 32), **options)
    assert result.absent_share == pytest.approx(expected()[0], rel=1e-6)
    assert metric.absent_share is None


def _of_two():
    rank = dist.get_rank()
    torch.manual_seed(rank)
    own = DataLoader(TensorDataset(X), 32)
    return vars(run(own)[1])["absent_share"], run([X[:200], X[200:]][rank : rank + 1])[1].gamma


def test_processes_read_their_shares(tmp_path):
    share, _, table = expected()
    for found, gamma in in_group(_of_two, tmp_path):
        assert found == pytest.approx(share, rel=1e-6)
        assert gamma == pytest.approx(table.at(share)["gamma"], rel=1e-6)
