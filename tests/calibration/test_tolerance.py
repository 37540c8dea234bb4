"""Reading only as many samples as gamma needs."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_calibft import calibrate, get_gamma
from lightning_calibft.head.offset import attached_heads
from tests.helpers.references import _reference_gap
from tests.helpers.runs import ABSENT, NUM_CLASSES, SEEN, blobs

DATA = blobs(SEEN, each=500)  # in random order
SORTED = TensorDataset(*(tensor[DATA.tensors[1].argsort(stable=True)] for tensor in DATA.tensors))


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(5, NUM_CLASSES)


def gap(model, data, rows):
    inputs, target = (tensor[rows] for tensor in data.tensors)
    with torch.no_grad():
        return _reference_gap(nn.functional.linear(inputs, model.weight, model.bias), target, SEEN, ABSENT)


@pytest.mark.parametrize("batch_size", [1, 16, 100])
def test_samples_are_read_in_random_order_until_gamma_is_sure(batch_size):
    """Also of data that is sorted by class, where the first samples are of one class alone."""
    model, tolerance = net(), 0.05
    result = calibrate(model, DataLoader(SORTED, batch_size), SEEN, tolerance=tolerance, progress=False)
    assert 100 <= result.num_samples < 1000
    assert result.num_samples % batch_size == 0
    order = torch.randperm(len(SORTED), generator=torch.Generator().manual_seed(0))
    gamma, error, _ = gap(model, SORTED, order[: result.num_samples])
    assert (result.gamma, result.standard_error) == pytest.approx((gamma, error), rel=1e-5)
    assert error <= tolerance
    before = math.ceil(result.num_samples / batch_size / 1.25 - 1) * batch_size  # where it looked before, or less
    assert before < 100 or gap(model, SORTED, order[:before])[1] > 0.95 * tolerance
    of_all = gap(model, SORTED, range(len(SORTED)))[0]
    assert get_gamma(model) == pytest.approx(of_all, abs=4 * tolerance)


def test_all_samples_if_gamma_is_never_so_sure():
    model = net()
    result = calibrate(model, DataLoader(DATA, 64), SEEN, tolerance=1e-6, progress=False)
    assert result.num_samples == len(DATA)
    assert result.gamma == pytest.approx(gap(model, DATA, range(len(DATA)))[0], rel=1e-5)


def test_at_most_so_many_samples():
    result = calibrate(net(), DataLoader(DATA, 64), SEEN, tolerance=1e-6, max_samples=320, progress=False)
    assert result.num_samples == 320


def test_no_fewer_than_a_hundred():
    """However sure gamma looks."""
    constant = TensorDataset(torch.ones(400, 5), torch.tensor(SEEN[:2] * 200))
    result = calibrate(net(), DataLoader(constant, 8), SEEN, tolerance=100.0, progress=False)
    assert 100 <= result.num_samples <= 125 + 8


def test_an_estimator_that_keeps_the_samples():
    options = {"estimator": "pseudo_absent", "pretrained": net(), "progress": False}
    few = calibrate(net(), DataLoader(DATA, 32), SEEN, tolerance=0.1, **options)
    of_all = calibrate(net(), DataLoader(DATA, 32), SEEN, **options)
    assert few.num_samples < of_all.num_samples == len(DATA)
    assert few.standard_error <= 0.1
    assert few.gamma == pytest.approx(of_all.gamma, abs=0.4)


def test_any_iterable_in_its_own_order():
    batches = [tuple(tensor[start : start + 50] for tensor in DATA.tensors) for start in range(0, len(DATA), 50)]
    model = net()
    result = calibrate(model, iter(batches), SEEN, tolerance=0.1, progress=False)
    assert 100 <= result.num_samples < len(DATA)
    assert result.gamma == pytest.approx(gap(model, DATA, range(result.num_samples))[0], rel=1e-5)


def test_several_loaders_are_refused():
    model, loaders = net(), [DataLoader(DATA, 8), DataLoader(SORTED, 8)]
    with pytest.raises(ValueError, match=r"`tolerance` to be None with several loaders, but got 2 of them: .*Concat"):
        calibrate(model, loaders, SEEN, tolerance=0.1, progress=False)
    assert not attached_heads(model)


@pytest.mark.parametrize("tolerance", [0, -0.1, float("nan"), float("inf"), "small"])
def test_impossible_tolerances(tolerance):
    with pytest.raises(ValueError, match=f"`tolerance` to be a positive number, .* but got {tolerance!r}"):
        calibrate(net(), DataLoader(DATA, 8), SEEN, tolerance=tolerance)


@pytest.mark.parametrize("max_samples", [0, -3, 1.5, "many"])
def test_impossible_numbers_of_samples(max_samples):
    with pytest.raises(ValueError, match=f"`max_samples` to be an integer of at least 1, but got {max_samples!r}"):
        calibrate(net(), DataLoader(DATA, 8), SEEN, max_samples=max_samples)


def test_no_batches():
    with pytest.raises(ValueError, match="to hold samples of the seen classes, but got none"):
        calibrate(net(), [], SEEN, tolerance=0.1, progress=False)


def test_no_warning_of_what_the_first_batches_lack():
    """The first batches hold no sample of a seen class."""
    data = TensorDataset(torch.randn(600, 8), torch.arange(600) % 40)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*received no")
        warnings.filterwarnings("ignore", ".*samples in the calibration pass are not of")
        options = {"absent_classes": range(2, 40), "tolerance": 0.05, "progress": False}
        result = calibrate(nn.Linear(8, 40), DataLoader(data, 4), [0, 1], **options)
    assert result.num_samples == 30
