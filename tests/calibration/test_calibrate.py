"""``calibrate()``: the pass without Lightning."""

from __future__ import annotations

import copy
import random
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_calibft import CalibrationResult, ClassSplit, calibrate
from lightning_calibft.estimators import ESTIMATORS
from lightning_calibft.metrics import AverageLogitGap
from tests.calibration.nets import ALL, X, Y, assert_calibrated, net, raw
from tests.helpers.runs import ABSENT, NUM_CLASSES, SEEN, TRAIN, assert_same, blobs, loader, quiet

pytestmark = quiet


def batches(data=TRAIN, size=8):
    return list(DataLoader(data, size))


@pytest.mark.parametrize("seen", [lambda: None, lambda: torch.tensor(SEEN), lambda: iter(SEEN)])
@pytest.mark.parametrize(
    "data",
    [
        DataLoader(TRAIN, 8),
        loader(batch_size=7, drop_last=True),
        loader(batch_size=1),
        loader(num_workers=1),
        batches(),
        tuple(batches()),
        [{"image": x, "label": y} for x, y in batches()],
        DataLoader([{"target": y, "x": x, "id": "a"} for x, y in TRAIN], 8),
        [loader(TensorDataset(X[:20], Y[:20])), loader(TensorDataset(X[20:], Y[20:]))],
        {"a": loader(TensorDataset(X[:20], Y[:20])), "b": loader(TensorDataset(X[20:], Y[20:]))},
        [(X, Y)],
        [(X[:0], Y[:0]), *batches(), (X[:0], Y[:0])],
    ],
    ids=[
        *("loader", "shuffled", "single", "workers", "list", "tuple"),
        *("mappings", "named", "loaders", "dict", "one", "empty"),
    ],
)
def test_gamma_is_the_average_logit_gap(data, seen):
    model = net()
    result = calibrate(model, data, seen(), progress=False)
    assert_calibrated(model, result)
    assert result.split == ClassSplit(NUM_CLASSES, SEEN)
    assert result.estimator == "alg"
    shift = result.gamma * torch.isin(torch.arange(NUM_CLASSES), torch.tensor(ABSENT))
    torch.testing.assert_close(model.eval()(X), raw(model) + shift)


def test_a_generator_is_read_once():
    model = net()
    result = calibrate(model, (batch for batch in batches()), SEEN, progress=False)
    assert_calibrated(model, result)
    for data in ((batch for batch in batches()), iter(DataLoader(TRAIN, 8)), zip(X.split(8), Y.split(8), strict=True)):
        keys = list((model := net()).state_dict())
        with pytest.raises(ValueError, match=r"`seen_classes` to name .* can be read only once, but got None and a"):
            calibrate(model, data, progress=False)
        assert list(model.state_dict()) == keys


def test_absent_classes_can_be_named():
    model = net()
    result = calibrate(model, loader(), SEEN, absent_classes=[4], progress=False)
    assert_calibrated(model, result, absent=[4])
    assert result.split == ClassSplit(NUM_CLASSES, SEEN, [4])
    inferred = calibrate(net(), loader(), absent_classes=[4], progress=False)
    assert inferred == result


def test_labels_beside_the_seen_ones():
    data = blobs(ALL)
    model = net()
    with pytest.warns(UserWarning, match="45 of 90 samples .* not of the `seen_classes` and were left out"):
        result = calibrate(model, loader(data), SEEN, progress=False)
    assert_calibrated(model, result, x=data.tensors[0], y=data.tensors[1])


def test_ignored_labels():
    model, keep = net(), torch.arange(len(Y)) % 4 > 0
    data = TensorDataset(X, torch.where(keep, Y, -100))
    for seen in (None, SEEN):
        result = calibrate(model, loader(data), seen, progress=False)
        assert_calibrated(model, result, x=X[keep], y=Y[keep])


def test_a_second_calibration_replaces_the_first():
    model = net()
    first = calibrate(model, loader(), progress=False)
    with torch.no_grad():
        model.fc.bias[ABSENT] -= 1.0
    second = calibrate(model, loader(), progress=False)
    assert second.gamma == pytest.approx(first.gamma + 1, rel=1e-5)
    assert_calibrated(model, second)


def test_modes_buffers_and_random_streams_are_left_alone():
    class Noisy(Dataset):
        def __len__(self):
            return len(TRAIN)

        def __getitem__(self, index):
            x, y = TRAIN[index]
            return x + torch.randn(5) + np.random.randn() + random.random(), y

    model = net().train()
    model.body[1].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    state = copy.deepcopy(model.state_dict())
    streams = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    for data in (DataLoader(Noisy(), 8, shuffle=True), DataLoader(Noisy(), 8, num_workers=1)):
        calibrate(model, data, progress=False)
    assert torch.equal(torch.get_rng_state(), streams[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == streams[1:]
    assert {name: module.training for name, module in model.named_modules() if "absent" not in name} == modes
    assert_same({key: model.state_dict()[key] for key in state}, dict(state))
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())

    class Batch(nn.BatchNorm1d):
        def forward(self, x):
            assert not self.training
            assert not torch.is_grad_enabled()
            return super().forward(x)

    model.body[1] = Batch(16)
    calibrate(model.train(), loader(), progress=False)


def test_max_samples():
    def run(data, **kwargs):
        model = net()
        return calibrate(model, data, progress=False, **kwargs)

    first = run(loader(), max_samples=20)
    assert first.num_samples == 20
    torch.manual_seed(9)
    assert run(loader(batch_size=20), max_samples=20).gamma == pytest.approx(first.gamma, rel=1e-6)  # the same twenty
    assert first.gamma != pytest.approx(run(loader()).gamma, rel=1e-4)
    assert run(batches(), max_samples=20).num_samples == 24  # whole batches
    assert run(loader(), max_samples=999).num_samples == len(TRAIN)
    with pytest.raises(ValueError, match="`max_samples` to be an integer of at least 1, but got 0"):
        run(loader(), max_samples=0)


def test_an_estimator_object():
    model, estimator = net(), AverageLogitGap(NUM_CLASSES, SEEN)
    result = calibrate(model, loader(), estimator=estimator, progress=False)
    assert_calibrated(model, result)
    assert result.estimator == "AverageLogitGap"
    again = calibrate(model, loader(), estimator=estimator, progress=False)
    assert again == result


def test_the_progress_bar(capsys):
    calibrate(net(), loader())
    told = capsys.readouterr().err
    assert "Reading labels" in told
    assert "Calibrating" in told
    assert "/6" in told
    calibrate(net(), loader(), progress=False)
    assert capsys.readouterr().err == ""


def test_the_result():
    result = calibrate(net(), loader(), progress=False)
    assert isinstance(result, CalibrationResult)
    plain = result.as_dict()
    assert plain["seen_classes"] == SEEN
    assert plain["absent_classes"] == ABSENT
    assert {key: type(value) for key, value in plain.items()} == {
        "gamma": float,
        "standard_error": float,
        "num_samples": int,
        "estimator": str,
        "num_classes": int,
        "seen_classes": list,
        "absent_classes": list,
        "share_table": dict,
        "verdict": str,
    }


@pytest.mark.parametrize("seen", [None, [1, 3, 7]])
def test_many_rows_that_may_never_occur(seen):
    torch.manual_seed(0)
    wide, data = torch.nn.Linear(4, 40), [(torch.randn(30, 4), torch.tensor([1, 3, 7]).repeat(10))]
    text = r"37 rows that are not in the training data, which has 3 classes.*`absent_classes=\[...\]`.*`absent_share`"
    with pytest.warns(UserWarning, match=text):
        calibrate(wide, data, seen, progress=False)
    metric = ESTIMATORS["alg"](40, [1, 3, 7])
    for said in (
        {"absent_share": 0.2},
        {"absent_classes": [0, 2]},
        {"estimator": "fixed", "estimator_kwargs": {"gamma": 1.0}},
        {"estimator": metric, "seen_classes": None},
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            calibrate(wide, data, **{"seen_classes": seen, **said}, progress=False)
